"""Operating points: the rule's promise by simulation, published values, and thresholds that are carried over unchanged."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoscale.eval.scores.operating import Threshold, answer_of, operate, rate, score_words, sweeping, threshold

Y = np.array([1] * 5 + [0] * 7)
P = np.array([0.9, 0.8, 0.8, 0.55, 0.3, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])


@pytest.mark.parametrize(
    ("required", "value", "sensitivity", "specificity"),
    [(0.6, 0.8, 0.6, 1), (0.8, 0.55, 0.8, 0.857143), (0.95, 0.3, 1, 0.428571)],
)
def test_published_values_of_the_empirical_rule(required: float, value: float, sensitivity: float, specificity: float) -> None:
    at = threshold(Y, P, required, "empirical")
    assert at.value == value
    found = operate(Y, P, at, prevalence=0.2)
    assert found.sensitivity.value == pytest.approx(sensitivity)
    assert found.specificity.value == pytest.approx(specificity, abs=1e-6)
    assert found.fnr.value == pytest.approx(1 - sensitivity) and found.needed == value


@pytest.mark.parametrize(("required", "enough"), [(0.9, 9), (0.95, 19), (0.98, 49)])
def test_positives_that_the_promise_needs(required: float, enough: int) -> None:
    scores = np.linspace(0, 1, enough)
    assert threshold(np.ones(enough), scores, required, "conformal").value == 0
    few = threshold(np.ones(enough - 1), scores[1:], required, "conformal")
    assert few.value == -math.inf and f"{enough} are needed" in few.note
    everything = operate(np.array([1, 1, 0]), np.array([-5.0, 3.0, 0.0]), few, prevalence=0.1)
    assert everything.sensitivity.value == 1 and everything.specificity.value == 0 and everything.flagged.value == 1


@pytest.mark.parametrize("positives", [20, 40, 60])
def test_the_conformal_rule_keeps_its_promise_and_the_empirical_does_not(positives: int) -> None:
    """Expected sensitivity on fresh positives of the same law: at least .95, against k / (P + 1) for the empirical rule."""
    rng = np.random.default_rng(positives)
    kept = {"conformal": [], "empirical": []}
    for _ in range(4000):
        seen, fresh = rng.normal(size=positives), rng.normal(size=50)
        for rule, values in kept.items():
            values.append(np.mean(fresh >= threshold(np.ones(positives), seen, 0.95, rule).value))
    error = 4 * np.std(kept["conformal"]) / math.sqrt(4000)
    assert np.mean(kept["conformal"]) >= 0.95 - error
    expected = math.ceil(0.95 * positives - 1e-12) / (positives + 1)
    assert np.mean(kept["empirical"]) == pytest.approx(expected, abs=error) and expected < 0.95


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9)), min_size=1, max_size=40), st.sampled_from([0.5, 0.8, 0.95]))
def test_the_empirical_threshold_is_the_largest_that_keeps_the_sensitivity(pairs: list[tuple[int, int]], required: float) -> None:
    labels, scores = np.array(pairs).T
    if not labels.any():
        with pytest.raises(ValueError, match="has none"):
            threshold(labels, scores, required, "empirical")
        return
    value = threshold(labels, scores, required, "empirical").value
    positive = scores[labels == 1]
    assert np.mean(positive >= value) >= required - 1e-12
    assert np.mean(positive > value) < required


def test_predictive_values_at_a_stated_prevalence() -> None:
    """At the observed prevalence they are the observed ones; at another they follow Bayes' rule."""
    at = Threshold(0.35, 0.95, "empirical", 5, "")
    same = operate(Y, P, at, prevalence=5 / 12)
    assert same.at_prevalence == pytest.approx((same.ppv.value, same.npv.value))
    rare = operate(Y, P, at, prevalence=0.01)
    sensitivity, specificity = 0.8, 4 / 7
    assert rare.at_prevalence[0] == pytest.approx(sensitivity * 0.01 / (sensitivity * 0.01 + (1 - specificity) * 0.99))
    assert rare.at_prevalence[1] == pytest.approx(specificity * 0.99 / (specificity * 0.99 + 0.2 * 0.01))


def test_one_class_leaves_the_other_rate_empty() -> None:
    found = operate(np.zeros(3), np.array([0.1, 0.5, 0.9]), Threshold(0.4, 0.95, "empirical", 5, ""), prevalence=0.1)
    assert math.isnan(found.sensitivity.value) and found.sensitivity.n == 0 and math.isnan(found.needed)
    assert found.specificity.value == pytest.approx(1 / 3) and math.isnan(found.at_prevalence[0])


