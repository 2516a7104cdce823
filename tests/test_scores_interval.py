"""Intervals over patients: coverage, clustering, pairing, and the words where there is none."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from histoscale.eval.scores.interval import Interval, IntervalConfig, independent_difference, paired_difference, patient_bootstrap
from histoscale.eval.scores.operating import rate

CONFIG = IntervalConfig(draws=500, level=0.95, seed=3)


def mean_of(values: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda rows: float(values[rows].mean())


def units(patients: int, each: int, seed: int, between: float = 1.0) -> tuple[np.ndarray, list[str]]:
    """Values with a patient effect, and their patients."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, between, (patients, 1)) + rng.normal(0, 1, (patients, each))
    return values.ravel(), [f"p{i:03d}" for i in range(patients) for _ in range(each)]


@pytest.mark.parametrize("patients, low", [(40, 0.90), (12, 0.90)])
def test_the_interval_covers_the_truth_as_often_as_it_says(patients: int, low: float) -> None:
    """40 patients: bootstrap; 12: t-interval. An interval over units would cover about half as often (last line)."""

    def covers(found: Interval) -> bool:
        assert found.low is not None and found.high is not None
        return found.low < 0 < found.high

    config, naive, right = IntervalConfig(200, 0.95, 0), 0, 0
    for seed in range(150):
        values, ids = units(patients, 6, seed)
        right += covers(patient_bootstrap(mean_of(values), ids, config))
        error = values.std(ddof=1) / np.sqrt(len(values))
        naive += abs(values.mean()) < 1.96 * error
    assert low <= right / 150 <= 0.995
    assert naive / 150 < 0.8


def test_few_patients_get_a_t_interval_and_a_warning_and_very_few_get_none() -> None:
    values, ids = units(12, 4, 0)
    found = patient_bootstrap(mean_of(values), ids, CONFIG)
    means = values.reshape(12, 4).mean(1)
    assert found.low is not None and found.note.startswith("warning: 12 patients")
    expected = stats.t.interval(0.95, 11, means.mean(), stats.sem(means))
    assert (found.low, found.high) == pytest.approx(expected)
    values, ids = units(9, 4, 0)
    found = patient_bootstrap(mean_of(values), ids, CONFIG)
    assert found.low is None and found.high is None and "9 patients" in found.note and found.value == pytest.approx(values.mean())


def test_more_units_of_the_same_patients_are_no_more_evidence() -> None:
    values, ids = units(25, 3, 1)
    once = patient_bootstrap(mean_of(values), ids, CONFIG)
    tenfold = patient_bootstrap(mean_of(np.tile(values, 10)), ids * 10, CONFIG)
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))
    assert (tenfold.units, tenfold.patients) == (750, 25)


def test_draws_are_those_of_an_independent_bootstrap() -> None:
    values, ids = units(60, 3, 2)
    found = patient_bootstrap(mean_of(values), ids, IntervalConfig(4000, 0.9, 0))
    means = values.reshape(60, 3).mean(1)
    other = stats.bootstrap((means,), np.mean, confidence_level=0.9, method="percentile", n_resamples=4000, rng=0)
    width = other.confidence_interval.high - other.confidence_interval.low
    assert found.low == pytest.approx(other.confidence_interval.low, abs=0.05 * width)
    assert found.high == pytest.approx(other.confidence_interval.high, abs=0.05 * width)


def test_differences_are_paired_and_order_does_not_matter() -> None:
    values, ids = units(30, 3, 4)
    shifted = paired_difference(mean_of(values + 0.25), mean_of(values), ids, CONFIG)
    assert (shifted.low, shifted.value, shifted.high) == pytest.approx((0.25, 0.25, 0.25))
    order = np.random.default_rng(0).permutation(len(values))
    again = patient_bootstrap(mean_of(values[order]), [ids[i] for i in order], CONFIG)
    first = patient_bootstrap(mean_of(values), ids, CONFIG)
    assert (again.low, again.high) == pytest.approx((first.low, first.high))
    assert patient_bootstrap(mean_of(values), ids, IntervalConfig(500, 0.95, 4)).low != first.low


def test_undefined_replicates_are_drawn_again_or_the_interval_is_withheld() -> None:
    values, ids = units(30, 1, 5)
    special = np.arange(30)

    def needs(count: int) -> Callable[[np.ndarray], float]:
        return lambda rows: float(values[rows].mean()) if np.isin(special[rows], range(count)).any() else float("nan")

    some = patient_bootstrap(needs(4), ids, CONFIG)  # absent from (26/30)^30 = 1.4 % of the draws
    assert some.low is not None and "undefined replicates drawn again" in some.note
    many = patient_bootstrap(needs(1), ids, CONFIG)  # 36 %
    assert many.low is None and "withheld" in many.note
    assert patient_bootstrap(lambda rows: float("nan"), ids, CONFIG).low is None


def test_strata_keep_their_share() -> None:
    labels = np.array([1.0] * 3 + [0.0] * 27)
    ids = [f"p{i}" for i in range(30)]
    free = patient_bootstrap(mean_of(labels), ids, CONFIG)
    kept = patient_bootstrap(mean_of(labels), ids, CONFIG, strata=[str(v) for v in labels])
    assert free.low != free.high and kept.low == kept.high == kept.value
    with pytest.raises(ValueError, match="one stratum a patient"):
        patient_bootstrap(mean_of(labels), ["p"] * 2 + [f"q{i}" for i in range(28)], CONFIG, strata=["a", "b"] * 15)
    with pytest.raises(ValueError, match="at least one row"):
        patient_bootstrap(mean_of(labels), [], CONFIG)


def test_the_gap_between_two_sets_covers_as_often_as_it_says() -> None:
    """Two independent proportions near 1, with Wilson's intervals: a symmetric interval around the difference would not."""
    rng, right = np.random.default_rng(0), 0
    for _ in range(1000):
        rates = [rate(int(rng.binomial(n, p)), n) for n, p in ((40, 0.95), (30, 0.8))]
        found = independent_difference(*(Interval(r.value, *r.wilson, r.n, r.n, "") for r in rates))
        assert found.low is not None and found.high is not None
        right += found.low <= 0.15 <= found.high
    assert 0.93 <= right / 1000 <= 0.98
    known, silent = Interval(0.9, 0.8, 0.95, 40, 40, ""), Interval(0.7, None, None, 5, 5, "interval withheld: 5 patients")
    gap = independent_difference(known, silent)
    assert gap.low is None and gap.note == silent.note and gap.value == pytest.approx(0.2)
