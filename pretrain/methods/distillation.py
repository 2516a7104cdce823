"""Self-distillation without labels (arXiv 2104.14294), which every method here is built on: branches, class term, schedule."""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histoscale.data import keys as draw
from histoscale.pretrain.backbone import ModelConfig, build_backbone, forward_views, kept_rows
from histoscale.pretrain.heads import Head, HeadConfig
from histoscale.pretrain.losses import Across, center_targets, center_update, dino_ce, sinkhorn_targets
from histoscale.pretrain.schedule import ScheduleConfig, cosine, linear_then_flat

_SAMPLE = 256  # rows that student entropy and divergence are read off


@dataclass(frozen=True)
class DistillationConfig:
    """What every method is told."""

    group: int  # consecutive slots inside which masks, stochastic depth and local regularisers couple patches
    head: HeadConfig
    targets: str  # "sinkhorn" or "centering"
    sinkhorn_iterations: int
    centre_momentum: float
    student_temp: float
    teacher_temp: list[float]  # at step 0 and after the warm-up
    teacher_temp_warmup_steps: int
    momentum: list[float]  # of the teacher, at the first and after the last step
    freeze_last_layer_steps: int  # prototypes keep their first values so long (lr 0; their moments move)


class Scheduled(NamedTuple):
    """What a method itself schedules, at one optimiser step."""

    teacher_temp: float
    momentum: float
    last_layer: bool  # whether the prototypes learn
    gram_weight: float  # 0: the Gram teacher need not be asked


class Centres(NamedTuple):
    """State of targets="centering"; empty tensors otherwise. Plain tensors for the checkpoint, the same on every rank."""

    cls: Tensor  # float32 [K]
    patch: Tensor  # float32 [K_p]


class Losses(NamedTuple):
    """What one micro-batch gives. `read`, per head: /ce, /target_entropy, /student_entropy and /kl (target from student) as
    shares of ln K, the last two from a sample of rows; /prototypes, int64 [K] rows by argmax of the target.
    """

    total: Tensor  # float32 scalar, to be differentiated
    terms: dict[str, Tensor]  # unweighted scalars by name, detached
    centres: Centres  # for the next micro-batch
    read: dict[str, Tensor]