@pytest.mark.parametrize(
    ("required", "rule", "message"), [(0.95, "youden", "expected conformal or empirical"), (1.0, "empirical", "between 0 and 1")]
)
def test_nonsense_is_refused(required: float, rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        threshold(Y, P, required, rule)


def test_positives_of_one_patient_count_as_one() -> None:
    """Ten patients with eight positive slides each fix no threshold for .95; thirty of unequal size keep it on new patients."""
    scores = np.linspace(0, 1, 80)
    few = threshold(np.ones(80), scores, 0.95, "conformal", [f"p{i % 10}" for i in range(80)])
    assert few.value == -np.inf and "80 positives of 10 patients fix no threshold" in few.note
    alone = threshold(np.ones(80), scores, 0.9, "conformal", [f"p{i}" for i in range(80)])
    assert alone == threshold(np.ones(80), scores, 0.9, "conformal")
    kept = []
    for seed in range(400):
        rng = np.random.default_rng(seed)

        def patients(count: int, rng: np.random.Generator = rng) -> tuple[np.ndarray, list[str]]:
            sizes = rng.integers(1, 8, count)
            own = np.repeat(rng.normal(size=count), sizes)
            return own + 0.5 * rng.normal(size=len(own)), [f"p{i}" for i in np.repeat(np.arange(count), sizes)]

        seen, groups = patients(30)
        fresh, _ = patients(50)
        kept.append((fresh >= threshold(np.ones(len(seen)), seen, 0.95, "conformal", groups).value).mean())
    assert 0.95 < np.mean(kept) < 0.985


@pytest.mark.parametrize("negatives", [20, 60])
def test_a_required_specificity_is_kept_from_the_other_side(negatives: int) -> None:
    """Of new negatives at least that share passes in expectation, and no rule is changed by the positives."""
    rng = np.random.default_rng(negatives)
    passed = []
    for _ in range(4000):
        seen, fresh = rng.normal(size=negatives), rng.normal(size=50)
        at = threshold(np.zeros(negatives), seen, 0.5, "conformal", keeps="specificity")
        assert at.name == "specificity_0.5" and at.positives == 0
        passed.append(np.mean(fresh < at.value))
    assert np.mean(passed) >= 0.5 - 4 * np.std(passed) / math.sqrt(4000)
    few = threshold(np.zeros(3), np.arange(3.0), 0.9, "conformal", keeps="specificity")
    assert few.value == math.inf and "3 negatives fix no threshold for specificity 0.9" in few.note
    assert operate(np.array([1, 0]), np.array([5.0, 3.0]), few, prevalence=0.1).flagged.hits == 0


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9)), min_size=1, max_size=40), st.sampled_from([0.5, 0.8, 0.95]))
def test_the_specificity_rule_mirrors_the_sensitivity_rule(pairs: list[tuple[int, int]], required: float) -> None:
    labels, scores = np.array(pairs).T
    if labels.all():
        with pytest.raises(ValueError, match="scores of negative units"):
            threshold(labels, scores, required, "conformal", keeps="specificity")
        return
    at = threshold(labels, scores, required, "conformal", keeps="specificity")
    mirrored = threshold(1 - labels, -scores, required, "conformal")
    np.testing.assert_array_equal(scores < at.value, -scores >= mirrored.value)
    assert operate(labels, scores, at, 0.1).drift == operate(labels, scores, at, 0.1).specificity.value - required


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.5, "0.500"), (0.0312, "0.0312"), (3.12e-5, "0.0000312"), (0.99953, "0.999530"), (1e-12, "1e-12"), (0.0, "0"), (1.0, "1")],
)
def test_a_score_keeps_the_digits_that_count(value: float, words: str) -> None:
    assert score_words(value) == words and (float(score_words(value)) == 0) == (value == 0)


def test_a_rule_of_one_answer_is_called_that() -> None:
    assert [sweeping(rate(hits, 4)) for hits in range(5)] == ["no", "", "", "", "every"] and sweeping(rate(0, 0)) == ""
    unread = Threshold(-math.inf, 0.95, "conformal", 3, "")
    assert answer_of(unread, rate(0, 0)) == "every" and answer_of(unread, rate(3, 4)) == ""
