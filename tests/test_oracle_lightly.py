"""Lightly's losses, head and masks (lightly-ai/lightly, MIT) as a second oracle, also for DINO v1.

    pip install --no-deps --target ORACLE lightly==1.6.0; PYTHONPATH=ORACLE pytest tests/test_oracle_lightly.py
"""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import train_tiny
from torch import Tensor

from histoscale.data.keys import keys
from histoscale.pretrain.backbone import ModelConfig
from histoscale.pretrain.heads import Head, HeadConfig
from histoscale.pretrain.losses import center_targets, ibot_ce, koleo
from histoscale.pretrain.masking import block_masks
from histoscale.pretrain.methods import DinoConfig, Scheduled, build, first_centres, losses

os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"  # it would ask its server for news
lightly_loss: Any = pytest.importorskip("lightly.loss", reason="lightly is not installed: see the first lines of this file")
lightly_heads: Any = pytest.importorskip("lightly.models.modules.heads")
lightly_utils: Any = pytest.importorskip("lightly.models.utils")

VIEWS, LOCALS, B = 2, 3, 6
HEAD = HeadConfig(prototypes=24, hidden=32, bottleneck=12, scale="frozen", batch_norm=False)
MODEL: ModelConfig = replace(train_tiny.CONFIG.model, width=24, heads=2, drop_path=0.0)
METHOD = DinoConfig(
    kind="dino", group=6, head=HEAD, targets="centering", sinkhorn_iterations=3, centre_momentum=0.9, student_temp=0.1,
    teacher_temp=[0.04, 0.04], teacher_temp_warmup_steps=0, momentum=[0.9, 1.0], freeze_last_layer_steps=0,
)  # fmt: skip


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_from(ours: Head) -> tuple[Any, dict[str, str]]:
    """Their head with our weights in float64, and our name of each of its parameters."""
    theirs = lightly_heads.DINOProjectionHead(24, 32, 12, 24, norm_last_layer=ours.last_scale is None).double()
    names = {"last_layer.weight_g": "last_scale", "last_layer.weight_v": "last_direction"}
    names |= {f"layers.{i}.{kind}": f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if names[name] in weights:
                parameter.copy_(weights[names[name]])
    return theirs, {theirs_: ours_ for theirs_, ours_ in names.items() if ours_ in weights}


@pytest.mark.parametrize("scale", ["frozen", "trainable"])
def test_dino_over_three_steps_with_its_centre(scale: str) -> None:
    """The term, gradients of head and backbone, and the centre that the next step uses, in float64."""
    method = replace(METHOD, head=replace(HEAD, scale=scale))
    student, teacher = (branch.double() for branch in build(MODEL, method, 0))
    with torch.no_grad():
        for i, parameter in enumerate(student.parameters()):
            parameter.add_(0.05 * noise(*parameter.shape, seed=i))
    s_head, names = head_from(student.head)
    t_head, _ = head_from(teacher.head)
    theirs = lightly_loss.DINOLoss(output_dim=24, student_temp=0.1, center_momentum=0.9).double()
    centres = first_centres(method, "cpu")
    centres = centres._replace(cls=centres.cls.double())
    for step in range(3):
        globals_, locals_ = noise(VIEWS * B, 3, 32, 32, seed=10 + step), noise(LOCALS * B, 3, 16, 16, seed=20 + step)
        now = Scheduled(teacher_temp=(4 + step) / 64, momentum=0.9, last_layer=True, gram_weight=0.0)
        taught, learned = teacher(globals_), student(globals_, locals_)
        found = losses(learned, taught, None, centres, method, now, VIEWS)
        ours = torch.autograd.grad(found.total, list(student.parameters()), retain_graph=False)

        s_features = torch.cat([student(globals_)["features"], student(locals_)["features"]])
        t_logits = t_head(taught["features"]).detach().chunk(VIEWS)
        # their temperature is a float32 tensor, which holds these exactly
        total = theirs(list(t_logits), list(s_head(s_features).chunk(VIEWS + LOCALS)), teacher_temp=now.teacher_temp)
        assert abs(found.total - total) < 1e-10 * total
        s_head.zero_grad()
        student.zero_grad()
        total.backward()
        by_name = dict(zip([name for name, _ in student.named_parameters()], ours, strict=True))
        for name, parameter in student.named_parameters():
            if name.startswith("backbone."):
                wanted = parameter.grad
                assert wanted is not None
                assert (by_name[name] - wanted).abs().max() < 1e-10 * wanted.abs().max(), name
        for their_name, our_name in names.items():
            wanted = s_head.get_parameter(their_name).grad
            assert (by_name[f"head.{our_name}"] - wanted).abs().max() < 1e-10 * wanted.abs().max(), our_name
        centres = found.centres
        assert torch.allclose(centres.cls, theirs.center[0, 0], atol=1e-12) and centres.cls.abs().max() > 0


def test_ibot_and_koleo() -> None:
    masks = torch.zeros(8, 5, 5, dtype=torch.bool)
    masks[0, :2, :2] = masks[3, 1:, 3:] = masks[6, 0, :2] = True  # 4, 8, 2: their weights are float32
    count = int(masks.sum())
    student, teacher, z = noise(count, 16), noise(count, 16, seed=1), noise(12, 24, seed=2)
    per_crop = masks.flatten(1).sum(1)
    weights = (1 / per_crop.double())[masks.flatten(1).nonzero()[:, 0]]
    targets = center_targets(teacher, torch.zeros(16, dtype=torch.float64), 0.0625)
    expected = lightly_loss.IBOTPatchLoss(output_dim=16).double()(teacher, student, masks, teacher_temp=0.0625)
    assert torch.allclose(ibot_ce(student, targets, weights, 8, 0.1), expected, rtol=1e-10)
    assert torch.allclose(koleo(z, None), lightly_loss.KoLeoLoss()(z), rtol=1e-10)


def test_masks_have_their_statistics() -> None:
    """60 of 196 patches: where they lie and how often neighbours are masked together."""
    torch.manual_seed(0)
    theirs = np.stack([lightly_utils.random_block_mask_image((14, 14), 60, max_num_masks_per_block=98) for _ in range(2000)])
    ours = block_masks(keys(0, "oracle", 1, torch.arange(2000)), np.full(2000, 60), (14, 14), False).reshape(-1, 14, 14)
    assert 58 <= theirs.sum((1, 2)).mean() <= 60  # they may stop a little short
    for measure in (lambda m: (m[:, 1:] & m[:, :-1]).mean(), lambda m: (m[:, :, 1:] & m[:, :, :-1]).mean()):
        assert abs(measure(ours) - measure(theirs)) < 0.015
