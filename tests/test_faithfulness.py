"""Deletion curves on models whose answer is known, and how maps overlap with outlines."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from histoscale.eval.mil.faithfulness import DeletionConfig, deletion, faithfulness
from histoscale.eval.mil.pointing import area_auroc, pointing
from histoscale.eval.scores.interval import IntervalConfig

CONFIG = DeletionConfig(steps=10, draws=20, seed=0)


def mean_logit(features: np.ndarray) -> float:
    return float(features[:, 0].mean())


def test_curves_are_the_model_on_what_is_left() -> None:
    features = np.arange(20.0)[::-1, None]
    found = deletion(mean_logit, features, {"right": features[:, 0], "wrong": -features[:, 0]}, 1.0, "s", CONFIG)
    np.testing.assert_allclose(found.removed, np.arange(10) / 10)
    np.testing.assert_allclose(found.curves["right"], [np.arange(20 - 2 * k).mean() for k in range(10)])
    np.testing.assert_allclose(found.curves["wrong"], [np.arange(2 * k, 20).mean() for k in range(10)])
    assert found.random.shape == (20, 10) and len(np.unique(found.random[:, 5])) > 10
    # Both lines are straight: 9.5 - 9k/9 · 9 / 2 on average, and the random mean stays near 9.5.
    assert found.gain("right") == pytest.approx(4.5, abs=0.7) and found.gain("wrong") == pytest.approx(-4.5, abs=0.7)
    assert found.share_of_draws("right") == 1 and found.share_of_draws("wrong") == 0


def test_a_model_that_says_no_is_asked_the_other_way() -> None:
    features = np.random.default_rng(0).normal(size=(200, 1)) - 1
    against = deletion(mean_logit, features, {"map": -features[:, 0]}, -1.0, "s", CONFIG)
    assert against.curves["map"][0] == pytest.approx(-mean_logit(features)) and against.gain("map") > 0.5


def test_an_order_that_knows_nothing_gains_nothing() -> None:
    rng = np.random.default_rng(1)
    gains = []
    for i in range(60):
        features = rng.normal(size=(50, 1))
        gains.append(deletion(mean_logit, features, {"map": rng.random(50)}, 1.0, f"s{i}", CONFIG).gain("map"))
    interval = faithfulness(gains, [f"p{i}" for i in range(60)], IntervalConfig(500, 0.95, 0))
    assert interval.low is not None and interval.high is not None and interval.low < 0 < interval.high


def test_random_orders_belong_to_the_slide_and_tiles_keep_their_places() -> None:
    seen: list[np.ndarray] = []

    def watch(features: np.ndarray) -> float:
        seen.append(features[:, 0])
        return 0.0

    features = np.arange(30.0)[:, None]
    first = deletion(watch, features, {}, 1.0, "a", CONFIG)
    calls = [each.tolist() for each in seen]
    assert all(call == sorted(call) for call in calls) and {len(call) for call in calls} == {30 - 3 * k for k in range(10)}
    seen.clear()
    deletion(watch, features, {}, 1.0, "a", CONFIG)
    assert [each.tolist() for each in seen] == calls
    seen.clear()
    deletion(watch, features, {}, 1.0, "b", CONFIG)
    assert [each.tolist() for each in seen] != calls and first.random.shape == (20, 10)


def test_few_tiles_and_wrong_asks() -> None:
    one = deletion(mean_logit, np.ones((1, 1)), {"map": np.ones(1)}, 1.0, "s", CONFIG)
    assert one.gain("map") == 0 and (one.curves["map"] == 1).all()
    with pytest.raises(ValueError, match="ranks 2 tiles of 3"):
        deletion(mean_logit, np.ones((3, 1)), {"map": np.ones(2)}, 1.0, "s", CONFIG)
    with pytest.raises(ValueError, match=r"side is 0\.5"):
        deletion(mean_logit, np.ones((3, 1)), {}, 0.5, "s", CONFIG)
    with pytest.raises(ValueError, match="expected at least 2 and 1"):
        DeletionConfig(steps=1, draws=1, seed=0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), min_size=2, max_size=30))
def test_area_auroc_is_the_weighted_one(rows: list[tuple[int, float]]) -> None:
    values, covered = np.array(rows, float).T
    covered = covered.round(3)
    if covered.sum() == 0 or (1 - covered).sum() == 0:
        assert np.isnan(area_auroc(values, covered))
        return
    twice = np.concatenate([np.ones(len(rows)), np.zeros(len(rows))])
    expected = roc_auc_score(twice, np.tile(values, 2), sample_weight=np.concatenate([covered, 1 - covered]))
    assert area_auroc(values, covered) == pytest.approx(expected)


def test_pointing_against_chance() -> None:
    config = IntervalConfig(draws=200, level=0.95, seed=0)
    rng = np.random.default_rng(0)
    covered = [np.where(rng.permutation(50) < 5, 0.3, 0.0) for _ in range(40)]
    patients = [f"p{i}" for i in range(40)]
    right = pointing([share + 0.01 for share in covered], covered, patients, config)
    assert right is not None and right.hits == 1 and right.chance == pytest.approx(0.1) and right.gain.low == pytest.approx(0.9)
    blind = pointing([rng.random(50) for _ in range(40)], covered, patients, config)
    assert blind is not None and blind.gain.low is not None and blind.gain.high is not None
    assert blind.gain.low < 0 < blind.gain.high
    unseen = pointing([np.ones(3)], [np.zeros(3)], ["p"], config)
    assert unseen is not None and unseen.hits == 0 and unseen.unseen == 1
    assert pointing([], [], [], config) is None
