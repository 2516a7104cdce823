"""DINOv2's published code as an oracle: ORACLE_DINOV2=<clone of facebookresearch/dinov2> pytest tests/oracle_dinov2.py."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from histoscale.data.keys import keys
from histoscale.pretrain.backbone import ModelConfig, forward_tokens
from histoscale.pretrain.guard import LossScaleConfig
from histoscale.pretrain.heads import HeadConfig
from histoscale.pretrain.losses import dino_ce, ibot_ce, koleo, sinkhorn_targets
from histoscale.pretrain.masking import MaskConfig, block_masks
from histoscale.pretrain.methods import Branch, Dinov2Config, Scheduled, build, first_centres, losses, masks_at
from histoscale.pretrain.optim import OptimConfig, parameter_table
from histoscale.pretrain.schedule import ScheduleConfig, cosine, linear_then_flat

HEAD = HeadConfig(prototypes=24, hidden=32, bottleneck=12, scale="trainable", batch_norm=False)
MODEL = ModelConfig(
    architecture="vit_tiny_patch16_224", img_size=32, patch_size=8, width=24, depth=2, heads=2, mlp_ratio=4.0,
    registers=0, layer_scale=0.3, drop_path=0.0,
)  # fmt: skip
METHOD = Dinov2Config(
    kind="dinov2", group=6, head=HEAD, patch_head=replace(HEAD, prototypes=20), mask=MaskConfig(0.5, [0.1, 0.5], False),
    dino_weight=1.0, local_weight=1.0, ibot_weight=1.0, koleo_weight=0.1, koleo_pool=None, koleo_neighbours=1, kde_weight=0.0,
    kde_kappa=10.0, kde_pool=None, kde_reversed=False, gram=None, targets="sinkhorn", sinkhorn_iterations=3, centre_momentum=0.9,
    student_temp=0.1, teacher_temp=[0.04, 0.07], teacher_temp_warmup_steps=10, momentum=[0.99, 1.0], freeze_last_layer_steps=0,
)  # fmt: skip
VIEWS, LOCALS, B, TEMP = 2, 3, 6, 0.05


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The clone on sys.path, without xformers, and the process group of one that its Sinkhorn wants."""
    if "ORACLE_DINOV2" not in os.environ:
        pytest.skip("ORACLE_DINOV2 names no clone of facebookresearch/dinov2")
    os.environ["XFORMERS_DISABLED"] = "1"
    root = Path(os.environ["ORACLE_DINOV2"])
    sys.path.insert(0, str(root))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('oracle') / 'meet'}", rank=0, world_size=1)
    yield root
    dist.destroy_process_group()
    sys.path.remove(str(root))


