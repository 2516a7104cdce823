"""fp16: overflows skip steps and lower the scale, the trace stays near float32's, and a stop changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import train_tiny

from histoscale.data.ranks import Ranks
from histoscale.pretrain import trainer
from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors
from histoscale.pretrain.guard import LossScale, LossScaleConfig, NonFinite
from histoscale.pretrain.trainer import TrainConfig, TrainResult, train

ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)
CPU = torch.device("cpu")


def configured(**keys: Any) -> TrainConfig:
    base = {"schedule.steps": 10, "checkpoint.every": 5, "hardware.attention": "math", "precision": "fp16"}
    return train_tiny.with_keys(train_tiny.CONFIG, **{**base, **keys})


def go(out: Path, config: TrainConfig, source: Any = None) -> TrainResult:
    torch.set_num_threads(1)
    source = source or train_tiny.synthetic(0, config, ALONE)
    return train(config, source, (), train_tiny.journal_in(out, ALONE), ALONE, {"data_seed": 0})


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def state(out: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(read_checkpoint(out / f"checkpoints/step-{step}"), "")


def test_the_scale_halves_doubles_and_stands_still() -> None:
    scale = LossScale(LossScaleConfig(8.0, 3), "fp16", CPU)
    fine, gone, go_on, stopped = torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.inf]), torch.tensor(1.0), torch.tensor(0.0)
    seen = []
    for norms in (fine, fine, fine, gone, fine, fine, gone, gone, gone):
        overflow = scale.overflow(norms)
        scale.move(overflow, go_on)
        seen.append(float(scale.value))
    assert seen == [8, 8, 16, 8, 8, 8, 4, 2, 1]
    assert float(scale.overflow(gone)) == 0  # no lower scale would help: this one must stop the run
    scale.move(torch.tensor(0.0), stopped)
    assert scale.tensors()["loss_scale.calm"] == 0
    other = LossScale(LossScaleConfig(8.0, 3), "bf16", CPU)
    assert other.tensors() == {} and float(other.value) == 1 and float(other.overflow(gone)) == 0
    with pytest.raises(ValueError, match="at least 1"):
        LossScale(LossScaleConfig(0.5, 3), "fp16", CPU)


def test_fp16_stays_near_float32_and_weights_stay_float32(tmp_path: Path) -> None:
    half = go(tmp_path / "fp16", configured(**{"optim.loss_scale": LossScaleConfig(64.0, 2000)}))
    go(tmp_path / "fp32", configured(**{"precision": "fp32"}))
    ours, theirs = rows(tmp_path / "fp16"), rows(tmp_path / "fp32")
    assert all("loss_scale" in row for row in ours) and all("loss_scale" not in row for row in theirs)
    assert ours[-1]["skipped_steps"] == 0
    for name in ("loss/dino", "loss/ibot"):
        assert max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(ours, theirs, strict=True)) < 1e-2
    for name in ("grad_norm/backbone", "grad_norm/head"):  # the scale is taken out before anything looks at them
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=2e-2)
    assert ours[0]["loss"] != theirs[0]["loss"]  # it did compute in another precision
    assert {x.dtype for x in half.student.state_dict().values()} == {torch.float32}


def test_an_overflow_skips_its_step_and_nothing_moves(tmp_path: Path) -> None:
    keys = {"optim.loss_scale": LossScaleConfig(2.0**14, 2000), "checkpoint.every": 1, "checkpoint.keep_last": 20}
    go(tmp_path, configured(**keys, **{"schedule.steps": 14}))
    last = rows(tmp_path)[-1]
    assert 2 <= last["skipped_steps"] < 12 and last["loss_scale"] == 2.0 ** (14 - last["skipped_steps"])
    before, after = state(tmp_path, 1), state(tmp_path, 2)
    frozen = [name for name in before if name.startswith(("student.", "teacher.", "optimizer."))]
    assert len(frozen) > 100 and all(torch.equal(before[name], after[name]) for name in frozen)
    assert float(after["loss_scale.value"]) == 2.0**12
    end = state(tmp_path, 14)
    assert all(x.isfinite().all() for x in end.values()) and not torch.equal(
        end["student.backbone.cls_token"], after["student.backbone.cls_token"]
    )


def test_stopped_and_resumed_it_is_bit_equal_with_its_scale(tmp_path: Path) -> None:
    keys = {"optim.loss_scale": LossScaleConfig(2.0**20, 3)}
    go(tmp_path / "one", configured(**keys))
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "two", configured(**keys), interrupted(7, configured(**keys)))
    go(tmp_path / "two", configured(**keys))
    ours, theirs = state(tmp_path / "one", 10), state(tmp_path / "two", 10)
    assert ours.keys() == theirs.keys() and "loss_scale.value" in ours
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert float(ours["loss_scale.value"]) != 2.0**20  # it moved


def interrupted(step: int, config: TrainConfig) -> Any:
    whole = train_tiny.synthetic(0, config, ALONE)

    def batches(start: int) -> Any:
        for batch in whole(start):
            if batch.step == step:
                raise KeyboardInterrupt
            yield batch

    return batches


def test_gradients_that_no_scale_mends_stop_the_run(tmp_path: Path) -> None:
    """A finite loss whose gradient is not: the scale falls to 1 first, then the step is named."""
    config = configured(**{"optim.loss_scale": LossScaleConfig(4.0, 2000), "optim.global_batch": 24})

    class Torn(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * torch.nan

    whole = trainer.losses

    def torn(*given: Any) -> Any:
        found = whole(*given)
        return found._replace(total=Torn.apply(found.total))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "losses", torn)
        with pytest.raises(NonFinite, match="step 2: "):  # 4, 2, then 1
            go(tmp_path, config)
    assert state(tmp_path, 2)["loss_scale.value"] == 1
