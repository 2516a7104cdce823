"""Self-supervised objectives behind one interface: outputs of student and teacher become named loss terms.

`method.kind` chooses. Losses are means over this rank (average gradients over ranks); targets couple the rows of all ranks.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from histoscale.pretrain.backbone import ModelConfig
from histoscale.pretrain.losses import Across
from histoscale.pretrain.masking import Masks
from histoscale.pretrain.methods import dino, dinov2
from histoscale.pretrain.methods.dino import DinoConfig
from histoscale.pretrain.methods.dinov2 import Dinov2Config
from histoscale.pretrain.methods.distillation import Branch, Centres, Losses, Scheduled, schedule_at
from histoscale.pretrain.methods.gram import GramConfig, GramTeacher, takes_teacher, weight_at
from histoscale.pretrain.schedule import ScheduleConfig

MethodConfig = Annotated[DinoConfig | Dinov2Config, Field(discriminator="kind")]

__all__ = [
    "Branch", "Centres", "DinoConfig", "Dinov2Config", "GramConfig", "GramTeacher", "Losses", "MethodConfig", "Scheduled",
    "build", "build_gram_teacher", "check_pools", "first_centres", "gram_takes_teacher", "losses", "masks_at", "scheduled",
]  # fmt: skip


def build(model: ModelConfig, method: MethodConfig, seed: int) -> tuple[Branch, Branch]:
    """A student with weights drawn from `seed`, and a teacher that is its exact copy without gradients, in evaluation mode.

    Raises ValueError for targets that are not known, and what build_backbone and Head raise.
    """
    if isinstance(method, DinoConfig):
        return dino.build(model, method, seed)
    return dinov2.build(model, method, seed)


def check_pools(method: MethodConfig, slots: int) -> None:
    """Raises ValueError for pools of KoLeo or KDE that do not divide the slots of a micro-batch over all ranks."""
    if not isinstance(method, DinoConfig):
        dinov2.check_pools(method, slots)


def build_gram_teacher(model: ModelConfig, method: MethodConfig) -> GramTeacher | None:
    """The frozen backbone of method.gram, still without its weights; None where the method has no such term."""
    return None if isinstance(method, DinoConfig) or method.gram is None else GramTeacher(model, method.gram)


def gram_takes_teacher(step: int, method: MethodConfig) -> bool:
    """Whether the Gram teacher's backbone becomes a copy of the teacher's before this optimiser step."""
    return not isinstance(method, DinoConfig) and takes_teacher(step, method.gram)


def scheduled(step: int, method: MethodConfig, schedule: ScheduleConfig) -> Scheduled:
    """What the method itself schedules, at this optimiser step."""
    return schedule_at(step, method, schedule, 0.0 if isinstance(method, DinoConfig) else weight_at(step, method.gram))


def masks_at(
    model: ModelConfig, method: MethodConfig, seed: int, step: int, slots: Tensor, global_px: int, views: int
) -> Masks | None:
    """The masks of this step's global crops, None where the method masks nothing."""
    return None if isinstance(method, DinoConfig) else dinov2.masks_at(model, method, seed, step, slots, global_px, views)


def first_centres(method: MethodConfig, device: torch.device | str) -> Centres:
    """The state before step 0: zeros for centring, nothing for Sinkhorn."""
    return dino.first_centres(method, device) if isinstance(method, DinoConfig) else dinov2.first_centres(method, device)


def losses(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    masks: Masks | None,
    centres: Centres,
    method: MethodConfig,
    now: Scheduled,
    views: int,
    across: Across = None,
    gram: Tensor | None = None,
) -> Losses:
    """Outputs of both branches for one micro-batch -> the objective, its terms, the next centres and what tells a collapse.

    gram: features of the Gram teacher for the same global crops [V * B, P, D]; wanted where now.gram_weight is above 0.
    Raises ValueError without them, and for batch norm in a head over several ranks: its statistics would depend on how many.
    """
    if isinstance(method, DinoConfig):
        return dino.losses(student, teacher, centres, method, now, views, across)
    return dinov2.losses(student, teacher, masks, centres, method, now, views, across, gram)
