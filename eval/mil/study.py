"""The study of a slide model: its table by part and by site, its floors, its operating points."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from histoscale.eval.mil.bags import Bags
from histoscale.eval.mil.split import Trial
from histoscale.eval.mil.task import BinaryTask
from histoscale.eval.scores.auroc import areas, report_area, report_difference
from histoscale.eval.scores.interval import Interval, IntervalConfig, patient_bootstrap
from histoscale.eval.scores.operating import Operation, Rate, Threshold, decide, operate, threshold

RATES = ("sensitivity", "specificity", "fnr", "flagged", "ppv", "npv")


@dataclass(frozen=True)
class Operating:
    """A threshold at work. clustered: sensitivity and specificity with patients resampled, present where a patient has several
    units and the binomial intervals are therefore too narrow."""

    at: Threshold
    found: Operation
    clustered: dict[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        ppv, npv = self.found.at_prevalence
        return {
            **{name: _rate(getattr(self.found, name)) for name in RATES},
            "at_prevalence": {"prevalence": self.found.prevalence, "ppv": ppv, "npv": npv},
            "drift": self.found.drift,
            "needed_threshold": self.found.needed,
            "clustered": {name: interval.as_dict() for name, interval in self.clustered.items()},
        }


@dataclass(frozen=True)
class Part:
    """One set of slides. units: decisions (slides or patients). auc is None where a class is missing. floors: their areas;
    minus: the model's area less theirs. operating: one a required sensitivity."""

    name: str
    slides: int
    patients: int
    units: int
    positives: int
    auc: Interval | None
    floors: dict[str, Interval]
    minus: dict[str, Interval]
    operating: list[Operating]

    def as_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("slides", "patients", "units", "positives")},
            "auc": self.auc.as_dict() if self.auc else None,
            "floors": {name: interval.as_dict() for name, interval in self.floors.items()},
            "minus": {name: interval.as_dict() for name, interval in self.minus.items()},
            "operating": {f"{each.at.required:g}": each.as_dict() for each in self.operating},
        }


@dataclass(frozen=True)
class Study:
    """train: out-of-fold scores, where the thresholds come from. external is None without an external site."""

    task: BinaryTask
    groups: str
    thresholds: list[Threshold]
    train: Part
    internal: Part | None
    external: Part | None
    sites: dict[str, Part]
    external_sites: list[str]
    left_out: dict[str, str]

    @property
    def reported(self) -> list[Part]:
        return [part for part in (self.internal, self.external) if part is not None]

    def as_dict(self) -> dict[str, Any]:
        """The values of `summary.json` under `mil`."""
        return {
            "task": self.task.name,
            "decision": self.task.decision,
            "groups": self.groups,
            "thresholds": {f"{at.required:g}": asdict(at) for at in self.thresholds},
            "train": self.train.as_dict(),
            "internal": self.internal.as_dict() if self.internal else None,
            "external": self.external.as_dict() if self.external else None,
            "sites": {name: part.as_dict() for name, part in self.sites.items()},
            "left_out": self.left_out,
        }


def study(
    bags: Bags,
    trial: Trial,
    scores: np.ndarray,
    floors: Mapping[str, np.ndarray],
    task: BinaryTask,
    config: IntervalConfig,
) -> Study:
    """scores: [n] by row, out of fold for training slides. floors: other scores of the same rows, by name.

    Thresholds are fixed on the training rows; the other rows are only read.
    """
    train, internal, external = trial.train, trial.internal, trial.external
    known = _units(bags, train, scores, task)
    thresholds = [threshold(known.labels, known.scores, required, task.rule) for required in task.sensitivities]

    def part(name: str, rows: Sequence[int]) -> Part:
        return _part(name, rows, bags, scores, floors, thresholds, task, config)

    sites: dict[str, list[int]] = {}
    for row in internal + external:
        sites.setdefault(bags.rows[row].site or "unknown", []).append(row)
    return Study(
        task=task,
        groups=bags.groups,
        thresholds=thresholds,
        train=part("train (out of fold)", train),
        internal=part("internal test", internal) if internal else None,
        external=part("external", external) if external else None,
        sites={site: part(site, rows) for site, rows in sorted(sites.items())},
        external_sites=sorted({bags.rows[row].site for row in external}),
        left_out=bags.left_out,
    )


