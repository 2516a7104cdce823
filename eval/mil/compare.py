"""Slide-level runs side by side: the same slides read by several models, subtracted on the same patients."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from histoscale.data.jsonfiles import read_object
from histoscale.data.spreadsheet import read_table
from histoscale.eval.mil.metrics import NAMES, Metric, headline, metrics
from histoscale.eval.mil.task import BinaryTask, ClassesTask, SurvivalTask, Task, TaskConfig
from histoscale.eval.mil.units import Units, joined
from histoscale.eval.runs import RunsError, check_folders
from histoscale.eval.scores.auroc import areas, difference, report_difference
from histoscale.eval.scores.interval import Interval, IntervalConfig, Resampling, independent_difference
from histoscale.eval.scores.mcnemar import holm, mcnemar
from histoscale.eval.scores.operating import rule_name
from histoscale.eval.scores.rare import OF_EVERY_UNIT, cautious

PARTS = ("internal", "external")
SCORES, SUMMARY = "scores.csv", "summary.json"


@dataclass(frozen=True)
class MilRun:
    """What a run of `histoscale mil` left. rows: its slides by part, in the order of their ids. own: its numbers by part
    (internal, external, gap) and metric, as it reported them. split: fixed, folds or sites. notes: what its numbers must not be
    read without (rules that sweep, slides that it lacks, metrics that it withheld)."""

    name: str
    task: Task
    split: str
    groups: str
    encoder: str
    rows: dict[str, list[dict[str, str]]]
    own: dict[str, dict[str, Interval]]
    notes: list[str]

    def units(self, part: str) -> tuple[Units, np.ndarray]:
        """The decisions of a part, and whether each is flagged at each required sensitivity: bool [U, S]."""
        rows, task = self.rows[part], self.task
        trials = {name: i for i, name in enumerate(dict.fromkeys(row["trial"] for row in rows))}
        names = list(task.classes) if isinstance(task, ClassesTask) else []
        found = Units(
            groups=[row["patient_id"] for row in rows],
            target=np.array([names.index(row["label"]) if names else float(row["label"]) for row in rows], np.float64),
            event=np.array([row.get("event", "1") == "1" for row in rows], bool),
            outputs=np.array([[float(row[column]) for column in _columns(task)] for row in rows], np.float64),
            trial=np.array([trials[row["trial"]] for row in rows], np.int64),
            slides=len(rows),
        )
        needed = [rule_name(*one) for one in task.requirements] if isinstance(task, BinaryTask) else []
        flags = np.array([[row[f"flagged_{value}"] == "1" for value in needed] for row in rows], bool).reshape(len(rows), -1)
        if task.decision == "slide":
            return found, flags
        whole = joined(found, task)  # a patient is flagged when any slide is
        place = {pair: i for i, pair in enumerate(zip(whole.trial.tolist(), whole.groups, strict=True))}
        joint = np.zeros((len(whole.groups), flags.shape[1]), bool)
        np.logical_or.at(joint, [place[pair] for pair in zip(found.trial.tolist(), found.groups, strict=True)], flags)
        return whole, joint


@dataclass(frozen=True)
class Difference:
    """A run less the first, in one part and metric, on the same patients. p: two-sided, by DeLong's test, with `holm` over the
    runs of the part; None where only the interval speaks."""

    run: str
    part: str
    metric: str
    interval: Interval
    p: float | None
    holm: float | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "part": self.part,
            "metric": self.metric,
            **self.interval.as_dict(),
            "p": self.p,
            "p_holm": self.holm,
        }


@dataclass(frozen=True)
class DecisionTest:
    """McNemar's exact test of a run against the first. among: the units that it counts. alone: right by the run alone;
    first_alone: right by the first alone; n: all such units. holm: over all tests of a comparison."""

    run: str
    part: str
    among: str
    alone: int
    first_alone: int
    n: int
    p: float
    holm: float


@dataclass(frozen=True)
class Comparison:
    """differences: of every run but the first. gaps: how much each run's gap (internal minus external) is wider than the first's.
    left_out: tests that were not made, and why."""

    runs: list[MilRun]
    differences: list[Difference]
    gaps: list[Difference]
    tests: list[DecisionTest]
    left_out: list[str]

    @property
    def notes(self) -> list[str]:
        """Of all runs, those that several share said once."""
        held: dict[str, list[str]] = {}
        for run in self.runs:
            for note in run.notes:
                held.setdefault(note, []).append(run.name)
        everyone = len(self.runs)
        return [f"{'All runs' if len(names) == everyone else ', '.join(names)}: {note}" for note, names in held.items()]


def is_mil_run(folder: str) -> bool:
    return (Path(folder).expanduser() / SCORES).exists()


def open_mil_runs(folders: Sequence[str]) -> list[MilRun]:
    """Raises RunsError: fewer than two runs or one twice, a file that is missing or broken, runs of other tasks, slides, labels
    or patients than the first's."""
    named = check_folders(folders)
    runs = [_open(name, path) for name, path in named.items()]
    first = runs[0]
    for run in runs[1:]:
        if run.task != first.task:
            raise RunsError(f"{first.name} and {run.name} studied other tasks ({first.task} and {run.task}): compare runs of one")
        for part in PARTS:
            _check_same(first, run, part)
    return runs


