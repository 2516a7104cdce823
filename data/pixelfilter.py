"""The pixel filter: does a patch look stained enough? Off by default: it refuses real tumour, lymphoid and fat patches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PixelFilterConfig:
    """kind: none, or hsv: at least `fraction` of the pixels lie within the bounds.

    hue, saturation, value: lowest and highest, in OpenCV's 8-bit units (hue 0-180, the others 0-255).
    stride: look at every stride-th pixel of every stride-th row (1: at all).
    """

    kind: str
    hue: list[int]
    saturation: list[int]
    value: list[int]
    fraction: float
    stride: int


def hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue [0, 180), saturation and value [0, 255] in OpenCV's 8-bit units, rounded, of uint8 [..., 3]; each int16 [...]."""
    red, green, blue = (rgb[..., i].astype(np.int16) for i in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    safe = np.maximum(chroma, 1).astype(np.float32)
    from_green = np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sector = np.where(value == red, (green - blue) / safe, from_green)
    hue = np.rint(np.where(chroma == 0, 0, sector) * 30).astype(np.int16)
    saturation = np.rint(chroma / np.maximum(value, 1).astype(np.float32) * 255).astype(np.int16)
    return np.where(hue < 0, hue + 180, hue), saturation, value


def passes(patches: Sequence[np.ndarray], config: PixelFilterConfig) -> np.ndarray:
    """bool [B]: which of B patches uint8 [S, S, 3] pass. Raises ValueError on an unknown kind."""
    if config.kind not in ("none", "hsv"):
        raise ValueError(f"sampler.pixel_filter.kind is {config.kind!r}: expected none or hsv")
    if config.kind == "none" or not patches:
        return np.ones(len(patches), bool)
    channels = hsv(np.stack([patch[:: config.stride, :: config.stride] for patch in patches]))
    within = np.ones(channels[0].shape, bool)
    for channel, (low, high) in zip(channels, (config.hue, config.saturation, config.value), strict=True):
        within &= (low <= channel) & (channel <= high)
    return within.mean(axis=(1, 2)) >= config.fraction
