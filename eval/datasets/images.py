"""Image files of a labelled set: which there are, what a hash sees of them, and their pixels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from histoscale.eval.datasets.patches import DatasetError, Reading


def folder_of(root: Path, inside: str, what: str) -> Path:
    """root / inside, which must be a folder. what: the layout that is expected, for the error. Raises DatasetError."""
    folder = root / inside
    if not folder.is_dir():
        raise DatasetError(f"{folder} is no folder: expected {what}, put the set there or set data_root= to the folder above it")
    return folder


def images_in(folder: Path, pattern: str) -> list[Path]:
    """The files that match, sorted by path; files that a system hides (`.DS_Store`, `._x.png`) are none."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith(".") and path.is_file())


def stamps(root: Path, paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """(path below root, bytes, time of change in ns) of every file: what a hash can see without reading it."""
    found = []
    for path in paths:
        stat = path.stat()
        found.append((path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns))
    return found


def reading(paths: Sequence[Path], side: int | None) -> Reading:
    """Reads rows of `paths` as RGB: one array uint8 [b, 3, side, side], or a list of [3, h, w] where side is None."""

    def read(rows: np.ndarray) -> list[np.ndarray] | np.ndarray:
        pixels = [decoded(paths[row], side) for row in rows]
        return pixels if side is None else np.stack(pixels)

    return read


def decoded(path: Path, side: int | None) -> np.ndarray:
    """uint8 [3, h, w]. Raises DatasetError for a file that is no image, or with a side for one of another size."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DatasetError(f"{path} cannot be decoded ({error}): expected an image, fetch it again") from error
    if side is not None and pixels.shape[:2] != (side, side):
        high, wide = pixels.shape[:2]
        raise DatasetError(f"{path} is {wide} x {high} px: expected {side} x {side}, fetch it again")
    return pixels.transpose(2, 0, 1)
