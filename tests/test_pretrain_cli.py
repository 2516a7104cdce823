"""`pretrain` and `release` as commands, on a small slide through the real catalog and stream."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from histoscale.data.keys import key
from histoscale.launch.config import ConfigError, load
from histoscale.launch.phases import phases_of
from histoscale.launch.run import Refused, invoke
from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors
from histoscale.pretrain.preempted import Preempted

SMALL = [
    "recipe=demo", "sampler.mpps=[0.5]", "sampler.weights=[1]", "sampler.patch_px=32", "sampler.grid=2", "views.global_px=32",
    "views.local_px=16", "views.local_count=2", "model.img_size=32", "model.width=48", "model.depth=2",
    "method.head.prototypes=32", "method.head.hidden=64", "method.group=4", "optim.global_batch=8", "optim.precision=fp32",
    "schedule.steps=4", "schedule.warmup_steps=1", "method.teacher_temp_warmup_steps=2", "checkpoint.every=2", "monitor.every=1",
    "stream.workers=0", "stream.threads=1", "hardware.device=cpu", "hardware.threads=1", "logging.progress=off",
]  # fmt: skip


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, make_slide: Callable[..., Path]) -> Path:
    """Three slides: two that train, one that is held out; the last can serve no fine magnification."""
    folder = tmp_path_factory.mktemp("slides")
    lines = ["slide_id,uri,patient_id,site,role"]
    for i, (mpp, role) in enumerate([(0.5, "train"), (0.5, "test"), (4.0, "train")]):
        make_slide(folder / f"{i}.svs", mpp=mpp, seed=i)
        lines.append(f"s{i},{i}.svs,p{i},a,{role}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    invoke("index", [f"manifest={folder / 'manifest.csv'}", f"out={folder / 'catalog'}", "logging.progress=off"])
    return folder / "catalog"


def pretrain(out: Path, catalog: Path, *more: str) -> dict[str, Any]:
    return invoke("pretrain", [*SMALL, f"catalog={catalog}", f"out={out}", *more])


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(read_checkpoint(out), "")


def test_from_catalog_to_a_directory_that_timm_opens(tmp_path: Path, catalog: Path, capfd: pytest.CaptureFixture[str]) -> None:
    summary = pretrain(tmp_path / "run", catalog, "logging.progress=lines")["pretrain"]
    said = capfd.readouterr().err
    assert summary["steps"] == 4 and summary["patches"] == 32 and summary["transductive"] is False
    assert summary["data"] == {"slides": 1, "patients": 1, "sites": ["a"], "organs": [], "scanners": summary["data"]["scanners"]}
    assert "s2" in summary["ineligible"] and "ineligible: s2" in said
    assert "learning rate 0.001" in said and "for a batch of 8" in said and "what was streamed" in said
    with Image.open(tmp_path / "run/patches.png") as patches, Image.open(tmp_path / "run/views.png") as views:
        assert patches.width > 8 * 32 and views.width > 8 * 112  # what people look at before they train
    invoke("release", [f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'release'}", "logging.progress=off"])
    model = timm.create_model(f"local-dir:{tmp_path / 'release'}", pretrained=True)
    teacher = read_tensors(read_checkpoint(tmp_path / "run"), "teacher.backbone.")
    assert all(torch.equal(x, teacher[name]) for name, x in model.state_dict().items())

    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert pretrain(tmp_path / "run", catalog)["pretrain"]["steps"] == 4  # nothing to do
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    with pytest.raises(Refused, match="optim.lr"):
        pretrain(tmp_path / "run", catalog, "optim.lr=1e-5")


def test_held_out_roles_make_a_run_transductive(tmp_path: Path, catalog: Path) -> None:
    assert pretrain(tmp_path, catalog, "roles=[train,test]", "schedule.steps=2")["pretrain"]["transductive"] is True


def test_roles_that_nobody_has_are_refused(tmp_path: Path, catalog: Path) -> None:
    with pytest.raises(ValueError, match="roles=.'tran'.* selects no slide.*test .1., train .2."):
        pretrain(tmp_path, catalog, "roles=[tran]")


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, catalog: Path) -> None:
    with pytest.raises(ValueError, match="optim.global_batch=10 .*8 and 12"):
        pretrain(tmp_path, catalog, "optim.global_batch=10")


@pytest.mark.parametrize("more", [[], ["catalog=c", "tiles=t"]], ids=["neither", "both"])
def test_one_source_is_needed(tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(ValueError, match="either catalog= or tiles="):
        invoke("pretrain", ["recipe=demo", f"out={tmp_path}", *more])


def test_a_recipe_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe"):
        load("pretrain", ["catalog=c", f"out={tmp_path}"])


def test_ready_tiles_are_a_source(tmp_path: Path) -> None:
    for slide in "ab":
        (tmp_path / "tiles" / slide).mkdir(parents=True)
        for i in range(5):
            pixels = np.random.default_rng(key(0, slide, i)).integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "tiles" / slide / f"{i}.png")
    summary = invoke("pretrain", [*SMALL, f"tiles={tmp_path / 'tiles'}", f"out={tmp_path / 'run'}", "schedule.steps=2"])
    assert summary["pretrain"]["data"]["slides"] == 2 and summary["pretrain"]["transductive"] is None


NEXT = [
    "phases.next.schedule.steps=2", "phases.next.schedule.restart=true", "phases.next.schedule.warmup_steps=0",
    "phases.next.optim.lr=1e-4", "phases.next.optim.weight_decay=[0.1,0.1]", "phases.next.method.teacher_temp=[0.04,0.04]",
    "phases.next.method.teacher_temp_warmup_steps=0", "phases.next.method.momentum=[0.99,0.99]",
    "phases.next.method.freeze_last_layer_steps=0", "phases.next.start.branch=both", "phases.next.start.heads=true",
    "phases.next.start.moments=true", "phases.next.views.global_px=64", "phases.next.model.img_size=64",
    "phases.next.roles=[train,test]",
]  # fmt: skip


def test_a_finished_run_goes_on_with_a_phase_and_ends_as_one_that_had_it_from_the_start(tmp_path: Path, catalog: Path) -> None:
    """The phase has more slides, another view size and a resized position table."""
    pretrain(tmp_path / "grown", catalog)
    with pytest.raises(Refused, match="schedule.steps.*a new phase"):
        pretrain(tmp_path / "grown", catalog, "schedule.steps=6")
    grown = pretrain(tmp_path / "grown", catalog, *NEXT)["pretrain"]
    whole = pretrain(tmp_path / "whole", catalog, *NEXT)["pretrain"]
    assert grown["steps"] == whole["steps"] == 6 and grown["patches"] == whole["patches"] == 48
    assert whole["phases"] == [{"name": "base", "first": 0, "steps": 4}, {"name": "next", "first": 4, "steps": 2}]
    one, other = tensors(tmp_path / "grown"), tensors(tmp_path / "whole")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert one["teacher.backbone.pos_embed"].shape[1] == 1 + 8 * 8
    assert {path.name for path in (tmp_path / "whole").glob("*.png")} >= {"patches.png", "patches-next.png", "views-next.png"}
    with pytest.raises(Refused, match="phases.next.optim.lr"):
        pretrain(tmp_path / "grown", catalog, *NEXT, "phases.next.optim.lr=1e-5")
    with pytest.raises(Refused, match="phases.next"):
        pretrain(tmp_path / "grown", catalog)
    invoke("release", [f"checkpoint={tmp_path / 'whole'}", f"out={tmp_path / 'release'}", "logging.progress=off"])
    assert timm.create_model(f"local-dir:{tmp_path / 'release'}", pretrained=True).get_parameter("pos_embed").shape[1] == 65


def test_a_stop_in_the_last_step_of_a_phase_is_heard(tmp_path: Path, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from histoscale.launch import pretrain as command

    pictured = command.pictured

    def killed(batches: Any, config: Any, phase: Any, journal: Any) -> Any:
        for batch in pictured(batches, config, phase, journal):
            if batch.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(command, "pictured", killed)
    with pytest.raises(Preempted) as stop:
        pretrain(tmp_path, catalog, *NEXT)
    assert stop.value.step == 4 and json.loads((tmp_path / "state.json").read_text())["preempted"]
    assert pretrain(tmp_path, catalog, *NEXT)["pretrain"]["steps"] == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["phases.next.schedule.steps=2"], r"phases.next must say what continues .* start.moments \(True in the phase before\)"),
        ([*NEXT, "phases.next.optim.learning=1"], "phases.next.optim.learning is no key of a phase"),
        ([*NEXT, "phases.next.storage.deadline_s=1"], "phases.next.storage is no key of a phase"),
        ([*NEXT, "phases.next.optim.lr=fast"], "phases.next: optim.lr = 'fast'"),
        ([*NEXT, "phases.next.start.weights=x"], "a later phase continues the one before it"),
        ([*NEXT, "phases.next.schedule.restart=false"], "restart=false goes on .* give schedule.horizon"),
        ([item.replace("next", "base") for item in NEXT], "the first phase's, base"),
    ],
)
def test_a_phase_that_leaves_open_what_continues_is_refused(tmp_path: Path, catalog: Path, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain(tmp_path, catalog, *more)


def test_schedules_that_go_on_count_from_where_they_began() -> None:
    """A phase within one long schedule keeps its horizon and its origin; what belongs to one phase alone is not inherited."""
    keys = ["schedule.steps=4", "schedule.horizon=10", "start.weights=w", "start.freeze_backbone_steps=2"]
    inner = [f"phases.b.{key}" for key in ("schedule.steps=3", "schedule.restart=false", "start.branch=both", "start.heads=true",
                                          "start.moments=true", "sampler.mpps=[1.0]", "sampler.weights=[1]")]  # fmt: skip
    (_, a), (b, second), (c, third) = phases_of(load("pretrain", [*SMALL, "catalog=c", "out=o", *keys, *inner, *NEXT]).config)
    assert (b.first, b.origin, c.first, c.origin) == (4, 0, 7, 7)
    assert (second.schedule.length, third.schedule.length) == (10, 2) and second.sampler.mpps == third.sampler.mpps == [1.0]
    assert a.start.weights == "w" and second.start.weights is None and second.start.freeze_backbone_steps == 0


@pytest.mark.parametrize("phase", ["high_resolution", "gram"])
def test_phases_that_come_with_us_follow_a_recipe(phase: str) -> None:
    config = load("pretrain", ["recipe=midnight_vitg14", f"phase=[{phase}]", "catalog=c", "out=o"]).config
    (_, _), (_, second) = phases_of(config)
    assert second.views.global_px % second.model.patch_size == 0 == second.views.local_px % second.model.patch_size
    assert second.optim.global_batch % (second.method.group * second.optim.micro_batches) == 0


@pytest.mark.slow
def test_workers_are_bit_equal(tmp_path: Path, catalog: Path) -> None:
    runs = []
    for workers in (0, 1, 3):
        pretrain(tmp_path / str(workers), catalog, f"stream.workers={workers}", "optim.global_batch=12")
        runs.append(tensors(tmp_path / str(workers)))
    for other in runs[1:]:
        assert [name for name in runs[0] if not torch.equal(runs[0][name], other[name])] == []


@pytest.mark.slow
def test_sigterm_ends_with_75_and_the_same_command_goes_on(tmp_path: Path, catalog: Path) -> None:
    command = [sys.executable, "-m", "histoscale.launch.pretrain", *SMALL, f"catalog={catalog}", f"out={tmp_path / 'run'}",
               "schedule.steps=40", "logging.progress=lines", "logging.interval_s=0"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("pretrain: 3/40"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    state = json.loads((tmp_path / "run/state.json").read_text())
    assert state["preempted"] and 3 <= state["step"] < 40 and read_checkpoint(tmp_path / "run").step == state["step"]
    pretrain(tmp_path / "run", catalog, "schedule.steps=40")
    pretrain(tmp_path / "whole", catalog, "schedule.steps=40")
    stopped, whole = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []


def test_normalisation_is_a_training_option(tmp_path: Path, catalog: Path) -> None:
    assert pretrain(tmp_path / "run", catalog, "normalise=reinhard", "schedule.steps=2")["pretrain"]["steps"] == 2
    with pytest.raises(Refused, match="normalise.kind"):
        pretrain(tmp_path / "run", catalog, "schedule.steps=2")
    with pytest.raises(ValueError, match="normalise=reinhard is fitted on slides"):
        invoke("pretrain", [*SMALL, f"tiles={tmp_path}", "normalise=reinhard", f"out={tmp_path / 'tiles'}"])
