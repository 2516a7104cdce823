"""HEST's probe against scikit-learn's pipeline, Pearson against scipy, and intervals over patients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import yaml
from public_layouts import GENES, ROOT
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histoscale.eval.datasets.spots import LabelledSpots
from histoscale.eval.regression import Embedded, RegressionConfig, RegressionError, average, fit_ridge, fit_task, run_hest
from histoscale.eval.scores.correlation import Sums, pearson
from histoscale.eval.scores.interval import IntervalConfig

CONFIG = RegressionConfig(**yaml.safe_load((ROOT / "configs/regression/default.yaml").read_text()))
INTERVAL = IntervalConfig(200, 0.95, 0)


def spots_of(samples: int, spots: int, splits: int, per_patient: int = 1, seed: int = 0) -> tuple[LabelledSpots, np.ndarray]:
    """Samples dealt into `splits` tests; features of which the first ten explain half of the variance of the genes."""
    rng = np.random.default_rng(seed)
    n = samples * spots
    names = np.array([f"S{i:02d}" for i in range(samples)])
    features = rng.normal(size=(n, 40)) * np.linspace(3, 0.1, 40)
    targets = features[:, :10] @ rng.normal(size=(10, 50)) + 8 * rng.normal(size=(n, 50)) + 3
    tests = [tuple(names[i] for i in range(samples) if i // per_patient % splits == s) for s in range(splits)]
    sides = tuple((tuple(name for name in names if name not in test), test) for test in tests)
    patients = np.array([f"P{i // per_patient:02d}" for i in range(samples)])

    def read(rows: np.ndarray) -> np.ndarray:
        raise AssertionError("no pixels are needed")

    return LabelledSpots(
        "hest/IDC", tuple(GENES), targets, np.repeat(patients, spots), np.repeat(names, spots), "patient", sides, 0.5, 224,
        "h", read, (),
    ), features  # fmt: skip


def row(name: str, features: list[np.ndarray], floor: bool = False) -> Embedded:
    return Embedded(name, "cls", "resize", features, 0.5, 112.0, floor)


def test_pearson_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1e3, 1, (200, 30)), rng.normal(size=(200, 30))
    b[:, :10] += a[:, :10]
    a[:, 3] *= 1e8
    expected = np.array([pearsonr(x, y).statistic for x, y in zip(a.T, b.T, strict=True)])
    assert np.abs(pearson(a, b) - expected).max() < 1e-12
    assert abs(float(pearson(a[:, 0], b[:, 0])) - expected[0]) < 1e-12
    assert pearson(a[:, 0], -2 * a[:, 0] + 1) == pytest.approx(-1, abs=1e-12)
    b[:, 0] = 0.1  # whose mean is not exactly 0.1
    assert np.isnan(pearson(a, b)[0]) and not np.isnan(pearson(a, b)[1:]).any()
    with pytest.raises(ValueError, match="at least two rows"):
        pearson(a[:1], b[:1])


def test_sums_by_patient_give_the_correlation_of_any_draw() -> None:
    rng = np.random.default_rng(1)
    group = rng.integers(0, 6, 90)
    x, y = rng.normal(500, 1, (90, 4)), rng.normal(size=(90, 4))
    y[:, :2] += x[:, :2]
    sums = Sums.of(x, y, group, 6)
    for drawn in ([0, 1, 2, 3, 4, 5], [2, 2, 2, 5], [4]):
        rows = np.concatenate([np.flatnonzero(group == one) for one in drawn])
        assert np.abs(sums.correlation(drawn) - pearson(x[rows], y[rows])).max() < 1e-10
    y[group == 4, 1] = 2.0
    assert np.isnan(Sums.of(x, y, group, 6).correlation([4])[1])


@pytest.mark.parametrize("n, width", [(900, 320), (280, 500), (120, 40)])
def test_parity_with_scikit_learn(n: int, width: int) -> None:
    """Its own pipeline: StandardScaler, PCA, Ridge by lsqr without intercept; the solver run to the end."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n + 100, width)) * rng.uniform(0.1, 9, width) + 5
    x[:, 3] = 7.0  # a constant feature
    y = x[:, :20] @ rng.normal(size=(20, 50)) + rng.normal(size=(n + 100, 50))
    p = min(256, n, width)
    pipe = make_pipeline(StandardScaler(), PCA(p, svd_solver="full"))
    train, test = pipe.fit_transform(x[:n]), pipe.transform(x[n:])
    ridge = Ridge(solver="lsqr", alpha=100 / (p * 50), fit_intercept=False, max_iter=1000, tol=1e-12)
    expected = ridge.fit(train, y[:n]).predict(test)
    found = fit_ridge(x[:n], y[:n], x[n:], CONFIG)
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(pearson(found, y[n:]) - pearson(expected, y[n:])).max() < 1e-6


