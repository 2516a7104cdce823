"""Harrell's C: brute force under ties and censoring, repeated units, and what it becomes without either."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histoscale.eval.scores.auroc import auroc
from histoscale.eval.scores.concordance import Concordance

SUBJECTS = st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=25)


def by_pairs(times: np.ndarray, events: np.ndarray, risks: np.ndarray) -> float:
    won = pairs = 0.0
    for i in range(len(times)):
        for j in range(len(times)):
            if events[i] and (times[i] < times[j] or (times[i] == times[j] and not events[j])):
                pairs += 1
                won += 1.0 if risks[i] > risks[j] else 0.5 if risks[i] == risks[j] else 0.0
    return won / pairs if pairs else float("nan")


@settings(deadline=None, max_examples=60)
@given(SUBJECTS)
def test_counts_the_pairs_of_the_definition(subjects: list[tuple[int, bool, int, int]]) -> None:
    times, events, risks, weights = (np.array(column) for column in zip(*subjects, strict=True))
    again = np.repeat(np.arange(len(times)), weights)
    found = Concordance.of(times, events, risks).index(weights[None])[0]
    assert found == pytest.approx(by_pairs(times[again], events[again], risks[again]), nan_ok=True)


def test_golden_and_limits() -> None:
    times, events = np.array([5.0, 4, 3, 2, 1]), np.array([True, True, False, True, True])
    once = np.ones((1, 5))
    assert Concordance.of(times, events, -times).index(once)[0] == 1
    assert Concordance.of(times, events, times).index(once)[0] == 0
    assert Concordance.of(times, events, np.zeros(5)).index(once)[0] == 0.5
    assert np.isnan(Concordance.of(times, np.zeros(5, bool), -times).index(once)[0])
    rng = np.random.default_rng(1)  # two times and no censoring: the area under the ROC curve of "early"
    early, risk = rng.integers(0, 2, 50), rng.normal(size=50)
    found = Concordance.of(2.0 - early, np.ones(50, bool), risk).index(np.ones((1, 50)))[0]
    assert found == pytest.approx(auroc(early, risk))


def test_risks_of_two_trials_are_never_compared() -> None:
    rng = np.random.default_rng(3)
    times, events, risks, trials = rng.exponential(size=40), rng.random(40) < 0.7, rng.normal(size=40), np.repeat([0, 1], 20)
    once = np.ones((1, 40))
    before = Concordance.of(times, events, risks, trials).index(once)[0]
    assert Concordance.of(times, events, risks + 50 * trials, trials).index(once)[0] == before
    assert Concordance.of(times, events, risks + 50 * trials).index(once)[0] != before


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="all finite"):
        Concordance.of(np.array([1.0, np.nan]), np.ones(2), np.zeros(2))
