"""An encoder beside its floors on labelled patches: scores, intervals over patients, and paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.features import Vectors
from histoscale.eval.floors import FLOOR_POOLS, Calls, FloorsConfig, better, forest_log_probabilities
from histoscale.eval.knn import knn_on_features
from histoscale.eval.probe import LinearProbe, ProbeConfig, fit_linear
from histoscale.eval.scores.classification import auroc_one_vs_rest, confusion, log_loss, macro_f1, recalls
from histoscale.eval.scores.interval import Interval, IntervalConfig, paired_difference, patient_bootstrap

PROBES = ("linear", "knn")
NAMES = ("pretrained", "random", "colour")
Cell = tuple[str, str]  # probe, role


@dataclass(frozen=True)
class Comparison:
    """calls: by name, then (probe, role). scores and differences: balanced accuracy, by (name, probe, role).
    penalty: chosen for the pretrained linear probe."""

    patches: LabelledPatches
    calls: dict[str, dict[Cell, Calls]]
    scores: dict[tuple[str, str, str], Interval]
    differences: dict[tuple[str, str, str], Interval]
    penalty: float
    notes: list[str]

    def summary(self) -> dict[str, Any]:
        """The linear probe on the internal test at the top, then `knn`, and `external` inside each."""
        found: dict[str, Any] = {
            "dataset": self.patches.name,
            "data_hash": self.patches.hash,
            "classes": list(self.patches.classes),
            "groups": self.patches.groups,
            "train_patches": len(self.patches.rows("train")),
            "train_patients": len(set(self.patches.patients[self.patches.rows("train")])),
            "penalty": self.penalty,
            "notes": self.notes,
        }
        for probe in PROBES:
            place = found if probe == "linear" else found.setdefault("knn", {})
            for role in ("report", "external"):
                if not any((name, probe, role) in self.scores for name in NAMES):
                    continue
                inner = place if role == "report" else place.setdefault("external", {})
                for name in NAMES:
                    if (name, probe, role) in self.scores:
                        inner[name] = self._row(name, probe, role)
                    if (name, probe, role) in self.differences:
                        inner[f"pretrained_minus_{name}"] = self.differences[name, probe, role].as_dict()
        return found

    def _row(self, name: str, probe: str, role: str) -> dict[str, Any]:
        calls, interval = self.calls[name][probe, role], self.scores[name, probe, role].as_dict()
        labels, classes = self.patches.labels[self.patches.rows(role)], self.patches.classes
        value = interval.pop("value")
        with np.errstate(invalid="ignore"):
            recall = np.mean([recalls(labels, row, len(classes)) for row in calls.predicted], axis=0)
        row = {
            "balanced_accuracy": value,
            **interval,
            "how": calls.how,
            "macro_f1": float(np.mean([macro_f1(labels, row, len(classes)) for row in calls.predicted])),
            "auroc": float(np.mean([auroc_one_vs_rest(np.exp(logs), labels) for logs in calls.logs])),
            "recall": dict(zip(classes, recall.tolist(), strict=True)),
        }
        if probe == "linear" and calls.how != "forest":  # votes of trees and of neighbours are exactly 0 too often for a log-loss
            row["log_loss"] = float(np.mean([log_loss(logs, labels) for logs in calls.logs]))
        if len(calls.logs) == 1:
            row["confusion"] = confusion(labels, calls.predicted[0], len(classes)).tolist()
        else:
            row["initialisations"] = [calls_of_one.balanced_accuracy(labels) for calls_of_one in calls.each()]
        return row

    def table(self) -> str:
        """What the terminal shows."""
        lines = []
        for role, title in (("report", "internal test"), ("external", "external site")):
            for probe in PROBES:
                rows = [(name, self.scores[name, probe, role]) for name in NAMES if (name, probe, role) in self.scores]
                if not rows:
                    continue
                size = f"{rows[0][1].units} patches of {rows[0][1].patients} {self._units()}"
                lines.append(f"{title}, {probe} probe: balanced accuracy, {size}")
                for name, score in rows:
                    line = f"  {name:<11}{score}  {self.calls[name][probe, role].how}"
                    if (name, probe, role) in self.differences:
                        line = f"{line:<58} pretrained − {name}: {self.differences[name, probe, role]}"
                    lines.append(line)
                lines += [f"  ! {note}" for note in sorted({score.note for _, score in rows if score.note})]
        return "\n".join(lines + [f"! {note}" for note in self.notes])

    def _units(self) -> str:
        return "patches" if self.patches.groups == "none" else f"{self.patches.groups}s"


def compare(
    pretrained: Vectors,
    untrained: Sequence[Vectors],
    colour: Vectors,
    patches: LabelledPatches,
    probe: ProbeConfig,
    floors: FloorsConfig,
    interval: IntervalConfig,
) -> Comparison:
    """Fit every probe on train alone, then score report and external. `untrained` may be empty (`colour` has no architecture)."""
    truth = {role: patches.labels[patches.rows(role)] for role in ("report", "external") if len(patches.rows(role))}
    notes = []
    own, fitted = _calls([pretrained.pooled(probe.pool)], probe.pool, patches, probe)
    calls = {"pretrained": own}
    notes += [one.note for one in fitted if one.note]
    if untrained:
        pools = [_calls([v.pooled(pool) for v in untrained], pool, patches, probe)[0] for pool in FLOOR_POOLS]
        calls["random"] = {cell: better([calls[cell] for calls in pools], truth[cell[1]]) for cell in pools[0]}
    else:
        notes.append("no random floor: this encoder has no architecture that could be left untrained")
    calls["colour"] = _colour_calls(colour, patches, probe, floors, truth)
    if patches.groups == "none":
        notes.append("groups: none; no patients are known, so intervals take every patch as independent and are too narrow")
    if "external" not in truth:
        notes.append("no external site: nothing is said about other hospitals")

    scores: dict[tuple[str, str, str], Interval] = {}
    differences: dict[tuple[str, str, str], Interval] = {}
    for name, cells in calls.items():
        for (kind, role), found in cells.items():
            patients = patches.patients[patches.rows(role)]
            scores[name, kind, role] = patient_bootstrap(found.statistic(truth[role]), patients, interval)
            if name != "pretrained":
                mine = calls["pretrained"][kind, role].statistic(truth[role])
                differences[name, kind, role] = paired_difference(mine, found.statistic(truth[role]), patients, interval)
    return Comparison(patches, calls, scores, differences, fitted[0].penalty, notes)


def _calls(
    features: Sequence[np.ndarray], how: str, patches: LabelledPatches, config: ProbeConfig
) -> tuple[dict[Cell, Calls], list[LinearProbe]]:
    """Linear and kNN decisions on report and external of equal probes on each of the feature matrices [n, D]."""
    train, classes = patches.rows("train"), len(patches.classes)
    labels, groups = patches.labels[train], patches.patients[train]
    roles = [role for role in ("report", "external") if len(patches.rows(role))]
    logs: dict[Cell, list[np.ndarray]] = {(kind, role): [] for kind in PROBES for role in roles}
    probes = []
    for x in features:
        fitted = fit_linear(x[train], labels, classes, groups, config)
        for role in roles:
            queries = x[patches.rows(role)]
            logs["linear", role].append(fitted.log_probabilities(queries))
            logs["knn", role].append(
                knn_on_features(x[train], labels, classes, queries, config.neighbours, config.temperature)
            )
        probes.append(fitted)
    return {cell: Calls(np.stack(rows), how) for cell, rows in logs.items()}, probes


def _colour_calls(
    colour: Vectors, patches: LabelledPatches, probe: ProbeConfig, floors: FloorsConfig, truth: dict[str, np.ndarray]
) -> dict[Cell, Calls]:
    calls, _ = _calls([colour.cls], "logistic", patches, probe)
    train = patches.rows("train")
    forest = forest_log_probabilities(
        colour.cls[train], patches.labels[train], len(patches.classes), [colour.cls[patches.rows(role)] for role in truth], floors
    )
    # A penalty chosen for the log-loss of other patients can undersell colour: a floor may also take scikit-learn's plain one.
    plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(colour.cls[train], patches.labels[train])
    for role, logs in zip(truth, forest, strict=True):
        unchosen = np.full((len(patches.rows(role)), len(patches.classes)), np.log(np.finfo(float).tiny))
        unchosen[:, plain.classes_] = plain.predict_log_proba(colour.cls[patches.rows(role)])
        forms = [calls["linear", role], Calls(unchosen[None], "logistic, C = 1"), Calls(logs[None], "forest")]
        calls["linear", role] = better(forms, truth[role])
        calls["knn", role] = Calls(calls["knn", role].logs, "colours")
    return calls
