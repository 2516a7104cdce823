"""Wall time and memory of the stages of a run: the sum of PSS over a process and its children, looked at while it works."""

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """seconds: wall time. peak_bytes: highest PSS seen (RSS of this process where the system has no PSS)."""

    name: str
    seconds: float
    peak_bytes: int


_PAGE = resource.getpagesize()


def family(pid: int) -> Iterator[int]:
    """A process and its descendants; none where it has ended."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return
    children: list[int] = []
    for task in tasks:
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended between two looks
            children += map(int, (task / "children").read_text().split())
    yield pid
    for child in children:
        yield from family(child)


def _number(pid: int, file: str, pick: Callable[[str], int]) -> int:
    try:
        return pick(Path(f"/proc/{pid}/{file}").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0


def own_pss_bytes(pid: int, kinds: Sequence[str] = ("Pss",)) -> int:
    """Proportional set size of one process: a page that n share counts an nth. The system walks every page for it: about 10 ms a
    GiB. kinds: the lines of smaps_rollup that are added."""
    def pick(rollup: str) -> int:
        return sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.split(":")[0] in kinds)

    return _number(pid, "smaps_rollup", pick)


def pss_bytes(pid: int) -> int:
    """Of a process and its descendants: what they share counts once over all of them."""
    return sum(map(own_pss_bytes, family(pid)))


def rss_bytes(pid: int) -> int:
    """Resident set sizes of a process and its descendants, added: shared pages count in each of them. Costs next to nothing."""
    return sum(_number(one, "statm", lambda text: int(text.split()[1]) * _PAGE) for one in family(pid))


def descriptors(pid: int) -> int:
    """Files, sockets and pipes that a process has open."""
    return _entries(pid, "fd")


def threads(pid: int) -> int:
    return _entries(pid, "task")


def _entries(pid: int, folder: str) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/{folder}"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def memory_bytes() -> int:
    if sys.platform.startswith("linux"):
        return pss_bytes(os.getpid())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


class Footprint:
    """`with footprint.stage("index"): …`, then `.stages`."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self.stages: list[Stage] = []
        self._peak = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._peak = 0
        self._look()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(self.interval_s):
                self._look()

        watcher = threading.Thread(target=watch, daemon=True, name="footprint")
        start = time.monotonic()
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self._look()
            self.stages.append(Stage(name, time.monotonic() - start, self._peak))

    def _look(self) -> None:
        """The costly figure is read only where the cheap one, which is never below it, lies above the peak."""
        if not sys.platform.startswith("linux") or rss_bytes(os.getpid()) > self._peak:
            self._peak = max(self._peak, memory_bytes())
