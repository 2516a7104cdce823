"""Gram anchoring (DINOv3, arXiv 2508.10104): a frozen earlier model says how alike patches are, and the student keeps it so.

For long runs and high resolutions, where patch features of a student that goes on learning lose their detail.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from histoscale.pretrain.backbone import ModelConfig, build_backbone, forward_tokens
from histoscale.pretrain.losses import gram, regrid
from histoscale.pretrain.masking import Masks


@dataclass(frozen=True)
class GramConfig:
    weight: float
    warmup_steps: int  # linear from 0, after first_step
    first_step: int  # the term is off before
    source: str  # "teacher": a copy of the teacher at first_step; or weights, named as in start.weights
    refresh_every: int | None  # steps after which the teacher of then is copied in its place; null: never
    refreshes: int  # how often at most
    px: int | None  # side of what it sees: the global views' crops, colours unchanged; null: the student's global views
    tokens: str  # "all", "masked" or "unmasked" patches of the global crops; a part needs scope=batch
    scope: str  # "image": cosines within a crop; "batch": within all crops of a micro-batch on a rank, (V B P)^2 of them
    negatives: str  # cosines below 0: "keep", clamp "both" sides, or the "teacher" (losses.gram)


def check(config: GramConfig, model: ModelConfig) -> None:
    """Raises ValueError for words that are not known, or values that do not go together."""
    for name, value, known in (
        ("tokens", config.tokens, ("all", "masked", "unmasked")),
        ("scope", config.scope, ("image", "batch")),
        ("negatives", config.negatives, ("keep", "both", "teacher")),
    ):
        if value not in known:
            raise ValueError(f"method.gram.{name}={value!r}: expected one of {', '.join(known)}")
    if config.tokens != "all" and config.scope == "image":
        raise ValueError(f"method.gram.tokens={config.tokens} differs in number from crop to crop: set method.gram.scope=batch")
    if config.px is not None and config.px % model.patch_size:
        raise ValueError(f"method.gram.px={config.px} is not a multiple of model.patch_size={model.patch_size}")
    if config.refresh_every is not None and config.refresh_every < 1:
        raise ValueError(f"method.gram.refresh_every={config.refresh_every}: expected at least 1, or null for never")


class GramTeacher(nn.Module):
    """The frozen backbone. Built without weights of its own: they come from the teacher or a checkpoint, key by key."""

    def __init__(self, model: ModelConfig, config: GramConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(model, 0)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, views: Tensor, grid: tuple[int, int]) -> Tensor:
        """Global views [V * B, 3, h, w], unmasked and of any size -> patch features [V * B, P, D] on the student's grid of P."""
        side = self.backbone.patch_embed.patch_size
        tokens = forward_tokens(self.backbone, views)[1]
        return regrid(tokens, (views.shape[2] // side[0], views.shape[3] // side[1]), grid)


def weight_at(step: int, config: GramConfig | None) -> float:
    """The term's weight at this optimiser step; 0 where it is off."""
    if config is None or step < config.first_step:
        return 0.0
    passed = step - config.first_step
    return config.weight * min(passed / config.warmup_steps, 1.0) if config.warmup_steps else config.weight


def takes_teacher(step: int, config: GramConfig | None) -> bool:
    """Whether the Gram teacher becomes a copy of the teacher before this optimiser step."""
    if config is None or step < config.first_step:
        return False
    passed = step - config.first_step
    if passed == 0:
        return config.source == "teacher"
    every = config.refresh_every
    return every is not None and passed % every == 0 and passed // every <= config.refreshes


def gram_term(student: Tensor, target: Tensor, masks: Masks | None, config: GramConfig) -> Tensor:
    """The unweighted term from patch features [V * B, P, D] of the student's masked pass and of the Gram teacher.

    Raises ValueError when a part of the tokens is asked for and nothing is masked.
    """
    if config.tokens != "all":
        if masks is None:
            raise ValueError(f"method.gram.tokens={config.tokens} needs masks: set it to all, or method.ibot_weight above 0")
        visible = masks.crops.numel() - len(masks.indices)  # sorted first; nonzero() would have the device waited for
        chosen = masks.indices if config.tokens == "masked" else masks.crops.flatten().int().argsort(stable=True)[:visible]
        student, target = student.flatten(0, 1)[chosen][None], target.flatten(0, 1)[chosen][None]
    elif config.scope == "batch":
        student, target = student.flatten(0, 1)[None], target.flatten(0, 1)[None]
    return gram(student, target, config.negatives)
