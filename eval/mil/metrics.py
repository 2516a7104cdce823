"""The numbers of a part by kind of task, each as a function of how often every unit counts, so that all share one bootstrap."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from histoscale.data.keys import keys, uniform
from histoscale.eval.mil.task import BinaryTask, ClassesTask, RegressionTask, Task
from histoscale.eval.mil.units import Units
from histoscale.eval.scores.calibration import (
    errors_if_calibrated,
    intercept_in_the_large,
    log_odds,
    reliability,
    slope_and_intercept,
)
from histoscale.eval.scores.classification import (
    accuracy_of,
    balanced_accuracy_of,
    macro_f1_of,
    quadratic_kappa_of,
)
from histoscale.eval.scores.concordance import Concordance
from histoscale.eval.scores.interval import Interval, IntervalConfig
from histoscale.eval.scores.ranking import Ranking
from histoscale.eval.scores.rare import PROPORTIONS

Metric = Callable[[np.ndarray], np.ndarray]  # weights float64 [b, U] -> [b], NaN where undefined

_SHARE, _SIGNED = (0.0, 1.0), (-1.0, 1.0)
RANGES = {  # what a number can be: intervals by Student's t do not know it
    **dict.fromkeys(PROPORTIONS, _SHARE),
    "quadratic_kappa": _SIGNED, "pearson": _SIGNED, "brier": (0.0, 2.0), "brier_skill": (-math.inf, 1.0), "r2": (-math.inf, 1.0),
    "mae": (0.0, math.inf), "rmse": (0.0, math.inf),
}  # fmt: skip

NAMES = {
    "auroc": "AUROC", "auprc": "AUPRC", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "accuracy": "accuracy",
    "quadratic_kappa": "quadratic kappa", "brier": "Brier score", "brier_skill": "Brier skill", "ece": "calibration error (ECE)",
    "ece_if_calibrated": "ECE of a calibrated model",
    "slope": "calibration slope", "intercept": "calibration intercept", "intercept_in_the_large": "intercept at slope 1",
    "r2": "R²", "pearson": "Pearson r", "mae": "mean absolute error", "rmse": "root mean square error", "c_index": "C-index",
}  # fmt: skip


def headline(task: Task) -> str:
    """The metric that floors are compared in: higher is better, and it needs no threshold."""
    match task:
        case BinaryTask():
            return "auroc"
        case ClassesTask():
            return "quadratic_kappa" if task.ordered else "balanced_accuracy"
        case RegressionTask():
            return "r2"
    return "c_index"


def chance(task: Task) -> float:
    """What the headline is without any use of the slides."""
    if isinstance(task, ClassesTask):
        return 0.0 if task.ordered else 1 / task.outputs
    return 0.0 if isinstance(task, RegressionTask) else 0.5


def metrics(found: Units, task: Task) -> dict[str, Metric]:
    """Every metric of the task by name, but the calibration errors of `ece_intervals`.

    Ranks are compared inside a trial only; probabilities, values and classes have one scale by their meaning. Of two classes:
    decisions at probability .5 beside what needs none; the operating points stand apart. Calibration slope under 1: too sure;
    intercept in the large over 0: more positives than predicted.
    """
    match task:
        case BinaryTask():
            return _binary(found)
        case ClassesTask():
            return _classes(found, task)
        case RegressionTask():
            return _regression(found)
    return {"c_index": Concordance.of(found.target, found.event, found.outputs[:, 0], found.trial).index}


def bounded(found: Interval, name: str) -> Interval:
    """The interval inside what the number can be."""
    if name not in RANGES or found.low is None or found.high is None:
        return found
    least, most = RANGES[name]
    return replace(found, low=max(found.low, least), high=min(found.high, most))


def ece_intervals(found: Units, task: Task, bins: int, config: IntervalConfig) -> dict[str, Interval]:
    """The expected calibration error, without interval because resampling would add to it, beside what a perfectly calibrated
    model of the same probabilities would show: mean and range over drawn outcomes. Of several classes: of the one named."""
    binary = isinstance(task, BinaryTask)
    p = found.outputs[:, 0] if binary else found.outputs.max(1)
    hit = found.labels == (1 if binary else found.outputs.argmax(1))
    patients, n = len(set(found.groups)), len(p)
    own = reliability(p, hit, bins).expected_calibration_error
    parents = keys(config.seed, "mil/calibrated", 0, torch.arange(config.draws))
    drawn = errors_if_calibrated(p, bins, uniform(parents, n).double().numpy())
    low, high = np.quantile(drawn, [(1 - config.level) / 2, (1 + config.level) / 2]).tolist()
    held = Interval(own, None, None, patients, n, "interval withheld: resampling would add to an error in bins")
    calibrated = Interval(
        float(drawn.mean()), low, high, patients, n, "range over drawn outcomes, as if the probabilities were right"
    )
    return {"ece": held, "ece_if_calibrated": calibrated}


def ranks_alone(found: Units, task: Task) -> Metric:
    """The headline of outputs that are no probabilities, such as a floor's."""
    if isinstance(task, BinaryTask):
        return Ranking.of(found.labels, found.outputs[:, 0], found.trial).auroc
    return metrics(found, task)[headline(task)]


