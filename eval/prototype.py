"""Nearest prototype: every class is the mean of its training vectors, after centring and scaling to length 1 (arXiv 1911.04623)."""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax


@dataclass(frozen=True)
class Centred:
    """Rows about a common origin, once for all draws: x float32 [n, D]; squares float32 [n], of their lengths."""

    x: np.ndarray
    squares: np.ndarray

    @staticmethod
    def of(features: np.ndarray, origin: np.ndarray) -> "Centred":
        x = (features - origin).astype(np.float32)
        return Centred(x, np.einsum("nd,nd->n", x, x))


def prototype_log_probabilities(
    train: np.ndarray, labels: np.ndarray, classes: int, queries: np.ndarray, temperature: float
) -> np.ndarray:
    """Softmax of cosine / temperature to the prototype of each class, seen from the mean of train.

    train: [n, D], queries: [m, D], as the encoder made them; -> float64 [m, classes], −inf for a class without a training row.
    """
    origin = train.mean(axis=0, dtype=np.float64)
    return nearest_prototype(Centred.of(train, origin), labels, classes, Centred.of(queries, origin), temperature)


def nearest_prototype(
    train: Centred, labels: np.ndarray, classes: int, queries: Centred, temperature: float
) -> np.ndarray:
    """The same, of rows about one origin, whatever it is."""
    middle = train.x.mean(axis=0)
    own = train.x - middle
    own = own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12)
    means = np.zeros((classes, own.shape[1]), np.float32)
    np.add.at(means, labels, own)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    dots = queries.x @ np.concatenate([means, middle[None]]).T  # one product for both
    lengths = np.sqrt(np.maximum(queries.squares - 2 * dots[:, -1] + middle @ middle, 1e-12))
    logits = ((dots[:, :-1] - means @ middle) / lengths[:, None]).astype(np.float64) / temperature
    logits[:, np.bincount(labels, minlength=classes) == 0] = -np.inf
    return log_softmax(logits, axis=1)
