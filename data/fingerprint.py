"""Which bytes were read: a hash of the content of every input file, and the list of them that a run leaves beside its result.

A result is known by the content of its inputs, not by their dates: a file that was touched, or copied to another machine, is the
same input, and one changed byte is another. Local files are read whole, once: a hash is remembered with the file's size, inode,
time of change and time of status change (ctime, which every write moves and nobody can set back), and is only taken over while
all four are the same and the file had rested for two seconds when it was read (git's "racy" rule: a write within one tick of a
clock leaves no trace in a time). Remote files are known by size and etag, slides as `slide_bytes` says.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from histoscale.data.journal import write_rows
from histoscale.data.storage import Fingerprint, StorageError, Store, is_remote

THREADS = 8  # more than cores: on a network's file system they wait
LIST = "inputs.jsonl"  # in the folder of a run
_RESTED_NS = 2_000_000_000
TILE, SLIDE = 1 << 16, 32 << 20  # bytes up to which a sketch of one holds every byte
BLOCKS, _BLOCK = 16, 1 << 12

Stat = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode


@dataclass
class Noted:
    """What was asked for while an identity was made. files: absolute path or URI -> hash, of what belongs to it; beside: of what
    was only checked."""

    files: dict[str, str]
    beside: dict[str, str]


_known: dict[str, tuple[Stat, str]] = {}  # of files that had rested
_noted: list[Noted] = []
_lock = threading.Lock()


def content(path: Path | str, belongs: bool = True) -> str:
    """The sha256 of a local file. belongs: to the identity; else it is only checked.

    Raises OSError, also for a file that changes while it is read.
    """
    name = os.path.abspath(path)
    found = _hash(name)
    _note(name, found, belongs)
    return found


def contents(paths: Sequence[Path]) -> list[str]:
    """`content` of many files, several at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(content, paths))


def told(path: Path | str, found: str) -> None:
    """Notes a local file or folder by a hash that its own reader made of what it holds: equal ones may differ in their bytes."""
    _note(os.path.abspath(path), found, True)


def bytes_of(uri: str, store: Store) -> str:
    """The sha256 of a local file, the size and etag of a remote one. Raises Missing, StorageError, OSError."""
    if not is_remote(uri):
        return content(store.local(uri))
    mark = store.fingerprint(uri)
    _note(uri, f"{mark.size} {mark.tag}", True)
    return f"{mark.size} {mark.tag}"


def sketch(path: Path | str, whole: int = TILE) -> str:
    """A hash of a local file's size and of `BLOCKS` blocks of it, of every byte up to `whole` bytes: for files of which there may
    be terabytes. One that was replaced is another; a byte changed in place in a larger one may be missed. Raises OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        starts = range(0, size, whole) if size <= whole else (i * (size - _BLOCK) // (BLOCKS - 1) for i in range(BLOCKS))
        for start in starts:
            digest.update(os.pread(file.fileno(), whole if size <= whole else _BLOCK, start))
    return digest.hexdigest()


def sketches(paths: Sequence[Path | str]) -> list[str]:
    """`sketch` of many tiles, several at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(sketch, paths))


def sketch_of(uri: str, store: Store, mark: Fingerprint) -> str:
    """The sketch of a local file; of a remote one its size and etag, which `mark` holds."""
    return f"{mark.size} {mark.tag}" if is_remote(uri) else sketch(store.local(uri))


def slide_bytes(uri: str, store: Store) -> str:
    """What stands for the bytes of a slide, over all files that belong to it (`Store.parts`; of a folder those in it).

    Of a local file every byte counts up to `SLIDE`: touched or copied it is the same. A larger one, of which there may be
    terabytes, goes by a sketch and its time of change: a byte written in place makes another slide, and so does a touch, or a
    copy that does not keep times (`cp -p` and `rsync -t` do). Remote files go by size and etag. Raises Missing, StorageError.
    """
    if is_remote(uri):
        marks = map(store.fingerprint, store.parts(uri))
        return " ".join(f"{mark.size} {mark.tag}" for mark in marks)
    path = store.local(uri)
    parts = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else map(store.local, store.parts(uri))
    try:
        return " ".join(_slide_part(part) for part in parts)
    except OSError as error:
        raise StorageError(f"{uri}: {error.strerror or error}") from error


