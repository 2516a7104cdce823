"""Floors: the better of each form, and classifiers of colour that are seeded and bounded."""

from dataclasses import replace

import numpy as np
import pytest

from histoscale.eval.floors import Calls, FloorsConfig, better, forest_log_probabilities, plain_log_probabilities
from histoscale.eval.scores.classification import balanced_accuracy

FLOORS = FloorsConfig(initialisations=2, trees=20, leaf=2, rows=20000, seed=0)


def test_statistics_of_calls_are_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    calls, labels = Calls(rng.normal(size=(4, 50, 3)), "x"), rng.integers(0, 3, 50)
    for rows in (np.arange(50), rng.integers(0, 50, 50), np.flatnonzero(labels < 2)):
        expected = np.mean([balanced_accuracy(labels[rows], predicted[rows], 3) for predicted in calls.predicted])
        assert calls.statistic(labels)(rows) == pytest.approx(expected)
    right = Calls(np.eye(3)[labels][None], "right")
    assert better([calls, right], labels) is right and right.balanced_accuracy(labels) == 1


def test_the_forest_is_seeded_and_tolerates_an_absent_class() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 5)), rng.integers(0, 2, 60) * 2
    x[:, 0] += labels
    first, again = (forest_log_probabilities(x, labels, 3, [x], FLOORS)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (60, 3) and np.isneginf(first[:, 1]).all() and (first.argmax(1) == labels).mean() > 0.9


def test_what_is_fitted_on_colour_sees_a_bounded_number_of_rows() -> None:
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(4000, 5)), rng.integers(0, 2, 4000)
    x[:, 0] += 2 * labels
    few = replace(FLOORS, rows=500)
    for fit in (forest_log_probabilities, plain_log_probabilities):
        whole, part, again = (fit(x, labels, 2, [x], config)[0] for config in (FLOORS, few, few))
        np.testing.assert_array_equal(part, again)
        assert not np.array_equal(whole, part) and (part.argmax(1) == labels).mean() > 0.75
