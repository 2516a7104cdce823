"""Tiles to a region: one interface for every slide, one range for neighbouring tiles."""

from typing import NamedTuple

import numpy as np

from histoscale.data.readers.codec import decode_tile
from histoscale.data.readers.pyramid import WHITE, Canvas, Damage, DecodeError, Layout, Level, Reader
from histoscale.data.readers.vendor import FREE, Gate, OpenSlideReader
from histoscale.data.storage import Store

_GAP = 32 << 10  # bytes between wanted tiles of a row that are cheaper to read than another request


class Touched(NamedTuple):
    """A tile that a region needs. x, y: its corner; left, top, right, bottom: its part inside region and level. (Reduced) px."""

    number: int
    x: int
    y: int
    left: int
    top: int
    right: int
    bottom: int


def touched(
    table: Level, x: int, y: int, width: int, height: int, reduce: int = 1, wanted: np.ndarray | None = None
) -> list[Touched]:
    """The tiles under a region (`Reader.region` says in which units), row by row. Padding of border tiles lies outside."""
    left, right = max(x, 0), min(x + width, table.width // reduce)
    top, bottom = max(y, 0), min(y + height, table.height // reduce)
    if left >= right or top >= bottom:
        return []
    wide, high = table.tile_width // reduce, table.tile_height // reduce
    cell_height, cell_width = (height, width) if wanted is None else (height // wanted.shape[0], width // wanted.shape[1])
    columns = [
        (column, column * wide, max(column * wide, left), min(column * wide + wide, right))
        for column in range(left // wide, (right - 1) // wide + 1)
    ]
    found = []
    for row in range(top // high, (bottom - 1) // high + 1):
        y0, y1 = max(row * high, top), min(row * high + high, bottom)
        line: list[bool] = []  # of the columns of cells, which are wanted in this row of tiles
        if wanted is not None:
            across = wanted[(y0 - y) // cell_height : (y1 - y - 1) // cell_height + 1]
            line = np.asarray(across.any(axis=0)).tolist()
        for column, start, x0, x1 in columns:
            if wanted is None or any(line[(x0 - x) // cell_width : (x1 - x - 1) // cell_width + 1]):
                found.append(Touched(row * table.columns + column, start, row * high, x0, y0, x1, y1))
    return found


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
        tiles = touched(table, x, y, width, height, reduce, wanted)
        if canvas is not None:
            tiles = [tile for tile in tiles if tile.number not in canvas.painted]
        parts = self._fetch(table, [tile.number for tile in tiles])
        with self.decoding:
            if canvas is not None:
                out = canvas.pixels
                canvas.painted.update(tile.number for tile in tiles)
            else:
                out = np.empty((height, width, 3), np.uint8)
                if sum((tile.right - tile.left) * (tile.bottom - tile.top) for tile in tiles) < width * height:
                    out[:] = WHITE
            # A tile is copied before the next one is decoded: one buffer serves them all.
            scratch = np.empty((table.tile_height // reduce, table.tile_width // reduce, 3), np.uint8)
            for tile in tiles:
                if tile.number not in parts:
                    out[tile.top - y : tile.bottom - y, tile.left - x : tile.right - x] = WHITE
                    continue
                try:
                    pixels = self._decode(table, level, tile.number, parts[tile.number], reduce, scratch)
                except DecodeError:
                    if damage is None:
                        raise
                    damage.append(Damage(tile.left - x, tile.top - y, tile.right - x, tile.bottom - y))
                    out[tile.top - y : tile.bottom - y, tile.left - x : tile.right - x] = WHITE
                    continue
                inside = pixels[tile.top - tile.y : tile.bottom - tile.y, tile.left - tile.x : tile.right - tile.x]
                out[tile.top - y : tile.bottom - y, tile.left - x : tile.right - x] = inside
        return out

    def _fetch(self, table: Level, numbers: list[int]) -> dict[int, memoryview]:
        """Bytes of the tiles that exist; tiles that follow one another in the file come as one range."""
        offsets, counts = table.offsets.take(numbers).tolist(), table.counts.take(numbers).tolist()
        spans: list[tuple[int, int]] = []
        places: list[tuple[int, int, int, int]] = []  # tile, span, start inside the span, count
        for number, offset, count in zip(numbers, offsets, counts, strict=True):
            if count == 0:
                continue
            if spans and 0 <= offset - spans[-1][1] <= _GAP:
                spans[-1] = (spans[-1][0], offset + count)
            else:
                spans.append((offset, offset + count))
            places.append((number, len(spans) - 1, offset - spans[-1][0], count))
        parts = [memoryview(data) for data in self.store.ranges(self.uri, spans)] if spans else []
        return {number: parts[span][start : start + count] for number, span, start, count in places}

    def _decode(
        self, table: Level, level: int, number: int, data: memoryview, reduce: int, scratch: np.ndarray
    ) -> np.ndarray:
        """Damaged bytes are fetched once more: a bad transfer passes, damage at rest stays."""
        try:
            return decode_tile(data, table, reduce, scratch)
        except DecodeError:
            again = self._fetch(table, [number])
            try:
                return decode_tile(again[number], table, reduce, scratch)
            except DecodeError as error:
                raise DecodeError(f"{self.uri}, level {level}, tile {number}: {error}") from error
