"""The study of a slide model: its numbers by part and by site, its floors, its operating points, and the gap between sites."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from histoscale.eval.mil.bags import Bags
from histoscale.eval.mil.metrics import (
    Metric,
    bounded,
    chance,
    ece_intervals,
    headline,
    metrics,
    ranks_alone,
)
from histoscale.eval.mil.part import Operating, Part, confusion, counts, recalls, why_undefined
from histoscale.eval.mil.split import Plan
from histoscale.eval.mil.task import BinaryTask, ClassesTask, RegressionTask, SurvivalTask, Task
from histoscale.eval.mil.units import Place, Units, places, units
from histoscale.eval.scores.auroc import areas, report_area, report_difference
from histoscale.eval.scores.calibration import reliability
from histoscale.eval.scores.interval import Interval, IntervalConfig, Resampling, independent_difference
from histoscale.eval.scores.operating import Rate, Threshold, answer_of, operate, operation, rate, threshold
from histoscale.eval.scores.ranking import roc_points
from histoscale.eval.scores.rare import OF_EVERY_UNIT, PROPORTIONS, cautious
from histoscale.eval.scores.recalibration import Recalibrated, RecalibrationConfig, local_recalibration


@dataclass(frozen=True)
class StudyConfig:
    """bins: of calibration errors and reliability diagrams. recalibration: on local cases of each external site."""

    bins: int
    recalibration: RecalibrationConfig


@dataclass(frozen=True)
class Study:
    """thresholds: of the deployed trial; of_trials: of every trial that is read, by name, and flagged_by: the share of what it
    reads that each of them flags. train: out-of-fold scores, where the
    deployed thresholds come from. external is None without an external site. sites: of external sites their external part.
    sites_inside: the same sites read by models that knew them, where a plan reads both. gap: internal minus external."""

    task: Task
    kind: str
    groups: str
    thresholds: list[Threshold]
    of_trials: dict[str, list[Threshold]]
    flagged_by: dict[str, list[Rate]]
    train: Part
    internal: Part | None
    external: Part | None
    sites: dict[str, Part]
    sites_inside: dict[str, Part]
    gap: dict[str, Interval]
    external_sites: list[str]
    left_out: dict[str, str]

    @property
    def chance(self) -> float:
        """The headline without any use of the slides."""
        return chance(self.task)

    @property
    def reported(self) -> list[Part]:
        return [part for part in (self.internal, self.external) if part is not None]

    def flagged(self, which: int) -> Rate:
        """What the rule of a requirement flags of all that was read, each unit by the threshold of its trial."""
        read = [each[which] for each in self.flagged_by.values()]
        return rate(sum(one.hits for one in read), sum(one.n for one in read))

    def flags(self, which: int) -> str:
        """`every` or `no` where that rule gives all one answer, else ""."""
        return answer_of(self.thresholds[which], self.flagged(which))

    def as_dict(self) -> dict[str, Any]:
        """The values of `summary.json` under `mil`."""
        named = {at.name: {**asdict(at), "flags": self.flags(k)} for k, at in enumerate(self.thresholds)}
        return {
            "task": self.task.name,
            "kind": self.task.kind,
            "definition": asdict(self.task),
            "split": self.kind,
            "decision": self.task.decision,
            "groups": self.groups,
            "headline": headline(self.task),
            "chance": self.chance,
            "thresholds": named,
            "thresholds_of_trials": {
                name: {at.name: at.value for at in found} for name, found in self.of_trials.items()
            },
            "train": self.train.as_dict(),
            "internal": self.internal.as_dict() if self.internal else None,
            "external": self.external.as_dict() if self.external else None,
            "gap": {name: interval.as_dict() for name, interval in self.gap.items()},
            "sites": {name: part.as_dict() for name, part in self.sites.items()},
            "sites_inside": {name: part.as_dict() for name, part in self.sites_inside.items()},
            "external_sites": self.external_sites,
            "left_out": self.left_out,
        }


def study(
    bags: Bags,
    plan: Plan,
    outputs: np.ndarray,
    floors: Mapping[str, np.ndarray],
    task: Task,
    interval: IntervalConfig,
    config: StudyConfig,
) -> Study:
    """outputs: float64 [T, n, K] by trial and row, out of fold for training rows, NaN where a trial says nothing. floors: other
    outputs of the same shape by name; one that is NaN on a part says nothing about it.

    Thresholds are fixed on each trial's training rows; the other rows are only read. Raises ValueError for outputs that are
    missing where the plan reads, BagError as `units`.
    """
    reads = _Reads(bags, plan, outputs, floors, task, interval, config, trial_thresholds(bags, plan, outputs, task))
    where = {part: places(plan, part) for part in ("train", "internal", "external")}
    internal, external = (reads.part(name, role, where[role]) if where[role] else None for name, role in
                          (("internal test", "internal"), ("external", "external")))  # fmt: skip
    outer, inner = (_by_site(bags, where[role]) for role in ("external", "internal"))
    sites = {site: reads.part(site, "external", found) for site, found in outer.items()}
    sites |= {site: reads.part(site, "internal", found) for site, found in inner.items() if site not in sites}
    inside = {site: reads.part(site, "internal", found) for site, found in inner.items() if site in outer}
    read = {t for role in ("internal", "external") for t, _ in where[role]}
    return Study(
        task=task,
        kind=plan.kind,
        groups=bags.groups,
        thresholds=reads.thresholds[plan.deployed],
        of_trials={plan.trials[t].name: found for t, found in enumerate(reads.thresholds) if found and t in read},
        flagged_by={plan.trials[t].name: reads.flagged_of(t, where) for t in sorted(read) if reads.thresholds[t]},
        train=reads.part("train (out of fold)", "train", where["train"]),
        internal=internal,
        external=external,
        sites=dict(sorted(sites.items())),
        sites_inside=dict(sorted(inside.items())),
        gap=reads.gap(where["internal"], where["external"], internal, external) if internal and external else {},
        external_sites=sorted(outer),
        left_out={**bags.left_out, **plan.left_out},
    )


@dataclass(frozen=True)
class _Reads:
    """Everything that a part is made of but its places."""

    bags: Bags
    plan: Plan
    outputs: np.ndarray
    floors: Mapping[str, np.ndarray]
    task: Task
    interval: IntervalConfig
    config: StudyConfig
    thresholds: list[list[Threshold]]

    def part(self, name: str, role: str, where: Sequence[Place]) -> Part:
        task, found = self.task, units(self.bags, where, self.outputs, self.task)
        if np.isnan(found.outputs).any():
            row = next(i for t, i in where if np.isnan(self.outputs[t, i]).any())
            raise ValueError(f"the model says nothing about {self.bags.rows[row].slide_id}, which {name} holds: read it first")
        draws = Resampling.of(found.groups, self.interval)
        of = metrics(found, task)
        others = {floor: units(self.bags, where, values, task) for floor, values in self.floors.items()}
        others = {floor: other for floor, other in others.items() if not np.isnan(other.outputs).any()}
        rarer = found.rarer(task)
        held = {metric: draws.weighted(statistic) for metric, statistic in of.items() if metric != headline(task)}
        exact = dict.fromkeys(PROPORTIONS, self.interval.level)
        held = {
            metric: one if metric in OF_EVERY_UNIT else cautious(one, rarer, exact.get(metric)) for metric, one in held.items()
        }
        held = {metric: bounded(one, metric) for metric, one in held.items()}
        main, floors, minus = _beside(found, of[headline(task)], others, task, draws)
        if isinstance(task, BinaryTask | ClassesTask):
            held |= ece_intervals(found, task, self.config.bins, self.interval)
        if main is not None:
            held = {headline(task): main, **held}
        known = {metric: value for metric, value in held.items() if not math.isnan(value.value)}
        binary, labels = _binary(task), found.labels if not isinstance(task, RegressionTask | SurvivalTask) else None
        both = binary and labels is not None and 0 < labels.sum() < len(labels)
        return Part(
            name=name,
            role=role,
            slides=found.slides,
            patients=len(set(found.groups)),
            units=len(found.groups),
            counts=counts(found, task),
            headline=main,
            metrics=known,
            withheld={metric: why_undefined(metric, found, task) for metric in of if metric not in known},
            floors=floors,
            minus=minus,
            operating=self._operating(found, draws) if isinstance(task, BinaryTask) else [],
            recalls=recalls(found, task) if isinstance(task, ClassesTask) else {},
            roc=roc_points(found.labels, found.outputs[:, 0]) if both and not found.pooled else None,
            bins=reliability(found.outputs[:, 0], found.labels == 1, self.config.bins) if binary else None,
            confusion=confusion(found, task) if isinstance(task, ClassesTask) else None,
            points=self._points(found),
            recalibration=self._local(found) if binary and role == "external" and self._one_site(where) else [],
        )

    def _points(self, found: Units) -> np.ndarray | None:
        if isinstance(self.task, RegressionTask):
            return np.stack([found.target, found.outputs[:, 0]], 1)
        if not isinstance(self.task, SurvivalTask):
            return None
        middle = {t: np.median(self.outputs[t, list(self.plan.trials[t].train), 0]) for t in np.unique(found.trial).tolist()}
        above = found.outputs[:, 0] > np.array([middle[t] for t in found.trial.tolist()])
        return np.stack([found.target, found.event, above], 1).astype(np.float64)

    def _one_site(self, where: Sequence[Place]) -> bool:
        return len({self.bags.rows[row].site for _, row in where}) == 1

    def _local(self, found: Units) -> list[Recalibrated]:
        config = self.config
        return local_recalibration(found.outputs[:, 0], found.labels, found.groups, config.recalibration, config.bins)

    def gap(self, inside: Sequence[Place], outside: Sequence[Place], internal: Part, external: Part) -> dict[str, Interval]:
        """Internal minus external. Of two sets of patients from their two intervals; of shared patients, who are read by a model
        that knew their site and by one that did not, in shared draws."""
        first, second = (units(self.bags, where, self.outputs, self.task) for where in (inside, outside))
        a, b = self._all(first), self._all(second)
        if set(first.groups) & set(second.groups):
            return _paired_gap(first, second, a, b, self.task, self.interval)
        own = [part.intervals() for part in (internal, external)]
        return {name: independent_difference(own[0][name], own[1][name]) for name in a if name in own[0] and name in own[1]}

    def _all(self, found: Units) -> dict[str, Metric]:
        """Metrics, and the rates of the operating points."""
        of = metrics(found, self.task)
        for k, at in enumerate(self.thresholds[self.plan.deployed]):
            right = (self._flagged(found, k)) == (found.labels == 1)
            for name, side in (("sensitivity", 1), ("specificity", 0)):
                of[f"{name}@{at.name}"] = _share(right, found.labels == side)
        return of

    def _flagged(self, found: Units, which: int) -> np.ndarray:
        """bool [U], each unit by the threshold of its trial."""
        limits = np.array([self.thresholds[t][which].value for t in found.trial], np.float64)
        return found.outputs[:, 0] >= limits

    def flagged_of(self, trial: int, where: Mapping[str, Sequence[Place]]) -> list[Rate]:
        """What the thresholds of a trial flag of all that it reads, internal and external together."""
        own = [place for role in ("internal", "external") for place in where[role] if place[0] == trial]
        found = units(self.bags, own, self.outputs, self.task)
        return [rate(int((found.outputs[:, 0] >= at.value).sum()), len(found.groups)) for at in self.thresholds[trial]]

    def _operating(self, found: Units, draws: Resampling) -> list[Operating]:
        assert isinstance(self.task, BinaryTask)
        operating = []
        for k, (keeps, required) in enumerate(self.task.requirements):
            if found.pooled:
                flagged = self._flagged(found, k)
                done = operation(found.labels == 1, flagged, required, self.task.prevalence, math.nan, keeps)
            else:
                at = self.thresholds[found.trial[0]][k]
                done = operate(found.labels, found.outputs[:, 0], at, self.task.prevalence)
            clustered = self._clustered(found, k) if len(set(found.groups)) < len(found.groups) else {}
            operating.append(Operating(required, done, clustered, keeps))
        return operating

    def _clustered(self, found: Units, which: int) -> dict[str, Interval]:
        """Over the patients who have a unit of that class; the thresholds stay where they are."""
        right = self._flagged(found, which) == (found.labels == 1)
        clustered = {}
        for name, side in (("sensitivity", 1), ("specificity", 0)):
            rows = np.flatnonzero(found.labels == side)
            if len(rows):
                patients = [found.groups[i] for i in rows]
                own = Resampling.of(patients, self.interval).weighted(_share(right[rows], np.ones(len(rows), bool)))
                clustered[name] = bounded(cautious(own, len(set(patients)), self.interval.level), name)
        return clustered


def trial_thresholds(bags: Bags, plan: Plan, outputs: np.ndarray, task: Task) -> list[list[Threshold]]:
    """Of every trial, one a requirement, from its own out-of-fold scores; none without a binary task."""
    if not isinstance(task, BinaryTask):
        return [[] for _ in plan.trials]
    found = []
    for t, trial in enumerate(plan.trials):
        known = units(bags, [(t, i) for i in trial.train], outputs, task)
        scores = known.outputs[:, 0]
        found.append(
            [threshold(known.labels, scores, at, task.rule, known.groups, keeps) for keeps, at in task.requirements]
        )
    return found


def _beside(
    found: Units, metric: Metric, others: Mapping[str, Units], task: Task, draws: Resampling
) -> tuple[Interval | None, dict[str, Interval], dict[str, Interval]]:
    """The headline, the floors' and the differences. One model of two classes: DeLong, by patients Obuchowski; else bootstrap."""
    if isinstance(task, BinaryTask) and not found.pooled:
        if not 0 < found.labels.sum() < len(found.labels):
            return None, {}, {}
        scores = np.stack([found.outputs[:, 0], *[other.outputs[:, 0] for other in others.values()]])
        area, patients, level = areas(found.labels, scores, found.groups), len(set(found.groups)), draws.config.level
        n = len(found.labels)
        beside = {floor: report_area(area, i, patients, n, level) for i, floor in enumerate(others, 1)}
        minus = {floor: report_difference(area, 0, i, patients, n, level) for i, floor in enumerate(others, 1)}
        return report_area(area, 0, patients, n, level), beside, minus
    if isinstance(task, ClassesTask) and len(np.unique(found.labels)) < 2:
        return None, {}, {}
    rarer, name = found.rarer(task), headline(task)
    exact = draws.config.level if name in PROPORTIONS else None
    main = bounded(cautious(draws.weighted(metric), rarer, exact), name)
    if math.isnan(main.value):
        return None, {}, {}
    ranked = {floor: ranks_alone(other, task) for floor, other in others.items()}
    beside = {floor: bounded(cautious(draws.weighted(one), rarer, exact), name) for floor, one in ranked.items()}
    minus = {floor: cautious(draws.weighted(_less(metric, statistic)), rarer, None) for floor, statistic in ranked.items()}
    return main, beside, minus


def _paired_gap(
    first: Units, second: Units, a: Mapping[str, Metric], b: Mapping[str, Metric], task: Task, config: IntervalConfig
) -> dict[str, Interval]:
    draws, n = Resampling.of([*first.groups, *second.groups], config), len(first.groups)

    def less(one: Metric, other: Metric) -> Metric:
        return lambda weights: one(weights[:, :n]) - other(weights[:, n:])

    fewest = min((count for count in (first.rarer(task), second.rarer(task)) if count is not None), default=None)
    found = {name: cautious(draws.weighted(less(a[name], b[name])), fewest, None) for name in a if name in b}
    return {name: interval for name, interval in found.items() if not math.isnan(interval.value)}


def _less(first: Metric, second: Metric) -> Metric:
    return lambda weights: first(weights) - second(weights)


def _share(right: np.ndarray, among: np.ndarray) -> Metric:
    def metric(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return weights @ (right & among).astype(np.float64) / (weights @ among.astype(np.float64))

    return metric


def _by_site(bags: Bags, where: Sequence[Place]) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = {}
    for t, row in where:
        found.setdefault(bags.rows[row].site or "unknown", []).append((t, row))
    return found


def _binary(task: Task) -> bool:
    return isinstance(task, BinaryTask)
