"""How far a probe that was fitted on clean patches falls when the tested ones change, and how far their embeddings move."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.data.keys import key, permutation
from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.honest import Question, outer_questions, question_of
from histoscale.eval.probe import LinearProbe, ProbeConfig, fit_linear
from histoscale.eval.robustness.findings import Finding
from histoscale.eval.scores.classification import balanced_accuracy_of
from histoscale.eval.scores.interval import IntervalConfig, Resampling
from histoscale.eval.scores.rare import of_classes

CLEAN = "clean"
CURVES = ("balanced_accuracy", "cosine_to_clean")  # what `curve` finds


@dataclass(frozen=True)
class CurvesConfig:
    """rows: of each role at most so many are perturbed, drawn by key; null: all. folds: where the set has no tested part."""

    rows: int | None
    folds: int


@dataclass(frozen=True)
class Probed:
    """One encoder: a probe for each question (one, or one a fold), fitted on clean training rows."""

    probes: tuple[LinearProbe, ...]
    questions: tuple[Question, ...]
    note: str

    def predicted(self, features: np.ndarray, places: np.ndarray, role: str) -> np.ndarray:
        """Classes int64 [m] of the asked rows of `role`. features: of rows `places` [m] (sorted), perturbed or not."""
        called = np.full(len(places), -1)
        for probe, question in zip(self.probes, self.questions, strict=True):
            mine = np.flatnonzero(np.isin(places, question.asked[role]))
            called[mine] = probe.log_probabilities(features[mine]).argmax(1)
        return called


def questions_of(patches: LabelledPatches, folds: int, seed: int) -> list[Question]:
    """The set's own parts, or outer folds where it has no tested part."""
    if patches.usage.choose != "outer":
        return [question_of(patches)]
    return outer_questions(patches, folds, seed, "curves.folds")


def fit_probes(features: np.ndarray, questions: Sequence[Question], probe: ProbeConfig, device: str) -> Probed:
    """features: clean, [n, D] of all rows."""
    fitted = []
    for question in questions:
        rows = np.concatenate([question.train, question.select])
        select = np.arange(len(rows)) >= len(question.train) if len(question.select) else None
        labels, blocks = question.labels[rows], question.blocks[rows]
        fitted.append(fit_linear(features[rows], labels, question.classes, blocks, probe, select, device))
    notes = dict.fromkeys(one.note for one in fitted if one.note)
    return Probed(tuple(fitted), tuple(questions), "; ".join(notes))


@dataclass(frozen=True)
class Asked:
    """Rows of one role that are tested: int64 [m], sorted; what an interval draws them by; how they are named in words."""

    role: str
    rows: np.ndarray
    labels: np.ndarray
    draws: Resampling
    groups: str


def asked_rows(
    patches: LabelledPatches,
    questions: Sequence[Question],
    owners: np.ndarray,
    groups: str,
    most: int | None,
    interval: IntervalConfig,
) -> list[Asked]:
    """By role, at most `most` rows drawn by key (null: all)."""
    found = []
    for role in dict.fromkeys(role for question in questions for role in question.asked):
        rows = np.sort(np.concatenate([question.asked[role] for question in questions]))
        if most is not None and len(rows) > most:
            rows = np.sort(rows[permutation(key(interval.seed, f"robustness/{role}"), len(rows))[:most]])
        found.append(Asked(role, rows, patches.labels[rows], Resampling.of(owners[rows], interval), groups))
    return found


def curve(
    name: str,
    floor: bool,
    normalise: str,
    probed: Probed,
    asked: Asked,
    clean: np.ndarray,
    changed: Mapping[str, np.ndarray],
    classes: int,
) -> list[Finding]:
    """Balanced accuracy at `clean` and each condition, its paired difference to clean, and the cosine to the clean embedding.

    clean: [m, D] of the asked rows; changed: condition -> the like.
    """
    found = []
    first = _counts(probed.predicted(clean, asked.rows, asked.role), asked, classes)

    def add(measure: str, condition: str, sums: np.ndarray, of: Callable[[np.ndarray], np.ndarray], minus: str = "") -> None:
        words = ", ".join((asked.role, condition))
        interval = asked.draws.interval(sums, of)
        unchanged = minus and interval.low == interval.high == 0 and len(np.unique(asked.labels)) > 1
        if measure == "balanced_accuracy" and not unchanged:
            level = None if minus else asked.draws.config.level
            interval = of_classes(interval, asked.labels, asked.draws.codes, level)
        note = probed.note if condition == CLEAN else ""
        found.append(Finding(measure, name, normalise, words, interval, asked.groups, floor, minus=minus, note=note))

    add("balanced_accuracy", CLEAN, first, lambda totals: _accuracy(totals, classes))
    for condition, features in changed.items():
        here = _counts(probed.predicted(features, asked.rows, asked.role), asked, classes)
        add("balanced_accuracy", condition, here, lambda totals: _accuracy(totals, classes))
        both = np.concatenate([here, first], 1)
        add("balanced_accuracy", condition, both, lambda totals: _difference(totals, classes), CLEAN)
        near = cosine(clean, features)
        sums = asked.draws.sums(np.stack([near, np.ones(len(near))], 1))
        add("cosine_to_clean", condition, sums, lambda totals: totals[..., 0] / totals[..., 1])
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of rows [n, D] and [n, D]: float64 [n]. Lengths are taken out first: products of half floats overflow."""
    a, b = (x.astype(np.float64) / np.maximum(np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), 1e-12) for x in (a, b))
    return (a * b).sum(1)


def _counts(predicted: np.ndarray, asked: Asked, classes: int) -> np.ndarray:
    """Confusion counts of each owner: float64 [P, K * K]."""
    owners = int(asked.draws.codes.max()) + 1
    places = (asked.draws.codes * classes + asked.labels) * classes + predicted
    return np.bincount(places, minlength=owners * classes**2).reshape(owners, -1).astype(np.float64)


def _accuracy(totals: np.ndarray, classes: int) -> np.ndarray:
    return balanced_accuracy_of(totals.reshape(*totals.shape[:-1], classes, classes))


def _difference(totals: np.ndarray, classes: int) -> np.ndarray:
    here, clean = np.split(totals, 2, axis=-1)
    return _accuracy(here, classes) - _accuracy(clean, classes)
