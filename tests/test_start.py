"""Start points: weights of timm and transformers, made here and saved, give their own features in our backbone, and back."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from histoscale.pretrain.backbone import ModelConfig, build_backbone, forward_tokens, timm_arguments
from histoscale.pretrain.start import StartConfig, StartError, load_start, resize_positions, timm_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

START = StartConfig(
    weights="", branch="both", heads=True, moments=True, resize="timm", may_lack=[], may_ignore=[], freeze_backbone_steps=0
)
VIT = ModelConfig(
    architecture="vit_small_patch16_224", img_size=64, patch_size=16, width=48, depth=2, heads=3, mlp_ratio=4.0, registers=0,
    layer_scale=None, drop_path=0.0,
)  # fmt: skip
DINOV2 = replace(VIT, architecture="vit_small_patch14_dinov2", img_size=56, patch_size=14, layer_scale=1.0)
REGISTERS = replace(DINOV2, architecture="vit_small_patch14_reg4_dinov2", registers=4)
SWIGLU = replace(REGISTERS, architecture="vit_giant_patch14_reg4_dinov2")
DINOV3 = replace(REGISTERS, architecture="vit_small_patch16_dinov3_qkvb", img_size=64, patch_size=16)
ROTARY: Any = {"layer_norm_eps": 1e-5, "image_size": 64, "intermediate_size": 192, "num_register_tokens": 4}
SIZES: Any = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "layer_norm_eps": 1e-6}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scramble(model: nn.Module) -> None:
    """Weights of which no two are alike, so that nothing can be mixed up unseen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") or "lambda" in name or "gamma" in name else 0.0
            p.copy_(offset + 0.1 * torch.randn(p.shape, generator=generator))


def hf() -> Any:
    return pytest.importorskip("transformers", reason="transformers (extra `hf`) is not installed")


def transformers_vit() -> "PreTrainedModel":
    return hf().ViTModel(hf().ViTConfig(**SIZES, image_size=64, patch_size=16, intermediate_size=192), add_pooling_layer=True)


def transformers_dinov2() -> "PreTrainedModel":
    return hf().Dinov2Model(hf().Dinov2Config(**SIZES, image_size=56, patch_size=14))


def transformers_registers() -> "PreTrainedModel":
    return hf().Dinov2WithRegistersModel(hf().Dinov2WithRegistersConfig(**SIZES, image_size=56, patch_size=14))


def transformers_swiglu() -> "PreTrainedModel":
    config = hf().Dinov2WithRegistersConfig(**SIZES, image_size=56, patch_size=14, use_swiglu_ffn=True)
    return hf().Dinov2WithRegistersModel(config)


def transformers_dinov3() -> "PreTrainedModel":
    return hf().DINOv3ViTModel(hf().DINOv3ViTConfig(**{**SIZES, **ROTARY}))


def transformers_dinov3_gated() -> "PreTrainedModel":
    return hf().DINOv3ViTModel(hf().DINOv3ViTConfig(**{**SIZES, **ROTARY, "use_gated_mlp": True, "hidden_act": "silu"}))


ORIGINS: list[tuple[Callable[[], "PreTrainedModel"], ModelConfig]] = [
    (transformers_vit, VIT),
    (transformers_dinov2, DINOV2),
    (transformers_registers, REGISTERS),
    (transformers_swiglu, replace(SWIGLU, mlp_ratio=128 * 2 / 48)),
    (transformers_dinov3, DINOV3),
    (transformers_dinov3_gated, replace(DINOV3, architecture="vit_huge_plus_patch16_dinov3_qkvb")),
]


def started(model: ModelConfig, weights: Path, **changes: object) -> nn.Module:
    vit = build_backbone(model, 0).eval()
    load_start(vit, replace(START, weights=str(weights), **changes))  # type: ignore[arg-type]
    return vit


@pytest.mark.parametrize(("make", "model"), ORIGINS, ids=[make.__name__ for make, _ in ORIGINS])
def test_weights_of_transformers_give_their_features(
    tmp_path: Path, make: Callable[[], "PreTrainedModel"], model: ModelConfig
) -> None:
    theirs = make().eval()
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    vit = build_backbone(model, 0).eval()
    loaded = load_start(vit, replace(START, weights=str(tmp_path)))
    x = noise(2, 3, model.img_size, model.img_size)
    with torch.no_grad():
        expected = theirs(x).last_hidden_state
        cls, patches = forward_tokens(vit, x)
    assert torch.allclose(cls, expected[:, 0], atol=1e-5)
    assert torch.allclose(patches, expected[:, vit.num_prefix_tokens :], atol=1e-5)
    assert (loaded.mask_token is None) == (make is transformers_vit)
    if loaded.mask_token is not None:
        assert torch.equal(loaded.mask_token, theirs.state_dict()["embeddings.mask_token"].reshape(1, -1))


