"""Areas, their covariance and their intervals: published values, scikit-learn, brute force, and coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from histoscale.eval.scores.auroc import area_interval, areas, auroc, difference

Y = np.array([1] * 5 + [0] * 7)
P = np.array([0.9, 0.8, 0.8, 0.55, 0.3, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
Q = np.array([0.8, 0.9, 0.6, 0.6, 0.5, 0.4, 0.55, 0.5, 0.2, 0.3, 0.1, 0.2])


def test_published_values() -> None:
    found = areas(Y, np.stack([P, Q]))
    np.testing.assert_allclose(found.values, [0.8714286, 0.9571429], atol=1e-7)
    np.testing.assert_allclose(found.covariance, [[0.0125850, 0.0044898], [0.0044898, 0.0027211]], atol=1e-7)
    assert area_interval(found, 0, small=False) == pytest.approx((0.4878, 0.9797), abs=1e-4)
    value, low, high, p = difference(found, 0, 1)
    assert value == pytest.approx(-0.0857143) and p == pytest.approx(0.281198, abs=1e-6)
    assert (value - low) == pytest.approx(high - value) and low < 0 < high


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=60))
def test_agrees_with_scikit_learn_under_ties(pairs: list[tuple[int, int]]) -> None:
    labels, scores = np.array(pairs).T
    if labels.min() == labels.max():
        with pytest.raises(ValueError, match="both classes"):
            auroc(labels, scores)
    else:
        assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_single_groups_are_delong_and_order_does_not_matter() -> None:
    alone, grouped = areas(Y, P), areas(Y, P, [f"p{i}" for i in range(12)])
    np.testing.assert_allclose(alone.covariance, grouped.covariance, rtol=1e-12)
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_allclose(areas(Y[order], P[order]).covariance, alone.covariance, rtol=1e-12)


def test_copies_of_a_patient_carry_no_information() -> None:
    """Every unit doubled within its patient: the area stays and so does Obuchowski's variance; DeLong's wrongly shrinks."""
    twice, patients = np.repeat(np.arange(12), 2), np.repeat([f"p{i}" for i in range(12)], 2)
    once, clustered, naive = areas(Y, P), areas(Y[twice], P[twice], patients), areas(Y[twice], P[twice])
    np.testing.assert_allclose(clustered.values, once.values)
    np.testing.assert_allclose(clustered.covariance, once.covariance, rtol=1e-12)
    assert naive.covariance[0, 0] < 0.6 * once.covariance[0, 0]


@pytest.mark.parametrize("mixed", [False, True])
def test_clustered_variance_against_simulation(mixed: bool) -> None:
    """Two units a patient with a shared effect, of one class or of both: the mean estimate is near the area's true variance."""
    rng = np.random.default_rng(7)
    values, clustered, naive = [], [], []
    patients = np.repeat(np.arange(60), 2).astype(str)
    for _ in range(600):
        labels = np.tile([0, 1], 60) if mixed else rng.integers(0, 2, 60).repeat(2)
        scores = 0.8 * labels + rng.normal(size=60).repeat(2) + 0.6 * rng.normal(size=120)
        found = areas(labels, scores, patients)
        values.append(found.values[0])
        clustered.append(found.covariance[0, 0])
        naive.append(areas(labels, scores).covariance[0, 0])
    assert np.mean(clustered) == pytest.approx(np.var(values), rel=0.15)
    ratio = np.mean(naive) / np.var(values)
    assert ratio > 1.5 if mixed else ratio < 0.7  # a shared effect cancels between classes and adds up within one


def test_small_samples_are_wider_and_cover() -> None:
    rng = np.random.default_rng(3)
    hits = {True: 0, False: 0}
    truth = 0.7601  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for _ in range(800):
        labels = np.array([1] * 7 + [0] * 9)
        found = areas(labels, labels + rng.normal(size=16))
        wide, narrow = area_interval(found, 0, small=True), area_interval(found, 0, small=False)
        assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]
        for small, (low, high) in ((True, wide), (False, narrow)):
            hits[small] += low <= truth <= high
    assert hits[True] / 800 >= 0.935


def test_perfect_separation_still_has_an_interval() -> None:
    perfect = areas(Y, Y.astype(float))
    low, high = area_interval(perfect, 0, small=False)
    assert high == 1 and low == pytest.approx(0.025 ** (1 / 5))
    assert area_interval(areas(Y, -Y.astype(float)), 0, small=False) == pytest.approx((0, 1 - 0.025 ** (1 / 5)))


def test_a_perfect_area_is_not_certain_beside_a_floor() -> None:
    """A constant floor has an area of .5 for certain, so the gain is as uncertain as the perfect area itself."""
    found = areas(Y, np.stack([Y.astype(float), np.zeros(12), P]))
    low, high = area_interval(found, 0, small=False)
    value, below, above, _ = difference(found, 0, 1)
    assert (value, below, above) == pytest.approx((0.5, low - 0.5, high - 0.5))
    value, below, above, _ = difference(found, 0, 2)
    naive = 1.96 * np.sqrt(found.covariance[2, 2])
    assert below < value - naive and above <= 1 - area_interval(found, 2, small=False)[0] + 1e-12


def test_what_cannot_be_estimated_is_not_a_number() -> None:
    one = areas(np.array([1, 0, 0, 0]), np.array([0.5, 0.1, 0.9, 0.3]))
    assert one.values[0] == pytest.approx(2 / 3) and np.isnan(area_interval(one, 0, small=True)).all()
    tied = areas(Y, np.full(12, 0.5))
    assert tied.values[0] == 0.5 and np.isnan(area_interval(tied, 0, small=False)).all()


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.1], "one label a score"),
        ([0, 2], [0.1, 0.2], "expected 0 and 1"),
        ([0, 1], [0.1, np.nan], "not finite"),
        ([1, 1], [0.1, 0.2], "both classes"),
    ],
)
def test_nonsense_is_refused(labels: list[int], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auroc(labels, scores)
