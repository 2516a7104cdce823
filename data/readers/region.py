"""Tiles to a region: one interface for every slide, one range for neighbouring tiles."""

from functools import partial
from typing import NamedTuple

import numpy as np

from histoscale.data.readers.codec import paint, returns_in_time
from histoscale.data.readers.deadline import within
from histoscale.data.readers.pyramid import WHITE, Canvas, Damage, DecodeError, Layout, Level, Reader
from histoscale.data.readers.vendor import FREE, Gate, OpenSlideReader
from histoscale.data.storage import Store

_GAP = 32 << 10  # bytes between wanted tiles of a row that are cheaper to read than another request


class Touched(NamedTuple):
    """The n tiles that a region needs, row by row. numbers: int64 [n], of the level. places: int64 [n, 6], in (reduced) px: left,
    top, right, bottom of the part inside the tile, and its corner x, y in the region."""

    numbers: np.ndarray
    places: np.ndarray

    def some(self, chosen: np.ndarray) -> "Touched":
        """Those with these indices, or where a mask is true."""
        return Touched(self.numbers[chosen], self.places[chosen])


_NONE = Touched(np.empty(0, np.int64), np.empty((0, 6), np.int64))


def touched(
    table: Level,
    x: int,
    y: int,
    width: int,
    height: int,
    reduce: int = 1,
    wanted: np.ndarray | None = None,
    ever: np.ndarray | None = None,
) -> Touched:
    """The tiles under a region (`Reader.region` says in which units). Padding of border tiles lies outside.

    wanted, ever: bool [rows, columns] of the region's cells. Tiles that touch no wanted one are left out; of the others, outer
    rows and columns of cells that will not be wanted ever.
    """
    right, bottom = min(x + width, table.width // reduce), min(y + height, table.height // reduce)
    if max(x, 0) >= right or max(y, 0) >= bottom:
        return _NONE
    columns, left, right_of, column_cells = _along(x, right, table.tile_width // reduce, width, wanted, 1)
    rows, top, bottom_of, row_cells = _along(y, bottom, table.tile_height // reduce, height, wanted, 0)
    shape = len(rows), len(columns)
    places = np.empty((*shape, 4), np.int64)  # left, top, right, bottom in the region
    places[..., 0], places[..., 1], places[..., 2], places[..., 3] = left, top[:, None], right_of, bottom_of[:, None]
    numbers = (rows * table.columns)[:, None] + columns
    keep = np.ones(shape, bool)
    if wanted is not None:
        sums = _sums(wanted)
        keep = _count(sums, *row_cells, *column_cells) > 0
        if ever is None or not ever.all():
            sums = sums if ever is None else _sums(ever)
            _shrink(places, sums, row_cells, column_cells, height // wanted.shape[0], width // wanted.shape[1])
    chosen = places[keep]
    row, column = np.divmod(numbers[keep], table.columns)
    found = np.empty((len(chosen), 6), np.int64)
    found[:, 4:] = chosen[:, :2]
    found[:, 0:4:2] = chosen[:, 0:4:2] + (x - column * (table.tile_width // reduce))[:, None]
    found[:, 1:4:2] = chosen[:, 1:4:2] + (y - row * (table.tile_height // reduce))[:, None]
    return Touched(numbers[keep], found)


Cells = tuple[np.ndarray, np.ndarray]  # first cell, and the one after the last


def _along(
    start: int, stop: int, tile: int, side: int, wanted: np.ndarray | None, axis: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Cells]:
    """Of the tiles along one axis: numbers, first and last + 1 pixel in the region, and which cells they reach."""
    numbers = np.arange(max(start, 0) // tile, (stop - 1) // tile + 1)
    first = np.maximum(numbers * tile, max(start, 0)) - start
    last = np.minimum(numbers * tile + tile, stop) - start
    cell = side if wanted is None else side // wanted.shape[axis]
    return numbers, first, last, (first // cell, (last - 1) // cell + 1)


def _sums(cells: np.ndarray) -> np.ndarray:
    """The integral image of bool [rows, columns]."""
    sums = np.zeros((cells.shape[0] + 1, cells.shape[1] + 1), np.int64)
    cells.cumsum(0).cumsum(1, out=sums[1:, 1:])
    return sums


def _count(sums: np.ndarray, top: np.ndarray, below: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """int [rows of tiles, columns of tiles]: how many true cells each tile reaches."""
    down = sums[below] - sums[top]
    return down[:, right] - down[:, left]


def _shrink(places: np.ndarray, sums: np.ndarray, rows: Cells, columns: Cells, high: int, wide: int) -> None:
    """Takes from the parts of the tiles, in place, an outer row or column of cells that holds none that may be wanted."""
    (top, below), (left, right) = rows, columns
    for side, cells, edge in (
        (0, (top, below, left, left + 1), (left + 1) * wide),
        (1, (top, top + 1, left, right), ((top + 1) * high)[:, None]),
        (2, (top, below, right - 1, right), (right - 1) * wide),
        (3, (below - 1, below, left, right), ((below - 1) * high)[:, None]),
    ):
        better = np.maximum if side < 2 else np.minimum
        np.copyto(places[..., side], better(places[..., side], edge), where=_count(sums, *cells) == 0)


def open_reader(uri: str, layout: Layout, store: Store, decoding: Gate = FREE) -> Reader:
    """No request and no file access for a catalogued TIFF; every other format opens at its first region.

    decoding: held while pixels are decoded, never while bytes are awaited; it bounds how many threads decode at a time.
    """
    if layout.kind == "tiff":
        return TiffReader(uri, layout, store, decoding)
    return OpenSlideReader(uri, layout, store, decoding)


class TiffReader:
    """Reads the tiles that a region touches, by range."""

    def __init__(self, uri: str, layout: Layout, store: Store, decoding: Gate = FREE) -> None:
        self.uri, self.layout, self.store, self.decoding = uri, layout, store, decoding

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
        table = self.layout.levels[level]
        if not table.reducible(reduce):
            sides = f"{table.tile_width}x{table.tile_height}"
            raise ValueError(f"{self.uri}, level {level}: tiles of {sides} px do not divide by {reduce}")
        tiles = touched(table, x, y, width, height, reduce, wanted, None if canvas is None else canvas.ever)
        if canvas is not None:
            tiles = tiles.some(np.array([number not in canvas.painted for number in tiles.numbers.tolist()], bool))
        data = self._fetch(table, tiles.numbers)
        with self.decoding:
            if canvas is not None:
                out = canvas.pixels
                canvas.painted.update(tiles.numbers.tolist())
            else:
                out = np.empty((height, width, 3), np.uint8)
                if _area(tiles) < width * height:
                    out[:] = WHITE
            there = [i for i, one in enumerate(data) if one]
            blank = [i for i, one in enumerate(data) if not one]
            blank += self._paint(out, level, tiles, data, there, reduce, damage)
            for left, top, right, bottom, to_x, to_y in tiles.places[blank].tolist():
                out[to_y : to_y + bottom - top, to_x : to_x + right - left] = WHITE
        return out

    def _paint(
        self, out: np.ndarray, level: int, tiles: Touched, data: list[memoryview], there: list[int], reduce: int,
        damage: list[Damage] | None,
    ) -> list[int]:  # fmt: skip
        """Decodes the tiles that are there into the region; those that cannot be decoded are noted and returned.

        Damaged bytes are fetched once more: a bad transfer passes, damage at rest stays.
        """
        table = self.layout.levels[level]
        reasons = self._decode(out, [data[i] for i in there], tiles.places[there], table, reduce)
        if not reasons:
            return []
        again = [there[i] for i in reasons]
        numbers, places = tiles.numbers[again], tiles.places[again]
        reasons = self._decode(out, self._fetch(table, numbers), places, table, reduce)
        for i, reason in reasons.items():
            if damage is None:
                raise DecodeError(f"{self.uri}, level {level}, tile {numbers[i]}: {reason}")
            left, top, right, bottom, to_x, to_y = places[i].tolist()
            damage.append(Damage(to_x, to_y, to_x + right - left, to_y + bottom - top))
        return [again[i] for i in reasons]

    def _decode(self, out: np.ndarray, data: list[memoryview], places: np.ndarray, table: Level, reduce: int) -> dict[int, str]:
        """Why the tiles that are damaged are, by index. Raises Stands."""
        seconds = self.store.config.decode_s
        painting = partial(paint, out, data, places, table, reduce, seconds)
        return within(seconds, self.uri, painting, returns_in_time(table))

    def _fetch(self, table: Level, numbers: np.ndarray) -> list[memoryview]:
        """Bytes of the tiles, none of those that are missing; tiles that follow one another in the file come as one range."""
        offsets, counts = table.offsets[numbers].tolist(), table.counts[numbers].tolist()
        spans: list[list[int]] = []
        places: list[tuple[int, int]] = []  # span, start inside the span
        for offset, count in zip(offsets, counts, strict=True):
            if count and spans and 0 <= offset - spans[-1][1] <= _GAP:
                spans[-1][1] = offset + count
            elif count:
                spans.append([offset, offset + count])
            places.append((len(spans) - 1, offset - spans[-1][0] if count else 0))
        wanted = [(start, stop) for start, stop in spans]
        parts = [memoryview(part) for part in self.store.ranges(self.uri, wanted)] if spans else []
        pairs = zip(places, counts, strict=True)
        return [parts[span][start : start + count] if count else memoryview(b"") for (span, start), count in pairs]


def _area(tiles: Touched) -> int:
    """Pixels of the region that the tiles cover."""
    left, top, right, bottom = tiles.places.T[:4]
    return int(((right - left) * (bottom - top)).sum())