def old_names(name: str) -> str:
    """transformers' own names before its version 5, as the files on the hub still have them."""
    name = re.sub(r"^layers\.", "encoder.layer.", name)
    for new, old in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value")):
        name = name.replace(f"attention.{new}", f"attention.{old}")
    return name.replace("attention.o_proj", "attention.output.dense")


def test_transformers_old_names_and_a_prefix_are_known(tmp_path: Path) -> None:
    theirs = transformers_dinov2()
    scramble(theirs)
    tensors = {f"dinov2.{old_names(name)}": x.clone() for name, x in theirs.state_dict().items()}
    assert any("attention.attention.query" in name for name in tensors)
    save_file(tensors, tmp_path / "old.safetensors")
    theirs.save_pretrained(tmp_path / "new")
    ours, again = started(DINOV2, tmp_path / "old.safetensors"), started(DINOV2, tmp_path / "new")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())


def test_a_vit_with_the_names_of_the_first_transformers(tmp_path: Path) -> None:
    theirs = transformers_vit()
    scramble(theirs)
    tensors = {}
    for name, x in theirs.state_dict().items():
        name = old_names(name).replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        tensors["vit." + name] = x.clone()
    save_file(tensors, tmp_path / "old.safetensors")
    theirs.save_pretrained(tmp_path / "new")
    ours, again = started(VIT, tmp_path / "old.safetensors"), started(VIT, tmp_path / "new")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())


@pytest.mark.parametrize("model", [VIT, DINOV2, REGISTERS, SWIGLU, DINOV3], ids=lambda model: model.architecture)
def test_timms_weights_are_ours_and_ours_are_timms(tmp_path: Path, model: ModelConfig) -> None:
    theirs = timm.create_model(model.architecture, **{**timm_arguments(model), "num_classes": 5}).eval()
    scramble(theirs)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    vit, x = started(model, tmp_path / "timm.safetensors"), noise(2, 3, model.img_size, model.img_size)
    assert torch.equal(vit(x), theirs.forward_head(theirs.forward_features(x), pre_logits=True))  # type: ignore[operator]
    save_file(vit.state_dict(), tmp_path / "ours.safetensors")
    again = timm.create_model(model.architecture, **timm_arguments(model)).eval()
    again.load_state_dict(load_file(tmp_path / "ours.safetensors"))
    assert torch.equal(again(x), vit(x))


def dinov2_names(vit: nn.Module, chunk: int, registers: bool) -> dict[str, Tensor]:
    """A backbone under the names of facebookresearch/dinov2: blocks in chunks, w12/w3, a table with a class row."""
    found = {}
    for name, x in vit.state_dict().items():
        if block := re.match(r"blocks\.(\d+)\.(.+)", name):
            name = f"blocks.{int(block[1]) // chunk}.{block[1]}.{block[2]}" if chunk else name
        name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if registers else name
        found[name.replace("reg_token", "register_tokens")] = x.clone()
    if registers:
        found["pos_embed"] = torch.cat([noise(1, 1, 48, seed=3), found["pos_embed"]], 1)
        found["cls_token"] = found["cls_token"] - found["pos_embed"][:, :1]
    return {**found, "mask_token": noise(1, 48, seed=4)}


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.parametrize("model", [DINOV2, SWIGLU], ids=["plain", "registers"])
def test_names_of_dinov2_itself(tmp_path: Path, model: ModelConfig, chunk: int) -> None:
    source = build_backbone(model, 3).eval()
    scramble(source)
    save_file(dinov2_names(source, chunk, model.registers > 0), tmp_path / "model.safetensors")
    vit, x = started(model, tmp_path), noise(2, 3, 56, 56)
    for ours, theirs in zip(forward_tokens(vit, x), forward_tokens(source, x), strict=True):  # type: ignore[arg-type]
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_dinov2_names_equal_timms_own_conversion(tmp_path: Path) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    source = build_backbone(SWIGLU, 3)
    scramble(source)
    stored = dinov2_names(source, 0, True)
    theirs = checkpoint_filter_fn(dict(stored), build_backbone(SWIGLU, 0))
    save_file(stored, tmp_path / "model.safetensors")
    ours = started(SWIGLU, tmp_path).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_without_a_class_row_fit_a_model_with_one_and_back(tmp_path: Path) -> None:
    """A token and its constant position are one sum, so the features are the same."""
    with_row, without = replace(DINOV2, registers=4), replace(REGISTERS, depth=2)
    for source_model, model in ((with_row, without), (without, with_row)):
        source = build_backbone(source_model, 3).eval()
        scramble(source)
        folder = tmp_path / source_model.architecture
        folder.mkdir()
        save_file(source.state_dict(), folder / "model.safetensors")
        vit, x = started(model, folder), noise(1, 3, 56, 56)
        for ours, theirs in zip(forward_tokens(vit, x), forward_tokens(source, x), strict=True):  # type: ignore[arg-type]
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    source = build_backbone(VIT, 3).bfloat16()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    vit = build_backbone(VIT, 0)
    loaded = load_start(vit, replace(START, weights=str(tmp_path)))
    assert {x.dtype for x in vit.state_dict().values()} == {torch.float32} and "bfloat16 weights became float32" in loaded.said
    assert all(torch.equal(x, source.state_dict()[name].float()) for name, x in vit.state_dict().items())


