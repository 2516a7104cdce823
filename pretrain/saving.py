"""Checkpoints while training goes on: a thread writes a copy of the state, and the loop waits for the copying only."""

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from histoscale.data.ranks import Ranks
from histoscale.pretrain.checkpoint import CheckpointConfig, prune_checkpoints, write_checkpoint


class Saver:
    """Writes checkpoints of one run into `folder`, one at a time; all ranks make it, and call its methods at the same steps.

    As a context it ends with the last write done. An error of a write is raised by the next call, on all ranks.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, ranks: Ranks) -> None:
        self.folder, self.config = folder, config
        # The thread's collectives run beside those of the loop: they need a group of their own.
        self.ranks = ranks.apart() if config.asynchronous else ranks
        self._buffers: dict[str, Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._thread: threading.Thread | None = None
        self._errors: list[BaseException] = []
        ranks.first(lambda: _clear(folder))

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write `step-N`, then remove what checkpoint.keep_last and keep_every do not keep.

        Returns when the tensors may change again: asynchronously after they were copied, after waiting for the write before it.
        Raises CheckpointError when this write, or asynchronously an earlier one, failed.
        """
        self.wait()
        if not self.config.asynchronous:
            return self._write(step, tensors, facts)
        staged = {name: self._stage(name, x) for name, x in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the copies have arrived before the next optimiser step
        self._thread = threading.Thread(target=self._run, args=(step, staged, dict(facts)), name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written any more. Raises the CheckpointError of a write that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._errors:
            raise self._errors.pop()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.wait()

    def _run(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        try:
            self._write(step, tensors, facts)
        except BaseException as error:  # for whoever waits
            self._errors.append(error)

    def _write(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        write_checkpoint(self.folder, step, tensors, facts, self.ranks)
        self.ranks.first(lambda: prune_checkpoints(self.folder, step, self.config))

    def _stage(self, name: str, x: Tensor) -> Tensor:
        """This rank's part of x in host memory, in a buffer (page-locked for CUDA) that every save uses again."""
        local = (x.to_local() if isinstance(x, DTensor) else x).detach()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape:
            buffer = self._buffers[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
        buffer.copy_(local, non_blocking=True)
        if not isinstance(x, DTensor):
            return buffer
        mesh = self._on_host(x.device_mesh)
        return DTensor.from_local(buffer, mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())

    def _on_host(self, mesh: DeviceMesh) -> DeviceMesh:
        if mesh not in self._meshes:
            names = mesh.mesh_dim_names
            self._meshes[mesh] = mesh if mesh.device_type == "cpu" else init_device_mesh("cpu", mesh.shape, mesh_dim_names=names)
        return self._meshes[mesh]


def _clear(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for partial in folder.glob("step-*.partial"):
        shutil.rmtree(partial)
