"""Image files as patches: sizes from their headers, pixels when they are asked for."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from histoscale.data.pictures import PictureError, bits_used, largest_float, pixels_of, size_of
from histoscale.eval.datasets.patches import DatasetError

Found = TypeVar("Found")
_LOOKED_AT = 16  # pictures whose bits are counted
_UNUSED = 2  # bits that none of them uses


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

    @cached_property
    def _white(self) -> float:
        """What floats end at, of all pictures alike: 255 where any of the set goes above 1."""
        return 255.0 if max(_mapped(largest_float, self.paths, self.threads)) > 1 else 1.0

    def _one(self, row: int) -> np.ndarray:
        path, (width, height) = self.paths[row], self.sizes[row].tolist()
        try:
            pixels = pixels_of(path, lambda: self._white)
        except (PictureError, OSError) as error:
            raise DatasetError(f"{path} cannot be decoded: {error}") from error
        if pixels.shape[:2] != (height, width):
            raise DatasetError(f"{path} is {pixels.shape[1]} x {pixels.shape[0]} px: expected {width} x {height}")
        return pixels.transpose(2, 0, 1)


def measure(paths: Sequence[Path], threads: int) -> np.ndarray:
    """int64 [n, 2], width and height from the headers. Raises DatasetError for a file that is no image."""
    return np.array(_mapped(size_of, paths, threads), dtype=np.int64).reshape(-1, 2)


def dark_note(paths: Sequence[Path], threads: int) -> tuple[str, ...]:
    """A sentence where pictures of 16 bits look like data of fewer that were never scaled: how they are read does not hang on it.
    A few files, evenly spaced, are looked at. Raises DatasetError for one that is no image."""
    some = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, _LOOKED_AT).round().astype(int))]
    deep = [found for found in _mapped(bits_used, some, threads) if found is not None]
    used = max((bits for _, bits in deep), default=0)
    if not deep or not 8 < used <= max(stored for stored, _ in deep) - _UNUSED:
        return ()
    return (
        f"{len(deep)} of {len(some)} images that were looked at are stored in {deep[0][0]} bits and use {used}: all are read as "
        f"{deep[0][0]} bits, so dark; where they hold fewer, scale them, or declare it in TIFFs (SMaxSampleValue={2**used - 1})",
    )


def common_side(sizes: np.ndarray) -> int | None:
    """The side where all images are squares of one size, else None."""
    return int(sizes[0, 0]) if (sizes == sizes[0, 0]).all() else None


def _mapped(one: Callable[[Path], Found], paths: Sequence[Path], threads: int) -> list[Found]:
    """In order. Raises DatasetError, which names the file that `one` could not read."""

    def named(path: Path) -> Found:
        try:
            return one(path)
        except (PictureError, OSError) as error:
            raise DatasetError(f"{path} cannot be decoded: {error}") from error

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(named, paths))
