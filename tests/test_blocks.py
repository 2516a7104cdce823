"""Blocks of all resolutions at once: every back end, recomputed or not, equals timm's own forward and its gradients."""

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer

from histoscale.pretrain.backbone import ModelConfig, build_backbone, forward_views
from histoscale.pretrain.blocks import choose_attention, join_blocks, joint_blocks, unavailable

MODEL = ModelConfig(
    architecture="vit_tiny_patch16_224", img_size=32, patch_size=8, width=48, depth=2, heads=3, mlp_ratio=None, registers=2,
    layer_scale=0.1, drop_path=0.0,
)  # fmt: skip
CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def views(device: torch.device | str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 32, 32, generator=generator).to(device), torch.randn(6, 3, 16, 16, generator=generator).to(device)]


def kept() -> list[torch.Tensor]:
    """Rows of the 2 * depth branches of each resolution."""
    generator = torch.Generator().manual_seed(1)
    return [torch.stack([torch.randperm(rows, generator=generator)[:n] for _ in range(4)]) for rows, n in ((4, 2), (6, 4))]


def weighed(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A scalar with a gradient to every output; a mean square would have next to none, behind a norm."""
    generator = torch.Generator().manual_seed(2)
    return torch.stack([(x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs.values()]).sum()


def detached(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.detach() for name, x in outputs.items()}


def outputs_and_gradients(vit: VisionTransformer, rows: bool, x: list[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    x = views() if x is None else x
    found = forward_views(vit, x, [None, None], None, [k.to(x[0].device) for k in kept()] if rows else [None, None])
    flat = {f"{name}/{i}": out for i, pair in enumerate(found) for name, out in zip(("cls", "patches"), pair, strict=True)}
    vit.zero_grad()
    weighed(flat).backward()
    return {**detached(flat), **{name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}}


def timm_one_by_one(vit: VisionTransformer) -> dict[str, torch.Tensor]:
    """timm's own forward of each resolution, by a model of timm that never saw our blocks."""
    plain = timm.create_model(
        MODEL.architecture, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, reg_tokens=2, init_values=0.1,
        num_classes=0, global_pool="token", dynamic_img_size=True,
    )  # fmt: skip
    plain.load_state_dict(vit.state_dict())
    found = [plain.forward_features(x) for x in views()]
    flat = {f"{n}/{i}": y for i, x in enumerate(found) for n, y in (("cls", x[:, 0]), ("patches", x[:, 3:]))}
    weighed(flat).backward()
    return {**detached(flat), **{name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """max|difference| / max|expected| of every tensor."""
    assert found.keys() == expected.keys() and len(found) > 30
    apart = {name: float((found[name] - y).abs().max() / y.abs().max()) for name, y in expected.items()}
    assert {name: x for name, x in apart.items() if not x <= tolerance} == {}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "math", "packed"])
def test_outputs_and_gradients_are_timms(attention: str, recompute: bool) -> None:
    vit = build_backbone(MODEL, 0)
    expected = timm_one_by_one(vit)
    for block in joint_blocks(vit):
        block.attention, block.recompute = attention, recompute
    assert_close(outputs_and_gradients(vit, rows=False), expected, 1e-5)


@pytest.mark.parametrize("attention", ["math", "packed"])
def test_stochastic_depth_is_the_same_on_every_back_end(attention: str) -> None:
    vit = build_backbone(MODEL, 0)
    expected = outputs_and_gradients(vit, rows=True)
    whole = outputs_and_gradients(vit, rows=False)
    assert (expected["cls/1"] - whole["cls/1"]).abs().max() > 1e-3  # rows were left out
    for block in joint_blocks(vit):
        block.attention = attention
    assert_close(outputs_and_gradients(vit, rows=True), expected, 1e-5)


@pytest.mark.parametrize("attention", ["varlen", "xformers"])
def test_cuda_back_ends_equal_separate_calls(attention: str) -> None:
    why = unavailable(attention, CUDA, "bf16")
    if why:
        pytest.skip(f"{attention}: {why}")
    vit = build_backbone(MODEL, 0).to(CUDA)
    found = []
    for name in ("sdpa", attention):
        for block in joint_blocks(vit):
            block.attention = name
        with torch.autocast("cuda", torch.bfloat16):
            found.append(outputs_and_gradients(vit, rows=True, x=views(CUDA)))
    assert_close(found[1], found[0], 5e-2)  # bfloat16 has eight bits


def test_activation_checkpointing_keeps_less_and_computes_twice() -> None:
    vit = build_backbone(MODEL, 0)
    kept_bytes, calls = [], []
    vit.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    for recompute in (False, True):
        for block in joint_blocks(vit):
            block.recompute = recompute
        saved: dict[int, int] = {}

        def pack(x: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            forward_views(vit, views(), [None, None], None, [None, None])[0][0].sum().backward()
        kept_bytes.append(sum(saved.values()))
    assert kept_bytes[1] < 0.5 * kept_bytes[0]
    assert len(calls) == 2 + 4  # two resolutions; forward, and with recompute once more in the backward


def test_what_cannot_attend_is_said_with_what_can() -> None:
    cpu = torch.device("cpu")
    assert [choose_attention("auto", cpu, precision) for precision in ("fp32", "bf16", "fp16")] == ["sdpa", "math", "math"]
    with pytest.raises(ValueError, match="'flash'.*expected one of auto, sdpa, math, packed, varlen, xformers"):
        choose_attention("flash", cpu, "bf16")
    for attention in ("varlen", "xformers"):
        with pytest.raises(ValueError, match=f"attention={attention} .* needs a CUDA device; set it to auto"):
            choose_attention(attention, cpu, "bf16")
    with pytest.raises(ValueError, match="bf16 and fp16 only"):
        choose_attention("varlen", torch.device("cuda"), "fp32")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"block_fn": ResPostBlock}, "ResPostBlock"), ({"proj_drop_rate": 0.1}, "global generator"),
     ({"drop_path_rate": 0.1}, "drop_path1")],
)  # fmt: skip
def test_other_blocks_and_dropout_are_refused(arguments: dict[str, Any], words: str) -> None:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, **arguments)
    with pytest.raises(ValueError, match=words):
        join_blocks(vit)
