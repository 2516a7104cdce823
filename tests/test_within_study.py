"""Within-study AUROC: telling organs apart earns nothing, and the floors that see no pixel are what they should be."""

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from histoscale.eval.datasets.tp53 import USAGE, StudyPatches
from histoscale.eval.results import Outcome, Score
from histoscale.eval.scores.interval import Interval, IntervalConfig
from histoscale.eval.within_study import (
    LEAST,
    Patients,
    prior_outcomes,
    within_study_auroc,
    within_study_interval,
    within_study_scores,
)

INTERVAL = IntervalConfig(200, 0.95, 0)
RATES = {"BRCA": 0.3, "OV": 0.9, "THCA": 0.05}


def study_patches(seed: int, choose: str = "site", patients: int = 900, tiles: int = 3) -> StudyPatches:
    """Patients of three studies with very different rates and 20 hospitals; in hospital 0 everybody is mutant."""
    rng = np.random.default_rng(seed)
    study = rng.choice(list(RATES), patients)
    hospital = rng.integers(0, 20, patients)
    label = (rng.random(patients) < [RATES[s] for s in study]) | (hospital == 0)
    fold = hospital % 5
    role = np.array(["report", "select", "train", "train", "train"])[fold if choose == "site" else rng.integers(0, 5, patients)]
    row = np.repeat(np.arange(patients), tiles)
    names = np.array([f"P{i:04d}" for i in range(patients)])

    def read(rows: np.ndarray) -> np.ndarray:
        raise AssertionError("no pixels are needed")

    return StudyPatches(
        name=f"tp53_v1/{choose}", classes=("wild_type", "mutant"), labels=label[row].astype(np.int64),
        roles=role[row], patients=names[row], sites=np.array([f"H{i:02d}" for i in hospital])[row], groups="patient",
        mpp=0.5, size_px=224, hash="h",
        read=read, blocks=np.array([f"fold {i}" for i in fold] if choose == "site" else names)[row],
        slide_ids=names[row], usage=USAGE[choose], notes=(), studies=study[row],
    )  # fmt: skip


def logs_of(logits: np.ndarray) -> np.ndarray:
    return np.stack([-np.logaddexp(0, logits), -np.logaddexp(0, -logits)], axis=-1)


def test_it_is_the_mean_of_scikit_learns_areas() -> None:
    patches = study_patches(0)
    rng = np.random.default_rng(1)
    logits = rng.normal(size=len(patches)) + patches.labels
    found = Patients.of(patches, np.arange(len(patches)), logs_of(logits))
    areas: dict[str, list[float]] = {}
    for fold in np.unique(patches.blocks):
        for study in RATES:
            rows = np.flatnonzero((patches.blocks == fold) & (patches.studies == study))
            label = patches.labels[rows].reshape(-1, 3)[:, 0]
            if min(label.sum(), len(label) - label.sum()) >= LEAST:
                areas.setdefault(fold, []).append(roc_auc_score(label, logits[rows].reshape(-1, 3).mean(1)))
    expected = np.mean([np.mean(values) for values in areas.values()])
    assert within_study_auroc(found, LEAST) == pytest.approx(expected, abs=1e-12)
    interval = within_study_interval(found, LEAST, INTERVAL)
    assert interval.value == pytest.approx(expected, abs=1e-12) and interval.low is not None and interval.high is not None
    assert interval.low < expected < interval.high and interval.high - interval.low < 0.15


def test_telling_studies_apart_earns_nothing_within_and_much_pooled() -> None:
    patches = study_patches(2)
    rate = np.array([RATES[study] for study in patches.studies])
    logs = logs_of(np.log(rate / (1 - rate)))[None]
    outcome = Outcome("organ", "cls", "honest", "linear", "outer", logs, np.arange(len(patches)), "")
    blank = Score("", "", "", "resize", "", "", "", "", Interval(0, None, None, 0, 0, ""), "", 1, None, 0.5, 112.0, False, "", "")
    within, pooled = within_study_scores(patches, [outcome], blank, LEAST, INTERVAL)
    assert (within.metric, pooled.metric) == ("within_study_auroc", "pooled_auroc") and within.encoder == "organ"
    assert within.interval.value == pytest.approx(0.5, abs=1e-9) and pooled.interval.value > 0.8
    assert pooled.interval.low is None and "never ranked" in pooled.interval.note
    assert (within.resolution, within.role, within.groups, within.runs) == ("resize", "outer", "patient", 1)


def test_too_few_of_a_class_in_every_fold() -> None:
    patches = study_patches(0, patients=40)
    found = Patients.of(patches, np.arange(len(patches)), logs_of(np.zeros(len(patches))))
    assert math.isnan(within_study_auroc(found, LEAST))
    interval = within_study_interval(found, LEAST, INTERVAL)
    assert interval.low is None and "no study has 10 patients of each class in a fold" in interval.note


def test_priors_see_no_pixel_and_no_held_out_label() -> None:
    site = study_patches(3)
    study, hospital = prior_outcomes(site)
    assert (study.role, study.probe, study.encoder) == ("outer", "prior", "study prior") and len(study.rows) == len(site)
    # A held-out hospital is new, so both floors know the study alone.
    assert (study.logs == hospital.logs).all()
    changed = replace(site, labels=np.where(site.blocks == "fold 0", 1 - site.labels, site.labels))
    held = site.blocks == "fold 0"
    assert (prior_outcomes(changed)[0].logs[0, held] == study.logs[0, held]).all()
    assert (prior_outcomes(changed)[0].logs[0, ~held] != study.logs[0, ~held]).any()
    for name, rate in RATES.items():
        assert np.exp(study.logs[0, site.studies == name, 1]).mean() == pytest.approx(rate, abs=0.12)

    # With the published lists hospitals are on both sides: the site is then worth something, and is printed.
    listed = study_patches(3, "ref", patients=3000)
    study, hospital = prior_outcomes(listed)
    assert (study.rows == listed.rows("report")).all() and study.role == "report"
    areas = [within_study_auroc(Patients.of(listed, one.rows, one.logs[0]), LEAST) for one in (study, hospital)]
    assert areas[0] == pytest.approx(0.5) and areas[1] > 0.53
