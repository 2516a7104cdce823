"""Pixels of views for given parameters, batched: crops resampled as Pillow does, colour, blur. No operation waits for the device.

All images are float32 [n, 3, h, w] in [0, 1]; parameters have one entry a row.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision
OPERATIONS = 4  # of the colour jitter: brightness, contrast, saturation, hue


@lru_cache(maxsize=256)
def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values as a tensor that must not be written to. Made once: to copy a few numbers to a device makes the host wait."""
    return torch.tensor(values, dtype=dtype, device=device)


def resize_taps(start: Tensor, length: Tensor, flip: Tensor, target: int, taps: int) -> tuple[Tensor, Tensor]:
    """Source pixels int64 and weights float32, both [n, target, taps], that resample [start, start + length) to `target`.

    Bicubic (a = -0.5), antialiased, pixels outside the box without weight, as Pillow. start, length, flip (reverse): [n].
    """
    start, length = start[:, None].float(), length[:, None].float()
    i = torch.arange(target, device=start.device, dtype=torch.float32)
    i = torch.where(flip[:, None], target - 1 - i, i)
    step = length / target
    wide = step.clamp(min=1)
    centre = (i + 0.5) * step
    first = (centre - 2 * wide + 0.5).floor_().clamp_(min=0)
    at = first[..., None] + torch.arange(taps, device=start.device, dtype=torch.float32)
    t = ((at + 0.5 - centre[..., None]) / wide[..., None]).abs_()
    near = (1.5 * t - 2.5).mul_(t * t).add_(1)
    far = ((-0.5 * t + 2.5).mul_(t) - 4).mul_(t).add_(2)
    weights = torch.where(t < 1, near, far.mul_(t < 2)).mul_(at < length[..., None])
    at = torch.minimum(at, length[..., None] - 1).add_(start[..., None])
    return at.long(), weights.div_(weights.sum(2, keepdim=True))


def needed_taps(longest: float, target: int) -> int:
    """Taps that a box of at most `longest` px needs: the kernel reaches 2 px to each side, times the factor when shrinking."""
    return 2 * math.ceil(2 * max(longest / target, 1)) + 1


def lines(patches: Tensor) -> Tensor:
    """Patches uint8 [B, 3, S, S] -> float32 [2, B, S, 3, S] in [0, 1]: their columns, then their rows, as `crop` takes them."""
    rows = patches.transpose(1, 2)
    return torch.stack([patches.permute(0, 3, 1, 2), rows]).float().div_(255)


def crop(source: Tensor, boxes: Tensor, symmetry: Tensor, px: int, longest: float) -> Tensor:
    """The `lines` of B patches of side S -> crops [C * B, 3, px, px] in [0, 1], crop-major.

    boxes: [C * B, 4], top, left, height, width, none above `longest`.
    symmetry: bool [C * B, 3], flip rows, flip columns, transpose.
    Two passes of weighted sums of whole lines: a product with a dense matrix does fifty times the arithmetic. A crop to transpose
    starts with the other axis.
    """
    batch, side = source.shape[1], source.shape[2]
    n, taps = len(boxes), needed_taps(longest, px)
    down = resize_taps(boxes[:, 0], boxes[:, 2], symmetry[:, 0], px, taps)
    across = resize_taps(boxes[:, 1], boxes[:, 3], symmetry[:, 1], px, taps)
    number = torch.arange(n, device=source.device)[:, None, None]
    turned = symmetry[:, 2, None, None]
    first, second = (
        (torch.where(turned, a, b), torch.where(turned, v, w)) for (a, v), (b, w) in ((down, across), (across, down))
    )
    at = first[0] + (number % batch + turned * batch) * side
    x = _weighted(source.view(2 * batch * side, 3 * side), at, first[1])
    x = x.view(n, px, 3, side).permute(0, 3, 2, 1).reshape(n * side, 3 * px)
    x = _weighted(x, second[0] + number * side, second[1]).view(n, px, 3, px)
    return x.transpose(1, 2).contiguous().clamp_(0, 1)


def _weighted(table: Tensor, at: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of a table."""
    taps = at.shape[-1]
    return functional.embedding_bag(at.view(-1, taps), table, mode="sum", per_sample_weights=weights.view(-1, taps))


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _grey(x: Tensor) -> Tensor:
    return (LUMA[0] * x[:, :1]).add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:], alpha=LUMA[2])


def saturate(x: Tensor, factor: Tensor) -> Tensor:
    """factor [n]: 0 is grey, 1 unchanged."""
    return torch.lerp(_grey(x), x, _each(factor)).clamp_(0, 1)


def brighten(x: Tensor, factor: Tensor) -> Tensor:
    return (x * _each(factor)).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Towards (below 1) or away from the mean of an image's grey."""
    return torch.lerp(_grey(x).mean((2, 3), keepdim=True), x, _each(factor)).clamp_(0, 1)


def turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate hue at constant HSV value and chroma; turns [n], 1.0 is the whole circle."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    scale = (chroma.clamp(min=1e-12) * 6).reciprocal_()
    from_green, from_blue = (blue - red).mul_(scale).add_(2 / 6), (red - green).mul_(scale).add_(4 / 6)
    hue = torch.where(value == red, (green - blue).mul_(scale), torch.where(value == green, from_green, from_blue))
    hue += turns[:, None, None]
    # distance on the circle from where each channel is lowest: red at 1/2, green at 5/6, blue at 1/6
    k = hue[:, None] - constant((3 / 6, 5 / 6, 1 / 6), x.device)[:, None, None]
    k -= k.round()
    return k.abs_().mul_(-6).add_(2).clamp_(0, 1).mul_(chroma[:, None]).neg_().add_(value[:, None])


_JITTER = (brighten, contrast, saturate, turn_hue)


def colour_jitter(x: Tensor, draws: Tensor, order: Sequence[int]) -> Tensor:
    """Brightness, contrast, saturation (factors) and hue (turns) of draws [n, 4] in `order`, each clamped as torchvision does."""
    for operation in order:
        x = _JITTER[operation](x, draws[:, operation])
    return x


def solarize(x: Tensor, on: Tensor) -> Tensor:
    """Invert what is at least 128 of 255 in the rows that are `on` (bool [n])."""
    return torch.where(_each(on) & (x >= 128 / 255), 1 - x, x)


def blur(x: Tensor, sigma: Tensor, kernel_px: int) -> Tensor:
    """Gaussian blur with reflected borders, sigma [n] in px (0: unchanged): shifted sums down, then across."""
    half = kernel_px // 2
    offsets = torch.arange(-half, half + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    for axis in (2, 3):
        side = x.shape[axis]
        padded = functional.pad(x, (0, 0, half, half) if axis == 2 else (half, half, 0, 0), mode="reflect")
        x = padded.narrow(axis, 0, side) * _each(weights[:, 0])
        for i in range(1, kernel_px):
            x.addcmul_(padded.narrow(axis, i, side), _each(weights[:, i]))
    return x
