"""A file in a store that parsers of headers can seek and read: whole blocks by range, the last few kept."""

import io
from collections.abc import Iterator
from typing import Any

from histoscale.data.storage import Store

_BLOCKS_KEPT = 16


class RangeFile(io.RawIOBase):
    """block: bytes a request. most: bytes that may be asked for in all; more raises OSError and is remembered in `exceeded`,
    since parsers swallow errors."""

    def __init__(self, uri: str, size: int, store: Store, block: int, most: int) -> None:
        self.uri, self.size, self.store, self.block, self.most = uri, size, store, block, most
        self.place = self.asked = 0
        self.exceeded = False
        self.blocks: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, count: int = -1) -> bytes:
        stop = self.size if count < 0 else min(self.place + count, self.size)
        if self.place >= stop:
            return b""
        self.asked += stop - self.place
        if self.asked > self.most:
            self.exceeded = True
            raise OSError(f"{self.uri}: more than {self.most} bytes of headers")
        data = b"".join(self._parts(self.place, stop))
        self.place = stop
        return data

    def _parts(self, start: int, stop: int) -> Iterator[bytes]:
        for number in range(start // self.block, (stop - 1) // self.block + 1):
            first = number * self.block
            if number not in self.blocks:
                while len(self.blocks) >= _BLOCKS_KEPT:
                    del self.blocks[next(iter(self.blocks))]
                self.blocks[number] = self.store.ranges(self.uri, [(first, min(first + self.block, self.size))])[0]
            yield self.blocks[number][max(start - first, 0) : stop - first]
