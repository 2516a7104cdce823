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
from histoscale.pretrain.methods.distillation import Branch, Centres, Losses, Scheduled, scheduled

MethodConfig = Annotated[DinoConfig | Dinov2Config, Field(discriminator="kind")]

__all__ = [
    "Branch", "Centres", "DinoConfig", "Dinov2Config", "Losses", "MethodConfig", "Scheduled",
    "build", "first_centres", "losses", "masks_at", "scheduled",
]  # fmt: skip


def build(model: ModelConfig, method: MethodConfig, seed: int) -> tuple[Branch, Branch]:
    """A student with weights drawn from `seed`, and a teacher that is its exact copy without gradients, in evaluation mode.

    Raises ValueError for targets that are not known, and what build_backbone and Head raise.
    """
    if isinstance(method, DinoConfig):
        return dino.build(model, method, seed)
    return dinov2.build(model, method, seed)


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
) -> Losses:
    """Outputs of both branches for one micro-batch -> the objective, its terms, the next centres and what tells a collapse.

    Raises ValueError for batch norm in a head over several ranks: its statistics would depend on how many there are.
    """
    if isinstance(method, DinoConfig):
        return dino.losses(student, teacher, centres, method, now, views, across)
    return dinov2.losses(student, teacher, masks, centres, method, now, views, across)
