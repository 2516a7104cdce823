"""How fast an encoder is used on this machine; none of these keys makes a result."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EncodingConfig:
    """device: auto, cpu or cuda. threads: torch's CPU threads, 0 leaves torch's own number. batch: images encoded at a time."""

    device: str
    threads: int
    batch: int


@dataclass(frozen=True)
class ThreadsConfig:
    """threads: of torch on the CPU under `hardware`, that read and decode ahead under `stream`."""

    threads: int


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """So many CPU threads of torch within; 0: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
