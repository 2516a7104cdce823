"""Can a hospital be read from features, and how well beside the biology? Probes of the mean tile, by folds of patients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from histoscale.data.splits import folds
from histoscale.eval.logistic import Rows, Standard, fit
from histoscale.eval.mil.bags import Bags
from histoscale.eval.mil.task import BinaryTask, ClassesTask, SurvivalTask, Task
from histoscale.eval.scores.classification import balanced_accuracy_of
from histoscale.eval.scores.interval import Interval, IntervalConfig, Resampling
from histoscale.eval.scores.rare import cautious


@dataclass(frozen=True)
class DecodabilityConfig:
    """folds: of patients. penalty: of the logistic regression on standardised features, mean log-loss + penalty / 2 ‖W‖².
    tolerance, max_iterations: of its fit. seed: of the folds."""

    folds: int
    penalty: float
    tolerance: float
    max_iterations: int
    seed: int


@dataclass(frozen=True)
class Decoded:
    """Balanced accuracy of one question. asked: what is read, how: by which folds. chance: 1 / classes. confusion: int64 [K, K],
    row = true class."""

    asked: str
    how: str
    classes: tuple[str, ...]
    score: Interval
    chance: float
    confusion: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("asked", "how", "chance")}
        return {**values, "classes": list(self.classes), **self.score.as_dict(), "confusion": self.confusion.tolist()}


@dataclass(frozen=True)
class Decodability:
    """site: the hospital. label: the biology, by patients of the same sites. elsewhere: the biology at a site that the probe
    never saw. Each None where it cannot be asked; withheld says why. association: Cramér's V of site and label, 0 where sites
    do not differ in their labels, 1 where the site says it all."""

    site: Decoded | None
    label: Decoded | None
    elsewhere: Decoded | None
    association: float | None
    withheld: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        asked = {"site": self.site, "label": self.label, "elsewhere": self.elsewhere}
        return {
            **{name: found.as_dict() if found else None for name, found in asked.items()},
            "association": self.association,
            "withheld": self.withheld,
        }


def decodability(bags: Bags, means: np.ndarray, task: Task, interval: IntervalConfig, config: DecodabilityConfig) -> Decodability:
    """means: float [n, D], the mean tile of every row. A description of the encoder and the cohort: nothing is chosen by it, so
    it reads external slides too.

    Numbers are asked as halves (above the median or not), times as an event before the median time. Classes of fewer patients
    than folds are not asked about. Classes weigh the same: log-odds are taken less the log of the training share.
    """
    withheld: dict[str, str] = {}
    sites = np.array([bag.site for bag in bags.rows])
    names, labels = _levels(bags, task)
    site = _asked("site", "hospital", sorted({site for site in sites if site}), sites, bags, means, interval, config, withheld)
    label = _asked("label", task.name, names, labels, bags, means, interval, config, withheld)
    elsewhere = None
    if label is None:
        withheld["elsewhere"] = withheld["label"]
    else:
        elsewhere = _elsewhere(label, sites, labels, bags, means, interval, config, withheld)
    known = (sites != "") & np.isin(labels, names)
    both = len(np.unique(sites[known])) > 1 and len(np.unique(labels[known])) > 1
    return Decodability(site, label, elsewhere, cramers_v(sites[known], labels[known]) if both else None, withheld)


def cramers_v(a: Sequence[str] | np.ndarray, b: Sequence[str] | np.ndarray) -> float:
    """√(χ² / (n (min(rows, columns) − 1))) of two namings of the same units (Cramér 1946), each with two names or more."""
    (_, rows), (_, columns) = (np.unique(np.asarray(names), return_inverse=True) for names in (a, b))
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0) / len(rows)
    chi = ((table - expected) ** 2 / expected).sum()
    return float(np.sqrt(chi / (len(rows) * (min(table.shape) - 1))))


def _levels(bags: Bags, task: Task) -> tuple[list[str], np.ndarray]:
    """Names of the classes, and the one of every row, "" where it has none."""
    rows = range(len(bags.rows))
    target = bags.targets(rows)
    if isinstance(task, BinaryTask):
        return ["negative", "positive"], np.where(target == 1, "positive", "negative")
    if isinstance(task, ClassesTask):
        names = np.array(list(task.classes))
        return names.tolist(), names[target.astype(np.int64)]
    middle = float(np.median(target))
    if not isinstance(task, SurvivalTask):
        return ["lower half", "upper half"], np.where(target > middle, "upper half", "lower half")
    event = bags.events(rows)
    early, late = f"event by {middle:g}", f"none by {middle:g}"
    return [early, late], np.where(target > middle, late, np.where(event, early, ""))


def _asked(
    question: str,
    asked: str,
    names: Sequence[str],
    of: np.ndarray,
    bags: Bags,
    means: np.ndarray,
    interval: IntervalConfig,
    config: DecodabilityConfig,
    withheld: dict[str, str],
) -> Decoded | None:
    patients = {name: {bag.group for bag, own in zip(bags.rows, of, strict=True) if own == name} for name in names}
    kept = [name for name in names if len(patients[name]) >= config.folds]
    if len(kept) < 2:
        withheld[question] = f"{len(kept)} of {len(names)} classes have {config.folds} patients or more, one a fold"
        return None
    few = [name for name in names if name not in kept]
    if few:
        withheld[f"{question}: {', '.join(few[:5])}{' …' if len(few) > 5 else ''}"] = f"fewer than {config.folds} patients"
    rows = np.flatnonzero(np.isin(of, kept))
    groups = [bags.rows[i].group for i in rows]
    place = np.array(folds(groups, config.folds, config.seed, of[rows].tolist()))
    return _read(asked, f"{config.folds} folds of patients", kept, of[rows], groups, place, means[rows], interval, config)


def _elsewhere(
    label: Decoded,
    sites: np.ndarray,
    labels: np.ndarray,
    bags: Bags,
    means: np.ndarray,
    interval: IntervalConfig,
    config: DecodabilityConfig,
    withheld: dict[str, str],
) -> Decoded | None:
    rows = np.flatnonzero(np.isin(labels, label.classes) & (sites != ""))
    held = {site: labels[rows][sites[rows] != site] for site in np.unique(sites[rows])}
    usable = [site for site, others in held.items() if set(others) == set(label.classes)]
    if len(held) < 2 or len(usable) < len(held):
        why = "one site" if len(held) < 2 else "without one of the sites a class is gone"
        withheld["elsewhere"] = f"a site cannot be left out: {why}"
        return None
    _, place = np.unique(sites[rows], return_inverse=True)
    groups = [bags.rows[i].group for i in rows]
    return _read(
        label.asked, "each site by the others", label.classes, labels[rows], groups, place, means[rows], interval, config
    )


def _read(
    asked: str,
    how: str,
    names: Sequence[str],
    of: np.ndarray,
    groups: Sequence[str],
    place: np.ndarray,
    means: np.ndarray,
    interval: IntervalConfig,
    config: DecodabilityConfig,
) -> Decoded:
    """place: the fold of every row, read by a regression of the others. A class that is absent there keeps a share of one row."""
    classes = len(names)
    y = np.array([list(names).index(name) for name in of])
    inside = place != np.arange(place.max() + 1)[:, None]
    features = np.asarray(means, np.float64)
    standard = Standard.of(features)  # of all rows: it knows no class
    rows = Rows.of(features, standard, "cpu")
    weights, bias = fit(
        rows, y, classes, config.penalty, inside, config.tolerance, config.max_iterations, None
    ).weights(rows)  # fmt: skip
    logits = np.einsum("nd,ndk->nk", standard(features), weights[place]) + bias[place]
    shares = np.stack([np.bincount(y[own], minlength=classes) for own in inside]).clip(1) / inside.sum(1)[:, None]
    named = (logits - np.log(shares)[place]).argmax(1)
    draws = Resampling.of(groups, interval)
    counts = np.eye(classes * classes)[y * classes + named]
    score = draws.interval(draws.sums(counts), lambda sums: balanced_accuracy_of(sums.reshape(-1, classes, classes)))
    fewest = min(len({group for group, own in zip(groups, y.tolist(), strict=True) if own == c}) for c in range(classes))
    score = cautious(score, fewest, interval.level)
    confusion = counts.sum(0).reshape(classes, classes).astype(np.int64)
    return Decoded(asked, how, tuple(names), score, 1 / classes, confusion)
