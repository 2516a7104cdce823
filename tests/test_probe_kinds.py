"""`histoscale probe` on sets whose images are not one class each: decoders on masks, regression of spots, leakage by slide."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mask_fixtures import write_consep, write_monusac
from public_layouts import write_hest
from safetensors.torch import save_file

from histoscale.launch.run import invoke

SPLITS = [(["S1", "S2"], ["S3"]), (["S2", "S3"], ["S1"])]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A tiny ViT of 32 px whose tokens are of 8 px."""
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **args)
    (tmp_path / "tiny").mkdir()
    save_file(vit.state_dict(), tmp_path / "tiny/model.safetensors")
    data = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"architecture": "vit_tiny_patch16_224", "num_features": 24, "model_args": args, "pretrained_cfg": data}
    (tmp_path / "tiny/config.json").write_text(json.dumps(config))
    return tmp_path / "tiny"


def probe(release: Path, root: Path, name: str, *more: str) -> dict[str, Any]:
    out = root.parent / f"out-{name}"
    invoke("probe", [f"encoder={release}", f"dataset={name}", f"data_root={root}", "floors.initialisations=1",
                     "precision=fp32", "hardware.device=cpu", "scoring.interval.draws=100", "logging.progress=off", f"out={out}",
                     *more])  # fmt: skip
    for file in ("table.txt", "table.md", "report.html"):
        assert (out / file).stat().st_size > 200
    return json.loads((out / "summary.json").read_text())["probe"]


@pytest.mark.parametrize("name", ["consep", "monusac"])
def test_masks_are_decoded(release: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    (write_consep if name == "consep" else write_monusac)(root)
    small = [
        "segment.fit.steps=6", "segment.fit.batch=4", "segment.fit.runs=1", "segment.honest.every=3", "segment.honest.folds=2",
        "segment.feed.crops=1", "segment.examples=1", "dataset.counts=any", "protocols=[honest,eva]",
    ]  # fmt: skip
    found = probe(release, root, name, *small)
    (scores,) = found["scores"].values()
    (place,) = {tuple(roles) for probes in scores.values() for roles in probes.values()}
    for protocol in ("honest", "eva"):
        (row,) = scores[protocol].values()
        encoders = row[place[0]]
        assert {"tiny", "random", "colour"} <= encoders.keys()
        assert 0 <= encoders["tiny"]["monai_dice"]["value"] <= 1 and "random" in encoders["tiny"]["minus"]
    assert any("part of the set" in remark for remark in found["remarks"])


def test_spots_are_regressed_and_their_floors_stand_beside(release: Path, tmp_path: Path) -> None:
    root = write_hest(tmp_path / "data", "IDC", SPLITS, spots=12)
    found = probe(release, root, "hest", "dataset.task=IDC", "regression.components=8")
    (scores,) = found["scores"].values()
    (probes,) = scores.values()
    (roles,) = probes.values()
    (encoders,) = roles.values()
    assert {"tiny", "random", "colour"} <= encoders.keys()
    assert -1 <= encoders["tiny"]["pearson"]["value"] <= 1 and encoders["tiny"]["pearson"]["effective_mpp"] == pytest.approx(3.5)
