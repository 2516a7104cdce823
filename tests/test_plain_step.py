"""The trainer's steps against the plainest implementation of them: losses, weights and teacher after several updates, fp32."""

import json
from pathlib import Path
from typing import Any

import plain_step
import pytest
import timm
import torch
import train_tiny

from histoscale.data.ranks import Ranks
from histoscale.data.views import make_views
from histoscale.pretrain.backbone import timm_arguments
from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors
from histoscale.pretrain.heads import HeadConfig
from histoscale.pretrain.methods import DinoConfig, build, masks_at, scheduled
from histoscale.pretrain.optim import lr_at, weight_decay_at
from histoscale.pretrain.trainer import TrainConfig, train

ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)
STEPS = 4
OTHER_HEAD = HeadConfig(prototypes=24, hidden=32, bottleneck=16, scale="trainable", batch_norm=False)
METHODS: dict[str, dict[str, Any]] = {
    "sinkhorn and koleo": {},
    "centring, two heads, scale": {"method.targets": "centering", "method.head": OTHER_HEAD, "method.patch_head": OTHER_HEAD},
    "kde, frozen prototypes": {
        "method.koleo_weight": 0.0, "method.kde_weight": 0.3, "method.kde_pool": 12, "method.freeze_last_layer_steps": 2,
        "optim.groups": "timm",
    },
    "dino": {
        "method": DinoConfig(
            kind="dino", group=4, head=OTHER_HEAD, targets="centering", sinkhorn_iterations=3, centre_momentum=0.9,
            student_temp=0.1, teacher_temp=[0.04, 0.07], teacher_temp_warmup_steps=2, momentum=[0.9, 1.0],
            freeze_last_layer_steps=0,
        ),
    },
}  # fmt: skip


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def plain_of(config: TrainConfig, device: torch.device) -> plain_step.PlainTrainer:
    student, _ = build(config.model, config.method, config.seed)
    backbone = timm.create_model(config.model.architecture, **timm_arguments(config.model))
    weights = {name: x.to(device, copy=True) for name, x in student.state_dict().items()}
    return plain_step.PlainTrainer(backbone, weights, config.method, config.optim, config.precision, config.views.global_count)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", METHODS)
def test_the_trainer_does_what_the_plainest_step_does(
    tmp_path: Path, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions use it unless told not to
    place, close = torch.device(device), 2e-5 if device == "cpu" else 1e-4
    keys = {"schedule.steps": STEPS, "schedule.warmup_steps": 1, "checkpoint.every": 1, "checkpoint.keep_last": STEPS,
            "model.drop_path": 0.0, "monitor.every": 1, "hardware.deterministic": False}  # fmt: skip
    config: TrainConfig = train_tiny.with_keys(train_tiny.CONFIG, **keys, **METHODS[name])
    source = train_tiny.synthetic(0, config, ALONE)
    plain = plain_of(config, place)
    found = []
    batches = source(0)
    for step in range(STEPS):
        batch = next(batches)
        views = make_views(batch.pixels.to(place), config.seed, step, batch.slots, config.views)
        masks = masks_at(config.model, config.method, config.seed, step, batch.slots, config.views.global_px, 2)
        at = scheduled(step, config.method, config.schedule)
        now = plain_step.Values(
            lr_at(step, config.optim, config.schedule), weight_decay_at(step, config.optim, config.schedule), at.teacher_temp,
            at.momentum, at.last_layer,
        )  # fmt: skip
        crops = None if masks is None else masks.crops.to(place)
        found.append(plain.step(plain_step.Inputs(views.globals, views.locals, crops), now))

    ranks = Ranks(0, 1, 0, place, False)
    train(config, source, [], train_tiny.journal_in(tmp_path, ranks), ranks, {})
    rows = [row for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    for row, terms in zip(rows, found, strict=True):
        assert row["loss"] == pytest.approx(terms.pop("loss"), rel=close)
        assert {term: row[f"loss/{term}"] for term in terms} == pytest.approx(terms, rel=close)
    state = read_tensors(read_checkpoint(tmp_path / f"checkpoints/step-{STEPS}"), "")
    start = build(config.model, config.method, config.seed)[0].state_dict()
    for side, network in (("student", plain.student), ("teacher", plain.teacher)):
        for weight, x in network.cpu().state_dict().items():
            theirs = state[f"{side}.{weight}"]
            moved = (theirs - start[weight]).abs().max()
            assert (x - theirs).abs().max() <= 0.02 * moved + 1e-6, f"{side}.{weight} moved by {float(moved):.2g}"
