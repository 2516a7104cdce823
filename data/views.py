"""Views of patches: random resized crops, symmetries and photometric changes, batched on the device where the model is.

Every draw is keyed by (seed, step, slot, view), so ranks, workers and micro-batches change nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from histoscale.data import keys as draw
from histoscale.data.stain import hed_jitter

_ATTEMPTS = 10  # boxes tried before the whole patch is taken (torchvision's RandomResizedCrop)
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision


@dataclass(frozen=True)
class ViewsConfig:
    global_count: int
    global_px: int
    global_scale: list[float]  # share of the patch's area
    local_count: int
    local_px: int
    local_scale: list[float]
    ratio: list[float]  # width / height of a crop, log-uniform
    hflip: float
    vflip: float
    quarter_turns: bool
    hed_p: float
    hed_sigma_od: float  # each stain: factor 1 +- sigma, shift +- sigma, uniform, in natural-log optical density
    jitter_p: float
    brightness: float
    contrast: float
    saturation: float
    hue: float  # turns
    grey_p: float
    global_blur_p: list[float]  # one a global view
    local_blur_p: float
    blur_kernel_px: int
    blur_sigma_px: list[float]
    global_solarize_p: list[float]  # one a global view
    mean: list[float]
    std: list[float]


class Views(NamedTuple):
    """Crop-major: row = crop * B + slot."""

    globals: Tensor  # float32 [V * B, 3, g, g]
    locals: Tensor  # float32 [L * B, 3, l, l]


@torch.no_grad()
def make_views(pixels: Tensor, seed: int, step: int, slots: Tensor, config: ViewsConfig) -> Views:
    """Patches uint8 [B, 3, S, S] and their slots int64 [B] -> normalised views, on the pixels' device.

    Raises ValueError when a per-view list of the configuration has not one entry a global view.
    """
    for name in ("global_blur_p", "global_solarize_p"):
        if len(getattr(config, name)) != config.global_count:
            raise ValueError(f"views.{name}={getattr(config, name)} needs views.global_count={config.global_count} entries")
    parents = draw.keys(seed, "views", step, slots.to(pixels.device))
    patches = pixels.float() / 255
    with torch.autocast(pixels.device.type, enabled=False):
        return Views(
            _views(patches, parents, "global", config.global_px, config.global_scale,
                   config.global_blur_p, config.global_solarize_p, config),
            _views(patches, parents, "local", config.local_px, config.local_scale,
                   [config.local_blur_p] * config.local_count, [0.0] * config.local_count, config),
        )  # fmt: skip


def _views(
    patches: Tensor, parents: Tensor, name: str, px: int, scale: Sequence[float],
    blur_p: Sequence[float], solarize_p: Sequence[float], config: ViewsConfig,
) -> Tensor:  # fmt: skip
    count = len(blur_p)
    if count == 0:
        return patches.new_zeros(0, 3, px, px)
    keys = torch.cat([draw.fork(parents, f"{name}/{i}") for i in range(count)])
    x = crop(patches, crop_boxes(keys, patches.shape[-1], scale, config.ratio), symmetries(keys, config), px)
    if config.hed_p > 0:
        x = hed_jitter(x, *hed_draws(keys, config))
    if config.jitter_p > 0:
        x = colour_jitter(x, jitter_draws(keys, config))
    if config.grey_p > 0:
        x = saturate(x, 1 - chosen(keys, "grey", [config.grey_p]))
    if any(p > 0 for p in blur_p):
        x = blur(x, torch.where(chosen(keys, "blur", blur_p) > 0, spread(keys, "sigma", *config.blur_sigma_px), 0),
                 config.blur_kernel_px)  # fmt: skip
    if any(p > 0 for p in solarize_p):
        x = torch.where((chosen(keys, "solarize", solarize_p)[:, None, None, None] > 0) & (x >= 128 / 255), 1 - x, x)
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (config.mean, config.std))
    return x.sub_(mean).div_(std)


# ------------------------------------------------------------------------------------------------------------- draws


def chosen(keys: Tensor, purpose: str, p: Sequence[float]) -> Tensor:
    """1.0 with probability p, else 0.0: [n]; p has one entry, or one for each run of n / len(p) rows."""
    threshold = torch.tensor(p, device=keys.device).repeat_interleave(len(keys) // len(p))
    return (draw.uniform(draw.fork(keys, purpose), 1)[:, 0] < threshold).float()


def spread(keys: Tensor, purpose: str, low: float, high: float) -> Tensor:
    """Uniform in [low, high): float32 [n]."""
    return low + (high - low) * draw.uniform(draw.fork(keys, purpose), 1)[:, 0]


def crop_boxes(keys: Tensor, side: int, scale: Sequence[float], ratio: Sequence[float]) -> Tensor:
    """Pixel boxes (top, left, height, width) in square patches: float64 [n, 4], by the law of torchvision's RandomResizedCrop."""
    u = draw.uniform(draw.fork(keys, "box"), 2 * _ATTEMPTS + 2).double()
    area = side * side * (scale[0] + (scale[1] - scale[0]) * u[:, :_ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * u[:, _ATTEMPTS : 2 * _ATTEMPTS]).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width <= side) & (height <= side) & (width > 0) & (height > 0)
    first = fits.float().argmax(1, keepdim=True)
    none = ~fits.any(1)
    height, width = (v.gather(1, first)[:, 0].masked_fill(none, side) for v in (height, width))
    top = (u[:, -2] * (side - height + 1)).floor()
    left = (u[:, -1] * (side - width + 1)).floor()
    return torch.stack([top, left, height, width], 1)


