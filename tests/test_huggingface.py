"""Models of transformers and of timm's hub as encoders: their own features, offline, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.encoder import EncoderError, open_encoder, random_floor_spec

transformers = pytest.importorskip("transformers", reason="transformers (extra `hf`) is not installed")

SIZES: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
SIDE = 28
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": SIDE}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.7, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "do_convert_rgb": True,
}  # fmt: skip


def dinov2() -> Any:
    return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=56, patch_size=14))


def registers() -> Any:
    config = transformers.Dinov2WithRegistersConfig(**SIZES, image_size=56, patch_size=14, num_register_tokens=3)
    return transformers.Dinov2WithRegistersModel(config)


def dinov3() -> Any:
    config = transformers.DINOv3ViTConfig(**SIZES, intermediate_size=96, image_size=56, patch_size=14, num_register_tokens=4)
    return transformers.DINOv3ViTModel(config)


def vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=96, image_size=SIDE, patch_size=14))


def stretched_vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=96, image_size=56, patch_size=14))


def deit() -> Any:
    return transformers.DeiTModel(transformers.DeiTConfig(**SIZES, intermediate_size=96, image_size=SIDE, patch_size=14))


def siglip() -> Any:
    config = transformers.SiglipVisionConfig(**SIZES, intermediate_size=96, image_size=SIDE, patch_size=14)
    return transformers.SiglipVisionModel(config)


def convnext() -> Any:
    return transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 48], depths=[1, 1, 1, 1]))


MODELS: list[tuple[Callable[[], Any], int]] = [(dinov2, 1), (registers, 4), (dinov3, 5), (vit, 1), (stretched_vit, 1), (deit, 2),
                                               (siglip, 0)]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(StorageConfig({}, "fsspec", str(tmp_path_factory.mktemp("cache")), 1 << 30, 5.0, 5.0, 60.0))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the hub, and no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def scramble(model: torch.nn.Module) -> None:
    """Weights far from any initialisation."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))


