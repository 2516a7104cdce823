"""Views of patches: random resized crops, symmetries and photometric changes, batched on the device where the model is.

Every draw is keyed by (seed, step, slot, view), so ranks, workers and micro-batches change nothing. augment.py does the pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from histoscale.data import augment
from histoscale.data import keys as draw
from histoscale.data.stain import hed_jitter

_ATTEMPTS = 10  # boxes tried before the whole patch is taken (torchvision's RandomResizedCrop)


@dataclass(frozen=True)
class BlurConfig:
    global_p: list[float]  # one a global view
    local_p: float
    kernel_px: int
    sigma_px: list[float]


@dataclass(frozen=True)
class ViewsConfig:
    global_count: int
    global_px: int
    global_scale: list[float]  # area of a crop: what it is a share of says scale_of
    local_count: int
    local_px: int
    local_scale: list[float]
    scale_of: Literal["patch", "view"]  # patch: crop and resize; view: the view's own px, extended-context translation
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
    blur: BlurConfig
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

    Raises ValueError when a per-view list of the configuration has not one entry a global view, or a patch is too small for it.
    """
    for name, listed in (("blur.global_p", config.blur.global_p), ("global_solarize_p", config.global_solarize_p)):
        if len(listed) != config.global_count:
            raise ValueError(f"views.{name}={listed} needs views.global_count={config.global_count} entries")
    parents = draw.keys(seed, "views", step, slots.to(pixels.device))
    source, none = augment.lines(pixels), [0.0] * config.local_count
    kinds = (
        Kind("global", config.global_px, config.global_scale, config.blur.global_p, config.global_solarize_p),
        Kind("local", config.local_px, config.local_scale, [config.blur.local_p] * config.local_count, none),
    )
    with torch.autocast(pixels.device.type, enabled=False):
        return Views(*(_views(source, parents, seed, step, kind, config) for kind in kinds))


@torch.no_grad()
def make_undistorted(pixels: Tensor, seed: int, step: int, slots: Tensor, config: ViewsConfig, px: int) -> Tensor:
    """The global views of `make_views` at another size and with their colours as they are: [V * B, 3, px, px], normalised.

    The same boxes and symmetries, so that a finer model may look at what the student sees (arXiv 2508.10104).
    """
    keys = draw.keys(seed, "views", step, slots.to(pixels.device))
    keys = torch.cat([draw.fork(keys, f"global/{i}") for i in range(config.global_count)])
    source = augment.lines(pixels)
    area, longest = crop_area("global", config.global_px, config.global_scale, source.shape[2], config)
    mean, std = (augment.constant(tuple(v), source.device)[:, None, None] for v in (config.mean, config.std))
    with torch.autocast(pixels.device.type, enabled=False):
        boxes = crop_boxes(keys, source.shape[2], area, config.ratio)
        return augment.crop(source, boxes, symmetries(keys, config), px, longest).sub_(mean).div_(std)


class Kind(NamedTuple):
    """Global or local views. blur_p, solarize_p: one a view."""

    name: str
    px: int
    scale: Sequence[float]
    blur_p: Sequence[float]
    solarize_p: Sequence[float]


