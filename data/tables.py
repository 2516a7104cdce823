"""Tile tables, compact: about a byte and a half a tile, each level by itself, unpacked when it is read."""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np

from histoscale.data.readers.pyramid import Level

_COUNT = struct.Struct("<I")


def pack_table(offsets: np.ndarray, counts: np.ndarray) -> bytes:
    """One level's table as a compressed block: counts by byte planes, and the gaps between tiles that are not zero (most tiles
    follow one another in the file). int64 [tiles] each; an empty table is an empty block."""
    if not len(offsets):
        return b""
    expected = np.concatenate([[0], (offsets + counts)[:-1]])
    jumps = np.flatnonzero(offsets != expected)
    gaps = offsets[jumps] - expected[jumps]
    signed = (gaps << 1) ^ (gaps >> 63)  # small numbers of either sign stay small
    parts = [_COUNT.pack(len(jumps)), *(_planes(values) for values in (counts, jumps, signed))]
    return zlib.compress(b"".join(parts))


def unpack_table(block: bytes | memoryview, tiles: int) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, counts), int64 [tiles] each."""
    if tiles == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    data = zlib.decompress(block)
    (jumps,) = _COUNT.unpack_from(data)
    counts, place = _values(data, _COUNT.size, tiles)
    where, place = _values(data, place, jumps)
    signed, place = _values(data, place, jumps)
    steps = np.empty(tiles, np.int64)
    steps[0], steps[1:] = 0, counts[:-1]
    steps[where] += (signed >> 1) ^ -(signed & 1)
    return np.cumsum(steps), counts


def _planes(values: np.ndarray) -> bytes:
    """Bytes of equal weight together, as many as the largest value needs: they compress better."""
    width = (int(values.max(initial=0)).bit_length() + 7) // 8
    planes = np.ascontiguousarray(values.astype("<i8")).view(np.uint8).reshape(-1, 8).T[:width]
    return bytes([width]) + planes.tobytes()


def _values(data: bytes, place: int, count: int) -> tuple[np.ndarray, int]:
    """`count` values from `place` on, and where the next ones begin."""
    width, place = data[place], place + 1
    values = np.zeros(count, np.int64)
    for weight in range(width):
        values |= np.frombuffer(data, np.uint8, count, place + weight * count).astype(np.int64) << (8 * weight)
    return values, place + width * count


class Levels(Sequence[Level]):
    """The levels of a slide, each unpacked when it is first asked for: a visit needs one of them."""

    def __init__(self, count: int, unpack: Callable[[int], Level]) -> None:
        self._unpack = unpack
        self._levels: list[Level | None] = [None] * count

    @property
    def nbytes(self) -> int:
        """Memory of the tables that were unpacked."""
        return sum(level.offsets.nbytes + level.counts.nbytes for level in self._levels if level is not None)

    def __len__(self) -> int:
        return len(self._levels)

    @overload
    def __getitem__(self, number: int) -> Level: ...
    @overload
    def __getitem__(self, number: slice) -> list[Level]: ...
    def __getitem__(self, number: int | slice) -> Level | list[Level]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        level = self._levels[number]
        if level is None:
            level = self._levels[number] = self._unpack(number % len(self._levels))
        return level

    def __iter__(self) -> Iterator[Level]:
        return (self[number] for number in range(len(self)))
