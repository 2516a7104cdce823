"""Published statistics code as an oracle: statsmodels (BSD-3), scikit-survival (GPL-3) and DeLong after Sun and Xu (MIT).

    pip install --no-deps --target ORACLE statsmodels==0.15.0 patsy==1.0.3 pandas==3.1.1 scikit-survival==0.28.0 \\
        rocauc-comparison==0.1.1; PYTHONPATH=ORACLE pytest tests/test_oracle_statistics.py

With a clone of yandexdataschool/roc_comparison on PYTHONPATH as well, DeLong runs against the code that others copied. Each
test skips where its package is absent; CI has all but scikit-survival, whose licence is GPL.
"""

from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from histoscale.eval.scores.auroc import areas, difference
from histoscale.eval.scores.binomial import clopper_pearson, wilson
from histoscale.eval.scores.calibration import intercept_in_the_large, slope_and_intercept
from histoscale.eval.scores.concordance import Concordance
from histoscale.eval.scores.interval import Interval, independent_difference
from histoscale.eval.scores.mcnemar import holm, mcnemar
from histoscale.eval.scores.operating import rate

WHERE = "is not installed: see the first lines of this file"


def package(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} {WHERE}")


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_and_clopper_pearson_are_statsmodels(level: float) -> None:
    confint = package("statsmodels.stats.proportion").proportion_confint
    for n in (1, 2, 7, 49, 132, 1000):
        for hits in {0, 1, n // 3, n // 2, n - 1, n}:
            assert wilson(hits, n, level) == pytest.approx(confint(hits, n, 1 - level, "wilson"), abs=1e-10)
            assert clopper_pearson(hits, n, level) == pytest.approx(confint(hits, n, 1 - level, "beta"), abs=1e-10)


def test_the_gap_of_two_proportions_is_newcombes() -> None:
    confint = package("statsmodels.stats.proportion").confint_proportions_2indep
    for a, n, b, m in ((56, 70, 48, 80), (9, 10, 3, 10), (10, 10, 0, 20), (5, 56, 0, 29)):
        first, second = (Interval(r.value, *r.wilson, r.n, r.n, "") for r in (rate(a, n), rate(b, m)))
        found = independent_difference(first, second)
        assert (found.low, found.high) == pytest.approx(confint(a, n, b, m, method="newcomb"), abs=1e-9)


def test_mcnemar_and_holm_are_statsmodels() -> None:
    exact = package("statsmodels.stats.contingency_tables").mcnemar
    adjust = package("statsmodels.stats.multitest").multipletests
    rng = np.random.default_rng(0)
    a, b = rng.random(60) < 0.8, rng.random(60) < 0.6
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    assert mcnemar(a, b)[2] == pytest.approx(exact(table, exact=True).pvalue)
    values = [0.04, 0.001, 0.03, 0.5, 0.03]
    assert holm(values) == pytest.approx(adjust(values, method="holm")[1])


def test_slope_and_intercepts_are_statsmodels() -> None:
    api = package("statsmodels.api")
    rng = np.random.default_rng(4)
    z = rng.normal(0, 2, 300)
    y = (rng.random(300) < expit(0.4 + 0.7 * z)).astype(int)
    full = api.GLM(y, api.add_constant(z), family=api.families.Binomial()).fit(tol=1e-12)
    slope, intercept = slope_and_intercept(z, y, np.ones((1, 300)))
    assert (intercept[0], slope[0]) == pytest.approx(full.params, abs=1e-7)
    large = api.GLM(y, np.ones((300, 1)), family=api.families.Binomial(), offset=z).fit(tol=1e-12)
    assert intercept_in_the_large(z, y, np.ones((1, 300)))[0] == pytest.approx(large.params[0], abs=1e-7)


@pytest.mark.parametrize("module", ["rocauc_comparison.delong", "compare_auc_delong_xu"])
@pytest.mark.parametrize("ties", [False, True])
def test_delong_is_the_published_code(module: str, ties: bool) -> None:
    published = package(module).fastDeLong
    rng = np.random.default_rng(8)
    for n in (12, 50, 300):
        labels = np.r_[0, 0, 1, 1, rng.integers(0, 2, n)]
        scores = np.stack([labels + rng.normal(0, spread, len(labels)) for spread in (1, 2)])
        scores = np.round(scores) if ties else scores
        found = areas(labels, scores)
        positives_first = np.argsort(-labels, kind="stable")
        values, covariance = published(scores[:, positives_first], int(labels.sum()))
        np.testing.assert_allclose(found.values, values, atol=1e-12)
        np.testing.assert_allclose(found.covariance, covariance, atol=1e-12)
        z = (values[0] - values[1]) / np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
        assert difference(found, 0, 1)[3] == pytest.approx(2 * norm.sf(abs(z)), rel=1e-9)


def test_concordance_is_scikit_survivals() -> None:
    published = package("sksurv.metrics").concordance_index_censored
    rng = np.random.default_rng(5)
    for n in (10, 80, 250):
        times, events, risks = rng.integers(1, 15, n), rng.random(n) < 0.6, rng.integers(0, 9, n)
        found = Concordance.of(times, events, risks).index(np.ones((1, n)))[0]
        assert found == pytest.approx(published(events, times.astype(float), risks.astype(float))[0], abs=1e-9)
