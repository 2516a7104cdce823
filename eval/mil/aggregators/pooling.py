"""Pooling without attention: the mean tile and the strongest tile, the base lines of every attention model."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histoscale.eval.mil.aggregators.pooled import Aggregator, Pooled, Tiles, Weighing, Whole, gather


@dataclass(frozen=True)
class MeanConfig:
    kind: Literal["mean"]


@dataclass(frozen=True)
class MaxConfig:
    kind: Literal["max"]


class MeanPool(Weighing):
    """A linear classifier on the mean of the tiles."""

    splits = True

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, outputs)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_zeros(x.shape[:-1]), x

    def head(self, z: Tensor) -> Tensor:
        return self.classify(z)


class MaxPool(Aggregator):
    """A linear classifier of every tile; the bag's logits are those of its strongest tile, the one with the largest logit of any
    class (max-instance as in CLAM's `mil`, not element-wise maximum)."""

    splits = True

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Pooled:
        tiles = self.classify(x)
        strongest = tiles.amax(-1).masked_fill(~mask, float("-inf")).argmax(1)
        attention = F.one_hot(strongest, x.shape[1]).to(x.dtype)
        return Pooled((attention[..., None] * tiles).sum(1), attention, tiles)

    @torch.no_grad()
    def logits(self, tiles: Tiles) -> Tensor:
        single = self._single(tiles)
        return single[single.amax(1).argmax()]

    @torch.no_grad()
    def whole(self, tiles: Tiles) -> Whole:
        single = self._single(tiles)
        first, *second = single.amax(1).topk(min(2, len(single))).indices.tolist()
        attention = F.one_hot(torch.tensor(first), len(single)).double()
        without = single[first].expand_as(single).clone()
        without[first] = single[second[0]] if second else 0.0
        return Whole(single[first], attention, attention[:, None] * single, without)

    def _single(self, tiles: Tiles) -> Tensor:
        """float64 logits of every tile: [n, K]."""
        return gather(tiles, lambda chunk: (self.classify(chunk),))[0]
