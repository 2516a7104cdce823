"""DINOv2 (arXiv 2304.07193): student and teacher branches, and their outputs -> named loss terms."""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from histoscale.data import keys as draw
from histoscale.pretrain.backbone import ModelConfig, build_backbone, forward_tokens, fuse_attention, kept_rows
from histoscale.pretrain.heads import Head, HeadConfig
from histoscale.pretrain.losses import Across, center_targets, center_update, dino_ce, ibot_ce, kde, koleo, sinkhorn_targets
from histoscale.pretrain.masking import MaskConfig, Masks, make_masks
from histoscale.pretrain.schedule import ScheduleConfig, cosine, linear_then_flat


@dataclass(frozen=True)
class MethodConfig:
    group: int  # consecutive slots inside which masks, stochastic depth, KoLeo and KDE couple patches
    head: HeadConfig
    patch_head: HeadConfig | None  # null: the class head serves the masked patches too
    mask: MaskConfig
    dino_weight: float
    ibot_weight: float  # 0: no masks, no mask token, no patch head
    koleo_weight: float  # per global view
    kde_weight: float  # per global view
    kde_kappa: float
    targets: str  # "sinkhorn" or "centering"
    sinkhorn_iterations: int
    centre_momentum: float
    student_temp: float
    teacher_temp: list[float]  # at step 0 and after the warm-up
    teacher_temp_warmup_steps: int
    momentum: list[float]  # of the teacher, at the first and after the last step
    freeze_last_layer_steps: int  # prototypes keep their first values so long


class Scheduled(NamedTuple):
    teacher_temp: float
    momentum: float
    last_layer: bool  # whether the prototypes learn


class Centres(NamedTuple):
    """State of targets="centering"; empty tensors otherwise. Plain tensors for the checkpoint, the same on every rank."""

    cls: Tensor  # float32 [K]
    patch: Tensor  # float32 [K_p]


class Losses(NamedTuple):
    total: Tensor  # float32 scalar, to be differentiated
    terms: dict[str, Tensor]  # unweighted scalars, detached: dino, ibot, koleo, kde where they are on
    centres: Centres  # for the next micro-batch
    read: dict[str, Tensor]  # of dino and ibot: /ce, /target_entropy as shares of ln K; /prototypes, int64 [K] rows by argmax


