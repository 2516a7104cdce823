"""Worker processes: forked from a clean server, which has imported once what each of them would import again."""

import ctypes
import gc
import multiprocessing
import sys
from multiprocessing.context import ForkServerContext

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt's names in glibc
_FREE_BYTES, _SPARE_BYTES = 16 << 20, 8 << 20  # at most so much free memory on top of a worker's heap, and what trimming leaves
_MAPPED_ALONE_BYTES = 32 << 20  # the most that glibc takes: arrays from here on are mappings of their own


def worker_context() -> ForkServerContext:
    """Clients of object stores do not survive a fork of this process. The server's memory is shared until it is written to."""
    context = multiprocessing.get_context("forkserver")
    # Every process runs the main module again (`python -m histoscale.launch.…`), but not what follows `if __name__ …`: run.
    used = {getattr(value, "__module__", None) or "" for value in vars(sys.modules["__main__"]).values()}
    ours = {name for name in used if name.startswith("histoscale.")} - {"histoscale.launch.run"}
    context.set_forkserver_preload(["histoscale.data.stream", *sorted(ours)])
    return context


def settle(number: int = 0) -> None:
    """The first thing that a worker does: the garbage collector leaves alone, and so shared, what came with the fork, and free
    memory goes back to the system."""
    gc.freeze()
    _return_free_memory()


def _return_free_memory() -> None:
    """glibc keeps twice the largest array that was ever freed (up to 64 MiB) on top of the heap: in every worker, for one region
    that was shrunk from a finer level. The spare bytes are for the ordinary visit, which then asks the system no more often."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_THRESHOLD, _MAPPED_ALONE_BYTES)  # each of the three also ends glibc's own adjusting
        mallopt(_TRIM_THRESHOLD, _FREE_BYTES)
        mallopt(_TOP_PAD, _SPARE_BYTES)
