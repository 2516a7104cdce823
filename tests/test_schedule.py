"""Schedules against their closed forms at the places where presets differ."""

import math

import numpy as np
import pytest

from histoscale.pretrain.schedule import ScheduleConfig, cosine, linear_then_flat

T, W = 50, 10


def values(preset: str, warmup: int = W) -> list[float]:
    config = ScheduleConfig(preset, T, warmup, None, True)
    return [cosine(step, config, warmup, 0.0, 2.0, 0.5) for step in range(T + 3)]


def test_d2_v1() -> None:
    """Warm-up with the peak, the peak again, never `final` before the end."""
    got = values("d2_v1")
    decay = [0.5 + 0.75 * (1 + math.cos(math.pi * i / (T - W))) for i in range(T - W)]
    assert np.allclose(got, [*np.linspace(0, 2, W), *decay, 0.5, 0.5, 0.5])
    assert got[W - 1] == got[W] == 2.0 and got[T - 1] > 0.5 == got[T]


def test_d3_v2() -> None:
    """Warm-up without the peak, the last step is `final`."""
    got = values("d3_v2")
    decay = 0.5 + 0.75 * (1 + np.cos(np.linspace(0, math.pi, T - W)))
    assert np.allclose(got, [*np.linspace(0, 2, W, endpoint=False), *decay, 0.5, 0.5, 0.5])
    assert got[W - 1] < got[W] == 2.0 and math.isclose(got[T - 1], 0.5)


@pytest.mark.parametrize("preset", ["d2_v1", "d3_v2"])
def test_without_warm_up_the_first_value_is_the_peak(preset: str) -> None:
    assert values(preset, 0)[0] == 2.0


def test_teacher_temperature() -> None:
    got = [linear_then_flat(step, 30, 0.04, 0.07) for step in range(40)]
    assert np.allclose(got, [*np.linspace(0.04, 0.07, 30), *[0.07] * 10])
    assert linear_then_flat(0, 0, 0.04, 0.07) == 0.07


def test_a_constant_stays_exactly_constant() -> None:
    config = ScheduleConfig("d2_v1", T, 0, None, True)
    assert {cosine(step, config, 0, 0.994, 0.994, 0.994) for step in range(T + 1)} == {0.994}


@pytest.mark.parametrize("preset", ["d2_v1", "d3_v2"])
def test_a_horizon_beyond_the_run_leaves_it_on_its_way(preset: str) -> None:
    """A run of 20 steps on a horizon of T has the first 20 values of a run of T; a horizon within it ends in a flat tail."""
    short, tail = ScheduleConfig(preset, 20, W, T, True), ScheduleConfig(preset, T + 3, W, T, True)
    assert [cosine(step, short, W, 0.0, 2.0, 0.5) for step in range(20)] == values(preset)[:20]
    assert [cosine(step, tail, W, 0.0, 2.0, 0.5) for step in range(T + 3)] == values(preset)


def test_errors() -> None:
    with pytest.raises(ValueError, match="schedule.preset='cosine'"):
        cosine(0, ScheduleConfig("cosine", T, W, None, True), W, 0, 1, 0)
    with pytest.raises(ValueError, match="warmup_steps=60 does not fit"):
        cosine(0, ScheduleConfig("d2_v1", T, 60, None, True), 60, 0, 1, 0)
