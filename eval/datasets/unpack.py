"""Archives from strangers: only into their own folder, never more than was stated, whole or not at all."""

import calendar
import gzip
import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from histoscale.eval.datasets.download import BLOCK, FetchError


class Damaged(Exception):
    """The bytes are not what was published; another download may be."""


def gunzip(archive: Path, target: Path, most_bytes: int) -> None:
    """Raises Damaged; FetchError when it unpacks to more than `most_bytes`."""
    written = 0
    try:
        with gzip.open(archive) as source, target.open("wb") as file:
            while block := source.read(BLOCK):
                written += len(block)
                if written > most_bytes:
                    raise FetchError(f"{archive} unpacks to more than the {most_bytes} bytes that its contents need; remove it")
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            changed = getattr(source, "mtime", None)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        target.unlink(missing_ok=True)
        raise Damaged(f"{archive.name} is no whole gzip file ({error})") from error
    except FetchError:
        target.unlink(missing_ok=True)
        raise
    if changed:  # the time in the archive, so that the same data has the same hash on every machine
        os.utime(target, (changed, changed))


def unzip(archive: Path, target: Path, most_bytes: int) -> tuple[int, int]:
    """The folder `target.name` of the archive as `target`, which appears when it is whole: (files, bytes).

    Raises Damaged; FetchError for an archive that holds anything else than plain files below that folder, or more bytes than
    `most_bytes` or than the disk has.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = _members(zipped, archive, target.name, most_bytes)
            total = sum(member.file_size for member in members)
            free = shutil.disk_usage(target.parent).free
            if total > free:
                raise FetchError(f"{target.parent} has {free} bytes free: unpacking {archive.name} needs {total}; make room")
            for member in members:
                _extract(zipped, member, partial)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise Damaged(f"{archive.name} is no whole zip file ({error})") from error
    (partial / target.name).replace(target)
    partial.rmdir()
    return len(members), total


def _members(zipped: zipfile.ZipFile, archive: Path, folder: str, most_bytes: int) -> list[zipfile.ZipInfo]:
    """The files of the archive. Raises FetchError before anything is written."""
    found: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for member in zipped.infolist():
        name = PurePosixPath(member.filename)
        if name.parts[:1] == ("__MACOSX",):
            continue
        kind = stat.S_IFMT(member.external_attr >> 16)
        plain = kind in (0, stat.S_IFREG, stat.S_IFDIR) and not member.flag_bits & 1
        inside = not name.is_absolute() and ".." not in name.parts and "\\" not in member.filename and name.parts[:1] == (folder,)
        if not plain or not inside:
            raise FetchError(f"{archive} holds {member.filename!r}: expected plain files in {folder}/ alone; remove it")
        if not member.is_dir():
            if name in found or len(name.parts) < 2:
                raise FetchError(f"{archive} holds {member.filename!r} twice or as a file; remove it")
            found[name] = member
    total = sum(member.file_size for member in found.values())
    if total > most_bytes or not found:
        raise FetchError(f"{archive} unpacks to {total} bytes: expected some and at most {most_bytes}; remove it")
    return list(found.values())


def _extract(zipped: zipfile.ZipFile, member: zipfile.ZipInfo, partial: Path) -> None:
    place = partial / member.filename
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipped.open(member) as source, place.open("xb") as file:
        shutil.copyfileobj(source, file, BLOCK)
    changed = calendar.timegm((*member.date_time, 0, 0, 0))  # as there: the same data has the same hash everywhere
    os.utime(place, (changed, changed))
