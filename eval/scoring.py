"""Decisions become numbers: every metric with its interval over patients, paired differences, floors at their better form.

This is where reported labels are opened: once a role, counted by `Truth`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.results import Outcome, Score
from histoscale.eval.scores.auroc import mean_areas, report_area, report_difference
from histoscale.eval.scores.classification import (
    accuracy_of,
    balanced_accuracy_of,
    calibration_bins,
    calibration_error_of,
    macro_f1_of,
    quadratic_kappa_of,
)
from histoscale.eval.scores.interval import Interval, IntervalConfig, Resampling
from histoscale.eval.scores.rare import OF_EVERY_UNIT, ONE_CLASS, of_classes

FLOORS = ("random", "colour")
COUNTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "balanced_accuracy": balanced_accuracy_of,
    "macro_f1": macro_f1_of,
    "accuracy": accuracy_of,
    "quadratic_kappa": quadratic_kappa_of,
}
OF_CLASSES = ("balanced_accuracy", "macro_f1", "quadratic_kappa", "auroc")  # which say nothing of one class
OF_PROBABILITIES = ("log_loss", "ece", "brier")  # only of fits that minimise the log-loss
METRICS = (*COUNTED, "auroc", *OF_PROBABILITIES)


@dataclass(frozen=True)
class ScoringConfig:
    """metrics: of METRICS, each given where it has a meaning. paired: those of which differences are taken. ordered: sets
    whose classes are grades. bins: of ece."""

    metrics: list[str]
    paired: list[str]
    ordered: list[str]
    bins: int
    interval: IntervalConfig


@dataclass(frozen=True)
class Seen:
    """How an encoder saw the patches: the resolution's name, µm per pixel and the side of what it sees in µm (None: unknown)."""

    resolution: str
    effective_mpp: float | None
    field_um: float | None


class Truth:
    """The labels of a set, each opening counted. reads: by role, of whole roles."""

    def __init__(self, patches: LabelledPatches) -> None:
        self._labels = patches.labels
        self.reads: dict[str, int] = {}

    def open(self, role: str, rows: np.ndarray) -> np.ndarray:
        """int64 [n] of the rows."""
        self.reads[role] = self.reads.get(role, 0) + 1
        return self._labels[rows]

    def __str__(self) -> str:
        return "reads: " + ", ".join(f"{role} {count}" for role, count in self.reads.items())


@dataclass(frozen=True)
class _Cell:
    """What every metric needs of one role. positive: the class that two-class metrics look at, None with more classes."""

    labels: np.ndarray
    classes: int
    positive: int | None
    patients: np.ndarray
    draws: Resampling
    config: ScoringConfig


def check_metrics(config: ScoringConfig) -> None:
    """Raises ValueError for a name that is none of METRICS."""
    for metric in (*config.metrics, *config.paired):
        if metric not in METRICS:
            raise ValueError(f"scoring has the metric {metric!r}: expected some of {', '.join(METRICS)}")


def score(
    outcomes: Sequence[Outcome], patches: LabelledPatches, truth: Truth, seen: Mapping[str, Seen], config: ScoringConfig
) -> list[Score]:
    """Scores, then differences: every encoder less each floor and less each later encoder of the same protocol, probe, embedding.

    seen: by encoder. A floor with several forms (poolings, classifiers) is its better one on the very rows that are reported,
    which favours the floor. Opens the labels of each role once. Raises ValueError for an unknown metric, and when outcomes of
    a role are of different rows.
    """
    check_metrics(config)
    found: list[Score] = []
    for role in dict.fromkeys(outcome.role for outcome in outcomes):
        here = [outcome for outcome in outcomes if outcome.role == role]
        rows = here[0].rows
        if any(not np.array_equal(outcome.rows, rows) for outcome in here):
            raise ValueError(f"outcomes of {role} are of different rows of {patches.name}: they cannot be compared")
        classes = len(patches.classes)
        named = 1 if patches.usage.positive is None else patches.classes.index(patches.usage.positive)
        owners = patches.patients[rows]
        draws = Resampling.of(owners, config.interval)
        cell = _Cell(truth.open(role, rows), classes, named if classes == 2 else None, owners, draws, config)
        here = better_floors(here, cell.labels, classes)
        for outcome in here:
            found += [
                _score(outcome, metric, *one, patches, seen, "")
                for metric in config.metrics
                if (one := _measured(metric, [outcome], cell, patches)) is not None
            ]
        for first, second in _pairs(here):
            found += [
                _score(first, metric, *one, patches, seen, second.encoder)
                for metric in config.paired
                if (one := _measured(metric, [first, second], cell, patches)) is not None
            ]
    return found


def better_floors(outcomes: Sequence[Outcome], labels: np.ndarray, classes: int) -> list[Outcome]:
    """Of the forms of a floor the one with the highest balanced accuracy, the first among equals; everything else as it is."""
    best: dict[tuple[str, str, str], tuple[float, Outcome]] = {}
    for one in outcomes:
        if one.encoder in FLOORS:
            value, place = float(balanced_accuracy_of(_counts(one, labels, classes).sum(0)).mean()), _place(one)
            if place not in best or value > best[place][0]:
                best[place] = value, one
    kept = {id(one) for _, one in best.values()}
    return [one for one in outcomes if one.encoder not in FLOORS or id(one) in kept]


def _place(outcome: Outcome) -> tuple[str, str, str]:
    return outcome.encoder, outcome.protocol, outcome.probe


