"""`bench what=read` on a slide that it draws itself: every method gives a rate, ratios are of one run."""

from pathlib import Path

import pytest

from histoscale.launch.run import execute, invoke


@pytest.mark.slow
def test_bench_reads_a_slide_that_it_draws(tmp_path: Path) -> None:
    small = ["rounds=2", "visits=4", "sampler.mpps=[0.5,1.0]", "sampler.weights=[1,1]", "sampler.patch_px=64"]
    summary = invoke("bench", ["what=read", f"out={tmp_path}", "cohort.case_mm=[0.8,0.8]", "logging.progress=off", *small])
    read = summary["bench"]["read"]
    assert {"region", "single", "stream", "openslide", "area_limit", "tile_limit"} <= set(read["rates"])
    for rate in read["rates"].values():
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    assert {"region/openslide", "region/area_limit", "single/tile_limit"} <= set(read["ratios"])
    assert 0 <= read["filter_refused"] < 1


def test_another_subject_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("bench", ["what=nothing", f"out={tmp_path}", "logging.progress=off"]) == 2
    assert "expected read" in capsys.readouterr().err
