"""Scores as numbers made of sums over rows, so that one sparse product scores thousands of bootstrap replicates at once.

Every function takes the decisions of one probe and gives a `Summed`: called with weights of the patients it gives the score of
each replicate. With all weights 1 it is the score itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from histoscale.eval.scores.interval import Weighted

ECE_BINS = 15


@dataclass(frozen=True)
class Summed:
    """parts: [S, P], what each patient adds to each of S sums. value: sums [S, d] -> [d]."""

    parts: csr_array
    value: Callable[[np.ndarray], np.ndarray]

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.value(self.parts @ weights.T)


def patient_codes(patients: np.ndarray) -> np.ndarray:
    """int64 [n]: the place of each row's patient in the order of their ids, as weights have them."""
    return np.unique(patients, return_inverse=True)[1]


def mean_of(statistics: Sequence[Weighted]) -> Weighted:
    """The mean over equal probes."""
    return lambda weights: np.mean([statistic(weights) for statistic in statistics], axis=0)


def difference_of(first: Weighted, second: Weighted) -> Weighted:
    """first − second inside every replicate."""
    return lambda weights: first(weights) - second(weights)


# Of decisions. labels, predicted: int64 [n]. codes: int64 [n], from patient_codes.


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray, codes: np.ndarray, classes: int) -> Summed:
    """Mean recall over the classes that are present."""

    def value(counts: np.ndarray) -> np.ndarray:
        total = counts.sum(axis=1)
        return np.nanmean(np.where(total > 0, np.einsum("kkd->kd", counts) / total, np.nan), axis=0)

    return _of_confusion(labels, predicted, codes, classes, value)


def accuracy(labels: np.ndarray, predicted: np.ndarray, codes: np.ndarray, classes: int) -> Summed:
    return _of_confusion(
        labels, predicted, codes, classes, lambda counts: np.einsum("kkd->d", counts) / counts.sum(axis=(0, 1))
    )


def macro_f1(labels: np.ndarray, predicted: np.ndarray, codes: np.ndarray, classes: int) -> Summed:
    """Mean F1 over the classes that are present."""

    def value(counts: np.ndarray) -> np.ndarray:
        total = counts.sum(axis=1)
        return np.nanmean(np.where(total > 0, _f1(counts), np.nan), axis=0)

    return _of_confusion(labels, predicted, codes, classes, value)


def f1(labels: np.ndarray, predicted: np.ndarray, codes: np.ndarray, classes: int, positive: int) -> Summed:
    """F1 of one class."""
    return _of_confusion(labels, predicted, codes, classes, lambda counts: _f1(counts)[positive])


def quadratic_kappa(labels: np.ndarray, predicted: np.ndarray, codes: np.ndarray, classes: int) -> Summed:
    """Cohen's kappa with weights (i − j)² / (K − 1)², over the full set of classes in their order."""
    place = np.arange(classes)
    penalty = ((place[:, None] - place) ** 2 / (classes - 1) ** 2)[..., None]

    def value(counts: np.ndarray) -> np.ndarray:
        expected = counts.sum(axis=1)[:, None] * counts.sum(axis=0)[None] / counts.sum(axis=(0, 1))
        return 1 - (penalty * counts).sum(axis=(0, 1)) / (penalty * expected).sum(axis=(0, 1))

    return _of_confusion(labels, predicted, codes, classes, value)


def _f1(counts: np.ndarray) -> np.ndarray:
    """[K, K, d] -> [K, d]."""
    return 2 * np.einsum("kkd->kd", counts) / (counts.sum(axis=1) + counts.sum(axis=0))


def _of_confusion(
    labels: np.ndarray, predicted: np.ndarray, codes: np.ndarray, classes: int, value: Callable[[np.ndarray], np.ndarray]
) -> Summed:
    """value: of counts [K true, K predicted, d]."""
    cells = labels * classes + predicted
    parts = _sums(cells, codes, np.ones(len(labels)), classes * classes)
    return Summed(parts, lambda sums: value(sums.reshape(classes, classes, -1)))


# Of probabilities. logs: float64 [n, K].


def log_loss(labels: np.ndarray, logs: np.ndarray, codes: np.ndarray) -> Summed:
    """Mean −log p of the true class."""
    n, one = len(labels), np.ones(len(labels))
    losses = -logs[np.arange(n), labels]
    parts = _sums(np.repeat([0, 1], n), np.tile(codes, 2), np.concatenate([losses, one]), 2)
    return Summed(parts, lambda sums: sums[0] / sums[1])


def brier(truth: np.ndarray, probability: np.ndarray, codes: np.ndarray) -> Summed:
    """Mean (p − y)² of a binary set. truth: bool [n]; probability: float64 [n], of the positive class."""
    n, one = len(truth), np.ones(len(truth))
    parts = _sums(np.repeat([0, 1], n), np.tile(codes, 2), np.concatenate([(probability - truth) ** 2, one]), 2)
    return Summed(parts, lambda sums: sums[0] / sums[1])


def calibration_error(truth: np.ndarray, probability: np.ndarray, codes: np.ndarray) -> Summed:
    """Expected calibration error of a binary set: 15 bins of equal width, right-closed, on the positive class's probability."""
    bins = np.clip(np.ceil(probability * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    values = np.concatenate([probability - truth, np.ones(len(truth))])
    parts = _sums(np.concatenate([bins, bins + ECE_BINS]), np.tile(codes, 2), values, 2 * ECE_BINS)
    return Summed(parts, lambda sums: np.abs(sums[:ECE_BINS]).sum(axis=0) / sums[ECE_BINS:].sum(axis=0))


def auroc(truth: np.ndarray, score: np.ndarray, codes: np.ndarray) -> Summed:
    """P(score of a positive > score of a negative) + P(equal) / 2; NaN without both classes. truth: bool [n]; score: [n]."""
    levels, place = np.unique(score, return_inverse=True)
    count = len(levels)
    parts = _sums(place + count * truth.astype(np.int64), codes, np.ones(len(score)), 2 * count)

    def value(sums: np.ndarray) -> np.ndarray:
        negative, positive = sums[:count], sums[count:]
        below = np.cumsum(negative, axis=0) - negative / 2
        return (positive * below).sum(axis=0) / (positive.sum(axis=0) * negative.sum(axis=0))

    return Summed(parts, value)


def auroc_one_vs_rest(labels: np.ndarray, logs: np.ndarray, codes: np.ndarray) -> Weighted:
    """Mean over the classes that are present; NaN when fewer than two are. logs: [n, K], any scores."""
    each = [auroc(labels == c, logs[:, c], codes) for c in range(logs.shape[1])]

    def value(weights: np.ndarray) -> np.ndarray:
        areas = np.array([area(weights) for area in each])
        known = ~np.isnan(areas)
        return np.where(known.sum(axis=0) > 0, np.where(known, areas, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)

    return value


def _sums(rows: np.ndarray, codes: np.ndarray, values: np.ndarray, count: int) -> csr_array:
    """[count, P]: the sum of `values` by row and patient."""
    return csr_array((values, (rows, codes)), shape=(count, int(codes.max()) + 1))
