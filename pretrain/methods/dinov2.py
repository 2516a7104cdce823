"""DINOv2 (arXiv 2304.07193): DINO on class tokens, iBOT on masked patches, and a term that keeps class tokens apart.

DINOv3 (arXiv 2508.10104) adds the pools over ranks, the weight of local crops and the Gram term.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from histoscale.pretrain.backbone import ModelConfig
from histoscale.pretrain.heads import HeadConfig
from histoscale.pretrain.losses import Across, ibot_ce, kde, kde_reversed, koleo
from histoscale.pretrain.masking import MaskConfig, Masks, make_masks
from histoscale.pretrain.methods.distillation import (
    Branch,
    Centres,
    DistillationConfig,
    Losses,
    Scheduled,
    check_batch_norm,
    check_targets,
    class_term,
    read_outs,
    targets_of,
    with_teacher,
)
from histoscale.pretrain.methods.gram import GramConfig, check, gram_term


@dataclass(frozen=True)
class Dinov2Config(DistillationConfig):
    kind: Literal["dinov2"]
    patch_head: HeadConfig | None  # null: the class head serves the masked patches too
    mask: MaskConfig
    dino_weight: float
    local_weight: float  # of the local crops' part of the class term
    ibot_weight: float  # 0: no masks, no mask token, no patch head
    koleo_weight: float  # per global view
    koleo_pool: int | None  # consecutive slots of a micro-batch among which neighbours are sought, over ranks; null: all
    koleo_neighbours: int
    kde_weight: float  # per global view
    kde_kappa: float
    kde_pool: int | None  # as koleo_pool
    kde_reversed: bool  # an ablation: the sign that MedARC-AI/OpenMidnight published, which rewards collapse
    gram: GramConfig | None


def build(model: ModelConfig, method: Dinov2Config, seed: int) -> tuple[Branch, Branch]:
    """A student with weights drawn from `seed`, and its teacher; heads and mask token only where they are used."""
    check_targets(method)
    if method.gram is not None:
        check(method.gram, model)
    masked = method.ibot_weight > 0
    return with_teacher(Branch(model, method, method.patch_head if masked else None, masked, method.gram is not None, seed))


def check_pools(method: Dinov2Config, slots: int) -> None:
    """Raises ValueError, naming the nearest that do, for pools that do not divide the slots of a micro-batch over all ranks."""
    for name, weight, pool, least in (
        ("koleo_pool", method.koleo_weight, method.koleo_pool, method.koleo_neighbours + 1),
        ("kde_pool", method.kde_weight, method.kde_pool, 2),
    ):
        rows = min(pool or slots, slots)
        if weight and slots % rows:
            divisors = [d for d in range(1, slots + 1) if slots % d == 0]
            low, high = max(d for d in divisors if d < rows), min(d for d in divisors if d > rows)
            raise ValueError(
                f"method.{name}={pool} does not divide the {slots} slots of a micro-batch over all ranks; "
                f"the nearest that do: {low} and {high}"
            )
        if weight and rows < least and slots > 1:
            raise ValueError(f"method.{name}={pool} leaves each row fewer than {least - 1} others to compare with: raise it")


def masks_at(
    model: ModelConfig, method: Dinov2Config, seed: int, step: int, slots: Tensor, global_px: int, views: int
) -> Masks | None:
    """The masks of this step's global crops, None when iBOT is off."""
    if method.ibot_weight == 0:
        return None
    side = global_px // model.patch_size
    return make_masks(method.mask, seed, step, slots, (side, side), views, method.group)


def first_centres(method: Dinov2Config, device: torch.device | str) -> Centres:
    """The state before step 0: zeros for centring, nothing for Sinkhorn."""
    centring = method.targets == "centering"
    patch = method.patch_head or method.head
    return Centres(
        torch.zeros(method.head.prototypes if centring else 0, device=device),
        torch.zeros(patch.prototypes if centring and method.ibot_weight > 0 else 0, device=device),
    )


def losses(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    masks: Masks | None,
    centres: Centres,
    method: Dinov2Config,
    now: Scheduled,
    views: int,
    across: Across = None,
    gram: Tensor | None = None,
) -> Losses:
    """Outputs of both branches for one micro-batch -> the objective, its terms, the next centres and what tells a collapse.

    gram: patch features [V * B, P, D] of the Gram teacher, wanted where now.gram_weight is above 0 (ValueError without).
    """
    check_batch_norm([method.head, method.patch_head], across)
    temp, local_weight = now.teacher_temp, method.local_weight
    dino, cls_centre, read = class_term(student["cls"], teacher["cls"], centres.cls, method, temp, views, local_weight, across)
    terms, weighted, patch_centre = {"dino": dino}, [method.dino_weight * dino], centres.patch
    features = student["features"].chunk(views)
    if masks is not None:
        targets, patch_centre = targets_of(teacher["patch"], centres.patch, method, temp, across)
        crops = len(student["features"])
        terms["ibot"] = ibot_ce(student["patch"], targets, masks.weights, crops, method.student_temp)
        mean = terms["ibot"] * crops / masks.weights.sum()  # over the masked crops
        read |= read_outs("ibot", mean, targets, student["patch"], targets, method.student_temp)
        weighted.append(method.ibot_weight * terms["ibot"])
    if method.koleo_weight > 0:
        pool, neighbours = method.koleo_pool, method.koleo_neighbours
        terms["koleo"] = torch.stack([koleo(z, pool, across, neighbours) for z in features]).sum()
        weighted.append(method.koleo_weight * terms["koleo"])
    if method.kde_weight > 0:
        density = kde_reversed if method.kde_reversed else kde
        terms["kde"] = torch.stack([density(z, method.kde_kappa, method.kde_pool, across) for z in features]).sum()
        weighted.append(method.kde_weight * terms["kde"])
    if method.gram is not None and now.gram_weight > 0:
        if gram is None:
            raise ValueError("method.gram is on at this step, and no features of the Gram teacher were given")
        terms["gram"] = gram_term(student["dense"], gram, masks, method.gram)
        weighted.append(now.gram_weight * terms["gram"])
    detached = {name: term.detach() for name, term in terms.items()}
    return Losses(torch.stack(weighted).sum(), detached, Centres(cls_centre, patch_centre), read)