def symmetries(keys: Tensor, config: ViewsConfig) -> Tensor:
    """Flip rows, flip columns, then transpose: bool [n, 3]. Flips with their probabilities, and a uniform quarter turn."""
    rows, columns = chosen(keys, "vflip", [config.vflip]) > 0, chosen(keys, "hflip", [config.hflip]) > 0
    turns = draw.uniform(draw.fork(keys, "turn"), 1)[:, 0].mul(4).long() * int(config.quarter_turns)
    return torch.stack([rows ^ (turns >= 2), columns ^ ((turns == 1) | (turns == 2)), turns % 2 == 1], 1)


def hed_draws(keys: Tensor, config: ViewsConfig) -> tuple[Tensor, Tensor]:
    """Factor and shift of each stain: float32 [n, 3] each; 1 and 0 where the jitter is not applied."""
    u = 2 * draw.uniform(draw.fork(keys, "hed"), 6) - 1
    moved = config.hed_sigma_od * u * chosen(keys, "hed_on", [config.hed_p])[:, None]
    return 1 + moved[:, :3], moved[:, 3:]


def jitter_draws(keys: Tensor, config: ViewsConfig) -> Tensor:
    """Factors of brightness, contrast and saturation, and the turn of hue: float32 [n, 4]; 1, 1, 1, 0 where not applied."""
    strength = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue], device=keys.device)
    u = 2 * draw.uniform(draw.fork(keys, "jitter"), 4) - 1
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0], device=keys.device)
    return neutral + strength * u * chosen(keys, "jitter_on", [config.jitter_p])[:, None]


# ------------------------------------------------------------------------------------------------------------- pixels


