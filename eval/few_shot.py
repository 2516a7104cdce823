"""Probes that learn from a few images of each class, of different patients, drawn many times."""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from histoscale.data.keys import key
from histoscale.eval.logistic import Rows, Standard, fit
from histoscale.eval.prototype import prototype_log_probabilities

TOLERANCE, MAX_ITERATIONS = 1e-4, 1000  # of a fit on a few rows, whose answers are then far nearer than draws are apart


@dataclass(frozen=True)
class FewShotConfig:
    """shots: images of each class, a probe for each number; [] for none. draws: how often they are drawn.

    penalty: of the linear probe on them, where nothing can be chosen: weight of ½‖W‖² beside the mean log-loss.
    temperature: of the prototypes. seed: of the draws, the same for every encoder.
    """

    shots: list[int]
    draws: int
    penalty: float
    temperature: float
    seed: int


@dataclass(frozen=True)
class Shots:
    """rows: int64 [shots · classes], into the rows that were drawn from. repeated: patients that gave a class a second image."""

    rows: np.ndarray
    repeated: int


def draw_shots(labels: np.ndarray, patients: np.ndarray, classes: int, shots: int, seed: int, run: int) -> Shots:
    """`shots` rows of each class, of different patients as long as there are any, by key (seed, run).

    labels: int64 [n]; patients: int64 [n], their numbers. Draws of more shots hold those of fewer.
    Raises ValueError for a class with fewer rows.
    """
    chosen, repeated = [], 0
    for c in range(classes):
        rows = np.flatnonzero(labels == c)
        if len(rows) < shots:
            raise ValueError(f"class {c} has {len(rows)} training images: take {shots} out of few_shot.shots")
        order = np.random.default_rng(key(seed, "shots", run, c)).permutation(rows)
        turn = _turns(patients[order])  # 0 for the first row of each patient, 1 for its second, …
        taken = order[np.argsort(turn, kind="stable")[:shots]]
        repeated += shots - len(np.unique(patients[taken]))
        chosen.append(taken)
    return Shots(np.concatenate(chosen), repeated)


def few_shot_log_probabilities(
    features: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    classes: int,
    queries: np.ndarray,
    shots: int,
    config: FewShotConfig,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Prototypes and linear probes on every draw: two of float64 [draws, m, classes], and a note for the reader.

    features: [n, D], labels, patients: [n], of train; queries: [m, D].
    """
    near, linear, repeated = [], [], 0
    _, numbers = np.unique(patients, return_inverse=True)
    for shot in (draw_shots(labels, numbers, classes, shots, config.seed, run) for run in range(config.draws)):
        x, y = features[shot.rows], labels[shot.rows]
        near.append(prototype_log_probabilities(x, y, classes, queries, config.temperature))
        linear.append(_linear(x, y, classes, queries, config.penalty))
        repeated += shot.repeated
    share = f"{repeated / config.draws:.3g} of {shots * classes}"
    note = f"{share} images a draw come from a patient that was drawn before" if repeated else ""
    return np.stack(near), np.stack(linear), note


def _linear(x: np.ndarray, labels: np.ndarray, classes: int, queries: np.ndarray, penalty: float) -> np.ndarray:
    standard = Standard.of(x)
    rows = Rows.of(x, standard, "cpu")
    found = fit(rows, labels, classes, penalty, np.ones((1, len(x)), bool), TOLERANCE, MAX_ITERATIONS, None)
    weights, bias = found.weights(rows)
    return log_softmax(standard(queries) @ weights[0] + bias[0], axis=1)


def _turns(codes: np.ndarray) -> np.ndarray:
    """Of each element, how many equal ones stand before it."""
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    turns = np.empty(len(codes), np.int64)
    turns[order] = np.arange(len(codes)) - starts
    return turns
