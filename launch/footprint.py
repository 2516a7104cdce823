"""Wall time and memory of the stages of a run: the sum of PSS over a process and its children, sampled while it works."""

import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """seconds: wall time. peak_bytes: highest PSS seen (RSS of this process where the system has no PSS)."""

    name: str
    seconds: float
    peak_bytes: int


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants: shared pages count once over all of them."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        own = next(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
        children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it ended between the two looks
        return 0
    return own + sum(pss_bytes(int(child)) for child in children)


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
        self._peak = memory_bytes()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(self.interval_s):
                self._peak = max(self._peak, memory_bytes())

        watcher = threading.Thread(target=watch, daemon=True, name="footprint")
        start = time.monotonic()
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self.stages.append(Stage(name, time.monotonic() - start, max(self._peak, memory_bytes())))
