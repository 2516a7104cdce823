"""Probes: scikit-learn's optimum, selection inside train by patients, and nothing learned from reported labels."""

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from histoscale.eval.probe import ProbeConfig, Standard, fit_linear, fit_logistic, inner_folds, knn_log_probabilities

CONFIG = ProbeConfig(
    pool="cls", penalties=[1.0, 0.1, 0.03, 0.01, 0.001], folds=5, tolerance=1e-8, max_iterations=1000, neighbours=20,
    temperature=0.07, seed=0,
)  # fmt: skip


def features(seed: int, signal: float = 0.4, n: int = 400, width: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [n, width] of unequal scales, labels in range(3), 20 patients with effects of their own."""
    rng = np.random.default_rng(seed)
    labels, groups = rng.integers(0, 3, n), np.repeat(np.arange(20), n // 20)
    x = rng.normal(0, signal, (3, width))[labels] + rng.normal(0, 0.5, (20, width))[groups] + rng.normal(size=(n, width))
    return (x @ rng.normal(size=(width, width))) * np.logspace(-2, 2, width), labels, groups.astype(str)


def scikit_learn(x: np.ndarray, labels: np.ndarray, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=1 / (penalty * len(x)), max_iter=20000, tol=1e-10).fit(x, labels)


@pytest.mark.parametrize("penalty", [1.0, 0.01, 1e-4])
def test_every_fold_is_scikit_learns_optimum(penalty: float) -> None:
    x, labels, groups = features(0)
    x = Standard.of(x)(x)
    inside = ~inner_folds(labels, groups, 5, 0)
    weights, bias = fit_logistic(x, labels, 3, penalty, inside, 1e-9, 2000)
    for fold, rows in enumerate(inside):
        expected = scikit_learn(x[rows], labels[rows], penalty)
        found = log_softmax(x @ weights[:, fold] + bias[fold], axis=1)
        np.testing.assert_allclose(found, expected.predict_log_proba(x), atol=2e-4)


def test_warm_starts_change_the_path_and_not_the_optimum() -> None:
    x, labels, _ = features(1)
    x, everything = Standard.of(x)(x), np.ones((1, 400))
    cold = fit_logistic(x, labels, 3, 0.01, everything, 1e-9, 2000)
    start = fit_logistic(x, labels, 3, 1.0, everything, 1e-9, 2000)
    warm = fit_logistic(x, labels, 3, 0.01, everything, 1e-9, 2000, *start)
    np.testing.assert_allclose(warm[0], cold[0], atol=1e-6)


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
        assert mean == pytest.approx(np.mean(losses), abs=1e-4)
        assert error == pytest.approx(np.std(losses, ddof=1) / np.sqrt(5), abs=1e-4)
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
    np.testing.assert_allclose(np.exp(found), oracle.fit(x[:300], labels[:300]).predict_proba(x[300:]), atol=1e-9)
    assert knn_log_probabilities(x[:5], labels[:5], 3, x[300:], 20, 0.07).shape == (100, 3)  # fewer rows than neighbours


def test_constant_features_are_harmless() -> None:
    x, labels, groups = features(7)
    padded = np.concatenate([x, np.full((400, 2), 7.3)], axis=1)
    with_constant, without = (fit_linear(v, labels, 3, groups, CONFIG) for v in (padded, x))
    np.testing.assert_allclose(with_constant.log_probabilities(padded), without.log_probabilities(x), atol=1e-5)