def score_rows(bags: Bags, trial: Trial, scores: np.ndarray, thresholds: Sequence[Threshold]) -> list[dict[str, Any]]:
    """One row a slide for `scores.csv`; flagged_<sensitivity>: the slide's own decision."""
    rows = []
    part = {row: name for name in ("train", "internal", "external") for row in getattr(trial, name)}
    for i, (bag, score) in enumerate(zip(bags.rows, scores.tolist(), strict=True)):
        if i not in part:
            continue
        place = {"slide_id": bag.slide_id, "patient_id": bag.group, "site": bag.site, "part": part[i], "label": bag.label}
        flags = {f"flagged_{at.required:g}": int(score >= at.value) for at in thresholds}
        rows.append({**place, "score": score, **flags})
    return rows


@dataclass(frozen=True)
class _Units:
    labels: np.ndarray
    scores: np.ndarray
    groups: list[str]


def _units(bags: Bags, rows: Sequence[int], scores: np.ndarray, task: BinaryTask) -> _Units:
    labels, values = bags.labels(rows), np.asarray(scores, np.float64)[list(rows)]
    groups = [bags.rows[i].group for i in rows]
    if task.decision == "patient":
        names, labels, values = decide(groups, labels, values)
        return _Units(labels, values, names)
    return _Units(labels, values, groups)


def _part(
    name: str,
    rows: Sequence[int],
    bags: Bags,
    scores: np.ndarray,
    floors: Mapping[str, np.ndarray],
    thresholds: Sequence[Threshold],
    task: BinaryTask,
    config: IntervalConfig,
) -> Part:
    main = _units(bags, rows, scores, task)
    patients, units = len(set(main.groups)), len(main.labels)
    auc, beside, minus = None, {}, {}
    if 0 < main.labels.sum() < units:
        others = {floor: _units(bags, rows, values, task).scores for floor, values in floors.items()}
        found = areas(main.labels, np.stack([main.scores, *others.values()]), main.groups)
        auc = report_area(found, 0, patients, units, config.level)
        for i, floor in enumerate(others, 1):
            beside[floor] = report_area(found, i, patients, units, config.level)
            minus[floor] = report_difference(found, 0, i, patients, units, config.level)
    operating = []
    for at in thresholds:
        clustered = _clustered(main, at, config) if patients < units else {}
        operating.append(Operating(at, operate(main.labels, main.scores, at, task.prevalence), clustered))
    return Part(name, len(rows), patients, units, int(main.labels.sum()), auc, beside, minus, operating)


def _clustered(unit: _Units, at: Threshold, config: IntervalConfig) -> dict[str, Interval]:
    """Sensitivity and specificity over the patients who have a unit of that class; the threshold stays where it is."""
    found = {}
    right = (unit.scores >= at.value) == (unit.labels == 1)
    for name, value in (("sensitivity", 1), ("specificity", 0)):
        rows = np.flatnonzero(unit.labels == value)
        if len(rows):
            patients = [unit.groups[i] for i in rows]
            found[name] = patient_bootstrap(_mean_of(right[rows]), patients, config)
    return found


def _mean_of(values: np.ndarray) -> Any:
    return lambda drawn: float(values[drawn].mean())


def _rate(rate: Rate) -> dict[str, Any]:
    ends = {"wilson": rate.wilson, "clopper_pearson": rate.exact}
    return {"value": rate.value, "hits": rate.hits, "n": rate.n, **{k: {"low": a, "high": b} for k, (a, b) in ends.items()}}
