"""Probes: scikit-learn's optimum, selection inside train by patients, and nothing learned from reported labels."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from histoscale.eval.knn import knn_log_probabilities
from histoscale.eval.logistic import Rows, Standard, fit
from histoscale.eval.probe import ProbeConfig, fit_linear, inner_folds

CONFIG = ProbeConfig(
    pool="cls", penalties=[1.0, 0.1, 0.03, 0.01, 0.001], penalty_alone=0.1, folds=5, tolerance=1e-7, choosing_tolerance=2e-3,
    max_iterations=1000, neighbours=20, temperature=0.07, seed=0,
)  # fmt: skip


def features(seed: int, signal: float = 0.4, n: int = 400, width: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [n, width] of unequal scales, labels in range(3), 20 patients with effects of their own."""
    rng = np.random.default_rng(seed)
    labels, groups = rng.integers(0, 3, n), np.repeat(np.arange(20), n // 20)
    x = rng.normal(0, signal, (3, width))[labels] + rng.normal(0, 0.5, (20, width))[groups] + rng.normal(size=(n, width))
    return (x @ rng.normal(size=(width, width))) * np.logspace(-2, 2, width), labels, groups.astype(str)


def scikit_learn(x: np.ndarray, labels: np.ndarray, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=1 / (penalty * len(x)), max_iter=20000, tol=1e-10).fit(x, labels)


def centred(model: LogisticRegression) -> tuple[np.ndarray, np.ndarray]:
    """Weights [D, K] and bias [K] of the softmax, each with sum 0; one vector of a binary model is split over two rows."""
    weights, bias = model.coef_.T, model.intercept_
    if weights.shape[1] == 1:
        weights, bias = np.concatenate([-weights, weights], 1) / 2, np.concatenate([-bias, bias]) / 2
    return weights - weights.mean(1, keepdims=True), bias - bias.mean()


@pytest.mark.parametrize("penalty", [1.0, 0.01, 1e-4])
def test_every_fold_is_scikit_learns_optimum(penalty: float) -> None:
    x, labels, groups = features(0)
    rows = Rows.of(x, Standard.of(x), "cpu")
    z = rows.standard(x)
    inside = ~inner_folds(labels, groups, 5, 0)
    weights, bias = fit(rows, labels, 3, penalty, inside, 1e-6, 2000, None).weights(rows)
    for fold, part in enumerate(inside):
        expected = scikit_learn(z[part], labels[part], penalty)
        wanted = centred(expected)
        np.testing.assert_allclose(weights[fold], wanted[0], atol=1e-3, rtol=0)
        np.testing.assert_allclose(bias[fold], wanted[1], atol=1e-3, rtol=0)
        found = softmax(z @ weights[fold] + bias[fold], axis=1)
        np.testing.assert_allclose(found, expected.predict_proba(z), atol=1e-4, rtol=0)


@pytest.mark.parametrize("penalty", [0.1, 1e-3])
def test_two_classes_are_scikit_learns_with_half_the_penalty(penalty: float) -> None:
    """Both rows are penalised: ‖W‖² is half of ‖W₁ − W₀‖², the one vector of a binary model, so its C is twice as large."""
    x, labels, groups = features(8)
    labels = (labels > 0).astype(np.int64)
    probe = fit_linear(x, labels, 2, groups, replace(CONFIG, penalties=[penalty]))
    z = probe.standard(x)
    expected = scikit_learn(z, labels, penalty / 2)
    wanted = centred(expected)
    np.testing.assert_allclose(probe.weights, wanted[0], atol=1e-3, rtol=0)
    np.testing.assert_allclose(np.exp(probe.log_probabilities(x)), expected.predict_proba(z), atol=1e-4, rtol=0)
    other = scikit_learn(z, labels, penalty).predict_proba(z)
    assert np.abs(np.exp(probe.log_probabilities(x)) - other).max() > 1e-3


def test_fewer_rows_than_features_lose_nothing() -> None:
    x, labels, groups = features(9, n=100, width=150)
    for width in (150, 90):  # axes among rows, axes among features
        probe = fit_linear(x[:, :width], labels, 3, groups, replace(CONFIG, penalties=[0.03]))
        z = probe.standard(x[:, :width])
        expected = scikit_learn(z, labels, 0.03)
        np.testing.assert_allclose(probe.weights, centred(expected)[0], atol=1e-3, rtol=0)
        np.testing.assert_allclose(np.exp(probe.log_probabilities(x[:, :width])), expected.predict_proba(z), atol=1e-4, rtol=0)


def test_warm_starts_change_the_path_and_not_the_optimum() -> None:
    x, labels, _ = features(1)
    rows, everything = Rows.of(x, Standard.of(x), "cpu"), np.ones((1, 400), bool)
    cold = fit(rows, labels, 3, 0.01, everything, 1e-8, 2000, None)
    start = fit(rows, labels, 3, 0.1, everything, 1e-3, 2000, None)
    warm = fit(rows, labels, 3, 0.01, everything, 1e-8, 2000, start)
    assert start.left < 1e-3 and warm.evaluations < cold.evaluations
    np.testing.assert_allclose(warm.weights(rows)[0], cold.weights(rows)[0], atol=1e-6)


def test_a_fit_that_falls_short_says_so() -> None:
    x, labels, groups = features(1)
    assert "stopped" in fit_linear(x, labels, 3, groups, replace(CONFIG, max_iterations=2)).note
    assert "stopped" not in fit_linear(x, labels, 3, groups, replace(CONFIG, penalties=[10.0, 0.1, 1e-6])).note


def test_an_official_part_chooses_and_teaches_nothing() -> None:
    """With `select`, the fit is that of the other rows alone; the choice follows the labels of select."""
    x, labels, groups = features(10)
    select = np.arange(400) >= 300
    probe = fit_linear(x, labels, 3, groups, CONFIG, select)
    z = probe.standard(x)
    np.testing.assert_allclose(probe.standard.mean, x[:300].mean(0), rtol=1e-6, atol=1e-9)
    for penalty, mean, error in probe.inner:
        logs = scikit_learn(z[:300], labels[:300], penalty).predict_log_proba(z[300:])
        losses = -logs[np.arange(100), labels[300:]]
        assert mean == pytest.approx(losses.mean(), rel=2e-3)
        means = np.array([losses[groups[300:] == g].mean() for g in np.unique(groups[300:])])
        assert error == pytest.approx(means.std(ddof=1) / np.sqrt(len(means)), rel=0.02)  # equal sizes
    expected = scikit_learn(z[:300], labels[:300], probe.penalty).predict_proba(z)
    np.testing.assert_allclose(np.exp(probe.log_probabilities(x)), expected, atol=1e-4, rtol=0)
    noise = labels.copy()
    noise[300:] = np.random.default_rng(0).permutation(noise[300:])
    assert fit_linear(x, noise, 3, groups, CONFIG, select).penalty > probe.penalty


def test_the_penalty_is_the_strongest_within_one_standard_error_of_the_best_inner_loss() -> None:
    x, labels, groups = features(2)
    probe = fit_linear(x, labels, 3, groups, CONFIG)
    z = probe.standard(x)
    outside = inner_folds(labels, groups, 5, 0)
    for penalty, mean, error in probe.inner:  # by scikit-learn, fold by fold
        losses = []
        for held in outside:
            logs = scikit_learn(z[~held], labels[~held], penalty).predict_log_proba(z[held])
            losses.append(-logs[np.arange(held.sum()), labels[held]].mean())
        assert mean == pytest.approx(np.mean(losses), rel=1e-3)
        assert error == pytest.approx(np.std(losses, ddof=1) / np.sqrt(5), rel=0.02)
    best = min(probe.inner, key=lambda row: row[1])
    allowed = [penalty for penalty, mean, _ in probe.inner if mean <= best[1] + best[2]]
    assert probe.penalty == max(allowed) and probe.penalty > best[0]


def test_a_choice_at_the_end_of_the_list_is_said() -> None:
    x, labels, groups = features(3, signal=2.0)
    strong = ProbeConfig(**{**CONFIG.__dict__, "penalties": [10.0, 1.0]})
    assert "add weaker ones" in fit_linear(x, labels, 3, groups, strong).note
    rng = np.random.default_rng(0)
    weak = ProbeConfig(**{**CONFIG.__dict__, "penalties": [0.01, 0.001]})
    assert "add stronger ones" in fit_linear(rng.normal(size=x.shape), labels, 3, groups, weak).note


def test_folds_never_split_a_patient() -> None:
    _, labels, groups = features(4)
    outside = inner_folds(labels, groups, 5, 0)
    assert (outside.sum(0) == 1).all()
    for held in outside:
        assert not set(groups[held]) & set(groups[~held])
    few = np.repeat(["a", "b", "c"], [200, 100, 100])
    assert len(inner_folds(labels, few, 5, 0)) == 3
    with pytest.raises(ValueError, match="at least two"):
        inner_folds(labels, np.full(400, "a"), 5, 0)


def test_selection_by_patients_is_not_fooled_by_patients() -> None:
    """Labels that follow the patient and nothing else: folds over rows find weak penalties good, folds over patients do not."""
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(30), 20)
    x = rng.normal(size=(30, 40))[groups] + 0.1 * rng.normal(size=(600, 40))
    labels = rng.permutation(np.arange(30) % 2)[groups]
    honest = fit_linear(x, labels, 2, groups.astype(str), CONFIG)
    leaking = fit_linear(x, labels, 2, np.arange(600).astype(str), CONFIG)
    assert min(loss for _, loss, _ in leaking.inner) < 0.2 < min(loss for _, loss, _ in honest.inner)
    assert honest.penalty > leaking.penalty


