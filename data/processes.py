"""Worker processes: forked from a clean server, which has imported once what each of them would import again."""

import multiprocessing
import sys
from multiprocessing.context import ForkServerContext


def worker_context() -> ForkServerContext:
    """Clients of object stores do not survive a fork of this process. The server's memory is shared until it is written to."""
    context = multiprocessing.get_context("forkserver")
    main = getattr(sys.modules["__main__"], "__spec__", None)  # every process runs it again: `python -m histoscale.launch.…`
    ours = sorted(name for name in sys.modules if name.startswith("histoscale.") and (main is None or name != main.name))
    context.set_forkserver_preload(ours)
    return context
