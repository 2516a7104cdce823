"""protocol=honest: probes that never see a label of the rows that they are scored on.

Labels of reported rows are taken out before anything is fitted (`material`), so that no choice can read them; what comes back
are log-probabilities, which `scoring` compares with the truth, once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from histoscale.eval.datasets.patches import DatasetError, LabelledPatches
from histoscale.eval.few_shot import FewShotConfig, few_shot_log_probabilities
from histoscale.eval.knn import knn_on_features
from histoscale.eval.probe import ProbeConfig, fit_linear, inner_folds
from histoscale.eval.prototype import prototype_log_probabilities
from histoscale.eval.results import Outcome

UNKNOWN = -1  # the label of a row that nothing may be learnt from
REPORTED = ("report", "external")


@dataclass(frozen=True)
class Part:
    """One fit. learn, select: rows that are fitted on, and of an official part that chooses (none: folds inside learn choose).
    asked: role -> rows to predict."""

    learn: np.ndarray
    select: np.ndarray
    asked: dict[str, np.ndarray]


@dataclass(frozen=True)
class Material:
    """What may be learnt from. labels: int64 [n], UNKNOWN outside of it. blocks: what no fold may split, patients: what shots
    are drawn from. parts: one, or the outer folds."""

    labels: np.ndarray
    classes: int
    blocks: np.ndarray
    patients: np.ndarray
    parts: list[Part]


def material(patches: LabelledPatches, config: ProbeConfig) -> Material:
    """The set with the labels of reported rows taken out, cut as its `usage.choose` says.

    `folds` learns from train and, where there is one, the official part for selection. With `outer` each part learns from the
    labelled rows of all other folds, whose labels are known in `labels` and seen only through `Part.learn`.
    Raises DatasetError when an outer fold lacks a class.
    """
    roles, choose = patches.roles, patches.usage.choose
    train, select = patches.rows("train"), patches.rows("select")
    asked = {role: patches.rows(role) for role in REPORTED if len(patches.rows(role))}
    none = np.empty(0, np.int64)
    if choose == "outer":
        parts = _outer(patches, config)
        known = roles != ""
    else:
        learn = np.sort(np.concatenate([train, select])) if choose == "folds" else train
        parts = [Part(learn, select if choose == "select" else none, asked)]
        known = np.isin(roles, ("train", "select"))
    labels = np.where(known, patches.labels, UNKNOWN)
    return Material(labels, len(patches.classes), patches.blocks, patches.patients, parts)


def _outer(patches: LabelledPatches, config: ProbeConfig) -> list[Part]:
    rows = np.flatnonzero(patches.roles != "")
    labels, blocks = patches.labels[rows], patches.blocks[rows]
    if len(np.unique(blocks)) < 2:
        raise DatasetError(f"{patches.name} has one {patches.groups}: outer folds need at least two, or parts of their own")
    parts = []
    for held in inner_folds(labels, blocks, config.folds, config.seed):
        lacking = sorted(set(labels[held].tolist()) - set(labels[~held].tolist()))
        if lacking:
            name = patches.classes[lacking[0]]
            raise DatasetError(f"{patches.name}: all of the class {name!r} is in one fold, where nothing could have learnt it")
        parts.append(Part(rows[~held], np.empty(0, np.int64), {"outer": rows[held]}))
    return parts


def honest(
    features: np.ndarray,
    encoder: str,
    embedding: str,
    known: Material,
    config: ProbeConfig,
    few_shot: FewShotConfig,
    device: str | torch.device,
) -> tuple[list[Outcome], list[str]]:
    """Linear, kNN and prototype probes, and those on a few images of each class.

    features: [n, D] of all rows. -> outcomes of report and external, or of outer; and remarks on what was left out.
    """
    pieces: dict[tuple[str, str], list[Piece]] = {}
    left_out: list[int] = []
    for part in known.parts:
        probes = _fitted(features, known, part, config, device)
        rarest = int(np.bincount(known.labels[part.learn], minlength=known.classes).min())
        left_out += [shots for shots in few_shot.shots if shots > rarest]
        probes |= _few(features, known, part, [shots for shots in few_shot.shots if shots <= rarest], few_shot)
        for role, rows in part.asked.items():
            for probe, predict in probes.items():
                logs, note = predict(features[rows])
                pieces.setdefault((probe, role), []).append(Piece(rows, logs, note))
    folds = {role: sum(role in part.asked for part in known.parts) for _, role in pieces}
    outcomes = [
        _outcome(encoder, embedding, probe, role, parts)
        for (probe, role), parts in pieces.items()
        if len(parts) == folds[role]  # a number of shots that one outer fold cannot give is left out altogether
    ]
    remark = f"no probe on {', '.join(map(str, sorted(set(left_out))))} images of each class: a class has fewer to learn from"
    return outcomes, [remark] if left_out else []


@dataclass(frozen=True)
class Piece:
    """Predictions of one part. rows: int64 [m]; logs: float64 [R, m, K]."""

    rows: np.ndarray
    logs: np.ndarray
    note: str


Predict = Callable[[np.ndarray], tuple[np.ndarray, str]]  # [m, D] -> float64 [R, m, K], a note


def _fitted(
    features: np.ndarray, known: Material, part: Part, config: ProbeConfig, device: str | torch.device
) -> dict[str, Predict]:
    x, y = features[part.learn], known.labels[part.learn]
    both = np.concatenate([part.learn, part.select])
    chooses = np.arange(len(both)) >= len(part.learn) if len(part.select) else None
    fitted = fit_linear(features[both], known.labels[both], known.classes, known.blocks[both], config, chooses, device)
    k, t = config.neighbours, config.temperature
    return {
        "linear": lambda asked: (fitted.log_probabilities(asked)[None], fitted.note),
        "knn": lambda asked: (knn_on_features(x, y, known.classes, asked, k, t, device)[None], ""),
        "prototype": lambda asked: (prototype_log_probabilities(x, y, known.classes, asked, t)[None], ""),
    }


def _few(
    features: np.ndarray, known: Material, part: Part, numbers: Sequence[int], config: FewShotConfig
) -> dict[str, Predict]:
    """Two probes for every number of shots, from the rows that are fitted on."""
    x, y, patients = features[part.learn], known.labels[part.learn], known.patients[part.learn]

    def predict(shots: int, linear: bool, asked: np.ndarray) -> tuple[np.ndarray, str]:
        return few_shot_log_probabilities(x, y, patients, known.classes, asked, shots, linear, config)

    found: dict[str, Predict] = {}
    for shots in numbers:
        found[f"few_shot/{shots}"] = partial(predict, shots, False)
        found[f"few_shot_linear/{shots}"] = partial(predict, shots, True)
    return found


def _outcome(encoder: str, embedding: str, probe: str, role: str, parts: Sequence[Piece]) -> Outcome:
    """The pieces of one probe together, in the order of rows."""
    rows, logs = np.concatenate([p.rows for p in parts]), np.concatenate([p.logs for p in parts], axis=1)
    order = np.argsort(rows, kind="stable")
    note = "; ".join(dict.fromkeys(filter(None, (p.note for p in parts))))
    return Outcome(encoder, embedding, "honest", probe, role, logs[:, order], rows[order], note)
