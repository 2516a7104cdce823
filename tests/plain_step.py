"""The plainest correct training step of DINO and DINOv2 that we can write: one process, one loop, torch and timm alone.

The measure of `histoscale bench what=train`, and an independent answer to what a step must do: it shares no code with the
package and takes from it only the first weights, the views, the masks and this step's scheduled values. No stochastic depth, no
Gram term, no micro-batches. Formulas: arXiv 2104.14294 (DINO, centring), 2304.07193 (iBOT, Sinkhorn, groups), 1806.03198 (KoLeo).
"""

import copy
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Inputs(NamedTuple):
    globals: Tensor  # [V * B, 3, g, g], crop-major
    locals: Tensor  # [L * B, 3, l, l]
    masks: Tensor | None  # bool [V * B, P]


class Values(NamedTuple):
    lr: float
    weight_decay: float
    teacher_temp: float
    momentum: float
    last_layer: bool


class PlainHead(nn.Module):
    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.hidden), nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )  # fmt: skip
        self.last_direction = nn.Parameter(torch.empty(config.prototypes, config.bottleneck))
        self.last_scale = nn.Parameter(torch.ones(config.prototypes, 1)) if config.scale == "trainable" else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.mlp(x).float(), dim=-1, eps=1e-12)
        last = F.normalize(self.last_direction, dim=-1, eps=1e-12)
        return x @ (last if self.last_scale is None else self.last_scale * last).T


