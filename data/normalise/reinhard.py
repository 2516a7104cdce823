"""Reinhard's colour transfer: mean and deviation of each channel of CIELAB (IEEE Comput Graph Appl 2001, 21(5):34)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from histoscale.data.normalise.density import LightConfig, NotFitted, by_planes, is_stained
from histoscale.data.normalise.sample import SampleConfig

_GREY = np.arange(256) / 255
_LINEAR = torch.from_numpy(np.where(_GREY > 0.04045, ((_GREY + 0.055) / 1.055) ** 2.4, _GREY / 12.92).astype(np.float32))
# sRGB to XYZ and its white under illuminant D65 (IEC 61966-2-1)
_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = np.array([0.95047, 1.0, 1.08883])
_MIX = torch.from_numpy((_XYZ / _WHITE[:, None]).astype(np.float32))
_UNMIX = torch.from_numpy((np.linalg.inv(_XYZ) * _WHITE).astype(np.float32))
_LAB = torch.tensor([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])
_SHIFT = torch.tensor([[-16.0], [0.0], [0.0]])
_KNEE, _SLOPE = (6 / 29) ** 3, (29 / 6) ** 2 / 3  # below, CIELAB's cube root goes on as its tangent
_DARK = 0.0031308  # and sRGB's power as a line
_LEAST_SD = 0.5  # of lightness, 0 to 100: below is one grey level, and its noise would be stretched to an image


@dataclass(frozen=True)
class Colours:
    """mean, deviation: of L*, a*, b*."""

    mean: list[float]
    deviation: list[float]


@dataclass(frozen=True)
class ReinhardConfig:
    kind: Literal["reinhard"]
    sample: SampleConfig
    light: LightConfig
    target: Colours


def fit(pixels: np.ndarray, config: ReinhardConfig) -> Colours:
    """uint8 [n, 3] of one slide -> the colours of its stained pixels, those not clear in every channel. Raises NotFitted.

    Glass would move the mean. It is not fitted, but moved with the rest: where that matters, take a method that knows stains.
    """
    chosen = pixels[is_stained(pixels, config.light, 1)]
    lab = lab_of(torch.from_numpy(np.ascontiguousarray(chosen.T)).float()).double().numpy()
    if lab[0].std() < _LEAST_SD:
        raise NotFitted(f"lightness varies by {lab[0].std():.2f} of 100 over the stained pixels: there is no structure to scale")
    return Colours(lab.mean(axis=1).tolist(), lab.std(axis=1).tolist())


def lab_of(planes: Tensor) -> Tensor:
    """Grey levels float32 [3, n] -> L*, a*, b* [3, n]."""
    linear = _LINEAR.to(planes.device)[planes.long()]
    xyz = _MIX.to(planes.device) @ linear
    root = xyz.clamp(min=_KNEE).pow_(1 / 3) + (xyz - _KNEE).clamp_(max=0).mul_(_SLOPE)
    return _LAB.to(planes.device) @ root + _SHIFT.to(planes.device)


def rgb_of(lab: Tensor) -> Tensor:
    """L*, a*, b* [3, n] -> grey levels float32 [3, n], beyond 0 to 255 where a screen cannot show the colour."""
    y = (lab[0] + 16) / 116
    root = torch.stack([y + lab[1] / 500, y, y - lab[2] / 200])
    xyz = root.clamp(min=6 / 29).pow_(3).add_((root - 6 / 29).clamp_(max=0), alpha=1 / _SLOPE)
    linear = _UNMIX.to(lab.device) @ xyz
    dark = (linear - _DARK).clamp_(max=0)
    return linear.clamp_(min=_DARK).pow_(1 / 2.4).mul_(1.055).sub_(0.055).add_(dark, alpha=12.92).mul_(255)


def apply(pixels: Tensor, fitted: Colours, config: ReinhardConfig) -> Tensor:
    """uint8 [..., 3] -> uint8 with the target's mean and deviation."""
    scale = [t / f if f > 0 else 1.0 for t, f in zip(config.target.deviation, fitted.deviation, strict=True)]
    gain, mean, goal = (torch.tensor(v, device=pixels.device)[:, None] for v in (scale, fitted.mean, config.target.mean))
    shift = goal - gain * mean
    return by_planes(pixels, lambda planes: rgb_of(lab_of(planes) * gain + shift))
