"""The optimiser: parameter groups, learning-rate rules and scheduled values."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from histoscale.pretrain.guard import LossScaleConfig
from histoscale.pretrain.schedule import ScheduleConfig, cosine


@dataclass(frozen=True)
class OptimConfig:
    global_batch: int  # patches an optimiser step sees, over all ranks and micro-batches
    micro_batches: int  # pieces of a rank's share; Sinkhorn is joint over the ranks of one
    loss_scale: LossScaleConfig
    lr: float
    lr_rule: str  # how lr grows with the batch: "none", "linear256", "sqrt1024", or "sqrt1024x4"
    lr_start: float
    lr_final: float
    betas: list[float]
    eps: float
    weight_decay: list[float]  # at the first and after the last step, cosine between
    groups: str  # which parameters decay: "d2" (all but biases and norms) or "timm" (nor tokens and positions)
    layer_decay: float  # lr factor from one block to the one before it
    patch_lr: float  # lr factor of the patch embedding
    clip_scope: str  # "none", "param", "module" or "global"
    clip_value: float


class ParameterGroup:
    """One row of the table: a parameter with its multipliers."""

    def __init__(self, name: str, parameter: nn.Parameter, lr: float, weight_decay: float, last_layer: bool):
        self.name, self.parameter, self.lr, self.weight_decay, self.last_layer = name, parameter, lr, weight_decay, last_layer


def peak_lr(config: OptimConfig) -> float:
    """The learning rate after the batch rule. Raises ValueError for an unnamed rule."""
    factors = {
        "none": 1.0,
        "linear256": config.global_batch / 256,  # arXiv 2104.14294
        "sqrt1024": math.sqrt(config.global_batch / 1024),  # arXiv 2304.07193
        "sqrt1024x4": 4 * math.sqrt(config.global_batch / 1024),  # facebookresearch/dinov3
    }
    if config.lr_rule not in factors:
        raise ValueError(f"optim.lr_rule={config.lr_rule!r}: expected one of {', '.join(factors)}")
    return config.lr * factors[config.lr_rule]


def lr_at(step: int, config: OptimConfig, schedule: ScheduleConfig) -> float:
    return cosine(step, schedule, schedule.warmup_steps, config.lr_start, peak_lr(config), config.lr_final)


def weight_decay_at(step: int, config: OptimConfig, schedule: ScheduleConfig) -> float:
    return cosine(step, schedule, 0, config.weight_decay[0], config.weight_decay[0], config.weight_decay[1])


def parameter_table(named: Iterable[tuple[str, nn.Parameter]], depth: int, config: OptimConfig) -> list[ParameterGroup]:
    """Every trained parameter with its learning-rate and weight-decay multiplier.

    Layer decay d over `depth` blocks: embeddings and tokens d^(depth+1), block i d^(depth-i), final norm and heads 1; the patch
    embedding also takes `patch_lr` (facebookresearch/dinov2). Raises ValueError for an unknown rule.
    """
    if config.groups not in ("d2", "timm"):
        raise ValueError(f"optim.groups={config.groups!r}: expected d2 or timm")
    table = []
    for name, parameter in named:
        leaf, block = name.rsplit(".", 1)[-1], re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
        embedding = leaf in ("pos_embed", "cls_token", "reg_token", "mask_token")
        power = depth + 1 if embedding or "patch_embed" in name else depth - int(block[1]) if block else 0
        lr = config.layer_decay**power * (config.patch_lr if "patch_embed" in name else 1.0)
        plain = leaf == "bias" or "norm" in name or leaf == "gamma" or (parameter.ndim < 2)
        exempt = plain or (config.groups == "timm" and embedding)
        table.append(ParameterGroup(name, parameter, lr, 0.0 if exempt else 1.0, leaf.startswith("last_")))
    return table


def table_text(named: Iterable[tuple[str, nn.Parameter]], depth: int, config: OptimConfig) -> str:
    """The table for people: a line a parameter with its shape, both multipliers and what can freeze it; tab-separated."""
    lines = ["parameter\tshape\tlr\tweight_decay\tfrozen_with"]
    for row in parameter_table(named, depth, config):
        frozen = "last layer" if row.last_layer else "backbone" if row.name.startswith("backbone.") else ""
        lines.append(f"{row.name}\t{'x'.join(map(str, row.parameter.shape))}\t{row.lr:g}\t{row.weight_decay:g}\t{frozen}")
    return "\n".join(lines) + "\n"


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], depth: int, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one group for each pair of multipliers. Learning rate and decay are set by `set_scheduled` before each step."""
    groups: dict[tuple[float, float, bool, bool], dict[str, Any]] = {}
    for row in parameter_table(named, depth, config):
        backbone = row.name.startswith("backbone.")
        fresh = {"params": [], "lr_multiplier": row.lr, "wd_multiplier": row.weight_decay, "last_layer": row.last_layer}
        group = groups.setdefault((row.lr, row.weight_decay, row.last_layer, backbone), {**fresh, "backbone": backbone})
        group["params"].append(row.parameter)
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=betas, eps=config.eps, weight_decay=0.0, fused=True)


def set_scheduled(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, last_layer: bool, backbone: bool) -> None:
    """Write this step's values into the groups; false freezes the prototypes or the backbone (their moments still move)."""
    for group in optimizer.param_groups:
        moves = (last_layer or not group["last_layer"]) and (backbone or not group["backbone"])
        group["lr"] = lr * group["lr_multiplier"] if moves else 0.0
        group["weight_decay"] = weight_decay * group["wd_multiplier"]