def _slide_part(path: Path) -> str:
    stat = path.stat()
    return sketch(path, SLIDE) + (f" {stat.st_mtime_ns}" if stat.st_size > SLIDE else "")


def note_slides(uris: Sequence[str], store: Store) -> None:
    """Notes slides by `slide_bytes`; one that cannot be read, as that: who reads it will say why."""

    def one(uri: str) -> None:
        try:
            found = slide_bytes(uri, store)
        except StorageError:
            found = "unread"
        _note(uri, found, True)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, uris))


def is_run(folder: Path) -> bool:
    """Whether a command wrote into a folder: its pictures are none of the data around it."""
    return (folder / LIST).exists()


@contextlib.contextmanager
def noting() -> Iterator[Noted]:
    """Lists every file that is asked for inside."""
    noted = Noted({}, {})
    _noted.append(noted)
    try:
        yield noted
    finally:
        _noted.remove(noted)


def by_key(files: Mapping[str, str], roots: Mapping[str, str]) -> dict[str, str]:
    """Names that do not depend on where inputs lie -> hash: the key that a file was given by, and its path below that.

    roots: key -> the path that it names. A file below none of them goes by its own name.
    """
    given = [(os.path.abspath(os.path.expanduser(root)), key) for key, root in roots.items()]
    given.sort(key=lambda row: -len(row[0]))
    named: dict[str, str] = {}
    for path in sorted(files):
        above = next((row for row in given if f"{path}/".startswith(f"{row[0].rstrip('/')}/")), None)
        name = os.path.basename(path) if above is None else f"{above[1]}/{path[len(above[0]) :].lstrip('/')}".rstrip("/")
        named[name] = f"{named[name]} {files[path]}" if name in named else files[path]
    return named


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """In words, by name: what changed, what came, what is gone."""
    said = [(name, "is new" if name not in old else "is gone" if name not in new else "has changed")
            for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]  # fmt: skip
    return [f"{name} {how}" for name, how in said]


def save(path: Path, named: Mapping[str, str], noted: Noted) -> None:
    """One JSON line a name of the identity, then one a file whose hash is taken over while the file rests."""
    with _lock:
        rested = [[name, *_known[name]] for name in [*noted.files, *noted.beside] if name in _known]
    write_rows(path, [*sorted(named.items()), *rested])


def load(path: Path) -> dict[str, str]:
    """Name -> hash as `save` wrote it, {} without such a file; the hashes of rested files are known from then on."""
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        named = [(name, found) for name, found in (row for row in rows if len(row) == 2)]
        rested = [(name, tuple(stat), found) for name, stat, found in (row for row in rows if len(row) == 3)]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError, RecursionError):  # edited or torn: everything is read again
        return {}
    texts = [text for each in (*named, *rested) for text in (each[0], each[-1])]
    if not all(isinstance(row, list) for row in rows) or not all(isinstance(text, str) for text in texts):
        return {}
    with _lock:
        for name, stat, found in rested:
            _known.setdefault(name, (stat, found))
    return dict(named)


def _hash(name: str) -> str:
    with open(name, "rb") as file:
        before = _stat(file.fileno())
        with _lock:
            known = _known.get(name)
        if known is not None and known[0] == before:
            return known[1]
        start = time.time_ns()
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if _stat(file.fileno()) != before:
            raise OSError(f"{name} changes while it is read: wait until whoever writes it is done")
    with _lock:
        if start - max(before[1], before[2]) > _RESTED_NS:
            _known[name] = before, found
        else:
            _known.pop(name, None)
    return found


def _stat(handle: int) -> Stat:
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _note(name: str, found: str, belongs: bool) -> None:
    with _lock:
        for noted in _noted:
            (noted.files if belongs else noted.beside)[name] = found
