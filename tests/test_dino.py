"""DINO (v1): class tokens only, the same road through the trainer as DINOv2, and a step that learns."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import train_tiny
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from histoscale.data.ranks import Ranks
from histoscale.launch.config import load
from histoscale.pretrain.backbone import ModelConfig
from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors
from histoscale.pretrain.heads import HeadConfig
from histoscale.pretrain.losses import center_targets, dino_ce
from histoscale.pretrain.methods import DinoConfig, MethodConfig, Scheduled, build, first_centres, losses, masks_at
from histoscale.pretrain.trainer import train

METHOD = DinoConfig(
    kind="dino", group=4, head=HeadConfig(prototypes=16, hidden=24, bottleneck=8, scale="frozen", batch_norm=False),
    targets="centering", sinkhorn_iterations=3, centre_momentum=0.9, student_temp=0.1, teacher_temp=[0.04, 0.04],
    teacher_temp_warmup_steps=0, momentum=[0.9, 1.0], freeze_last_layer_steps=0,
)  # fmt: skip
MODEL: ModelConfig = replace(train_tiny.CONFIG.model, width=24, heads=2)
NOW = Scheduled(teacher_temp=0.05, momentum=0.9, last_layer=True, gram_weight=0.0)
VIEWS, LOCALS, B = 2, 3, 8


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_chosen_by_its_kind_and_takes_no_key_of_dinov2() -> None:
    for recipe, kind in (("kaiko_vits16_dino", "dino"), ("dinov2_vits14", "dinov2")):
        assert load("pretrain", [f"recipe={recipe}", "catalog=none"]).config.method.kind == kind
    values = asdict(METHOD)
    assert TypeAdapter(MethodConfig).validate_python(values) == METHOD
    with pytest.raises(ValidationError, match="dino_v1"):
        TypeAdapter(MethodConfig).validate_python({**values, "kind": "dino_v1"})
    assert not {"ibot_weight", "koleo_weight", "mask", "patch_head"} & values.keys()


def test_only_what_it_uses_is_built_and_everything_learns() -> None:
    student, teacher = build(MODEL, METHOD, 0)
    assert {name.split(".")[0] for name in student.state_dict()} == {"backbone", "head"}
    assert masks_at(MODEL, METHOD, 0, 0, torch.arange(B), 32, VIEWS) is None
    globals_, locals_ = noise(VIEWS * B, 3, 32, 32), noise(LOCALS * B, 3, 16, 16, seed=1)
    taught, learned = teacher(globals_), student(globals_, locals_)
    first = first_centres(METHOD, "cpu")
    found = losses(learned, taught, None, first, METHOD, NOW, VIEWS)
    targets = center_targets(taught["cls"], first.cls, 0.05).view(VIEWS, B, -1)
    assert torch.equal(found.total, dino_ce(learned["cls"].view(VIEWS + LOCALS, B, -1), targets, 0.1))
    assert found.terms.keys() == {"dino"} and torch.equal(found.terms["dino"], found.total)
    assert torch.allclose(found.centres.cls, 0.1 * taught["cls"].mean(0)) and not found.centres.patch.numel()
    found.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def test_divergence_and_entropies_are_read_off() -> None:
    student, teacher = build(MODEL, METHOD, 0)
    taught, learned = teacher(noise(VIEWS * B, 3, 32, 32)), student(noise(VIEWS * B, 3, 32, 32, seed=1))
    read = losses(learned, taught, None, first_centres(METHOD, "cpu"), METHOD, NOW, VIEWS).read
    p, q = (taught["cls"][:B] / 0.05).softmax(1), (learned["cls"][B:] / 0.1).softmax(1)
    entropy = -((taught["cls"] / 0.05).softmax(1) * (taught["cls"] / 0.05).log_softmax(1)).sum(1).mean()
    scale = torch.tensor(16.0).log()
    assert torch.allclose(read["dino/kl"], (p * (p / q).log()).sum(1).mean() / scale, rtol=1e-4)
    assert torch.allclose(read["dino/student_entropy"], -(q * q.log()).sum(1).mean() / scale, rtol=1e-5)
    assert torch.allclose(read["dino/target_entropy"], entropy / scale, rtol=1e-5)


def test_the_trainer_trains_it_and_continues(tmp_path: Path) -> None:
    ranks = Ranks(0, 1, 0, torch.device("cpu"), False)
    config = train_tiny.with_keys(train_tiny.CONFIG, **{"schedule.steps": 12, "checkpoint.every": 6, "method": METHOD})
    found = train(config, train_tiny.synthetic(0, config, ranks), [], train_tiny.journal_in(tmp_path, ranks), ranks, {})
    assert found.row["loss"] == found.row["loss/dino"] and "loss/ibot" not in found.row
    assert found.row["dino/ce_of_lnk"] < 0.95  # under ln K, which an untrained or collapsed student has
    tensors = read_tensors(read_checkpoint(found.checkpoint), "")
    assert tensors["centres.cls"].abs().sum() > 0
    assert {name.split(".")[1] for name in tensors if name.startswith("teacher.")} == {"backbone", "head"}
