"""Phases: what continues and what restarts, exactly; resumed inside a phase and across its border."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import train_tiny as tiny
from safetensors.torch import save_file
from torch import Tensor, nn

from histoscale.data.ranks import Ranks
from histoscale.pretrain.backbone import build_backbone
from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors
from histoscale.pretrain.phase import ONLY, Phase
from histoscale.pretrain.preempted import Preempted
from histoscale.pretrain.start import StartError, resize_positions
from histoscale.pretrain.trainer import TrainConfig, TrainResult, train

PROGRAM = Path(__file__).with_name("train_tiny.py")
ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)
FIRST = tiny.with_keys(
    tiny.CONFIG, **{"schedule.steps": 4, "schedule.horizon": 10, "checkpoint.every": 2, "checkpoint.keep_last": 9}
)
SECOND = Phase(1, "second", 4, 4)


def go(out: Path, config: TrainConfig, phase: Phase = ONLY, source: Any = None, watchers: Any = ()) -> TrainResult:
    torch.set_num_threads(1)
    source = source or tiny.synthetic(0, config, ALONE)
    return train(config, source, watchers, tiny.journal_in(out, ALONE), ALONE, {"data_seed": 0}, phase)


def second(**keys: Any) -> TrainConfig:
    return tiny.with_keys(FIRST, **{"schedule.steps": 3, "schedule.horizon": None, "schedule.warmup_steps": 0, **keys})


def tensors(out: Path, step: int) -> dict[str, Tensor]:
    return read_tensors(read_checkpoint(out / f"checkpoints/step-{step}"), "")


def rows(out: Path) -> dict[int, dict[str, Any]]:
    found = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in found if "loss" in row}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first phase of four steps, on a schedule of ten."""
    out = tmp_path_factory.mktemp("first")
    go(out, FIRST)
    return out


@pytest.fixture
def copied(first: Path, tmp_path: Path) -> Path:
    shutil.copytree(first, tmp_path / "run")
    return tmp_path / "run"


def test_a_phase_that_restarts_nothing_is_one_long_run(copied: Path, tmp_path: Path) -> None:
    """Cut anywhere into phases, the same steps give the same weights, moments, centres and schedule, to the bit."""
    keys = {"schedule.steps": 10, "schedule.horizon": None, "method.targets": "centering"}
    whole = tiny.with_keys(FIRST, **keys)
    go(tmp_path / "whole", whole)
    go(tmp_path / "cut", tiny.with_keys(whole, **{"schedule.steps": 4, "schedule.horizon": 10}))
    rest = tiny.with_keys(whole, **{"schedule.steps": 6, "schedule.horizon": 10, "schedule.restart": False})
    go(tmp_path / "cut", rest, Phase(1, "rest", 4, 0))
    assert differing(tensors(tmp_path / "whole", 10), tensors(tmp_path / "cut", 10)) == []
    ours, theirs = rows(tmp_path / "whole"), rows(tmp_path / "cut")
    assert ours.keys() == theirs.keys() == set(range(1, 11))
    for name in ("loss", "lr", "weight_decay", "teacher_temp", "teacher_momentum"):
        assert [ours[step][name] for step in ours] == [theirs[step][name] for step in ours]


def test_restarted_schedules_begin_at_the_phase_and_the_data_go_on(copied: Path) -> None:
    config = second(
        **{"optim.lr": 5e-4, "optim.lr_start": 5e-4, "method.momentum": [0.99, 0.99], "optim.weight_decay": [0.1, 0.1]}
    )
    asked: list[int] = []

    def source(start: int) -> Any:
        asked.append(start)
        return tiny.synthetic(0, config, ALONE)(start)

    result = go(copied, config, SECOND, source)
    found = rows(copied)
    assert result.step == 7 and asked == [4] and list(found) == list(range(1, 8))
    assert found[5]["lr"] == 5e-4 and found[5]["weight_decay"] == 0.1 and found[5]["teacher_momentum"] == 0.99
    assert found[4]["lr"] != found[5]["lr"] and found[7]["lr"] < found[5]["lr"]


def test_stopped_inside_a_phase_and_started_again_it_ends_bit_equal(copied: Path, tmp_path: Path) -> None:
    config = second(**{"model.img_size": 64, "views.global_px": 64, "start.moments": False, "views.local_px": 32})
    shutil.copytree(copied, tmp_path / "stopped")
    go(copied, config, SECOND)
    for step in (4, 5):  # the very first step of the phase, and one more
        with pytest.raises(Preempted):
            go(tmp_path / "stopped", config, SECOND, tiny.kill_at(step, tiny.synthetic(0, config, ALONE), 15))
    go(tmp_path / "stopped", config, SECOND)
    assert differing(tensors(copied, 7), tensors(tmp_path / "stopped", 7)) == []


