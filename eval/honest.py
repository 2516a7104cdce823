"""protocol=honest: everything is chosen inside train, and what is reported is not even in reach while it is.

Probes get a `Question`, in which the labels of every row that is asked stand as SEALED; they give log-probabilities. `scoring`
opens the labels afterwards and counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from histoscale.eval.datasets.patches import DatasetError, LabelledPatches
from histoscale.eval.few_shot import FewShotConfig, few_shot
from histoscale.eval.floors import FLOOR_POOLS, FloorsConfig, forest_log_probabilities, plain_log_probabilities
from histoscale.eval.knn import knn_on_features
from histoscale.eval.probe import LinearProbe, ProbeConfig, fit_linear, inner_folds
from histoscale.eval.prototype import prototype_log_probabilities
from histoscale.eval.results import Outcome

SEALED = -1
ASKED = ("report", "external")
PROBES = ("linear", "knn", "prototype", "few_shot")


@dataclass(frozen=True)
class HonestConfig:
    """pools: embeddings that are reported. probes: of PROBES. outer_folds: for sets without a test part; outer_beside: names of
    sets that have one, and are small enough to show the outer folds beside it."""

    pools: list[str]
    probes: list[str]
    few_shot: FewShotConfig
    outer_folds: int
    outer_beside: list[str]


@dataclass(frozen=True)
class Question:
    """What a probe may know of n rows. labels: int64 [n], SEALED where it may not. train, select: rows to learn from and to
    choose on (none: choose by folds of train). asked: by role, the rows to say something of. blocks: [n], what no fold may split;
    units: [n], of few-shot draws: slides, patients or single rows."""

    classes: int
    labels: np.ndarray
    train: np.ndarray
    select: np.ndarray
    asked: dict[str, np.ndarray]
    blocks: np.ndarray
    units: np.ndarray


# features [n, D], question -> by probe and role, log-probabilities [R, m, K]; notes by probe
Answers = tuple[dict[tuple[str, str], np.ndarray], dict[str, str]]


def check_probes(config: HonestConfig) -> None:
    """Raises ValueError for a name that is none of PROBES."""
    for name in config.probes:
        if name not in PROBES:
            raise ValueError(f"honest.probes has {name!r}: expected some of {', '.join(PROBES)}")


def question_of(patches: LabelledPatches) -> Question:
    """The set's own parts. An official part for choosing is that where the set says so, and more of train elsewhere."""
    train, select = patches.rows("train"), patches.rows("select")
    if patches.usage.choose != "select":
        train, select = np.sort(np.concatenate([train, select])), np.empty(0, np.int64)
    asked = {role: patches.rows(role) for role in ASKED if len(patches.rows(role))}
    return _sealed(patches, train, select, asked)


def outer_questions(
    patches: LabelledPatches, folds: int, seed: int, option: str = "honest.outer_folds"
) -> list[Question]:
    """Grouped folds over every labelled row but the external ones: each row is asked once, by the question it is sealed in.
    option: the key that asked for `folds`.

    Raises DatasetError when there is one block, or a class that a fold has to itself; ValueError as `inner_folds`.
    """
    rows = np.flatnonzero((patches.roles != "") & (patches.roles != "external"))
    labels = patches.labels[rows]
    if len(np.unique(patches.blocks[rows])) < 2:
        unit = "unit that no fold may split" if patches.groups == "none" else patches.groups
        raise DatasetError(f"{patches.name} has one {unit}: outer folds need at least two, or name parts to train on")
    outside = inner_folds(labels, patches.blocks[rows], folds, seed, option)
    for held in outside:
        alone = sorted(set(labels[held].tolist()) - set(labels[~held].tolist()))
        if alone:
            name = patches.classes[alone[0]]
            raise DatasetError(f"{patches.name}: all of the class {name!r} is in one fold, where nothing could have learnt it")
    return [_sealed(patches, rows[~held], np.empty(0, np.int64), {"outer": rows[held]}) for held in outside]


def honest(
    features: Sequence[np.ndarray],
    encoder: str,
    embedding: str,
    patches: LabelledPatches,
    config: HonestConfig,
    probe: ProbeConfig,
    device: str | torch.device,
) -> list[Outcome]:
    """Outcomes of every probe on report and external, or of outer folds, of equal encoders (one, or the floor's initialisations).

    features: of each, float32 [n, D] of all rows. Few-shot draws are shared out among the encoders.
    """
    check_probes(config)
    draws = np.array_split(np.arange(config.few_shot.draws), len(features))
    answers = [
        partial(answer, x, config=config, probe=probe, draws=mine.tolist(), device=device)
        for x, mine in zip(features, draws, strict=True)
    ]
    return [Outcome(encoder, embedding, "honest", *rest) for rest in _ask(answers, patches, config, probe.seed)]


def colour_floor(
    features: np.ndarray,
    patches: LabelledPatches,
    config: HonestConfig,
    probe: ProbeConfig,
    floors: FloorsConfig,
    device: str | torch.device,
) -> list[Outcome]:
    """The colours of a patch through the same probes, and a plain logistic regression and a forest in the linear probe's place;
    `scoring` takes the best. A penalty chosen for the log-loss of other patients can undersell colour.

    features: float [n, 42].
    """
    found = honest([features], "colour", "logistic", patches, config, probe, device)

    def other(question: Question, logs_of: Callable[..., list[np.ndarray]]) -> Answers:
        x, y = features[question.train], question.labels[question.train]
        logs = logs_of(x, y, question.classes, [features[rows] for rows in question.asked.values()], floors)
        return {("linear", role): one[None] for role, one in zip(question.asked, logs, strict=True)}, {}

    if "linear" in config.probes:
        for name, logs_of in (("logistic, C = 1", plain_log_probabilities), ("forest", forest_log_probabilities)):
            asked = _ask([partial(other, logs_of=logs_of)], patches, config, probe.seed)
            found += [Outcome("colour", name, "honest", *rest) for rest in asked]
    return found


