"""What every reader shares: a slide as a pyramid of levels, a region of one level, and how reading fails."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

WHITE = 255
REDUCTIONS = (8, 4, 2)  # what JPEG decoders shrink by; other codecs follow by averaging, so that all slides of a run are alike


class LayoutError(ValueError):
    """The file is no slide that can be read; the message says why."""


@dataclass(frozen=True, eq=False)
class Level:
    """One level of the pyramid. downsample: level-0 pixels a pixel, whole where sizes agree within rounding.

    colour: how stored samples are meant, `rgb` or `ycbcr`. predictor: TIFF tag 317. tables: shared JPEG tables.
    offsets, counts: int64 [tile rows * tile columns], row by row; a count of 0 is a missing tile. Empty for OpenSlide's formats.
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    downsample: float
    compression: str
    colour: str
    predictor: int
    tables: bytes
    offsets: np.ndarray
    counts: np.ndarray

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile_width)

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile_height)

    def reducible(self, reduce: int) -> bool:
        """Whether tiles decode to whole pixels at 1 / reduce of their size."""
        return self.compression == "openslide" or (self.tile_width % reduce == 0 and self.tile_height % reduce == 0)


@dataclass(frozen=True, eq=False)
class Layout:
    """kind: `tiff` (read by range) or `openslide`. mpp: µm per pixel at level 0 of the header; objective: its magnification."""

    kind: str
    levels: Sequence[Level]
    mpp: float | None
    objective: float | None
    scanner: str | None


class DecodeError(ValueError):
    """The bytes of a tile are damaged."""


class Stands(DecodeError):
    """A decoder has not returned in time: no damage of a tile, the slide itself is given up."""


@dataclass(frozen=True)
class Damage:
    """A part of a region that could not be decoded, in pixels of the region: [left, right) x [top, bottom)."""

    left: int
    top: int
    right: int
    bottom: int


class Canvas(NamedTuple):
    """A region that is read in parts. pixels: uint8 [height, width, 3], of which nothing is set yet; painted: tiles that are.
    ever: bool [rows, columns], the cells that may be wanted some time."""

    pixels: np.ndarray
    painted: set[int]
    ever: np.ndarray


class Reader(Protocol):
    """An open slide; safe to use from several threads."""

    layout: Layout

    def region(
        self,
        level: int,
        x: int,
        y: int,
        width: int,
        height: int,
        damage: list[Damage] | None = None,
        reduce: int = 1,
        wanted: np.ndarray | None = None,
        canvas: Canvas | None = None,
    ) -> np.ndarray:
        """uint8 [height, width, 3] RGB at integer coordinates of the level; white outside it and where tiles are missing.

        reduce: x, y, width and height count pixels of the level averaged over squares of 1, 2, 4 or 8 (`Level.reducible`).
        wanted: bool [rows, columns] of equal cells that the region is cut into; what lies only in others may stay white.
        canvas: of an earlier call for the same region, to go on with; OpenSlide's formats cannot, and leave it alone.
        Undecodable tiles raise DecodeError; given a list `damage`, they stay white and are added to it. Raises Stands for a
        decoder that does not return in time (`storage.decode_s`), and StorageError.
        """
        ...


def downsample(full: tuple[int, int], size: tuple[int, int]) -> float:
    """Whole where both sizes are level 0's divided by it within rounding; else the mean of both ratios."""
    across, down = full[0] / size[0], full[1] / size[1]
    whole = round((across + down) / 2)
    if all(abs(a / whole - b) <= 1 for a, b in zip(full, size, strict=True)):
        return float(whole)
    return (across + down) / 2


def level_mpps(levels: Sequence[Level], mpp: float) -> tuple[float, ...]:
    """µm per pixel of every level."""
    return tuple(mpp * level.downsample for level in levels)
