"""Parameter groups against a golden table, learning-rate rules against published peaks, scheduled values."""

import math
from dataclasses import replace
from importlib import resources
from typing import get_args

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from histoscale.launch.config import choices, load
from histoscale.pretrain.backbone import ModelConfig
from histoscale.pretrain.methods import MethodConfig, build
from histoscale.pretrain.optim import (
    OptimConfig,
    build_optimizer,
    lr_at,
    parameter_table,
    peak_lr,
    set_scheduled,
    weight_decay_at,
)
from histoscale.pretrain.schedule import ScheduleConfig


def shipped(kind: type, group: str, name: str):  # type: ignore[no-untyped-def]
    return TypeAdapter(kind).validate_python(yaml.safe_load((resources.files("histoscale.configs") / group / name).read_text()))


OPTIM: OptimConfig = shipped(OptimConfig, "optim", "default.yaml")
D2 = replace(OPTIM, layer_decay=0.9, patch_lr=0.2, groups="d2")


def student() -> torch.nn.Module:
    model = replace(shipped(ModelConfig, "model", "demo.yaml"), depth=2, registers=1, layer_scale=1e-5)
    method = load("pretrain", ["recipe=dinov2_vitl16_short", "catalog=none"]).config.method
    return build(model, method, 0)[0]


# name -> power of the layer decay, patch factor, decays under d2, decays under timm
GOLDEN = {
    "mask_token": (3, 1, 1, 0),
    "backbone.cls_token": (3, 1, 1, 0),
    "backbone.reg_token": (3, 1, 1, 0),
    "backbone.pos_embed": (3, 1, 1, 0),
    "backbone.patch_embed.proj.weight": (3, 0.2, 1, 1),
    "backbone.patch_embed.proj.bias": (3, 0.2, 0, 0),
    "backbone.blocks.0.norm1.weight": (2, 1, 0, 0),
    "backbone.blocks.0.norm1.bias": (2, 1, 0, 0),
    "backbone.blocks.0.attn.qkv.weight": (2, 1, 1, 1),
    "backbone.blocks.0.attn.qkv.bias": (2, 1, 0, 0),
    "backbone.blocks.0.ls1.gamma": (2, 1, 0, 0),
    "backbone.blocks.1.mlp.fc1.weight": (1, 1, 1, 1),
    "backbone.blocks.1.mlp.fc2.bias": (1, 1, 0, 0),
    "backbone.norm.weight": (0, 1, 0, 0),
    "head.mlp.0.weight": (0, 1, 1, 1),
    "head.mlp.0.bias": (0, 1, 0, 0),
    "head.last_scale": (0, 1, 1, 1),
    "head.last_direction": (0, 1, 1, 1),
}


@pytest.mark.parametrize("groups", ["d2", "timm"])
def test_golden_table(groups: str) -> None:
    named = dict(student().named_parameters())
    table = {row.name: row for row in parameter_table(named.items(), 2, replace(D2, groups=groups))}
    assert table.keys() == named.keys()
    for name, (power, patch, d2, timm) in GOLDEN.items():
        assert math.isclose(table[name].lr, 0.9**power * patch), name
        assert table[name].weight_decay == (d2 if groups == "d2" else timm), name
        assert table[name].last_layer == name.startswith("head.last"), name


def test_every_parameter_is_in_one_group() -> None:
    module = student()
    optimizer = build_optimizer(module.named_parameters(), 2, D2)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in module.parameters()}


@pytest.mark.parametrize(
    ("lr", "rule", "batch", "peak"),
    [
        (4e-3, "sqrt1024", 2048, 5.66e-3),  # DINOv2, short recipe
        (2e-4, "sqrt1024", 3072, 3.46e-4),  # DINOv2, long recipe
        (5e-4, "linear256", 1024, 2e-3),  # DINO
        (1e-3, "sqrt1024x4", 1024, 4e-3),  # DINOv3: 0.001 there is 0.004 in DINOv2
        (5e-4, "none", 64, 5e-4),
    ],
)
def test_published_peaks(lr: float, rule: str, batch: int, peak: float) -> None:
    assert math.isclose(peak_lr(replace(OPTIM, lr=lr, lr_rule=rule, global_batch=batch)), peak, rel_tol=1e-2)


def test_frozen_prototypes_stay_bit_identical_while_their_moments_move() -> None:
    weight, last = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3, 3))
    optimizer = build_optimizer([("head.mlp.0.weight", weight), ("head.last_direction", last)], 2, D2)
    for step in range(3):
        weight.grad, last.grad = torch.ones(3, 3), torch.ones(3, 3)
        set_scheduled(optimizer, 1e-2, 0.4, last_layer=step == 2, backbone=True)
        optimizer.step()
        assert torch.equal(last, torch.ones(3, 3)) == (step < 2)
        assert optimizer.state[last]["exp_avg"].abs().sum() > 0
    assert not torch.equal(weight, torch.ones(3, 3))


def test_scheduled_values() -> None:
    schedule = ScheduleConfig("d2_v1", 100, 10, None, True)
    config = replace(OPTIM, lr=1e-3, lr_rule="none", lr_start=1e-5, lr_final=1e-6, weight_decay=[0.04, 0.4])
    assert lr_at(0, config, schedule) == 1e-5 and lr_at(9, config, schedule) == lr_at(10, config, schedule) == 1e-3
    assert lr_at(100, config, schedule) == 1e-6
    assert weight_decay_at(0, config, schedule) == 0.04 and weight_decay_at(100, config, schedule) == 0.4
    assert math.isclose(weight_decay_at(50, config, schedule), 0.22)


def test_errors() -> None:
    with pytest.raises(ValueError, match="lr_rule='auto'"):
        peak_lr(replace(OPTIM, lr_rule="auto"))
    with pytest.raises(ValueError, match="groups='all'"):
        parameter_table([], 2, replace(OPTIM, groups="all"))


def test_shipped_configurations_are_typed() -> None:
    for kind, group in ((OptimConfig, "optim"), (ScheduleConfig, "schedule"), (MethodConfig, "method"), (ModelConfig, "model")):
        for name in choices(group):
            config = load("pretrain", ["recipe=demo", f"{group}={name}", "catalog=c", "out=o"]).config
            assert isinstance(getattr(config, group), get_args(get_args(kind)[0]) if get_args(kind) else kind)
