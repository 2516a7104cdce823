"""Scores of an order of two classes, for many weightings of the units at once: the area under ROC, and average precision."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranking:
    """Units sorted by trial and score. order: int64 [n], places of the units. ties, trials: where each run of equal scores, and
    each trial among those runs, begins. positive: bool [n], in that order."""

    order: np.ndarray
    ties: np.ndarray
    trials: np.ndarray
    positive: np.ndarray

    @staticmethod
    def of(labels: np.ndarray, scores: np.ndarray, trials: Sequence[int] | np.ndarray | None = None) -> "Ranking":
        """labels: [n], 0 or 1; scores: [n]; trials: a number a unit: scores of two trials come from two models and are never
        compared. Raises ValueError for no unit, for other labels and for scores that are no numbers."""
        labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
        if len(labels) == 0 or labels.shape != scores.shape or not np.isin(labels, (0, 1)).all() or np.isnan(scores).any():
            raise ValueError(f"a ranking of {labels.shape} labels and {scores.shape} scores: expected 0 or 1 and a number a unit")
        trial = np.zeros(len(labels), np.int64) if trials is None else np.asarray(trials)
        order = np.lexsort((scores, trial))
        value, place = scores[order], trial[order]
        new_trial = np.r_[True, place[1:] != place[:-1]]
        ties = np.flatnonzero(new_trial | np.r_[True, value[1:] != value[:-1]])
        return Ranking(order, ties, np.flatnonzero(new_trial[ties]), labels[order] == 1)

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """Share of pairs of one trial, a positive and a negative, that stand in the right order, ties a half.

        weights: [b, n], how often each unit counts -> float64 [b], NaN where no trial has a pair.
        """
        positive, negative = self._runs(weights)
        below = self._before(negative) + negative / 2
        won = (positive * below).sum(-1)
        pairs = (self._totals(positive) * self._totals(negative)).sum(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return won / pairs

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Σ (R_k − R_{k−1}) P_k over the distinct scores, as scikit-learn's: inside each trial, meaned by its positives.

        weights: [b, n] -> float64 [b], NaN where no trial has both classes; trials of positives alone rank nothing and are left
        out. A score without use has the share of positives.
        """
        positive, negative = self._runs(weights)
        positive = np.where(self._spread(self._totals(negative)) > 0, positive, 0.0)
        hits, alarms = (self._spread(self._totals(part)) - self._before(part) for part in (positive, negative))
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.where(positive > 0, hits / (hits + alarms), 0.0)
            return (positive * precision).sum(-1) / positive.sum(-1)

    def _runs(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weight of positives and of negatives by run of equal scores: [b, runs] each."""
        sorted_ = np.asarray(weights, np.float64)[..., self.order]
        positive = np.add.reduceat(np.where(self.positive, sorted_, 0.0), self.ties, axis=-1)
        return positive, np.add.reduceat(np.where(self.positive, 0.0, sorted_), self.ties, axis=-1)

    def _totals(self, runs: np.ndarray) -> np.ndarray:
        return np.add.reduceat(runs, self.trials, axis=-1)

    def _spread(self, totals: np.ndarray) -> np.ndarray:
        """A number a trial to its runs."""
        return np.repeat(totals, np.diff(np.r_[self.trials, len(self.ties)]), axis=-1)

    def _before(self, runs: np.ndarray) -> np.ndarray:
        """What stands in earlier runs of the same trial."""
        before = runs.cumsum(-1) - runs
        return before - self._spread(before[..., self.trials])


def roc_points(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The ROC curve as drawn: float64 [k, 2], false-positive and true-positive rate from (0, 0) to (1, 1).

    Raises ValueError when a class is missing.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    positives = int((labels == 1).sum())
    if not 0 < positives < len(labels):
        raise ValueError(f"{positives} positives among {len(labels)} units: a ROC curve needs both classes")
    order = np.argsort(-scores, kind="stable")
    last = np.r_[np.flatnonzero(np.diff(scores[order])), len(order) - 1]  # equal scores are one step
    hits = np.cumsum(labels[order] == 1)[last]
    alarms = 1 + last - hits
    return np.concatenate([[[0.0, 0.0]], np.stack([alarms / (len(labels) - positives), hits / positives], 1)])
