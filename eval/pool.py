"""From tokens to one embedding a patch."""

import torch
from torch import Tensor

POOLS = ("cls", "mean", "cls+mean")


def check_pool(pool: str) -> None:
    """Raises ValueError for a name that is not in POOLS."""
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}: expected one of {', '.join(POOLS)}")


def pooled(cls: Tensor, mean: Tensor, pool: str) -> Tensor:
    """cls: [n, D], mean: [n, M] of the patch tokens -> [n, D], [n, M] or [n, D + M].

    M = 0 (an encoder without patch tokens, as `colour`) leaves its one vector under every name. Raises ValueError for others.
    """
    check_pool(pool)
    if pool == "cls" or mean.shape[1] == 0:
        return cls
    return mean if pool == "mean" else torch.cat([cls, mean], dim=1)


def patch_mean(patches: Tensor) -> Tensor:
    """Mean over patch tokens: [B, N, D] -> [B, D], or [B, 0] when there is none."""
    return patches.mean(dim=1) if patches.shape[1] else patches.new_zeros(len(patches), 0)
