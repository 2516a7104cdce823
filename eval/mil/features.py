"""Features of many slides from disk in bounded memory: whole slides, or bags of drawn tiles that threads read ahead."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from histoscale.data.keys import key_array
from histoscale.eval.stores import Extent, check_finite, read_coords, read_extent, read_features, read_rows, unreadable

_BLOCK = 4 << 20  # bytes that one read asks for
_GAP = 128 << 10  # bytes between two wanted tiles that are read along: seeking over fewer is no cheaper


@dataclass(frozen=True)
class Draw:
    """Tiles of one row for one step. copy: 0 is the plain store, 1 and on the stain-jittered copies. key: names the tiles."""

    row: int
    copy: int
    key: int


class Features:
    """Features by row. stores: of each row the plain store first, then its stain-jittered copies, all of `width` numbers a tile.

    cache_bytes: the stores that are read first stay in memory, up to so many bytes, and none is put out again: an epoch visits
    every slide once, so the one used longest ago is the one needed next. threads: read ahead in `batches`. Beside the cache,
    memory holds the batches that are ready or being read, 4 MiB a thread, and the slide in hand.
    """

    def __init__(self, stores: Sequence[Sequence[Path]], width: int, cache_bytes: int, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}: expected at least one that reads")
        self.stores, self.width, self.cache_bytes, self.threads = [list(each) for each in stores], width, cache_bytes, threads
        self._extents: dict[Path, Extent] = {}
        self._held: dict[Path, np.ndarray] = {}
        self._moments: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def whole(self, row: int) -> np.ndarray:
        """[n, D] in the type of the store; not to be written to. Raises StoreError."""
        return self._whole(self._extent(self.stores[row][0]))

    def coords(self, row: int) -> np.ndarray:
        """int64 [n, 2], level-0 x and y of each tile's top-left corner."""
        return read_coords(self.stores[row][0])

    def moments(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and mean of squares over the tiles of the plain store: float64 [D] each."""
        if row not in self._moments:
            total, squares = (torch.zeros(self.width, dtype=torch.float64) for _ in range(2))
            values, ones = self.whole(row), torch.ones(128, dtype=torch.float64)
            for part in torch.from_numpy(values).split(len(ones)):
                part = part.double()
                total += ones[: len(part)] @ part
                squares += ones[: len(part)] @ part.square_()
            self._moments[row] = (total / len(values)).numpy(), (squares / len(values)).numpy()
        return self._moments[row]

    def of(self, rows: Sequence[int]) -> "Features":
        """The features of some rows, numbered anew; what was read of them stays in memory."""
        kept = Features([self.stores[row] for row in rows], self.width, self.cache_bytes, self.threads)
        paths = {path for stores in kept.stores for path in stores}
        kept._extents = {path: extent for path, extent in self._extents.items() if path in paths}
        kept._held = {path: values for path, values in self._held.items() if path in paths}
        kept._bytes = sum(values.nbytes for values in kept._held.values())
        kept._moments = {new: self._moments[old] for new, old in enumerate(rows) if old in self._moments}
        return kept

    def check_copies(self) -> None:
        """Read every stain-jittered copy once. Raises StoreError for one that is broken."""
        for stores in self.stores:
            for path in stores[1:]:
                self._whole(self._extent(path))

    def batches(self, plan: Iterable[Sequence[Draw]], tiles: int) -> Iterator[list[np.ndarray]]:
        """Of every draw at most `tiles` tiles without replacement, in the order of the store: [<= tiles, D] in its type.

        Batches come in the order of the plan and depend on it alone, whatever the threads. At least one batch is read ahead,
        and as many as give every thread two draws. Raises StoreError when a store fails.
        """
        left = iter(plan)
        ready: deque[list[Future[np.ndarray]]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="features")
        try:
            while True:
                while len(ready) < 2 or sum(map(len, ready)) < 2 * self.threads:
                    more = next(left, None)
                    if more is None:
                        break
                    ready.append([pool.submit(self._drawn, draw, tiles) for draw in more])
                if not ready:
                    return
                yield [each.result() for each in ready.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)

    def _drawn(self, draw: Draw, tiles: int) -> np.ndarray:
        extent = self._extent(self.stores[draw.row][draw.copy])
        rows = choose(extent.tiles, tiles, draw.key)
        if rows is None:
            return self._whole(extent)
        held = self._held.get(extent.path)
        if held is None and self._room(extent.nbytes):
            held = self._whole(extent)
        if held is not None:
            return held.take(rows, axis=0)
        values = read_rows(extent.path, rows) if extent.offset is None else _read_some(extent, extent.offset, rows)
        check_finite(values, extent.path)
        return values

    def _whole(self, extent: Extent) -> np.ndarray:
        held = self._held.get(extent.path)
        if held is not None:
            return held
        values = read_features(extent.path) if extent.offset is None else _read_all(extent, extent.offset)
        check_finite(values, extent.path)
        with self._lock:
            if extent.path not in self._held and self._room(values.nbytes):
                self._held[extent.path] = values
                self._bytes += values.nbytes
        return values

    def _room(self, nbytes: int) -> bool:
        return self._bytes + nbytes <= self.cache_bytes

    def _extent(self, path: Path) -> Extent:
        extent = self._extents.get(path)
        if extent is None:
            extent = read_extent(path)
            if extent.width != self.width:
                why = f"holds {extent.width} numbers a tile, the study {self.width}"
                raise unreadable(path, why, "one encoder for all slides")
            self._extents[path] = extent
        return extent


def choose(tiles: int, count: int, k: int) -> np.ndarray | None:
    """Places of `count` of the tiles by key k, each set equally likely: int64 [count] ascending; None: all of them."""
    if tiles <= count:
        return None
    return np.sort(np.argpartition(key_array(k, "mil/tile", 0, np.arange(tiles)), count)[:count])


_own = threading.local()


def _buffer(rows: int, extent: Extent) -> np.ndarray:
    """[rows, width] of this thread, used again: fresh memory costs as much time as reading into it."""
    buffer = getattr(_own, "buffer", None)
    if buffer is None or buffer.shape != (rows, extent.width) or buffer.dtype != extent.dtype:
        buffer = _own.buffer = np.empty((rows, extent.width), extent.dtype)
    return buffer


def _read_all(extent: Extent, offset: int) -> np.ndarray:
    values = np.empty((extent.tiles, extent.width), extent.dtype)
    with _opened(extent.path) as file:
        _fill(file.fileno(), values.data.cast("B"), offset, extent.path)
    return values


def _read_some(extent: Extent, offset: int, rows: np.ndarray) -> np.ndarray:
    """The wanted rows [m], ascending, read in stretches of at most 4 MiB that pass over wide gaps."""
    size = extent.row_bytes
    values = np.empty((len(rows), extent.width), extent.dtype)
    apart = np.flatnonzero(np.diff(rows) * size > _GAP + size) + 1
    most = max(1, _BLOCK // size)
    with _opened(extent.path) as file:
        for start, stop in zip([0, *apart.tolist()], [*apart.tolist(), len(rows)], strict=True):
            while start < stop:
                end = start + int(np.searchsorted(rows[start:stop], rows[start] + most))
                buffer = _buffer(most, extent)[: int(rows[end - 1] - rows[start]) + 1]
                _fill(file.fileno(), buffer.data.cast("B"), offset + int(rows[start]) * size, extent.path)
                np.take(buffer, rows[start:end] - rows[start], axis=0, out=values[start:end], mode="clip")
                start = end
    return values


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise unreadable(path, f"cannot be read ({error.strerror})") from error


def _fill(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Read until the buffer is full: without Python's lock, and without moving the file's own position."""
    done = 0
    while done < len(buffer):
        read = os.preadv(descriptor, [buffer[done : done + _BLOCK]], offset + done)
        if read == 0:
            raise unreadable(path, "ends before its tiles do")
        done += read
