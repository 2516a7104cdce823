"""How bytes come from each kind of store: one small interface, a file for each way to speak to a store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Info:
    """size in bytes, None where the server does not tell; tag: the store's etag, else the time of the last change."""

    folder: bool
    size: int | None
    tag: str


class Client(Protocol):
    """One open connection to a store; used by many threads at once, never after a fork. It asks once and repeats nothing."""

    def ranges(self, uri: str, spans: Sequence[tuple[int, int]], timeout_s: float, alone: bool) -> list[bytes | BaseException]:
        """One reply a span [start, stop): its bytes, or what went wrong. alone: one span must not fail for another's reason."""

    def info(self, uri: str, timeout_s: float) -> Info:
        """What the store says of a file or folder. Raises FileNotFoundError or the client's own error."""

    def children(self, uri: str, timeout_s: float) -> list[str]:
        """Names of the files directly in a folder. Raises the client's own error."""
