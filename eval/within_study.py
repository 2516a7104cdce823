"""Scores inside studies: where the rate of a label differs between organs, a pooled AUROC rewards telling organs apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from histoscale.eval.datasets.tp53 import StudyPatches
from histoscale.eval.results import Outcome, Score
from histoscale.eval.scores.auroc import auroc
from histoscale.eval.scores.interval import Interval, IntervalConfig, patient_bootstrap

LEAST = 10  # patients of each class in a study (and fold) that counts
_PRIOR_WEIGHT = 1.0  # patients: what a study's rate weighs against a hospital's own


@dataclass(frozen=True)
class Patients:
    """One row a patient. scores: float64 [p], mean logit of the positive class over runs and tiles. cells: fold and study."""

    names: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    folds: np.ndarray
    studies: np.ndarray

    @staticmethod
    def of(patches: StudyPatches, rows: np.ndarray, logs: np.ndarray) -> "Patients":
        """rows: int64 [n] of the patches; logs: [n, 2], log-probabilities (clipped at probability 1e-12)."""
        clipped = np.maximum(logs, math.log(1e-12))
        logits = clipped[:, 1] - clipped[:, 0]
        names, first, patient = np.unique(patches.patients[rows], return_index=True, return_inverse=True)
        scores = np.bincount(patient, weights=logits) / np.bincount(patient)
        at = rows[first]
        outer = patches.usage.choose == "outer"
        folds = patches.blocks[at] if outer else np.full(len(at), "report")
        return Patients(names, patches.labels[at], scores, folds, patches.studies[at])

    def cells(self, least: int) -> dict[str, dict[str, np.ndarray]]:
        """Fold -> study -> rows, of the cells with at least `least` patients of each class."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for fold in np.unique(self.folds):
            for study in np.unique(self.studies):
                rows = np.flatnonzero((self.folds == fold) & (self.studies == study))
                positives = int(self.labels[rows].sum())
                if min(positives, len(rows) - positives) >= least:
                    found.setdefault(str(fold), {})[str(study)] = rows
        return found


def within_study_auroc(patients: Patients, least: int) -> float:
    """AUROC inside each study, meaned over the studies with at least `least` patients of each class in the fold, then over folds.

    NaN where no study has that many.
    """
    folds = [
        np.mean([_area(patients.labels[rows], patients.scores[rows]) for rows in studies.values()])
        for studies in patients.cells(least).values()
    ]
    return float(np.mean(folds)) if folds else math.nan


def within_study_interval(patients: Patients, least: int, config: IntervalConfig) -> Interval:
    """`within_study_auroc` with an interval over patients, drawn inside fold, study and label; all rows decide which cells."""
    cells = patients.cells(least)
    parts = [rows for studies in cells.values() for rows in studies.values()]
    if not parts:
        note = f"interval withheld: no study has {least} patients of each class in a fold"
        return Interval(math.nan, None, None, len(patients.names), len(patients.names), note)
    kept = np.sort(np.concatenate(parts))
    labels = patients.labels[kept]
    names, cell = np.unique(np.stack([patients.folds[kept], patients.studies[kept]]), axis=1, return_inverse=True)
    fold = np.unique(names[0], return_inverse=True)[1]
    # Patients with one score in one cell are a step; the steps of a cell stand together, by rising score.
    steps, step = np.unique(np.stack([cell, patients.scores[kept]]), axis=1, return_inverse=True)
    cell_of_step = steps[0].astype(np.int64)

    def statistic(rows: np.ndarray) -> float:
        positives = np.bincount(step[rows], weights=labels[rows], minlength=len(cell_of_step))
        negatives = np.bincount(step[rows], weights=1 - labels[rows], minlength=len(cell_of_step))
        of_cell = np.bincount(cell_of_step, weights=positives), np.bincount(cell_of_step, weights=negatives)
        earlier = np.cumsum(of_cell[1]) - of_cell[1]  # negatives of the cells before
        below = np.cumsum(negatives) - negatives - earlier[cell_of_step]
        won = np.bincount(cell_of_step, weights=positives * (below + negatives / 2))
        pairs = of_cell[0] * of_cell[1]
        areas = np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)
        return float(np.mean([areas[fold == one].mean() for one in range(fold.max() + 1)]))

    strata = [f"{one}/{label}" for one, label in zip(cell, labels, strict=True)]
    return patient_bootstrap(statistic, patients.names[kept].tolist(), config, strata)


