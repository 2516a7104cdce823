"""Public files into data_root: goes on where it was cut off, takes nothing whose checksum is wrong, unpacks its folder alone."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from histoscale.data.journal import Journal, write_json
from histoscale.data.jsonfiles import read_object
from histoscale.eval.datasets.download import Digests, FetchError, Patience, digests_of, download
from histoscale.eval.datasets.sources import ORIGINS, Origin, Source
from histoscale.eval.datasets.unpack import Damaged, gunzip, unzip

RECORD = "fetched.json"


@dataclass(frozen=True)
class FetchConfig:
    """request_timeout_s, deadline_s: when a silent server is asked again, and given up. attempts: whole downloads until a wrong
    checksum is final. keep_archives: whether archives stay when they are unpacked."""

    request_timeout_s: float
    deadline_s: float
    attempts: int
    keep_archives: bool


@dataclass(frozen=True)
class Fetched:
    """One file of a set. bytes, md5, sha256: of the file as its publisher gives it. checked: whether a published checksum was
    compared. files, total: how many files it left in data_root, and their bytes."""

    source: str
    bytes: int
    md5: str
    sha256: str
    checked: bool
    files: int
    total: int


def origin_of(name: str) -> Origin:
    """Where a set is fetched from. Raises FetchError for one that a person must get, saying where and under which licence."""
    if name not in ORIGINS:
        raise FetchError(f"{name} is a set of your own, so there is nothing to fetch: expected {', '.join(ORIGINS)}")
    origin = ORIGINS[name]
    if not origin.base:
        raise FetchError(f"{name} ({origin.licence}) is not fetched: {origin.how} (data_root)")
    return origin


def fetch_set(origin: Origin, root: Path, base: str, config: FetchConfig, journal: Journal) -> dict[str, Fetched]:
    """Every file of the set below `base`, by what it made in `root`; what is there and whole is kept.

    Raises FetchError: the server gives up or has no such file, a checksum is wrong in every attempt, an archive holds what it
    should not, the disk is too small, another command fetches into `root`.
    """
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        found = {}
        for source in origin.files:
            made = _there(source, root, journal) or _fetch(source, root, base, config, journal)
            found[source.makes] = made
            _note(root, source.makes, made)
            word = "md5 as published" if made.checked else "no checksum published here"
            digest = f"sha256 {made.sha256}" if made.sha256 else "not fetched, so not checked"
            journal.say(f"{source.makes}: {made.files} files, {made.total} bytes; {source.name}: {word}, {digest}")
    return found


def _fetch(source: Source, root: Path, base: str, config: FetchConfig, journal: Journal) -> Fetched:
    target, archive = root / source.makes, root / source.name
    patience = Patience(config.request_timeout_s, config.deadline_s)
    problem = ""
    for _ in range(config.attempts):
        got = archive if source.kind != "file" else root / f"{source.name}.complete"
        if not got.is_file():
            download(f"{base.rstrip('/')}/{source.name}", got, source.most_bytes, patience, journal)
        try:
            digests = digests_of(got)
            _check(source.name, source.md5, digests)
            files, total = _unpack(source, got, target)
            if source.kind != "file" and not config.keep_archives:
                got.unlink()
            checked = source.md5 is not None or source.makes_md5 is not None
            return Fetched(source.name, digests.size, digests.md5, digests.sha256, checked, files, total)
        except Damaged as error:
            problem = str(error)
            journal.say(f"{problem}; it is fetched again")
            got.unlink()
    raise FetchError(f"{problem}; so it was in {config.attempts} downloads from {base}: try later, or another mirror=")


def _unpack(source: Source, got: Path, target: Path) -> tuple[int, int]:
    """What `source` leaves in data_root: (files, bytes). Raises Damaged, FetchError."""
    if source.kind == "zip":
        return unzip(got, target, source.most_bytes)
    if source.kind == "file":
        total = got.stat().st_size
        got.replace(target)
        return 1, total
    partial = target.with_name(f"{target.name}.partial")
    gunzip(got, partial, source.most_bytes)
    digests = digests_of(partial)
    try:
        _check(source.makes, source.makes_md5, digests)
    except Damaged:
        partial.unlink()
        raise
    partial.replace(target)
    return 1, digests.size


def _check(name: str, md5: str | None, found: Digests) -> None:
    if md5 is not None and found.md5 != md5:
        raise Damaged(f"{name} has the md5 {found.md5}: expected {md5}")


# What is there already.


def _there(source: Source, root: Path, journal: Journal) -> Fetched | None:
    """What an earlier run made, or a person put there; None where it must be fetched. Raises FetchError for a wrong file."""
    target = root / source.makes
    if not target.exists():
        return None
    files, total = _measured(target)
    noted = _noted(root).get(source.makes)
    if noted is not None and (noted.files, noted.total) == (files, total):
        return noted
    if target.is_dir() or source.makes_md5 is None:
        if noted is not None:
            raise FetchError(f"{target} holds {files} files of {total} bytes, and {noted.files} of {noted.total} were fetched: "
                             "move it away to fetch it again")  # fmt: skip
        journal.say(f"{target} was there before and is kept unchecked; move it away to fetch it")
        return Fetched(source.name, 0, "", "", False, files, total)
    digests = digests_of(target)
    if digests.md5 != source.makes_md5:
        raise FetchError(f"{target} has the md5 {digests.md5}: expected {source.makes_md5}; move it away to fetch it again")
    return Fetched(source.makes, digests.size, digests.md5, digests.sha256, True, files, total)


def _measured(path: Path) -> tuple[int, int]:
    """(files, their bytes) of a file or a folder."""
    if path.is_file():
        return 1, path.stat().st_size
    sizes = [os.stat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names]
    return len(sizes), sum(sizes)


def _noted(root: Path) -> dict[str, Fetched]:
    if not (root / RECORD).is_file():
        return {}
    try:
        return {name: Fetched(**row) for name, row in read_object(root / RECORD).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise FetchError(f"{root / RECORD} is no record of fetched files: remove it and all is checked anew ({error})") from error


def _note(root: Path, name: str, made: Fetched) -> None:
    rows = {**_noted(root), name: made}
    write_json(root / RECORD, {name: asdict(row) for name, row in rows.items()})


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    with (root / ".fetch.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FetchError(f"another command fetches into {root}: wait for it, or give another data_root") from error
        yield