def module_at(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vit_from(branch: Branch, model: ModelConfig, drop_path: float = 0.0) -> tuple[Any, dict[str, str]]:
    """Their backbone with our weights in float64, and our name of each of its parameters."""
    from dinov2.layers.attention import Attention
    from dinov2.layers.block import Block
    from dinov2.models.vision_transformer import DinoVisionTransformer

    swiglu = model.architecture.startswith("vit_giant")  # timm's ratio counts gate and value, theirs 3/2 of one of them
    vit = DinoVisionTransformer(
        img_size=model.img_size, patch_size=model.patch_size, embed_dim=24, depth=2, num_heads=2, block_chunks=0,
        mlp_ratio=3.0 if swiglu else 4.0, init_values=model.layer_scale, block_fn=partial(Block, attn_class=Attention),
        ffn_layer="swiglu" if swiglu else "mlp", num_register_tokens=model.registers, interpolate_antialias=True,
        interpolate_offset=0.0, drop_path_rate=drop_path, drop_path_uniform=True,
    ).double()  # fmt: skip
    renamed = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2", "register_tokens": "reg_token"}
    weights, names = dict(branch.named_parameters()), {}
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            ours = "mask_token" if name == "mask_token" else f"backbone.{name}"
            for theirs, timms in renamed.items():
                ours = ours.replace(theirs, timms)
            names[f"backbone.{name}"] = ours
            value = weights[ours]
            if name == "pos_embed" and model.registers:  # timm's class token holds its position
                parameter[:, 1:], parameter[:, :1] = value, 0.0
            else:
                parameter.copy_(value.view_as(parameter))
    return vit, names


def theirs_from(branch: Branch) -> tuple[Any, Any, Any, dict[str, str]]:
    """Their backbone and heads with our weights, and our name of each of their parameters."""
    from dinov2.layers import DINOHead

    vit, names = vit_from(branch, MODEL)
    heads = [DINOHead(24, k, nlayers=3, hidden_dim=32, bottleneck_dim=12).double() for k in (24, 20)]
    weights = dict(branch.named_parameters())
    for ours, head in zip(("head", "patch_head"), heads, strict=True):
        for name, parameter in head.named_parameters():
            last = {"last_layer.weight_g": "last_scale", "last_layer.weight_v": "last_direction"}
            names[f"{ours}.{name}"] = f"{ours}.{last.get(name, name)}"
            with torch.no_grad():
                parameter.copy_(weights[names[f"{ours}.{name}"]].view_as(parameter))
    return vit, heads[0], heads[1], names


def shaken(branch: Branch, seed: int) -> Branch:
    """In float64, away from the symmetric start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in branch.double().parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return branch


REGISTERS = replace(MODEL, architecture="vit_giant_patch14_reg4_dinov2", registers=4)


@pytest.mark.parametrize("model", [MODEL, REGISTERS])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_backbone_with_masks_registers_swiglu_and_stochastic_depth(clone: Path, model: ModelConfig, rate: float) -> None:
    """Features and all gradients; with stochastic depth we are given the rows that their permutations keep."""
    student = shaken(build(model, METHOD, 0)[0], 1)
    vit, names = vit_from(student, model, rate)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(10, 3, 32, 32, generator=generator, dtype=torch.float64)
    masks = torch.rand(10, 16, generator=generator) < 0.3
    torch.manual_seed(3)
    kept = None if rate == 0 else torch.stack([torch.randperm(10)[:6] for _ in range(4)])
    torch.manual_seed(3)
    theirs = vit.train()(images, masks, is_training=True)
    cls, patches = forward_tokens(student.backbone, images, masks, student.mask_token, kept)
    assert torch.allclose(cls, theirs["x_norm_clstoken"], rtol=0, atol=1e-10)
    assert torch.allclose(patches, theirs["x_norm_patchtokens"], rtol=0, atol=1e-10)
    (cls.square().sum() + patches.sin().sum()).backward()
    (theirs["x_norm_clstoken"].square().sum() + theirs["x_norm_patchtokens"].sin().sum()).backward()
    ours = dict(student.named_parameters())
    for their_name, our_name in names.items():
        got, wanted = ours[our_name].grad, vit.get_parameter(their_name.removeprefix("backbone.")).grad
        assert got is not None
        wanted = wanted[:, 1:] if our_name.endswith("pos_embed") and model.registers else wanted
        assert (got - wanted.view_as(got)).abs().max() < 1e-9 * wanted.abs().max(), our_name


def test_losses_in_float32(clone: Path) -> None:
    """Values to 5e-6 and gradients to 1e-5 of their greatest entry."""
    from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss

    generator = torch.Generator().manual_seed(0)
    s_cls, t_cls = (torch.randn(n, 8, 64, generator=generator).div(5).requires_grad_() for n in (5, 2))
    s_patch, t_patch = (torch.randn(40, 48, generator=generator).div(5).requires_grad_() for _ in range(2))
    z = torch.randn(32, 24, generator=generator).requires_grad_()
    masks = torch.zeros(16, 25, dtype=torch.bool)
    masks[::2, :5] = True
    weights = torch.full((40,), 0.2)
    dino, ibot = DINOLoss(64), iBOTPatchLoss(48)
    p_cls = [sinkhorn_targets(t_cls.flatten(0, 1), 0.06, 3), dino.sinkhorn_knopp_teacher(t_cls.detach().flatten(0, 1), 0.06)]
    p_patch = [sinkhorn_targets(t_patch, 0.06, 3), ibot.sinkhorn_knopp_teacher(t_patch.detach(), 0.06, torch.tensor(40))]
    for ours, theirs in (p_cls, p_patch):
        assert (ours - theirs).abs().max() < 5e-6
    p = p_cls[1].view(2, 8, 64)
    pairs = (
        dino_ce(s_cls, p, 0.1),
        (dino(list(s_cls[2:]), list(p)) + dino([s_cls[0]], [p[1]]) + dino([s_cls[1]], [p[0]])) / 8,
        s_cls,
    ), (
        ibot_ce(s_patch, p_patch[1], weights, 16, 0.1),
        ibot.forward_masked(s_patch, p_patch[1], masks, masks_weight=weights),
        s_patch,
    ), (koleo(z, None), KoLeoLoss()(z), z)  # fmt: skip
    for ours, theirs, x in pairs:
        assert abs(ours - theirs) < 5e-6 * abs(theirs)
        got, wanted = (torch.autograd.grad(term, x)[0] for term in (ours, theirs))
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_one_step_has_their_terms_and_gradients(clone: Path, targets: str) -> None:
    from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss

    method = replace(METHOD, targets=targets)
    student, teacher = (shaken(branch, seed) for seed, branch in enumerate(build(MODEL, method, 0)))
    generator = torch.Generator().manual_seed(9)
    globals_ = torch.randn(VIEWS * B, 3, 32, 32, generator=generator, dtype=torch.float64)
    locals_ = torch.randn(LOCALS * B, 3, 16, 16, generator=generator, dtype=torch.float64)
    masks = masks_at(MODEL, method, 0, 0, torch.arange(B), 32, VIEWS)
    assert masks is not None
    taught, learned = teacher(globals_, indices=masks.indices), student(globals_, locals_, masks.crops, masks.indices)
    ours = losses(learned, taught, masks, first_centres(method, "cpu"), method, Scheduled(TEMP, 0.99, True, 0.0), VIEWS)
    ours.total.backward()

    t_vit, t_head, t_patch_head, _ = theirs_from(teacher)
    s_vit, s_head, s_patch_head, names = theirs_from(student)
    dino, ibot, koleo = DINOLoss(24), iBOTPatchLoss(20), KoLeoLoss()
    with torch.no_grad():
        seen = t_vit(globals_, is_training=True)
        t_cls = t_head(seen["x_norm_clstoken"])
        t_patch = t_patch_head(seen["x_norm_patchtokens"].flatten(0, 1)[masks.indices])
        if targets == "sinkhorn":
            p_cls = dino.sinkhorn_knopp_teacher(t_cls, TEMP).view(VIEWS, B, -1)
            p_patch = ibot.sinkhorn_knopp_teacher(t_patch, TEMP, torch.tensor(len(t_patch)))
        else:
            p_cls = dino.softmax_center_teacher(t_cls, TEMP).view(VIEWS, B, -1)
            p_patch = ibot.softmax_center_teacher(t_patch[None], TEMP)[0]
    seen = s_vit(globals_, masks.crops, is_training=True)
    s_cls = s_head(seen["x_norm_clstoken"]).chunk(VIEWS)
    s_local = s_head(s_vit(locals_, is_training=True)["x_norm_clstoken"]).chunk(LOCALS)
    s_patch = s_patch_head(seen["x_norm_patchtokens"].flatten(0, 1)[masks.indices])
    pairs = VIEWS * LOCALS + VIEWS * (VIEWS - 1)
    crossed = dino([s_cls[0]], [p_cls[1]]) + dino([s_cls[1]], [p_cls[0]])
    terms = {
        "dino": (dino(list(s_local), list(p_cls)) + crossed) / pairs,
        "ibot": ibot.forward_masked(s_patch, p_patch, masks.crops, masks_weight=masks.weights),
        "koleo": sum(koleo(z) for z in seen["x_norm_clstoken"].chunk(VIEWS)),
    }
    (terms["dino"] + terms["ibot"] + 0.1 * terms["koleo"]).backward()

    tolerance = 1e-5 if targets == "sinkhorn" else 1e-6  # their Sinkhorn and their position table are float32
    for name, term in terms.items():
        assert torch.allclose(ours.terms[name].double(), term.double(), rtol=tolerance), name
    gradients: dict[str, Tensor | None] = {name: p.grad for name, p in student.named_parameters()}
    modules = {"backbone": s_vit, "head": s_head, "patch_head": s_patch_head}
    for their_name, our_name in names.items():
        prefix, leaf = their_name.split(".", 1)
        wanted, got = modules[prefix].get_parameter(leaf).grad, gradients.pop(our_name)
        assert got is not None
        assert (got - wanted.view_as(got)).abs().max() < 10 * tolerance * wanted.abs().max(), our_name
    assert not gradients
    if targets == "centering":
        dino.update_center(t_cls)
        dino.apply_center_update()
        assert torch.allclose(ours.centres.cls.double(), dino.center[0].double(), atol=1e-6)


def test_schedules(clone: Path) -> None:
    their = module_at(clone / "dinov2" / "utils" / "utils.py").CosineScheduler
    lr = their(base_value=2.0, final_value=0.5, total_iters=60, warmup_iters=9, start_warmup_value=0.1)
    config = ScheduleConfig("d2_v1", 60, 9, None, True)
    assert np.allclose([lr[i] for i in range(70)], [cosine(i, config, 9, 0.1, 2.0, 0.5) for i in range(70)])
    temp = their(base_value=0.07, final_value=0.07, total_iters=20, warmup_iters=20, start_warmup_value=0.04)
    assert np.allclose([temp[i] for i in range(30)], [linear_then_flat(i, 20, 0.04, 0.07) for i in range(30)])


def test_parameter_groups(clone: Path) -> None:
    from dinov2.utils.param_groups import get_params_groups_with_decay

    student, _ = build(MODEL, METHOD, 0)
    vit, head, patch_head, names = theirs_from(student.double())
    config = OptimConfig(
        global_batch=64, micro_batches=1, loss_scale=LossScaleConfig(1.0, 1),
        lr=1.0, lr_rule="none", lr_start=0.0, lr_final=0.0,
        betas=[0.9, 0.999], eps=1e-8, weight_decay=[0.04, 0.4], groups="d2",
        layer_decay=0.9, patch_lr=0.2, clip_scope="none", clip_value=1.0,
    )  # fmt: skip
    ours = {row.name: row for row in parameter_table(student.named_parameters(), 2, config)}
    for prefix, module in (("backbone", vit), ("head", head), ("patch_head", patch_head)):
        for group in get_params_groups_with_decay(module, lr_decay_rate=0.9, patch_embed_lr_mult=0.2):
            row = ours[names[f"{prefix}.{group['name']}"]]
            wanted = group["lr_multiplier"] if prefix == "backbone" else 1.0
            assert abs(row.lr - wanted) < 1e-12 and row.weight_decay == group["wd_multiplier"], row.name
            assert row.last_layer == group["is_last_layer"], row.name


def test_masks_have_their_statistics(clone: Path) -> None:
    """Overlap of neighbours, mean and spread of where patches are masked: BEiT blocks, ours and theirs, at 60 of 196 patches."""
    import random

    random.seed(0)
    generate = module_at(clone / "dinov2" / "data" / "masking.py").MaskingGenerator((14, 14), max_num_patches=98)
    theirs = np.stack([generate(60) for _ in range(2000)]).astype(bool)
    ours = block_masks(keys(0, "oracle", 0, torch.arange(2000)), np.full(2000, 60), (14, 14), False).reshape(-1, 14, 14)
    for measure in (lambda m: (m[:, 1:] & m[:, :-1]).mean(), lambda m: (m[:, :, 1:] & m[:, :, :-1]).mean()):
        assert abs(measure(ours) - measure(theirs)) < 0.01
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 5 * (0.25 * 2 / 2000) ** 0.5