def saved(folder: Path, make: Callable[[], Any] = dinov2, **processor: Any) -> tuple[Path, Any]:
    model = make().eval()
    scramble(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    return folder, model


def pixels(side: int = SIDE, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize("make, prefix", MODELS, ids=[make.__name__ for make, _ in MODELS])
def test_features_are_those_of_transformers_with_its_own_processor(
    tmp_path: Path, store: Store, make: Callable[[], Any], prefix: int
) -> None:
    folder, model = saved(tmp_path / "model", make)
    encoder = open_encoder(f"hf:{folder}", store)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = processor(list(pixels()), return_tensors="pt")
    stretch = {"interpolate_pos_encoding": True} if make is stretched_vit else {}
    with torch.inference_mode():
        expected = model(**inputs, **stretch).last_hidden_state
    cls, patches = encoder(pixels())
    grid = (SIDE // 14) ** 2
    assert patches.shape == (3, grid, 48) and expected.shape[1] == grid + prefix
    torch.testing.assert_close(patches, expected[:, prefix:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cls, expected[:, 0] if prefix else expected.mean(1), atol=1e-5, rtol=1e-5)
    assert (encoder.size_px, encoder.mean, encoder.std) == (SIDE, (0.7, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert encoder(pixels(90))[1].shape == patches.shape
    assert open_encoder(f"hf:{folder}", store).hash == encoder.hash  # a head that no feature reads is drawn anew each time


def test_a_map_instead_of_tokens_is_meaned(tmp_path: Path, store: Store) -> None:
    sides = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    folder, model = saved(tmp_path / "model", convnext, **sides, resample=2)
    encoder = open_encoder(f"hf:{folder}", store)
    mean, std = (torch.tensor(PROCESSOR[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    with torch.inference_mode():
        expected = model((pixels(64).float() / 255 - mean) / std).last_hidden_state
    cls, patches = encoder(pixels(64))
    torch.testing.assert_close(patches, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert patches.shape == (3, 4, 48) and torch.allclose(cls, patches.mean(1), atol=1e-5) and encoder.interpolation == "bilinear"


@pytest.mark.parametrize("make", [dinov2, dinov3, vit])
def test_the_random_floor_is_the_same_network_untrained(tmp_path: Path, store: Store, make: Callable[[], Any]) -> None:
    folder, _ = saved(tmp_path / "model", make)
    config = json.loads((folder / "config.json").read_text())
    if "layerscale_value" in config:
        (folder / "config.json").write_text(json.dumps({**config, "layerscale_value": 1e-5}))
    trained = open_encoder(f"hf:{folder}", store)
    spec = random_floor_spec(f"hf:{folder}")
    assert spec == f"random:hf:{folder}"
    (folder / "model.safetensors").unlink()  # the floor needs no weights
    before = torch.get_rng_state()
    floors = [open_encoder(spec, store, seed=seed) for seed in (0, 1, 0)]
    assert torch.equal(torch.get_rng_state(), before)
    assert floors[0].hash == floors[2].hash != floors[1].hash != trained.hash
    assert torch.equal(floors[0](pixels())[0], floors[2](pixels())[0])
    assert trained.model is not None and floors[0].model is not None
    own, theirs = trained.model.state_dict(), floors[0].model.state_dict()
    assert {n: x.shape for n, x in own.items()} == {n: x.shape for n, x in theirs.items()}
    scales = [x for name, x in theirs.items() if name.endswith("lambda1")]
    assert all((x == 1).all() for x in scales) and bool(scales) == (make is not vit)
    cls, _ = floors[0](pixels())
    assert float((cls - cls.mean(0)).norm() / cls.norm()) > 1e-3  # it tells images apart


def test_layer_scale_of_timms_eva_is_dropped_from_the_floor_too(store: Store) -> None:
    encoder = open_encoder("random:vit_small_patch16_dinov3.lvd1689m", store)
    assert encoder.model is not None
    trained = timm.create_model("vit_small_patch16_dinov3.lvd1689m", num_classes=0)
    scales = [name for name, _ in trained.named_parameters() if "gamma" in name]
    own = dict(encoder.model.named_parameters())
    assert scales and own.keys() == {name for name, _ in trained.named_parameters()} - set(scales)
    block: Any = encoder.model.blocks[0]
    x = torch.randn(1, 5, 384, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert float((block(x) - x).norm() / x.norm()) > 0.01  # 1e-5 with the scales at their start


def test_weights_saved_in_half_precision_are_used_in_single(tmp_path: Path, store: Store) -> None:
    folder, model = saved(tmp_path / "model")
    model.half().save_pretrained(folder)
    encoder = open_encoder(f"hf:{folder}", store)
    assert encoder.model is not None and {p.dtype for p in encoder.model.parameters()} == {torch.float32}


def test_weights_without_what_no_feature_reads_are_whole(tmp_path: Path, store: Store) -> None:
    folder, _ = saved(tmp_path / "model", vit)
    first = open_encoder(f"hf:{folder}", store)
    weights = load_file(folder / "model.safetensors")
    pooler = [name for name in weights if "pooler" in name]
    assert pooler
    save_file({n: x for n, x in weights.items() if n not in pooler}, folder / "model.safetensors", {"format": "pt"})
    again = open_encoder(f"hf:{folder}", store)
    assert again.hash == first.hash and torch.equal(again(pixels())[0], first(pixels())[0])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def code_of_its_own(folder: Path) -> None:
    (folder / "modeling_x.py").write_text("raise SystemExit('run')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "x", "auto_map": {"AutoConfig": "modeling_x.X", "AutoModel": "modeling_x.X"}}
    (folder / "config.json").write_text(json.dumps(config))


def of_timm(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def absurd(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))


def words(folder: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=96, vocab_size=100)).save_pretrained(folder)


def masked(folder: Path) -> None:
    config = transformers.ViTMAEConfig(**SIZES, intermediate_size=96, image_size=SIDE, patch_size=14)
    transformers.ViTMAEModel(config).save_pretrained(folder)


def no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def processor(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **changes}))

    return change


@pytest.mark.parametrize("harm, said", [
    (pickled, r"only pickled weights \(pytorch_model.bin\), which are never read: convert them to model.safetensors"),
    (no_weights, "holds no model.safetensors; for the untrained network, give random:hf:"),
    (cut_short, "its weights cannot be read"),
    (lacking, "lack 1 tensors of its config: layernorm.bias"),
    (code_of_its_own, r"no model type 'x'; it asks for code of its own \(auto_map\), which is never run"),
    (of_timm, "names no model_type of transformers .it is in timm's form, give it as hf-hub:"),
    (no_json, "is not JSON"),
    (absurd, "cannot build|takes no images|cannot be read"),
    (words, "BertModel of transformers takes no images of 28 px alone"),
    (masked, "vit_mae gives 2 tokens for images of 28 px: expected one for each patch of 14 px"),
    (no_processor, "no preprocessor_config.json says how its images are prepared"),
    (processor(crop_size={"height": 28, "width": 42}), "expected one square size"),
    (processor(do_rescale=False), "expected 1/255"),
    (processor(resample=0), "has resample=.*: expected 2 .bilinear. or 3 .bicubic."),
    (processor(image_processor_type="NoSuchProcessor"), "its preprocessor_config.json cannot be used"),
])  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, store: Store, harm: Callable[[Path], None], said: str
) -> None:
    folder, _ = saved(tmp_path / "model")
    harm(folder)
    with pytest.raises(EncoderError, match=said) as error:
        open_encoder(f"hf:{folder}", store)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec, said", [
    ("hf:no/such/folder", "no folder, and no name that the hub could know: expected a local folder or owner/name"),
    ("hf:owner/absent", "is no local folder and the hub does not give it .*offline, give a folder"),
    ("hf-hub:owner/absent", "is no local folder and the hub does not give it"),
    ("random:hf:owner/absent", "is no local folder and the hub does not give it"),
    ("hf:", "expected a local folder or owner/name"),
])  # fmt: skip
def test_a_name_that_nothing_answers_is_refused(store: Store, spec: str, said: str) -> None:
    with pytest.raises(EncoderError, match=said) as error:
        open_encoder(spec, store)
    assert "\n" not in str(error.value)


def cached(hub: Path, name: str) -> Path:
    """The folder in which the hub's client keeps a repository that it has fetched."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("a" * 40)


def test_names_of_the_hub_are_found_in_its_cache(tmp_path: Path, store: Store, offline: Path) -> None:
    here, _ = saved(tmp_path / "model")
    shutil.copytree(here, cached(offline, "owner/dino"), dirs_exist_ok=True)
    encoder = open_encoder("hf:owner/dino", store)
    assert encoder.hash == open_encoder(f"hf:{here}", store).hash and encoder.name == "hf:owner/dino"
    assert open_encoder("random:hf:owner/dino", store).width == 48


def test_a_repository_of_timm_is_its_features_and_loses_its_classifier(store: Store, offline: Path) -> None:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **small).eval()
    folder = cached(offline, "owner/vit")
    timm.models.save_for_hf(model, folder, model_args=small, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps(config))
    assert "head.weight" in load_file(folder / "model.safetensors")
    encoder = open_encoder("hf-hub:owner/vit", store)
    with torch.inference_mode():
        expected = model.forward_features((pixels(32).float() / 255 - 0.5) / 0.5)
    assert torch.equal(encoder(pixels(32))[0], expected[:, 0])
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="only pickled weights"):
        open_encoder("hf-hub:owner/vit", store)
