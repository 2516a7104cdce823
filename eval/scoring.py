"""Decisions against the truth: the only place where labels of reported rows are read, and it counts how often."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.results import Outcome, Score
from histoscale.eval.scores import summed
from histoscale.eval.scores.interval import Interval, IntervalConfig, Weighted, weighted_bootstrap

FLOORS = ("random", "colour")
PAIRED = ("balanced_accuracy", "auroc")
HARD = ("forest", "knn")  # their shares are exactly 0 too often for a log-loss


@dataclass(frozen=True)
class About:
    """How images were seen. effective_mpp, field_um: by encoder, None where unknown."""

    resolution: str
    effective_mpp: Mapping[str, float | None]
    field_um: Mapping[str, float | None]


def scores_of(
    outcomes: Sequence[Outcome], patches: LabelledPatches, about: About, interval: IntervalConfig
) -> tuple[list[Score], dict[str, int]]:
    """Every score of every outcome with its interval over patients, and paired differences of encoders to each floor.

    Also how many outcomes each role's labels were compared with, `role -> reads`.
    """
    found: list[Score] = []
    reads: dict[str, int] = {}
    places: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        places.setdefault((outcome.protocol, outcome.probe, outcome.role), []).append(outcome)
    for (_, probe, role), row in places.items():
        reads[role] = reads.get(role, 0) + len(row)
        if probe.startswith("few_shot"):
            found += [score for outcome in row for score in _over_draws(outcome, patches, about, interval)]
            continue
        statistics = [metrics_of(outcome, patches) for outcome in row]
        for outcome, own in zip(row, statistics, strict=True):
            for metric, probes in own.items():
                value = weighted_bootstrap(summed.mean_of(probes), patches.patients[outcome.rows], interval)
                spread = _spread([float(probe(_ones(patches, outcome))[0]) for probe in probes])
                found.append(_score(outcome, patches, about, metric, value, len(probes), spread, ""))
        for outcome, own in zip(row, statistics, strict=True):
            if outcome.encoder in FLOORS:
                continue
            for floor, theirs in zip(row, statistics, strict=True):
                if floor.encoder not in FLOORS:
                    continue
                for metric in [name for name in PAIRED if name in own and name in theirs]:
                    pair = summed.difference_of(summed.mean_of(own[metric]), summed.mean_of(theirs[metric]))
                    value = weighted_bootstrap(pair, patches.patients[outcome.rows], interval)
                    found.append(_score(outcome, patches, about, metric, value, len(own[metric]), None, floor.encoder))
    return found, reads


def metrics_of(outcome: Outcome, patches: LabelledPatches) -> dict[str, list[Weighted]]:
    """By metric, one statistic of weights for each of the R probes."""
    labels, codes = patches.labels[outcome.rows], summed.patient_codes(patches.patients[outcome.rows])
    classes, positive = len(patches.classes), patches.usage.positive
    place = patches.classes.index(positive) if positive is not None else None
    if place is None and classes == 2:
        place = 1
    found: dict[str, list[Weighted]] = {}
    for logs, predicted in zip(outcome.logs, outcome.predicted, strict=True):
        own: dict[str, Weighted] = {
            "balanced_accuracy": summed.balanced_accuracy(labels, predicted, codes, classes),
            "accuracy": summed.accuracy(labels, predicted, codes, classes),
            "macro_f1": summed.macro_f1(labels, predicted, codes, classes),
        }
        if place is None:
            own["auroc"] = summed.auroc_one_vs_rest(labels, logs, codes)
        else:
            truth = labels == place
            own["auroc"] = summed.auroc(truth, logs[:, place] - logs[:, 1 - place], codes)
            own["f1"] = summed.f1(labels, predicted, codes, classes, place)
            if outcome.probe == "linear" and outcome.embedding not in HARD:
                own["brier"] = summed.brier(truth, np.exp(logs[:, place]), codes)
                own["ece"] = summed.calibration_error(truth, np.exp(logs[:, place]), codes)
        if patches.usage.ordered:
            own["quadratic_kappa"] = summed.quadratic_kappa(labels, predicted, codes, classes)
        if outcome.probe == "linear" and outcome.embedding not in HARD:
            own["log_loss"] = summed.log_loss(labels, logs, codes)
        for metric, statistic in own.items():
            found.setdefault(metric, []).append(statistic)
    return found


def _over_draws(outcome: Outcome, patches: LabelledPatches, about: About, interval: IntervalConfig) -> list[Score]:
    """Mean over draws and the middle of their values: what another draw of shots may give, with these patients."""
    found = []
    for metric, probes in metrics_of(outcome, patches).items():
        if metric not in PAIRED:
            continue
        values = np.array([float(probe(_ones(patches, outcome))[0]) for probe in probes])
        tail = (1 - interval.level) / 2
        low, high = np.quantile(values, [tail, 1 - tail]).tolist() if len(values) > 1 else (None, None)
        patients = len(np.unique(patches.patients[outcome.rows]))
        note = f"the interval is over {len(values)} draws of shots, not over patients"
        value = Interval(float(values.mean()), low, high, patients, len(outcome.rows), note)
        found.append(_score(outcome, patches, about, metric, value, len(values), _spread(values.tolist()), ""))
    return found


def _score(
    outcome: Outcome,
    patches: LabelledPatches,
    about: About,
    metric: str,
    value: Interval,
    runs: int,
    spread: float | None,
    minus: str,
) -> Score:
    return Score(
        dataset=patches.name,
        encoder=outcome.encoder,
        embedding=outcome.embedding,
        resolution=about.resolution,
        protocol=outcome.protocol,
        probe=outcome.probe,
        role=outcome.role,
        metric=metric,
        interval=value,
        groups=patches.groups,
        runs=runs,
        spread=spread,
        effective_mpp=about.effective_mpp.get(outcome.encoder),
        field_um=about.field_um.get(outcome.encoder),
        floor=outcome.encoder in FLOORS,
        minus=minus,
        note=outcome.note if not minus else "",
    )


def _ones(patches: LabelledPatches, outcome: Outcome) -> np.ndarray:
    return np.ones((1, len(np.unique(patches.patients[outcome.rows]))))


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