class PlainNetwork(nn.Module):
    """A timm vision transformer, its heads and the mask token, with the package's names for the parameters."""

    def __init__(self, backbone: nn.Module, method: Any) -> None:
        super().__init__()
        width = int(backbone.num_features)  # type: ignore[arg-type]
        self.backbone = backbone
        self.head = PlainHead(width, method.head)
        dense = method.kind == "dinov2" and method.ibot_weight > 0
        self.patch_head = PlainHead(width, method.patch_head) if dense and method.patch_head else None
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if dense else None

    def tokens(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        vit: Any = self.backbone
        patches = vit.patch_embed(x)  # [B, h, w, D]
        if masks is not None and self.mask_token is not None:
            hidden = masks.view(patches.shape[:3])[..., None]
            patches = torch.where(hidden, self.mask_token.to(patches.dtype), patches)
        x = vit.norm(vit.blocks(vit.norm_pre(vit._pos_embed(patches))))
        return x[:, 0], x[:, vit.num_prefix_tokens :]


class PlainTrainer:
    """student, teacher: networks with equal weights. method, optim, precision: the package's configuration of them."""

    def __init__(
        self, backbone: nn.Module, weights: dict[str, Tensor], method: Any, optim: Any, precision: str, views: int
    ) -> None:
        device = next(iter(weights.values())).device
        self.student = PlainNetwork(backbone, method).to(device)
        self.student.load_state_dict(weights)
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.method, self.optim, self.precision, self.views = method, optim, precision, views
        self.centre = torch.zeros(method.head.prototypes, device=device)
        patch = getattr(method, "patch_head", None) or method.head
        self.patch_centre = torch.zeros(patch.prototypes, device=device)
        self.adamw = torch.optim.AdamW(self._groups(), betas=tuple(optim.betas), eps=optim.eps)
        self.laps: dict[str, float] = {}

    def step(self, inputs: Inputs, now: Values) -> dict[str, float]:
        """One update of student and teacher; what the terms were. `laps` has the milliseconds of its parts."""
        self._marks = [("", self._now())]
        batch = len(inputs.globals) // self.views
        with torch.autocast(inputs.globals.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            with torch.no_grad():
                cls, patches = self.teacher.tokens(inputs.globals)
                taught = self.teacher.head(cls)
                taught_patches = None if inputs.masks is None else self._patches(self.teacher, patches[inputs.masks])
            self._lap("teacher")
            cls, patches = self.student.tokens(inputs.globals, inputs.masks)
            small, _ = self.student.tokens(inputs.locals)
            said = self.student.head(torch.cat([cls, small]))
            said_patches = None if inputs.masks is None else self._patches(self.student, patches[inputs.masks])
            self._lap("student")

        # DINO: every crop predicts every teacher's view but its own.
        method = self.method
        targets, self.centre = self._targets(taught, self.centre, now.teacher_temp)
        terms: dict[str, Tensor] = {"dino": torch.zeros((), device=said.device)}
        pairs = 0
        for v, target in enumerate(targets.split(batch)):
            for crop, logits in enumerate(said.split(batch)):
                if crop != v:
                    terms["dino"] = terms["dino"] + cross_entropy(target, logits, method.student_temp).mean()
                    pairs += 1
        terms["dino"] = terms["dino"] / pairs
        loss = getattr(method, "dino_weight", 1.0) * terms["dino"]

        if method.kind == "dinov2":
            # iBOT: the mean over a crop's masked patches, then over all crops, masked or not.
            if inputs.masks is not None and taught_patches is not None and said_patches is not None:
                targets, self.patch_centre = self._targets(taught_patches, self.patch_centre, now.teacher_temp)
                each = cross_entropy(targets, said_patches, method.student_temp)
                counts = inputs.masks.sum(1).tolist()
                terms["ibot"] = torch.stack([part.mean() for part in each.split(counts) if len(part)]).sum() / len(inputs.masks)
                loss = loss + method.ibot_weight * terms["ibot"]
            if method.koleo_weight:
                pools = [pool for view in cls.split(batch) for pool in view.split(method.koleo_pool)]
                terms["koleo"] = torch.stack([koleo(pool) for pool in pools]).sum() * method.koleo_pool / batch
                loss = loss + method.koleo_weight * terms["koleo"]
            if method.kde_weight:
                pools = [pool for view in cls.split(batch) for pool in view.split(method.kde_pool)]
                terms["kde"] = torch.stack([kde(pool, method.kde_kappa) for pool in pools]).sum() * method.kde_pool / batch
                loss = loss + method.kde_weight * terms["kde"]
        self._lap("losses")

        loss.backward()
        self._lap("backward")
        for child in self.student.children():
            torch.nn.utils.clip_grad_norm_(child.parameters(), self.optim.clip_value)
        if self.student.mask_token is not None:
            torch.nn.utils.clip_grad_norm_([self.student.mask_token], self.optim.clip_value)
        for group in self.adamw.param_groups:
            group["lr"] = now.lr * group["lr_share"] * (now.last_layer or not group["last"])
            group["weight_decay"] = now.weight_decay * group["decays"]
        self.adamw.step()
        self.adamw.zero_grad()
        self._lap("optimiser")
        with torch.no_grad():
            old, new = list(self.teacher.parameters()), list(self.student.parameters())
            torch._foreach_mul_(old, now.momentum)
            torch._foreach_add_(old, new, alpha=1 - now.momentum)
        self._lap("ema")
        self.laps = self._read()
        return {"loss": float(loss.detach()), **{name: float(term.detach()) for name, term in terms.items()}}

    def _patches(self, network: PlainNetwork, tokens: Tensor) -> Tensor:
        return (network.patch_head or network.head)(tokens)

    def _targets(self, logits: Tensor, centre: Tensor, temp: float) -> tuple[Tensor, Tensor]:
        if self.method.targets == "sinkhorn":
            return sinkhorn(logits, temp, self.method.sinkhorn_iterations), centre
        kept = self.method.centre_momentum
        return ((logits - centre) / temp).softmax(-1), kept * centre + (1 - kept) * logits.mean(0)

    def _groups(self) -> list[dict[str, Any]]:
        """DINOv2's rules of decay: none on biases, norms and LayerScale, some on tokens and positions."""
        blocks = len(self.student.backbone.blocks)  # type: ignore[arg-type]
        groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
        for name, p in self.student.named_parameters():
            block = re.search(r"blocks\.(\d+)\.", name)
            token = name.rsplit(".", 1)[-1] in ("pos_embed", "cls_token", "reg_token", "mask_token")
            depth = blocks - int(block[1]) if block else blocks + 1 if token or "patch_embed" in name else 0
            share = self.optim.layer_decay**depth * (self.optim.patch_lr if "patch_embed" in name else 1)
            decays, last = float(p.ndim > 1 and not (token and self.optim.groups == "timm")), ".last_" in name
            group = groups.setdefault((share, decays, last), {"params": [], "lr_share": share, "decays": decays, "last": last})
            group["params"].append(p)
        return list(groups.values())

    def _now(self) -> float | torch.cuda.Event:
        """The clock of the device: on a GPU a mark in its queue, so that the host may run ahead."""
        if self.centre.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _lap(self, part: str) -> None:
        self._marks.append((part, self._now()))

    def _read(self) -> dict[str, float]:
        """Milliseconds of each part of the step."""
        if self.centre.device.type == "cuda":
            torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return {part: 1000 * (b - a) if isinstance(a, float) else a.elapsed_time(b) for (_, a), (part, b) in pairs}  # type: ignore


def cross_entropy(target: Tensor, logits: Tensor, temp: float) -> Tensor:
    """[n, K] twice -> [n]."""
    return -(target * (logits.float() / temp).log_softmax(-1)).sum(-1)


def sinkhorn(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """Rows sum to 1, columns to about n / K: [n, K]."""
    q = (logits.double() / temp).exp()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q.float()


def koleo(z: Tensor) -> Tensor:
    """-mean log distance to the nearest other row."""
    z = F.normalize(z.float(), dim=-1, eps=1e-8)
    nearest = (z @ z.T - 4 * torch.eye(len(z), device=z.device)).argmax(1)
    return -(F.pairwise_distance(z, z[nearest], eps=1e-8) + 1e-8).log().mean()


def kde(z: Tensor, kappa: float) -> Tensor:
    """Mean log density of the rows under the others."""
    z = F.normalize(z.float(), dim=-1, eps=1e-8)
    others = (kappa * z @ z.T)[~torch.eye(len(z), dtype=torch.bool, device=z.device)].view(len(z), -1)
    return others.logsumexp(1).mean() - math.log(len(z) - 1)


def timed(trainer: PlainTrainer, prepared: Callable[[int], tuple[Inputs, Values]], steps: range) -> dict[str, float]:
    """Mean milliseconds of each part of a step over `steps`; what `prepared` takes is not counted."""
    total: dict[str, float] = {}
    for step in steps:
        inputs, now = prepared(step)
        trainer.step(inputs, now)
        for part, ms in trainer.laps.items():
            total[part] = total.get(part, 0.0) + ms / len(steps)
    return total
