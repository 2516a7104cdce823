"""Everything about devices and ranks, applied to student and teacher from outside by `prepare`."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from histoscale.data.ranks import Ranks

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
SCOPES = ("none", "param", "module", "global")


@dataclass(frozen=True)
class HardwareConfig:
    """None of these changes a result beyond rounding.

    device: auto, cpu or cuda. threads: torch's CPU threads, 0 leaves torch's own number. deterministic: only kernels whose result
    does not vary between runs (slower on CUDA; on the CPU none varies). timeout_s: how long a rank waits for the others.
    """

    device: str
    threads: int
    deterministic: bool
    timeout_s: float


def set_threads(config: HardwareConfig) -> None:
    """Apply `threads` and `deterministic` to this process; before any tensor is made."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic


class Parallel:
    """Student and teacher on their devices. The trainer calls these and touches nothing else of torch.distributed.

    student(...), teacher(...): the modules' forward; the teacher's in eval mode and without gradient.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, ranks: Ranks) -> None:
        self.bare_student, self.bare_teacher, self.ranks = student, teacher, ranks
        self._student: nn.Module = student
        if ranks.world > 1:
            self._student = DistributedDataParallel(
                student,
                device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def student(self, *args: Any, **kwargs: Any) -> Any:
        return self._student(*args, **kwargs)

    @torch.no_grad()
    def teacher(self, *args: Any, **kwargs: Any) -> Any:
        return self.bare_teacher(*args, **kwargs)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward: gradients meet the other ranks' only in the last one."""
        if last or not isinstance(self._student, DistributedDataParallel):
            return nullcontext()
        return self._student.no_sync()

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """The gradient norm of each sub-module of the student (backbone, heads), on the device; one value on all ranks."""
        return {name: torch.stack(torch._foreach_norm(grads)).norm() for name, grads in self._grads().items()}

    @torch.no_grad()
    def clip(self, scope: str, value: float, norms: dict[str, Tensor]) -> None:
        """Scale gradients to a norm of at most `value`: each parameter tensor (as DINO does, arXiv 2104.14294), each sub-module
        (as DINOv2 does, arXiv 2304.07193) or all together; no host sync. Raises ValueError for another scope.
        """
        if scope not in SCOPES:
            raise ValueError(f"optim.clip scope is {scope!r}: expected one of {', '.join(SCOPES)}")
        if scope == "none":
            return
        whole = torch.stack(list(norms.values())).norm()
        for name, grads in self._grads().items():
            if scope == "param":
                torch._foreach_mul_(grads, [_factor(norm, value) for norm in torch._foreach_norm(grads)])
            else:
                torch._foreach_mul_(grads, _factor(norms[name] if scope == "module" else whole, value))

    @torch.no_grad()
    def update_teacher(self, towards: Tensor) -> None:
        """teacher <- teacher + towards * (student - teacher), in fp32 (arXiv 2104.14294, section 3.1); buffers are copied.

        towards: scalar tensor on the device, 1 - momentum; 0 leaves the teacher as it is.
        """
        teacher, student = ([p.detach() for p in module.parameters()] for module in (self.bare_teacher, self.bare_student))
        torch._foreach_lerp_(teacher, student, [towards] * len(teacher))
        for kept, fresh in zip(self.bare_teacher.buffers(), self.bare_student.buffers(), strict=True):
            kept.copy_(fresh)

    @torch.no_grad()
    def copy_teacher(self, into: nn.Module, share: Tensor) -> None:
        """Give a module that every rank holds whole the teacher's values under the same names; share: 1, or 0 for no change."""
        theirs = self.bare_teacher.state_dict()
        for name, x in into.state_dict().items():
            source = theirs[name]
            x.lerp_(source.full_tensor() if isinstance(source, DTensor) else source, share)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of both modules under `student.` and `teacher.`; timm's names below `backbone.`."""
        return {
            **{f"student.{name}": x for name, x in self.bare_student.state_dict().items()},
            **{f"teacher.{name}": x for name, x in self.bare_teacher.state_dict().items()},
        }

    def _grads(self) -> dict[str, list[Tensor]]:
        """The student's gradients by the first part of their parameters' names."""
        grads: dict[str, list[Tensor]] = {}
        for name, parameter in self.bare_student.named_parameters():
            if parameter.grad is not None:
                grads.setdefault(name.split(".")[0], []).append(parameter.grad)
        return grads


def prepare(student: nn.Module, teacher: nn.Module, ranks: Ranks) -> Parallel:
    """Move both to this rank's device, freeze the teacher, and wrap the student in DDP when there is more than one rank.

    The teacher must already be a copy of the student; the optimiser is built after this. Raises ValueError when it is no copy.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise ValueError("prepare: the teacher is not a copy of the student; copy it before (a random teacher teaches nothing)")
    student.to(ranks.device).train()
    teacher.to(ranks.device).eval().requires_grad_(False)
    return Parallel(student, teacher, ranks)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The forward's precision: fp32, or bf16 autocast (weights, moments and what the losses compute stay fp32).

    Raises ValueError for another word; fp16 would need loss scaling, which is not built.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"optim.precision is {precision!r}: expected {' or '.join(PRECISIONS)} (instead of fp16 use bf16)")
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _factor(norm: Tensor, value: float) -> Tensor:
    return (value / (norm + 1e-6)).clamp(max=1.0)
