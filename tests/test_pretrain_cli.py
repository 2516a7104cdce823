"""`pretrain` and `release` as commands, on a small slide through the real catalog and stream."""

import json
import os
import shutil
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
from safetensors.torch import save_file

from histoscale.data import fingerprint
from histoscale.data.keys import key
from histoscale.launch.config import ConfigError, load
from histoscale.launch.phases import phases_of
from histoscale.launch.pretrain import MADE, identity
from histoscale.launch.run import Refused, execute, invoke
from histoscale.pretrain.backbone import build_backbone
from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors
from histoscale.pretrain.preempted import Preempted

SMALL = [
    "recipe=demo", "sampler.mpps=[0.5]", "sampler.weights=[1]", "sampler.patch_px=32", "sampler.grid=2", "views.global_px=32",
    "views.local_px=16", "views.local_count=2", "model.img_size=32", "model.width=48", "model.depth=2",
    "method.head.prototypes=32", "method.head.hidden=64", "method.group=4", "optim.global_batch=8", "precision=fp32",
    "schedule.steps=4", "schedule.warmup_steps=1", "method.teacher_temp_warmup_steps=2", "checkpoint.every=2", "monitor.every=1",
    "stream.workers=0", "stream.threads=1", "hardware.device=cpu", "hardware.threads=1", "logging.progress=off",
]  # fmt: skip
NEXT = [
    "phases.next.schedule.steps=2", "phases.next.schedule.restart=true", "phases.next.schedule.warmup_steps=0",
    "phases.next.optim.lr=1e-4", "phases.next.optim.weight_decay=[0.1,0.1]", "phases.next.method.teacher_temp=[0.04,0.04]",
    "phases.next.method.teacher_temp_warmup_steps=0", "phases.next.method.momentum=[0.99,0.99]",
    "phases.next.method.freeze_last_layer_steps=0", "phases.next.start.branch=both", "phases.next.start.heads=true",
    "phases.next.start.moments=true", "phases.next.views.global_px=64", "phases.next.model.img_size=64",
    "phases.next.roles=[train,test]",
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
    with pytest.raises(ConfigError, match="optim.global_batch=8 or optim.global_batch=12, or method.group=2") as refused:
        pretrain(tmp_path, catalog, "optim.global_batch=10")
    assert str(refused.value).startswith("optim.global_batch=10 does not divide")
    with pytest.raises(ConfigError, match="phase next: optim.global_batch=2 .* optim.global_batch=4, or method.group=2"):
        pretrain(tmp_path, catalog, *NEXT, "phases.next.optim.global_batch=2")


def test_a_magnification_that_no_slide_has_is_dropped_when_that_is_said(
    tmp_path: Path, catalog: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The refusal can be pasted, in the phase that it is about, and what is dropped is in the log and in the checkpoint."""
    asked = ["sampler.mpps=[0.25,0.5]", "sampler.weights=[3,1]"]
    pasted = r"sampler.mpps=\[0.5\] sampler.weights=\[1\], or sampler.unservable=drop"
    with pytest.raises(ConfigError, match=f"none of 1 slides can serve 0.25 um/px: take it out with {pasted}"):
        pretrain(tmp_path / "a", catalog, *asked)
    later = [f"phases.next.{key}" for key in asked]
    with pytest.raises(ConfigError, match=r"take it out with phases.next.sampler.mpps=\[0.5\] phases.next.sampler.weights"):
        pretrain(tmp_path / "a", catalog, *NEXT, *later)
    assert not [each for name in MADE for each in (tmp_path / "a").glob(name)]  # nothing was built,
    assert not json.loads((tmp_path / "a/state.json").read_text())["bound"]  # and nothing is locked
    dropped = pretrain(tmp_path / "a", catalog, *asked, "sampler.unservable=drop", "logging.progress=lines")["pretrain"]
    plain = pretrain(tmp_path / "b", catalog)["pretrain"]
    assert "phase base: no slide serves 0.25 um/px: dropped (sampler.unservable=drop); left: 0.5" in capfd.readouterr().err
    assert dropped["streamed"] == plain["streamed"] and dropped["last"]["loss"] == plain["last"]["loss"]
    facts = read_checkpoint(tmp_path / "a").facts["identity"]["facts"]
    assert facts["dropped"] == ["0.25"] and facts["sampler"]["mpps"] == [0.5] and facts["sampler"]["unservable"] == "drop"
    with pytest.raises(Refused, match="sampler.unservable"):
        pretrain(tmp_path / "a", catalog, *asked)


def test_a_plan_that_memory_does_not_hold_is_refused_before_anything_is_opened(tmp_path: Path, catalog: Path) -> None:
    with pytest.raises(ConfigError, match=r"8 slots x 4 lanes x 64 patches of 32 px.* sampler.grid=\d "):
        pretrain(tmp_path, catalog, "sampler.grid=8", "stream.memory_gb=0.001")
    with pytest.raises(ConfigError, match=r"phase next: reading would hold .* phases.next.sampler.lanes_per_slot=\d"):
        pretrain(tmp_path, catalog, *NEXT, "phases.next.sampler.patch_px=1024", "stream.memory_gb=0.4")


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


def test_a_finished_run_goes_on_with_one_key_twice_and_onto_a_grown_catalog(
    tmp_path: Path, catalog: Path, make_slide: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """The same command with longer=[2], then longer=[2,3] after `index` has found one more slide."""
    slides = tmp_path / "slides"
    shutil.copytree(catalog.parent, slides)
    index = ["index", [f"manifest={slides / 'manifest.csv'}", f"out={slides / 'catalog'}", "logging.progress=off"]]
    run, told = tmp_path / "run", "logging.progress=lines"
    invoke(*index)
    pretrain(run, slides / "catalog", told)
    capfd.readouterr()
    assert execute("pretrain", [*SMALL, f"catalog={slides / 'catalog'}", f"out={run}", told]) == 0
    said = capfd.readouterr().err
    assert "nothing to do" in said and f"checkpoint: {run / 'checkpoints/step-4'}" in said and "and 'longer=[4]'" in said
    assert f"histoscale release checkpoint={run} out={run}_release" in said
    longer = pretrain(run, slides / "catalog", "longer=[2]", told)["pretrain"]
    said = capfd.readouterr().err
    assert longer["steps"] == 6 and "follows phase base from step 4; continue: student and teacher, each from its own" in said
    assert "heads and centres, AdamW's moments; restart: nothing of the state; schedules count from step 4 over 2 steps" in said
    whole = pretrain(tmp_path / "whole", slides / "catalog", "longer=[2]")["pretrain"]
    assert whole["last"]["loss"] == longer["last"]["loss"]  # as if it had been asked for from the start

    make_slide(slides / "3.svs", mpp=0.5, seed=3)
    with (slides / "manifest.csv").open("a") as file:
        file.write("s3,3.svs,p3,a,train\n")
    invoke(*index)
    with pytest.raises(Refused, match=r"catalog: .*longer=\[STEPS\] behind the command"):
        pretrain(run, slides / "catalog", "longer=[2]")
    capfd.readouterr()
    assert execute("pretrain", [*SMALL, f"catalog={slides / 'catalog'}", f"out={run}", told, "longer=[2,3]"]) == 0
    said = capfd.readouterr().err
    again = json.loads((run / "summary.json").read_text())["pretrain"]
    assert again["steps"] == 9 and again["data"]["slides"] == 2 and "its data are others: catalog " in said
    assert "longer=[2,3,3]" in said
    assert [phase["name"] for phase in again["phases"]] == ["base", "longer_1", "longer_2"]
    assert pretrain(run, slides / "catalog", "longer=[2,3]")["pretrain"]["steps"] == 9  # nothing to do
    for other in (["longer=[2,4]"], ["longer=[3]"], []):
        with pytest.raises(Refused, match="longer"):
            pretrain(run, slides / "catalog", *other)


def standing(run: Path) -> tuple[set[str], list[str]]:
    """Every name in a folder, and the texts that say whose it is."""
    names = ("state.json", "config.yaml", "inputs.jsonl", "metrics.jsonl", "summary.json")
    return {str(path.relative_to(run)) for path in run.rglob("*")}, [(run / name).read_text() for name in names]


def test_a_continuation_that_is_refused_or_fails_leaves_what_stood(
    tmp_path: Path, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run: a phase that cannot be read, one that memory does not hold, more steps that fail once their pictures are
    there; then the corrected phase."""
    from histoscale.launch import pretrain as command

    run, pictured = tmp_path / "run", command.pictured
    pretrain(run, catalog)
    before = standing(run)
    with pytest.raises(ConfigError, match=r"phases.next.sampler.unservable=drop"):
        pretrain(run, catalog, *NEXT, "phases.next.sampler.mpps=[0.25,0.5]", "phases.next.sampler.weights=[3,1]")
    assert standing(run) == before
    with pytest.raises(ConfigError, match="phase next: reading would hold"):
        pretrain(run, catalog, *NEXT, "phases.next.sampler.patch_px=1024", "stream.memory_gb=0.4")
    assert standing(run) == before

    def failing(*args: Any) -> Any:
        next(pictured(*args))
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(command, "pictured", failing)
        with pytest.raises(RuntimeError):
            pretrain(run, catalog, "longer=[7]")
    assert standing(run) == before
    assert pretrain(run, catalog)["pretrain"]["steps"] == 4  # nothing to do
    assert standing(run) == before
    fine = ["phases.next.sampler.mpps=[0.25,0.5]", "phases.next.sampler.weights=[3,1]", "phases.next.sampler.unservable=drop"]
    assert pretrain(run, catalog, *NEXT, *fine)["pretrain"]["steps"] == 6


def weights_in(folder: Path, shards: int) -> list[Path]:
    """A backbone that fits SMALL, as one model.safetensors or as shards behind an index."""
    config = load("pretrain", [*SMALL, "catalog=c", "out=o"]).config
    tensors = build_backbone(config.model, 7).state_dict()
    folder.mkdir(exist_ok=True)
    files = [f"model-{i}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    place = {name: files[i % len(files)] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: x for name, x in tensors.items() if place[name] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return [folder / file for file in files]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_run_knows_the_weights_that_it_starts_from(tmp_path: Path, catalog: Path, shards: int) -> None:
    """A folder with weights alone; replaced, they are other weights, also for a run that has ended and would go on."""
    folder = tmp_path / "weights"
    files = weights_in(folder, shards)
    keys = [f"start.weights={folder}", "schedule.steps=1"]
    pretrain(tmp_path / "run", catalog, *keys)
    rows = fingerprint.load(tmp_path / "run" / fingerprint.LIST)
    assert {name for name in rows if not name.startswith("catalog")} == {file.name for file in files}
    files[-1].write_bytes(files[-1].read_bytes()[:-4] + b"\0\0\0\0")
    for more in ([], ["longer=[1]"]):
        with pytest.raises(Refused, match=rf"{files[-1].name} has changed"):
            pretrain(tmp_path / "run", catalog, *keys, *more)


def test_a_run_knows_the_weights_of_its_gram_teachers(tmp_path: Path, catalog: Path) -> None:
    [file] = weights_in(tmp_path / "weights", 1)
    gram = ["phase=[gram]", f"phases.gram.method.gram.source={file}"]
    config = load("pretrain", [*SMALL, f"catalog={catalog}", "out=o", *gram]).config
    with fingerprint.noting() as noted:
        before = identity(config)
    assert str(file) in noted.files
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    assert identity(config) != before


def test_what_a_key_says_wrong_is_found_before_weights_are_read(tmp_path: Path, catalog: Path) -> None:
    for wrong, said in (
        ("optim.global_batch=10", "^optim.global_batch=10 does not divide"),
        ("precision=bf61", "^precision='bf61': expected fp32, bf16, fp16"),
        ("phases.next.precision=bf61", "^phase next: precision='bf61': expected fp32"),
    ):
        with pytest.raises(ConfigError, match=said):
            pretrain(tmp_path / "run", catalog, *NEXT, "start.weights=missing.safetensors", wrong)
    with pytest.raises(ValueError, match="start.weights=missing.safetensors: missing.safetensors cannot be read"):
        pretrain(tmp_path / "run", catalog, "start.weights=missing.safetensors")


def test_a_longer_phase_is_the_recipe_once_more() -> None:
    (_, base), (phase, more), (last, again) = phases_of(
        load("pretrain", ["recipe=dinov2_vits14", "longer=[25000,50]", "catalog=c", "out=o"]).config
    )
    assert (phase.name, phase.first, phase.origin, last.first) == ("longer_1", 125000, 125000, 150000)
    assert (more.schedule.steps, more.schedule.warmup_steps, again.schedule.warmup_steps) == (25000, 2500, 5)
    assert more.optim.lr == base.optim.lr and more.optim.weight_decay == [0.4, 0.4] and more.method.momentum == [0.994, 1.0]
    assert more.method.teacher_temp == [0.07, 0.07] and more.method.freeze_last_layer_steps == 0
    with pytest.raises(ConfigError, match="phases.longer_1: that is the name of a phase of longer="):
        phases_of(load("pretrain", [*SMALL, "longer=[5]", "phases.longer_1.schedule.steps=2", "catalog=c", "out=o"]).config)


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
