"""Which files below a folder are pictures that are read, and what else lies there: nothing is passed over in silence."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from histoscale.data.fingerprint import is_run
from histoscale.data.names import fold
from histoscale.data.pictures import SUFFIXES

_SHOWN = 6


@dataclass(frozen=True)
class Listing:
    """pictures: relative paths with slashes, in the order of their folded names. folders: all of them, "" for the top.
    skipped: folder -> suffix -> files that are no picture that is read."""

    pictures: list[str]
    folders: list[str]
    skipped: Mapping[str, Counter[str]]

    def told(self) -> tuple[str, ...]:
        """A sentence where files below the top were passed over."""
        below = {folder: kinds for folder, kinds in self.skipped.items() if folder}
        if not below:
            return ()
        total = sum(sum(kinds.values()) for kinds in below.values())
        listed = "; ".join(f"{folder}: {counted(kinds)}" for folder, kinds in list(below.items())[:_SHOWN])
        more = f"; and {len(below) - _SHOWN} more folders" if len(below) > _SHOWN else ""
        return (f"{total} files are no pictures that are read ({', '.join(SUFFIXES)}) and are not used: {listed}{more}",)


def counted(kinds: Mapping[str, int]) -> str:
    """`12 .jp2, 3 .txt`, the most first."""
    order = sorted(kinds.items(), key=lambda one: (-one[1], one[0]))
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in order)


def list_pictures(root: Path) -> Listing:
    """Linked folders are followed, each once; hidden files and folders, and those of archivers, are left alone. Raises OSError
    for a folder that cannot be listed."""
    pictures, folders = [], []
    skipped: dict[str, Counter[str]] = {}
    entered: set[str] = set()
    for folder, below, files in os.walk(root, onerror=_stop, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            below.clear()
            continue
        entered.add(real)
        below[:] = sorted(name for name in below if not name.startswith((".", "__")) and not is_run(Path(folder) / name))
        here = Path(folder).relative_to(root).as_posix()
        prefix = "" if here == "." else f"{here}/"
        folders.append(prefix.removesuffix("/"))
        for name in files:
            if name.startswith(".") or name in ("Thumbs.db", "desktop.ini"):
                continue
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES:
                pictures.append(prefix + name)
            else:
                skipped.setdefault(folders[-1], Counter())[suffix] += 1
    return Listing(sorted(pictures, key=_order), sorted(folders, key=_order), dict(sorted(skipped.items())))


def _stop(error: OSError) -> NoReturn:
    why = f"{error.strerror}, so its pictures would be missing: make the folder readable, or move it away"
    raise OSError(error.errno, why, error.filename) from error


def _order(path: str) -> tuple[list[str], str]:
    return [fold(part) for part in path.split("/")], path
