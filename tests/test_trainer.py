"""The loop: it learns, continues to the bit after any stop, stops before damage, and refuses what cannot be."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from histoscale.data.ranks import Ranks
from histoscale.pretrain.checkpoint import newest_checkpoint, read_checkpoint, read_tensors
from histoscale.pretrain.guard import NonFinite
from histoscale.pretrain.monitor import MonitorConfig, signs_of_collapse
from histoscale.pretrain.parallel import autocast
from histoscale.pretrain.preempted import Preempted
from histoscale.pretrain.trainer import Collapsed, TrainConfig, TrainResult, check_batch, train

PROGRAM = Path(__file__).with_name("train_tiny.py")
ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    spec = spec_from_file_location("train_tiny", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config(tiny: ModuleType) -> TrainConfig:
    keys = {"schedule.steps": 12, "checkpoint.every": 4, "checkpoint.keep_last": 12}
    return tiny.with_keys(tiny.CONFIG, **keys)


@pytest.fixture(scope="module")
def go(tiny: ModuleType) -> Callable[..., TrainResult]:
    """Train in this process: go(out, config, source=…, watchers=…)."""

    def run(out: Path, config: TrainConfig, source: Any = None, watchers: Any = (), data_seed: int = 0) -> TrainResult:
        torch.set_num_threads(1)
        source = source or tiny.synthetic(data_seed, config, ALONE)
        return train(config, source, watchers, tiny.journal_in(out, ALONE), ALONE, {"data_seed": data_seed})

    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, config: TrainConfig, go: Callable[..., TrainResult]) -> Path:
    """A run of 12 steps with a checkpoint after 4, 8 and 12."""
    out = tmp_path_factory.mktemp("undisturbed")
    go(out, config)
    return out


def every_tensor(step_folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(read_checkpoint(step_folder), "")


def assert_equal(one: Path, other: Path) -> None:
    ours, theirs = every_tensor(one), every_tensor(other)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def test_the_loss_falls_by_a_tenth_and_every_row_is_whole(undisturbed: Path) -> None:
    found = rows(undisturbed)
    assert [row["step"] for row in found] == list(range(1, 13))
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]
    names = {"loss/dino", "loss/ibot", "loss/koleo", "dino/ce_of_lnk", "ibot/target_entropy_of_lnk", "dino/prototypes_used",
             "lr", "rankme_cov", "weight_decay", "teacher_momentum", "grad_norm/backbone", "images_per_s",
             "data/wait_fraction"}  # fmt: skip
    assert all(names <= row.keys() and None not in row.values() for row in found)


def test_what_each_parameter_learns_with_is_written_down(undisturbed: Path) -> None:
    head, *lines = (undisturbed / "parameters-base.tsv").read_text().splitlines()
    assert head.split("\t") == ["parameter", "shape", "lr", "weight_decay", "frozen_with"]
    found = {line.split("\t")[0]: line.split("\t")[1:] for line in lines}
    state = every_tensor(undisturbed / "checkpoints/step-12")
    assert found.keys() == {name.removeprefix("student.") for name in state if name.startswith("student.")}
    assert found["backbone.blocks.0.attn.qkv.weight"] == ["144x48", "0.81", "1", "backbone"]
    assert found["backbone.norm.bias"] == ["48", "1", "0", "backbone"] and found["mask_token"][1:] == ["0.729", "1", ""]
    assert found["head.last_direction"] == ["32x32", "1", "1", "last layer"]


def test_another_data_seed_gives_another_run(undisturbed: Path, tmp_path: Path, config: TrainConfig, go: Any) -> None:
    go(tmp_path, config, data_seed=1)
    for name in ("loss/dino", "loss/ibot", "loss/koleo"):
        apart = max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(rows(undisturbed), rows(tmp_path), strict=True))
        assert apart > 1e-2, name  # 100 times what two processes may differ by


def test_speed_keys_change_nothing(undisturbed: Path, tmp_path: Path, tiny: ModuleType, config: TrainConfig, go: Any) -> None:
    keys = {"monitor.every": 5, "monitor.window": 64, "checkpoint.every": 7, "hardware.deterministic": False}
    go(tmp_path, tiny.with_keys(config, **keys))
    assert_equal(undisturbed / "checkpoints/step-12", tmp_path / "checkpoints/step-12")


def test_a_killed_process_continues_bit_equal(undisturbed: Path, tmp_path: Path, config: TrainConfig, go: Any) -> None:
    keys = ["schedule.steps=12", "checkpoint.every=4", "checkpoint.keep_last=12", "kill_at=6"]
    killed = subprocess.run([sys.executable, PROGRAM, tmp_path, *keys], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert newest_checkpoint(tmp_path / "checkpoints")[0].step == 4  # type: ignore[union-attr]
    go(tmp_path, config)
    assert_equal(undisturbed / "checkpoints/step-12", tmp_path / "checkpoints/step-12")


def test_a_stop_signal_saves_and_the_run_continues_bit_equal(
    undisturbed: Path, tmp_path: Path, tiny: ModuleType, config: TrainConfig, go: Any
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for step, number in ((2, signal.SIGTERM), (5, signal.SIGUSR1)):
        with pytest.raises(Preempted) as stop:
            go(tmp_path, config, tiny.kill_at(step, tiny.synthetic(0, config, ALONE), number))
        assert stop.value.step == step + 1
        assert newest_checkpoint(tmp_path / "checkpoints")[0].step == step + 1  # type: ignore[union-attr]
    assert signal.getsignal(signal.SIGTERM) is before
    go(tmp_path, config)
    assert_equal(undisturbed / "checkpoints/step-12", tmp_path / "checkpoints/step-12")


def test_a_checkpoint_cut_short_is_passed_over(undisturbed: Path, tmp_path: Path, config: TrainConfig, go: Any) -> None:
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints/step-12")
    shard = next((tmp_path / "checkpoints/step-8").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    go(tmp_path, config)
    told = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert told["resumed"] == 4 and "cut or changed" in told["skipped"][0]
    assert_equal(undisturbed / "checkpoints/step-12", tmp_path / "checkpoints/step-12")


def test_a_finished_run_does_nothing_more(undisturbed: Path, tmp_path: Path, config: TrainConfig, go: Any) -> None:
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")

    def none(start: int) -> Iterator[Any]:
        raise AssertionError(f"asked for batches from {start} on")
        yield

    assert go(tmp_path, config, none).step == 12


def test_a_checkpoint_of_other_values_is_refused(
    undisturbed: Path, tmp_path: Path, tiny: ModuleType, config: TrainConfig, go: Any
) -> None:
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="other values in optim"):
        go(tmp_path, tiny.with_keys(config, **{"optim.lr": 1e-5}))
    with pytest.raises(ValueError, match="other values in facts"):
        go(tmp_path, config, data_seed=3)


def test_nothing_moves_from_the_first_step_that_is_not_finite_on(tmp_path: Path, tiny: ModuleType, go: Any) -> None:
    keys = {"schedule.steps": 12, "checkpoint.every": 12, "monitor.every": 6, "method.targets": "centering"}
    healthy, poisoned = tmp_path / "healthy", tmp_path / "poisoned"
    config = tiny.with_keys(tiny.CONFIG, **keys)
    with pytest.raises(Preempted):  # what the state is after one step
        each = tiny.with_keys(config, **{"checkpoint.every": 1})
        go(healthy, each, tiny.kill_at(1, tiny.synthetic(0, config, ALONE), signal.SIGTERM))

    def poison(backbone: nn.Module, step: int) -> dict[str, float]:
        if step:  # not before the first one
            backbone.get_parameter("cls_token").data[..., 0] = torch.inf
        return {}

    with pytest.raises(NonFinite, match="step 1: .*nonfinite-step-1.json"):  # found five steps later, at the next row
        go(poisoned, config, watchers=[poison])
    expected, found = every_tensor(healthy / "checkpoints/step-1"), every_tensor(poisoned / "checkpoints/step-1")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == ["teacher.backbone.cls_token"]
    told = json.loads((poisoned / "nonfinite-step-1.json").read_text())
    assert told["step"] == 1 and told["slots"] == list(range(24)) and len(told["slide"]) == 24


def test_micro_batches_are_one_step(tmp_path: Path, tiny: ModuleType, config: TrainConfig, go: Any) -> None:
    keys = {"schedule.steps": 3, "optim.micro_batches": 3}
    assert go(tmp_path, tiny.with_keys(config, **keys)).step == 3
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    state = every_tensor(tmp_path / "checkpoints/step-3")
    assert state["optimizer.backbone.cls_token.step"] == 3


def test_without_ibot_and_with_centring_it_runs_in_bf16(tmp_path: Path, tiny: ModuleType, config: TrainConfig, go: Any) -> None:
    keys = {"schedule.steps": 3, "method.ibot_weight": 0.0, "method.targets": "centering", "precision": "bf16"}
    result = go(tmp_path, tiny.with_keys(config, **keys))
    assert "loss/ibot" not in result.row
    assert every_tensor(result.checkpoint)["centres.cls"].abs().sum() > 0
    assert {x.dtype for x in every_tensor(result.checkpoint).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("batch", "world", "micro", "group", "nearest"),
    [
        (96, 5, 1, 1, "give optim.global_batch=95 or optim.global_batch=100"),
        (24, 2, 2, 4, "give optim.global_batch=16 or optim.global_batch=32, or method.group=3"),
        (3, 4, 1, 1, "give optim.global_batch=4"),
    ],
)
def test_a_batch_that_does_not_divide_names_the_nearest(batch: int, world: int, micro: int, group: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"optim.global_batch={batch} .*{nearest}$"):
        check_batch(batch, world, micro, group)


def test_an_unknown_precision_names_those_that_are() -> None:
    with pytest.raises(ValueError, match="'fp8'.*fp32, bf16, fp16"):
        autocast("fp8", torch.device("cpu"))


def row_of(**values: float) -> dict[str, float]:
    healthy = {"dino/ce_of_lnk": 0.7, "dino/target_entropy_of_lnk": 0.5, "dino/prototypes_used": 100, "rankme_cov": 50,
               "dino/prototypes_used_of_reachable": 0.8, "rankme_cov_of_width": 0.5}  # fmt: skip
    return {**healthy, **values}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, None),
        ({"dino/ce_of_lnk": 0.999}, "same of every patch"),
        ({"dino/target_entropy_of_lnk": 0.99}, "nearly uniform"),
        ({"dino/target_entropy_of_lnk": 0.001}, "one-hot"),
        ({"dino/prototypes_used_of_reachable": 0.01, "dino/prototypes_used": 1}, "1 prototypes are in use"),
        ({"rankme_cov_of_width": 0.01}, "dimensions"),
    ],
)
def test_signs_of_collapse_are_words_after_twice_the_warm_up(
    tiny: ModuleType, values: dict[str, float], words: str | None
) -> None:
    monitor: MonitorConfig = tiny.CONFIG.monitor
    assert signs_of_collapse(row_of(**values), 19, 10, monitor) == {}
    signs = list(signs_of_collapse(row_of(**values), 20, 10, monitor).values())
    assert signs == [] if words is None else len(signs) == 1 and words in signs[0]


def test_collapse_stops_the_run_only_when_told_to(tmp_path: Path, tiny: ModuleType, config: TrainConfig, go: Any) -> None:
    keys = {"schedule.steps": 8, "monitor.ce_above": 0.0, "schedule.warmup_steps": 2}
    with pytest.raises(Collapsed, match="step 4: .*stop_on_collapse"):
        go(tmp_path, tiny.with_keys(config, **keys, **{"monitor.stop_on_collapse": True}))


def test_every_key_of_the_configuration_has_one_kind(config: TrainConfig) -> None:
    speed = {"hardware", "checkpoint", "monitor"}
    assert config.result().keys() | speed == {field.name for field in dataclasses.fields(config)}