def compare_mil(runs: Sequence[MilRun], interval: IntervalConfig, tested: bool) -> Comparison:
    """Every run less the first: metrics on shared draws of patients, AUROC of single models by DeLong (patients: Obuchowski).

    tested: whether single decisions are tested too.
    """
    differences: list[Difference] = []
    tests: list[tuple[str, str, str, int, int, int, float]] = []
    left_out: list[str] = []
    task = runs[0].task
    for part in (part for part in PARTS if runs[0].rows[part]):
        found = [run.units(part) for run in runs]
        differences += _differences(runs, part, [units for units, _ in found], interval)
        if not tested or not isinstance(task, BinaryTask | ClassesTask):
            continue
        if any(len(set(units.groups)) < len(units.groups) for units, _ in found):
            left_out.append(
                f"{part}: patients have several units, which McNemar's test takes for independent ones; it is left out"
            )
            continue
        for run, (units, flags) in zip(runs[1:], found[1:], strict=True):
            for among, own, right, first in _decisions(task, units, flags, *found[0]):
                alone, first_alone, p = mcnemar(right[own], first[own])
                tests.append((run.name, part, among, alone, first_alone, int(own.sum()), p))
    adjusted = holm([test[-1] for test in tests])
    return Comparison(
        runs=list(runs),
        differences=differences,
        gaps=_gaps(runs, differences, interval),
        tests=[DecisionTest(*test, each) for test, each in zip(tests, adjusted, strict=True)],
        left_out=left_out,
    )


def _differences(runs: Sequence[MilRun], part: str, found: Sequence[Units], interval: IntervalConfig) -> list[Difference]:
    task, first = runs[0].task, found[0]
    draws = Resampling.of(first.groups, interval)
    of = [metrics(units, task) for units in found]
    area = _areas(found) if isinstance(task, BinaryTask) else None
    patients, n = len(set(first.groups)), len(first.groups)
    tests = [difference(area, i, 0, interval.level)[3] if area else math.nan for i in range(len(runs))]
    known = [i for i in range(1, len(runs)) if not math.isnan(tests[i])]
    adjusted = dict(zip(known, holm([tests[i] for i in known]), strict=True))
    differences = []
    for i, run in enumerate(runs[1:], 1):
        for metric in of[0]:
            if metric == "auroc" and area is not None:
                less, p = report_difference(area, i, 0, patients, n, interval.level), tests[i] if i in adjusted else None
                differences.append(Difference(run.name, part, metric, less, p, adjusted.get(i)))
                continue
            less = draws.weighted(_less(of[i][metric], of[0][metric]))
            less = less if metric in OF_EVERY_UNIT else cautious(less, first.rarer(task), None)
            if not math.isnan(less.value):
                differences.append(Difference(run.name, part, metric, less, None, None))
    return differences


def _areas(found: Sequence[Units]) -> Any:
    """Of single models on both classes; else None: pairs of several trials are bootstrapped."""
    labels = found[0].labels
    if any(units.pooled for units in found) or not 0 < labels.sum() < len(labels):
        return None
    return areas(labels, np.stack([units.outputs[:, 0] for units in found]), found[0].groups)


def _gaps(runs: Sequence[MilRun], differences: Sequence[Difference], interval: IntervalConfig) -> list[Difference]:
    """(internal − external) of a run less that of the first. Two sets of patients: from the two intervals. Shared patients, by a
    model that knew their site and one that did not: all four readings in shared draws."""
    by = {(one.run, one.part, one.metric): one.interval for one in differences}
    found = []
    shared = {row["patient_id"] for row in runs[0].rows["internal"]} & {row["patient_id"] for row in runs[0].rows["external"]}
    for run in runs[1:]:
        names = [
            metric for name, part, metric in by if name == run.name and part == "internal" and (name, "external", metric) in by
        ]
        if not shared:
            pairs = {metric: [by[run.name, part, metric] for part in PARTS] for metric in names}
            found += [
                Difference(run.name, "gap", metric, independent_difference(*pair), None, None) for metric, pair in pairs.items()
            ]
            continue
        inside, outside = ([one.units(part)[0] for one in (run, runs[0])] for part in PARTS)
        draws, n = Resampling.of([*inside[0].groups, *outside[0].groups], interval), len(inside[0].groups)
        within, beyond = ([metrics(units, run.task) for units in both] for both in (inside, outside))
        for metric in names:
            less = _less(_part_of(_less(within[0][metric], within[1][metric]), slice(None, n)),
                         _part_of(_less(beyond[0][metric], beyond[1][metric]), slice(n, None)))  # fmt: skip
            fewest = min((count for each in (*inside, *outside) if (count := each.rarer(run.task)) is not None), default=None)
            gap = draws.weighted(less)
            gap = gap if metric in OF_EVERY_UNIT else cautious(gap, fewest, None)
            found.append(Difference(run.name, "gap", metric, gap, None, None))
    return found


