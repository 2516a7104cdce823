"""What a worker keeps, and what a command imports: measured in processes of their own."""

import subprocess
import sys

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


def test_starting_a_command_imports_no_backbone() -> None:
    """Every command would weigh 170 MiB more: timm, torchvision and their clients."""
    code = "import sys, histoscale.launch.run; print([name for name in ('timm', 'torchvision') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
