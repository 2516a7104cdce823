"""A release is opened by timm alone, gives the checkpoint's features to the bit, and its card says what is known."""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import pytest
import timm
import torch
from safetensors.torch import load_file

from histoscale.data.ranks import Ranks
from histoscale.launch.run import execute
from histoscale.pretrain.backbone import ModelConfig, build_backbone
from histoscale.pretrain.checkpoint import CheckpointError, CheckpointState, read_checkpoint, write_checkpoint
from histoscale.pretrain.release import FILES, ReleaseConfig, default_mpp, read_backbone, write_release

PLAIN = {"architecture": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "width": 48, "depth": 2, "heads": 3,
         "mlp_ratio": None, "registers": 0, "layer_scale": None, "drop_path": 0.0}  # fmt: skip
REGISTERS = {**PLAIN, "architecture": "vit_small_patch14_reg4_dinov2", "patch_size": 16, "registers": 4, "layer_scale": 1e-5}
SWIGLU = {**PLAIN, "architecture": "vit_giant_patch14_reg4_dinov2", "patch_size": 16, "registers": 4, "layer_scale": 1e-5}
IDENTITY_VIEWS = {"mean": [0.7, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
ROOT = Path(__file__).parent.parent
RELEASE = ReleaseConfig(name="tiny", branch="teacher", license="cc-by-nc-4.0", embedding="cls+mean")


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
        "views": IDENTITY_VIEWS,
        "precision": "fp32",
        "optim": {"global_batch": 24},
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
    facts = write_release(state, tmp_path / "out", "fp32", ReleaseConfig("tiny", branch, "mit", "cls"), None)
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
    write_release(checkpoint(tmp_path / "run", REGISTERS), tmp_path / "out", "fp32", RELEASE, None)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert [list(data[name]) for name in ("mean", "std", "input_size")] == [[0.7, 0.5, 0.6], [0.2, 0.3, 0.25], [3, 32, 32]]
    assert model.pretrained_cfg["license"] == "cc-by-nc-4.0" and model.pretrained_cfg["tag"] == "tiny"
    processor = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.7, 0.5, 0.6] and processor["crop_size"] == {"height": 32, "width": 32}


def test_the_card_tells_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "run", PLAIN)
    write_release(state, tmp_path / "a", "fp32", RELEASE, None)
    assert "Not measured." in (tmp_path / "a/README.md").read_text()
    accuracy, auc = {"value": 0.81234, "low": 0.7, "high": 0.9}, {"value": 0.5, "low": None, "high": None}
    scores = {"probe": {"accuracy": accuracy, "auc": auc}}
    write_release(state, tmp_path / "b", "fp32", RELEASE, scores)
    card = (tmp_path / "b/README.md").read_text()
    assert "| probe.accuracy | 0.812 [0.700, 0.900] |" in card and "| probe.auc | 0.500 interval withheld |" in card
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n") and "0.5, 1 um/px" in card and "slides: 7" in card
    assert "Transductive" not in card


def test_bf16_halves_the_file(tmp_path: Path) -> None:
    facts = write_release(checkpoint(tmp_path / "run", PLAIN), tmp_path / "out", "bf16", RELEASE, None)
    assert {x.dtype for x in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert facts["precision"] == "bf16"


@pytest.mark.parametrize("wrong", [{"branch": "both"}, {"precision": "fp8"}, {"embedding": "max"}])
def test_unknown_words_are_refused(tmp_path: Path, wrong: dict[str, str]) -> None:
    words = {"precision": "fp32", **asdict(RELEASE), **wrong}
    precision, config = words.pop("precision"), ReleaseConfig(**words)
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        write_release(checkpoint(tmp_path / "run", PLAIN), tmp_path / "out", precision, config, None)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "run", PLAIN)
    state.facts["identity"]["model"]["depth"] = 3
    with pytest.raises(CheckpointError, match="do not fit"):
        read_backbone(state, "teacher")


DEMO = {**PLAIN, "img_size": 64}
SHAPES = {
    "plain": PLAIN, "registers": REGISTERS, "swiglu": SWIGLU, "demo": DEMO,
    "patch14": {**REGISTERS, "patch_size": 14, "img_size": 56},
    "patch16_own_size": {**PLAIN, "patch_size": 16, "img_size": 96, "layer_scale": 1e-5},
    "rotary": {**PLAIN, "architecture": "vit_small_patch16_dinov3", "patch_size": 16, "registers": 4, "layer_scale": 1e-5},
}  # fmt: skip


def code_of(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)


