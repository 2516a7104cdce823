"""Worker processes: forked from a clean server, which has imported once what each of them would import again."""

import multiprocessing
import sys
from multiprocessing.context import ForkServerContext


def worker_context() -> ForkServerContext:
    """Clients of object stores do not survive a fork of this process. The server's memory is shared until it is written to."""
    context = multiprocessing.get_context("forkserver")
    main = getattr(sys.modules["__main__"], "__spec__", None)  # every process imports it again: `python -m histoscale.launch.…`
    own = [main.name] if main is not None and main.name.startswith("histoscale.") else []
    context.set_forkserver_preload(["histoscale.data.stream", *own])
    return context
