"""What each of two processes computes in test_losses*.py: a module of its own, because spawned processes import it by name."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from histoscale.pretrain.losses import center_update, kde, kde_reversed, koleo, sinkhorn_targets


def logits() -> Tensor:
    """float64 [24, 10], the same in every process."""
    return torch.randn(24, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def targets_and_centre(rank: int, address: str, results: Any) -> None:
    """Rank's half of the logits through the collectives; the answers go into `results`."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    half = logits()[rank * 12 : rank * 12 + 12]
    world = dist.group.WORLD
    results[rank] = sinkhorn_targets(half, 0.07, 3, world), center_update(half, torch.zeros(10), 0.9, world)
    dist.destroy_process_group()


def features() -> Tensor:
    """float64 [24, 6], the same in every process; some rows are near duplicates of rows of the other process."""
    rows = torch.randn(24, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.cat([rows[:12], rows[:6] + 0.1 * rows[12:18], rows[18:]])


TERMS = {
    f"{name}, pool {pool}": (term, pool)
    for name, term in (
        ("koleo", lambda z, pool, across: koleo(z, pool, across)),
        ("koleo of three", lambda z, pool, across: koleo(z, pool, across, 3)),
        ("kde", lambda z, pool, across: kde(z, 5.0, pool, across)),
        ("kde reversed", lambda z, pool, across: kde_reversed(z, 5.0, pool, across)),
    )
    for pool in (None, 24, 8, 6)  # all, all, across the border between ranks, inside one rank
}


def pooled(rank: int, address: str, results: Any) -> None:
    """Value and gradient of each term on this rank's half of the features."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    found = {}
    for name, (term, pool) in TERMS.items():
        half = features()[rank * 12 : rank * 12 + 12].requires_grad_()
        value = term(half, pool, dist.group.WORLD)
        value.backward()
        found[name] = (value.detach(), half.grad)
    results[rank] = found
    dist.destroy_process_group()
