"""Pooling without attention: the mean tile and the strongest tile, the base lines of every attention model."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histoscale.eval.mil.aggregators.pooled import Aggregator, Pooled, Weighing, Whole


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
    def logits(self, chunks: Iterable[Tensor]) -> Tensor:
        tiles = self._tiles(chunks)
        return tiles[tiles.amax(1).argmax()]

    @torch.no_grad()
    def whole(self, chunks: Iterable[Tensor]) -> Whole:
        tiles = self._tiles(chunks)
        order = tiles.amax(1).argsort(descending=True, stable=True)
        first = order[0]
        attention = F.one_hot(first, len(tiles)).double()
        without = tiles[first].expand_as(tiles).clone()
        without[first] = tiles[order[1]] if len(tiles) > 1 else 0.0
        return Whole(tiles[first], attention, attention[:, None] * tiles, without)

    def _tiles(self, chunks: Iterable[Tensor]) -> Tensor:
        return torch.cat([self.classify(chunk).double() for chunk in chunks])
