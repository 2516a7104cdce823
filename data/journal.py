"""What a run tells: metric rows, progress, the summary; and how files are written, whole and without credentials."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from safetensors import SafetensorError
from tqdm import tqdm

from histoscale.data.secrets import scrub, scrubbed

_OF_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_aside: list[TextIO] = []


@dataclass(frozen=True)
class JournalConfig:
    """progress: `auto` draws bars on a terminal and prints plain lines elsewhere; `bar`, `lines`, `off` force it.
    interval_s: at most one plain line in so many seconds. wandb: `off`, `offline`, `online` or
    `auto` (online with a key, offline without); wandb_project: its project. tensorboard: whether events are written too."""

    progress: str
    interval_s: float
    wandb: str
    wandb_project: str
    tensorboard: bool


@contextmanager
def aside(file: TextIO) -> Iterator[None]:
    """Inside, what journals say goes to a file and not to the terminal; progress stays where it is."""
    _aside.append(file)
    try:
        yield
    finally:
        _aside.remove(file)


class Progress:
    """A bar on a terminal, plain lines with rate and time left elsewhere."""

    def __init__(self, total: int, text: str, unit: str, style: str, interval_s: float) -> None:
        self.total, self.text, self.unit, self.interval_s = total, text, unit, interval_s
        self.count, self.start, self.last = 0, time.monotonic(), time.monotonic()
        self.shown, self.told = "", -1
        self.lines = style == "lines"
        self.bar = tqdm(total=total, desc=text, unit=unit, file=sys.stderr, dynamic_ncols=True) if style == "bar" else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.lines and kind is None and self.told != self.count:
            self._line(time.monotonic())

    def advance(self, n: int = 1, **shown: float | str) -> None:
        """Count n more; `shown` values stand beside the rate."""
        self.count += n
        if shown:
            self.shown = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(self.shown, refresh=False)
            self.bar.update(n)
        elif self.lines and now - self.last >= self.interval_s:
            self._line(now)

    def _line(self, now: float) -> None:
        self.last, self.told = now, self.count
        rate = self.count / max(now - self.start, 1e-9)
        left = (self.total - self.count) / rate if rate and self.total else 0.0
        line = f"{self.text}: {self.count}/{self.total} {self.unit}  {rate:.1f}/s  {left:.0f} s left  {self.shown}"
        print(line.rstrip(), file=sys.stderr, flush=True)


class Journal:
    """Writes `metrics.jsonl` and `summary.json` into `out`; silent on every rank but the first (`main`)."""

    def __init__(self, out: Path, config: JournalConfig, main: bool = True) -> None:
        if config.progress not in ("auto", "bar", "lines", "off"):
            raise ValueError(f"logging.progress is {config.progress!r}: expected auto, bar, lines or off")
        self.out, self.config, self.main = Path(out), config, main
        self._whole = False  # whether metrics.jsonl is known to end in a whole line
        if main:
            self.out.mkdir(parents=True, exist_ok=True)
        style = config.progress
        if style == "auto":
            style = "bar" if sys.stderr.isatty() else "lines"
        self._style = style if main else "off"

    def path(self, name: str) -> Path:
        """A path inside `out`, its folder made. Raises ValueError when the name leaves `out`, OSError when `out` was deleted."""
        path = (self.out / name).resolve()
        if not path.is_relative_to(self.out.resolve()):
            raise ValueError(f"the name {name!r} leaves the output folder {self.out}")
        if self.main and not self.out.is_dir():  # what is made anew would lack all that was there
            raise OSError(f"{self.out} was deleted or moved while it was written to: the same command begins anew")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def row(self, **values: Any) -> None:
        """Append one JSON line to metrics.jsonl. Raises OSError, which names the file."""
        if self.main:
            path = self.path("metrics.jsonl")
            if not self._whole:
                keep_rows(path, lambda row: True)
                self._whole = True
            append_rows(path, [values])

    def forget(self, superseded: Callable[[dict[str, Any]], bool]) -> None:
        """Take rows that will be computed again out of metrics.jsonl."""
        if self.main:
            keep_rows(self.path("metrics.jsonl"), lambda row: not superseded(row))
            self._whole = True

    def progress(self, total: int, text: str, unit: str) -> Progress:
        return Progress(total, text, unit, self._style, self.config.interval_s)

    def say(self, text: str) -> None:
        if self.main and self.config.progress != "off":
            if _aside:
                print(scrub(text), file=_aside[-1], flush=True)
            else:
                tqdm.write(scrub(text), file=sys.stderr)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Merge nested values into summary.json; the file is replaced atomically."""
        if not self.main:
            return
        path = self.path("summary.json")
        merged = _merge(json.loads(path.read_text()) if path.exists() else {}, plain(values))
        write_json(path, merged, sort_keys=True)


def keep_rows(path: Path, keeps: Callable[[dict[str, Any]], bool]) -> None:
    """Leave in a file of JSON lines those that `keeps` wants; a torn line (a kill, a full disk) goes with the others.

    A file from which nothing goes is not touched, and one that is not there is not made.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    *lines, torn = text.split(b"\n")
    kept = [line for line in lines if (row := _row(line)) is not None and keeps(row)]
    if torn or len(kept) < len(lines):
        write_atomic(path, b"".join(line + b"\n" for line in kept).decode())


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def append_rows(path: Path, rows: Iterable[Any]) -> None:
    """Add values as JSON lines, in one write, since processes may share the file. Raises OSError, which names it."""
    data = "".join(_json(path, row) + "\n" for row in rows).encode()
    with names_file(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while data:  # a disk that fills up takes a part, and says so at the next write
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Write, sync, read back and rename: a reader sees the old file or the new one, and the new one holds this text and no other.
    Raises OSError, which names the file."""
    partial, data = path.with_name(path.name + f".{os.getpid()}.partial"), text.encode()
    with names_file(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if partial.read_bytes() != data:
                raise OSError(errno.EIO, "does not read back as it was written: is its disk sound?", str(path))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)  # of a full disk, or a signal


def write_text(path: Path, text: str) -> None:
    """Text for people, without credentials, as `write_atomic`."""
    write_atomic(path, scrubbed(text))


def write_json(path: Path, values: Any, compact: bool = False, sort_keys: bool = False) -> None:
    """Values as JSON, without credentials, as `write_atomic`. Raises ValueError, which names the file, where its text would say
    something else than the values."""
    spelling: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 2}
    write_atomic(path, _json(path, values, sort_keys=sort_keys, **spelling) + "\n")


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Values as JSON lines in place of what the file held, as `write_json`."""
    write_atomic(path, "".join(_json(path, row) + "\n" for row in rows))


def _json(path: Path, values: Any, **spelling: Any) -> str:
    meant = scrubbed(plain(values))
    text = json.dumps(meant, allow_nan=False, **spelling)
    if json.loads(text) != meant:
        raise ValueError(f"{path} is not written: its JSON would not say what was meant; is there an odd character in a name?")
    return text


@contextmanager
def names_file(path: Path | str) -> Iterator[None]:
    """The error of a write to a full disk says nothing of the file: while inside, it does, also that of safetensors."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_WRITES or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    except SafetensorError as error:
        if not str(error).startswith("Error while serializing"):
            raise
        raise OSError(f"{path} cannot be written ({error}); the same command goes on once it can") from error


def _merge(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in new.items():
        nested = isinstance(value, Mapping) and isinstance(old.get(name), dict)
        old[name] = _merge(old[name], value) if nested else value
    return old


def plain(value: Any) -> Any:
    """JSON types only: arrays become lists, numpy scalars numbers, non-finite floats None (JSON has none)."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy's arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value
