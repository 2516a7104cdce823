"""The timm backbone: equal to timm's own forward, at any grid, with masks, registers and stochastic depth."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from histoscale.data.keys import keys
from histoscale.launch.config import choices, load
from histoscale.pretrain.backbone import (
    ModelConfig,
    build_backbone,
    forward_tokens,
    forward_views,
    kept_rows,
    positions,
    timm_arguments,
)
from histoscale.pretrain.blocks import joint_blocks

TINY = ModelConfig(
    architecture="vit_tiny_patch16_224", img_size=48, patch_size=8, width=48, depth=2, heads=3, mlp_ratio=2.0,
    registers=0, layer_scale=None, drop_path=0.0,
)  # fmt: skip
REGISTERS = replace(TINY, architecture="vit_small_patch14_reg4_dinov2", registers=4, layer_scale=1e-5)
SWIGLU = replace(REGISTERS, architecture="vit_giant_patch14_reg4_dinov2", mlp_ratio=4.0)
ROTARY = replace(REGISTERS, architecture="vit_small_patch16_dinov3", mlp_ratio=4.0)
CONFIGS = [
    TINY,
    REGISTERS,
    SWIGLU,
    replace(TINY, registers=2),
    ROTARY,
    replace(ROTARY, architecture="vit_base_patch16_dinov3_qkvb"),
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", CONFIGS)
def test_equals_timm_at_the_native_size(config: ModelConfig) -> None:
    vit, x = build_backbone(config, 0).eval(), noise(2, 3, 48, 48)
    theirs = vit.forward_features(x)
    cls, patches = forward_tokens(vit, x)
    assert torch.equal(cls, theirs[:, 0]) and torch.equal(patches, theirs[:, vit.num_prefix_tokens :])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", [(24, 24), (96, 96), (40, 64)])
def test_equals_timm_at_other_sizes(config: ModelConfig, size: tuple[int, int]) -> None:
    vit, x = build_backbone(config, 0).eval(), noise(2, 3, *size)
    theirs = vit.forward_features(x)
    cls, patches = forward_tokens(vit, x)
    assert torch.allclose(cls, theirs[:, 0], atol=1e-5)
    assert torch.allclose(patches, theirs[:, vit.num_prefix_tokens :], atol=1e-5)


@pytest.mark.parametrize("grid", [(3, 3), (14, 14), (28, 28), (5, 9)])
def test_positions_equal_timms_resampling(grid: tuple[int, int]) -> None:
    vit = build_backbone(replace(TINY, img_size=112), 0)
    assert vit.pos_embed is not None
    prefix, table = positions(vit, grid)
    theirs = resample_abs_pos_embed(vit.pos_embed, [*grid], [14, 14], num_prefix_tokens=1)
    assert torch.equal(prefix, theirs[:, :1])
    assert torch.equal(table, theirs[:, 1:]) if grid == (14, 14) else torch.allclose(table, theirs[:, 1:], atol=1e-6)


def test_positions_are_resized_in_float32_under_autocast_and_learn() -> None:
    vit = build_backbone(TINY, 0)
    with torch.autocast("cpu", torch.bfloat16):
        table = positions(vit, (3, 3))[1]
    assert table.dtype == torch.float32 and torch.equal(table, positions(vit, (3, 3))[1])
    table.sum().backward()
    assert vit.pos_embed is not None and vit.pos_embed.grad is not None
    assert vit.pos_embed.grad[:, 1:].abs().sum() > 0


def test_mask_token_replaces_the_embedding_before_the_position() -> None:
    """Masking all patches makes images indistinguishable, masking one leaves the others' embeddings; position stays."""
    vit, x = build_backbone(TINY, 0).eval(), noise(2, 3, 48, 48)
    token = noise(1, 48, seed=1)
    all_ = forward_tokens(vit, x, torch.ones(2, 36, dtype=torch.bool), token)[1]
    assert torch.equal(all_[0], all_[1]) and not torch.allclose(all_[0, 0], all_[0, 1], atol=1e-3)
    one = torch.zeros(2, 36, dtype=torch.bool)
    one[0, 7] = True
    cls, patches = forward_tokens(vit, x, one, token)
    plain = forward_tokens(vit, x)
    assert torch.equal(patches[1], plain[1][1]) and not torch.allclose(patches[0], plain[1][0], atol=1e-4)


