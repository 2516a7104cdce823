"""Optical density of stained tissue, and colours moved from one pair of stains to another."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_PART = 32768  # pixels


class NotFitted(ValueError):
    """The pixels do not determine the stains; the message says why."""


@dataclass(frozen=True)
class LightConfig:
    """level: grey level of clear glass. floor: optical density below which a channel is clear. pixels: with fewer stained ones
    nothing is fitted."""

    level: float
    floor: float
    pixels: int


@dataclass(frozen=True)
class Target:
    """Colours to move to. stains: two rows, the optical density of R, G, B; strengths: of each, as a slide's are measured."""

    stains: list[list[float]]
    strengths: list[float]


@dataclass(frozen=True, eq=False)
class Stains:
    """Of a slide: unit rows [2, 3], haematoxylin first (the one that takes more red), and strengths [2], a high percentile."""

    stains: np.ndarray
    strengths: np.ndarray


def density(pixels: np.ndarray, level: float) -> np.ndarray:
    """uint8 [..., 3] -> float64: -ln((I + 1) / level), slightly below 0 where brighter than glass."""
    return -np.log((np.arange(256) + 1.0) / level)[pixels]


def is_stained(pixels: np.ndarray, light: LightConfig, channels: int) -> np.ndarray:
    """bool [n]: pixels uint8 [n, 3] with at least the floor's density in so many channels; NotFitted when they are too few."""
    darkest_glass = light.level * np.exp(-light.floor) - 1
    found = (pixels <= darkest_glass).sum(axis=1) >= channels
    if found.sum() < light.pixels:
        raise NotFitted(f"{found.sum()} of {len(pixels)} pixels are stained (optical density of at least {light.floor:g}): "
                        f"a fit takes {light.pixels}")  # fmt: skip
    return found


def stained(pixels: np.ndarray, light: LightConfig) -> np.ndarray:
    """Optical density [m, 3] of the pixels that are dark in every channel, as Macenko takes them. Raises NotFitted."""
    return density(pixels[is_stained(pixels, light, 3)], light.level)


def ordered(stains: np.ndarray) -> np.ndarray:
    """Haematoxylin first: of two stains the one that takes more red light."""
    return stains if stains[0, 0] >= stains[1, 0] else stains[::-1]


def check_two(stains: np.ndarray, least_angle_deg: float) -> None:
    """Raises NotFitted where two unit rows [2, 3] are one stain and its noise."""
    angle = np.degrees(np.arccos(np.clip(stains[0] @ stains[1], -1, 1)))
    if not angle >= least_angle_deg:
        raise NotFitted(f"the stains are {angle:.1f} degrees apart, less than {least_angle_deg:g}: there is only one")


def strong(stains: np.ndarray, strengths: np.ndarray) -> Stains:
    """Raises NotFitted where a stain darkens nothing."""
    if not (strengths > 0).all():
        raise NotFitted(f"a stain has no strength ({', '.join(f'{s:.3g}' for s in strengths)}): there is only one")
    return Stains(stains, strengths)


def recolour(pixels: Tensor, fitted: Stains, target: Target, level: float, nonnegative: bool) -> Tensor:
    """uint8 [..., 3] with the slide's stains -> uint8 with the target's: concentrations by least squares, scaled, mixed anew.

    nonnegative: of a stain that would be less than nothing there is none, and the other is fitted alone.
    """
    scale = np.asarray(target.strengths) / fitted.strengths
    separate, mix = np.linalg.pinv(fitted.stains).T, (scale[:, None] * np.asarray(target.stains)).T  # [2, 3], [3, 2]
    cosine = float(fitted.stains[0] @ fitted.stains[1])
    glass = np.log(level)
    first = separate if nonnegative else mix @ separate
    # density is glass - ln(I + 1), light is exp(glass - density): the constants ride on the products
    constants = (-first, first.sum(axis=1, keepdims=True) * glass, mix)
    first, bias, mix = (torch.from_numpy(m.astype(np.float32)).to(pixels.device) for m in constants)

    def change(planes: Tensor) -> Tensor:
        logs = planes.add_(1).log_()
        mixed = torch.addmm(bias, first, logs)
        if nonnegative:
            spare = mixed.clamp(max=0).mul_(cosine).flip(0)  # what a stain alone explains of the other's deficit
            mixed = mix @ mixed.add_(spare).clamp_(min=0)
        return mixed.neg_().add_(glass).exp_().sub_(1)

    return by_planes(pixels, change)


def by_planes(pixels: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """uint8 [..., 3] -> uint8 by a function of float32 planes [3, n], grey levels; in parts that stay in a processor's cache."""
    flat = pixels.reshape(-1, 3)
    made = torch.empty_like(flat)
    part = _PART if pixels.device.type == "cpu" else max(1, len(flat))
    for start in range(0, len(flat), part):
        planes = flat[start : start + part].t().contiguous().float()
        made[start : start + part] = change(planes).round_().clamp_(0, 255).to(torch.uint8).t()
    return made.view(pixels.shape)