def test_knn_is_the_weighted_vote_of_the_nearest_by_cosine() -> None:
    x, labels, _ = features(6)
    x = Standard.of(x)(x)
    found = knn_log_probabilities(x[:300], labels[:300], 3, x[300:], 20, 0.07)
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    np.testing.assert_allclose(np.exp(found), oracle.fit(x[:300], labels[:300]).predict_proba(x[300:]), atol=1e-5)
    assert knn_log_probabilities(x[:5], labels[:5], 3, x[300:], 20, 0.07).shape == (100, 3)  # fewer rows than neighbours


def test_constant_features_are_harmless() -> None:
    x, labels, groups = features(7)
    padded = np.concatenate([x, np.full((400, 2), 7.3)], axis=1)
    with_constant, without = (fit_linear(v, labels, 3, groups, CONFIG) for v in (padded, x))
    np.testing.assert_allclose(with_constant.log_probabilities(padded), without.log_probabilities(x), atol=1e-5)


def test_one_patient_chooses_nothing_and_says_so() -> None:
    x, labels, groups = features(8)
    assert not fit_linear(x, labels, 3, groups, CONFIG).note.startswith("trained on one")
    alone = fit_linear(x, labels, 3, np.full(400, "a"), CONFIG)
    assert alone.penalty == CONFIG.penalty_alone and "one patient" in alone.note and not alone.inner
    expected = scikit_learn(alone.standard(x), labels, 0.1).predict_proba(alone.standard(x))
    np.testing.assert_allclose(np.exp(alone.log_probabilities(x)), expected, atol=1e-4, rtol=0)


def test_fewer_rows_of_every_class_than_folds_is_a_sentence() -> None:
    labels = np.repeat([0, 1, 2], 4)
    with pytest.raises(ValueError, match="no class has over 4 images .* set probe.folds=4"):
        inner_folds(labels, np.arange(12), 5, 0)
    assert inner_folds(labels, np.arange(12), 4, 0).sum(0).tolist() == [1] * 12
    with pytest.raises(ValueError, match="and probe.folds=2: every class needs at least 2 images"):
        inner_folds(np.arange(4), np.arange(4), 2, 0)
