"""Scores of decisions among classes, each defined once."""

import numpy as np

from histoscale.eval.scores.auroc import auroc


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64 [classes, classes]: row = true class, column = predicted class."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def recalls(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Recall of every class: float [classes], NaN for a class without a row."""
    counts = confusion(labels, predicted, classes)
    with np.errstate(invalid="ignore"):
        return np.diag(counts) / counts.sum(axis=1)


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """Mean recall over the classes that are present; a class that is only predicted does not enter (as scikit-learn's)."""
    right = np.bincount(labels[labels == predicted], minlength=classes)
    total = np.bincount(labels, minlength=classes)
    present = total > 0
    return float((right[present] / total[present]).mean()) if present.any() else float("nan")


def macro_f1(labels: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """Mean F1 over the classes that are present; a wrongly predicted absent class costs the recall of the true one."""
    counts = confusion(labels, predicted, classes)
    total, called, right = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    present = total > 0
    return float((2 * right[present] / (total + called)[present]).mean()) if present.any() else float("nan")


def auroc_one_vs_rest(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the present classes of class against rest; scores: [n, classes]. NaN when fewer than two classes are present."""
    present = np.unique(labels)
    if len(present) < 2:
        return float("nan")
    return float(np.mean([auroc(labels == c, scores[:, c]) for c in present]))


def log_loss(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean −log p of the true class; log_probabilities: [n, classes]."""
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


# The same of counts that are summed already, for many draws and runs at once: counts [..., K, K] -> [...].


def balanced_accuracy_of(counts: np.ndarray) -> np.ndarray:
    """Mean recall over the classes with a row."""
    right, total = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1)
    return _mean_where(right / np.maximum(total, 1), total > 0)


def macro_f1_of(counts: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes with a row."""
    right, total, called = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    return _mean_where(2 * right / np.maximum(total + called, 1), total > 0)


def accuracy_of(counts: np.ndarray) -> np.ndarray:
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum((-2, -1))


def quadratic_kappa_of(counts: np.ndarray) -> np.ndarray:
    """Cohen's kappa with weights (i - j)^2 over all K classes, observed or not; NaN where both sides name one class."""
    classes = counts.shape[-1]
    weights = (np.arange(classes)[:, None] - np.arange(classes)) ** 2
    by_chance = counts.sum(-1)[..., :, None] * counts.sum(-2)[..., None, :] / counts.sum((-2, -1))[..., None, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - (weights * counts).sum((-2, -1)) / (weights * by_chance).sum((-2, -1))


def calibration_bins(positive: np.ndarray, hit: np.ndarray, bins: int) -> np.ndarray:
    """What `calibration_error_of` needs of every row: [n, 3 * bins]: p, positives and rows by equal right-closed bins of p.

    positive: [n], probability of the positive class; hit: bool [n], whether the row is of it.
    """
    place = np.clip(np.ceil(positive * bins).astype(np.int64) - 1, 0, bins - 1)
    found = np.zeros((len(positive), 3, bins))
    rows = np.arange(len(positive))
    found[rows, 0, place], found[rows, 1, place], found[rows, 2, place] = positive, hit, 1
    return found.reshape(len(positive), -1)


def calibration_error_of(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error on the positive class: sums [..., 3 * bins] -> [...]."""
    parts = sums.reshape(*sums.shape[:-1], 3, -1)
    return np.abs(parts[..., 0, :] - parts[..., 1, :]).sum(-1) / parts[..., 2, :].sum(-1)


def _mean_where(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (values * present).sum(-1) / present.sum(-1)
