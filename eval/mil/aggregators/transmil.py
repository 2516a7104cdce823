"""TransMIL (Shao et al. 2021, arXiv 2106.00908): tiles attend to each other through landmarks, and stand in a square for a
convolution that gives them places. It depends on the order of the tiles."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histoscale.eval.mil.aggregators.pooled import Aggregator, Pooled, Tiles, Whole

_KERNELS = (7, 5, 3)  # of the position encoding


@dataclass(frozen=True)
class TransmilConfig:
    """hidden: width of the tokens. heads, landmarks, iterations (of the pseudo-inverse), kernel (of the values' convolution) and
    dropout: of the Nystrom attention."""

    kind: Literal["transmil"]
    hidden: int
    heads: int
    landmarks: int
    iterations: int
    kernel: int
    dropout: float

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.kernel % 2 == 0:
            given = f"mil.aggregator.hidden is {self.hidden}, heads {self.heads}, kernel {self.kernel}"
            raise ValueError(f"{given}: expected a width that the heads divide, and an odd kernel")


class NystromAttention(nn.Module):
    """Self-attention through landmarks, the means of stretches of the sequence (Xiong et al. 2021, arXiv 2102.03902):
    softmax(q k'^T) pinv(softmax(q' k'^T)) softmax(q' k^T) v, plus a convolution of v along the sequence.

    The sequence is filled with zero tokens in front to a multiple of the landmarks; they take part.
    """

    def __init__(self, config: TransmilConfig) -> None:
        super().__init__()
        self.heads, self.landmarks, self.iterations = config.heads, config.landmarks, config.iterations
        self.to_qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.convolve = nn.Conv1d(config.heads, config.heads, config.kernel, padding="same", groups=config.heads, bias=False)
        self.to_out = nn.Linear(config.hidden, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [N, H] -> [N, H], and the attention of the first token: [heads, N] (its weights may be negative)."""
        n, hidden = x.shape
        before = -n % self.landmarks
        x = F.pad(x, (0, 0, before, 0))
        q, k, v = self.to_qkv(x).view(len(x), 3, self.heads, hidden // self.heads).permute(1, 2, 0, 3)  # [heads, N, d] each
        q_means, k_means = (each.unflatten(1, (self.landmarks, -1)).mean(2) for each in (q, k))
        scale = (hidden // self.heads) ** -0.5
        inverse = pseudo_inverse((q_means @ k_means.mT * scale).softmax(-1), self.iterations)
        # The fused attention never holds an N x landmarks matrix.
        mixed = inverse @ F.scaled_dot_product_attention(q_means[None], k[None], v[None])[0]
        out = F.scaled_dot_product_attention(q[None], k_means[None], mixed[None])[0]
        out = out + self._convolved(v)
        out = self.dropout(self.to_out(out.transpose(0, 1).flatten(1)))
        with torch.no_grad():
            first = (q[:, before, None] @ k_means.mT * scale).softmax(-1) @ inverse  # [heads, 1, landmarks]
            seen = [(first[h] @ (q_means[h] @ k[h].mT * scale).softmax(-1))[0, before:] for h in range(self.heads)]
        return out[before:], torch.stack(seen)

    def _convolved(self, v: Tensor) -> Tensor:
        """[heads, N, d]: each head's kernel runs along the sequence, every column alone."""
        return self.convolve(v.permute(2, 0, 1)).permute(1, 2, 0)


def pseudo_inverse(x: Tensor, iterations: int) -> Tensor:
    """Of square matrices [heads, m, m] by the iteration of Razavi et al. (2014, doi 10.1155/2014/563787); its start has one scale
    for all heads, as the published code has."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    z = x.mT / (x.abs().sum(-1).max() * x.abs().sum(-2).max())
    for _ in range(iterations):
        xz = x @ z
        z = z @ (13 * eye - xz @ (15 * eye - xz @ (7 * eye - xz))) / 4
    return z


class Transmil(Aggregator):
    """One bag at a time, since a batch of unequal bags would change its landmarks. The attention is that of the class token in
    the last layer: the mean of its size over heads, as the pseudo-inverse makes some negative. A tile's contribution is the
    gradient times its input. A slide is read whole: about 45 kB a tile at the published sizes."""

    splits = False

    def __init__(self, width: int, outputs: int, config: TransmilConfig) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(width, config.hidden), nn.ReLU())
        self.token = nn.Parameter(torch.randn(1, config.hidden))
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden) for _ in range(3))
        self.layers = nn.ModuleList(NystromAttention(config) for _ in range(2))
        self.places = nn.ModuleList(
            nn.Conv2d(config.hidden, config.hidden, size, padding="same", groups=config.hidden) for size in _KERNELS
        )
        self.classify = nn.Linear(config.hidden, outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Pooled:
        found = [self._bag(self.embed(bag[real])) for bag, real in zip(x, mask, strict=True)]
        attention = x.new_zeros(mask.shape)
        attention[mask] = torch.cat([each for _, each in found])
        return Pooled(torch.stack([logits for logits, _ in found]), attention, None)

    @torch.no_grad()
    def logits(self, tiles: Tiles) -> Tensor:
        return self._bag(torch.cat([self.embed(chunk) for chunk in tiles]))[0]

    def whole(self, tiles: Tiles) -> Whole:
        with torch.enable_grad():
            x = torch.cat(list(tiles)).requires_grad_()
            logits, attention = self._bag(self.embed(x))
            slopes = [torch.autograd.grad(each, x, retain_graph=True)[0] for each in logits]
        contribution = torch.stack([(x.detach() * slope).sum(1) for slope in slopes], 1)
        return Whole(logits.detach(), attention, contribution, None)

    def _bag(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded tiles [n, H] -> logits [K], attention [n]."""
        n = len(tiles)
        side = math.ceil(math.sqrt(n))
        tiles = torch.cat([self.token, tiles, tiles[: side**2 - n]])
        tiles = tiles + self.layers[0](self.norms[0](tiles))[0]
        token, square = tiles[:1], tiles[1:].T.reshape(1, -1, side, side)
        square = square + sum(place(square) for place in self.places)
        tiles = torch.cat([token, square[0].flatten(1).T])
        change, seen = self.layers[1](self.norms[1](tiles))
        logits = self.classify(self.norms[2](tiles[0] + change[0]))
        weights = seen.abs().mean(0)[1:]
        attention = weights[:n].clone()
        attention[: len(weights) - n] += weights[n:]  # the repeated tiles are the first ones
        return logits, attention / attention.sum()
