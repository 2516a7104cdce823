"""Probes that learn from a few images of each class, of different patients, drawn many times."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from histoscale.data.keys import key
from histoscale.eval.logistic import Rows, Standard, fit
from histoscale.eval.prototype import Centred, nearest_prototype

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
    linear: bool,
    config: FewShotConfig,
) -> tuple[np.ndarray, str]:
    """Prototypes, or linear probes, on every draw: float64 [draws, m, classes], and a note for the reader.

    features: [n, D], labels, patients: [n], of train; queries: [m, D]. What is standardised is by the features of all of train,
    whose labels a laboratory would not have, but whose images it has.
    """
    _, numbers = np.unique(patients, return_inverse=True)
    draws = [draw_shots(labels, numbers, classes, shots, config.seed, run) for run in range(config.draws)]
    repeated = sum(draw.repeated for draw in draws) / config.draws
    note = f"{repeated:.3g} of {shots * classes} images a draw come from a patient that was drawn before" if repeated else ""
    if linear:
        return _linear(features, labels, classes, queries, [draw.rows for draw in draws], config.penalty), note
    origin = features.mean(axis=0, dtype=np.float64)
    near, asked = Centred.of(features, origin), Centred.of(queries, origin)
    logs = [
        nearest_prototype(Centred(near.x[rows], near.squares[rows]), labels[rows], classes, asked, config.temperature)
        for rows in (draw.rows for draw in draws)
    ]
    return np.stack(logs), note


def _linear(
    features: np.ndarray, labels: np.ndarray, classes: int, queries: np.ndarray, draws: Sequence[np.ndarray], penalty: float
) -> np.ndarray:
    """All draws as the folds of one fit on the rows that any of them holds."""
    used = np.unique(np.concatenate(draws))
    standard = Standard.of(features)
    rows = Rows.of(features[used], standard, "cpu")
    inside = np.stack([np.isin(used, drawn) for drawn in draws])
    found = fit(rows, labels[used], classes, penalty, inside, TOLERANCE, MAX_ITERATIONS, None)
    weights, bias = found.weights(rows)  # [F, D, K], [F, K]
    slopes = weights / standard.deviation[:, None]  # of queries as they are: one product for all draws
    offsets = bias - standard.mean @ slopes
    flat = slopes.transpose(1, 0, 2).reshape(slopes.shape[1], -1).astype(np.float32)
    logits = (queries.astype(np.float32) @ flat).reshape(len(queries), len(draws), classes).transpose(1, 0, 2)
    return log_softmax(logits.astype(np.float64) + offsets[:, None], axis=2)


def _turns(codes: np.ndarray) -> np.ndarray:
    """Of each element, how many equal ones stand before it."""
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    turns = np.empty(len(codes), np.int64)
    turns[order] = np.arange(len(codes)) - starts
    return turns
