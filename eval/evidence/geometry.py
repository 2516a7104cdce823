"""From level-0 tiles to pixels of any picture of the slide: whole or fractional downsamples, no gap and no overlap."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from histoscale.data.readers.pyramid import Reader
from histoscale.data.readers.scale import Scale, read_scaled

_BAND = 256  # rows read at once


@dataclass(frozen=True)
class Canvas:
    """A picture of a whole slide, its corner on the slide's. width, height: px. across, down: level-0 px a pixel."""

    width: int
    height: int
    across: float
    down: float

    def level(self, number: int) -> "Canvas":
        """Level `number` of a pyramid of halves: the same extent in fewer pixels, so its downsample need not be whole."""
        width, height = (max(1, side >> number) for side in (self.width, self.height))
        return Canvas(width, height, self.across * self.width / width, self.down * self.height / height)


@dataclass(frozen=True)
class Plan:
    """How a whole slide is read: at `scale` onto `canvas`. mpp: µm a pixel of it."""

    canvas: Canvas
    scale: Scale
    mpp: float


def whole_slide(reader: Reader, mpp: float, longest_px: int) -> Plan:
    """The whole slide with at most `longest_px` a side, never finer than level 0. mpp: of level 0.

    A stored level is averaged over a whole number of pixels, so that any band of rows begins at one. The last row and column may
    reach over the slide's border, where readers give white.
    """
    full, levels = reader.layout.levels[0], reader.layout.levels
    wanted = max(1.0, max(full.width, full.height) / longest_px)
    level = max((i for i, each in enumerate(levels) if each.downsample <= wanted), key=lambda i: levels[i].downsample)
    factor = math.ceil(wanted / levels[level].downsample - 1e-9)
    downsample = levels[level].downsample * factor
    width, height = (max(1, math.ceil(side / downsample - 1e-9)) for side in (full.width, full.height))
    scale = Scale(level, mpp * downsample, float(factor))
    return Plan(Canvas(width, height, downsample, downsample), scale, mpp * downsample)


def read_picture(reader: Reader, plan: Plan) -> np.ndarray:
    """uint8 [height, width, 3] of the planned picture, white where the file is damaged. Raises what the reader raises else."""
    parts = []
    for top, rows in bands(plan.canvas.height, _BAND):  # a stored level may hold many pixels for one of ours
        y = top * int(plan.scale.factor)
        parts.append(read_scaled(reader, plan.scale, 0, y, plan.canvas.width, rows, damage=[]))
    return np.concatenate(parts)


def shrink(picture: np.ndarray, canvas: Canvas, top: int = 0, rows: int = -1) -> np.ndarray:
    """uint8 [rows, width, 3] of a smaller canvas over the same extent: the mean of the pixels whose centres lie in each."""
    rows = canvas.height if rows < 0 else rows
    if picture.shape[:2] == (canvas.height, canvas.width):
        return picture[top : top + rows]
    down, across = picture.shape[0] / canvas.height, picture.shape[1] / canvas.width
    ys = np.ceil(np.arange(top, top + rows + 1) * down - 0.5).astype(int)
    xs = np.ceil(np.arange(canvas.width + 1) * across - 0.5).astype(int)
    part = picture[ys[0] : ys[-1]].astype(np.float32)
    summed = np.add.reduceat(np.add.reduceat(part, ys[:-1] - ys[0], 0), xs[:-1], 1)
    return (summed / np.diff(ys)[:, None, None] / np.diff(xs)[:, None] + 0.5).astype(np.uint8)


def paint(coords: np.ndarray, size_px: float, values: np.ndarray, canvas: Canvas, top: int = 0, rows: int = -1) -> np.ndarray:
    """float64 [rows, width]: each pixel takes the value of the tile that holds its centre, NaN where none does.

    coords: [n, 2] corners (x, y) and size_px: side, in level-0 px; top, rows: a band of the canvas, all of it by default. Tiles
    are half-open: neighbours neither overlap nor leave a gap at any downsample. Where tiles themselves overlap the mean is
    taken.
    """
    rows = canvas.height if rows < 0 else rows
    total, count = np.zeros((rows, canvas.width)), np.zeros((rows, canvas.width), np.int32)
    places = footprints(coords, size_px, canvas)
    here = (places[:, 3] > top) & (places[:, 1] < top + rows)
    for (left, upper, right, lower), value in zip(places[here].tolist(), values[here].tolist(), strict=True):
        band = slice(max(upper - top, 0), max(lower - top, 0))
        total[band, left:right] += value
        count[band, left:right] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def footprints(coords: np.ndarray, size_px: float, canvas: Canvas) -> np.ndarray:
    """int64 [n, 4]: left, top, right, bottom of each tile's pixels, half-open, clipped at 0.

    Centre (i + 1/2) d lies in [x, x + s) exactly for ceil(x/d - 1/2) <= i < ceil((x + s)/d - 1/2).
    """
    scale = np.array([canvas.across, canvas.down])
    first, last = (np.ceil(edge / scale - 0.5).astype(np.int64).clip(0) for edge in (coords, coords + size_px))
    return np.concatenate([first, last], 1)


def bands(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """(top, rows) of consecutive bands; the last may be shorter."""
    for top in range(0, height, rows):
        yield top, min(rows, height - top)