class Branch(nn.Module):
    """Student or teacher: backbone, heads, and mask token, with one forward for all views of a micro-batch."""

    def __init__(self, model: ModelConfig, method: MethodConfig, seed: int):
        super().__init__()
        self.backbone = build_backbone(model, seed)
        self.drop_path, self.group = model.drop_path, method.group
        width = self.backbone.embed_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.key(seed, "heads") >> 1)
            self.head = Head(width, method.head)
            separate = method.ibot_weight > 0 and method.patch_head is not None
            self.patch_head = Head(width, method.patch_head) if separate and method.patch_head else None
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if method.ibot_weight > 0 else None

    def forward(
        self,
        globals_: Tensor,
        locals_: Tensor | None = None,
        masks: Tensor | None = None,
        indices: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Views, crop-major, to features and logits.

        globals_ [V * B, 3, g, g]; locals_ [L * B, 3, l, l]; masks bool [V * B, P], patches replaced by the mask token (student);
        indices int64 [M], the tokens of [V * B * P] that go through the patch head; keys int64 [B], one a slot, for stochastic
        depth (none: no stochastic depth).
        Returns features [V * B, D] (class tokens of the globals), cls [(V + L) * B, K], and with indices patch [M, K_p].
        """
        fuse_attention(self.backbone, globals_.device.type != "cpu" or not torch.is_autocast_enabled("cpu"))
        features, patches = self._tokens(globals_, masks, keys, "global")
        rows = [features]
        if locals_ is not None and len(locals_):
            rows.append(self._tokens(locals_, None, keys, "local")[0])
        if indices is None:
            return {"features": features, "cls": self.head(torch.cat(rows))}
        chosen = patches.flatten(0, 1)[indices]
        if self.patch_head is not None:
            return {"features": features, "cls": self.head(torch.cat(rows)), "patch": self.patch_head(chosen)}
        logits = self.head(torch.cat([*rows, chosen]))
        return {"features": features, "cls": logits[: -len(chosen)], "patch": logits[-len(chosen) :]}

    def _tokens(self, views: Tensor, masks: Tensor | None, keys: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        kept = None
        if keys is not None and self.drop_path > 0:
            crops = len(views) // len(keys)
            rows = torch.cat([draw.fork(keys, f"{name}/{crop}") for crop in range(crops)])
            kept = kept_rows(rows, crops, self.group, self.drop_path, 2 * len(self.backbone.blocks))
        return forward_tokens(self.backbone, views, masks, self.mask_token, kept)


def build(model: ModelConfig, method: MethodConfig, seed: int) -> tuple[Branch, Branch]:
    """A student with weights drawn from `seed`, and a teacher that is its exact copy without gradients, in evaluation mode."""
    if method.targets not in ("sinkhorn", "centering"):
        raise ValueError(f"method.targets={method.targets!r}: expected sinkhorn or centering")
    student = Branch(model, method, seed)
    return student, copy.deepcopy(student).eval().requires_grad_(False)


def masks_at(
    model: ModelConfig, method: MethodConfig, seed: int, step: int, slots: Tensor, global_px: int, views: int
) -> Masks | None:
    """The masks of this step's global crops, None when iBOT is off."""
    if method.ibot_weight == 0:
        return None
    side = global_px // model.patch_size
    return make_masks(method.mask, seed, step, slots, (side, side), views, method.group)


def scheduled(step: int, method: MethodConfig, schedule: ScheduleConfig) -> Scheduled:
    """What the method itself schedules, at this optimiser step."""
    first, last = method.momentum
    return Scheduled(
        linear_then_flat(step, method.teacher_temp_warmup_steps, *method.teacher_temp),
        cosine(step, schedule, 0, first, first, last),
        step >= method.freeze_last_layer_steps,
    )


def first_centres(method: MethodConfig, device: torch.device | str) -> Centres:
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
    method: MethodConfig,
    teacher_temp: float,
    views: int,
    across: Across = None,
) -> Losses:
    """Outputs of both branches for one micro-batch -> the objective, its terms, the next centres and what tells a collapse.

    Terms are means over this rank (average gradients over ranks); targets couple the rows of the ranks in `across`.
    Raises ValueError for batch norm in a head over several ranks: its statistics would depend on how many there are.
    """
    if across is not None and (method.head.batch_norm or (method.patch_head is not None and method.patch_head.batch_norm)):
        raise ValueError("method.head.batch_norm=true works in one process only: set it to false, or start one process")
    views_by = teacher["cls"].unflatten(0, (views, -1))  # [V, B, K]
    slots = views_by.shape[1]
    cls_targets, cls_centre = _targets(teacher["cls"], centres.cls, method, teacher_temp, across)
    targets = cls_targets.view_as(views_by)
    terms = {"dino": dino_ce(student["cls"].unflatten(0, (-1, slots)), targets, method.student_temp)}
    read = _read("dino", terms["dino"], cls_targets)
    weighted = [method.dino_weight * terms["dino"]]
    patch_centre = centres.patch
    if masks is not None:
        patch_targets, patch_centre = _targets(teacher["patch"], centres.patch, method, teacher_temp, across)
        crops = views * slots
        terms["ibot"] = ibot_ce(student["patch"], patch_targets, masks.weights, crops, method.student_temp)
        read |= _read("ibot", terms["ibot"] * crops / masks.weights.sum(), patch_targets)
        weighted.append(method.ibot_weight * terms["ibot"])
    features = student["features"].chunk(views)
    if method.koleo_weight > 0:
        terms["koleo"] = torch.stack([koleo(z, method.group) for z in features]).sum()
        weighted.append(method.koleo_weight * terms["koleo"])
    if method.kde_weight > 0:
        terms["kde"] = torch.stack([kde(z, method.kde_kappa, method.group) for z in features]).sum()
        weighted.append(method.kde_weight * terms["kde"])
    detached = {name: term.detach() for name, term in terms.items()}
    return Losses(torch.stack(weighted).sum(), detached, Centres(cls_centre, patch_centre), read)


def _targets(logits: Tensor, centre: Tensor, method: MethodConfig, temp: float, across: Across) -> tuple[Tensor, Tensor]:
    if method.targets == "sinkhorn":
        return sinkhorn_targets(logits, temp, method.sinkhorn_iterations, across), centre
    return center_targets(logits, centre, temp), center_update(logits, centre, method.centre_momentum, across)


@torch.no_grad()
def _read(name: str, ce: Tensor, targets: Tensor) -> dict[str, Tensor]:
    prototypes = targets.shape[-1]
    entropy = torch.special.entr(targets).sum(-1).mean()
    used = torch.bincount(targets.argmax(-1), minlength=prototypes)
    scale = math.log(prototypes)
    return {f"{name}/ce": ce.detach() / scale, f"{name}/target_entropy": entropy / scale, f"{name}/prototypes": used}
