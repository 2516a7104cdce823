"""Archives from strangers: only into their own folder, never more than was stated, whole or not at all."""

import calendar
import gzip
import os
import shutil
import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from histoscale.eval.datasets.download import BLOCK, FetchError

# of a zip's directory, names and streams
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError, struct.error)
_LONGEST_NAME = 255  # bytes that a disk takes
_SMALLEST = 256  # bytes that a picture or table takes at least: more files are a bomb of files


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
        (partial / target.name).replace(target)
    except FetchError:
        raise
    except _BROKEN as error:
        raise Damaged(f"{archive.name} is no whole zip file ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(members), total


def _members(zipped: zipfile.ZipFile, archive: Path, folder: str, most_bytes: int) -> list[zipfile.ZipInfo]:
    """The files of the archive. Raises FetchError before anything is written."""
    found: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for member in zipped.infolist():
        name = PurePosixPath(member.filename)
        if name.parts[:1] == ("__MACOSX",):
            continue
        if not 0 <= member.header_offset < archive.stat().st_size:
            raise zipfile.BadZipFile(f"{member.filename!r} lies outside of it")
        kind = stat.S_IFMT(member.external_attr >> 16)
        packed = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what others unpack in one piece is a bomb
        plain = kind in (0, stat.S_IFREG, stat.S_IFDIR) and packed and not member.flag_bits & 1 and _is_name(member.filename)
        inside = (
            not name.is_absolute() and ".." not in name.parts and "\\" not in member.filename and name.parts[:1] == (folder,)
        )
        if not plain or not inside:
            raise FetchError(f"{archive} holds {member.filename!r}: expected plain files in {folder}/ alone; remove it")
        if not member.is_dir():
            if name in found or len(name.parts) < 2:
                raise FetchError(f"{archive} holds {member.filename!r} twice or as a file; remove it")
            found[name] = member
    above = {parent for name in found for parent in name.parents} & found.keys()
    if above:
        raise FetchError(f"{archive} holds {str(min(above))!r} as a file and as a folder; remove it")
    total = sum(member.file_size for member in found.values())
    if len(found) > most_bytes // _SMALLEST:
        raise FetchError(f"{archive} holds {len(found)} files: expected at most {most_bytes // _SMALLEST}; remove it")
    if total > most_bytes or not found:
        raise FetchError(f"{archive} unpacks to {total} bytes: expected some and at most {most_bytes}; remove it")
    return list(found.values())


def _is_name(path: str) -> bool:
    return path.isprintable() and max(map(len, path.encode().split(b"/"))) <= _LONGEST_NAME


def _extract(zipped: zipfile.ZipFile, member: zipfile.ZipInfo, partial: Path) -> None:
    place = partial / member.filename
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipped.open(member) as source, place.open("xb") as file:
        shutil.copyfileobj(source, file, BLOCK)
        if file.tell() != member.file_size:
            raise zipfile.BadZipFile(f"{member.filename!r} has {file.tell()} bytes, not {member.file_size} as it says")
    year, month, day, *clock = member.date_time  # as there: the same data has the same hash everywhere; month 0 is none
    changed = calendar.timegm((year, min(max(month, 1), 12), max(day, 1), *clock, 0, 0, 0))
    os.utime(place, (changed, changed))
