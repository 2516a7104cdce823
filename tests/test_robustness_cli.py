"""`histoscale robustness` as a user runs it: synthetic tissue at sites with their own stains, and twins as registered tiles."""

import csv
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import save_file

from histoscale.data.cohort.write import CohortConfig, render_region
from histoscale.launch import robustness
from histoscale.launch.config import load
from histoscale.launch.run import execute, invoke

SIDE, SITES, CLASSES = 48, ("alpha", "<script>beta"), ("tumour", "stroma")


def cohort() -> CohortConfig:
    return TypeAdapter(CohortConfig).validate_python(load("cohort", ["cohort=tiny", "out=unused"]).values["cohort"])


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """labelled/: 2 classes at 2 sites of 12 patients, and a third site outside. registered/: 12 tiles, twins under two scanners
    and a stain that is shifted by hand. release/: a tiny encoder."""
    root, config = tmp_path_factory.mktemp("tissue"), cohort()
    (root / "labelled").mkdir()
    (root / "registered").mkdir()
    rows: list[dict[str, Any]] = []
    for site in range(3):
        for patient in range(10 if site == 2 else 12):
            for label, cut in itertools.product(CLASSES, range(2)):
                name, who = f"{site}-{patient}-{label}-{cut}.png", 100 * site + patient
                Image.fromarray(render_region(label, SIDE, 0.5, config, who, site, cut)).save(root / "labelled" / name)
                split = "external" if site == 2 else "test" if patient < 5 else "train"
                rows.append({"path": name, "label": label, "site": (*SITES, "gamma")[site], "patient_id": f"P{who}",
                             "slide_id": f"S{who}", "split": split})  # fmt: skip
    write(root / "labelled/labels.csv", rows)
    tiles: list[dict[str, Any]] = []
    for tile in range(12):
        for scanner in range(2):
            pixels = render_region(CLASSES[tile % 2], SIDE, 0.5, config, 500 + tile, scanner, 0)
            for stain, picture in (("first", pixels), ("second", (pixels * np.array([0.9, 0.8, 1.0])).astype(np.uint8))):
                name = f"{tile}-{scanner}-{stain}.png"
                Image.fromarray(picture).save(root / "registered" / name)
                tiles.append({"path": name, "tile_id": f"T{tile}", "scanner": f"scanner {scanner}", "stain": stain})
    write(root / "registered/registered.csv", tiles)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **args)
    (root / "release").mkdir()
    save_file(vit.state_dict(), root / "release/model.safetensors")
    data = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    described = {"architecture": "vit_tiny_patch16_224", "num_features": 24, "model_args": args, "pretrained_cfg": data}
    (root / "release/config.json").write_text(json.dumps(described))
    return root


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def arguments(root: Path, out: Path, *more: str) -> list[str]:
    return [
        f"encoder={root}/release", f"data_root={root}/labelled", f"registered={root}/registered", "dataset.external=external",
        "dataset.mpp=0.5", "initialisations=2", "interval.draws=100", "robustness.neighbours.most_k=20",
        "robustness.clusters.most=3", "robustness.clusters.trials=2", "robustness.clusters.choosing_starts=2",
        "robustness.confounding.resamplings=2", "robustness.confounding.penalties=[-2,0]", "robustness.confounding.splits=3",
        "perturbations.haematoxylin=[-0.2,0.2]", "perturbations.eosin=[0]", "perturbations.blur_px=[2]",
        "perturbations.jpeg=[20]", "perturbations.downscale=[4]", "registration.top=[1,10]", "methods.macenko.light.pixels=200",
        "methods.reinhard.light.pixels=200", "normalisations=[none,macenko,reinhard]", "probe.penalties=[1,0.1,0.01]",
        "logging.progress=off", "precision=fp32", "hardware.device=cpu", f"out={out}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tissue: Path) -> tuple[Path, dict[str, Any]]:
    out = tissue / "out"
    return out, invoke("robustness", arguments(tissue, out))["robustness"]


def test_every_measure_stands_beside_its_floors(run: tuple[Path, dict[str, Any]]) -> None:
    out, found = run
    measures = found["measures"]
    assert set(measures) == {
        "robustness_index", "margin_median", "margin_tail", "clustering_score", "drop_inside", "drop_external",
        "balanced_accuracy", "cosine_to_clean", "cosine", "top-1", "top-10", "leaderboard",
    }  # fmt: skip
    for method in ("none", "macenko", "reinhard"):
        for name in ("release", "random", "colour"):
            one = measures["robustness_index"][name][method]
            assert one["patients"] == 24 and one["low"] <= one["value"] <= one["high"] and one["groups"] == "patient"
            assert one["floor"] == (name != "release") and 0 < one["support"] <= 1
    assert len(measures["robustness_index"]["random"]["none"]["k"]) == 2  # both initialisations
    colour = measures["robustness_index"]["colour"]
    assert colour["macenko"]["value"] > colour["none"]["value"]  # what normalisation is for
    drop = measures["drop_inside"]["release"]["none"]
    assert len(drop["balanced_accuracy_by_split"]) == len(drop["tables"]) and drop["sites"] == sorted(SITES)
    assert measures["drop_external"]["release"]["none"]["patients"] == 10


def test_curves_are_paired_with_clean_patches(run: tuple[Path, dict[str, Any]]) -> None:
    accuracy = run[1]["measures"]["balanced_accuracy"]["release"]["none"]
    clean, changed = accuracy["report, clean"], accuracy["report, blur_px 2"]
    assert changed["minus"]["clean"]["value"] == pytest.approx(changed["value"] - clean["value"])
    assert {f"{role}, jpeg 20" for role in ("report", "external")} <= set(accuracy)
    for method in ("none", "macenko", "reinhard"):  # no strength, no difference: both are normalised by one fit
        accuracy = run[1]["measures"]["balanced_accuracy"]["release"][method]["report, eosin 0"]["minus"]["clean"]
        assert (accuracy["value"], accuracy["low"], accuracy["high"]) == (0, 0, 0)
        assert run[1]["measures"]["cosine_to_clean"]["release"][method]["report, eosin 0"]["value"] == pytest.approx(1, abs=1e-6)
    near = run[1]["measures"]["cosine_to_clean"]["colour"]
    for condition in ("report, haematoxylin -0.2", "external, haematoxylin 0.2"):
        assert near["reinhard"][condition]["value"] > near["none"][condition]["value"]  # a shift of stain is taken out again


def test_registered_tiles_are_compared_by_what_differs(run: tuple[Path, dict[str, Any]]) -> None:
    measures = run[1]["measures"]
    pairs = {kind: measures["cosine"]["release"]["none"][kind]["slide_pairs"] for kind in ("all", "scanner", "stain", "both")}
    assert pairs == {"all": 6, "scanner": 2, "stain": 2, "both": 2}
    top = measures["top-1"]["release"]["none"]["all"]
    assert top["value"] <= measures["top-10"]["release"]["none"]["all"]["value"] <= 1 and "no patients are known" in top["note"]
    ten = measures["top-10"]["release"]["none"]
    four = [measures["cosine"]["release"]["none"]["all"], *(ten[kind] for kind in ("scanner", "stain", "both"))]
    mean = np.mean([round(one["value"], 3) for one in four])
    assert measures["leaderboard"]["release"]["none"]["value"] == pytest.approx(mean)


def test_all_is_embedded_before_anything_is_measured_and_ranks_wait(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    waits: list[float] = []

    def noted(name: str) -> None:
        real = getattr(robustness, name)
        monkeypatch.setattr(robustness, name, lambda *given: calls.append(name) or real(*given))

    for name in ("embed_patches", "structure", "compare"):
        noted(name)
    real = robustness.open_ranks
    monkeypatch.setattr(robustness, "open_ranks", lambda device, wait: waits.append(wait) or real(device, wait))
    more = ["measures=[index,curves]", "normalisations=[reinhard]", "perturbations.haematoxylin=[-5]", "initialisations=1"]
    more += [f"perturbations.{kind}=[]" for kind in ("eosin", "blur_px", "jpeg", "downscale")]
    found = invoke("robustness", arguments(tissue, tmp_path / "out", *more))["robustness"]
    assert calls == ["embed_patches"] * 4 + ["structure"] * 3 + ["compare"] * 3 and waits == [7 * 86400.0]
    refused = [remark for remark in found["remarks"] if "cannot be fitted" in remark]  # glass, after such a shift
    assert len(refused) == 1 and refused[0].startswith("reinhard cannot be fitted on 20 slides under haematoxylin -5")


def test_what_is_known_of_a_set_is_part_of_the_result(tissue: Path, tmp_path: Path) -> None:
    for name, table, columns in (
        ("labelled", "labels.csv", ("site", "slide_id", "patient_id")),
        ("registered", "registered.csv", ("scanner", "stain", "tile_id")),
    ):
        root = tmp_path / name
        shutil.copytree(tissue / name, root)
        with (root / table).open(newline="") as file:
            rows = list(csv.DictReader(file))
        key = "data_root" if name == "labelled" else "registered"
        config = load("robustness", [*arguments(tissue, tmp_path / "out"), f"{key}={root}"]).config
        facts = [robustness.identity(config)]
        assert robustness.identity(config) == facts[0]
        for column in columns:
            write(root / table, [{**row, column: f"{row[column]} of old"} for row in rows])
            facts.append(robustness.identity(config))
        assert len({json.dumps(one, sort_keys=True) for one in facts}) == 4
        assert len({one["encoder_hash"] for one in facts}) == 1


@pytest.mark.parametrize("name", ["random", "colour"])
def test_an_encoder_called_as_a_floor_is_refused(
    tissue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(tissue / "release", tmp_path / name)
    base = [text for text in arguments(tissue, tmp_path / "out") if not text.startswith("encoder=")]
    assert execute("robustness", [*base, f"encoder={tmp_path / name}"]) == 2
    said = capsys.readouterr().err
    assert f"is called {name}, which stands beside every encoder as a floor" in said and "Traceback" not in said


def test_it_says_the_same_twice_and_resumes(tissue: Path, run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    again = tmp_path / "again"
    (again / "features").mkdir(parents=True)
    for path in sorted((run[0] / "features").rglob("*.safetensors"))[::2]:  # half of them are there already
        shutil.copy(path, again / "features" / path.name)
    found = invoke("robustness", arguments(tissue, again, "measures=[index]", "normalisations=[none,reinhard]"))["robustness"][
        "measures"
    ]
    for measure in ("robustness_index", "margin_median", "cosine", "leaderboard"):
        for name, methods in found[measure].items():
            assert methods == {method: run[1]["measures"][measure][name][method] for method in ("none", "reinhard")}


@pytest.mark.slow
def test_two_ranks_find_the_same(tissue: Path, run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["histoscale.launch.robustness", *arguments(tissue, tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True, timeout=500)
    assert (
        json.loads((tmp_path / "two/summary.json").read_text())["robustness"]
        == json.loads((run[0] / "summary.json").read_text())["robustness"]
    )


def test_the_page_opens_in_a_browser(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    page = run[0] / "report.html"
    text = page.read_text()
    assert "<script" not in text and "robustness index" in text and "Changed pictures: the external site" in text
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
        "--disable-background-networking", "--window-size=1200,3000", "--hide-scrollbars", "--enable-logging=stderr",
    ]  # fmt: skip
    drawn = subprocess.run(
        ["chromium", *flags, f"--screenshot={tmp_path / 'shot.png'}", page.as_uri()],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in drawn.stderr
    assert len(np.unique(np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize(("more", "words"), [
    (["measures=[indx]"], "measures is ['indx']: expected some of index, clusters, confounding, curves"),
    (["normalisations=[none,none]"], "normalisations is ['none', 'none']"),
    (["data_root=null", "registered=null"], "nothing to look at"),
    (["encoder=colour"], "stands beside every encoder as a floor"),
    (["perturbations.jpeg=[0]"], "perturbations.jpeg has 0: expected whole qualities of 1 to 100"),
    (["robustness.confounding.train=0.95"], "confounding.choose is 0.1"),
    (["resolution=nativ"], "resolution is 'nativ': expected one of resize, eva, native"),
    (["grid.mpp=0.5"], "only resolution=native has a target"),
    (["dataset=consep"], "dataset=consep has no class a patch"),
])  # fmt: skip
def test_mistakes_are_one_sentence(
    tissue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    keys = {text.split("=")[0] for text in more}
    base = [text for text in arguments(tissue, tmp_path / "wrong") if text.split("=")[0] not in keys]
    if "dataset=consep" in more:
        base = [text for text in base if not text.startswith("dataset.")]
    assert execute("robustness", [*base, *more]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


@pytest.mark.parametrize(("column", "words"), [("site", "have no site"), ("slide_id", "neither slides nor patients are known")])
def test_a_set_without_sites_or_slides_is_refused(
    tissue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, words: str
) -> None:
    with (tissue / "labelled/labels.csv").open(newline="") as file:
        rows = [{**row, "patient_id": "", column: "", "split": ""} for row in csv.DictReader(file)]
    root = tmp_path / "set"
    shutil.copytree(tissue / "labelled", root)
    write(root / "labels.csv", rows)
    base = [text for text in arguments(tissue, tmp_path / "out") if not text.startswith(("data_root", "dataset.external"))]
    assert execute("robustness", [*base, f"data_root={root}"]) == 2
    assert words in capsys.readouterr().err
