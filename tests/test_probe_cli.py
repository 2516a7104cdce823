"""`histoscale probe` as a user runs it: folders of images in; table, page, summary and predictions out."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import read_manifest
from histoscale.data.storage import Store
from histoscale.data.tissue import TissueConfig
from histoscale.launch.probe import label_of
from histoscale.launch.run import execute, invoke


@pytest.fixture
def own_set(tmp_path: Path) -> Path:
    """Stripes across or along, 26 patients each in train and test, and a tiny release."""
    rng = np.random.default_rng(0)
    rows = []
    (tmp_path / "img").mkdir()
    for i in range(156):
        stripes = np.tile(np.where(np.arange(16) % 4 < 2, 90, 200), (16, 1))
        image = (stripes.T if i % 2 else stripes)[..., None] + rng.normal(0, 20, (16, 16, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / f"img/{i}.png")
        split = "train" if i < 78 else "test"
        rows.append({"path": f"img/{i}.png", "label": "across along".split()[i % 2], "split": split, "patient_id": f"P{i // 3}"})
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **args)
    (tmp_path / "release").mkdir()
    save_file(vit.state_dict(), tmp_path / "release/model.safetensors")
    data = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"architecture": "vit_tiny_patch16_224", "num_features": 24, "model_args": args, "pretrained_cfg": data}
    (tmp_path / "release/config.json").write_text(json.dumps(config))
    return tmp_path


def arguments(root: Path, out: Path, *more: str) -> list[str]:
    return [f"encoder={root}/release", "dataset=folder", f"data_root={root}", "scoring.interval.draws=200", "floors.trees=20",
            "floors.initialisations=2", "honest.few_shot.draws=4", "dataset.mpp=0.5", "logging.progress=off",
            "precision=fp32", "hardware.device=cpu", f"out={out}", *more]  # fmt: skip


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())["probe"]


def test_the_command_says_the_same_twice(own_set: Path) -> None:
    found = []
    for number in range(2):
        invoke("probe", arguments(own_set, own_set / f"out{number}"))
        found.append(summary_of(own_set / f"out{number}"))
    assert found[0] == found[1]
    first = found[0]
    (scores,) = first["scores"].values()
    report = scores["honest"]["linear"]["report"]
    own, colour = report["release"]["balanced_accuracy"], report["colour"]["balanced_accuracy"]
    assert own["value"] > colour["high"]  # colours cannot tell the direction of stripes
    assert own["runs"] == 1 and report["random"]["balanced_accuracy"]["runs"] == 2 and own["effective_mpp"] == 0.5
    assert own["patients"] == 26 and own["low"] <= own["value"] <= own["high"]
    gap = report["release"]["minus"]["colour"]["balanced_accuracy"]
    assert gap["value"] == pytest.approx(own["value"] - colour["value"]) and gap["low"] > 0
    assert {"knn", "prototype", "few_shot/1", "few_shot/16"} <= scores["honest"].keys()
    assert any(remark.startswith("reads: report 1") for remark in first["remarks"])


def test_both_protocols_stand_in_one_table(own_set: Path) -> None:
    out = own_set / "both"
    few = ["eva.steps=60", "eva.batch=32", "eva.runs=2", "honest.probes=[linear]"]
    invoke("probe", arguments(own_set, out, "protocols=[honest,eva]", *few))
    (scores,) = summary_of(out)["scores"].values()
    assert scores["honest"]["linear"]["report"]["release"]["balanced_accuracy"]["resolution"] == "resize"
    theirs = scores["eva"]["linear"]["report"]["release"]["balanced_accuracy"]
    assert theirs["resolution"] == "eva" and theirs["runs"] == 2 and "selected on report" in (out / "table.md").read_text()
    assert {"random", "colour"} <= scores["eva"]["linear"]["report"].keys()
    for name in ("table.txt", "table.md", "report.html", "predictions.npz"):
        assert (out / name).stat().st_size > 200
    page = (out / "report.html").read_text()
    assert "release" in page and "<script" not in page


def test_outer_folds_of_two_patients_withhold_their_interval_and_name_the_number(own_set: Path, tmp_path: Path) -> None:
    root = tmp_path / "patients"
    for i in range(60):
        folder = root / f"P{i % 2}" / ("along" if i // 2 % 2 else "across")
        folder.mkdir(parents=True, exist_ok=True)
        picture = i // 4 * 4 + 2 * (i % 2) + i // 2 % 2  # of its class, and of no other patient
        (folder / f"{i}.png").write_bytes((own_set / f"img/{picture}.png").read_bytes())
    out = tmp_path / "out"
    invoke("probe", arguments(own_set, out, "dataset.layout=patient", f"data_root={root}", "honest.probes=[linear]"))
    (scores,) = summary_of(out)["scores"].values()
    row = scores["honest"]["linear"]["outer"]["release"]["balanced_accuracy"]
    assert row["low"] is None and "2 patients" in row["note"]
    assert "one patient, inside which no penalty can be chosen" in (out / "table.txt").read_text()


def test_slides_of_the_pretraining_catalog_are_reported_as_leakage(
    own_set: Path, make_slide: Callable[..., Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> None:
    make_slide(own_set / "a.tif", width=600, height=500, kind="generic")
    (own_set / "manifest.csv").write_text("slide_id,uri,patient_id\nS1,a.tif,P30\n")
    slides = read_manifest(str(own_set / "manifest.csv"), store)
    build_catalog(slides, store, tissue_config, own_set / "catalog", 0, None, journal)
    out = own_set / "leaking"
    invoke("probe", arguments(own_set, out, f"pretraining={own_set}/catalog", "honest.probes=[knn]"))
    leaks = [remark for remark in summary_of(out)["remarks"] if remark.startswith("leakage")]
    assert len(leaks) == 1 and "3 of 78 images in report come from 1 patients" in leaks[0] and "P30" in leaks[0]


@pytest.mark.parametrize(("more", "words"), [
    (["protocols=[best]"], "protocols is ['best']: expected one or both of honest, eva"),
    (["protocols=[]"], "expected one or both of"),
    (["honest.probes=[svm]"], "honest.probes has 'svm'"),
    (["dataset=pcam_10shot"], "add honest.few_shot.shots=[10] eva=ten_shot"),
    (["scoring.metrics=[accurcy]"], "scoring has the metric 'accurcy'"),
    (["resolution=nativ"], "resolution is 'nativ': expected one of resize, eva, native"),
    (["grid.mpp=0.5"], "only resolution=native has a target"),
    (["dataset=crc"], "expected the folder NCT-CRC-HE-100K"),
    (["dataset=hest"], "lacks the task IDC"),
    (["dataset=consep"], "Train"),
])  # fmt: skip
def test_mistakes_are_one_sentence(own_set: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str) -> None:
    base = [a for a in arguments(own_set, own_set / "wrong") if not a.startswith("dataset") or "dataset=" not in " ".join(more)]
    assert execute("probe", [*base, *more]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


def test_a_path_is_named_by_its_last_part(own_set: Path) -> None:
    assert label_of(str(own_set / "release")) == "release" and label_of(f"hf:{own_set}/release") == "hf:release"
    assert label_of("timm:vit_tiny_patch16_224") == "timm:vit_tiny_patch16_224" and label_of("colour") == "colour"
