"""DINO (arXiv 2104.14294): every crop of the student predicts the teacher's view of the other global crops; class tokens only."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from histoscale.pretrain.backbone import ModelConfig
from histoscale.pretrain.losses import Across
from histoscale.pretrain.methods.distillation import (
    Branch,
    Centres,
    DistillationConfig,
    Losses,
    Scheduled,
    check_batch_norm,
    check_targets,
    class_term,
    with_teacher,
)


@dataclass(frozen=True)
class DinoConfig(DistillationConfig):
    kind: Literal["dino"]


def build(model: ModelConfig, method: DinoConfig, seed: int) -> tuple[Branch, Branch]:
    """A student with weights drawn from `seed`, and its teacher. Neither has a mask token or a patch head."""
    check_targets(method)
    return with_teacher(Branch(model, method, patch_head=None, masked=False, dense=False, seed=seed))


def first_centres(method: DinoConfig, device: torch.device | str) -> Centres:
    """The state before step 0: zeros for centring, nothing for Sinkhorn."""
    rows = method.head.prototypes if method.targets == "centering" else 0
    return Centres(torch.zeros(rows, device=device), torch.zeros(0, device=device))


def losses(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    centres: Centres,
    method: DinoConfig,
    now: Scheduled,
    views: int,
    across: Across = None,
) -> Losses:
    """Outputs of both branches for one micro-batch -> the objective, which is its one term `dino`."""
    check_batch_norm([method.head], across)
    term, centre, read = class_term(student["cls"], teacher["cls"], centres.cls, method, now.teacher_temp, views, 1.0, across)
    return Losses(term, {"dino": term.detach()}, Centres(centre, centres.patch), read)
