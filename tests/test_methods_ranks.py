"""Terms that couple ranks, through the trainer: one process and two tell the same story, and so do their students."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors

PROGRAM = Path(__file__).with_name("train_tiny.py")
STEPS = 10
# 12 rows a rank: pools of 8 straddle the border between the two, and the whole batch is both
WEIGHTS = ["method.koleo_weight=0.3", "method.kde_weight=0.3", "method.koleo_neighbours=2"]
POOLED = ["method.koleo_pool=8", "method.kde_pool=null"]
LOCAL = ["method.koleo_pool=4", "method.kde_pool=4"]


def program(out: Path, processes: int, *keys: str) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Rows of metrics, and the student after the last step."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable] if processes == 1 else torchrun
    keys = (f"schedule.steps={STEPS}", f"checkpoint.every={STEPS}", *keys)
    subprocess.run([*command, str(PROGRAM), str(out), *keys], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    tensors = read_tensors(read_checkpoint(out / f"checkpoints/step-{STEPS}"), "student.")
    rows = [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    return rows, torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


@pytest.mark.slow
def test_pools_over_ranks_change_only_rounding(tmp_path: Path) -> None:
    one, ours = program(tmp_path / "one", 1, *WEIGHTS, *POOLED)
    two, theirs = program(tmp_path / "two", 2, *WEIGHTS, *POOLED)
    local, others = program(tmp_path / "local", 1, *WEIGHTS, *LOCAL)

    def apart(rows: list[dict[str, float]], name: str) -> float:
        return max(abs(a[name] - b[name]) for a, b in zip(one, rows, strict=True))

    assert len(one) == STEPS
    for name in ("loss/dino", "loss/ibot", "loss/koleo", "loss/kde"):
        scale = 1.0 if name in ("loss/koleo", "loss/kde") else one[0][name]  # those go through zero: they are logarithms
        assert apart(two, name) < 1e-4 * scale, name
    assert apart(local, "loss/koleo") > 0.05 and apart(local, "loss/kde") > 0.01
    assert (ours - theirs).norm() < 0.01 * (ours - others).norm()
