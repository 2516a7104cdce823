"""A few local cases move a foreign model's probabilities: what is gained on the other local cases, over many draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from histoscale.data.keys import key
from histoscale.data.splits import nested_subset
from histoscale.eval.scores.calibration import brier, fit_line, log_odds, reliability

METHODS = {"intercept": (True, False), "temperature": (False, True), "platt": (True, True)}


@dataclass(frozen=True)
class RecalibrationConfig:
    """cases: numbers of local cases to learn from, patients whole. methods: of METHODS. draws: of local samples."""

    cases: list[int]
    methods: list[str]
    draws: int
    seed: int

    def __post_init__(self) -> None:
        strange = [name for name in self.methods if name not in METHODS]
        if strange or min([self.draws, *self.cases]) < 1:
            given = f"recalibration has methods {self.methods}, cases {self.cases}, draws {self.draws}"
            raise ValueError(f"{given}: expected some of {', '.join(METHODS)} and numbers from 1 on")


@dataclass(frozen=True)
class Spread:
    """Over draws: the mean, and the 2.5 and 97.5 percentile. No interval of confidence: draws share their cases."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Recalibrated:
    """One method after `cases` local cases. before, after: by `ece`, `brier` and `log_loss`, on the cases that were not learned
    from. better: share of the draws with a lower Brier score than before. draws: with both classes left to read."""

    method: str
    cases: int
    draws: int
    before: dict[str, Spread]
    after: dict[str, Spread]
    better: float


def fit_recalibration(probabilities: np.ndarray, positive: np.ndarray, method: str, weights: np.ndarray) -> np.ndarray:
    """(a, b) of p' = sigmoid(a + b logit p): `intercept` moves a, `temperature` b = 1 / T, `platt` both.

    probabilities, positive: [n]; weights: [s, n], of s samples, how often each unit counts -> float64 [2, s].
    The targets are Platt's, (N₊ + 1) / (N₊ + 2) and 1 / (N₋ + 2) (1999), so that a few separable cases give no infinite slope.
    A slope is not let below 0, where it would turn the order of the scores round. Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"the method of recalibration is {method!r}: expected {', '.join(METHODS)}")
    y = np.asarray(positive) == 1
    hits, misses = weights @ y, weights @ ~y
    targets = np.where(y, ((hits + 1) / (hits + 2))[:, None], (1 / (misses + 2))[:, None])
    line = fit_line(log_odds(probabilities), targets, weights, METHODS[method])
    turned = line[1] < 0
    if turned.any():
        flat = fit_line(np.zeros(len(y)), targets[turned], weights[turned], (METHODS[method][0], False))
        line[:, turned] = flat[0], np.zeros(turned.sum())
    return line


def recalibrate(probabilities: np.ndarray, line: np.ndarray) -> np.ndarray:
    """sigmoid(a + b logit p): float64 [n]. Scores keep their order, so a threshold carried along flags the same units."""
    return expit(line[0] + line[1] * log_odds(probabilities))


def local_recalibration(
    probabilities: np.ndarray, positive: np.ndarray, groups: Sequence[str], config: RecalibrationConfig, bins: int
) -> list[Recalibrated]:
    """Learn from `cases` units of a site, read its others; patients are never divided.

    probabilities, positive: [n]. bins: of ece. Numbers of cases that leave under half of the units to read are left out.
    """
    positive = np.asarray(positive) == 1
    found = []
    for cases in (n for n in config.cases if 2 * n <= len(positive)):
        chosen = np.zeros((config.draws, len(positive)), bool)
        for draw in range(config.draws):
            chosen[draw, nested_subset(groups, cases, key(config.seed, "recalibration", draw))] = True
        left = np.array([len(np.unique(positive[~own])) == 2 for own in chosen])  # with both classes to read
        if not left.any():
            continue
        before = np.array([_losses(probabilities[~own], positive[~own], bins) for own in chosen[left]])
        for method in config.methods:
            lines = fit_recalibration(probabilities, positive, method, chosen[left].astype(np.float64)).T
            after = np.array(
                [
                    _losses(recalibrate(probabilities[~own], line), positive[~own], bins)
                    for own, line in zip(chosen[left], lines, strict=True)
                ]
            )
            better = float((after[:, 1] < before[:, 1]).mean())
            found.append(Recalibrated(method, cases, int(left.sum()), _spreads(before), _spreads(after), better))
    return found


LOSSES = ("ece", "brier", "log_loss")


def _losses(probabilities: np.ndarray, positive: np.ndarray, bins: int) -> list[float]:
    z = log_odds(probabilities)
    log_loss = float(np.mean(np.logaddexp(0, z) - positive * z))
    return [reliability(probabilities, positive, bins).expected_calibration_error, brier(probabilities, positive), log_loss]


def _spreads(table: np.ndarray) -> dict[str, Spread]:
    """[draws, losses] -> of each loss."""
    low, high = np.quantile(table, [0.025, 0.975], axis=0).tolist()
    return {name: Spread(*ends) for name, *ends in zip(LOSSES, table.mean(0).tolist(), low, high, strict=True)}