def _binary(found: Units) -> dict[str, Metric]:
    p, y = found.outputs[:, 0], found.labels
    ranking, logits = Ranking.of(y, p, found.trial), log_odds(p)
    squares = np.stack([(p - y) ** 2, y, np.ones_like(p)], 1)
    return {
        "auroc": ranking.auroc,
        "auprc": ranking.average_precision,
        "balanced_accuracy": _of_confusion(_counts(y, (p > 0.5).astype(np.int64), 2), _of_two(balanced_accuracy_of)),
        "brier": _of_sums(squares, lambda s: s[:, 0] / s[:, 2]),
        "brier_skill": _of_sums(squares, _skill),
        "slope": lambda weights: slope_and_intercept(logits, y, weights)[0],
        "intercept": lambda weights: slope_and_intercept(logits, y, weights)[1],
        "intercept_in_the_large": lambda weights: intercept_in_the_large(logits, y, weights),
    }


def _classes(found: Units, task: ClassesTask) -> dict[str, Metric]:
    p, y, k = found.outputs, found.labels, task.outputs
    named = p.argmax(1)
    counts = _counts(y, named, k)
    truth = np.eye(k)[y]
    rankings = [Ranking.of(truth[:, c].astype(np.int64), p[:, c], found.trial) for c in range(k)]
    squares = np.stack([((p - truth) ** 2).sum(1), np.ones(len(p))], 1)
    of_counts = {"balanced_accuracy": _of_two(balanced_accuracy_of), "macro_f1": _of_two(macro_f1_of), "accuracy": accuracy_of}
    if task.ordered:
        of_counts["quadratic_kappa"] = _of_two(quadratic_kappa_of)
    return {
        **{name: _of_confusion(counts, of) for name, of in of_counts.items()},
        "auroc": lambda weights: _mean_present(np.stack([one.auroc(weights) for one in rankings])),
        "brier": _of_sums(squares, lambda s: s[:, 0] / s[:, 1]),
    }


def _regression(found: Units) -> dict[str, Metric]:
    centre = found.target.mean()  # sums of squares keep their digits
    y, p = found.target - centre, found.outputs[:, 0] - centre
    sums = np.stack([np.ones_like(y), y, p, y * y, p * p, y * p, np.abs(y - p), (y - p) ** 2], 1)
    return {
        "r2": _of_sums(sums, lambda s: 1 - s[:, 7] / _varying(s[:, 3] - s[:, 1] ** 2 / s[:, 0], s[:, 3])),
        "pearson": _of_sums(sums, _pearson),
        "mae": _of_sums(sums, lambda s: s[:, 6] / s[:, 0]),
        "rmse": _of_sums(sums, lambda s: np.sqrt(s[:, 7] / s[:, 0])),
    }


def _of_sums(rows: np.ndarray, statistic: Metric) -> Metric:
    """rows: [U, C]; statistic: of their weighted sums [b, C]."""
    rows = np.asarray(rows, np.float64)

    def metric(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return statistic(weights @ rows)

    return metric


def _of_confusion(rows: np.ndarray, statistic: Metric) -> Metric:
    """rows: of `_counts`; statistic: of matrices of counts [b, K, K]."""
    side = round(rows.shape[1] ** 0.5)
    return _of_sums(rows, lambda sums: statistic(sums.reshape(-1, side, side)))


def _of_two(statistic: Metric) -> Metric:
    """NaN where all units are of one class: naming it always would be right, and says nothing of telling classes apart."""

    def metric(counts: np.ndarray) -> np.ndarray:
        return np.where((counts.sum(-1) > 0).sum(-1) > 1, statistic(counts), np.nan)

    return metric


def _counts(y: np.ndarray, named: np.ndarray, classes: int) -> np.ndarray:
    """[U, K * K], one where the unit stands in the confusion matrix."""
    return np.eye(classes * classes)[y * classes + named]


def _skill(sums: np.ndarray) -> np.ndarray:
    rate = sums[:, 1] / sums[:, 2]
    return 1 - sums[:, 0] / sums[:, 2] / _varying(rate * (1 - rate), np.ones_like(rate))


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, y, p, yy, pp, yp = sums[:, :6].T
    spread = _varying(yy - y * y / n, yy) * _varying(pp - p * p / n, pp)
    return np.clip((yp - y * p / n) / np.sqrt(spread), -1, 1)


def _varying(spread: np.ndarray, size: np.ndarray) -> np.ndarray:
    """NaN where nothing varies beyond rounding."""
    return np.where(spread > 1e-12 * size, spread, np.nan)


def _mean_present(values: np.ndarray) -> np.ndarray:
    """Over the classes [K, b] that have units and leave some."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)