def _decisions(
    task: Task, units: Units, flags: np.ndarray, first: Units, first_flags: np.ndarray
) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """(among whom, bool [U] who that is, right by the run, right by the first)."""
    if isinstance(task, BinaryTask):
        positive = units.labels == 1
        return [
            (f"{name} units where {keeps} {required:g} is required", own, flags[:, k] == positive, first_flags[:, k] == positive)
            for k, (keeps, required) in enumerate(task.requirements)
            for name, own in (("positive", positive), ("negative", ~positive))
            if own.any()
        ]
    right = [one.outputs.argmax(1) == one.labels for one in (units, first)]
    return [("all units", np.ones(len(units.groups), bool), *right)]


def _less(first: Metric, second: Metric) -> Metric:
    return lambda weights: first(weights) - second(weights)


def _part_of(metric: Metric, where: slice) -> Metric:
    return lambda weights: metric(weights[:, where])


def _columns(task: Task) -> list[str]:
    return [f"score_{name}" for name in task.classes] if isinstance(task, ClassesTask) else ["score"]


def _open(name: str, folder: Path) -> MilRun:
    try:
        found = read_object(folder / SUMMARY)["mil"]
        definition = found["definition"]
        if definition["kind"] == "binary":  # runs of before had rules for sensitivities alone
            definition = {"specificities": [], **definition}
        task: Task = TypeAdapter(TaskConfig).validate_python(definition)
        rows = [row for row in read_table(folder / SCORES) if row["part"] in PARTS]
        needed = {
            "slide_id",
            "patient_id",
            "trial",
            "label",
            *_columns(task),
            *(["event"] if isinstance(task, SurvivalTask) else []),
        }
        absent = sorted(needed - set(rows[0] if rows else needed))
        if absent:
            raise ValueError(f"{SCORES} has no column {', '.join(absent)}")
        own = {part: {metric: Interval(**one) for metric, one in found[part]["metrics"].items()} for part in PARTS if found[part]}
        own["gap"] = {metric: Interval(**one) for metric, one in found["gap"].items()}
        by_part = {part: sorted((row for row in rows if row["part"] == part), key=_slide) for part in PARTS}
        return MilRun(name, task, found["split"], found["groups"], found["encoder_hash"], by_part, own, _notes(found))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RunsError(f"{folder} is no finished run of `histoscale mil` ({what}): run it again") from error


def _notes(found: Mapping[str, Any]) -> list[str]:
    said = [
        f"the rule for {at['keeps']} {at['required']:g} flags {at['flags']} {found['decision']} and sorts nothing"
        for at in found["thresholds"].values()
        if at.get("flags")  # runs of before do not say
    ]
    said += [
        f"{part}: {', '.join(NAMES[metric] for metric in withheld)} withheld ({next(iter(withheld.values()))})"
        for part in PARTS
        if found[part] and (withheld := found[part].get("withheld"))
    ]
    lacks = found.get("absent") or {}
    if lacks.get("why"):
        said.append(f"{len(lacks['why'])} of {lacks['labelled']} labelled slides have no usable store and are in no number")
    return said


def _slide(row: Mapping[str, str]) -> str:
    return row["slide_id"]


def _check_same(first: MilRun, run: MilRun, part: str) -> None:
    facts: dict[str, Callable[[Mapping[str, str]], tuple[str, ...]]] = {
        "labels": lambda row: (row["label"], row.get("event", "")),
        "patients": lambda row: (row["patient_id"],),
    }
    own = [{row["slide_id"]: row for row in one.rows[part]} for one in (first, run)]
    if own[0].keys() != own[1].keys():
        odd = sorted(own[0].keys() ^ own[1].keys())
        raise RunsError(
            f"{first.name} and {run.name} have different {part} slides, {len(odd)} in one alone, such as {odd[0]}: split and "
            "embed the same ones, and compare again"
        )
    for what, fact in facts.items():
        odd = [name for name, row in own[0].items() if fact(row) != fact(own[1][name])]
        if odd:
            raise RunsError(f"{first.name} and {run.name} give {odd[0]} and {len(odd) - 1} more {part} slides other {what}")


def best_known(task: Task) -> list[str]:
    """The metrics of a table, the headline first."""
    order = {
        "binary": ["auroc", "auprc", "balanced_accuracy", "brier", "slope"],
        "classes": ["balanced_accuracy", "macro_f1", "auroc"],
        "regression": ["r2", "pearson", "mae"],
        "survival": ["c_index"],
    }
    return list(dict.fromkeys([headline(task), *order[task.kind]]))
