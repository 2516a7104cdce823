"""Tiles to a region: one interface for every slide, one range for neighbouring tiles."""

import numpy as np

from histoscale.data.readers.codec import decode_tile
from histoscale.data.readers.pyramid import WHITE, Damage, DecodeError, Layout, Level, Reader
from histoscale.data.readers.vendor import OpenSlideReader
from histoscale.data.storage import Store


def open_reader(uri: str, layout: Layout, store: Store) -> Reader:
    """No request and no file access for a catalogued TIFF; every other format opens at its first region."""
    return TiffReader(uri, layout, store) if layout.kind == "tiff" else OpenSlideReader(uri, layout, store)


class TiffReader:
    """Reads the tiles that a region touches, by range."""

    def __init__(self, uri: str, layout: Layout, store: Store) -> None:
        self.uri, self.layout, self.store = uri, layout, store

    def region(self, level: int, x: int, y: int, width: int, height: int, damage: list[Damage] | None = None) -> np.ndarray:
        table = self.layout.levels[level]
        out = np.full((height, width, 3), WHITE, np.uint8)
        left, right = max(x, 0), min(x + width, table.width)
        top, bottom = max(y, 0), min(y + height, table.height)
        if left >= right or top >= bottom:
            return out
        wide, high = table.tile_width, table.tile_height
        rows, columns = range(top // high, (bottom - 1) // high + 1), range(left // wide, (right - 1) // wide + 1)
        numbers = [row * table.columns + column for row in rows for column in columns]
        for number, data in self._fetch(table, numbers):
            row, column = divmod(number, table.columns)
            # The part of the tile that is inside the region and the level; padding of border tiles falls away.
            x0, x1 = max(column * wide, left), min(column * wide + wide, right)
            y0, y1 = max(row * high, top), min(row * high + high, bottom)
            try:
                tile = self._decode(table, level, number, data)
            except DecodeError:
                if damage is None:
                    raise
                damage.append(Damage(x0 - x, y0 - y, x1 - x, y1 - y))
                continue
            inside = tile[y0 - row * high : y1 - row * high, x0 - column * wide : x1 - column * wide]
            out[y0 - y : y1 - y, x0 - x : x1 - x] = inside
        return out

    def _fetch(self, table: Level, numbers: list[int]) -> list[tuple[int, memoryview]]:
        """Bytes of the tiles that exist; tiles that follow one another in the file come as one range."""
        offsets, counts = table.offsets[numbers].tolist(), table.counts[numbers].tolist()
        spans: list[tuple[int, int]] = []
        places: list[tuple[int, int, int, int]] = []  # tile, span, start inside the span, count
        for number, offset, count in zip(numbers, offsets, counts, strict=True):
            if count == 0:
                continue
            if spans and spans[-1][1] == offset:
                spans[-1] = (spans[-1][0], offset + count)
            else:
                spans.append((offset, offset + count))
            places.append((number, len(spans) - 1, offset - spans[-1][0], count))
        parts = [memoryview(data) for data in self.store.ranges(self.uri, spans)] if spans else []
        return [(number, parts[span][start : start + count]) for number, span, start, count in places]

    def _decode(self, table: Level, level: int, number: int, data: memoryview) -> np.ndarray:
        """Damaged bytes are fetched once more: a bad transfer passes, damage at rest stays."""
        try:
            return decode_tile(data, table)
        except DecodeError:
            again = self._fetch(table, [number])
            try:
                return decode_tile(again[0][1], table)
            except DecodeError as error:
                raise DecodeError(f"{self.uri}, level {level}, tile {number}: {error}") from error