@pytest.mark.parametrize(("shape", "precision"), [*((shape, "fp32") for shape in SHAPES), ("plain", "bf16"), ("rotary", "bf16")])
def test_timm_transformers_and_torch_hub_agree_and_the_card_runs_as_printed(
    tmp_path: Path, shape: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    model, out = SHAPES[shape], tmp_path / "release"
    write_release(checkpoint(tmp_path / "run", model), out, precision, RELEASE, None)
    images = torch.randint(0, 256, (2, 3, model["img_size"], model["img_size"]), dtype=torch.uint8)
    seen = transformers.AutoImageProcessor.from_pretrained(out)(list(images), return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(IDENTITY_VIEWS[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert torch.allclose(seen, (images / 255 - mean) / std, atol=1e-5)
    ours = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    theirs = transformers.AutoModel.from_pretrained(out).eval()
    hub = torch.hub.load(str(ROOT), "histoscale", str(out), source="local")
    with torch.inference_mode():
        tokens = ours.forward_features(seen)
        assert torch.equal(theirs(seen).last_hidden_state, tokens) and torch.equal(hub.forward_features(seen), tokens)
    memory = fsspec.filesystem("memory")
    for path in out.iterdir():
        memory.pipe(f"/{shape}-{precision}/{path.name}", path.read_bytes())
    stored = torch.hub.load(str(ROOT), "histoscale", f"memory://{shape}-{precision}", source="local")
    with torch.inference_mode():
        assert torch.equal(stored.forward_features(seen), tokens)
    own, told = (timm.data.resolve_model_data_config(model) for model in (ours, hub))
    assert {name: list(own[name]) for name in ("mean", "std", "input_size")} == {
        name: list(told[name]) for name in ("mean", "std", "input_size")
    }
    assert {path.name for path in out.iterdir()} == set(FILES)
    monkeypatch.chdir(out)
    blocks = code_of((out / "README.md").read_text())
    found = []
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        found.append(names["tokens"])
    assert len(found) == 2 and found[0].shape == found[1].shape and torch.allclose(found[0], found[1], atol=1e-3)


def test_no_file_of_a_release_says_where_things_lay(tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "run", PLAIN)
    places = [f"{tmp_path}/weights/model.safetensors", "~/w/model.safetensors", "az://secret/w/model.safetensors"]
    for place in [*places, f"hf:{tmp_path}/weights/model.safetensors"]:
        state.facts["identity"]["start"] = {"weights": place, "origin": "timm:vit_small", "ratio": "1/2"}
        write_release(state, tmp_path / "out", "fp32", RELEASE, {"probe": {"encoder": place, "score": 0.5}})
        recipe = json.loads((tmp_path / "out/MODEL.json").read_text())["recipe"]["start"]
        assert recipe["weights"].endswith("model.safetensors")
        assert (recipe["origin"], recipe["ratio"]) == ("timm:vit_small", "1/2")
        for path in (tmp_path / "out").iterdir():
            assert not any(text in path.read_bytes() for text in (str(tmp_path).encode(), b"secret", b"~/w"))


@pytest.mark.parametrize(
    ("mpps", "magnification", "expected"),
    [([0.25, 0.5, 1.0], "discrete", 0.5), ([2.0, 1.0], "discrete", 1.0), ([0.25, 0.75], "discrete", 0.25),
     ([0.25, 2.0], "log_uniform", 0.5), ([1.0, 2.0], "log_uniform", 1.0), ([], "discrete", None)],
)  # fmt: skip
def test_the_default_magnification_is_the_trained_one_nearest_half_a_micrometre(
    mpps: list[float], magnification: str, expected: float | None
) -> None:
    assert default_mpp(mpps, magnification) == expected


def arguments(tmp_path: Path, *more: str) -> list[str]:
    return [f"checkpoint={tmp_path / 'run/step-20'}", f"out={tmp_path / 'out'}", "logging.progress=lines", *more]


def test_the_folder_holds_a_release_alone_and_a_second_call_has_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "run", PLAIN)
    assert execute("release", arguments(tmp_path)) == 0
    said = capsys.readouterr().err
    assert "README.md" in said and "next: histoscale embed encoder=" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    record = tmp_path / ".out.run"
    assert {"state.json", "config.yaml", "summary.json"} <= {path.name for path in record.iterdir()} and str(record) in said
    weights = tmp_path / "out/model.safetensors"
    before = weights.stat().st_mtime_ns
    assert execute("release", arguments(tmp_path)) == 0
    assert "nothing to do" in capsys.readouterr().err and weights.stat().st_mtime_ns == before
    weights.write_bytes(b"damaged")
    assert execute("release", arguments(tmp_path)) == 0
    timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    shutil.rmtree(tmp_path / "out")
    assert execute("release", arguments(tmp_path)) == 0 and weights.exists()
    assert execute("release", arguments(tmp_path, "precision=bf16")) == 2  # another result
    assert "'fp32' there, 'bf16' now" in capsys.readouterr().err


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    """Also where the target lies on another disk, which no rename leaves: what is half written stands beside it."""
    checkpoint(tmp_path / "run", PLAIN)
    (tmp_path / "disk/target").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk/target")
    for _ in range(2):
        assert execute("release", arguments(tmp_path)) == 0
        assert (tmp_path / "out").is_symlink() and {path.name for path in (tmp_path / "disk/target").iterdir()} == set(FILES)
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["target"]
        (tmp_path / "out/README.md").write_text("edited")


def test_what_stood_stays_until_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that refuses the second rename, a kill before it, and a mount point, which cannot be renamed."""
    checkpoint(tmp_path / "run", PLAIN)
    out, weights = tmp_path / "out", tmp_path / "out/model.safetensors"
    assert execute("release", arguments(tmp_path)) == 0
    weights.write_bytes(b"damaged")
    rename = os.rename

    def refusing(old: Path, new: Path) -> None:
        if str(old).endswith(".partial"):
            raise OSError("no space")
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refusing)
        assert execute("release", arguments(tmp_path)) == 2 and weights.read_bytes() == b"damaged"
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path) == out)
        assert execute("release", arguments(tmp_path)) == 2 and weights.read_bytes() == b"damaged"
    out.rename(tmp_path / ".out.old")  # as a kill between two renames leaves it
    assert execute("release", arguments(tmp_path)) == 0 and weights.stat().st_size > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out", ".out.run"}


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "run", PLAIN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.docx").write_text("years")
    assert execute("release", arguments(tmp_path)) == 2
    assert "holds other things (thesis.docx)" in capsys.readouterr().err
    (tmp_path / "out/thesis.docx").unlink()
    assert execute("release", arguments(tmp_path, "precision=bf16")) == 0  # the refused call holds nothing to its keys
