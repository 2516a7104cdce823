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
