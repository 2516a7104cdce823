"""Encoders: releases as timm opens them, checkpoints, untrained floors, colour; the hash; what is refused."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from histoscale.data.ranks import open_ranks
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.colour import colour_features
from histoscale.eval.encoder import EncoderError, open_encoder, random_floor_spec
from histoscale.eval.pool import pooled
from histoscale.pretrain.backbone import ModelConfig, build_backbone, timm_arguments
from histoscale.pretrain.checkpoint import write_checkpoint

MODEL = ModelConfig("vit_tiny_patch16_224", 32, 8, 24, 2, 2, None, 2, 0.1, 0.0)
MEAN, STD = [0.7, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("cache")
    return Store(StorageConfig({}, "fsspec", str(folder), 1 << 30, 5.0, 5.0, 60.0))


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A small release with LayerScale and registers, as the contract says."""
    vit = build_backbone(MODEL, seed=1)
    for block in vit.blocks:
        torch.nn.init.constant_(block.ls1.gamma, 1.0)
    save_file({name: x.contiguous() for name, x in vit.state_dict().items()}, tmp_path / "model.safetensors")
    preprocessing = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "interpolation": "bicubic", "license": "other"}
    config = {"architecture": MODEL.architecture, "num_classes": 0, "num_features": 24, "global_pool": "token",
              "model_args": timm_arguments(MODEL), "pretrained_cfg": preprocessing}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = {"mpp": {"trained_at": [0.5]}, "tile_px": 48, "transductive": False}
    (tmp_path / "MODEL.json").write_text(json.dumps(card))
    return tmp_path


def pixels(side: int = 32, count: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))


def test_a_release_gives_what_timm_gives(release: Path, store: Store) -> None:
    encoder = open_encoder(str(release), store)
    model = timm.create_model(f"local-dir:{release}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(data[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        tokens = model.forward_features((pixels().float() / 255 - mean) / std)
    cls, patches = encoder(pixels())
    assert torch.equal(cls, tokens[:, 0]) and torch.equal(patches, tokens[:, 3:])  # class token, two registers, 16 patches
    assert patches.shape == (5, 16, 24) and cls.dtype == torch.float32
    assert (encoder.width, encoder.size_px, encoder.mpp, encoder.tile_px, encoder.transductive) == (24, 32, 0.5, 48, False)


def test_vectors_are_the_class_token_and_the_mean_and_keep_no_tokens_alive(release: Path, store: Store) -> None:
    encoder = open_encoder(str(release), store)
    cls, patches = encoder(pixels())
    vectors = encoder.vectors(pixels())
    assert torch.equal(vectors[0], cls) and torch.allclose(vectors[1], patches.mean(1))
    assert vectors[0].untyped_storage().nbytes() == cls.numel() * 4
    assert torch.equal(pooled(*vectors, "cls+mean"), torch.cat(vectors, dim=1))
    with pytest.raises(ValueError, match="pool is 'max'"):
        pooled(*vectors, "max")


def test_other_sizes_are_resized_and_the_effective_mpp_says_so(release: Path, store: Store) -> None:
    encoder = open_encoder(str(release), store)
    big = pixels(8).repeat_interleave(16, 2).repeat_interleave(16, 3)  # 128 px of flat squares: 32 px of the same squares
    assert encoder(big)[1].shape == (5, 16, 24)
    assert encoder.effective_mpp(0.5, 128) == 2.0 and encoder.effective_mpp(0.5, 32) == 0.5
    smooth = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)
    torch.testing.assert_close(encoder(smooth)[0], encoder(smooth[:, :, :32, :32])[0], atol=1e-5, rtol=1e-5)


def test_a_checkpoint_and_its_release_are_one_encoder(release: Path, store: Store, tmp_path: Path) -> None:
    weights = load_file(release / "model.safetensors")
    tensors = {f"teacher.backbone.{name}": x for name, x in weights.items()}
    tensors |= {f"student.backbone.{name}": x + 1 for name, x in weights.items()}
    identity = {"model": asdict(MODEL), "views": {"mean": MEAN, "std": STD},
                "facts": {"sampler": {"mpps": [0.5], "patch_px": 48}, "transductive": False}}  # fmt: skip
    write_checkpoint(tmp_path / "checkpoints", 7, tensors, {"identity": identity}, open_ranks("cpu"))
    released = open_encoder(str(release), store)
    for spec in (tmp_path / "checkpoints" / "step-7", tmp_path / "checkpoints"):
        encoder = open_encoder(str(spec), store)
        assert torch.equal(encoder(pixels())[0], released(pixels())[0])
        assert encoder.hash == released.hash and (encoder.mpp, encoder.tile_px) == (0.5, 48)


