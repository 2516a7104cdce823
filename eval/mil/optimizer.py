"""How a slide model's weights move: the published recipes' optimisers and schedules, and nothing else."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

KINDS = ("adamw", "adam", "radam")


@dataclass(frozen=True)
class OptimizerConfig:
    """kind: adamw; adam (its decay enters the gradient); radam (arXiv 1908.03265, decay as in adamw). weight_decay goes to
    `final_weight_decay` by a cosine over the training. decay_vectors: biases and norms decay too. lookahead: null, or every how
    many steps the weights go back half the way to where they were (arXiv 1907.08610)."""

    kind: str
    lr: float
    weight_decay: float
    final_weight_decay: float
    decay_vectors: bool
    lookahead: int | None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mil.optimizer.kind is {self.kind!r}: expected {', '.join(KINDS)}")
        if self.lookahead is not None and self.lookahead < 1:
            raise ValueError(f"mil.optimizer.lookahead is {self.lookahead}: expected null or a number of steps")


@dataclass(frozen=True)
class ScheduleConfig:
    """warmup_epochs: in them the learning rate goes evenly from `warmup_from` times its value to its value, or with `hold` stays
    there. after: `cosine` to `final_lr`, or `constant`."""

    warmup_epochs: float
    warmup_from: float
    hold: bool
    after: str
    final_lr: float

    def __post_init__(self) -> None:
        if self.after not in ("cosine", "constant"):
            raise ValueError(f"mil.schedule.after is {self.after!r}: expected cosine or constant")


def learning_rate(step: int, steps: int, warmup: float, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Of step 0 <= step < steps; warmup: in steps."""
    if step < warmup:
        risen = 0.0 if schedule.hold else step / warmup
        return optimizer.lr * (schedule.warmup_from + (1 - schedule.warmup_from) * risen)
    if schedule.after == "constant":
        return optimizer.lr
    turn = (step - warmup) / max(steps - warmup, 1)
    return schedule.final_lr + (optimizer.lr - schedule.final_lr) * (1 + math.cos(math.pi * turn)) / 2


def weight_decay(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Of step 0 <= step < steps."""
    turn = (1 + math.cos(math.pi * step / steps)) / 2
    return optimizer.final_weight_decay + (optimizer.weight_decay - optimizer.final_weight_decay) * turn


class Optimizer:
    """Steps a model through a training of `steps` steps, `steps_per_epoch` an epoch."""

    def __init__(
        self, model: nn.Module, steps: int, steps_per_epoch: float, config: OptimizerConfig, schedule: ScheduleConfig
    ) -> None:
        self.steps, self.config, self.schedule = steps, config, schedule
        self.warmup = schedule.warmup_epochs * steps_per_epoch
        self.weights = list(model.parameters())
        vectors = [] if config.decay_vectors else [weight for weight in self.weights if weight.ndim < 2]
        decayed = [weight for weight in self.weights if config.decay_vectors or weight.ndim >= 2]
        self.inner = _build([{"params": decayed}, *([{"params": vectors, "weight_decay": 0.0}] if vectors else [])], config)
        self.slow = [weight.detach().clone() for weight in self.weights] if config.lookahead else []
        self.done = 0

    def step(self, loss: torch.Tensor) -> None:
        """Move down the gradient of a scalar."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate(self.done, self.steps, self.warmup, self.config, self.schedule)
        self.inner.param_groups[0]["weight_decay"] = weight_decay(self.done, self.steps, self.config)
        self.inner.zero_grad()
        loss.backward()
        self.inner.step()
        self.done += 1
        if self.config.lookahead and self.done % self.config.lookahead == 0:
            with torch.no_grad():
                for slow, weight in zip(self.slow, self.weights, strict=True):
                    weight.copy_(slow.lerp_(weight, 0.5))


def _build(weights: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    match config.kind:
        case "adamw":
            return torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
        case "adam":
            return torch.optim.Adam(weights, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.RAdam(weights, lr=config.lr, weight_decay=config.weight_decay, decoupled_weight_decay=True)
