"""Calibration: published values, scikit-learn's regression, separation without a slope, and recalibration on local cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from histoscale.eval.scores.calibration import (
    brier_parts,
    equal_mass,
    errors_if_calibrated,
    fit_line,
    intercept_in_the_large,
    log_odds,
    reliability,
    slope_and_intercept,
)
from histoscale.eval.scores.recalibration import RecalibrationConfig, fit_recalibration, local_recalibration, recalibrate

Y = np.array([1] * 5 + [0] * 7)
P = np.array([0.9, 0.8, 0.8, 0.55, 0.3, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])


def drawn(n: int, slope: float, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and outcomes whose true logit is shift + slope * logit."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, n)
    return expit(z), (rng.random(n) < expit(shift + slope * z)).astype(int)


def test_published_values() -> None:
    parts = brier_parts(P, Y)
    assert (parts.reliability, parts.resolution, parts.uncertainty) == pytest.approx((0.111042, 0.201389, 0.243056), abs=1e-6)
    assert parts.skill == pytest.approx(0.371714, abs=1e-6)
    assert reliability(P, Y, 15).expected_calibration_error == pytest.approx(0.279167, abs=1e-6)
    assert equal_mass(P, Y, 4).expected_calibration_error == pytest.approx(0.1375)
    assert np.isnan(brier_parts(P, np.ones(12)).skill)


def test_slope_and_intercept_are_an_unpenalised_regression() -> None:
    p, y = drawn(400, 0.6, -0.7)
    weights = np.random.default_rng(1).integers(0, 4, (3, 400))
    slope, intercept = slope_and_intercept(log_odds(p), y, weights)
    for i, w in enumerate(weights):
        fitted = LogisticRegression(C=1e12, tol=1e-10, max_iter=5000).fit(logit(p)[:, None], y, sample_weight=w)
        assert (slope[i], intercept[i]) == pytest.approx((fitted.coef_[0, 0], fitted.intercept_[0]), abs=1e-4)
        large = intercept_in_the_large(log_odds(p), y, w[None])[0]
        assert (w * (expit(logit(p) + large) - y)).sum() == pytest.approx(0, abs=1e-6)  # expected events as many as observed


def test_a_calibrated_model_shows_what_was_drawn_for_it() -> None:
    rng = np.random.default_rng(6)
    p = rng.random(80)
    drawn = errors_if_calibrated(p, 15, rng.random((500, 80)))
    plain = [reliability(p, rng.random(80) < p, 15).expected_calibration_error for _ in range(500)]
    assert drawn.mean() == pytest.approx(np.mean(plain), abs=0.01) and drawn.mean() > 0.05
    one = rng.random((1, 80))
    assert errors_if_calibrated(p, 15, one)[0] == pytest.approx(reliability(p, one[0] < p, 15).expected_calibration_error)


def test_slope_finds_the_distortion() -> None:
    p, y = drawn(20_000, 0.5, 1.0)
    slope, intercept = slope_and_intercept(log_odds(p), y, np.ones((1, len(y))))
    assert slope[0] == pytest.approx(0.5, abs=0.05) and intercept[0] == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [([-2.0, -1, 1, 2], [0, 0, 1, 1]), ([-2.0, -1, 1, 2], [1, 1, 0, 0]), ([0.0, 1, 2], [1, 1, 1]), ([1.0, 1, 1], [0, 1, 0]),
     ([-1.0, 0, 0, 1], [0, 0, 1, 1])],
)  # fmt: skip
def test_where_there_is_no_slope(logits: list[float], labels: list[int]) -> None:
    slope, intercept = slope_and_intercept(np.array(logits), np.array(labels), np.ones((1, len(labels))))
    assert np.isnan(slope[0]) and np.isnan(intercept[0])


def test_far_logits_still_converge() -> None:
    x = np.array([-13.0, -13, 13, 13, 13, -13, 13])
    y = np.array([0, 0, 1, 1, 1, 1, 0])
    slope, intercept = slope_and_intercept(x, y, np.ones((1, 7)))
    assert expit(intercept + 13 * slope)[0] == pytest.approx(3 / 4) and expit(intercept - 13 * slope)[0] == pytest.approx(1 / 3)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 5.0, 13.8]), st.integers(2, 30))
def test_every_problem_ends_at_its_minimum(seed: int, far: float, n: int) -> None:
    """Many weightings at once, some nearly separable and some far from the shared start: each gradient vanishes."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-far, far, n)
    y = (rng.random(n) < expit(rng.normal() * x + rng.normal())).astype(float)
    weights = rng.integers(0, 3, (20, n)) ** 3
    slope, intercept = slope_and_intercept(x, y, weights)
    known = ~np.isnan(slope)
    rest = weights[known] * (expit(intercept[known, None] + slope[known, None] * x) - y)
    assert np.abs(rest.sum(1)).max(initial=0) < 1e-4 and np.abs((rest * x).sum(1)).max(initial=0) < 1e-4


