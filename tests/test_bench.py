"""`bench what=read` on a slide that it draws itself: every method gives a rate, ratios are of one run."""

import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from histoscale.data.journal import Journal
from histoscale.launch.bench import BaggedConfig
from histoscale.launch.bench_mil import drop, resident, simulate
from histoscale.launch.config import load
from histoscale.launch.loopback import Absent, find_azurite
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


@pytest.mark.slow
def test_bench_simulates_a_catalog(tmp_path: Path) -> None:
    sizes = {"slides": 300, "distinct": 20, "visits": 80, "read_visits": 6, "workers": 2}
    keys = [f"catalog_scale.{name}={size}" for name, size in sizes.items()]
    found = invoke("bench", ["what=catalog", f"out={tmp_path}", "rounds=1", "logging.progress=off", *keys])["bench"]["catalog"]
    assert found["slides"] == 300 and found["visits"] == 80
    assert 0 < found["plan_share"] < found["plan_and_open_share"] < 1
    assert found["pss_bytes"] > 0 and 5_000 < found["bytes_a_slide"] < 100_000
    assert execute("bench", ["what=catalog", f"out={tmp_path}", "rounds=1", "logging.progress=off", *keys]) == 0


@pytest.mark.slow
def test_bench_reads_from_a_store_that_is_far(tmp_path: Path) -> None:
    try:
        find_azurite()
    except Absent as absent:
        pytest.skip(str(absent))
    pytest.importorskip("obstore")
    small = ["rounds=1", "sampler.patch_px=64", "sampler.grid=2", "remote.batch=4", "remote.steps=4", "cohort.case_mm=[0.8,0.8]"]
    found = invoke("bench", ["what=remote", f"out={tmp_path}", "logging.progress=off", *small])["bench"]["remote"]
    assert found["requests_to_open"] == 0 and set(found["far_to_near"]) == {"obstore", "fsspec"}
    for name, one in found["methods"].items():
        assert one["patches"] >= 16 and one["cpu_ms_a_patch"]["median"] > 0
        assert one["peak_bytes"] < one["budget_bytes"] + (64 << 20)  # clients and their threads come on top of so little
        assert (one["requests_a_patch"] > 0) == (name != "local") and one["bytes_to_touched"] >= 0.99


def test_another_subject_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("bench", ["what=nothing", f"out={tmp_path}", "logging.progress=off"]) == 2
    assert "expected read" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_reads_embedding_stores_and_trains_on_them(tmp_path: Path) -> None:
    sizes = {"slides": 12, "tiles": 300, "width": 64, "bag": 100, "cache_bytes": 0}
    keys = [f"bagged.{name}={size}" for name, size in sizes.items()]
    keys += ["bagged.overrides=['mil.batch=2']", "rounds=2", "logging.progress=off", f"out={tmp_path}"]
    found = invoke("bench", ["what=mil", *keys])["bench"]["mil"]
    assert found["slides"] == 12 and found["bytes"] == 12 * 300 * 64 * 2 and found["cold"] == 0
    assert {"plain_1", "plain_n", "disk", "whole", "drawn"} == set(found["rates"])
    assert all(0 < rate["low"] <= rate["median"] <= rate["high"] for rate in found["rates"].values())
    epoch = found["epoch"]
    assert epoch["steps"] == 6 and 0 < epoch["wait_share"] < 1 and epoch["wait_ms"] < epoch["step_ms"] and epoch["pss_bytes"] > 0


def test_pages_in_memory_are_counted_and_dropped(tmp_path: Path) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("no posix_fadvise here")
    path = tmp_path / "a"
    path.write_bytes(os.urandom(10 * mmap.PAGESIZE + 1))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        assert resident(file.fileno(), path.stat().st_size).sum() == 11
        if drop([path]) > 0:
            pytest.skip("this file system keeps files in memory")
        assert not resident(file.fileno(), path.stat().st_size).any()
        file.read(1)
        assert resident(file.fileno(), path.stat().st_size)[0]


def test_stores_that_the_disk_cannot_hold_are_fewer(tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: BaggedConfig = load("bench", ["bagged.tiles=50", "bagged.width=8", "bagged.slides=40"]).config.bagged
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=20_000))
    assert len(simulate(journal.path("stores/x").parent, wanted, 0, journal)) == 12  # half of the disk by 800 bytes
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=5_000))
    with pytest.raises(ValueError, match="no room for 4 stores"):
        simulate(tmp_path, wanted, 0, journal)
