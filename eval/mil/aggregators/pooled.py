"""What every aggregator makes of a bag, and the tile-wise reading that keeps bags of any size in bounded memory."""

from collections.abc import Iterable
from typing import NamedTuple

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


class Aggregator(nn.Module):
    """forward(x [B, N, D], mask bool [B, N], true for real tiles) -> Pooled; what stands in the padding changes nothing."""

    splits: bool  # whether the logits are a weighted mean of logits of tiles

    def forward(self, x: Tensor, mask: Tensor) -> Pooled:
        raise NotImplementedError

    def logits(self, chunks: Iterable[Tensor]) -> Tensor:
        """[K] of one slide whose tiles come as [m, D]; equal to `forward` on all of them, to rounding."""
        raise NotImplementedError

    def whole(self, chunks: Iterable[Tensor]) -> Whole:
        """One slide whose tiles come as [m, D]; logits and attention equal `forward` on all of them, to rounding."""
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
    def logits(self, chunks: Iterable[Tensor]) -> Tensor:
        raw, values = self._values(chunks)
        pooled = raw.softmax(0) @ values
        return pooled if self.splits else self._head(pooled)

    @torch.no_grad()
    def whole(self, chunks: Iterable[Tensor]) -> Whole:
        raw, values = self._values(chunks)
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

    def _values(self, chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """float64: raw scores [n], and what is averaged, logits of tiles [n, K] or, if the head is not linear, hidden [n, H]."""
        raws, values = [], []
        for chunk in chunks:
            raw, hidden = self.parts(chunk)
            raws.append(raw.double())
            values.append((self.head(hidden) if self.splits else hidden).double())
        return torch.cat(raws), torch.cat(values)

    def _head(self, z: Tensor) -> Tensor:
        return self.head(z.to(next(self.parameters()).dtype)).double()


_ROWS = 4096


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
