"""What every aggregator makes of a bag, and the tile-wise reading that keeps bags of any size in bounded memory."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Pooled(NamedTuple):
    """logits: [B, K]. attention: [B, N], 0 on padding, sums to 1. tiles: [B, N, K] with logits = sum over tiles of
    attention * tiles, None where the model does not split its logit. hidden: [B, N, H], the tiles as the attention sees them,
    None in models without a use for it."""

    logits: Tensor
    attention: Tensor
    tiles: Tensor | None
    hidden: Tensor | None = None


class Whole(NamedTuple):
    """One slide read whole. logits: [K]. attention: [n]. contribution: [n, K], the share of each tile. without: [n, K], the
    logits of the slide without that tile, None where only as many forward passes as tiles could tell."""

    logits: Tensor
    attention: Tensor
    contribution: Tensor
    without: Tensor | None


class Tiles:
    """The tiles of one slide, features [n, D] of any float type; iterated as standardised parts of at most `chunk` tiles."""

    def __init__(self, features: np.ndarray, shift: Tensor, scale: Tensor, chunk: int) -> None:
        self.features, self.shift, self.scale, self.chunk = features, shift, scale, chunk

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self), self.chunk):
            part = torch.from_numpy(np.ascontiguousarray(self.features[start : start + self.chunk]))
            yield (part.to(self.shift.dtype) - self.shift).div_(self.scale)


class Aggregator(nn.Module):
    """forward(x [B, N, D], mask bool [B, N], true for real tiles) -> Pooled; what stands in the padding changes nothing."""

    splits: bool  # whether the logits are a weighted mean of logits of tiles

    def forward(self, x: Tensor, mask: Tensor) -> Pooled:
        raise NotImplementedError

    def logits(self, tiles: Tiles) -> Tensor:
        """[K] of one slide; equal to `forward` on its standardised tiles, to rounding."""
        raise NotImplementedError

    def whole(self, tiles: Tiles) -> Whole:
        """One slide; logits and attention equal `forward` on its standardised tiles, to rounding."""
        raise NotImplementedError


class Weighing(Aggregator):
    """Aggregators that weigh tiles one by one: softmax of raw scores, then a head on the weighted mean.

    A subclass gives `parts` and `head`. A slide in chunks needs memory for one of them, and beside it a raw score and K logits a
    tile, or H numbers under a head that is not linear.
    """

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] -> raw score [...] and hidden [..., H]."""
        raise NotImplementedError

    def head(self, z: Tensor) -> Tensor:
        """[..., H] -> logits [..., K]."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor) -> Pooled:
        raw, hidden = self.parts(x)
        attention = raw.masked_fill(~mask, float("-inf")).softmax(1)
        if self.splits:
            tiles = self.head(hidden)
            return Pooled((attention[..., None] * tiles).sum(1), attention, tiles, hidden)
        return Pooled(self.head((attention[:, None] @ hidden)[:, 0]), attention, None, hidden)

    @torch.no_grad()
    def logits(self, tiles: Tiles) -> Tensor:
        raw, values = self._values(tiles)
        pooled = raw.softmax(0) @ values
        return pooled if self.splits else self._head(pooled)

    @torch.no_grad()
    def whole(self, tiles: Tiles) -> Whole:
        raw, values = self._values(tiles)
        attention = raw.softmax(0)
        pooled = attention @ values
        others = leave_one_out(attention, raw, values)
        if self.splits:
            return Whole(pooled, attention, attention[:, None] * values, others)
        with torch.enable_grad():
            z = pooled.clone().requires_grad_()
            logits = self._head(z)
            slopes = torch.stack([torch.autograd.grad(each, z, retain_graph=True)[0] for each in logits], 1)  # [H, K]
        contribution = attention[:, None] * (values @ slopes)  # gradient times input, where the input is the tile's part of z
        without = torch.cat([self._head(each) for each in others.split(_ROWS)])
        return Whole(logits.detach(), attention, contribution, without)

    def _values(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """float64: raw scores [n], and what is averaged, logits of tiles [n, K] or, if the head is not linear, hidden [n, H]."""

        def of(chunk: Tensor) -> tuple[Tensor, ...]:
            raw, hidden = self.parts(chunk)
            return raw, self.head(hidden) if self.splits else hidden

        raw, values = gather(tiles, of)
        return raw, values

    def _head(self, z: Tensor) -> Tensor:
        return self.head(z.to(next(self.parameters()).dtype)).double()


_ROWS = 4096


def gather(tiles: Tiles, of: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
    """What a function makes of parts [m, D], as float64 [n, ...]. The results have their place before the parts are made: small
    pieces kept between large ones would leave holes in memory that grow with the slide."""
    found: list[Tensor] = []
    start = 0
    for chunk in tiles:
        made = of(chunk)
        if not found:
            found = [each.new_empty((len(tiles), *each.shape[1:]), dtype=torch.float64) for each in made]
        for whole, each in zip(found, made, strict=True):
            whole[start : start + len(chunk)] = each
        start += len(chunk)
    return found


def leave_one_out(attention: Tensor, raw: Tensor, values: Tensor) -> Tensor:
    """The weighted mean of all tiles but one, for each tile in turn: [n, C] from attention [n] = softmax(raw [n]), values [n, C].

    Without tile i the weights of the others grow by 1 / (1 - a_i); the tile that holds nearly everything is taken out in full,
    where that would divide rounding by rounding. A slide of one tile has no others: zeros.
    """
    if len(raw) == 1:
        return torch.zeros_like(values)
    pooled = attention @ values
    top = int(raw.argmax())
    left = (1 - attention)[:, None]
    left[top] = 1.0
    without = (pooled - attention[:, None] * values) / left
    rest = torch.arange(len(raw), device=raw.device) != top
    without[top] = raw[rest].softmax(0) @ values[rest]
    return without