def test_positions_are_resized_and_everything_else_continues(first: Path, copied: Path) -> None:
    config = second(**{"model.img_size": 64, "views.global_px": 64, "optim.lr": 0.0, "optim.lr_start": 0.0, "optim.lr_final": 0.0,
                       "method.momentum": [1.0, 1.0]})  # fmt: skip
    go(copied, config, SECOND)
    before, after = tensors(first, 4), tensors(copied, 7)
    tables = {"student.backbone.pos_embed", "teacher.backbone.pos_embed"}
    weights = {name for name in before if name.startswith(("student.", "teacher."))}
    assert {name for name in weights if before[name].shape != after[name].shape} == tables
    for name in tables:
        assert torch.equal(after[name][:, :1], before[name][:, :1])
        assert torch.equal(after[name][:, 1:], resize_positions(before[name][:, 1:], (8, 8), "timm"))
    assert [name for name in weights - tables if not torch.equal(before[name], after[name])] == []
    assert after["optimizer.backbone.pos_embed.step"] == 3 and after["optimizer.backbone.cls_token.step"] == 7
    place = read_checkpoint(copied / "checkpoints/step-7").facts["phase"]
    assert {name: place[name] for name in ("index", "name", "first", "origin", "steps")} == {
        "index": 1, "name": "second", "first": 4, "origin": 4, "steps": 3,
    }  # fmt: skip
    assert "positions resized from 4x4 to 8x8 (timm's convention)" in place["began"]
    assert "continue: student and teacher, each from its own weights, heads and centres, AdamW's moments" in place["began"]


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_both_may_begin_from_one_of_them_with_fresh_heads(first: Path, copied: Path, branch: str) -> None:
    keys = {"start.branch": branch, "start.heads": False, "start.moments": False, "optim.lr": 0.0, "optim.lr_start": 0.0,
            "optim.lr_final": 0.0, "schedule.steps": 1, "method.head.prototypes": 48}  # fmt: skip
    go(copied, second(**keys), SECOND)
    before, after = tensors(first, 4), tensors(copied, 5)
    for name in after:
        if name.startswith(("student.", "teacher.")) and not name.split(".")[1].startswith("head"):
            assert torch.equal(after[name], before[f"{branch}.{name.partition('.')[2]}"]), name
    assert after["student.head.last_direction"].shape[0] == 48 and after["optimizer.backbone.cls_token.step"] == 1
    began = read_checkpoint(copied / "checkpoints/step-5").facts["phase"]["began"]
    assert (
        f"continue: student and teacher, both from the {branch}" in began
        and "restart: heads and centres, AdamW's moments" in began
    )


