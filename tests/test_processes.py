"""What a worker keeps, and what a command imports: measured in processes of their own."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_KEPT = """
import numpy as np
from pathlib import Path
from histoscale.data.processes import settle

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

if {settles}:
    settle()
before = resident()
np.ones(30 << 20, np.uint8)  # what makes glibc keep up to 60 MiB
pieces = [np.ones(1 << 20, np.uint8) for _ in range(48)]
del pieces
print(resident() - before)
"""


def _kept_mib(settles: bool) -> int:
    done = subprocess.run([sys.executable, "-c", _KEPT.format(settles=settles)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_a_worker_returns_free_memory() -> None:
    assert _kept_mib(settles=True) <= 26  # 16 MiB of free memory, 8 of spare, and rounding


_WORKS = """
import os, signal, sys
from histoscale.data.processes import worker_context

if __name__ == "__main__":
    worker = worker_context("histoscale.data.living").Process(target=print, args=("at work",))
    if sys.argv[1:] == ["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    worker.start()
    worker.join()
    print(worker.exitcode, [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("hs")] != [])
"""


def test_workers_start_where_the_temporary_folder_has_a_long_name(tmp_path: Path) -> None:
    """As the folders of jobs on a cluster have; the path of a socket in it may have 107 characters."""
    (tmp_path / "works.py").write_text(_WORKS)
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        place = Path(root, "x" * (74 - len(root)))
        place.mkdir()
        command = [sys.executable, tmp_path / "works.py"]
        there = {**os.environ, "TMPDIR": str(place)}
        subprocess.run([*command, "die"], env=there)
        assert len(list(place.iterdir())) == 2  # and goes with the next start
        done = subprocess.run(command, capture_output=True, text=True, env=there)
        assert done.stdout.splitlines() == ["at work", "0 True"], done.stderr
        assert len(str(place)) == 75 and list(place.iterdir()) == []


def test_starting_a_command_imports_no_backbone() -> None:
    """Every command would weigh 170 MiB more: timm, torchvision and their clients."""
    code = "import sys, histoscale.launch.run; print([name for name in ('timm', 'torchvision') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
