"""Mutated inputs to parsers, in a child process of bounded time and memory: a named error or a right result, else a finding.

A file of targets has a function `targets(folder)` that gives name -> Target. `fuzzed("fuzz.parsers", 60, folder)` runs them all.
What gave an error from a new place in the code is mutated further, as the seeds are, which give results. No coverage is measured.
"""

import contextlib
import faulthandler
import importlib
import json
import mmap
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MOST_S = 5.0  # CPU seconds of one input
MOST_MB = 512  # of memory above what the process held before its first mutated input
_LONGEST = 1 << 20  # bytes of a mutated input
_HANGS_S = 60.0  # an input that takes so long without using a processor waits for something
_BEGINS_S = 300.0  # until the first input: importing torch on a machine that does other things
_MOST_OUTCOMES = 2000  # that are mutated further
_SHOWN = 20  # findings of one target
_AT = struct.Struct("<QQ")  # number and length of the input that stands behind it
_NUMBERS = (
    0,
    2,
    7,
    1 << 7,
    1 << 8,
    1 << 15,
    1 << 16,
    1 << 24,
    1 << 31,
    1 << 32,
    1 << 62,
    1 << 63,
    1 << 64,
)  # and their neighbours


@dataclass(frozen=True)
class Target:
    """seeds: valid inputs, for which `call` raises nothing. call: gives bytes to a parser, and raises AssertionError for a result
    that is wrong. errors: what it may raise otherwise. words: texts of the format that are written into inputs. most_s: CPU
    seconds of one input."""

    seeds: Sequence[bytes]
    call: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    words: Sequence[bytes] = ()
    most_s: float = MOST_S


@dataclass(frozen=True)
class Outcome:
    """What one target did. outcomes: a result, and the places of errors. peak_mb: above what was held before."""

    target: str
    executions: int
    outcomes: int
    slowest_s: float
    peak_mb: float
    findings: list[str]


def fuzzed(module: str, seconds: float, folder: Path, seed: int = 0) -> list[Outcome]:
    """Run the targets of a file for so many seconds together, in one child process. Inputs of findings are left in `folder`.

    A child that dies or stands still is the finding of the target that it was at; those behind it are not run.
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).resolve().parents[1]), *_paths()]))
    command = [sys.executable, "-m", "fuzz.engine", module, str(seconds), str(folder), str(seed)]
    log, said = folder / "child.log", folder / "outcomes.jsonl"
    with log.open("wb") as stderr, said.open("wb") as stdout:
        child = subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr)
        try:
            code = _waited(child, folder)
        finally:
            child.kill()
            child.wait()
    found = [Outcome(**json.loads(line)) for line in said.read_text().splitlines()]
    if code != 0:
        at = (folder / "at").read_text() if (folder / "at").exists() else "before the first target"
        end = log.read_text(errors="replace")[-3000:]
        died = folder / "died"
        died.write_bytes(_current(folder)[1])
        found.append(Outcome(at, 0, 0, 0.0, 0.0, [f"the process ended with {code} at the input {died}:\n{end}"]))
    return found


def _current(folder: Path) -> tuple[int, bytes]:
    """Which input the child is at, and its bytes."""
    try:
        data = (folder / "current").read_bytes()
    except FileNotFoundError:
        return 0, b""
    count, length = _AT.unpack_from(data)
    return count, data[_AT.size : _AT.size + length]


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _waited(child: subprocess.Popen[bytes], folder: Path) -> int | str:
    """The exit code of the child, or that one input took too long by the clock."""
    last, since = 0, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(0.5)
        count = _current(folder)[0]
        if count != last:
            last, since = count, time.monotonic()
        limit = _HANGS_S if count else _BEGINS_S
        if time.monotonic() - since > limit:
            return f"no answer within {limit:g} s"


def _main(module: str, seconds: float, folder: Path, seed: int) -> None:
    targets: dict[str, Target] = importlib.import_module(module).targets(folder)
    for target in targets.values():
        for data in target.seeds:
            target.call(data)
    faulthandler.register(signal.SIGPROF, chain=True)  # says where it stood, then ends the process
    held = _status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (held + (MOST_MB << 20),) * 2)
    with (folder / "current").open("w+b") as file:
        file.truncate(_AT.size + _LONGEST)
        current = mmap.mmap(file.fileno(), 0)
    for name, target in targets.items():
        (folder / "at").write_text(name)
        draw = random.Random(f"{name} {seed}")
        print(json.dumps(asdict(_run(name, target, seconds / len(targets), folder, current, draw))), flush=True)


def _run(name: str, target: Target, seconds: float, folder: Path, current: mmap.mmap, draw: random.Random) -> Outcome:
    pool, seen, findings = list(target.seeds), {"a result"}, dict[str, str]()
    executions, slowest = 0, 0.0
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutated(draw.choice(pool), pool, target.words, draw)
        current[_AT.size : _AT.size + len(data)] = data
        _AT.pack_into(current, 0, _AT.unpack_from(current)[0] + 1, len(data))  # if the process ends here, this is why
        signal.setitimer(signal.ITIMER_PROF, target.most_s)
        start = time.process_time()
        try:
            target.call(data)
            mark = "a result"
        except target.errors as error:
            mark = _place(error)
        except Exception as error:  # whatever else a parser lets out is what is looked for
            mark = _place(error)
            if mark not in findings and len(findings) < _SHOWN:
                path = folder / f"{name}-{executions}"
                path.write_bytes(data)
                told = "".join(line[:500] for line in traceback.format_exception(error)[-6:])
                findings[mark] = f"{path} ({len(data)} bytes, {data[:80]!r}):\n{told}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        executions, slowest = executions + 1, max(slowest, time.process_time() - start)
        if mark not in seen and len(seen) < _MOST_OUTCOMES:
            seen.add(mark)
            pool.append(data)
    peak = max(0, _status("VmHWM") - before) / (1 << 20)
    return Outcome(name, executions, len(seen), round(slowest, 3), round(peak, 1), list(findings.values()))


def _place(error: BaseException) -> str:
    """Where an error was first raised, its kind and its words without numbers: what tells two outcomes apart."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    words = re.sub("[^a-z ]+", "", str(error))[:300]
    return " ".join([type(error).__name__, *(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:]), words])


