"""Vahadane's stains: a sparse non-negative factorisation of optical density (IEEE Trans Med Imaging 2016, 35:1962).

minimise over W, H >= 0, |W_j| <= 1:   1/2 |V - H W|^2 + sparsity * sum(H),   V [n, 3], H [n, 2], W [2, 3]
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from histoscale.data.normalise.density import LightConfig, Stains, Target, check_two, density, ordered, recolour, stained, strong
from histoscale.data.normalise.macenko import extremes
from histoscale.data.normalise.sample import SampleConfig


@dataclass(frozen=True)
class VahadaneConfig:
    """pixels: so many stained ones are factorised. sparsity: weight of the concentrations' sum. rounds: alternations at most;
    tolerance: relative gain that ends them. start_percentile: of the angles in Macenko's sense, where it starts.
    strength_percentile: of a stain's concentrations, its strength. least_angle_deg: between the stains where it starts."""

    kind: Literal["vahadane"]
    sample: SampleConfig
    light: LightConfig
    pixels: int
    sparsity: float
    rounds: int
    tolerance: float
    start_percentile: float
    strength_percentile: float
    least_angle_deg: float
    target: Target


def fit(pixels: np.ndarray, config: VahadaneConfig) -> Stains:
    """uint8 [n, 3] of one slide -> its stains, from stained pixels, and their strengths over all. Raises NotFitted.

    Strengths come from concentrations without the penalty, as `apply` takes them: shrunk ones would bleach weak stain.
    """
    found = stained(pixels, config.light)
    found = found[:: -(-len(found) // config.pixels)]
    start = extremes(found, config.start_percentile)
    check_two(start, config.least_angle_deg)
    stains, _ = factorise(found, start, config.sparsity, config.rounds, config.tolerance)
    stains = ordered(stains / np.maximum(np.linalg.norm(stains, axis=1, keepdims=True), 1e-12))
    amounts = concentrations(density(pixels, config.light.level), stains, 0.0)
    return strong(stains, np.percentile(amounts, config.strength_percentile, axis=0))


def factorise(
    found: np.ndarray, start: np.ndarray, sparsity: float, rounds: int, tolerance: float
) -> tuple[np.ndarray, list[float]]:
    """Optical densities [n, 3] and unit rows [2, 3] to start from -> W [2, 3] and the objective after each round: it never rises.

    Both half-steps are exact: concentrations in closed form; of the dictionary one row after the other (Mairal 2010, JMLR 11:19),
    projected on the non-negative part of the unit ball. Nothing is drawn: the same pixels give the same bits.
    """
    stains = np.maximum(start, 0)
    stains = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    trace: list[float] = []
    for _ in range(rounds):
        amounts = concentrations(found, stains, sparsity)
        trace.append(objective(found, stains, amounts, sparsity))
        if len(trace) > 1 and trace[-2] - trace[-1] <= tolerance * trace[-1]:
            break
        gram, held = amounts.T @ amounts, amounts.T @ found
        for j in range(2):
            if gram[j, j] > 0:
                row = np.maximum(stains[j] + (held[j] - gram[j] @ stains) / gram[j, j], 0)
                stains[j] = row / max(1.0, float(np.linalg.norm(row)))
    return stains, trace


def concentrations(found: np.ndarray, stains: np.ndarray, sparsity: float) -> np.ndarray:
    """The best non-negative amounts [n, 2] of two stains (rows of any length above 0) for optical densities [n, 3].

    Closed form: the free solution where both are positive, else one stain alone.
    """
    gram = stains @ stains.T
    pull = found @ stains.T - sparsity
    amounts = pull @ np.linalg.pinv(gram)
    shared = gram[0, 1] / np.diag(gram)
    return np.maximum(amounts + np.minimum(amounts[:, ::-1], 0) * shared, 0)


def objective(found: np.ndarray, stains: np.ndarray, amounts: np.ndarray, sparsity: float) -> float:
    """The mean over pixels of what is minimised."""
    return float((0.5 * ((found - amounts @ stains) ** 2).sum(axis=1) + sparsity * amounts.sum(axis=1)).mean())


def apply(pixels: Tensor, fitted: Stains, config: VahadaneConfig) -> Tensor:
    """uint8 [..., 3] -> uint8 with the target's stains."""
    return recolour(pixels, fitted, config.target, config.light.level, nonnegative=True)
