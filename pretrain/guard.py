"""What is not finite moves nothing: gradients that overflow in fp16 skip a step, everything else stops the run. On the device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from histoscale.data.journal import Journal, write_json
from histoscale.data.ranks import Ranks
from histoscale.data.stream import Batch
from histoscale.pretrain.methods import Centres


class NonFinite(ValueError):
    """A loss or gradient was not finite; weights, moments, centres and teacher are those before that step."""


@dataclass(frozen=True)
class LossScaleConfig:
    """For precision=fp16 alone. first: what the loss is multiplied by at the start. growth_steps: after so many steps
    without an overflow it doubles; an overflow halves it and skips its step (arXiv 1710.03740)."""

    first: float
    growth_steps: int


class LossScale:
    """value: scalar float32 on the device, 1 unless the precision is fp16. calm: steps since it last moved."""

    def __init__(self, config: LossScaleConfig, precision: str, device: torch.device) -> None:
        if config.first < 1 or config.growth_steps < 1:
            raise ValueError(f"optim.loss_scale is {config}: expected at least 1 for first and growth_steps")
        self.config, self.used = config, precision == "fp16"
        self.value = torch.full((), config.first if self.used else 1.0, device=device)
        self.calm = torch.zeros((), device=device)

    def tensors(self) -> dict[str, Tensor]:
        """State for the checkpoint."""
        return {"loss_scale.value": self.value, "loss_scale.calm": self.calm} if self.used else {}

    def overflow(self, norms: Tensor) -> Tensor:
        """1.0 where a gradient norm is not finite and a lower scale may help, else 0.0."""
        if not self.used:
            return torch.zeros_like(self.value)
        return (~norms.isfinite().all() & (self.value > 1)).float()

    def move(self, overflow: Tensor, moves: Tensor) -> None:
        """Halve after an overflow, double after a calm stretch; `moves` is 0 once the run has tripped."""
        if not self.used:
            return
        calm = torch.where(overflow > 0, 0.0, self.calm + 1)
        grows = calm >= self.config.growth_steps
        value = torch.where(overflow > 0, self.value / 2, torch.where(grows, self.value * 2, self.value)).clamp(min=1.0)
        self.value.copy_(torch.where(moves > 0, value, self.value))
        self.calm.copy_(torch.where(moves > 0, torch.where(grows, 0.0, calm), self.calm))


class Guard:
    """Finds what is not finite on the device, and makes every update from then on do nothing until the host looks.

    AdamW's fused step leaves weights and moments alone while `held` is 1 (the flag that gradient scalers use): in the step of an
    overflow, and for good once tripped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scale: LossScale, ranks: Ranks) -> None:
        self.scale, self.ranks = scale, ranks
        self.tripped = torch.zeros((), device=ranks.device)
        self.held = torch.zeros((), device=ranks.device)
        self.skipped = torch.zeros((), device=ranks.device)
        self.step = torch.full((), -1.0, device=ranks.device)
        optimizer.grad_scale, optimizer.found_inf = None, self.held  # type: ignore[attr-defined]

    @property
    def healthy(self) -> Tensor:
        return 1 - self.held

    def check(self, loss: Tensor, norms: Mapping[str, Tensor], step: int) -> None:
        """loss: this rank's; norms: of the gradients, after the loss scale was taken out; all ranks trip together."""
        gradients = torch.stack(list(norms.values()))
        overflow = self.scale.overflow(gradients)  # the same on all ranks: they have met in the gradients
        bad = ~loss.isfinite() | (~gradients.isfinite().all() & (overflow == 0))
        bad = self.ranks.sum(bad.float()).clamp(max=1)
        self.step.copy_(torch.where((self.tripped == 0) & (bad > 0), step, self.step))
        self.tripped.copy_(torch.maximum(self.tripped, bad))
        self.held.copy_(torch.maximum(self.tripped, overflow))
        self.skipped.add_(overflow * (1 - self.tripped))
        self.scale.move(overflow, 1 - self.tripped)

    def choose(self, fresh: Centres, kept: Centres) -> Centres:
        """The fresh centres, or the kept ones once tripped; an overflow is one of gradients alone."""
        return Centres(*(torch.where(self.tripped > 0, old, new) for new, old in zip(fresh, kept, strict=True)))

    def read(self) -> dict[str, float]:
        """For a row of metrics, in fp16: the scale, and the steps that were skipped since this process began."""
        return {"loss_scale": float(self.scale.value), "skipped_steps": int(self.skipped)} if self.scale.used else {}

    def raise_if_tripped(self, recent: Sequence[Batch], save: Callable[[int], None], journal: Journal) -> None:
        """Waits for the device. Before raising NonFinite: a checkpoint of the state before that step, and its patches."""
        step = int(self.step)
        if step < 0:
            return
        batch = next(batch for batch in recent if batch.step == step)
        save(step)
        named = {name: getattr(batch, name).tolist() for name in ("slots", "slide", "mpp", "level", "x", "y")}
        parts = self.ranks.objects(named)
        path = journal.path(f"nonfinite-step-{step}.json")
        if self.ranks.main:
            whole = {name: [value for part in parts for value in part[name]] for name in named}
            write_json(path, {"step": step, **whole}, compact=True)
        raise NonFinite(
            f"step {step}: a loss or gradient is not finite; nothing was updated. {path} names the patches, and the checkpoint "
            f"step-{step} is the state before it: the same command replays the step"
        )
