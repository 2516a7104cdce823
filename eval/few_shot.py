"""A few labelled patches of each class: draws that take slides before patches, and two classifiers on each draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from histoscale.data.keys import key, key_array
from histoscale.data.names import codes
from histoscale.eval.lbfgs import minimise
from histoscale.eval.prototype import Directions, centred, prototypes


@dataclass(frozen=True)
class FewShotConfig:
    """shots: rows of each class. draws: for each number of shots, keyed by (seed, draw), so that more shots hold the fewer.

    penalty: of ½‖W‖² beside the mean log-loss, the same at every number of shots; features are centred and of length 1.
    """

    shots: list[int]
    draws: int
    penalty: float
    tolerance: float
    max_iterations: int
    seed: int


def draw(labels: np.ndarray, classes: int, own: np.ndarray, most: int, run: int, seed: int) -> list[np.ndarray]:
    """Rows of each class in the order in which shots take them, at most `most`. labels: int [n]; own: int [n], the
    slide or patient of each, as `codes` counts them.

    One row of each unit in keyed order, then a second one of each, and so on. Raises ValueError for a class with fewer rows.
    """
    places = key_array(seed, "few_shot/row", run, np.arange(len(labels)))
    turns = key_array(seed, "few_shot/unit", run, np.arange(own.max(initial=-1) + 1))
    found = []
    for c in range(classes):
        rows = np.flatnonzero(labels == c)
        if len(rows) < most:
            raise ValueError(f"class {c} has {len(rows)} rows in train: few_shot.shots asks for {most}")
        rows = rows[np.lexsort((places[rows], own[rows]))]
        first = np.flatnonzero(np.r_[True, np.diff(own[rows]) > 0])
        turn = np.arange(len(rows)) - np.repeat(first, np.diff(np.r_[first, len(rows)]))  # how often its unit came before it
        salt = np.uint64(key(seed, "few_shot/class", run, c))  # another order of units for each class
        found.append(rows[np.lexsort((turns[own[rows]] ^ salt, turn))][:most])
    return found


def few_shot(
    train: np.ndarray,
    labels: np.ndarray,
    classes: int,
    units: np.ndarray,
    queries: np.ndarray,
    config: FewShotConfig,
    draws: Sequence[int],
    temperature: float,
    device: str | torch.device,
) -> dict[str, np.ndarray]:
    """By `few_shot/S` (logistic regression) and `few_shot_prototype/S`: float64 log-probabilities [draws, m, K]."""
    own = codes(units)  # once: of a large set it takes longer than a draw
    drawn = [draw(labels, classes, own, max(config.shots), run, config.seed) for run in draws]
    found = {}
    for shots in config.shots:
        rows = np.stack([np.concatenate([part[:shots] for part in run]) for run in drawn])
        x = torch.from_numpy(train[rows].astype(np.float64)).to(device)
        y = torch.from_numpy(np.asarray(labels, np.int64)[rows]).to(device)
        found[f"few_shot/{shots}"] = fit_few(x, y, classes, config).log_probabilities(queries)
        found[f"few_shot_prototype/{shots}"] = prototypes(x, y, classes, temperature).log_probabilities(queries)
    return found


def fit_few(x: Tensor, labels: Tensor, classes: int, config: FewShotConfig) -> Directions:
    """P regressions on rows of their own: mean log-loss + penalty / 2 ‖W‖². x: float64 [P, m, D], labels: [P, m].

    Fitted among the m rows: the optimum is a combination of them.
    """
    centre, z = centred(x)
    problems, m, _ = z.shape
    values, vectors = torch.linalg.eigh(z @ z.transpose(1, 2))
    roots = values.clamp(min=0).sqrt()
    rows = vectors * roots[:, None]  # [P, m, m]: z in an orthonormal basis of its span
    target = torch.nn.functional.one_hot(labels, classes).to(z)

    def objective(flat: Tensor) -> tuple[Tensor, Tensor]:
        point = flat.view(problems, classes, m + 1)
        logs = (rows @ point[..., :-1].transpose(1, 2) + point[:, None, :, -1]).log_softmax(2)
        residual = (logs.exp() - target) / m
        gradient = torch.cat([residual.transpose(1, 2) @ rows + config.penalty * point[..., :-1], residual.sum(1)[..., None]], 2)
        value = -(logs * target).sum((1, 2)) / m + config.penalty / 2 * (point[..., :-1] ** 2).sum((1, 2))
        return value, gradient.view(problems, -1)

    curvature = (1 - 1 / classes) / classes
    weights = 1 / (curvature * values.clamp(min=0) / m + config.penalty)
    scale = torch.cat([weights, torch.full_like(weights[:, :1], 1 / curvature)], 1)[:, None]
    scale = scale.expand(-1, classes, -1).reshape(problems, -1)
    found = minimise(objective, torch.zeros_like(scale), scale, config.tolerance, config.max_iterations, 10, 1e-12)
    point = found.point.view(problems, classes, m + 1)
    inverse = torch.where(roots > 1e-9, 1 / roots, 0.0)
    basis = (vectors * inverse[:, None]).transpose(1, 2) @ z  # [P, m, D]
    return Directions(centre, point[..., :-1] @ basis, point[..., -1])
