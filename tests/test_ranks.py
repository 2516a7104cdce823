"""Ranks: alone without a process group; together, gathers whose gradients are those of the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from histoscale.data.ranks import gather, open_ranks

# Run by two processes; each checks itself and fails with its own traceback.
TOGETHER = """
import torch
from histoscale.data.ranks import close_ranks, gather, open_ranks
def check(ranks):  # what it makes holds the group, and must be gone before the group is
    rows = torch.arange(12.0, dtype=torch.float64).view(4, 3).sin()
    joined = rows.clone().requires_grad_()
    loss = (joined @ joined.T).logsumexp(1).mean()
    loss.backward()
    mine = rows[2 * ranks.rank : 2 * ranks.rank + 2].clone().requires_grad_()
    everyone = gather(mine, ranks.group)
    assert torch.equal(everyone, rows)
    part = (mine @ everyone.T).logsumexp(1).mean()  # this rank's rows against all: the mean over ranks is the joined loss
    part.backward()
    torch.testing.assert_close(ranks.mean(part), loss.detach())
    torch.testing.assert_close(mine.grad / ranks.world, joined.grad[2 * ranks.rank : 2 * ranks.rank + 2])
    assert ranks.any(ranks.rank == 1) and not ranks.any(False)
    assert ranks.objects(ranks.rank) == [0, 1] and ranks.first(lambda: "made") == "made"
    assert torch.equal(ranks.sum(torch.tensor([1, ranks.rank])), torch.tensor([2, 1]))
    def fail():
        raise OSError("no space")
    try:
        ranks.first(fail)
    except OSError as error:
        assert str(error) == "no space"
    else:
        raise AssertionError("rank 0's error did not reach this rank")
    assert ranks.elastic and ranks.main == (ranks.rank == 0)
ranks = open_ranks("cpu", 60.0)
check(ranks)
ranks.barrier()
close_ranks()
"""


def test_a_plain_process_needs_no_group() -> None:
    ranks = open_ranks("cpu", 60.0)
    assert (ranks.rank, ranks.world, ranks.main, ranks.group, ranks.elastic) == (0, 1, True, None, False)
    assert not dist.is_initialized()
    x = torch.ones(2, 3, requires_grad=True)
    assert gather(x, ranks.group) is x
    assert ranks.any(True) and not ranks.any(False) and ranks.objects(3) == [3] and ranks.first(lambda: 4) == 4
    assert torch.equal(ranks.sum(x), x.detach()) and torch.equal(ranks.concat(x), x.detach())
    ranks.barrier()


@pytest.mark.parametrize(("device", "words"), [("tpu", "expected auto, cpu or cuda"), ("cuda", "sees no CUDA")])
def test_devices_that_are_not_there_are_named(device: str, words: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match=words):
        open_ranks(device, 60.0)


def test_two_processes_agree(tmp_path: Path) -> None:
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
