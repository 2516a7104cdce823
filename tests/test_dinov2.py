"""The method: branches, one step's terms and gradients, groups, state, and a loss that really falls."""

import math
from dataclasses import replace
from importlib import resources

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import Tensor

from histoscale.data.keys import keys
from histoscale.pretrain.backbone import ModelConfig
from histoscale.pretrain.heads import HeadConfig
from histoscale.pretrain.losses import center_targets, dino_ce, ibot_ce, koleo, sinkhorn_targets
from histoscale.pretrain.methods import (
    Dinov2Config,
    Losses,
    Scheduled,
    build,
    check_pools,
    first_centres,
    losses,
    masks_at,
    scheduled,
)
from histoscale.pretrain.optim import OptimConfig, build_optimizer, set_scheduled
from histoscale.pretrain.schedule import ScheduleConfig


def shipped(kind: type, group: str, name: str):  # type: ignore[no-untyped-def]
    return TypeAdapter(kind).validate_python(yaml.safe_load((resources.files("histoscale.configs") / group / name).read_text()))


HEAD = HeadConfig(prototypes=16, hidden=24, bottleneck=8, scale="trainable", batch_norm=False)
MODEL: ModelConfig = replace(shipped(ModelConfig, "model", "demo.yaml"), img_size=32, width=24, depth=2, heads=2)
METHOD: Dinov2Config = replace(shipped(Dinov2Config, "method", "demo.yaml"), head=HEAD, group=4, koleo_pool=4)
SEPARATE = replace(METHOD, patch_head=replace(HEAD, prototypes=20))
SLOTS, VIEWS, LOCALS = torch.arange(8), 2, 3
NOW = Scheduled(teacher_temp=0.05, momentum=0.99, last_layer=True, gram_weight=0.0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_step(
    model: ModelConfig, method: Dinov2Config, slots: Tensor = SLOTS, rows: slice = slice(0, 8), bf16: bool = False
) -> tuple[Losses, torch.nn.Module]:
    """Forward of both branches on fixed noise for the slots, and the losses."""
    student, teacher = build(model, method, 0)
    globals_ = noise(VIEWS, 8, 3, 32, 32)[:, rows].flatten(0, 1)
    locals_ = noise(LOCALS, 8, 3, 16, 16, seed=1)[:, rows].flatten(0, 1)
    masks = masks_at(model, method, 0, 0, slots, 32, VIEWS)
    crops, indices = (masks.crops, masks.indices) if masks else (None, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            taught = teacher(globals_, indices=indices)
        learned = student(globals_, locals_, crops, indices, keys(0, "drop", 0, slots))
    return losses(learned, taught, masks, first_centres(method, "cpu"), method, NOW, VIEWS), student


@pytest.mark.parametrize("method", [METHOD, SEPARATE, replace(METHOD, targets="centering"), replace(METHOD, ibot_weight=0.0)])
def test_every_parameter_learns_and_terms_add_up(method: Dinov2Config) -> None:
    found, student = one_step(MODEL, method)
    weights = {"dino": method.dino_weight, "ibot": method.ibot_weight, "koleo": method.koleo_weight, "kde": method.kde_weight}
    assert math.isclose(sum(weights[n] * t.item() for n, t in found.terms.items()), found.total.item(), rel_tol=1e-6)
    assert found.terms.keys() == {name for name, weight in weights.items() if weight > 0}
    found.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in student.parameters())


def test_terms_are_the_pure_functions_of_the_outputs() -> None:
    student, teacher = build(MODEL, SEPARATE, 0)
    globals_, locals_ = noise(16, 3, 32, 32), noise(24, 3, 16, 16, seed=1)
    masks = masks_at(MODEL, SEPARATE, 0, 0, SLOTS, 32, VIEWS)
    assert masks is not None
    taught, learned = teacher(globals_, indices=masks.indices), student(globals_, locals_, masks.crops, masks.indices)
    found = losses(learned, taught, masks, first_centres(SEPARATE, "cpu"), SEPARATE, NOW, VIEWS)
    targets = sinkhorn_targets(taught["cls"], 0.05, 3).view(2, 8, 16)
    patch_targets = sinkhorn_targets(taught["patch"], 0.05, 3)
    assert torch.equal(found.terms["dino"], dino_ce(learned["cls"].view(5, 8, 16), targets, 0.1))
    assert torch.equal(found.terms["ibot"], ibot_ce(learned["patch"], patch_targets, masks.weights, 16, 0.1))
    assert torch.allclose(found.terms["koleo"], koleo(learned["features"][:8], 4) + koleo(learned["features"][8:], 4))
    assert learned["patch"].shape == (len(masks.indices), 20) and learned["cls"].shape == (40, 16)
    assert found.read["dino/prototypes"].sum() == 16 and found.read["ibot/prototypes"].sum() == len(masks.indices)
    masked_mean = ibot_ce(learned["patch"], patch_targets, masks.weights, 1, 0.1) / masks.weights.sum()
    assert torch.allclose(found.read["ibot/ce"], masked_mean / math.log(20))


def test_the_student_sees_masks_and_the_teacher_does_not() -> None:
    student, teacher = build(MODEL, METHOD, 0)
    globals_ = noise(16, 3, 32, 32)
    masks = masks_at(MODEL, METHOD, 0, 0, SLOTS, 32, VIEWS)
    assert masks is not None
    taught, learned = teacher(globals_, indices=masks.indices), student(globals_, None, masks.crops, masks.indices)
    hidden = masks.crops.any(1)
    assert torch.allclose(taught["cls"][~hidden], learned["cls"][~hidden], atol=1e-5)
    assert (taught["cls"][hidden] - learned["cls"][hidden]).abs().amax(1).min() > 1e-4


def test_the_teacher_is_a_copy_without_gradient() -> None:
    student, teacher = build(MODEL, METHOD, 0)
    theirs = teacher.state_dict()
    assert theirs.keys() == student.state_dict().keys()
    assert all(torch.equal(theirs[name], x) for name, x in student.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert {name.split(".")[0] for name in theirs} == {"mask_token", "backbone", "head"}


def test_modules_that_are_not_used_are_not_built() -> None:
    student, _ = build(MODEL, replace(SEPARATE, ibot_weight=0.0), 0)
    assert {name.split(".")[0] for name in student.state_dict()} == {"backbone", "head"}


def test_centring_updates_its_state_after_use() -> None:
    method = replace(METHOD, targets="centering")
    student, teacher = build(MODEL, method, 0)
    masks = masks_at(MODEL, method, 0, 0, SLOTS, 32, VIEWS)
    assert masks is not None
    taught = teacher(noise(16, 3, 32, 32), indices=masks.indices)
    learned = student(noise(16, 3, 32, 32), None, masks.crops, masks.indices)
    first = first_centres(method, "cpu")
    found = losses(learned, taught, masks, first, method, NOW, VIEWS)
    assert torch.equal(found.terms["dino"], dino_ce(learned["cls"].view(2, 8, 16),
                       center_targets(taught["cls"], first.cls, 0.05).view(2, 8, 16), 0.1))  # fmt: skip
    assert torch.allclose(found.centres.cls, 0.1 * taught["cls"].mean(0)) and not first.cls.any()
    assert torch.allclose(found.centres.patch, 0.1 * taught["patch"].mean(0))


def test_whole_groups_can_be_computed_anywhere() -> None:
    """Halves of the slots, as of two processes, have the whole's gradients on average (with centring: Sinkhorn is joint)."""
    model, method = replace(MODEL, drop_path=0.3), replace(METHOD, targets="centering")
    whole, student = one_step(model, method)
    whole.total.backward()
    halves = []
    for rows in (slice(0, 4), slice(4, 8)):
        part, module = one_step(model, method, SLOTS[rows], rows)
        part.total.backward()
        halves.append((part.total, dict(module.named_parameters())))
    assert torch.allclose(whole.total, (halves[0][0] + halves[1][0]) / 2, rtol=1e-5)
    for name, parameter in student.named_parameters():
        ours, first, second = (p.grad for p in (parameter, halves[0][1][name], halves[1][1][name]))
        assert ours is not None and first is not None and second is not None
        assert torch.allclose(ours, (first + second) / 2, rtol=1e-3, atol=1e-5 * float(ours.abs().max())), name


def test_bf16_is_close_and_its_losses_are_float32() -> None:
    exact, _ = one_step(MODEL, METHOD)
    rounded, student = one_step(MODEL, METHOD, bf16=True)
    for name, term in rounded.terms.items():
        assert term.dtype == torch.float32 and math.isclose(term.item(), exact.terms[name].item(), rel_tol=2e-2), name
    rounded.total.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in student.parameters())


def test_scheduled() -> None:
    warming = replace(METHOD, teacher_temp=[0.04, 0.07], teacher_temp_warmup_steps=80)
    method = replace(warming, momentum=[0.9, 1.0], freeze_last_layer_steps=3)
    schedule = ScheduleConfig("d2_v1", 100, 10, None, True)
    assert scheduled(0, method, schedule) == (0.04, 0.9, False, 0.0)
    assert scheduled(3, method, schedule).last_layer
    end = scheduled(100, method, schedule)
    assert end.teacher_temp == 0.07 and end.momentum == 1.0


def test_the_loss_falls_on_two_kinds_of_image() -> None:
    """CE ends well under ln K: a student that ignores its input cannot do that against balanced targets."""
    method = replace(METHOD, head=replace(HEAD, prototypes=8), momentum=[0.9, 1.0])
    student, teacher = build(MODEL, method, 0)
    optim = replace(shipped(OptimConfig, "optim", "demo.yaml"), lr=2e-3)
    optimizer = build_optimizer(student.named_parameters(), 2, optim)
    pattern = noise(1, 8, 3, 1, 1, seed=9)  # each slot has its colour, in every view
    found = None
    for step in range(60):
        globals_ = (pattern + 0.1 * noise(VIEWS, 8, 3, 32, 32, seed=2 * step)).flatten(0, 1)
        locals_ = (pattern + 0.1 * noise(LOCALS, 8, 3, 16, 16, seed=2 * step + 1)).flatten(0, 1)
        masks = masks_at(MODEL, method, 0, step, SLOTS, 32, VIEWS)
        assert masks is not None
        taught, learned = teacher(globals_, indices=masks.indices), student(globals_, locals_, masks.crops, masks.indices)
        found = losses(learned, taught, masks, first_centres(method, "cpu"), method, NOW, VIEWS)
        optimizer.zero_grad()
        found.total.backward()
        set_scheduled(optimizer, 2e-3, 0.04, last_layer=True, backbone=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.1)
    assert found is not None and found.read["dino/ce"] < 0.85 and found.read["dino/prototypes"].count_nonzero() >= 4


def test_batch_norm_is_refused_over_ranks() -> None:
    method = replace(METHOD, head=replace(HEAD, batch_norm=True))
    with pytest.raises(ValueError, match="one process only"):
        losses({}, {}, None, first_centres(method, "cpu"), method, NOW, VIEWS, torch.distributed.ProcessGroup(0, 2))


def test_unknown_targets() -> None:
    with pytest.raises(ValueError, match="targets='softmax'"):
        build(MODEL, replace(METHOD, targets="softmax"), 0)


@pytest.mark.parametrize(
    ("changes", "slots", "message"),
    [
        ({"koleo_pool": 64}, 96, "koleo_pool=64 does not divide the 96 slots .*: 48 and 96"),
        ({"kde_pool": 5, "kde_weight": 0.1}, 16, "kde_pool=5 does not divide the 16 slots .*: 4 and 8"),
        ({"koleo_pool": 4, "koleo_neighbours": 4}, 16, "koleo_pool=4 leaves each row fewer than 4 others"),
        ({"kde_pool": 1, "kde_weight": 0.1}, 16, "kde_pool=1 leaves each row fewer than 1 other"),
    ],
)
def test_pools_that_do_not_fit_are_named_before_the_first_step(changes: dict[str, object], slots: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pools(replace(METHOD, **changes), slots)  # type: ignore[arg-type]


def test_pools_that_fit() -> None:
    for changes, slots in (({"koleo_pool": 64}, 32), ({"koleo_pool": None}, 96), ({"koleo_pool": 64, "koleo_weight": 0.0}, 96)):
        check_pools(replace(METHOD, **changes), slots)  # type: ignore[arg-type]
