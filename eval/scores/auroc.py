"""The area under the ROC curve, its covariance over models and patients (DeLong, Obuchowski), and its intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm, rankdata, t

from histoscale.eval.scores.binomial import clopper_pearson
from histoscale.eval.scores.interval import BOOTSTRAP_PATIENTS, REPORTABLE_PATIENTS, Interval

REPORTABLE_CLASS = 3  # groups of a class; fewer have no variance to speak of


@dataclass(frozen=True)
class Areas:
    """values: float64 [M], the area of each model. covariance: [M, M]. spread: [2, M], the shares of the variance that come
    from positives and from negatives. groups: independent groups (patients, or units) with a positive and with a negative."""

    values: np.ndarray
    covariance: np.ndarray
    spread: np.ndarray
    groups: tuple[int, int]


def auroc(labels: Sequence[int] | np.ndarray, scores: Sequence[float] | np.ndarray) -> float:
    """P(score of a positive > score of a negative) + P(equal) / 2. Raises ValueError when a class is missing."""
    positive, negative = _split(np.asarray(labels), np.asarray(scores, np.float64)[None])
    return float(_components(positive, negative)[0].mean())


def areas(labels: np.ndarray, scores: np.ndarray, groups: Sequence[str] | None = None) -> Areas:
    """Areas of M models on the same n units, with their covariance.

    labels: [n], 0 or 1. scores: [M, n] or [n]. groups: a patient a unit, or None for independent units: DeLong 1988
    (doi 10.2307/2531595); with groups Obuchowski 1997 (doi 10.2307/2533958), which is DeLong's when every group has one unit.
    Raises ValueError when a class is missing; a class with one group leaves the covariance NaN.
    """
    labels, scores = np.asarray(labels), np.atleast_2d(np.asarray(scores, np.float64))
    positive, negative = _split(labels, scores)
    above, below = _components(positive, negative)
    values = above.mean(1)
    _, group = np.unique(np.arange(len(labels)) if groups is None else np.asarray(groups), return_inverse=True)
    deviation = np.zeros((2, len(values), group.max() + 1))  # [class, model, group]: summed centred components
    for side, (members, parts) in enumerate(((labels == 1, above), (labels == 0, below))):
        for model, part in enumerate(parts):
            np.add.at(deviation[side, model], group[members], part - values[model])
    counts = (labels == 1).sum(), (labels == 0).sum()
    having = len(np.unique(group[labels == 1])), len(np.unique(group[labels == 0]))
    if min(having) < 2:
        nothing = np.full((len(values), len(values)), np.nan)
        return Areas(values, nothing, np.full((2, len(values)), np.nan), having)
    scaled = [deviation[side] / counts[side] for side in (0, 1)]
    within = [having[side] / (having[side] - 1) * scaled[side] @ scaled[side].T for side in (0, 1)]
    across = deviation.shape[2] / (deviation.shape[2] - 1) * scaled[0] @ scaled[1].T
    spread = np.stack([within[0].diagonal(), within[1].diagonal()])
    return Areas(values, within[0] + within[1] + across + across.T, spread, having)


def mean_areas(
    labels: np.ndarray, probabilities: Sequence[np.ndarray], of: Sequence[int], groups: Sequence[str] | np.ndarray | None
) -> Areas:
    """Class against rest, meaned over classes and runs: areas of M models on the same n units, with their covariance.

    labels: [n]. probabilities: of each model [R, n, K]. of: the classes, each with units and without; one of two for a
    binary set. groups: as in `areas`. The variance is that of sums over groups of the meaned structural components, which for
    one class and one run is Obuchowski's up to the n / (n - 1) of each side. Raises ValueError for a class that has all or none.
    """
    labels = np.asarray(labels)
    _, group = np.unique(np.arange(len(labels)) if groups is None else np.asarray(groups), return_inverse=True)
    count = int(group.max()) + 1
    values, deviation = np.zeros(len(probabilities)), np.zeros((2, len(probabilities), count))
    having = np.full(2, count)
    for c in of:
        member = (labels == c).astype(np.int64)
        having = np.minimum(having, [len(np.unique(group[member == side])) for side in (1, 0)])
        for model, runs in enumerate(probabilities):
            positive, negative = _split(member, np.asarray(runs, np.float64)[:, :, c])
            for side, part in enumerate(_components(positive, negative)):
                share = part.mean(0) / len(of)
                values[model] += share.mean() if side == 0 else 0.0
                inside = group[member == 1 - side]
                deviation[side, model] += np.bincount(inside, weights=(share - share.mean()) / len(share), minlength=count)
    factor = count / (count - 1) if count > 1 else math.nan
    both = deviation.sum(0)
    return Areas(values, factor * both @ both.T, factor * (deviation**2).sum(2), (int(having[0]), int(having[1])))


def report_area(found: Areas, model: int, patients: int, units: int, level: float) -> Interval:
    """The area of one model as it may be reported.

    Under 10 patients in all, or 3 groups of a class, the interval is withheld; under 20, or 10 of a class, it is wider (t) and
    warns: the rarer class, not the number of patients, decides how much an area is known.
    """
    value, rarer = float(found.values[model]), min(found.groups)
    if patients < REPORTABLE_PATIENTS or rarer < REPORTABLE_CLASS:
        why = f"{patients} patients, {found.groups[0]} with a positive and {found.groups[1]} with a negative"
        return Interval(value, None, None, patients, units, f"interval withheld: {why}")
    small = patients < BOOTSTRAP_PATIENTS or rarer < REPORTABLE_PATIENTS
    low, high = area_interval(found, model, small, level)
    if math.isnan(low):
        return Interval(value, None, None, patients, units, "interval withheld: the score does not vary between units")
    note = f"warning: {patients} patients, {rarer} of the rarer class: t-interval" if small else ""
    return Interval(value, low, high, patients, units, note)


def report_difference(found: Areas, a: int, b: int, patients: int, units: int, level: float) -> Interval:
    """Area of model a minus that of model b under the rules of `report_area`."""
    value, low, high, _ = difference(found, a, b, level)
    rarer = min(found.groups)
    if patients < REPORTABLE_PATIENTS or rarer < REPORTABLE_CLASS:
        return Interval(value, None, None, patients, units, f"interval withheld: {patients} patients, {rarer} of the rarer class")
    if math.isnan(low):
        return Interval(value, None, None, patients, units, "interval withheld: the difference does not vary between units")
    small = patients < BOOTSTRAP_PATIENTS or rarer < REPORTABLE_PATIENTS
    note = f"warning: {patients} patients, {rarer} of the rarer class" if small else ""
    return Interval(value, low, high, patients, units, note)


def area_interval(found: Areas, model: int, small: bool, level: float = 0.95) -> tuple[float, float]:
    """The interval of one area on the logit scale (Pepe 2003); NaN ends when there is no variance to speak of.

    small: take Student's t with Welch-Satterthwaite's degrees of freedom in place of the normal.
    A perfect area has no DeLong variance. min(P, N) disjoint pairs of one positive and one negative group are then
    independent draws that all fell one way, so the exact binomial interval over the pairs is one for the area.
    """
    value, variance = float(found.values[model]), float(found.covariance[model, model])
    if not math.isfinite(variance):
        return math.nan, math.nan
    if value in (0.0, 1.0):
        pairs = min(found.groups)
        return clopper_pearson(round(value) * pairs, pairs, level)
    if variance <= 0:  # every unit tied, or so few distinct scores that nothing varies
        return math.nan, math.nan
    parts = found.spread[:, model]
    freedom = parts.sum() ** 2 / (parts**2 / (np.asarray(found.groups) - 1)).sum()
    quantile = float(t.ppf(0.5 + level / 2, freedom) if small else norm.ppf(0.5 + level / 2))
    half = quantile * math.sqrt(variance) / (value * (1 - value))
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))


def difference(found: Areas, a: int, b: int, level: float = 0.95) -> tuple[float, float, float, float]:
    """Area of model a minus that of model b on the same units: (value, low, high, two-sided p) by the normal approximation.

    Beside a perfect area DeLong's variance forgets that it is known only roughly: the ends then come from the two intervals
    (Newcombe 1998; Zou and Donner 2008), which ignores their correlation and is therefore wide, and p is NaN.
    """
    value = float(found.values[a] - found.values[b])
    variance = float(found.covariance[a, a] + found.covariance[b, b] - 2 * found.covariance[a, b])
    if math.isfinite(variance) and not {float(found.values[a]), float(found.values[b])}.isdisjoint((0.0, 1.0)):
        (low_a, high_a), (low_b, high_b) = (_or_itself(found, model, level) for model in (a, b))
        down = math.hypot(found.values[a] - low_a, high_b - found.values[b])
        up = math.hypot(high_a - found.values[a], found.values[b] - low_b)
        return value, value - down, value + up, math.nan
    if not variance > 0:
        return value, math.nan, math.nan, math.nan
    error = math.sqrt(variance)
    half = float(norm.ppf(0.5 + level / 2)) * error
    return value, value - half, value + half, float(2 * norm.sf(abs(value) / error))


def _or_itself(found: Areas, model: int, level: float) -> tuple[float, float]:
    """The interval of an area, or the value twice for a score that never varies: its area is .5 for certain."""
    low, high = area_interval(found, model, False, level)
    return (float(found.values[model]),) * 2 if math.isnan(low) else (low, high)


def _split(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scores [M, n] -> those of the positives [M, P] and of the negatives [M, N]."""
    if labels.shape != scores.shape[1:]:
        raise ValueError(f"{labels.shape} labels for {scores.shape[1:]} scores: expected one label a score")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels are {np.unique(labels)[:5].tolist()}: expected 0 and 1")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are not finite: an area needs numbers that can be ordered")
    if not 0 < labels.sum() < len(labels):
        raise ValueError(f"{int(labels.sum())} positives among {len(labels)} units: an area needs both classes")
    return scores[:, labels == 1], scores[:, labels == 0]


def _components(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong's structural components by mid-ranks (Sun and Xu 2014, doi 10.1109/LSP.2014.2337313): [M, P] and [M, N]."""
    p, n = positive.shape[1], negative.shape[1]
    ranks = rankdata(np.concatenate([positive, negative], 1), axis=1)
    above = (ranks[:, :p] - rankdata(positive, axis=1)) / n
    below = 1 - (ranks[:, p:] - rankdata(negative, axis=1)) / p
    return above, below