@pytest.mark.parametrize("convention", ["timm", "dinov2"])
def test_positions_of_another_grid_are_resized(tmp_path: Path, convention: str) -> None:
    source = build_backbone(replace(DINOV2, img_size=14 * 9), 3)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    vit = build_backbone(DINOV2, 0)
    loaded = load_start(vit, replace(START, weights=str(tmp_path), resize=convention))
    assert f"positions resized from 9x9 to 4x4 ({convention}'s convention)" in loaded.said
    assert vit.pos_embed is not None and source.pos_embed is not None
    assert torch.equal(vit.pos_embed[:, :1], source.pos_embed[:, :1])
    assert torch.equal(vit.pos_embed[:, 1:], resize_positions(source.pos_embed[:, 1:], (4, 4), convention))


@pytest.mark.parametrize("grid", [(16, 16), (28, 28), (7, 12)])
def test_conventions_of_resizing(grid: tuple[int, int]) -> None:
    """timm's by timm's own function; DINOv2's by definition: a pixel stands at (i + 0.5) / factor - 0.5, cubic of a = -0.75."""
    from timm.layers import resample_abs_pos_embed

    table = noise(1, 14 * 14, 8)
    theirs = resample_abs_pos_embed(table, [*grid], [14, 14], num_prefix_tokens=0)
    assert torch.allclose(resize_positions(table, grid, "timm"), theirs, atol=1e-6)
    assert torch.equal(resize_positions(table, (14, 14), "timm"), table) and resize_positions(table, (14, 14), "dinov2") is table

    def weights(size: int) -> Tensor:
        rows = torch.zeros(size, 14, dtype=torch.float64)
        for i in range(size):
            at = (i + 0.5) / ((size + 0.1) / 14) - 0.5
            for tap in range(int(at // 1) - 1, int(at // 1) + 3):
                t = abs(at - tap)
                w = 1.25 * t**3 - 2.25 * t**2 + 1 if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
                rows[i, min(max(tap, 0), 13)] += w
        return rows

    image = table.double().view(14, 14, 8)
    expected = torch.einsum("ia,jb,abd->ijd", weights(grid[0]), weights(grid[1]), image).flatten(0, 1)
    assert (resize_positions(table, grid, "dinov2")[0].double() - expected).abs().max() < 5e-6


def saved(tmp_path: Path, model: ModelConfig, drop: str = "", **more: Tensor) -> Path:
    tensors = {name: x for name, x in build_backbone(model, 3).state_dict().items() if name != drop}
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("drop", "more", "changes", "message"),
    [
        ("blocks.1.norm2.bias", {}, {}, "lacks blocks.1.norm2.bias"),
        ("", {"decoder.weight": torch.ones(2)}, {}, "holds decoder.weight, which the model has no place for"),
        ("", {"blocks.2.norm1.bias": torch.ones(48)}, {}, "holds blocks.2.norm1.bias"),
        ("", {"norm.weight": torch.ones(49)}, {}, r"norm.weight is \[49\] there, \[48\] here"),
        ("norm.bias", {}, {"may_lack": ["norm.bais"]}, "may_lack names 'norm.bais'.* near: norm.bias"),
        ("", {}, {"may_ignore": ["decoder.*"]}, r"may_ignore names 'decoder.\*', which nothing is called"),
        ("", {}, {"resize": "bilinear"}, "start.resize='bilinear': expected one of timm, dinov2"),
        ("", {}, {"branch": "ema"}, "start.branch='ema'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(
    tmp_path: Path, drop: str, more: dict[str, Tensor], changes: dict[str, object], message: str
) -> None:
    vit = build_backbone(VIT, 0)
    before = {name: x.clone() for name, x in vit.state_dict().items()}
    with pytest.raises(StartError, match=message):
        load_start(vit, replace(START, weights=str(saved(tmp_path, VIT, drop, **more)), **changes))  # type: ignore[arg-type]
    assert all(torch.equal(x, before[name]) for name, x in vit.state_dict().items())


def test_partial_loads_are_allowed_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path, VIT, "blocks.1.norm2.bias", **{"decoder.weight": torch.ones(2)})
    vit = build_backbone(VIT, 0)
    allowed = replace(START, weights=str(folder), may_lack=["blocks.*.norm2.bias"], may_ignore=["decoder.*"])
    assert load_start(vit, allowed).said[1:] == ["left aside: decoder.weight", "keep fresh values: blocks.1.norm2.bias"]


@pytest.mark.parametrize(
    ("source", "model", "hint"),
    [
        (VIT, replace(VIT, layer_scale=1e-5), "model.layer_scale=null"),
        (REGISTERS, DINOV2, "model.registers"),
        (replace(VIT, patch_size=8, img_size=32), VIT, "model.patch_size"),
        (SWIGLU, replace(REGISTERS, mlp_ratio=4.0), "model.architecture"),
    ],
)
def test_refusals_say_which_key_to_change(tmp_path: Path, source: ModelConfig, model: ModelConfig, hint: str) -> None:
    with pytest.raises(StartError, match=hint):
        started(model, saved(tmp_path, source))


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    torch.save({"cls_token": torch.ones(1)}, tmp_path / "weights.pth")
    with pytest.raises(StartError, match="weights.pth is not safetensors, and a pickle can run code"):
        started(VIT, tmp_path / "weights.pth")
    with pytest.raises(StartError, match="model.safetensors cannot be read"):
        started(VIT, tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(StartError, match="bad.safetensors cannot be read"):
        started(VIT, tmp_path / "bad.safetensors")


def test_a_file_in_shards(tmp_path: Path) -> None:
    theirs = transformers_dinov2()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = started(DINOV2, tmp_path / "one").state_dict(), started(DINOV2, tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_an_unknown_name_of_timm_names_the_nearest() -> None:
    with pytest.raises(StartError, match="knows no weights 'vit_small_patch14_dinov2.lvd142' ?; near: vit_small_patch14_dinov2"):
        started(VIT, Path("timm:vit_small_patch14_dinov2.lvd142"))


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StartError, match="timm/vit_small_patch14_dinov2.lvd142m could not be fetched .*without a network give"):
        started(DINOV2, Path("timm:vit_small_patch14_dinov2.lvd142m"))
    with pytest.raises(StartError, match="nobody/nothing-there could not be fetched"):
        started(DINOV2, Path("hf:nobody/nothing-there"))


def test_names_that_timm_has_no_word_for_stay(tmp_path: Path) -> None:
    assert set(timm_names({"rope_embed.periods": torch.ones(1), "odd": torch.ones(1)}, {"pos_embed"})) == {"odd"}


@pytest.mark.parametrize("biased", [True, False])
def test_dinov3_names_of_itself_and_biases_of_zero(tmp_path: Path, biased: bool) -> None:
    """facebookresearch/dinov3's own names; a model without biases takes weights whose biases are all zero, and no others."""
    model = DINOV3 if biased else replace(DINOV3, architecture="vit_small_patch16_dinov3")
    source = build_backbone(model, 3).eval()
    scramble(source)
    stored = {"mask_token": noise(1, 48), "rope_embed.periods": torch.ones(4)}
    for name, x in source.state_dict().items():
        name = re.sub(r"gamma_([12])$", r"ls\1.gamma", name).replace("reg_token", "storage_tokens")
        if not name.endswith(("q_bias", "v_bias")):
            stored[name] = x.clone()
    for depth in range(2):
        attn = source.get_submodule(f"blocks.{depth}.attn")
        parts = [attn.q_bias, torch.zeros(48), attn.v_bias] if biased else [torch.zeros(48)] * 3
        stored[f"blocks.{depth}.attn.qkv.bias"] = torch.cat([x.detach() for x in parts])  # type: ignore[union-attr,arg-type]
        stored[f"blocks.{depth}.attn.qkv.bias_mask"] = torch.ones(144)
    save_file(stored, tmp_path / "model.safetensors")
    vit = started(model, tmp_path)
    assert all(torch.equal(x, source.state_dict()[name]) for name, x in vit.state_dict().items())
    if not biased:
        save_file({**stored, "blocks.0.attn.qkv.bias": torch.ones(144)}, tmp_path / "model.safetensors")
        with pytest.raises(StartError, match=r"holds blocks.0.attn.qkv.bias, which the model has no place for"):
            started(model, tmp_path)