class Branch(nn.Module):
    """Student or teacher: backbone, heads, and mask token, with one forward for all views of a micro-batch.

    patch_head: null where the class head serves the patches too. masked: whether crops may be masked, which takes a mask token.
    dense: whether the forward also gives the patch features of the global views.
    """

    def __init__(
        self, model: ModelConfig, method: DistillationConfig, patch_head: HeadConfig | None, masked: bool, dense: bool, seed: int
    ):
        super().__init__()
        self.dense = dense
        self.backbone = build_backbone(model, seed)
        self.drop_path, self.group = model.drop_path, method.group
        width = self.backbone.embed_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.key(seed, "heads") >> 1)
            self.head = Head(width, method.head)
            self.patch_head = Head(width, patch_head) if patch_head else None
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if masked else None

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
        Returns features [V * B, D] (class tokens of the globals), cls [(V + L) * B, K], and with indices patch [M, K_p]; a dense
        branch also dense [V * B, P, D].
        """
        views, views_masks, views_kept = [globals_], [masks], [self._kept(globals_, keys, "global")]
        if locals_ is not None and len(locals_):
            views, views_masks, views_kept = [*views, locals_], [masks, None], [*views_kept, self._kept(locals_, keys, "local")]
        (features, patches), *others = forward_views(self.backbone, views, views_masks, self.mask_token, views_kept)
        rows = [features, *(cls for cls, _ in others)]
        found = {"features": features, "dense": patches} if self.dense else {"features": features}
        if indices is None:
            return {**found, "cls": self.head(torch.cat(rows))}
        chosen = patches.flatten(0, 1)[indices]
        if self.patch_head is not None:
            return {**found, "cls": self.head(torch.cat(rows)), "patch": self.patch_head(chosen)}
        logits = self.head(torch.cat([*rows, chosen]))
        return {**found, "cls": logits[: -len(chosen)], "patch": logits[-len(chosen) :]}

    def _kept(self, views: Tensor, keys: Tensor | None, name: str) -> Tensor | None:
        if keys is None or self.drop_path == 0:
            return None
        crops = len(views) // len(keys)
        rows = torch.cat([draw.fork(keys, f"{name}/{crop}") for crop in range(crops)])
        return kept_rows(rows, crops, self.group, self.drop_path, 2 * len(self.backbone.blocks))


def with_teacher(student: Branch) -> tuple[Branch, Branch]:
    """The student, and a teacher that is its exact copy without gradients, in evaluation mode."""
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    teacher.dense = False  # the Gram teacher stands in for it
    return student, teacher


def check_targets(method: DistillationConfig) -> None:
    """Raises ValueError for targets that are not known."""
    if method.targets not in ("sinkhorn", "centering"):
        raise ValueError(f"method.targets={method.targets!r}: expected sinkhorn or centering")


def schedule_at(step: int, method: DistillationConfig, schedule: ScheduleConfig, gram_weight: float) -> Scheduled:
    """What every method schedules, at this optimiser step, beside the Gram weight."""
    first, last = method.momentum
    return Scheduled(
        linear_then_flat(step, method.teacher_temp_warmup_steps, *method.teacher_temp),
        cosine(step, schedule, 0, first, first, last),
        step >= method.freeze_last_layer_steps,
        gram_weight,
    )


def targets_of(logits: Tensor, centre: Tensor, method: DistillationConfig, temp: float, across: Across) -> tuple[Tensor, Tensor]:
    """Teacher logits [n, K] -> target probabilities [n, K], and the centre for the next micro-batch."""
    if method.targets == "sinkhorn":
        return sinkhorn_targets(logits, temp, method.sinkhorn_iterations, across), centre
    return center_targets(logits, centre, temp), center_update(logits, centre, method.centre_momentum, across)


def class_term(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    method: DistillationConfig,
    temp: float,
    views: int,
    local_weight: float,
    across: Across,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """DINO's term from logits, student [(V + L) * B, K] and teacher [V * B, K]; the next centre; what tells a collapse."""
    flat, centre = targets_of(teacher, centre, method, temp, across)
    targets = flat.unflatten(0, (views, -1))  # [V, B, K]
    crops = student.unflatten(0, (-1, targets.shape[1]))  # [V + L, B, K]
    term = dino_ce(crops, targets, method.student_temp, local_weight)
    return term, centre, read_outs("dino", term, flat, crops[-1], targets[0], method.student_temp)


@torch.no_grad()
def read_outs(name: str, ce: Tensor, targets: Tensor, student: Tensor, taught: Tensor, temp: float) -> dict[str, Tensor]:
    """The `read` of one head. targets [n, K] are all of them; student logits and taught, [m, K] each, belong together by row."""
    prototypes = targets.shape[-1]
    scale = math.log(prototypes)
    every = max(len(student) // _SAMPLE, 1)
    log_q, p = F.log_softmax(student[::every].to(targets.dtype) / temp, -1), taught[::every]
    entropy = torch.special.entr(p).sum(-1)
    chosen = targets.argmax(-1)
    used = torch.zeros(prototypes, dtype=torch.long, device=chosen.device).index_add_(0, chosen, torch.ones_like(chosen))
    return {
        f"{name}/ce": ce.detach() / scale,
        f"{name}/target_entropy": torch.special.entr(targets).sum(-1).mean() / scale,
        f"{name}/student_entropy": torch.special.entr(log_q.exp()).sum(-1).mean() / scale,
        f"{name}/kl": (-(p * log_q).sum(-1) - entropy).mean() / scale,
        f"{name}/prototypes": used,
    }


def check_batch_norm(heads: list[HeadConfig | None], across: Across) -> None:
    """Raises ValueError for batch norm in a head over several ranks: its statistics would depend on how many there are."""
    if across is not None and any(head is not None and head.batch_norm for head in heads):
        raise ValueError("method.head.batch_norm=true works in one process only: set it to false, or start one process")
