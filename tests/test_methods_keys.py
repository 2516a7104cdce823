"""Every key of a method does something: the shapes, the masks, the schedule or the losses of a step change with it."""

from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
import train_tiny
from torch import Tensor

from histoscale.data.keys import keys
from histoscale.launch.config import load
from histoscale.pretrain.methods import (
    DinoConfig,
    Dinov2Config,
    GramConfig,
    MethodConfig,
    build,
    build_gram_teacher,
    first_centres,
    gram_takes_teacher,
    losses,
    masks_at,
    scheduled,
)

GRAM = GramConfig(
    weight=1.0, warmup_steps=4, first_step=2, source="teacher", refresh_every=3, refreshes=2, px=None, tokens="all",
    scope="batch", negatives="keep",
)  # fmt: skip
assert isinstance(train_tiny.CONFIG.method, Dinov2Config)
DINOV2: Dinov2Config = replace(
    train_tiny.CONFIG.method, patch_head=replace(train_tiny.HEAD, prototypes=24), kde_weight=0.05, gram=GRAM
)
CENTRED = replace(DINOV2, targets="centering")
DINO = DinoConfig(
    kind="dino", group=4, head=train_tiny.HEAD, targets="sinkhorn", sinkhorn_iterations=3, centre_momentum=0.9, student_temp=0.1,
    teacher_temp=[0.04, 0.07], teacher_temp_warmup_steps=5, momentum=[0.9, 1.0], freeze_last_layer_steps=0,
)  # fmt: skip
MODEL = replace(train_tiny.CONFIG.model, width=24, heads=2, depth=1)
SLOTS, VIEWS, STEP = torch.arange(8), 2, 4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@lru_cache
def frozen_features() -> Tensor:
    frozen = build_gram_teacher(MODEL, DINOV2)
    assert frozen is not None
    features: Tensor = frozen(noise(16, 3, 32, 32), (4, 4))
    return features


def observed(method: MethodConfig) -> list[Any]:
    """What the trainer sees of a method: parameters, masks, schedule, and a step's losses and centres, as plain values."""
    torch.manual_seed(0)
    student, teacher = build(MODEL, method, 0)
    masks = masks_at(MODEL, method, 0, STEP, SLOTS, 32, VIEWS)
    crops, indices = (masks.crops, masks.indices) if masks else (None, None)
    globals_, locals_ = noise(16, 3, 32, 32), noise(8, 3, 16, 16, seed=1)
    with torch.no_grad():
        for parameter, other in zip(teacher.parameters(), student.parameters(), strict=True):
            parameter.copy_(other + 0.1 * noise(*other.shape, seed=2))
        taught = teacher(globals_, indices=indices)
        learned = student(globals_, locals_, crops, indices, keys(0, "drop", 0, SLOTS))
        now = scheduled(STEP, method, train_tiny.CONFIG.schedule)
        found = losses(learned, taught, masks, first_centres(method, "cpu"), method, now, VIEWS, gram=frozen_features())
    return [
        [(name, tuple(p.shape)) for name, p in student.named_parameters()],
        None if masks is None else masks.crops.tolist(),
        [(scheduled(step, method, train_tiny.CONFIG.schedule), gram_takes_teacher(step, method)) for step in range(20)],
        {name: value.item() for name, value in found.terms.items()},
        found.total.item(),
        [centre.tolist() for centre in found.centres],
    ]


OTHER: dict[str, Any] = {
    "group": 8, "head": None, "targets": "centering", "sinkhorn_iterations": 1, "centre_momentum": 0.5, "student_temp": 0.2,
    "teacher_temp": [0.03, 0.03], "teacher_temp_warmup_steps": 9, "momentum": [0.5, 1.0], "freeze_last_layer_steps": 3,
    "patch_head": None, "dino_weight": 0.5, "local_weight": 0.5, "ibot_weight": 0.5, "koleo_weight": 0.2, "koleo_pool": 8,
    "koleo_neighbours": 2, "kde_weight": 0.1, "kde_kappa": 10.0, "kde_pool": None, "kde_reversed": True, "gram": None,
    "gram.weight": 2.0, "gram.warmup_steps": 8, "gram.first_step": 3, "gram.source": "checkpoint", "gram.refresh_every": None,
    "gram.refreshes": 1, "gram.tokens": "masked", "gram.scope": "image", "gram.negatives": "both",
    "mask.probability": 0.25, "mask.ratio": [0.2, 0.3], "mask.shift": True,
    "head.prototypes": 48, "head.hidden": 32, "head.bottleneck": 16, "head.scale": "trainable", "head.batch_norm": True,
    "patch_head.prototypes": 48, "patch_head.hidden": 32, "patch_head.bottleneck": 16, "patch_head.scale": "none",
    "patch_head.batch_norm": True,
}  # fmt: skip
ELSEWHERE = {"kind", "gram.px"}  # chooses the method; what the Gram teacher's views are made with


def every_key(config: Any, prefix: str = "") -> list[str]:
    found = []
    for field in fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found += [name] if not is_dataclass(value) else [name, *every_key(value, name + ".")]
    return found


def changed(config: Any, name: str, value: Any) -> Any:
    first, _, rest = name.partition(".")
    return replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


def test_the_list_names_every_key() -> None:
    parts = {"head", "mask"}  # their own keys are listed
    assert set(every_key(DINOV2)) - ELSEWHERE - parts == OTHER.keys() - parts
    assert set(every_key(DINO)) < set(every_key(DINOV2))


@lru_cache
def base(method: str) -> list[Any]:
    methods: dict[str, MethodConfig] = {"dinov2": DINOV2, "centred": CENTRED, "dino": DINO}
    return observed(methods[method])


@pytest.mark.parametrize("name", [name for name in OTHER if name != "head"])
def test_every_key_of_dinov2_changes_something(name: str) -> None:
    method, start = (CENTRED, "centred") if name == "centre_momentum" else (DINOV2, "dinov2")
    assert observed(changed(method, name, OTHER[name])) != base(start)


@pytest.mark.parametrize("name", [name for name in every_key(DINO) if name not in ("kind", "head", "centre_momentum")])
def test_every_key_of_dino_changes_something(name: str) -> None:
    assert observed(changed(DINO, name, OTHER[name])) != base("dino")


def test_the_same_method_observed_twice_is_the_same() -> None:
    assert observed(DINOV2) == base("dinov2") and observed(DINO) == base("dino")


@pytest.mark.parametrize("method", ["dino", "dinov2", "demo", "demo_dino"])
def test_it_is_chosen_on_the_command_line(method: str) -> None:
    composed = load("pretrain", ["catalog=there", "recipe=demo", "out=here", f"method={method}"])
    assert composed.config.method.kind == ("dino" if method.endswith("dino") else "dinov2")
