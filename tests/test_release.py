"""A release is opened by timm alone, gives the checkpoint's features to the bit, and its card says what is known."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from histoscale.data.ranks import Ranks
from histoscale.pretrain.backbone import ModelConfig, build_backbone
from histoscale.pretrain.checkpoint import CheckpointError, CheckpointState, read_checkpoint, write_checkpoint
from histoscale.pretrain.release import ReleaseConfig, read_backbone, write_release

PLAIN = {"architecture": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "width": 48, "depth": 2, "heads": 3,
         "mlp_ratio": None, "registers": 0, "layer_scale": None, "drop_path": 0.0}  # fmt: skip
REGISTERS = {**PLAIN, "architecture": "vit_small_patch14_reg4_dinov2", "patch_size": 16, "registers": 4, "layer_scale": 1e-5}
SWIGLU = {**PLAIN, "architecture": "vit_giant_patch14_reg4_dinov2", "patch_size": 16, "registers": 4, "layer_scale": 1e-5}
RELEASE = ReleaseConfig(name="tiny", branch="teacher", precision="fp32", license="cc-by-nc-4.0", embedding="cls+mean")


def checkpoint(folder: Path, model: dict[str, Any]) -> CheckpointState:
    """A checkpoint whose student and teacher have different random weights."""
    tensors = {}
    for seed, branch in enumerate(("student", "teacher")):
        vit = build_backbone(ModelConfig(**model), seed)
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
        tensors |= {f"{branch}.backbone.{name}": x for name, x in vit.state_dict().items()}
        tensors[f"{branch}.head.w"] = torch.zeros(3)
    identity = {
        "model": model,
        "views": {"mean": [0.7, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
        "optim": {"global_batch": 24, "precision": "fp32"},
        "schedule": {"steps": 20},
        "facts": {
            "sampler": {"mpps": [0.5, 1.0], "weights": [1, 1], "patch_px": 32},
            "data": {"slides": 7},
            "transductive": False,
        },
    }
    write_checkpoint(folder, 20, tensors, {"identity": identity}, Ranks(0, 1, 0, torch.device("cpu"), False))
    return read_checkpoint(folder)


@pytest.mark.parametrize("model", [PLAIN, REGISTERS, SWIGLU], ids=["plain", "registers", "swiglu"])
@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_timm_gives_the_same_features(tmp_path: Path, model: dict[str, Any], branch: str) -> None:
    state = checkpoint(tmp_path / "run", model)
    facts = write_release(state, tmp_path / "out", ReleaseConfig("tiny", branch, "fp32", "mit", "cls"), None)
    vit = read_backbone(state, branch)
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(again.forward_features(x), vit.forward_features(x))
        assert again(x).shape == (2, 48)
        larger = again.forward_features(torch.zeros(1, 3, 64, 64))
    assert larger.shape[1] == 1 + model["registers"] + (64 // model["patch_size"]) ** 2
    assert facts["branch"] == branch and facts["steps"] == 20 and facts["patches_seen"] == 480
    prefix = f"{branch}.backbone."
    stored = load_file(next((tmp_path / "run/step-20").glob("*.safetensors")))
    released = load_file(tmp_path / "out/model.safetensors")
    assert released.keys() == {name.removeprefix(prefix) for name in stored if name.startswith(prefix)}


def test_preprocessing_licence_and_tag_are_ours(tmp_path: Path) -> None:
    write_release(checkpoint(tmp_path / "run", REGISTERS), tmp_path / "out", RELEASE, None)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert [list(data[name]) for name in ("mean", "std", "input_size")] == [[0.7, 0.5, 0.6], [0.2, 0.3, 0.25], [3, 32, 32]]
    assert model.pretrained_cfg["license"] == "cc-by-nc-4.0" and model.pretrained_cfg["tag"] == "tiny"
    processor = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.7, 0.5, 0.6] and processor["crop_size"] == {"height": 32, "width": 32}


def test_the_card_tells_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "run", PLAIN)
    write_release(state, tmp_path / "a", RELEASE, None)
    assert "Not measured." in (tmp_path / "a/README.md").read_text()
    accuracy, auc = {"value": 0.81234, "low": 0.7, "high": 0.9}, {"value": 0.5, "low": None, "high": None}
    scores = {"probe": {"accuracy": accuracy, "auc": auc}}
    write_release(state, tmp_path / "b", RELEASE, scores)
    card = (tmp_path / "b/README.md").read_text()
    assert "| probe.accuracy | 0.812 [0.700, 0.900] |" in card and "| probe.auc | 0.500 interval withheld |" in card
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n") and "0.5, 1 um/px" in card and "slides: 7" in card
    assert "Transductive" not in card


def test_bf16_halves_the_file(tmp_path: Path) -> None:
    half = ReleaseConfig("t", "teacher", "bf16", "mit", "cls")
    facts = write_release(checkpoint(tmp_path / "run", PLAIN), tmp_path / "out", half, None)
    assert {x.dtype for x in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert facts["precision"] == "bf16"


@pytest.mark.parametrize("wrong", [{"branch": "both"}, {"precision": "fp8"}, {"embedding": "max"}])
def test_unknown_words_are_refused(tmp_path: Path, wrong: dict[str, str]) -> None:
    words = {"name": "t", "branch": "teacher", "precision": "fp32", "license": "mit", "embedding": "cls", **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        write_release(checkpoint(tmp_path / "run", PLAIN), tmp_path / "out", ReleaseConfig(**words), None)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "run", PLAIN)
    state.facts["identity"]["model"]["depth"] = 3
    with pytest.raises(CheckpointError, match="do not fit"):
        read_backbone(state, "teacher")
