"""Worker processes: forked from a clean server, which has imported once what each of them would import again."""

import ctypes
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TypeVar

from histoscale.data.living import orphaned, signature
from histoscale.data.secrets import scrub_streams

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # mallopt's names in glibc
_FREE_BYTES, _SPARE_BYTES = 16 << 20, 8 << 20  # at most so much free memory on top of a worker's heap, and what trimming leaves
_STOPPING = (signal.SIGTERM, signal.SIGUSR1)
_MAPPED_ALONE_BYTES = 32 << 20  # the most that glibc takes: arrays from here on are mappings of their own
_SHARED = Path("/dev/shm")  # where Linux keeps named semaphores, as sem.NAME

T = TypeVar("T")


class RankLost(OSError):
    """Another process of the run has gone, so this one cannot go on; the message says how the run does."""


def worker_context(imports: str = "histoscale.data.stream") -> ForkServerContext:
    """Clients of object stores do not survive a fork of this process. The server's memory is shared until it is written to.

    imports: the module that the server imports, once for all workers."""
    _sign_names()
    context = multiprocessing.get_context("forkserver")
    # Every process runs the main module again (`python -m histoscale.launch.…`), but not what follows `if __name__ …`: run.
    used = {getattr(value, "__module__", None) or "" for value in vars(sys.modules["__main__"]).values()}
    ours = {name for name in used if name.startswith("histoscale.")} - {"histoscale.launch.run"}
    context.set_forkserver_preload([imports, *sorted(ours)])
    return context


@contextmanager
def out_of_the_way() -> Iterator[None]:
    """While inside, processes are started whom the signals that ask a run to stop do not reach: batch systems send them to every
    process of a job, and the run needs its workers until it has saved itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        resource_tracker.ensure_running()  # which lets SIGTERM through again: now, not when the first process brings it along
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settle() -> None:
    """The first thing that a worker does: the garbage collector leaves alone, and so shared, what came with the fork, free memory
    goes back to the system, and of what asks a run to stop only a second SIGTERM, its own main process's, ends it."""
    scrub_streams()
    gc.freeze()
    _return_free_memory()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def stop_with_parent() -> None:
    """This process is asked to stop (SIGTERM) when the one that started it dies: of ranks whose torchrun was killed nobody would
    know, and the next start would find their folder in use. Linux: PR_SET_PDEATHSIG = 1."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def detached(work: Callable[[], T]) -> tuple[threading.Thread, Callable[[], T]]:
    """Start `work` in a thread that may be left behind, since not even the end of the process waits for it: signals do not reach
    who waits in C, and `join` is where they do. The second value gives what `work` returned or raised, once the thread has ended.
    """
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            raised.append(error)

    def outcome() -> T:
        if raised:
            raise raised.pop()  # its frames would hold it here, and all that they hold
        return found[0]

    thread = threading.Thread(target=run, daemon=True, name="detached")
    thread.start()
    return thread, outcome


def follow(*first: Callable[[], None]) -> None:
    """The first thing that a worker does, after `first`: it will end when its main process does. One that was killed tells
    nobody, and a pool's workers would wait for its next task for ever; a DataLoader's look at their parent, which is the
    server that forks them."""
    for each in first:
        each()
    parent = multiprocessing.parent_process()
    assert parent is not None, "follow is for workers"

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True, name="follow").start()


def _return_free_memory() -> None:
    """glibc keeps twice the largest array that was ever freed (up to 64 MiB) on top of the heap: in every worker, for one region
    that was shrunk from a finer level. The spare bytes are for the ordinary visit, which then asks the system no more often.

    It also gives threads heaps of their own, of which no threshold returns anything: with the one that all share, what decoding
    threads have freed does not grow.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_THRESHOLD, _MAPPED_ALONE_BYTES)  # each of the first three also ends glibc's own adjusting
        mallopt(_TRIM_THRESHOLD, _FREE_BYTES)
        mallopt(_TOP_PAD, _SPARE_BYTES)
        mallopt(_ARENA_MAX, 1)


def _sign_names() -> None:
    """Semaphores and sockets of this process and its workers are named after it, and those of processes that were killed go.

    multiprocessing gives random names, and leaves the removing to a process that a kill of the whole group ends too.
    """
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # there is no public word for either
    if settings["semprefix"].startswith("/hs"):
        return
    for path in [*_SHARED.glob("sem.hs*"), *Path(tempfile.gettempdir()).glob("hs*")]:
        if orphaned(path.resolve().name):
            with suppress(OSError):  # another start was faster, or it is another user's
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    name = signature()
    settings["semprefix"] = f"/{name}"
    if settings.get("tempdir") is None:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        short = folder.with_name(f"hs{folder.name[-8:]}")  # the path of a socket has room for a hundred characters
        short.symlink_to(folder.name)
        settings["tempdir"] = str(short)
        Finalize(None, _remove, args=(folder, short), exitpriority=-100)


def _remove(folder: Path, short: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    short.unlink(missing_ok=True)
