"""A bounded folder of whole copies of remote files, safe among processes and after a kill."""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from histoscale.data.living import abandoned, signature

_PARTIAL = ".partial"


class FileCache:
    """Entries are folders named by a hash; they appear by a rename, and the longest unused are removed first."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.root, self.limit_bytes = folder, limit_bytes

    def folder(self, name: str, fill: Callable[[Path], None]) -> Path:
        """The folder of entry `name`, made by `fill(empty folder)` if it is not there. Raises what `fill` raises."""
        entry = self.root / hashlib.sha256(name.encode()).hexdigest()[:32]
        if self._used(entry):
            return entry
        partial = _beside(entry)
        partial.mkdir(parents=True)
        try:
            fill(partial)
            with contextlib.suppress(OSError):  # another process was faster: its copy serves as well
                partial.rename(entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if not self._used(entry):
            raise OSError(f"the cache folder {self.root} does not keep files: is its disk full, or shared by too many processes?")
        self._evict(entry)
        return entry

    def _used(self, entry: Path) -> bool:
        """Whether the entry is there; marks it as used now."""
        try:
            os.utime(entry)
        except FileNotFoundError:
            return False
        except OSError as error:  # which does not say of what
            raise OSError(error.errno, error.strerror, str(entry)) from None
        return True

    def _evict(self, keep: Path) -> None:
        """Remove the longest unused entries above the limit. Open files live on until they are closed."""
        entries = sorted((_Entry(path) for path in self.root.iterdir() if path.is_dir()), key=lambda entry: entry.used)
        total = sum(entry.size for entry in entries)
        for entry in entries:
            copying = entry.path.name.endswith(_PARTIAL)
            left = copying and abandoned(entry.path.name, entry.used)
            if left or (total > self.limit_bytes and not copying and entry.path != keep):
                self._remove(entry)
                total -= entry.size

    def _remove(self, entry: "_Entry") -> None:
        """Out of sight by a rename, then gone: nobody sees half an entry. One that was used since it was looked at stays."""
        gone = _beside(entry.path)
        with contextlib.suppress(FileNotFoundError):
            if entry.path.stat().st_mtime <= entry.used:
                entry.path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def _beside(entry: Path) -> Path:
    """A new name that says whose it is, and is no entry's."""
    return entry.with_name(f"{entry.name[:32]}.{signature()}.{uuid.uuid4().hex}{_PARTIAL}")


class _Entry:
    """A folder's size and last use, of a copy the last write to it; files that vanish meanwhile count as nothing."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.used = path, 0, 0.0
        for stat in _stats(path):
            self.size += stat.st_size
            self.used = max(self.used, stat.st_mtime) if path.name.endswith(_PARTIAL) else 0.0
        with contextlib.suppress(FileNotFoundError):
            self.used = max(self.used, path.stat().st_mtime)


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for parent, _, names in os.walk(folder):  # it passes over folders that another process removes or renames meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield os.stat(os.path.join(parent, name))
