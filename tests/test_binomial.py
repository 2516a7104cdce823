"""Binomial intervals against published values, an independent implementation, and their coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from histoscale.eval.scores.binomial import clopper_pearson, needed_without_miss, wilson


@pytest.mark.parametrize(
    ("hits", "n", "score", "exact"),
    [
        (47, 49, (0.862870, 0.988734), (0.860213, 0.995018)),
        (49, 49, (0.927302, 1), (0.927481, 1)),
        (0, 49, (0, 0.072698), (0, 0.072519)),
        (115, 132, (0.803416, 0.918013), (0.801822, 0.923153)),
        (78, 80, (0.913356, 0.993117), (0.912593, 0.996958)),
    ],
)
def test_published_values(hits: int, n: int, score: tuple[float, float], exact: tuple[float, float]) -> None:
    assert wilson(hits, n) == pytest.approx(score, abs=1e-6)
    assert clopper_pearson(hits, n) == pytest.approx(exact, abs=1e-6)


@given(n=st.integers(1, 400), share=st.floats(0, 1), level=st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_agrees_with_scipy(n: int, share: float, level: float) -> None:
    hits = round(share * n)
    reference = binomtest(hits, n)
    assert wilson(hits, n, level) == pytest.approx(tuple(reference.proportion_ci(level, "wilson")), abs=1e-9)
    assert clopper_pearson(hits, n, level) == pytest.approx(tuple(reference.proportion_ci(level, "exact")), abs=1e-7)


def test_the_exact_interval_covers_and_wilson_nearly_does() -> None:
    n = 30
    for p in np.linspace(0.02, 0.98, 25):
        weights = binom.pmf(np.arange(n + 1), n, p)
        covered = {f: sum(w for k, w in enumerate(weights) if f(k, n)[0] <= p <= f(k, n)[1]) for f in (wilson, clopper_pearson)}
        assert covered[clopper_pearson] >= 0.95 - 1e-9
        assert covered[wilson] >= 0.85


@pytest.mark.parametrize(("required", "n"), [(0.90, 36), (0.95, 72), (0.98, 183), (0.99, 368)])
def test_units_that_a_claim_needs(required: float, n: int) -> None:
    assert needed_without_miss(required) == n
    assert clopper_pearson(n, n)[0] >= required > clopper_pearson(n - 1, n - 1)[0]


@pytest.mark.parametrize(("hits", "n", "level"), [(1, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0)])
def test_nonsense_is_refused(hits: int, n: int, level: float) -> None:
    for interval in (wilson, clopper_pearson):
        with pytest.raises(ValueError, match="expected"):
            interval(hits, n, level)
