"""Area and average precision of weighted, tied and pooled rankings: scikit-learn, brute force, shared draws of patients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from histoscale.eval.scores.auroc import auroc
from histoscale.eval.scores.interval import IntervalConfig, Resampling, patient_bootstrap
from histoscale.eval.scores.ranking import Ranking, roc_points

UNITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=40)


@settings(deadline=None, max_examples=60)
@given(UNITS)
def test_weights_are_repeated_units(units: list[tuple[int, int, int]]) -> None:
    labels, scores, weights = np.array(units).T
    repeated = np.repeat(np.arange(len(labels)), weights)
    found = Ranking.of(labels, scores)
    area, precision = (one(weights[None])[0] for one in (found.auroc, found.average_precision))
    if 0 < labels[repeated].sum() < len(repeated):
        assert area == pytest.approx(roc_auc_score(labels[repeated], scores[repeated]), abs=1e-12)
        assert precision == pytest.approx(average_precision_score(labels[repeated], scores[repeated]), abs=1e-12)
    else:
        assert np.isnan(area)


@settings(deadline=None, max_examples=40)
@given(UNITS, st.integers(0, 100))
def test_units_of_two_trials_are_never_compared(units: list[tuple[int, int, int]], seed: int) -> None:
    labels, scores, trials = np.array(units).T
    ones = np.ones((1, len(labels)))
    found = Ranking.of(labels, scores, trials)
    pairs = [(i, j) for i in np.flatnonzero(labels) for j in np.flatnonzero(labels == 0) if trials[i] == trials[j]]
    won = sum((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i, j in pairs)
    area = found.auroc(ones)[0]
    assert area == pytest.approx(won / len(pairs)) if pairs else np.isnan(area)
    by_trial = [(labels[trials == t], scores[trials == t]) for t in np.unique(trials)]
    hits = [(y.sum(), average_precision_score(y, s)) for y, s in by_trial if y.any() and not y.all()]
    if hits:
        mean = sum(n * value for n, value in hits) / sum(n for n, _ in hits)
        assert found.average_precision(ones)[0] == pytest.approx(mean)
    moved = scores + np.random.default_rng(seed).normal(size=4)[trials] * 100  # another scale a trial
    assert Ranking.of(labels, moved, trials).auroc(ones)[0] == pytest.approx(area, nan_ok=True)


@pytest.mark.parametrize("patients", [60, 14])
def test_intervals_by_weights_are_those_of_the_plain_bootstrap(patients: int) -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 2 * patients)
    scores, owners = labels + rng.normal(size=2 * patients), np.repeat([f"p{i}" for i in range(patients)], 2)
    config = IntervalConfig(200, 0.95, 5)

    def plain(rows: np.ndarray) -> float:
        return auroc(labels[rows], scores[rows]) if 0 < labels[rows].sum() < len(rows) else float("nan")

    slow = patient_bootstrap(plain, owners, config)
    fast = Resampling.of(owners, config).weighted(Ranking.of(labels, scores).auroc)
    assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high), abs=1e-12)
    assert fast.note == slow.note


def test_the_drawn_curve_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 80), rng.integers(0, 12, 80)
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(roc_points(labels, scores), np.stack([false, true], 1))
    with pytest.raises(ValueError, match="both classes"):
        roc_points(np.zeros(3), np.arange(3))


def test_what_is_no_ranking_is_refused() -> None:
    for labels, scores in (([], []), ([0, 2], [1, 2]), ([0, 1], [1, np.nan]), ([0, 1], [1])):
        with pytest.raises(ValueError, match="expected 0 or 1 and a number a unit"):
            Ranking.of(np.array(labels), np.array(scores))


def test_a_trial_of_positives_alone_ranks_nothing() -> None:
    labels, scores = np.r_[np.ones(20, int), 1, 0, 0, 0], np.linspace(0, 1, 24)
    trials = np.repeat([0, 1], [20, 4])
    found = Ranking.of(labels, scores, trials).average_precision(np.ones((1, 24)))
    assert found[0] == average_precision_score(labels[20:], scores[20:])
    assert np.isnan(Ranking.of(np.ones(3), np.arange(3.0)).average_precision(np.ones((1, 3)))[0])
