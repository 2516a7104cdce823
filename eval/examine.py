"""Stores are opened first by a process of their own: a damaged or hostile HDF5 file can make the library crash or never return,
and what would end a study of a thousand slides must be the reason why one is left out.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from histoscale.data.processes import out_of_the_way

_MOST_S = 3.0  # of a processor, for one file: a million chunks take half a second
_PATIENCE_S = 60.0  # by the clock, for one file: a disk that is gone, or a pipe, answers never
_MOST_BYTES = 512 << 20  # beyond what the process holds when it begins


class Examiner:
    """One process that is asked file by file, from any thread; begun when it is first asked, and anew when it has died.

    It limits itself, by timers whose signals end it inside the library too, so that it is gone soon after this process is.
    """

    def __init__(self, module: str, patience_s: float = _PATIENCE_S) -> None:
        self.module, self.patience_s, self._lock = module, patience_s, threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._pid = 0

    def ask(self, path: Path) -> dict[str, Any] | str:
        """What `answer` of the module says of a file; or how the process ended over it, as a predicate of the file."""
        with self._lock:
            for last in (False, True):
                child = self._running()
                try:
                    _told(child.stdin).write(json.dumps([str(path), os.getcwd(), self.patience_s]) + "\n")
                    _told(child.stdin).flush()
                    line = _told(child.stdout).readline()
                except BrokenPipeError:
                    line = ""
                if line:
                    return json.loads(line)
                code = child.wait()
                self._child = None
                if code == -signal.SIGPROF:
                    return f"kept HDF5 busy for {_MOST_S:g} s"
                if code == -signal.SIGALRM:
                    return f"did not answer for {self.patience_s:g} s (is its disk there?)"
                if last:  # the first time it may have been somebody else who ended it
                    return f"ended the process that opened it (code {code})"
        raise AssertionError

    def _running(self) -> "subprocess.Popen[str]":
        if self._child is None or self._pid != os.getpid():  # a forked process has its parent's, and must not speak to it
            with out_of_the_way():
                command = [sys.executable, "-m", "histoscale.eval.examine", self.module]
                self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._pid = os.getpid()
            if not _told(self._child.stdout).readline():
                raise OSError(f"{' '.join(command)} did not begin (code {self._child.wait()}); what it said stands above")
        return self._child


def _told(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _serve(answer: Any) -> None:
    """Answers until the other end is closed."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)  # sent to every process of a job; the end of the questions ends this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        held = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        wanted = held + _MOST_BYTES if most == resource.RLIM_INFINITY else min(held + _MOST_BYTES, most)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, most))
    print("ready", flush=True)
    for line in sys.stdin:
        path, folder, patience_s = json.loads(line)
        os.chdir(folder)
        limits = {signal.ITIMER_PROF: _MOST_S, signal.ITIMER_REAL: patience_s}
        for timer, most_s in limits.items():
            signal.setitimer(timer, most_s)
        said = answer(Path(path))
        for timer in limits:
            signal.setitimer(timer, 0)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    from importlib import import_module

    _serve(import_module(sys.argv[1]).answer)