def test_a_line_without_curvature_moves_the_intercept_alone() -> None:
    assert fit_line(np.zeros(4), np.array([1.0, 0, 0, 0]), np.ones((1, 4)), (True, True))[:, 0] == pytest.approx([logit(0.25), 1])


def once(p: np.ndarray, y: np.ndarray, method: str) -> np.ndarray:
    return fit_recalibration(p, y, method, np.ones((1, len(p))))[:, 0]


def test_recalibration_undoes_a_distortion_and_keeps_the_order() -> None:
    p, y = drawn(4000, 0.5, -1.0)
    for method, expected in (("platt", (-1.0, 0.5)), ("temperature", (0.0, 0.5)), ("intercept", (-1.0, 1.0))):
        line = once(p, y, method)
        assert line == pytest.approx(expected, abs=0.25)
        assert (np.argsort(recalibrate(p, line)) == np.argsort(p)).all()
    few = once(np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1]), "platt")
    assert np.isfinite(few).all() and 0 < few[1] < 2  # separable cases give a slope that is not infinite
    contrary = once(np.array([0.1, 0.2, 0.8, 0.9]), np.array([1, 1, 0, 0]), "platt")
    assert contrary == pytest.approx((0.0, 0.0), abs=1e-6)
    with pytest.raises(ValueError, match="expected intercept, temperature, platt"):
        once(p, y, "isotonic")


def test_samples_at_once_are_the_samples_one_by_one() -> None:
    p, y = drawn(60, 0.5, -1.0)
    chosen = np.random.default_rng(0).random((7, 60)) < 0.3
    for method in ("intercept", "temperature", "platt"):
        found = fit_recalibration(p, y, method, chosen.astype(float))
        for own, line in zip(chosen, found.T, strict=True):
            assert line == pytest.approx(once(p[own], y[own], method), abs=1e-7)


def test_local_cases_are_never_read_and_patients_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from histoscale.eval.scores import recalibration

    p, y = drawn(120, 0.4, -1.2)
    groups = [f"p{i // 2}" for i in range(120)]
    seen: list[np.ndarray] = []
    fitted = recalibration.fit_recalibration

    def watched(some: np.ndarray, positive: np.ndarray, method: str, weights: np.ndarray) -> np.ndarray:
        seen.append(weights)
        return fitted(some, positive, method, weights)

    monkeypatch.setattr(recalibration, "fit_recalibration", watched)
    config = RecalibrationConfig(cases=[10, 40, 61], methods=["platt", "intercept"], draws=20, seed=0)
    found = local_recalibration(p, y, groups, config, 15)
    assert [(one.method, one.cases) for one in found] == [(m, n) for n in (10, 40) for m in ("platt", "intercept")]
    for weights, size in zip(seen, (10, 10, 40, 40), strict=True):
        assert (weights.sum(1) == size).all() and (weights[:, ::2] == weights[:, 1::2]).all()
        assert len({tuple(row) for row in weights}) == 20
    best = found[2]  # platt on 40
    assert best.after["brier"].mean < best.before["brier"].mean and best.better > 0.8
    assert best.before["brier"].low <= best.before["brier"].mean <= best.before["brier"].high
    poisoned = np.where(seen[2][0] > 0, 0.5, p)  # what was learned from enters no number of that draw
    again = local_recalibration(poisoned, y, groups, RecalibrationConfig([40], ["intercept"], 1, 0), 15)[0]
    alone = local_recalibration(p, y, groups, RecalibrationConfig([40], ["intercept"], 1, 0), 15)[0]
    assert again.before == alone.before


def test_a_config_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected some of intercept"):
        RecalibrationConfig(cases=[10], methods=["isotonic"], draws=2, seed=0)
