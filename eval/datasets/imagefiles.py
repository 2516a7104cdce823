"""Image files as patches: sizes from their headers, pixels when they are asked for."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from histoscale.eval.datasets.patches import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_BROKEN = (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError)  # what Pillow raises


@dataclass(frozen=True)
class ImageFiles:
    """Reads rows of `paths`. sizes: int [n, 2], width and height that each image must have. threads: that decode at once."""

    paths: Sequence[Path]
    sizes: np.ndarray
    threads: int

    def __call__(self, rows: np.ndarray) -> Sequence[np.ndarray] | np.ndarray:
        """Images uint8 [3, h, w] as one array where all files of the set have one size, else as a list.

        Raises DatasetError for a file that is gone, cannot be decoded, or has another size.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            images = list(pool.map(self._one, rows.tolist()))
        return np.stack(images) if len(images) and (self.sizes == self.sizes[0]).all() else images

    def _one(self, row: int) -> np.ndarray:
        path, (width, height) = self.paths[row], self.sizes[row].tolist()
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except _BROKEN as error:
            raise DatasetError(f"{path} cannot be decoded: {error}") from error
        if pixels.shape[:2] != (height, width):
            raise DatasetError(f"{path} is {pixels.shape[1]} x {pixels.shape[0]} px: expected {width} x {height}")
        return pixels.transpose(2, 0, 1)


def measure(paths: Sequence[Path], threads: int) -> np.ndarray:
    """int64 [n, 2], width and height from the headers. Raises DatasetError for a file that is no image."""

    def one(path: Path) -> tuple[int, int]:
        try:
            with Image.open(path) as image:
                return image.size
        except _BROKEN as error:
            raise DatasetError(f"{path} cannot be decoded: {error}") from error

    return np.array(_mapped(one, paths, threads), dtype=np.int64).reshape(-1, 2)


def common_side(sizes: np.ndarray) -> int | None:
    """The side where all images are squares of one size, else None."""
    return int(sizes[0, 0]) if (sizes == sizes[0, 0]).all() else None


def stamps(paths: Sequence[Path], threads: int) -> np.ndarray:
    """int64 [n, 2]: bytes and time of the last change (ns), which stand for the pixels in a hash."""

    def one(path: Path) -> tuple[int, int]:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns

    return np.array(_mapped(one, paths, threads), dtype=np.int64).reshape(-1, 2)


def _mapped(one: Callable[[Path], tuple[int, int]], paths: Sequence[Path], threads: int) -> list[tuple[int, int]]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, paths))
