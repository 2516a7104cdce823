"""`bench what=train`: a time for every part of a step, the plain step beside it, and a reason where it cannot stand there."""

from pathlib import Path
from typing import Any

import pytest

from histoscale.launch.bench_train import SHARED
from histoscale.launch.run import execute, invoke
from histoscale.pretrain.meter import PARTS

TINY = ["model.width=48", "model.depth=2", "method.head.prototypes=32", "method.head.hidden=64", "method.group=4",
        "method.koleo_pool=4", "method.kde_pool=4", "optim.global_batch=8", "stream.workers=0", "stream.threads=1",
        "precision=bf16", "hardware.device=cpu", "hardware.threads=1", "monitor.peak_tflops=1.0"]  # fmt: skip
KEYS = ["what=train", "rounds=2", "train.steps=2", "cohort.case_mm=[0.8,0.8]", "logging.progress=off"]


def overrides(*more: str) -> str:
    return "train.overrides=[" + ",".join(f"'{text}'" for text in [*TINY, *more]) + "]"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench")
    summary = invoke("bench", [*KEYS, overrides(), f"out={out}"])["bench"]["train"]
    assert (out / "summary.json").exists() and not (out / "round").exists()
    return {**summary, "catalog": str(out / "slide/catalog")}


@pytest.mark.slow
def test_every_part_has_its_time_and_they_are_the_step(found: dict[str, Any]) -> None:
    assert set(found["ms"]) == set(PARTS) and set(found["plain_ms"]) == set(SHARED) and found["no_plain"] == ""
    for part in PARTS:
        ms = found["ms"][part]
        assert 0 <= ms["low"] <= ms["median"] <= ms["high"]
    busy = ("views", "teacher", "student", "losses", "backward", "optimiser", "ema")
    assert all(found["ms"][part]["low"] > 0 for part in busy) and all(found["plain_ms"][part]["low"] > 0 for part in SHARED)
    assert sum(ms["low"] for ms in found["ms"].values()) <= found["step_ms"]["median"] * 1.001
    ratio = found["plain_over_ours"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert found["patches_per_s"] == pytest.approx(8000 / found["step_ms"]["median"])
    assert found["mfu"] == pytest.approx(found["gflops_a_patch"] * found["patches_per_s"] / 1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("model.drop_path=0.5", "no stochastic depth"),
        ("optim.micro_batches=2", "no micro-batches"),
        ("optim.clip_scope=param", "clips"),
    ],
)
def test_what_the_plain_step_lacks_is_said(found: dict[str, Any], tmp_path: Path, more: str, words: str) -> None:
    keys = [*KEYS, "rounds=1", f"catalog={found['catalog']}", overrides(more), f"out={tmp_path}"]
    summary = invoke("bench", keys)["bench"]["train"]
    assert words in summary["no_plain"] and "plain_over_ours" not in summary and summary["ms"]["student"]["median"] > 0


def test_nothing_to_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("bench", ["what=train", "train.steps=0", f"out={tmp_path}", "logging.progress=off"]) == 2
    assert "train.steps is 0" in capsys.readouterr().err
