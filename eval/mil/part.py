"""One set of slides in a study: its counts, its numbers, its decisions and what is drawn of it."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from histoscale.eval.mil.task import BinaryTask, ClassesTask, SurvivalTask, Task
from histoscale.eval.mil.units import Units
from histoscale.eval.scores.calibration import Bins
from histoscale.eval.scores.interval import Interval
from histoscale.eval.scores.operating import Operation, Rate, rate, rule_name, sweeping
from histoscale.eval.scores.recalibration import Recalibrated

RATES = ("sensitivity", "specificity", "fnr", "flagged", "ppv", "npv")


@dataclass(frozen=True)
class Operating:
    """Thresholds at work, each unit under the one of its own trial. clustered: sensitivity and specificity with patients
    resampled, present where a patient has several units and the binomial intervals are therefore too narrow."""

    required: float
    found: Operation
    clustered: dict[str, Interval]
    keeps: str = "sensitivity"

    @property
    def name(self) -> str:
        return rule_name(self.keeps, self.required)

    def as_dict(self) -> dict[str, Any]:
        ppv, npv = self.found.at_prevalence
        return {
            **{name: rate_dict(getattr(self.found, name)) for name in RATES},
            "at_prevalence": {"prevalence": self.found.prevalence, "ppv": ppv, "npv": npv},
            "drift": self.found.drift,
            "sweeping": sweeping(self.found.flagged),
            "needed_threshold": self.found.needed,
            "clustered": {name: interval.as_dict() for name, interval in self.clustered.items()},
        }


@dataclass(frozen=True)
class Part:
    """One set of slides. units: decisions (slides or patients). counts: units by class, or with and without the event.

    headline: the metric in which floors stand beside (`floors`) and are subtracted (`minus`); None where it is undefined.
    metrics: the others too; withheld: metric -> why these units have none. operating: of a binary task, one a requirement.
    recalls: of a task of classes. roc: [k, 2], of a single model; bins: of the probability of the positive class; confusion:
    [K, K]. points: of a number
    [U, 2], observed and predicted; of times [U, 3], time, event and whether the risk is above the training median of its trial.
    """

    name: str
    role: str
    slides: int
    patients: int
    units: int
    counts: dict[str, int]
    headline: Interval | None
    metrics: dict[str, Interval]
    withheld: dict[str, str]
    floors: dict[str, Interval]
    minus: dict[str, Interval]
    operating: list[Operating]
    recalls: dict[str, Rate]
    roc: np.ndarray | None
    bins: Bins | None
    confusion: np.ndarray | None
    points: np.ndarray | None
    recalibration: list[Recalibrated]

    @property
    def positives(self) -> int:
        """Units of the positive class, or with the event; 0 for tasks without either."""
        return self.counts.get("positive", self.counts.get("event", 0))

    @property
    def auc(self) -> Interval | None:
        return self.metrics.get("auroc")

    def intervals(self) -> dict[str, Interval]:
        """Metrics and rates. A rate has Wilson's interval, or that over patients where they have several units."""
        found = dict(self.metrics)
        for each in self.operating:
            for name in ("sensitivity", "specificity"):
                own: Rate = getattr(each.found, name)
                if name in each.clustered:
                    found[f"{name}@{each.name}"] = each.clustered[name]
                elif own.n:
                    found[f"{name}@{each.name}"] = Interval(own.value, *own.wilson, own.n, own.n, "")
        return found

    def as_dict(self) -> dict[str, Any]:
        bins = self.bins
        return {
            **{name: getattr(self, name) for name in ("role", "slides", "patients", "units", "positives", "counts")},
            "auc": self.auc.as_dict() if self.auc else None,
            "headline": self.headline.as_dict() if self.headline else None,
            "metrics": {name: interval.as_dict() for name, interval in self.metrics.items()},
            "withheld": self.withheld,
            "floors": {name: interval.as_dict() for name, interval in self.floors.items()},
            "minus": {name: interval.as_dict() for name, interval in self.minus.items()},
            "operating": {each.name: each.as_dict() for each in self.operating},
            "recalls": {name: rate_dict(each) for name, each in self.recalls.items()},
            "reliability": {name: getattr(bins, name).tolist() for name in ("count", "predicted", "observed")} if bins else None,
            "confusion": self.confusion.tolist() if self.confusion is not None else None,
            "recalibration": [asdict(each) for each in self.recalibration],
        }


def why_undefined(metric: str, found: Units, task: Task) -> str:
    """Why a metric has no value on these units."""
    if isinstance(task, BinaryTask | ClassesTask):
        held = [name for name, count in counts(found, task).items() if count]
        if len(held) == 1:
            return f"one class: all are {held[0]}"
    if isinstance(task, SurvivalTask) and not found.event.any():
        return "no event"
    return "a threshold separates the classes" if metric in ("slope", "intercept") else "nothing varies"


def counts(found: Units, task: Task) -> dict[str, int]:
    match task:
        case BinaryTask():
            return {name: int((found.labels == side).sum()) for name, side in (("positive", 1), ("negative", 0))}
        case ClassesTask():
            return {name: int((found.labels == c).sum()) for c, name in enumerate(task.classes)}
        case SurvivalTask():
            return {"event": int(found.event.sum()), "censored": int((~found.event).sum())}
    return {}


def recalls(found: Units, task: ClassesTask) -> dict[str, Rate]:
    named = found.outputs.argmax(1)
    return {
        name: rate(int(((found.labels == c) & (named == c)).sum()), int((found.labels == c).sum()))
        for c, name in enumerate(task.classes)
    }


def confusion(found: Units, task: ClassesTask) -> np.ndarray:
    k = task.outputs
    return np.bincount(found.labels * k + found.outputs.argmax(1), minlength=k * k).reshape(k, k)


def rate_dict(rate: Rate) -> dict[str, Any]:
    ends = {"wilson": rate.wilson, "clopper_pearson": rate.exact}
    return {"value": rate.value, "hits": rate.hits, "n": rate.n, **{k: {"low": a, "high": b} for k, (a, b) in ends.items()}}
