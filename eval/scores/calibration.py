"""Do probabilities mean what they say? Bins against observed rates, Brier's score and its parts, slope and intercept."""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

CLIP = 1e-6  # of a probability, before its logit


@dataclass(frozen=True)
class Bins:
    """Of the bins that hold a unit: count int64 [b]; predicted, observed: float64 [b], mean probability and positive rate."""

    count: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Σ n_b / n · |observed − predicted|."""
        return float((self.count / self.count.sum() * np.abs(self.observed - self.predicted)).sum())


def reliability(probabilities: np.ndarray, positive: np.ndarray, bins: int) -> Bins:
    """Bins of equal width, closed at the right, of the probability of the positive class (torchmetrics' convention).

    probabilities: [n] in [0, 1]; positive: bool [n]. Raises ValueError for no unit or a probability outside [0, 1].
    """
    _check(probabilities)
    place = np.clip(np.ceil(probabilities * bins).astype(np.int64) - 1, 0, bins - 1)
    return _bins(probabilities, positive, place, bins)


def equal_mass(probabilities: np.ndarray, positive: np.ndarray, bins: int) -> Bins:
    """Bins of equally many units, in order of probability; equal probabilities keep the order in which they came.

    Raises ValueError for no unit or a probability outside [0, 1].
    """
    _check(probabilities)
    count = min(bins, len(probabilities))
    place = np.empty(len(probabilities), np.int64)
    for i, part in enumerate(np.array_split(np.argsort(probabilities, kind="stable"), count)):
        place[part] = i
    return _bins(probabilities, positive, place, count)


def brier(probabilities: np.ndarray, positive: np.ndarray) -> float:
    """Mean squared distance of the probability of the positive class to what happened (0 or 1)."""
    return float(np.mean((probabilities - positive) ** 2))


def errors_if_calibrated(probabilities: np.ndarray, bins: int, chances: np.ndarray) -> np.ndarray:
    """Expected calibration errors of outcomes that happen as often as the probabilities say: float64 [draws].

    probabilities: [n]; chances: [draws, n], uniform in [0, 1). An error in bins is never 0 on few units, even then; resampling
    units adds to it and gives no interval (Broecker and Smith 2007, doi 10.1175/WAF993.1, draw outcomes instead).
    """
    _check(probabilities)
    place = np.clip(np.ceil(probabilities * bins).astype(np.int64) - 1, 0, bins - 1)
    rest = (chances < probabilities) - probabilities
    return np.abs(rest @ np.eye(bins)[place]).sum(1) / len(probabilities)


@dataclass(frozen=True)
class BrierParts:
    """Brier = reliability − resolution + uncertainty, over the distinct forecasts (Murphy 1973). skill: 1 − Brier / uncertainty,
    NaN with one class."""

    reliability: float
    resolution: float
    uncertainty: float
    skill: float


def brier_parts(probabilities: np.ndarray, positive: np.ndarray) -> BrierParts:
    """probabilities, positive: [n]. Raises ValueError for no unit or a probability outside [0, 1]."""
    _check(probabilities)
    values, place = np.unique(probabilities, return_inverse=True)
    found = _bins(probabilities, positive, place, len(values))
    share, rate = found.count / len(probabilities), float(np.mean(positive))
    parts = float((share * (found.predicted - found.observed) ** 2).sum()), float((share * (found.observed - rate) ** 2).sum())
    uncertainty = rate * (1 - rate)
    skill = 1 - brier(probabilities, positive) / uncertainty if uncertainty > 0 else float("nan")
    return BrierParts(*parts, uncertainty, skill)


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """logit p, with p kept 1e-6 away from 0 and 1."""
    return logit(np.clip(probabilities, CLIP, 1 - CLIP))


def slope_and_intercept(logits: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression of what happened on the logit (Cox 1958, doi 10.1093/biomet/45.3-4.562): slope under 1 is too sure.

    logits: [n]; positive: [n], 0 or 1; weights: [b, n], how often each unit counts -> slope, intercept: float64 [b] each, NaN
    where there is none: one class, one logit, or classes that a threshold separates.
    """
    weights = np.atleast_2d(np.asarray(weights, np.float64))
    y = np.broadcast_to(np.asarray(positive, np.float64), logits.shape)
    seen = weights > 0
    low, high = (
        {side: reduce(np.where(seen & (y == side), logits, far), axis=1) for side in (0, 1)}
        for reduce, far in ((np.min, np.inf), (np.max, -np.inf))
    )
    known = (high[0] > low[1]) & (high[1] > low[0])  # false too where a class is missing
    line = np.full((2, len(weights)), np.nan)
    if known.any():
        line[:, known] = fit_line(logits, y, weights[known], free=(True, True))
    return line[1], line[0]


def intercept_in_the_large(logits: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The intercept beside a slope of 1: over 0, events are more frequent than predicted. float64 [b], NaN with one class."""
    weights = np.atleast_2d(np.asarray(weights, np.float64))
    y = np.broadcast_to(np.asarray(positive, np.float64), logits.shape)
    known = ((weights * y).sum(1) > 0) & ((weights * (1 - y)).sum(1) > 0)
    found = np.full(len(weights), np.nan)
    if known.any():
        found[known] = fit_line(logits, y, weights[known], free=(True, False))[0]
    return found


def fit_line(x: np.ndarray, targets: np.ndarray, weights: np.ndarray, free: tuple[bool, bool]) -> np.ndarray:
    """Σ w · cross-entropy of sigmoid(a + b x) with the targets, minimised over the free ones of (a, b), the others 0 and 1.

    x: [n]; targets: [n] or [s, n] in [0, 1]; weights: [s, n], of s problems -> float64 [2, s]. Newton's method from the minimum
    of all problems together; one that it does not reach so is damped (Levenberg). The caller sees to it that there is a minimum;
    a direction without curvature is not followed.
    """
    weights = np.asarray(weights, np.float64)
    together = weights.sum(0)
    middle = (weights * targets).sum(0) / np.where(together > 0, together, 1)
    start = _damped(x, middle[None], together[None], free)
    line = np.repeat(start, len(weights), 1)
    open_ = np.arange(len(weights))
    for _ in range(_QUICK):
        aim = targets if targets.ndim == 1 else targets[open_]
        gradient, curvature = _slopes(x, aim, weights[open_], free, line[:, open_])
        step = _solved(gradient, curvature, free)
        line[:, open_] -= step
        open_ = open_[~_ended(x, weights[open_], gradient, step, line[:, open_])]
        if not len(open_):
            return line
    line[:, open_] = _damped(x, targets if targets.ndim == 1 else targets[open_], weights[open_], free)
    return line


_QUICK = 12  # steps of Newton's method without a look at the loss
_CAREFUL = 500


def _damped(x: np.ndarray, targets: np.ndarray, weights: np.ndarray, free: tuple[bool, bool]) -> np.ndarray:
    """`fit_line` from (0, 1), the loss never rising. The curvature is nowhere above that of p = 1/2, so adding all of that makes
    a step that always falls; as much as is needed is added."""
    line = np.tile([[0.0], [1.0]], len(weights))
    total, bound = weights.sum(1), weights @ np.stack([np.ones_like(x), x, x * x], 1) / 4
    damping = np.full(len(weights), 0.01)

    def loss(at: np.ndarray) -> np.ndarray:
        z = at[0][:, None] + at[1][:, None] * x
        return (weights * (np.logaddexp(0, z) - targets * z)).sum(1) / total

    value = loss(line)
    for _ in range(_CAREFUL):
        gradient, curvature = _slopes(x, targets, weights, free, line)
        step = _solved(gradient, curvature + damping[:, None] * bound, free)
        tried = line - step
        lower = loss(tried)
        good = lower <= value + 1e-15
        line, value = np.where(good, tried, line), np.where(good, lower, value)
        damping = np.where(good, damping / 10, np.minimum(np.maximum(10 * damping, 1e-6), 1))
        if _ended(x, weights, gradient, step, line).all():
            break
    return line


def _slopes(
    x: np.ndarray, targets: np.ndarray, weights: np.ndarray, free: tuple[bool, bool], line: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gradient [2, s] and the sums of w p (1 − p) times 1, x and x²: [s, 3]."""
    powers = np.stack([np.ones_like(x), x, x * x], 1)
    p = expit(line[0][:, None] + line[1][:, None] * x)
    gradient = ((weights * (p - targets)) @ powers[:, :2]).T * np.array(free)[:, None]
    return gradient, (weights * p * (1 - p)) @ powers


def _solved(gradient: np.ndarray, curvature: np.ndarray, free: tuple[bool, bool]) -> np.ndarray:
    """The step [2, s] of Newton's method."""
    aa, ab, bb = curvature.T
    with np.errstate(invalid="ignore", divide="ignore"):
        alone = np.stack([np.where(aa > 0, gradient[0] / aa, 0.0), np.where(bb > 0, gradient[1] / bb, 0.0)])
        if not all(free):
            return alone
        determinant = aa * bb - ab * ab
        both = np.stack([bb * gradient[0] - ab * gradient[1], aa * gradient[1] - ab * gradient[0]]) / determinant
    flat = determinant <= 1e-12 * aa * bb  # x does not vary: the intercept alone
    return np.where(flat, np.stack([alone[0], np.zeros_like(alone[0])]), both)


def _ended(x: np.ndarray, weights: np.ndarray, gradient: np.ndarray, step: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Whether problems are at their minimum: bool [s]. A step is also small where every p is 0 or 1, the gradient is not."""
    flat = np.abs(gradient).max(0) <= 1e-7 * (weights @ (1 + np.abs(x)))
    return flat & (np.abs(step).max(0) <= 1e-8 * (1 + np.abs(line).max(0)))  # false for what is no number


def _bins(probabilities: np.ndarray, positive: np.ndarray, place: np.ndarray, bins: int) -> Bins:
    count = np.bincount(place, minlength=bins)
    held = count > 0
    predicted = np.bincount(place, weights=probabilities, minlength=bins)[held] / count[held]
    observed = np.bincount(place, weights=np.asarray(positive, np.float64), minlength=bins)[held] / count[held]
    return Bins(count[held], predicted, observed)


def _check(probabilities: np.ndarray) -> None:
    if len(probabilities) == 0 or not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(f"{len(probabilities)} probabilities, not all inside 0 to 1: calibration needs some that are")