def _pairs(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    own = [one for one in outcomes if one.encoder not in FLOORS]
    found = []
    for place, one in enumerate(own):
        same = [other for other in outcomes if (other.protocol, other.probe) == (one.protocol, one.probe)]
        found += [(one, other) for other in same if other.encoder in FLOORS]
        later = [other for other in own[place + 1 :] if any(other is each for each in same)]
        found += [(one, other) for other in later if other.embedding == one.embedding and other.encoder != one.encoder]
    return found


# a metric of one outcome, or of the first less the second: its interval, and each run's own value
Measured = tuple[Interval, np.ndarray]


def _measured(metric: str, outcomes: list[Outcome], cell: _Cell, patches: LabelledPatches) -> Measured | None:
    """None where the metric has no meaning; no number, with the reason, where all rows are of one class."""
    if metric == "quadratic_kappa" and patches.name not in cell.config.ordered:
        return None
    if metric in OF_CLASSES and len(np.unique(cell.labels)) < 2:
        units = len(cell.labels)
        held = Interval(math.nan, None, None, int(cell.draws.codes.max()) + 1, units, ONE_CLASS)
        return held, np.full(1, math.nan)
    if metric == "auroc":
        return _areas(outcomes, cell)
    if metric in ("ece", "brier") and cell.positive is None:
        return None
    if metric in OF_PROBABILITIES and not all(_is_probabilistic(one) for one in outcomes):
        return None
    parts = [_sums(metric, one, cell) for one in outcomes]
    widths = np.cumsum([sums.shape[1] for sums, _ in parts])[:-1]

    def runs_of(totals: np.ndarray) -> list[np.ndarray]:
        return [of(part) for (_, of), part in zip(parts, np.split(totals, widths, axis=-1), strict=True)]

    def statistic(totals: np.ndarray) -> np.ndarray:
        means = [values.mean(-1) for values in runs_of(totals)]
        return means[0] if len(means) == 1 else means[0] - means[1]

    sums = np.concatenate([one for one, _ in parts], 1)
    found, level = cell.draws.interval(sums, statistic), cell.config.interval.level if len(outcomes) == 1 else None
    if metric in OF_CLASSES and metric not in OF_EVERY_UNIT:
        found = of_classes(found, cell.labels, cell.draws.codes, level)
    return found, runs_of(sums.sum(0))[0]


def _sums(metric: str, outcome: Outcome, cell: _Cell) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """What is summed over each patient's rows, [P, C], and how totals [..., C] become values of the runs, [..., R]."""
    runs, rows, classes = outcome.logs.shape
    if metric in COUNTED:
        sums = np.stack([_by_patient(one, cell, classes) for one in outcome.predicted], 1)
        return sums.reshape(len(sums), -1), lambda totals: COUNTED[metric](
            totals.reshape(*totals.shape[:-1], runs, classes, classes)
        )
    if metric == "ece":
        positive, hit = np.exp(outcome.logs[:, :, cell.positive]), cell.labels == cell.positive
        parts = np.concatenate([calibration_bins(one, hit, cell.config.bins) for one in positive], 1)
        return cell.draws.sums(parts), lambda totals: calibration_error_of(totals.reshape(*totals.shape[:-1], runs, -1))
    if metric == "log_loss":
        parts = -outcome.logs[:, np.arange(rows), cell.labels].T
    else:
        parts = ((np.exp(outcome.logs[:, :, cell.positive]) - (cell.labels == cell.positive)) ** 2).T
    sums = cell.draws.sums(np.concatenate([parts, np.ones((rows, 1))], 1))
    return sums, lambda totals: totals[..., :-1] / totals[..., -1:]


def _by_patient(predicted: np.ndarray, cell: _Cell, classes: int) -> np.ndarray:
    """Confusion counts of each patient: float64 [P, K * K]."""
    places = (cell.draws.codes * classes + cell.labels) * classes + predicted
    patients = int(cell.draws.codes.max()) + 1
    return np.bincount(places, minlength=patients * classes**2).reshape(patients, -1).astype(np.float64)


def _counts(outcome: Outcome, labels: np.ndarray, classes: int) -> np.ndarray:
    """[1, R, K, K]."""
    found = [np.bincount(labels * classes + one, minlength=classes**2) for one in outcome.predicted]
    return np.stack(found).reshape(1, len(found), classes, classes)


def _areas(outcomes: list[Outcome], cell: _Cell) -> Measured | None:
    present = [c for c in range(cell.classes) if 0 < (cell.labels == c).sum() < len(cell.labels)]
    if not present:
        return None
    of = present if cell.positive is None else [cell.positive]
    probabilities = [np.exp(outcome.logs) for outcome in outcomes]
    found = mean_areas(cell.labels, probabilities, of, cell.patients)
    patients, units, level = int(cell.draws.codes.max()) + 1, len(cell.labels), cell.config.interval.level
    each = [mean_areas(cell.labels, [one[None]], of, cell.patients).values[0] for one in probabilities[0]]
    if len(outcomes) == 1:
        return report_area(found, 0, patients, units, level), np.array(each)
    return report_difference(found, 0, 1, patients, units, level), np.array(each)


def _is_probabilistic(outcome: Outcome) -> bool:
    return outcome.embedding != "forest" and (outcome.probe == "linear" or outcome.probe.startswith("few_shot/"))


def _score(
    outcome: Outcome,
    metric: str,
    interval: Interval,
    runs: np.ndarray,
    patches: LabelledPatches,
    seen: Mapping[str, Seen],
    minus: str,
) -> Score:
    how = seen[outcome.encoder]
    spread = float(runs.std(ddof=1)) if len(runs) > 1 and not minus else None
    return Score(
        patches.name, outcome.encoder, outcome.embedding, how.resolution, outcome.protocol, outcome.probe, outcome.role, metric,
        interval, patches.groups, len(runs), spread, how.effective_mpp, how.field_um, outcome.encoder in FLOORS, minus,
        outcome.note,
    )  # fmt: skip