def _status(name: str) -> int:
    """Bytes that the system says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)


def mutated(data: bytes, pool: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> bytes:
    """The bytes with one to six changes."""
    changed = bytearray(data)
    for _ in range(min(1 + int(draw.expovariate(0.7)), 6)):
        draw.choice(_CHANGES)(changed, pool, words, draw)
        del changed[_LONGEST:]
    return bytes(changed)


Change = Callable[[bytearray, Sequence[bytes], Sequence[bytes], random.Random], None]


def _span(data: bytearray, draw: random.Random) -> tuple[int, int]:
    """A short stretch more often than a long one."""
    start = draw.randint(0, len(data))
    return start, min(len(data), start + int(draw.expovariate(1 / draw.choice((2, 16, 128, 4096)))) + 1)


def _flip(data: bytearray, pool: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> None:
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _byte(data: bytearray, pool: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> None:
    if data:
        data[draw.randrange(len(data))] = draw.randrange(256)


def _number(data: bytearray, pool: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> None:
    """An interesting whole number over what stands there, or in place of digits."""
    value = draw.choice(_NUMBERS) + draw.choice((0, 0, 1, -1))
    if draw.random() < 0.3:
        start, stop = _span(data, draw)
        data[start : min(stop, start + 4)] = str(draw.choice((value, -value, f"1e{draw.randrange(400)}", "nan", "inf"))).encode()
        return
    size = draw.choice((1, 2, 4, 8))
    start = draw.randint(0, max(0, len(data) - size))
    packed = struct.pack(draw.choice("<>") + "Q", value % (1 << 64))
    data[start : start + size] = (packed[:size] if packed[0] else packed[-size:]) if size < 8 else packed


def _cut(data: bytearray, pool: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> None:
    start, stop = _span(data, draw)
    del data[start : len(data) if draw.random() < 0.1 else stop]


def _repeat(data: bytearray, pool: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> None:
    """A stretch several times: repeated keys, and depth."""
    start, stop = _span(data, draw)
    times = draw.choice((1, 2, 16, 300, 5000))
    data[stop:stop] = bytes(data[start:stop]) * min(times, 1 + _LONGEST // max(1, stop - start) // 4)


def _move(data: bytearray, pool: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> None:
    start, stop = _span(data, draw)
    place = draw.randint(0, len(data))
    data[place : place + stop - start] = data[start:stop]


def _splice(data: bytearray, pool: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> None:
    """The end of another input behind the beginning of this one."""
    other = draw.choice(pool)
    place = draw.randint(0, len(data))
    data[place:] = other[place if draw.random() < 0.5 else draw.randint(0, len(other)) :]


def _word(data: bytearray, pool: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> None:
    word = (
        draw.choice(words) if words else bytes(draw.choices(b"\0\1\x1b\x7f\xc2\xff \n\r,;\"'<>&{}[]=|/\\", k=draw.randint(1, 4)))
    )
    start, stop = _span(data, draw)
    data[start : draw.choice((start, stop))] = word * draw.choice((1, 1, 1, 2, 3000))


_CHANGES: tuple[Change, ...] = (_flip, _flip, _byte, _number, _number, _cut, _repeat, _move, _splice, _word, _word)


if __name__ == "__main__":
    _main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
