"""Worker processes: forked from a clean server, which has imported once what each of them would import again."""

import gc
import multiprocessing
import sys
from multiprocessing.context import ForkServerContext


def worker_context() -> ForkServerContext:
    """Clients of object stores do not survive a fork of this process. The server's memory is shared until it is written to."""
    context = multiprocessing.get_context("forkserver")
    # Every process runs the main module again (`python -m histoscale.launch.…`), but not what follows `if __name__ …`: run.
    used = {getattr(value, "__module__", None) or "" for value in vars(sys.modules["__main__"]).values()}
    ours = {name for name in used if name.startswith("histoscale.")} - {"histoscale.launch.run"}
    context.set_forkserver_preload(["histoscale.data.stream", *sorted(ours)])
    return context


def settle(number: int = 0) -> None:
    """The first thing that a worker does: the garbage collector leaves alone, and so shared, what came with the fork."""
    gc.freeze()