def resize_weights(start: Tensor, length: Tensor, flip: Tensor, source: int, target: int) -> Tensor:
    """Weights [n, target, source] that resample pixels [start, start + length) to `target`: bicubic, antialiased, as Pillow.

    start, length, flip (reverse the result): [n]. Pixels outside the box have no weight, as if it had been cut out first.
    """
    start, length = start[:, None, None].float(), length[:, None, None].float()
    i = torch.arange(target, device=start.device, dtype=torch.float32)[None, :, None]
    i = torch.where(flip[:, None, None], target - 1 - i, i)
    j = torch.arange(source, device=start.device, dtype=torch.float32)[None, None, :]
    step = length / target
    t = (j + 0.5 - start - (i + 0.5) * step).div_(step.clamp(min=1)).abs_()
    near = (1.5 * t - 2.5).mul_(t * t).add_(1)
    far = ((-0.5 * t + 2.5).mul_(t) - 4).mul_(t).add_(2)
    weights = torch.where(t < 1, near, far.mul_(t < 2)).mul_((j >= start) & (j < start + length))
    return weights.div_(weights.sum(2, keepdim=True))


def crop(patches: Tensor, boxes: Tensor, symmetry: Tensor, px: int) -> Tensor:
    """Patches [B, 3, S, S] -> crops [C * B, 3, px, px] in [0, 1], crop-major; boxes [C * B, 4], symmetry bool [C * B, 3]."""
    batch, side = len(patches), patches.shape[-1]
    count = len(boxes) // batch
    down = resize_weights(boxes[:, 0], boxes[:, 2], symmetry[:, 0], side, px).unflatten(0, (count, batch))
    across = resize_weights(boxes[:, 1], boxes[:, 3], symmetry[:, 1], side, px).unflatten(0, (count, batch))
    # all crops of a patch share the first product: [B, 3S, S] @ [B, S, C px]
    columns = patches.flatten(1, 2) @ across.permute(1, 3, 0, 2).flatten(2)
    columns = columns.view(batch, 3, side, count, px).permute(3, 0, 2, 1, 4).reshape(count, batch, side, 3 * px)
    x = (down @ columns).view(count * batch, px, 3, px).transpose(1, 2).clamp(0, 1)
    return torch.where(symmetry[:, 2, None, None, None], x.transpose(2, 3), x)


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _grey(x: Tensor) -> Tensor:
    return (_LUMA[0] * x[:, :1]).add_(x[:, 1:2], alpha=_LUMA[1]).add_(x[:, 2:], alpha=_LUMA[2])


def saturate(x: Tensor, factor: Tensor) -> Tensor:
    """x [n, 3, h, w], factor [n]: 0 is grey, 1 unchanged."""
    return torch.lerp(_grey(x), x, _each(factor)).clamp_(0, 1)


def colour_jitter(x: Tensor, draws: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in this order, each clamped as in torchvision. x [n, 3, h, w], draws [n, 4]."""
    x = (x * _each(draws[:, 0])).clamp_(0, 1)
    x = torch.lerp(_grey(x).mean((2, 3), keepdim=True), x, _each(draws[:, 1])).clamp_(0, 1)
    return turn_hue(saturate(x, draws[:, 2]), draws[:, 3])


def turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate hue at constant HSV value and saturation. x [n, 3, h, w] in [0, 1], turns [n]."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    scale = chroma.clamp(min=1e-12).reciprocal_()
    from_green, from_blue = (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4)
    sector = torch.where(value == red, (green - blue).mul_(scale), torch.where(value == green, from_green, from_blue))
    k = (sector + 6 * turns[:, None, None])[:, None] + torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
    k = k.remainder_(6)
    return value[:, None] - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma[:, None])


def blur(x: Tensor, sigma: Tensor, kernel_px: int) -> Tensor:
    """Gaussian blur with reflected borders: x [n, 3, h, h], sigma [n] in px (0: unchanged). Two products with banded matrices."""
    side, half = x.shape[-1], kernel_px // 2
    offsets = torch.arange(-half, half + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    at = (torch.arange(side, device=x.device)[:, None] + offsets).abs()
    at = (side - 1) - ((side - 1) - at).abs()
    bands = torch.zeros(kernel_px, side, side, device=x.device).scatter_(2, at.t()[:, :, None], 1)
    matrix = (weights @ bands.flatten(1)).view(-1, 1, side, side)
    return matrix @ x @ matrix.transpose(2, 3)