def random_floor(
    features: dict[str, Sequence[np.ndarray]],
    patches: LabelledPatches,
    config: HonestConfig,
    probe: ProbeConfig,
    device: str | torch.device,
) -> list[Outcome]:
    """Untrained encoders, by pool of FLOOR_POOLS the features of each initialisation; `scoring` takes the better pool."""
    return [
        one for pool in FLOOR_POOLS for one in honest(features[pool], "random", pool, patches, config, probe, device)
    ]  # fmt: skip


def answer(
    features: np.ndarray,
    question: Question,
    config: HonestConfig,
    probe: ProbeConfig,
    draws: list[int],
    device: str | torch.device,
) -> Answers:
    """Everything that the probes say. Nothing in here can know a label of a row that is asked."""
    train, labels, classes = question.train, question.labels[question.train], question.classes
    x = features[train]
    asked = {role: features[rows] for role, rows in question.asked.items()}
    found: dict[tuple[str, str], np.ndarray] = {}
    notes: dict[str, str] = {}
    if "linear" in config.probes:
        fitted = _fit(features, question, probe, device)
        notes["linear"] = "; ".join(filter(None, (f"penalty {fitted.penalty:g}", fitted.note)))
        for role, queries in asked.items():
            found["linear", role] = fitted.log_probabilities(queries)[None]
    for role, queries in asked.items():
        if "knn" in config.probes:
            found["knn", role] = knn_on_features(
                x, labels, classes, queries, probe.neighbours, probe.temperature, device
            )[None]  # fmt: skip
        if "prototype" in config.probes:
            found["prototype", role] = prototype_log_probabilities(x, labels, classes, queries, probe.temperature, device)[None]
    if "few_shot" in config.probes:
        rarest = np.bincount(labels, minlength=classes).min()
        shots = [s for s in config.few_shot.shots if s <= rarest]
        few = replace(config.few_shot, shots=shots)
        units = question.units[train]
        for role, queries in asked.items():
            drawn = few_shot(x, labels, classes, units, queries, few, draws, probe.temperature, device) if shots and draws else {}
            found.update({(name, role): logs for name, logs in drawn.items()})
        scarce = min(len(np.unique(units[labels == c])) for c in range(classes))
        for name in {name for name, _ in found if name.startswith("few_shot")}:
            if int(name.split("/")[1]) > scarce:
                notes[name] = f"a class has images of {scarce} slides or patients: some give a draw more than one"
    return found, notes


def _fit(features: np.ndarray, question: Question, probe: ProbeConfig, device: str | torch.device) -> LinearProbe:
    rows = np.concatenate([question.train, question.select])
    select = None if not len(question.select) else np.arange(len(rows)) >= len(question.train)
    x = features[rows] if len(rows) < len(features) or (np.diff(rows) != 1).any() else features
    return fit_linear(x, question.labels[rows], question.classes, question.blocks[rows], probe, select, device)


def _sealed(patches: LabelledPatches, train: np.ndarray, select: np.ndarray, asked: dict[str, np.ndarray]) -> Question:
    labels = np.full(len(patches), SEALED, np.int64)
    for rows in (train, select):
        labels[rows] = patches.labels[rows]
    if any((labels[rows] != SEALED).any() for rows in asked.values()):
        raise ValueError(f"{patches.name}: rows that are asked are also learnt from")
    known = patches.slide_ids != ""
    single = np.char.add("row ", np.arange(len(patches)).astype(str))
    units = np.where(known, patches.slide_ids, patches.patients if patches.groups != "none" else single)
    return Question(len(patches.classes), labels, train, select, asked, patches.blocks, units)


def _ask(
    answers: Sequence[Callable[[Question], Answers]], patches: LabelledPatches, config: HonestConfig, seed: int
) -> list[tuple[str, str, np.ndarray, np.ndarray, str]]:
    """(probe, role, logs [R, n, K], rows [n], note) of all that was asked."""
    sets = [] if patches.usage.choose == "outer" else [[question_of(patches)]]
    if patches.usage.choose == "outer" or patches.name in config.outer_beside:
        sets.append(outer_questions(patches, config.outer_folds, seed))
    found = []
    for questions in sets:
        given = [[one(question) for one in answers] for question in questions]
        cells = dict.fromkeys(cell for one in given[0] for cell in one[0])  # of the first: some encoders may have had no draw
        for name, role in cells:
            parts = []
            for runs in given:
                have = [cells_of[name, role] for cells_of, _ in runs if (name, role) in cells_of]
                parts.append(np.concatenate(have) if have else None)
            if any(part is None for part in parts):
                continue  # a fold whose rarest class has fewer rows than shots
            rows = np.concatenate([question.asked[role] for question in questions])
            order = np.argsort(rows)
            logs = np.concatenate([part for part in parts if part is not None], 1)[:, order]
            notes = dict.fromkeys(notes.get(name, "") for runs in given for _, notes in runs)
            found.append((name, role, logs, rows[order], "; ".join(filter(None, notes))))
    return found
