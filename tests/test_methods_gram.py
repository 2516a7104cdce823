"""The Gram term in DINOv2: when it weighs, when its teacher is taken anew, which tokens it compares, what the teacher sees."""

from dataclasses import replace

import pytest
import restated
import torch
import torch.nn.functional as F
import train_tiny
from torch import Tensor

from histoscale.data.views import make_undistorted, make_views
from histoscale.pretrain.backbone import ModelConfig, forward_tokens
from histoscale.pretrain.losses import regrid
from histoscale.pretrain.masking import Masks
from histoscale.pretrain.methods import (
    Dinov2Config,
    GramConfig,
    Scheduled,
    build,
    build_gram_teacher,
    first_centres,
    gram_takes_teacher,
    losses,
    masks_at,
    scheduled,
)
from histoscale.pretrain.methods.gram import gram_term

GRAM = GramConfig(
    weight=2.0, warmup_steps=10, first_step=100, source="teacher", refresh_every=20, refreshes=3, px=None, tokens="all",
    scope="image", negatives="keep",
)  # fmt: skip
MODEL: ModelConfig = replace(train_tiny.CONFIG.model, width=24, heads=2, drop_path=0.0)
assert isinstance(train_tiny.CONFIG.method, Dinov2Config)
METHOD: Dinov2Config = replace(train_tiny.CONFIG.method, gram=GRAM)
SLOTS, VIEWS = torch.arange(8), 2


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weight_and_copies_follow_the_steps() -> None:
    steps = range(400)
    weights = [scheduled(step, METHOD, train_tiny.CONFIG.schedule).gram_weight for step in steps]
    assert weights[:101] == [0.0] * 101 and weights[105] == 1.0 and weights[110:] == [2.0] * 290
    assert [step for step in steps if gram_takes_teacher(step, METHOD)] == [100, 120, 140, 160]
    from_disk = replace(METHOD, gram=replace(GRAM, source="run/checkpoints/step-9", refresh_every=None))
    assert not any(gram_takes_teacher(step, from_disk) for step in steps)
    at_once = replace(METHOD, gram=replace(GRAM, warmup_steps=0, first_step=0))
    assert scheduled(0, at_once, train_tiny.CONFIG.schedule).gram_weight == 2.0 and gram_takes_teacher(0, at_once)
    off = replace(METHOD, gram=None)
    assert build_gram_teacher(MODEL, off) is None and not gram_takes_teacher(100, off)


def step_with(method: Dinov2Config, weight: float, target: Tensor | None):  # type: ignore[no-untyped-def]
    student, teacher = build(MODEL, method, 0)
    masks = masks_at(MODEL, method, 0, 0, SLOTS, 32, VIEWS)
    assert masks is not None
    images = noise(16, 3, 32, 32)
    taught, learned = teacher(images, indices=masks.indices), student(images, None, masks.crops, masks.indices)
    now = Scheduled(teacher_temp=0.05, momentum=0.9, last_layer=True, gram_weight=weight)
    return losses(learned, taught, masks, first_centres(method, "cpu"), method, now, VIEWS, gram=target), learned, student


def test_the_term_is_weighted_into_the_total_and_reaches_the_backbone() -> None:
    frozen = build_gram_teacher(replace(MODEL), METHOD)
    assert frozen is not None and not any(p.requires_grad for p in frozen.parameters())
    target = frozen(noise(16, 3, 32, 32), (4, 4))
    without, _, _ = step_with(METHOD, 0.0, None)
    assert "gram" not in without.terms
    found, learned, student = step_with(METHOD, 1.5, target)
    assert torch.allclose(found.terms["gram"], restated.gram(learned["dense"], target), rtol=1e-5)
    assert torch.allclose(found.total, without.total + 1.5 * found.terms["gram"], rtol=1e-6)
    (found.total - without.total.detach()).backward()
    assert student.backbone.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no features of the Gram teacher"):
        step_with(METHOD, 1.5, None)


def test_only_a_student_that_needs_them_gives_patch_features() -> None:
    student, teacher = build(MODEL, METHOD, 0)
    plain, _ = build(MODEL, replace(METHOD, gram=None), 0)
    images = noise(4, 3, 32, 32)
    assert student(images)["dense"].shape == (4, 16, 24)
    assert "dense" not in teacher(images) and "dense" not in plain(images)
    assert student.state_dict().keys() == teacher.state_dict().keys() == plain.state_dict().keys()


def test_tokens_and_scope() -> None:
    x, y = noise(4, 9, 6), noise(4, 9, 6, seed=1)
    crops = noise(4, 9, seed=2) > 0.5
    masks = Masks(crops, crops.flatten().nonzero().flatten(), torch.ones(int(crops.sum())))
    whole = replace(GRAM, scope="batch")
    assert torch.allclose(gram_term(x, y, masks, GRAM), restated.gram(x, y), rtol=1e-5)
    assert torch.allclose(gram_term(x, y, masks, whole), restated.gram(x.reshape(1, 36, 6), y.reshape(1, 36, 6)), rtol=1e-5)
    for tokens, chosen in (("masked", crops), ("unmasked", ~crops)):
        found = gram_term(x, y, masks, replace(whole, tokens=tokens))
        assert torch.allclose(found, restated.gram(x[chosen][None], y[chosen][None]), rtol=1e-5)
    with pytest.raises(ValueError, match="tokens=masked needs masks"):
        gram_term(x, y, None, replace(whole, tokens="masked"))


def test_the_teacher_sees_finer_crops_on_the_students_grid() -> None:
    frozen = build_gram_teacher(MODEL, METHOD)
    assert frozen is not None
    images = noise(4, 3, 64, 64)
    fine = forward_tokens(frozen.backbone, images)[1]
    assert torch.allclose(frozen(images, (4, 4)), regrid(fine, (8, 8), (4, 4))) and frozen(images, (4, 4)).shape == (4, 16, 24)


def test_undistorted_views_are_the_same_crops_with_their_colours() -> None:
    """At the students' size and without any colour change they are the global views; with it they stay what they were."""
    pixels = (F.interpolate(noise(8, 3, 6, 6), size=64, mode="bicubic").sigmoid() * 255).byte()  # smooth: sizes can be compared
    views = train_tiny.CONFIG.views
    still = replace(views, hed_p=0.0, jitter_p=0.0, grey_p=0.0, blur=replace(views.blur, global_p=[0.0, 0.0]))
    plain = make_views(pixels, 3, 7, SLOTS, still).globals
    assert torch.equal(make_undistorted(pixels, 3, 7, SLOTS, views, 32), plain)
    assert not torch.allclose(make_views(pixels, 3, 7, SLOTS, views).globals, plain, atol=1e-2)
    double = make_undistorted(pixels, 3, 7, SLOTS, views, 64)
    assert double.shape == (16, 3, 64, 64)
    assert (F.avg_pool2d(double, 2) - plain).abs().mean() < 0.05 * plain.std()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "some"}, "gram.tokens='some'"),
        ({"scope": "crop"}, "gram.scope='crop'"),
        ({"negatives": "drop"}, "gram.negatives='drop'"),
        ({"tokens": "masked"}, "scope=batch"),
        ({"px": 60}, "px=60 is not a multiple of model.patch_size=8"),
        ({"refresh_every": 0}, "refresh_every=0"),
    ],
)
def test_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(MODEL, replace(METHOD, gram=replace(GRAM, **changes)), 0)  # type: ignore[arg-type]
