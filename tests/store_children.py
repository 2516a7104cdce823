"""What the tests of stores run in processes of their own: a spawned process imports it by name."""

import os
import signal
import time
from pathlib import Path

from histoscale.data.cache import FileCache
from histoscale.data.storage import Store


def read_ranges(store: Store, uri: str, spans: list[tuple[int, int]]) -> tuple[int, list[bytes]]:
    """The process that read, and what it read."""
    return os.getpid(), store.ranges(uri, spans)


def copy_whole(store: Store, uri: str) -> tuple[str, bytes]:
    path = store.local(uri)
    return str(path), path.read_bytes()


def die_while_copying(folder: str, name: str) -> None:
    """Half a copy, then what a kill looks like."""

    def half(into: Path) -> None:
        (into / "x").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    FileCache(Path(folder), 1 << 20).folder(name, half)


def fill_many(folder: str, limit: int, numbers: list[int]) -> list[bool]:
    """Entries of 100 bytes, each looked at as soon as it is there: whether it was whole."""

    def fill(into: Path, number: int) -> None:
        (into / "x").write_bytes(bytes([number]) * 50)
        time.sleep(0.001)
        with (into / "x").open("ab") as file:
            file.write(bytes([number]) * 50)

    cache, whole = FileCache(Path(folder), limit), []
    for number in numbers:
        with (cache.folder(str(number), lambda into, n=number: fill(into, n)) / "x").open("rb") as file:  # type: ignore[misc]
            whole.append(file.read() == bytes([number]) * 100)
    return whole