def test_frozen_backbones_move_to_the_bit_not_at_all(copied: Path, first: Path) -> None:
    go(copied, second(**{"start.heads": False, "start.freeze_backbone_steps": 2, "schedule.steps": 3}), SECOND)
    before, frozen, after = tensors(first, 4), tensors(copied, 6), tensors(copied, 7)
    backbone = [name for name in before if name.startswith(("student.backbone.", "teacher.backbone."))]
    kept = [name for name in backbone if name.startswith("student.")]
    assert [name for name in kept if not torch.equal(before[name], frozen[name])] == []
    assert all(not torch.equal(before[name], after[name]) for name in kept)
    assert not torch.equal(frozen["student.head.last_direction"], before["student.head.last_direction"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model.width": 24}, r"other shapes: .* is \[.*48.*\] there, \[.*24.*\] here"),
        ({"model.registers": 2}, "lacking student.backbone.reg_token, teacher.backbone.reg_token"),
        ({"method.head.prototypes": 64}, "other shapes: .*New heads take start.heads=false"),
        ({"start.branch": "teacher"}, "start.moments=true with start.branch=teacher"),
        ({"model.depth": 1}, "beyond it student.backbone.blocks.1"),
    ],
)
def test_what_does_not_fit_a_phase_is_refused(copied: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(StartError, match=message):
        go(copied, second(**keys), SECOND)


def test_registers_may_be_new_where_that_is_allowed_by_name(copied: Path) -> None:
    go(copied, second(**{"model.registers": 2, "start.may_lack": ["backbone.reg_token"], "schedule.steps": 1}), SECOND)
    began = read_checkpoint(copied / "checkpoints/step-5").facts["phase"]["began"]
    assert began[-1].startswith("begin anew: ") and "student.backbone.reg_token" in began[-1]


def test_a_phase_needs_the_end_of_the_one_before(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="phase 'second' continues the one before it, and there is no checkpoint"):
        go(tmp_path / "empty", second(), SECOND)
    with pytest.raises(ValueError, match="ends phase 'base' .number 0. after 4 steps: phase 'third' .number 2. begins after 7"):
        go(copied, second(), Phase(2, "third", 7, 7))
    go(copied, second(**{"schedule.steps": 1}), SECOND)
    with pytest.raises(ValueError, match="other values in optim"):
        go(copied, second(**{"schedule.steps": 1, "optim.lr": 1.0}), SECOND)


def saved_backbone(tmp_path: Path, **keys: Any) -> tuple[Path, nn.Module]:
    source = build_backbone(dataclasses.replace(tiny.CONFIG.model, **keys), 7)
    save_file({**source.state_dict(), "mask_token": torch.full((1, 48), 0.25)}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", source


def test_a_run_starts_from_weights_and_does_not_need_them_again(tmp_path: Path) -> None:
    """Both branches hold them before the first step, the watchers see them, and a resumed run never opens the file."""
    path, source = saved_backbone(tmp_path, img_size=48)
    config = tiny.with_keys(FIRST, **{"start.weights": str(path), "optim.lr": 0.0, "optim.lr_start": 0.0, "optim.lr_final": 0.0})
    seen: list[Tensor] = []

    def watcher(backbone: nn.Module, step: int) -> dict[str, float]:
        seen.append(backbone.get_parameter("blocks.0.attn.qkv.weight").detach().clone())
        return {}

    with pytest.raises(Preempted):
        go(tmp_path / "run", config, ONLY, tiny.kill_at(1, tiny.synthetic(0, config, ALONE), 15), [watcher])
    assert torch.equal(seen[0], source.get_parameter("blocks.0.attn.qkv.weight"))
    found = tensors(tmp_path / "run", 2)
    for branch in ("student", "teacher"):
        for name, x in source.state_dict().items():
            if name != "pos_embed":
                assert torch.equal(found[f"{branch}.backbone.{name}"], x), name
        assert torch.equal(found[f"{branch}.mask_token"], torch.full((1, 48), 0.25))
    began = read_checkpoint(tmp_path / "run").facts["phase"]["began"]
    assert began[0] == f"starts from {path}" and "positions resized from 6x6 to 4x4 (timm's convention)" in began
    path.unlink()
    assert go(tmp_path / "run", config).step == 4


def test_a_run_starts_from_a_checkpoint_of_another(first: Path, tmp_path: Path) -> None:
    for weights, moments in ((first, True), (first / "checkpoints/step-2", False)):
        keys = {
            "start.weights": str(weights),
            "start.moments": moments,
            "schedule.steps": 1,
            "optim.lr": 0.0,
            "optim.lr_start": 0.0,
        }
        out = tmp_path / str(moments)
        go(out, tiny.with_keys(FIRST, **keys, **{"optim.lr_final": 0.0, "method.momentum": [1.0, 1.0]}))
        step = 4 if moments else 2
        before, after = tensors(first, step), tensors(out, 1)
        assert [n for n in before if n.startswith(("student.", "teacher.")) and not torch.equal(before[n], after[n])] == []
        assert after["optimizer.backbone.cls_token.step"] == (step + 1 if moments else 1)
        assert read_checkpoint(out).facts["phase"]["began"][0] == f"starts from {weights}, step {step}"


def test_rotary_positions_train_on_through_a_phase_of_another_size(tmp_path: Path) -> None:
    """DINOv3's backbone has no table to resize: everything continues; rows are dropped, blocks recomputed, to the same loss."""
    model = {
        "model.architecture": "vit_small_patch16_dinov3",
        "model.layer_scale": 1.0,
        "model.registers": 4,
        "model.mlp_ratio": 4.0,
    }
    config = tiny.with_keys(FIRST, **model)
    go(tmp_path / "run", config)
    again = tiny.with_keys(config, **{"hardware.activation_checkpointing": True, "hardware.attention": "packed"})
    go(tmp_path / "again", again)
    for step, row in rows(tmp_path / "run").items():
        assert rows(tmp_path / "again")[step]["loss"] == pytest.approx(row["loss"], rel=1e-5)
    larger = {
        "views.global_px": 64,
        "model.img_size": 64,
        "schedule.steps": 2,
        "schedule.horizon": None,
        "schedule.warmup_steps": 0,
    }
    go(tmp_path / "run", tiny.with_keys(config, **larger), SECOND)
    assert tensors(tmp_path / "run", 6)["optimizer.backbone.reg_token.step"] == 6
    assert not any("resized" in line for line in read_checkpoint(tmp_path / "run").facts["phase"]["began"])
    moved = differing(tensors(tmp_path / "run", 2), tensors(tmp_path / "run", 4))
    assert {"student.backbone.blocks.0.attn.qkv.weight", "student.backbone.reg_token", "teacher.backbone.blocks.1.gamma_2"} <= {
        *moved
    }


@pytest.mark.parametrize(("weights", "said"), [(None, "starts from fresh weights (seed 0)")])
def test_what_begins_is_said(tmp_path: Path, weights: str | None, said: str) -> None:
    go(tmp_path, tiny.with_keys(FIRST, **{"schedule.steps": 1}))
    assert read_checkpoint(tmp_path).facts["phase"]["began"] == [said]


GRAM = dataclasses.replace(tiny.GRAM, px=64)


def gram_teacher(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("gram."): x for name, x in found.items() if name.startswith("gram.")}


def teacher(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("teacher."): x for name, x in found.items() if name.startswith("teacher.backbone.")}


def test_a_gram_phase_holds_its_teacher_and_takes_it_anew(copied: Path, first: Path, tmp_path: Path) -> None:
    """The frozen copy is the teacher where the phase begins, then that of two steps later; stopped and resumed it is the same."""
    config = second(**{"method.gram": GRAM, "schedule.steps": 5, "checkpoint.every": 1, "method.momentum": [0.9, 0.9]})
    shutil.copytree(copied, tmp_path / "stopped")
    go(copied, config, SECOND)
    found = {step: tensors(copied, step) for step in (5, 6, 7, 9)}
    before = teacher(tensors(first, 4))
    assert differing(gram_teacher(found[5]), before) == [] == differing(gram_teacher(found[6]), before)
    assert differing(gram_teacher(found[7]), teacher(found[6])) == [] == differing(gram_teacher(found[9]), teacher(found[6]))
    assert differing(teacher(found[6]), before)
    assert rows(copied)[5]["loss/gram"] > 0  # unlike views and masks, although the weights are the same
    for step in (4, 7):
        with pytest.raises(Preempted):
            go(tmp_path / "stopped", config, SECOND, tiny.kill_at(step, tiny.synthetic(0, config, ALONE), 15))
    go(tmp_path / "stopped", config, SECOND)
    assert differing(found[9], tensors(tmp_path / "stopped", 9)) == []


def test_a_gram_teacher_that_was_never_taken_is_refused(copied: Path) -> None:
    keys = {"method.gram": GRAM, "schedule.restart": False, "schedule.horizon": 10}
    with pytest.raises(ValueError, match="method.gram.first_step=0 lies before step 4 of the schedule, where this phase begins"):
        go(copied, second(**keys), Phase(1, "second", 4, 0))


def test_a_gram_teacher_from_a_checkpoint(copied: Path, first: Path) -> None:
    source = str(first / "checkpoints/step-2")
    gram = dataclasses.replace(GRAM, source=source, refresh_every=None, px=None)
    go(copied, second(**{"method.gram": gram, "model.img_size": 64, "schedule.steps": 1}), SECOND)
    found, theirs = gram_teacher(tensors(copied, 5)), teacher(tensors(first, 2))
    assert differing({name: x for name, x in found.items() if name != "backbone.pos_embed"}, theirs) == []
    assert torch.equal(found["backbone.pos_embed"][:, 1:], resize_positions(theirs["backbone.pos_embed"][:, 1:], (8, 8), "timm"))
    assert f"the Gram teacher is {source}" in read_checkpoint(copied / "checkpoints/step-5").facts["phase"]["began"]


@pytest.mark.slow
def test_sharded_over_two_ranks_a_phase_is_the_same(tmp_path: Path) -> None:
    """FSDP2 on two processes: both phases with a resized table and a Gram teacher, against one process, and back to one."""
    second_phase = ["second=4", "schedule.steps=4", "schedule.warmup_steps=0", "model.img_size=64", "views.global_px=64",
                    "start.moments=true", "checkpoint.every=2", "optim.lr_start=0.001"]  # fmt: skip
    runs = {"one": [], "two": ["hardware.shard_over=all"]}
    launch = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }
    for name, keys in runs.items():
        for phase in (["schedule.steps=4", "checkpoint.every=2"], second_phase):
            command = [*launch[name], str(PROGRAM), str(tmp_path / name), *phase, *keys]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ours, theirs = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert ours.keys() == theirs.keys() == set(range(1, 9)) and "loss/gram" in theirs[5]
    for step in ours:
        for name in ("loss/dino", "loss/ibot", "loss/koleo"):
            assert theirs[step][name] == pytest.approx(ours[step][name], rel=1e-4), (step, name)
    found = tensors(tmp_path / "two", 8)
    assert differing(gram_teacher(found), teacher(tensors(tmp_path / "two", 6))) == []  # taken anew two steps into the phase
    shutil.rmtree(tmp_path / "two/checkpoints/step-8")
    subprocess.run([sys.executable, str(PROGRAM), str(tmp_path / "two"), *second_phase], check=True)
    assert {key: rows(tmp_path / "two")[8][key] for key in ("loss/dino", "loss/gram")} == pytest.approx(
        {key: ours[8][key] for key in ("loss/dino", "loss/gram")}, rel=1e-3
    )
