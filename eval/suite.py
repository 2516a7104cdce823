"""Protocols and floors on one labelled set: features in, outcomes of the encoder and of what it must beat.

A floor that has several forms (pooling, classifier) takes the better one on the very rows that are reported: that favours the
floor, so a difference to it is never flattered.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.eva import EvaConfig, eva
from histoscale.eval.features import Vectors
from histoscale.eval.few_shot import FewShotConfig
from histoscale.eval.floors import FLOOR_POOLS, Calls, FloorsConfig, forest_log_probabilities
from histoscale.eval.honest import Material, honest, material
from histoscale.eval.probe import ProbeConfig
from histoscale.eval.results import Outcome

PROTOCOLS = ("honest", "eva")



@dataclass(frozen=True)
class Seen:
    """Vectors of the encoder, of the untrained ones (none where there is no architecture) and of colour, at one resolution."""

    encoder: str
    own: Vectors
    untrained: Sequence[Vectors]
    colour: Vectors


def honest_outcomes(
    seen: Seen,
    patches: LabelledPatches,
    probe: ProbeConfig,
    few_shot: FewShotConfig,
    floors: FloorsConfig,
    device: str | torch.device,
) -> tuple[list[Outcome], list[str]]:
    """The honest protocol of the encoder, then of its floors; and remarks."""
    known = material(patches, probe)
    found, remarks = honest(seen.own.pooled(probe.pool), seen.encoder, probe.pool, known, probe, few_shot, device)
    forms = [
        _stacked([honest(v.pooled(pool), "random", pool, known, probe, few_shot, device)[0] for v in seen.untrained])
        for pool in FLOOR_POOLS
        if seen.untrained
    ]
    found += _best(forms, patches)
    colours = honest(seen.colour.cls, "colour", "logistic", known, probe, few_shot, device)[0]
    others = [
        _by_parts(known, "colour", "logistic, C = 1", lambda x, y, asked: _plain(x, y, known.classes, asked), seen.colour.cls),
        _by_parts(known, "colour", "forest", lambda x, y, asked: _forest(x, y, known.classes, asked, floors), seen.colour.cls),
    ]
    return found + _best([colours, *others], patches), remarks


def eva_outcomes(seen: Seen, patches: LabelledPatches, config: EvaConfig, device: str | torch.device) -> list[Outcome]:
    """protocol=eva of the encoder, of each untrained one with one run, and of colour."""
    found = eva(seen.own.pooled(config.pool), seen.encoder, config.pool, patches, config, device)
    one = replace(config, runs=1)
    forms = [
        _stacked([eva(v.pooled(pool), "random", pool, patches, one, device) for v in seen.untrained])
        for pool in FLOOR_POOLS
        if seen.untrained
    ]
    found += _best(forms, patches)
    return found + eva(seen.colour.cls, "colour", "42 numbers", patches, config, device)


def _stacked(each: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """Equal outcomes of R encoders as one of R probes."""
    return [replace(parts[0], logs=np.concatenate([p.logs for p in parts])) for parts in zip(*each, strict=True)]


def _best(forms: Sequence[Sequence[Outcome]], patches: LabelledPatches) -> list[Outcome]:
    """Of every probe and role the form with the highest balanced accuracy, the first among equals."""
    best: dict[tuple[str, str], tuple[float, Outcome]] = {}
    for outcome in (outcome for form in forms for outcome in form):
        value = Calls(outcome.logs, "").balanced_accuracy(patches.labels[outcome.rows])
        place = outcome.probe, outcome.role
        if place not in best or value > best[place][0]:
            best[place] = value, outcome
    return [outcome for _, outcome in best.values()]


Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # x [n, D], labels [n], asked [m, D] -> logs [m, K]


def _by_parts(known: Material, encoder: str, form: str, fit: Fit, features: np.ndarray) -> list[Outcome]:
    """A classifier of other make as a `linear` probe, fitted on the parts that the honest protocol fits on."""
    pieces: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for part in known.parts:
        for role, rows in part.asked.items():
            logs = fit(features[part.learn], known.labels[part.learn], features[rows])
            pieces.setdefault(role, []).append((rows, logs))
    found = []
    for role, parts in pieces.items():
        rows, logs = np.concatenate([rows for rows, _ in parts]), np.concatenate([logs for _, logs in parts])
        order = np.argsort(rows, kind="stable")
        found.append(Outcome(encoder, form, "honest", "linear", role, logs[order][None], rows[order], ""))
    return found


def _plain(x: np.ndarray, labels: np.ndarray, classes: int, asked: np.ndarray) -> np.ndarray:
    """A penalty chosen for the log-loss of other patients can undersell colour: a floor may also take scikit-learn's plain one."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(x, labels)
    logs = np.full((len(asked), classes), np.log(np.finfo(float).tiny))
    logs[:, model.classes_] = model.predict_log_proba(asked)
    return logs


def _forest(x: np.ndarray, labels: np.ndarray, classes: int, asked: np.ndarray, config: FloorsConfig) -> np.ndarray:
    """On at most `config.rows` rows, drawn by seed: a forest on 42 numbers learns little from more."""
    if len(x) > config.rows:
        drawn = np.sort(np.random.default_rng(config.seed).permutation(len(x))[: config.rows])
        x, labels = x[drawn], labels[drawn]
    return forest_log_probabilities(x, labels, classes, [asked], config)[0]