def _views(source: Tensor, parents: Tensor, seed: int, step: int, kind: Kind, config: ViewsConfig) -> Tensor:
    """All views of a kind. The CPU makes one after the other, which stay in its cache; an accelerator all at once."""
    count, batch, side = len(kind.blur_p), source.shape[1], source.shape[2]
    if count == 0:
        return source.new_zeros(0, 3, kind.px, kind.px)
    area, longest = crop_area(kind.name, kind.px, kind.scale, side, config)
    keys = torch.cat([draw.fork(parents, f"{kind.name}/{i}") for i in range(count)])
    boxes, symmetry = crop_boxes(keys, side, area, config.ratio), symmetries(keys, config)
    hed, hed_on = hed_draws(keys, config.hed_sigma_od), chosen(keys, "hed_on", [config.hed_p])
    jitter, jitter_on = jitter_draws(keys, config), chosen(keys, "jitter_on", [config.jitter_p])
    grey_on, no_colour = chosen(keys, "grey", [config.grey_p]), source.new_zeros(len(keys))
    sigma, blur_on = spread(keys, "sigma", *config.blur.sigma_px), chosen(keys, "blur", kind.blur_p)
    solarize_on = chosen(keys, "solarize", kind.solarize_p)
    orders = [jitter_order(seed, step, f"{kind.name}/{i}") for i in range(count)]
    mean, std = (augment.constant(tuple(v), source.device)[:, None, None] for v in (config.mean, config.std))

    def run(views: range) -> Tensor:
        at = slice(views.start * batch, views.stop * batch)
        x = augment.crop(source, boxes[at], symmetry[at], kind.px, longest)
        if config.hed_p > 0:
            x = _where(hed_on[at], x, hed[at], lambda x, d: hed_jitter(x, d[:, 0], d[:, 1]))
        if config.jitter_p > 0:
            rows = [slice(i * batch, (i + 1) * batch) for i in views]
            parts = zip(x.split(batch), rows, [orders[i] for i in views], strict=True)
            x = _joined([_where(jitter_on[r], part, jitter[r], partial(augment.colour_jitter, order=o)) for part, r, o in parts])
        if config.grey_p > 0:
            x = _where(grey_on[at], x, no_colour[at], augment.saturate)
        if any(kind.blur_p[i] > 0 for i in views):
            x = _where(blur_on[at], x, sigma[at], partial(augment.blur, kernel_px=config.blur.kernel_px))
        if any(kind.solarize_p[i] > 0 for i in views):
            x = augment.solarize(x, solarize_on[at])
        return x.sub_(mean).div_(std)

    each = [range(i, i + 1) for i in range(count)] if source.device.type == "cpu" else [range(count)]
    return _joined([run(views) for views in each])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _where(on: Tensor, x: Tensor, draws: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """x with the rows that are `on` changed. Picking them costs an accelerator a wait for their number, so there all are made."""
    if x.device.type != "cpu":
        return torch.where(on[:, None, None, None], change(x, draws), x)
    rows = on.nonzero()[:, 0]
    if len(rows) == len(x):
        return change(x, draws)
    return x if len(rows) == 0 else x.index_copy_(0, rows, change(x[rows], draws[rows]))


# ------------------------------------------------------------------------------------------------------------- draws


def crop_area(name: str, px: int, scale: Sequence[float], side: int, config: ViewsConfig) -> tuple[tuple[float, float], float]:
    """Area of the boxes of global or local views of `px` in patches of `side` px, low and high (px), and a box's longest side.

    Extended-context translation (arXiv 2408.00738) cuts a view from a larger patch near its own size, so that cells keep theirs.
    Raises ValueError for a patch that has no room for it.
    """
    whole = side**2 if config.scale_of == "patch" else px**2
    longest = math.sqrt(scale[1] * whole * max(config.ratio[1], 1 / config.ratio[0]))
    if config.scale_of == "view" and longest > side:
        raise ValueError(
            f"views.scale_of=view cuts {name} views of up to {longest:.0f} px from patches of {side} px: "
            f"set sampler.patch_px to at least {math.ceil(longest)} (arXiv 2408.00738: 392 for views of 224)"
        )
    return (scale[0] * whole, scale[1] * whole), side if longest >= side else longest + 1


def chosen(keys: Tensor, purpose: str, p: Sequence[float]) -> Tensor:
    """True with probability p: bool [n]; p has one entry, or one for each run of n / len(p) rows."""
    threshold = augment.constant(tuple(p), keys.device).repeat_interleave(len(keys) // len(p))
    return draw.uniform(draw.fork(keys, purpose), 1)[:, 0] < threshold


def spread(keys: Tensor, purpose: str, low: float, high: float) -> Tensor:
    """Uniform in [low, high): float32 [n]."""
    return low + (high - low) * draw.uniform(draw.fork(keys, purpose), 1)[:, 0]


def crop_boxes(keys: Tensor, side: int, area: Sequence[float], ratio: Sequence[float]) -> Tensor:
    """Pixel boxes (top, left, height, width) in square patches: float64 [n, 4], by the law of torchvision's RandomResizedCrop.

    area: low and high, px, uniform between; ratio: width / height, log-uniform between.
    """
    u = draw.uniform(draw.fork(keys, "box"), 2 * _ATTEMPTS + 2).double()
    areas = area[0] + (area[1] - area[0]) * u[:, :_ATTEMPTS]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * u[:, _ATTEMPTS : 2 * _ATTEMPTS]).exp()
    width, height = (areas * aspect).sqrt().round(), (areas / aspect).sqrt().round()
    fits = (width <= side) & (height <= side) & (width > 0) & (height > 0)
    first = fits.float().argmax(1, keepdim=True)
    none = ~fits.any(1)
    height, width = (v.gather(1, first)[:, 0].masked_fill(none, side) for v in (height, width))
    top = (u[:, -2] * (side - height + 1)).floor()
    left = (u[:, -1] * (side - width + 1)).floor()
    return torch.stack([top, left, height, width], 1)


def symmetries(keys: Tensor, config: ViewsConfig) -> Tensor:
    """Flip rows, flip columns, then transpose: bool [n, 3]. Flips with their probabilities, and a uniform quarter turn."""
    rows, columns = chosen(keys, "vflip", [config.vflip]), chosen(keys, "hflip", [config.hflip])
    turns = draw.uniform(draw.fork(keys, "turn"), 1)[:, 0].mul(4).long() * int(config.quarter_turns)
    return torch.stack([rows ^ (turns >= 2), columns ^ ((turns == 1) | (turns == 2)), turns % 2 == 1], 1)


def hed_draws(keys: Tensor, sigma_od: float) -> Tensor:
    """Factor and shift of each stain: float32 [n, 2, 3]."""
    moved = sigma_od * (2 * draw.uniform(draw.fork(keys, "hed"), 6) - 1).unflatten(1, (2, 3))
    return moved + augment.constant(((1.0,), (0.0,)), keys.device)


def jitter_draws(keys: Tensor, config: ViewsConfig) -> Tensor:
    """Factors of brightness, contrast and saturation (never negative), and the turn of hue: float32 [n, 4]."""
    strength = augment.constant((config.brightness, config.contrast, config.saturation, config.hue), keys.device)
    centre = augment.constant((1.0, 1.0, 1.0, 0.0), keys.device)
    lowest = torch.where(centre > 0, (centre - strength).clamp(min=0), -strength)
    return lowest + (centre + strength - lowest) * draw.uniform(draw.fork(keys, "jitter"), 4)


def jitter_order(seed: int, step: int, view: str) -> list[int]:
    """The order of the colour jitter's operations: uniform; one for all slots of a view and step, so that no device waits."""
    return draw.permutation(draw.key(seed, f"jitter order/{view}", step), augment.OPERATIONS).tolist()
