"""What each of two processes computes in test_losses.py: a module of its own, because spawned processes import it by name."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from histoscale.pretrain.losses import center_update, sinkhorn_scalings


def logits() -> Tensor:
    """float64 [24, 10], the same in every process."""
    return torch.randn(24, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def scalings_and_centre(rank: int, address: str, results: Any) -> None:
    """Rank's half of the logits through the collectives; the answers go into `results`."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    half = logits()[rank * 12 : rank * 12 + 12]
    world = dist.group.WORLD
    results[rank] = sinkhorn_scalings(half, 0.07, 3, world), center_update(half, torch.zeros(10), 0.9, world)
    dist.destroy_process_group()
