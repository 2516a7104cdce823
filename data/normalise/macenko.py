"""Macenko's stains: the extreme directions of optical density in the plane that holds most of it (ISBI 2009, pp. 1107-1110)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from histoscale.data.normalise.density import LightConfig, Stains, Target, check_two, density, ordered, recolour, stained, strong
from histoscale.data.normalise.sample import SampleConfig


@dataclass(frozen=True)
class MacenkoConfig:
    """percentile: of the angles on each side that is cut off. strength_percentile: of a stain's concentrations, its strength."""

    kind: Literal["macenko"]
    sample: SampleConfig
    light: LightConfig
    percentile: float
    strength_percentile: float
    least_angle_deg: float
    target: Target


def fit(pixels: np.ndarray, config: MacenkoConfig) -> Stains:
    """uint8 [n, 3] of one slide -> its stains, from the stained pixels, and their strengths over all. Raises NotFitted."""
    stains = extremes(stained(pixels, config.light), config.percentile)
    check_two(stains, config.least_angle_deg)
    amounts = density(pixels, config.light.level) @ np.linalg.pinv(stains)
    return strong(stains, np.percentile(amounts, config.strength_percentile, axis=0))


def extremes(found: np.ndarray, percentile: float) -> np.ndarray:
    """Optical densities [n, 3] -> two unit rows: in their main plane, the directions at the low and high percentile of angle."""
    _, vectors = np.linalg.eigh(np.cov(found.T))
    plane = vectors[:, :0:-1]  # the two largest
    plane = plane * np.where(plane.sum(axis=0) < 0, -1, 1)  # the first points into the tissue, so that no angle wraps
    angles = np.arctan2(*(found @ plane).T[::-1])
    ends = np.percentile(angles, [percentile, 100 - percentile])
    return ordered(np.stack([np.cos(ends), np.sin(ends)], axis=1) @ plane.T)


def apply(pixels: Tensor, fitted: Stains, config: MacenkoConfig) -> Tensor:
    """uint8 [..., 3] -> uint8 with the target's stains."""
    return recolour(pixels, fitted, config.target, config.light.level, nonnegative=False)
