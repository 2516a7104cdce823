"""On a CUDA device: what other tests show on the CPU, where a GPU may break it. Without one all of it is skipped."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import train_tiny
from test_views import config as views_config
from test_views import patches
from torch import nn

from histoscale.data.keys import keys, normal, uniform
from histoscale.data.ranks import Ranks
from histoscale.data.stream import Batch
from histoscale.data.views import make_undistorted, make_views
from histoscale.pretrain.blocks import unavailable
from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors
from histoscale.pretrain.guard import LossScaleConfig, NonFinite
from histoscale.pretrain.preempted import Preempted
from histoscale.pretrain.trainer import TrainConfig, TrainResult, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda", 0)
ALONE = Ranks(0, 1, 0, CUDA, False)
ON_CPU = Ranks(0, 1, 0, torch.device("cpu"), False)
SCALE = LossScaleConfig(64.0, 2000)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions in whole float32, and what a run sets for the process put back."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before
    torch.cuda.set_sync_debug_mode("default")


def configured(**changes: Any) -> TrainConfig:
    standard = {"schedule.steps": 8, "checkpoint.every": 4, "hardware.device": "cuda"}
    return train_tiny.with_keys(train_tiny.CONFIG, **{**standard, **changes})


def go(out: Path, config: TrainConfig, source: Any = None, watchers: Any = (), ranks: Ranks = ALONE) -> TrainResult:
    source = source or train_tiny.synthetic(0, config, ON_CPU)
    return train(config, source, watchers, train_tiny.journal_in(out, ranks), ranks, {"data_seed": 0})


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def state(out: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(read_checkpoint(out / f"checkpoints/step-{step}"), "")


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys() and len(one) > 100
    return [name for name in one if not torch.equal(one[name], other[name])]


def apart(one: Path, other: Path, terms: tuple[str, ...] = ("loss/dino", "loss/ibot")) -> float:
    """The greatest relative difference of a term at any step."""
    pairs = list(zip(rows(one), rows(other), strict=True))
    assert len(pairs) == 8
    return max(abs(a[name] - b[name]) / abs(a[name]) for a, b in pairs for name in terms)


# Draws and views.


def test_draws_are_the_cpus_to_the_bit() -> None:
    slots = torch.arange(1000)
    here, there = keys(3, "test", 7, slots), keys(3, "test", 7, slots.to(CUDA))
    assert torch.equal(here, there.cpu())
    assert torch.equal(uniform(here, 5), uniform(there, 5).cpu())
    torch.testing.assert_close(normal(here, 5), normal(there, 5).cpu(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["default", "ect"])
def test_views_are_the_cpus_but_for_rounding(name: str) -> None:
    """A value on the edge of a sector of hue or of solarisation may fall on its other side: a pixel in ten thousand."""
    config = views_config(name, preset="blur_intended", global_solarize_p=[0.0, 0.2])
    pixels, slots = patches(6, 416), torch.arange(6)
    here, there = (make_views(pixels.to(device), 0, 3, slots, config) for device in ("cpu", CUDA))
    undistorted = [make_undistorted(pixels.to(device), 0, 3, slots, config, 112) for device in ("cpu", CUDA)]
    for ours, theirs in (*zip(here, there, strict=True), tuple(undistorted)):
        gap = (ours - theirs.cpu()).abs()
        assert theirs.device.type == "cuda" and ours.shape == theirs.shape
        assert float((gap > 1e-3).float().mean()) < 1e-4 and float(gap.mean()) < 1e-4


# The trainer.


def test_float32_follows_the_cpu(tmp_path: Path) -> None:
    go(tmp_path / "cuda", configured())
    go(tmp_path / "cpu", configured(**{"hardware.device": "cpu"}), ranks=ON_CPU)
    assert apart(tmp_path / "cpu", tmp_path / "cuda") < 1e-4
    assert apart(tmp_path / "cpu", tmp_path / "cuda", ("grad_norm/backbone", "grad_norm/head")) < 1e-3
    ends = [state(tmp_path / name, 8) for name in ("cpu", "cuda")]
    assert {name: x.shape for name, x in ends[0].items()} == {name: x.shape for name, x in ends[1].items()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_stay_near_float32_and_weights_stay_float32(tmp_path: Path, precision: str) -> None:
    half = go(tmp_path / "half", configured(**{"precision": precision, "optim.loss_scale": SCALE}))
    go(tmp_path / "whole", configured())
    assert 0 < apart(tmp_path / "whole", tmp_path / "half") < (2e-2 if precision == "bf16" else 1e-2)
    assert {x.dtype for x in half.student.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("precision", "more"),
    [("fp32", {}), ("fp32", {"hardware.attention": "packed", "hardware.activation_checkpointing": True}), ("bf16", {}),
     ("bf16", {"hardware.attention": "varlen"}), ("bf16", {"hardware.attention": "math"}), ("fp16", {}),
     ("bf16", {"hardware.compile": True}), ("fp32", {"method.targets": "centering", "optim.clip_scope": "param"}),
     ("bf16", {"method.koleo_weight": 0.0, "method.kde_weight": 0.1, "optim.micro_batches": 3}),
     ("bf16", {"method.gram": train_tiny.GRAM})],
    ids=["fp32", "packed and recomputed", "bf16", "varlen", "math", "fp16", "compiled", "centring", "kde, micro-batches", "gram"],
)  # fmt: skip
def test_stopped_and_resumed_it_is_bit_equal(tmp_path: Path, precision: str, more: dict[str, Any]) -> None:
    if why := unavailable(more.get("hardware.attention", "auto"), CUDA, precision):
        pytest.skip(why)
    config = configured(**{"precision": precision, "optim.loss_scale": SCALE, "checkpoint.every": 3, **more})
    go(tmp_path / "one", config)
    with pytest.raises(Preempted):
        go(tmp_path / "two", config, train_tiny.kill_at(4, train_tiny.synthetic(0, config, ON_CPU), signal.SIGTERM))
    go(tmp_path / "two", config)
    assert differing(state(tmp_path / "one", 8), state(tmp_path / "two", 8)) == []


@pytest.mark.parametrize(
    ("precision", "more", "tolerance"),
    [("fp32", {"hardware.attention": "packed"}, 1e-4), ("fp32", {"hardware.attention": "math"}, 1e-4),
     ("fp32", {"hardware.activation_checkpointing": True}, 1e-4), ("fp32", {"hardware.deterministic": False}, 1e-4),
     ("fp32", {"hardware.compile": True}, 1e-4), ("bf16", {"hardware.attention": "packed"}, 2e-2),
     ("bf16", {"hardware.attention": "varlen"}, 2e-2), ("bf16", {"hardware.compile": True, "hardware.attention": "varlen"}, 2e-2),
     ("fp16", {"hardware.compile": True}, 1e-2)],
    ids=lambda value: "+".join(str(x) for x in value.values()) if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_speed_keys_leave_the_trace(tmp_path: Path, precision: str, more: dict[str, Any], tolerance: float) -> None:
    if why := unavailable(more.get("hardware.attention", "auto"), CUDA, precision):
        pytest.skip(why)
    given = {"precision": precision, "optim.loss_scale": SCALE}
    go(tmp_path / "plain", configured(**given))
    go(tmp_path / "other", configured(**given, **more))
    assert apart(tmp_path / "plain", tmp_path / "other") < tolerance


def test_a_checkpoint_written_beside_the_loop_is_the_state_at_its_step(tmp_path: Path) -> None:
    for name, beside in (("at once", False), ("beside", True)):
        go(tmp_path / name, configured(**{"checkpoint.every": 1, "checkpoint.keep_last": 8, "checkpoint.asynchronous": beside}))
    for step in range(1, 9):
        assert differing(state(tmp_path / "at once", step), state(tmp_path / "beside", step)) == []


def test_an_overflow_skips_its_step_and_nothing_moves(tmp_path: Path) -> None:
    more = {"precision": "fp16", "optim.loss_scale": LossScaleConfig(2.0**30, 2000), "checkpoint.every": 1}
    go(tmp_path, configured(**more, **{"checkpoint.keep_last": 30, "schedule.steps": 30}))
    last = rows(tmp_path)[-1]
    assert 5 <= last["skipped_steps"] < 28 and last["loss_scale"] == 2.0 ** (30 - last["skipped_steps"])
    before, after, end = (state(tmp_path, step) for step in (3, 4, 30))
    assert not [name for name in differing(before, after) if name.startswith(("student.", "teacher.", "optimizer."))]
    assert all(x.isfinite().all() for x in end.values()) and "student.backbone.cls_token" in differing(after, end)


def test_nothing_moves_from_the_first_step_that_is_not_finite_on(tmp_path: Path) -> None:
    healthy, poisoned = tmp_path / "healthy", tmp_path / "poisoned"
    config = configured(**{"schedule.steps": 12, "checkpoint.every": 12, "monitor.every": 6, "method.targets": "centering"})
    with pytest.raises(Preempted):
        each = train_tiny.with_keys(config, **{"checkpoint.every": 1})
        go(healthy, each, train_tiny.kill_at(1, train_tiny.synthetic(0, config, ON_CPU), signal.SIGTERM))

    def poison(backbone: nn.Module, step: int) -> dict[str, float]:
        if step:
            backbone.get_parameter("cls_token").data[..., 0] = torch.inf
        return {}

    with pytest.raises(NonFinite, match="step 1: "):
        go(poisoned, config, watchers=[poison])
    assert differing(state(healthy, 1), state(poisoned, 1)) == ["teacher.backbone.cls_token"]


@pytest.mark.parametrize(
    "more",
    [{}, {"precision": "bf16", "hardware.attention": "packed"}, {"precision": "bf16", "hardware.attention": "varlen"},
     {"precision": "fp16", "optim.loss_scale": SCALE}, {"precision": "bf16", "hardware.compile": True},
     {"method.targets": "centering", "optim.clip_scope": "param"}, {"optim.micro_batches": 3},
     {"method.koleo_weight": 0.0, "method.kde_weight": 0.1, "optim.clip_scope": "global"},
     {"hardware.activation_checkpointing": True}, {"method.gram": train_tiny.GRAM}],
    ids=["plain", "packed", "varlen", "fp16", "compiled", "param, centring", "micro-batches", "kde", "recomputed", "gram"],
)  # fmt: skip
def test_between_rows_the_host_waits_for_nothing(tmp_path: Path, more: dict[str, Any]) -> None:
    if why := unavailable(more.get("hardware.attention", "auto"), CUDA, more.get("precision", "fp32")):
        pytest.skip(why)
    silent = {"schedule.steps": 9, "checkpoint.every": 100, "monitor.every": 9, "hardware.deterministic": False}
    config = configured(**silent, **more)

    def source(start: int) -> Iterator[Batch]:
        for batch in train_tiny.synthetic(0, config, ON_CPU)(start):
            torch.cuda.set_sync_debug_mode("error" if 2 <= batch.step <= 7 else "default")
            yield batch

    go(tmp_path, config, source)
