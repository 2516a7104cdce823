"""No step of a method waits for the device: forward, losses and backward hold no operation whose result's size or value the host
needs. Read off the operations themselves, so that it is known without an accelerator.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import train_tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from histoscale.data.keys import keys
from histoscale.pretrain.backbone import kept_rows
from histoscale.pretrain.methods import (
    DinoConfig,
    Dinov2Config,
    GramConfig,
    MethodConfig,
    Scheduled,
    build,
    build_gram_teacher,
    first_centres,
    losses,
    masks_at,
)

WAITING = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal"}
assert isinstance(train_tiny.CONFIG.method, Dinov2Config)
DINOV2: Dinov2Config = replace(train_tiny.CONFIG.method, kde_weight=0.05)
GRAM = GramConfig(
    weight=1.0, warmup_steps=0, first_step=0, source="teacher", refresh_every=None, refreshes=0, px=None, tokens="unmasked",
    scope="batch", negatives="both",
)  # fmt: skip
DINO = DinoConfig(
    kind="dino", group=4, head=train_tiny.HEAD, targets="centering", sinkhorn_iterations=3, centre_momentum=0.9, student_temp=0.1,
    teacher_temp=[0.04, 0.07], teacher_temp_warmup_steps=5, momentum=[0.9, 1.0], freeze_last_layer_steps=0,
)  # fmt: skip


class Waits(TorchDispatchMode):
    """Names of the operations that make the host wait for an accelerator, as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += 1
        if name in WAITING or masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", [DINO, DINOV2, replace(DINOV2, gram=GRAM), replace(DINOV2, targets="centering")])
def test_nothing_waits(method: MethodConfig) -> None:
    model = train_tiny.CONFIG.model
    student, teacher = build(model, method, 0)
    frozen = build_gram_teacher(model, method)
    slots = torch.arange(8)
    masks = masks_at(model, method, 0, 0, slots, 32, 2)  # on the CPU, before anything is put on the device
    crops, indices = (None, None) if masks is None else (masks.crops, masks.indices)
    globals_, locals_, drawn = noise(16, 3, 32, 32), noise(16, 3, 16, 16), keys(0, "drop", 0, slots)
    now = Scheduled(teacher_temp=0.05, momentum=0.9, last_layer=True, gram_weight=1.0 if frozen else 0.0)
    student(globals_, locals_, crops, indices, drawn)  # fills the cache of position matrices
    with Waits() as waits:
        with torch.no_grad():
            taught = teacher(globals_, None, None, indices)
        learned = student(globals_, locals_, crops, indices, drawn)
        target = frozen(globals_, (4, 4)) if frozen else None
        found = losses(learned, taught, masks, first_centres(method, "cpu"), method, now, 2, gram=target)
        found.total.backward()
    assert waits.count > 200 and waits.found == []


def test_the_eye_sees_what_waits() -> None:
    x = noise(4)
    for wait in (lambda: x[0].item(), lambda: x.nonzero(), lambda: x[x > 0], lambda: bool(x.sum() > 0), lambda: float(x[1])):
        with Waits() as waits:
            wait()
        assert len(waits.found) == 1
    with Waits() as waits:
        kept_rows(keys(0, "drop", 0, torch.arange(8)), 1, 4, 0.5, 2), x.argsort()
    assert waits.found == []
