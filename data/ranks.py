"""Rank, world and what ranks say to each other; one plain process needs no process group."""

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from histoscale.data.processes import RankLost, detached

T = TypeVar("T")

# What the transports of gloo and NCCL say when the process at the other end is gone, or does not answer any more.
_GONE = re.compile(r"(?i)(closed|reset) by (the )?(remote )?peer|connection (was )?(reset|closed|refused)|broken pipe|timed out")

_CONNECTS_S = 60.0  # torchrun's store is on this machine, and there before its ranks are
_LOOK_S = 0.5


@dataclass(frozen=True)
class Ranks:
    """One process among `world`. `group` is None in a plain process, and every method then needs no torch.distributed.

    `elastic`: started by torchrun, which restarts on any exit code but 0.
    """

    rank: int
    world: int
    local: int
    device: torch.device
    elastic: bool
    own: dist.ProcessGroup | None = None  # of `apart`

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self.own or (dist.group.WORLD if self.world > 1 else None)

    def apart(self) -> "Ranks":
        """The same ranks with a group of their own on the CPU, for collectives of a second thread; all ranks call it together."""
        if self.world == 1:
            return self
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        return replace(self, device=torch.device("cpu"), own=group)

    def barrier(self) -> None:
        """All ranks have arrived; on the CPU, so that no device waits."""
        if self.world > 1:
            self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; the answer is the same on all. On the CPU: the device's queue is not waited for."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return bool(value)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of a tensor of one shape; a new tensor, without gradient."""
        total = x.detach().clone()
        if self.world > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks of a float tensor of one shape; a new tensor, without gradient."""
        return self.sum(x) / self.world

    def concat(self, x: Tensor) -> Tensor:
        """All ranks' rows in rank order, without gradient: [n, ...] of equal n -> [world*n, ...]."""
        return gather(x.detach(), self.group)

    def objects(self, value: Any) -> list[Any]:
        """Every rank's small object, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank. An OSError or ValueError there is raised on all ranks."""
        if self.world == 1:
            return make()
        said: list[Any] = [None, None]
        if self.main:
            try:
                said = [make(), None]
            except (OSError, ValueError) as error:
                said = [None, error]
        dist.broadcast_object_list(said, src=0, group=self.group)
        if said[1] is not None:
            raise said[1]
        return said[0]


def open_ranks(device: str = "auto", timeout_s: float = 1800.0) -> Ranks:
    """The ranks of this process, by torchrun's environment; with more than one, opens the group `cpu:gloo,cuda:nccl`.

    device: auto (CUDA where there is one), cpu, cuda. Raises ValueError for another word, or for cuda where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"hardware.device is {device!r}: expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("hardware.device is cuda but torch sees no CUDA device: set hardware.device=cpu or auto")
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))  # fmt: skip
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local} has no CUDA device of its own ({torch.cuda.device_count()} here): start fewer processes a node"
        )
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    if world > 1 and not dist.is_initialized():
        backend, waits = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=timeout_s)

        def meet() -> None:
            store = _store_of_this_attempt(waits)
            if store is None:
                dist.init_process_group(backend, timeout=waits)
            else:
                dist.init_process_group(backend, timeout=waits, store=store, rank=rank, world_size=world)

        meeting, outcome = detached(meet)
        while meeting.is_alive():  # others may never come, and then this one must hear that it should stop
            meeting.join(_LOOK_S)
        outcome()
    return Ranks(rank, world, local, place, "TORCHELASTIC_RUN_ID" in os.environ)


def _store_of_this_attempt(timeout: timedelta) -> dist.Store | None:
    """torchrun's store, under names that no process before a restart used. None without torchrun, and with several nodes.

    torchrun shares one store between restarts, where a restarted process finds the addresses of the dead. Nodes count restarts
    each for itself: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, set for torchrun, gives every restart a store of its own.
    """
    said = {name: os.environ.get(name) for name in ("TORCHELASTIC_USE_AGENT_STORE", "GROUP_WORLD_SIZE")}
    if said != {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}:
        return None
    soon = timedelta(seconds=_CONNECTS_S)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=soon)
    store.set_timeout(timeout)
    return dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def close_ranks() -> None:
    """Leave the process group, if one was opened. Whoever still holds it, a graph or DDP, can abort the process at its end."""
    if dist.is_initialized():
        gc.collect()  # cycles that hold the group: its threads must end while the interpreter lives
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums the gradients that all ranks have for a rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return total[start : start + ctx.rows], None


def gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' rows in rank order, with gradient: [n, ...] of equal n -> [world*n, ...]; x itself without a group.

    Each rank's loss is over the joined rows; the gradients that reach a row from all ranks are summed.
    """
    return x if group is None else _Gather.apply(x, group)


def _lost(error: BaseException) -> bool:
    """Whether torch.distributed raised it, or something that repeats its words, because another process has gone."""
    return (isinstance(error, dist.DistError) or "gloo" in str(error)) and _GONE.search(str(error)) is not None


@contextmanager
def survivors(where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Inside, what a collective raises when another process has gone is RankLost, in one sentence. where: words for its place."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if isinstance(error, RankLost) or not _lost(error):
            raise
        rank, place = os.environ.get("RANK", "0"), where()
        raise RankLost(
            f"rank {rank} stops{f' {place}' if place else ''}: another rank has gone (killed, out of memory, its machine lost) "
            "or does not answer; the same command goes on"
        ) from error
