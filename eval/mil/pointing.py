"""Does the model look where the finding is? Tiles against outlines that people drew."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.eval.scores.interval import Interval, IntervalConfig, patient_bootstrap


def area_auroc(values: np.ndarray, covered: np.ndarray) -> float:
    """P(a random point inside the outlines lies in a tile of higher value than a random point outside) + P(equal) / 2.

    values: [n] a tile; covered: [n], the share of each tile inside. NaN when no tile has a part inside, or none outside.
    """
    _, place = np.unique(values, return_inverse=True)
    inside, outside = np.bincount(place, covered), np.bincount(place, 1 - covered)
    if inside.sum() == 0 or outside.sum() == 0:
        return float("nan")
    below = outside.cumsum() - outside / 2
    return float((inside * below).sum() / (inside.sum() * outside.sum()))


@dataclass(frozen=True)
class Pointing:
    """hits: share of the slides whose most attended tile meets an outline. chance: mean share of tiles that do.
    gain: hits minus chance. unseen: slides without a tile on an outline; they count as misses."""

    hits: float
    chance: float
    gain: Interval
    unseen: int


def pointing(
    attention: Sequence[np.ndarray], covered: Sequence[np.ndarray], patients: Sequence[str], config: IntervalConfig
) -> Pointing | None:
    """Pointing accuracy over positive slides; attention and covered: [n_i] a slide. None without slides."""
    if not attention:
        return None
    hit = np.array([float(shares[weights.argmax()] > 0) for weights, shares in zip(attention, covered, strict=True)])
    chance = np.array([float((shares > 0).mean()) for shares in covered])
    gain = patient_bootstrap(lambda drawn: float((hit - chance)[drawn].mean()), patients, config)
    return Pointing(float(hit.mean()), float(chance.mean()), gain, int((chance == 0).sum()))