def test_the_random_floor_is_the_same_architecture_untrained_without_layer_scale(release: Path, store: Store) -> None:
    trained = open_encoder(str(release), store)
    spec = random_floor_spec(str(release))
    assert spec is not None and random_floor_spec(spec) == spec and random_floor_spec("colour") is None
    before = torch.get_rng_state()
    untrained = [open_encoder(spec, store, seed=seed) for seed in (0, 1, 0)]
    assert torch.equal(torch.get_rng_state(), before)
    assert untrained[0].hash == untrained[2].hash != untrained[1].hash
    assert trained.model is not None and untrained[0].model is not None
    own = {name: x.shape for name, x in trained.model.state_dict().items() if not name.endswith("gamma")}
    assert {name: x.shape for name, x in untrained[0].model.state_dict().items()} == own
    assert (untrained[0].size_px, untrained[0].mean) == (trained.size_px, trained.mean)


def test_timm_names_have_their_own_preprocessing(store: Store) -> None:
    encoder = open_encoder("random:resnet18", store)
    cls, patches = encoder(pixels(64, 2))
    assert encoder.size_px == 224 and cls.shape == (2, 512) and patches.shape == (2, 49, 512)
    torch.testing.assert_close(cls, patches.mean(1))  # a network without a class token
    dinov2 = open_encoder("random:vit_small_patch14_reg4_dinov2", store).model
    assert dinov2 is not None and not [name for name in dinov2.state_dict() if "gamma" in name]


def test_colour_is_an_encoder_without_patches(store: Store) -> None:
    encoder = open_encoder("colour", store)
    cls, mean = encoder.vectors(pixels(20))
    assert cls.shape == (5, 42) and mean.shape == (5, 0) and pooled(cls, mean, "cls+mean") is cls
    torch.testing.assert_close(cls.double(), torch.from_numpy(colour_features(pixels(20).numpy())), rtol=1e-6, atol=1e-6)
    assert encoder.effective_mpp(0.5, 128) == 0.5


def test_the_hash_knows_weights_preprocessing_and_precision(release: Path, store: Store) -> None:
    first = open_encoder(str(release), store)
    assert open_encoder(str(release), store).hash == first.hash
    assert open_encoder(str(release), store, precision="bf16").hash != first.hash
    config = json.loads((release / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (release / "config.json").write_text(json.dumps(config))
    assert open_encoder(str(release), store).hash != first.hash
    weights = load_file(release / "model.safetensors")
    weights["norm.bias"][3] += 1e-3
    config["pretrained_cfg"]["mean"] = MEAN
    (release / "config.json").write_text(json.dumps(config))
    save_file(weights, release / "model.safetensors")
    assert open_encoder(str(release), store).hash != first.hash


def without_a_tensor(release: Path) -> None:
    weights = load_file(release / "model.safetensors")
    del weights["norm.bias"]
    save_file(weights, release / "model.safetensors")


def cut_short(release: Path) -> None:
    path = release / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_mean(release: Path) -> None:
    config = json.loads((release / "config.json").read_text())
    del config["pretrained_cfg"]["mean"]
    (release / "config.json").write_text(json.dumps(config))


def no_json(release: Path) -> None:
    (release / "config.json").write_text("{")


def no_config(release: Path) -> None:
    (release / "config.json").unlink()


@pytest.mark.parametrize("harm, words", [
    (without_a_tensor, "do not fit its config in 1 tensors: norm.bias"),
    (cut_short, "cannot be read"),
    (without_mean, "lacks 'mean'"),
    (no_json, "is not JSON"),
    (no_config, "is no release"),
])  # fmt: skip
def test_a_damaged_release_is_refused_in_one_sentence(
    release: Path, store: Store, harm: Callable[[Path], None], words: str
) -> None:
    harm(release)
    with pytest.raises(EncoderError, match=words):
        open_encoder(str(release), store)


@pytest.mark.parametrize("spec, words", [
    ("timm:vit_tiny_patch16_22", "knows no model 'vit_tiny_patch16_22'"),
    ("nowhere/at/all", "no release folder"),
    ("random:nowhere", "no release folder"),
    ("random:colour", "no release folder"),
])  # fmt: skip
def test_a_spec_that_names_nothing_is_refused(store: Store, spec: str, words: str) -> None:
    with pytest.raises(EncoderError, match=words):
        open_encoder(spec, store)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
def test_only_uint8_rgb_is_taken(store: Store, wrong: Any) -> None:
    encoder = open_encoder("colour", store)
    with pytest.raises(EncoderError, match="expected uint8"):
        encoder(wrong)
    with pytest.raises(EncoderError, match="precision is 'fp8'"):
        open_encoder("colour", store, precision="fp8")
