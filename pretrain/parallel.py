"""Everything about devices and ranks, applied to student and teacher from outside by `prepare`."""

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from histoscale.data.ranks import Ranks
from histoscale.pretrain.blocks import choose_attention, joint_blocks

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCOPES = ("none", "param", "module", "global")


@dataclass(frozen=True)
class HardwareConfig:
    """None of these changes a result beyond rounding.

    device: auto, cpu or cuda. threads: torch's CPU threads, 0 leaves torch's own number. deterministic: only kernels whose result
    does not vary between runs (slower on CUDA; on the CPU none varies). timeout_s: how long a rank waits for the others.

    attention: see pretrain/blocks.py; auto chooses. compile: each block by itself, for the shapes at hand.
    activation_checkpointing: the student's blocks keep their inputs only and compute the rest again in the backward.
    shard_over: how many ranks hold one copy of weights, gradients and moments between them (FSDP2): none (each has its own), a
    number that divides the ranks, node, or all; several copies are hybrid sharding. reshard_after_forward: give gathered weights
    back between forward and backward (less memory, more traffic).
    """

    device: str
    threads: int
    deterministic: bool
    timeout_s: float
    attention: str
    compile: bool
    activation_checkpointing: bool
    shard_over: str | int
    reshard_after_forward: bool


def set_threads(config: HardwareConfig) -> None:
    """Apply `threads` and `deterministic` to this process; before any tensor is made."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:  # torch refuses products on CUDA without it; read when the first one is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic


class Parallel:
    """Student and teacher on their devices. The trainer calls these and touches nothing else of torch.distributed.

    student(...), teacher(...): the modules' forward; the teacher's in eval mode and without gradient.
    mesh: over which both are sharded (its last dimension), None where every rank has the whole.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, ranks: Ranks, mesh: DeviceMesh | None, looked_at: nn.Module
    ) -> None:
        self.bare_student, self.bare_teacher, self.ranks, self.mesh = student, teacher, ranks, mesh
        self._looked_at = looked_at
        self._student: nn.Module = student
        if ranks.world > 1 and mesh is None:
            self._student = DistributedDataParallel(
                student,
                device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def student(self, *args: Any, **kwargs: Any) -> Any:
        return self._student(*args, **kwargs)

    @torch.no_grad()
    def teacher(self, *args: Any, **kwargs: Any) -> Any:
        return self.bare_teacher(*args, **kwargs)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward: gradients meet the other ranks' only in the last one."""
        if isinstance(self._student, FSDPModule):
            self._student.set_requires_gradient_sync(last)
        if last or not isinstance(self._student, DistributedDataParallel):
            return nullcontext()
        return self._student.no_sync()

    @torch.no_grad()
    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply every gradient by a scalar tensor; no host sync."""
        for grads in self._grads().values():
            torch._foreach_mul_(grads, factor)

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """The gradient norm of each sub-module of the student (backbone, heads), on the device; one value on all ranks."""
        return {name: norms.norm() for name, norms in self._tensor_norms().items()}

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
        single = self._tensor_norms() if scope == "param" else {}
        for name, grads in self._grads().items():
            if scope == "param":
                torch._foreach_mul_(grads, [_factor(norm, value) for norm in single[name]])
            else:
                torch._foreach_mul_(grads, _factor(norms[name] if scope == "module" else whole, value))

    @torch.no_grad()
    def update_teacher(self, towards: Tensor) -> None:
        """teacher <- teacher + towards * (student - teacher), in fp32 (arXiv 2104.14294, section 3.1); buffers are copied.

        towards: scalar tensor on the device, 1 - momentum; 0 leaves the teacher as it is. A rank moves the part that it holds.
        """
        self._reshard()
        teacher, student = ([_local(p.detach()) for p in m.parameters()] for m in (self.bare_teacher, self.bare_student))
        torch._foreach_lerp_(teacher, student, [towards] * len(teacher))
        for kept, fresh in zip(self.bare_teacher.buffers(), self.bare_student.buffers(), strict=True):
            kept.copy_(fresh)

    @torch.no_grad()
    def copy_teacher(self, into: nn.Module, share: Tensor) -> None:
        """Give a module that every rank holds whole the teacher's values under the same names; share: 1, or 0 for no change."""
        self._reshard()
        theirs = self.bare_teacher.state_dict()
        for name, x in into.state_dict().items():
            source = theirs[name]
            x.lerp_(source.full_tensor() if isinstance(source, DTensor) else source, share)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of both modules, sharded as it is, under `student.` and `teacher.`; below `backbone.` timm's names."""
        self._reshard()
        return {
            **{f"student.{name}": x for name, x in self.bare_student.state_dict().items()},
            **{f"teacher.{name}": x for name, x in self.bare_teacher.state_dict().items()},
        }

    @contextmanager
    def watched(self) -> Iterator[nn.Module]:
        """The teacher's backbone as one plain module that each rank may call as often as it likes; not compiled, for any shape.

        All ranks enter together. Sharded weights are gathered for as long as the block lasts.
        """
        backbone = self.bare_teacher.get_submodule("backbone")
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            if self.mesh is None:
                yield backbone
                return
            self._reshard()
            whole = copy.deepcopy(self._looked_at).to_empty(device=self.ranks.device)
            for x, sharded in zip(_tensors(whole), _tensors(backbone), strict=True):
                x.copy_(sharded.full_tensor() if isinstance(sharded, DTensor) else sharded)
            yield whole

    def _grads(self) -> dict[str, list[Tensor]]:
        """This rank's part of the student's gradients, by the first part of their parameters' names."""
        grads: dict[str, list[Tensor]] = {}
        for name, parameter in self.bare_student.named_parameters():
            if parameter.grad is not None:
                grads.setdefault(name.split(".")[0], []).append(_local(parameter.grad))
        return grads

    def _tensor_norms(self) -> dict[str, Tensor]:
        """The norm of each gradient tensor, [tensors] a sub-module."""
        norms = {name: torch.stack(torch._foreach_norm(grads)) for name, grads in self._grads().items()}
        if self.mesh is None:
            return norms
        sizes = [len(x) for x in norms.values()]
        squares = torch.cat(list(norms.values())).square()
        dist.all_reduce(squares, group=self.mesh.get_group(self.mesh.ndim - 1))
        return dict(zip(norms, squares.sqrt().split(sizes), strict=True))

    def _reshard(self) -> None:
        for module in chain(self.bare_student.modules(), self.bare_teacher.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()


def prepare(student: nn.Module, teacher: nn.Module, hardware: HardwareConfig, precision: str, ranks: Ranks) -> Parallel:
    """Move both to this rank's device, freeze the teacher, and apply what `hardware` says: attention, activation checkpointing,
    compilation, then sharding of both or DDP of the student. Nothing of it renames a parameter.

    The teacher must already be a copy of the student; the optimiser is built after this. Raises ValueError when it is no copy,
    and for an attention, a precision or a number of ranks that cannot be.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise ValueError("prepare: the teacher is not a copy of the student; copy it before (a random teacher teaches nothing)")
    student.to(ranks.device).train()
    teacher.to(ranks.device).eval().requires_grad_(False)
    attention = choose_attention(hardware.attention, ranks.device, precision)
    if hardware.compile and attention == "xformers":
        raise ValueError("hardware.compile=true cannot trace hardware.attention=xformers: take varlen or packed")
    blocks = joint_blocks(student), joint_blocks(teacher)
    for block in chain(*blocks):
        block.attention = attention
    mesh = _mesh(hardware.shard_over, precision, ranks)
    looked_at = nn.Module() if mesh is None else copy.deepcopy(teacher.get_submodule("backbone")).to("meta")
    if hardware.activation_checkpointing:
        for block in blocks[0]:
            block.recompute = True
    if hardware.compile:
        torch.compiler.reset()  # an earlier phase's shapes count towards the limit of recompilations
        for block in chain(*blocks):
            block.compile(fullgraph=True, dynamic=False)
    if mesh is not None:
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # outputs are never changed in place
        for block in chain(*blocks):
            fully_shard(block, mesh=mesh, reshard_after_forward=hardware.reshard_after_forward)
        for module in (student, teacher):
            fully_shard(module, mesh=mesh)
    return Parallel(student, teacher, ranks, mesh, looked_at)


def check_precision(precision: str) -> None:
    """Raises ValueError for a word that names none."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: expected {', '.join(PRECISIONS)} or auto")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The forward's precision: fp32, or bf16 or fp16 autocast (weights, moments and what the losses compute stay fp32).

    Raises ValueError for another word.
    """
    check_precision(precision)
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _mesh(shard_over: str | int, precision: str, ranks: Ranks) -> DeviceMesh | None:
    """The ranks as [copies, parts of a copy], or [parts] for one copy; None where every rank holds the whole."""
    words = {"none": 1, "all": ranks.world, "node": int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))}
    if isinstance(shard_over, str) and shard_over not in words:
        raise ValueError(f"hardware.shard_over is {shard_over!r}: expected none, node, all or a number of ranks")
    parts = words[shard_over] if isinstance(shard_over, str) else shard_over
    if parts < 1 or ranks.world % parts:
        raise ValueError(f"hardware.shard_over={shard_over} is {parts} ranks a copy, which does not divide {ranks.world} ranks")
    if parts == 1:
        return None
    if precision == "fp16":
        raise ValueError(f"precision=fp16 takes whole copies: set it to bf16, or hardware.shard_over={shard_over} to none")
    if parts == ranks.world:
        return init_device_mesh(ranks.device.type, (parts,), mesh_dim_names=("part",))
    return init_device_mesh(ranks.device.type, (ranks.world // parts, parts), mesh_dim_names=("copy", "part"))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _factor(norm: Tensor, value: float) -> Tensor:
    return (value / (norm + 1e-6)).clamp(max=1.0)
