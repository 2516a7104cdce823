"""Pooling without attention: the mean tile and the strongest tile, the base lines of every attention model."""

from torch import Tensor, nn
from torch.nn import functional as F


class MeanPool(nn.Module):
    """A linear classifier on the mean of the tiles."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, N, D], mask: bool [B, N] -> attention [B, N], equal over real tiles, and tile logits [B, N]."""
        weight = mask.to(x.dtype)
        return weight / weight.sum(1, keepdim=True), self.classify(x)[..., 0]


class MaxPool(nn.Module):
    """A linear classifier of every tile; the bag's logit is the largest (max-instance, not element-wise maximum)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, N, D], mask: bool [B, N] -> attention [B, N], one on the strongest real tile, and tile logits [B, N]."""
        logits = self.classify(x)[..., 0]
        strongest = logits.masked_fill(~mask, float("-inf")).argmax(1)
        return F.one_hot(strongest, x.shape[1]).to(x.dtype), logits