def test_the_published_basis_is_scikit_learns_own_choice() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(1500, 600)) * np.exp(-np.arange(600) / 80), rng.normal(size=(1500, 50))
    y[:, :25] += 5 * x[:, :25]
    pipe = make_pipeline(StandardScaler(), PCA(256, random_state=1))  # randomised at this shape
    train, test = pipe.fit_transform(x[:1200]), pipe.transform(x[1200:])
    ridge = Ridge(solver="lsqr", alpha=100 / (256 * 50), fit_intercept=False, max_iter=1000, tol=1e-12)
    expected = ridge.fit(train, y[:1200]).predict(test)
    published = fit_ridge(x[:1200], y[:1200], x[1200:], replace(CONFIG, basis="published"))
    assert np.abs(published - expected).max() < 1e-6
    with pytest.raises(ValueError, match="regression.basis is 'best': expected exact or published"):
        fit_ridge(x[:1200], y[:1200], x[1200:], replace(CONFIG, basis="best"))


def test_a_task_is_the_mean_of_its_splits_and_test_targets_teach_nothing() -> None:
    spots, features = spots_of(6, 30, 3)
    owners = np.unique(spots.patients)
    fitted = fit_task(features, spots, owners, CONFIG)
    assert fitted.values.shape == (3, 50)
    for number, (train, test) in enumerate(spots.splits):
        fitting, held = spots.rows(train), spots.rows(test)
        predicted = fit_ridge(features[fitting], spots.targets[fitting], features[held], CONFIG)
        expected = np.mean([pearsonr(predicted[:, g], spots.targets[held, g]).statistic for g in range(50)])
        assert fitted.by_split[number] == pytest.approx(expected, abs=1e-12)
    assert fitted.value == pytest.approx(fitted.by_split.mean()) and fitted.value > 0.3
    shuffled = replace(spots, targets=spots.targets[np.random.default_rng(0).permutation(len(spots))])
    assert abs(fit_task(features, shuffled, owners, CONFIG).value) < 0.1


def test_a_gene_that_does_not_vary_is_named_with_its_split() -> None:
    spots, features = spots_of(4, 20, 2)
    targets = spots.targets.copy()
    targets[spots.rows(spots.splits[1][1]), 7] = 0.3
    words = "the expression of GENE7 does not vary over the 40 test spots of split 1 of hest/IDC"
    with pytest.raises(RegressionError, match=words):
        run_hest([row("a", [features])], replace(spots, targets=targets), CONFIG, INTERVAL)
    flat = np.ones_like(features)
    words = r"the prediction of GENE0 does not vary over the 40 test spots of split 0 .*50 such genes"
    with pytest.raises(RegressionError, match=words):
        run_hest([row("a", [flat])], spots, CONFIG, INTERVAL)


def test_scores_with_floors_and_differences() -> None:
    spots, features = spots_of(24, 20, 4)
    rng = np.random.default_rng(3)
    rows = [
        row("good", [features]),
        row("half", [features[:, ::2]]),
        row("random", [rng.normal(size=(len(spots), 30)) for _ in range(5)], floor=True),
        row("colour", [features[:, 20:]], floor=True),
    ]
    scores = run_hest(rows, spots, CONFIG, INTERVAL)
    plain = {score.encoder: score for score in scores if not score.minus}
    assert list(plain) == ["good", "half", "random", "colour"]
    good = plain["good"]
    assert (good.dataset, good.metric, good.probe, good.groups) == ("hest/IDC", "pearson", "ridge", "patient")
    assert good.interval.patients == 24 and good.interval.units == len(spots)
    assert good.interval.low is not None and good.interval.high is not None
    assert good.interval.low < good.interval.value < good.interval.high
    assert good.interval.value == pytest.approx(fit_task(features, spots, np.unique(spots.patients), CONFIG).value, abs=1e-9)
    assert plain["random"].runs == 5 and plain["random"].spread is not None and plain["random"].floor
    assert good.runs == 1 and good.spread is None and "4 splits, SD" in good.note
    differences = {(score.encoder, score.minus): score.interval for score in scores if score.minus}
    others = ("good", "half", "random", "colour")
    assert set(differences) == {(a, f"{b} cls resize") for a in ("good", "half") for b in others if a != b}
    gap = differences["good", "colour cls resize"]
    assert gap.value == pytest.approx(good.interval.value - plain["colour"].interval.value)
    assert gap.low is not None and gap.low > 0


def test_few_patients_withhold_the_interval_and_give_their_number() -> None:
    spots, features = spots_of(8, 20, 4, per_patient=2)
    (score,) = run_hest([row("a", [features])], spots, CONFIG, INTERVAL)
    assert score.interval.low is None and score.interval.patients == 4 and "4 patients" in score.interval.note


def test_the_average_needs_all_tasks() -> None:
    spots, features = spots_of(4, 20, 2)
    scores = []
    for task in ("IDC", "PRAD"):
        rows = [row("a", [features]), row("b", [features[:, :9]])]
        scores += run_hest(rows, replace(spots, name=f"hest/{task}"), CONFIG, INTERVAL)
    values = [score.interval.value for score in scores if score.encoder == "a" and not score.minus]
    found = average(scores, ["IDC", "PRAD"])
    assert [score.encoder for score in found] == ["a", "b"] and found[0].dataset == "hest"
    assert found[0].interval.value == pytest.approx(np.mean(values)) and found[0].interval.low is None
    assert average(scores, ["IDC", "PRAD", "PAAD"]) == []
    assert not math.isnan(found[0].interval.value)
