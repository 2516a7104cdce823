"""Nearest prototype: every class is the mean of its training vectors (SimpleShot, arXiv 1911.04623)."""

import numpy as np
from scipy.special import log_softmax

from histoscale.eval.logistic import Standard


def prototype_log_probabilities(
    train: np.ndarray, labels: np.ndarray, classes: int, queries: np.ndarray, temperature: float
) -> np.ndarray:
    """Softmax of cosine / temperature to each class's mean, of features standardised by train and brought to length 1.

    train: [n, D], queries: [m, D], as the encoder made them; -> float64 [m, classes], −inf for a class without a training row.
    """
    standard = Standard.of(train)
    return cosine_to_means(_unit(standard(train)), labels, classes, _unit(standard(queries)), temperature)


def cosine_to_means(
    train: np.ndarray, labels: np.ndarray, classes: int, queries: np.ndarray, temperature: float
) -> np.ndarray:
    """The same, of vectors of length 1."""
    means = np.zeros((classes, train.shape[1]))
    np.add.at(means, labels, train)
    logits = queries @ _unit(means).T / temperature
    logits[:, np.bincount(labels, minlength=classes) == 0] = -np.inf
    return log_softmax(logits, axis=1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