def test_arguments_rebuild_the_model_in_timm() -> None:
    vit = build_backbone(SWIGLU, 3)
    again = timm.create_model(SWIGLU.architecture, **timm_arguments(SWIGLU))
    again.load_state_dict(vit.state_dict())
    assert torch.equal(again.eval()(noise(1, 3, 48, 48)), forward_tokens(vit.eval(), noise(1, 3, 48, 48))[0])


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_backbone(TINY, 5).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = build_backbone(TINY, 5).state_dict(), build_backbone(TINY, 6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_dropped_rows_are_untouched() -> None:
    vit, x = build_backbone(replace(TINY, depth=1), 0), noise(8, 3, 24, 24)
    vit.norm = torch.nn.Identity()
    kept = kept_rows(keys(0, "drop", 0, torch.arange(8)), 1, 4, 0.5, 2)
    assert kept.shape == (2, 4)  # two groups of four, half of each
    cls, _ = forward_tokens(vit, x, kept=kept)
    never = sorted(set(range(8)) - set(kept.flatten().tolist()))
    vit.blocks = torch.nn.Sequential()
    start = forward_tokens(vit, x)[0]
    assert never and torch.equal(cls[never], start[never])
    some = sorted(set(kept.flatten().tolist()))
    assert (cls[some] != start[some]).any(1).all()


def test_dropped_rows_hand_their_gradient_through_unchanged() -> None:
    block, x = build_backbone(replace(TINY, depth=1), 0).blocks[0], noise(8, 10, 48).requires_grad_()
    upstream = noise(8, 10, 48, seed=1)
    kept = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]])  # rows of the attention branch, and of the MLP's
    block([x], [kept])[0].backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad[6:], upstream[6:]) and (x.grad[:6] != upstream[:6]).flatten(1).any(1).all()


def test_stochastic_depth_keeps_the_expectation() -> None:
    vit, x = build_backbone(replace(TINY, depth=1), 0), noise(6, 3, 24, 24)
    vit.norm = torch.nn.Identity()
    slots = torch.arange(6)
    with torch.no_grad():
        vit.blocks[0].mlp.fc2.weight.zero_()  # one residual branch: no products of draws
        vit.blocks[0].mlp.fc2.bias.zero_()
        draws = [forward_tokens(vit, x, kept=kept_rows(keys(0, "drop", s, slots), 1, 6, 0.5, 2))[0] for s in range(200)]
        assert torch.allclose(torch.stack(draws).mean(0), forward_tokens(vit, x)[0], atol=0.04)


def test_kept_rows_belong_to_their_group_and_depend_on_nothing_else() -> None:
    slots = torch.arange(24)

    def rows(chosen: Tensor) -> Tensor:
        return kept_rows(torch.cat([keys(0, f"crop{c}", 7, chosen) for c in range(2)]), 2, 8, 0.3, 4)

    whole = rows(slots).view(4, 3, -1)
    assert whole.shape[2] == 11  # floor(16 * 0.7)
    assert ((whole % 24) // 8 == torch.arange(3)[None, :, None]).all()
    part = rows(slots[8:16]).view(4, 1, -1)
    assert torch.equal(part // 8 * 24 + part % 8 + 8, whole[:, 1:2])
    with pytest.raises(ValueError, match="20 slots .* method.group=8"):
        kept_rows(keys(0, "drop", 0, torch.arange(20)), 1, 8, 0.3, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_tinny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"architecture": "resnet18"}, "resnet18.* is not one of timm's vision transformers"),
        ({"img_size": 50}, "img_size=50 is not a multiple"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
    ],
)
def test_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(replace(TINY, **changes), 0)  # type: ignore[arg-type]


def test_shipped_models_build() -> None:
    for name in choices("model"):
        config = load("pretrain", ["recipe=demo", f"model={name}", "catalog=c", "out=o"]).config.model
        assert build_backbone(replace(config, depth=1), 0).patch_embed.patch_size[0] == config.patch_size


def test_rotary_positions_need_layer_scale_and_grids_that_differ() -> None:
    with pytest.raises(ValueError, match="dinov3.* has LayerScale"):
        build_backbone(replace(ROTARY, layer_scale=None), 0)
    vit = build_backbone(ROTARY, 0)
    with pytest.raises(ValueError, match="as many patches"):
        forward_views(vit, [noise(1, 3, 16, 64), noise(1, 3, 32, 32)], [None, None], None, [None, None])


@pytest.mark.parametrize("attention", ["sdpa", "math", "packed"])
def test_rotary_blocks_treat_resolutions_and_dropped_rows_apart(attention: str) -> None:
    """Two resolutions at once are each alone; rows that stochastic depth leaves out are those of one block's identity."""
    vit = build_backbone(replace(ROTARY, layer_scale=1.0), 0)
    for block in joint_blocks(vit):
        block.attention = attention
    large, small = noise(4, 3, 48, 48), noise(4, 3, 24, 24, seed=1)
    together = forward_views(vit, [large, small], [None, None], None, [None, None])
    for found, view in zip(together, (large, small), strict=True):
        alone = forward_tokens(vit, view)
        assert torch.allclose(found[0], alone[0], atol=1e-5) and torch.allclose(found[1], alone[1], atol=1e-5)
    rows = torch.tensor([[0, 2]] * 4)
    kept = forward_tokens(vit, large, kept=rows)[1]
    vit.blocks = torch.nn.Sequential()
    untouched = forward_tokens(vit, large)[1]
    assert torch.equal(kept[[1, 3]], untouched[[1, 3]]) and not torch.allclose(kept[[0, 2]], untouched[[0, 2]], atol=1e-3)