def within_study_scores(
    patches: StudyPatches, outcomes: Sequence[Outcome], about: Score, least: int, config: IntervalConfig
) -> list[Score]:
    """Two scores an outcome: `within_study_auroc`, which ranks, and `pooled_auroc`, which is printed and never ranked.

    about: what the outcome does not say (resolution, effective mpp, floor); its other fields are replaced.
    """
    found = []
    for outcome in outcomes:
        patients = Patients.of(patches, outcome.rows, outcome.logs.mean(axis=0))
        pooled = _area(patients.labels, patients.scores)
        shared = replace(
            about, dataset=patches.name, encoder=outcome.encoder, embedding=outcome.embedding, protocol=outcome.protocol,
            probe=outcome.probe, role=outcome.role, groups=patches.groups, runs=len(outcome.logs), spread=None, minus="",
        )  # fmt: skip
        note = "; ".join(text for text in (outcome.note, *patches.notes) if text)
        within = within_study_interval(patients, least, config)
        found.append(replace(shared, metric="within_study_auroc", interval=within, note=note))
        count = len(patients.names)
        never = Interval(pooled, None, None, count, count, "interval withheld: pooled over studies, never ranked")
        found.append(replace(shared, metric="pooled_auroc", interval=never, note=note))
    return found


def prior_outcomes(patches: StudyPatches) -> list[Outcome]:
    """Floors that see no pixel: a patient's study, and its study and hospital, predict by the rate among the fitting patients.

    Fitted as the honest protocol fits: for `outer`, on the other blocks; else on train, for report. A hospital that was not
    seen gets its study's rate.
    """
    outer = patches.usage.choose == "outer"
    rows = np.arange(len(patches)) if outer else patches.rows("report")
    held = [np.flatnonzero(patches.blocks == block) for block in np.unique(patches.blocks)] if outer else [rows]
    logs = {name: np.zeros((len(patches), 2)) for name in ("study prior", "study and hospital prior")}
    for part in held:
        fitting = np.setdiff1d(np.arange(len(patches)), part) if outer else patches.rows("train")
        _, first = np.unique(patches.patients[fitting], return_index=True)
        seen = fitting[first]  # a row a patient
        everywhere = patches.labels[seen].mean()
        for study in np.unique(patches.studies[part]):
            own = seen[patches.studies[seen] == study]
            rate = (patches.labels[own].sum() + _PRIOR_WEIGHT * everywhere) / (len(own) + _PRIOR_WEIGHT)
            asked = part[patches.studies[part] == study]
            logs["study prior"][asked] = _logs(rate)
            for hospital in np.unique(patches.sites[asked]):
                there = own[patches.sites[own] == hospital]
                local = (patches.labels[there].sum() + _PRIOR_WEIGHT * rate) / (len(there) + _PRIOR_WEIGHT)
                logs["study and hospital prior"][asked[patches.sites[asked] == hospital]] = _logs(local)
    role = "outer" if outer else "report"
    said = "sees no pixel"
    return [Outcome(name, "", "honest", "prior", role, values[None, rows], rows, said) for name, values in logs.items()]


def _logs(rate: float) -> np.ndarray:
    return np.log(np.clip([1 - rate, rate], 1e-12, 1))


def _area(labels: np.ndarray, scores: np.ndarray) -> float:
    return auroc(labels, scores) if 0 < labels.sum() < len(labels) else math.nan
