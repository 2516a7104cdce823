"""One run at a time in a folder: a lock that the kernel keeps on one machine, and a lease that beats for all who share a disk.

The lease is a file `.lease-N` that names its holder and is written again every BEAT_S seconds. Whoever comes looks at the last of
them. Where its holder lives on the same machine, or another writes to it, the looker is refused. Where the holder is dead, or the
file has rested for STALE_S seconds of the looker's own clock (clocks of two machines are never compared), the looker makes
`.lease-N+1`, which only one can make, and removes the old ones.
"""

import contextlib
import fcntl
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname

from histoscale.data.journal import names_file
from histoscale.data.living import Process, lives, this_process
from histoscale.launch.overrides import ConfigError

LOCK = ".lock"
BEAT_S = 20.0  # one small write each: nothing, even to a busy network disk
STALE_S = 120.0  # six beats: a network disk may hang for one or two minutes when its server fails over, and its users live on
_POLL_S = 0.5
_BYTES = 1024  # a record is always as long, so that it is written in one piece over the old one
_NAME = re.compile(r"\.lease-(\d+)")
EXIT_LOST = 2


class Refused(ConfigError):
    """`out` cannot take a run: another one writes to it, or it holds another result than the one that would be made."""


class Lost(OSError):
    """The folder is no longer this run's: it was deleted, or another run took it over. Nothing more may be written to it."""


@dataclass(frozen=True)
class Holder:
    """host: for people. since, at: when the run began and when it last said that it lives, by its own clock, for people too."""

    host: str
    process: Process
    since: str
    at: str
    beat: int

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.host}, begun {self.since}, last heard of {self.at}"


class Lease:
    """The lease of a folder, held."""

    def __init__(self, out: Path, number: int, descriptor: int, holder: Holder) -> None:
        self.out, self.number, self.holder = out, number, holder
        self._descriptor, self._ended, self._lock = descriptor, threading.Event(), threading.Lock()
        self._write(holder)

    def beat(self) -> None:
        """Say that the run lives. Raises Lost, and OSError of a disk that is full or away."""
        with self._lock:
            if self._ended.is_set():  # the descriptor is closed, or another file's
                return
            self.check()
            self.holder = replace(self.holder, at=_now(), beat=self.holder.beat + 1)
            self._write(self.holder)

    def check(self) -> None:
        """Raises Lost when the folder is no longer this run's."""
        later = [number for number in _numbers(self.out) if number > self.number]
        if later:
            taken = _read(self.out, later[-1])
            by = f" ({taken})" if taken is not None else ""
            raise Lost(f"another run took {self.out} over{by}, as this one had given no sign of life: it writes nothing more")
        try:
            there = os.path.samestat(os.stat(_path(self.out, self.number)), os.fstat(self._descriptor))
        except FileNotFoundError:
            there = False
        if not there:
            raise Lost(f"{self.out} was deleted or moved while this run wrote to it: it stops here; the same command begins anew")

    def kept(self) -> bool:
        """Whether what is written now still belongs to this run."""
        with contextlib.suppress(OSError):
            self.check()
            return True
        return False

    def keep(self, wait_s: float) -> None:
        """Beat until the end of the process or of the lease; a lost lease ends the process before it does more harm."""
        while not self._ended.wait(wait_s):
            try:
                self.beat()
            except Lost as lost:
                print(f"histoscale: {lost}", file=sys.stderr, flush=True)
                os._exit(EXIT_LOST)
            except OSError:  # full, or away for a moment: only another run or the end of the folder takes a lease
                continue

    def end(self) -> None:
        with self._lock:
            self._ended.set()
            if self.kept():
                with contextlib.suppress(OSError):  # read-only by now: the next start sees that this process is gone
                    _path(self.out, self.number).unlink()
            os.close(self._descriptor)

    def _write(self, holder: Holder) -> None:
        """Into the very file that was made: where another took the folder over, nobody reads it any more."""
        os.pwrite(self._descriptor, json.dumps(asdict(holder)).ljust(_BYTES - 1).encode() + b"\n", 0)
        os.fsync(self._descriptor)  # others see it now


@contextlib.contextmanager
def alone(out: Path, say: Callable[[str], None]) -> Iterator[Lease]:
    """Hold `out`, which is made, against every other run on all machines that see it. Raises Refused."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(_in_use(out, _newest(out))) from None
        except OSError:  # a network disk without locks: there is the lease
            pass
        lease = take(out, this_process(), say)
        threading.Thread(target=lease.keep, args=(BEAT_S,), daemon=True, name="lease").start()
        try:
            yield lease
        finally:
            lease.end()


def take(out: Path, me: Process, say: Callable[[str], None], stale_s: float = STALE_S) -> Lease:
    """The lease of a folder. Raises Refused when another holds it: at once on one machine, when it beats on two."""
    first: tuple[int, Holder | None] | None = None
    began, told = time.monotonic(), False
    while True:
        numbers = _numbers(out)
        holder = _read(out, numbers[-1]) if numbers else None
        living = lives(holder.process, me.machine) if holder is not None else None
        if numbers and living is not False:
            seen = numbers[-1], holder
            if living or (first is not None and seen != first):
                raise Refused(_in_use(out, holder))
            if first is None:
                first, began = seen, time.monotonic()
            rested = time.monotonic() - began
            if rested < stale_s:
                if rested > _POLL_S and not told:
                    told = True
                    who = holder or "a run that has no name yet"
                    say(f"{out} is held by {who}: waiting {stale_s:.0f} s for a sign of life")
                time.sleep(_POLL_S)
                continue
        lease = _made(out, numbers, me)
        if lease is not None:
            return lease
        first = None


def _made(out: Path, numbers: list[int], me: Process) -> Lease | None:
    """A lease above those that were looked at; None where others came in between. Raises OSError, which names the file."""
    number = max(numbers, default=0) + 1
    path = _path(out, number)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    lease = None
    try:
        if _numbers(out) == [*numbers, number]:  # else runs came or went between the look and the making
            with names_file(path):
                lease = Lease(out, number, descriptor, Holder(gethostname(), me, _now(), _now(), 0))
    finally:
        if lease is None:
            path.unlink(missing_ok=True)
            os.close(descriptor)
    for old in numbers if lease is not None else ():
        _path(out, old).unlink(missing_ok=True)
    return lease


def busy(out: Path) -> bool:
    """Whether another run holds the folder, or might."""
    numbers = _numbers(out)
    holder = _read(out, numbers[-1]) if numbers else None
    if numbers and (holder is None or lives(holder.process) is not False):
        return True
    try:
        with (out / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody was there, or it is a disk without locks
        pass
    return False


def is_ours(name: str) -> bool:
    """Whether a file in `out` is the lock or a lease, and so no result."""
    return name == LOCK or _NAME.fullmatch(name) is not None


def _in_use(out: Path, holder: Holder | None) -> str:
    who = f" ({holder})" if holder is not None else ""
    return f"another run is writing to {out}{who}; wait for it, stop it, or give another out="


def _newest(out: Path) -> Holder | None:
    numbers = _numbers(out)
    return _read(out, numbers[-1]) if numbers else None


def _path(out: Path, number: int) -> Path:
    return out / f".lease-{number}"


def _numbers(out: Path) -> list[int]:
    """Of the leases that are there, ascending; none in a folder that is gone."""
    try:
        return sorted(int(match[1]) for name in os.listdir(out) if (match := _NAME.fullmatch(name)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(out: Path, number: int) -> Holder | None:
    """None for a lease that is gone, or not written yet."""
    try:
        values = json.loads(_path(out, number).read_text())
        return Holder(**{**values, "process": Process(**values["process"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
