"""Do probabilities mean what they say? Bins of predicted probability against observed rate, and their weighted gap."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bins:
    """Of the bins that hold a unit: count int64 [b]; predicted, observed: float64 [b], mean probability and positive rate."""

    count: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Σ n_b / n · |observed − predicted|."""
        return float((self.count / self.count.sum() * np.abs(self.observed - self.predicted)).sum())


def reliability(probabilities: np.ndarray, positive: np.ndarray, bins: int) -> Bins:
    """Bins of equal width, closed at the right, of the probability of the positive class (torchmetrics' convention).

    probabilities: [n] in [0, 1]; positive: bool [n]. Raises ValueError for no unit or a probability outside [0, 1].
    """
    if len(probabilities) == 0 or not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(f"{len(probabilities)} probabilities, not all inside 0 to 1: calibration needs some that are")
    place = np.clip(np.ceil(probabilities * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    held = count > 0
    predicted = np.bincount(place, weights=probabilities, minlength=bins)[held] / count[held]
    observed = np.bincount(place, weights=positive.astype(np.float64), minlength=bins)[held] / count[held]
    return Bins(count[held], predicted, observed)


def brier(probabilities: np.ndarray, positive: np.ndarray) -> float:
    """Mean squared distance of the probability of the positive class to what happened (0 or 1)."""
    return float(np.mean((probabilities - positive) ** 2))
