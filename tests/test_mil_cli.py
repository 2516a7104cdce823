"""`histoscale mil` as a user runs it: a real process, stores and slides on disk, numbers and pictures out."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from histoscale.launch.run import execute

PATIENTS = 64
SIDE, COLUMNS, ROWS = 32, 12, 10  # tiles of a slide: 32 level-0 px, in a grid


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pyramidal slides with stores: positives hold a marked tile; the manifest has roles, sites and a label."""
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(11)
    rows = []
    for patient in range(PATIENTS):
        role = ("train", "train", "test", "external")[patient % 4]
        label = int(rng.integers(0, 2))
        name = f"s{patient:02d}"
        coords = np.stack(np.meshgrid(np.arange(COLUMNS), np.arange(ROWS)), -1).reshape(-1, 2) * SIDE
        features = rng.normal(size=(len(coords), 8)).astype(np.float32)
        marked = rng.permutation(len(coords))[:4]
        features[marked, 0] += 7 * label
        for kind, values in (("stores", features), ("colour", features[:, 4:])):
            (folder / kind).mkdir(exist_ok=True)
            with h5py.File(folder / kind / f"{name}.h5", "w") as file:
                file["features"], file["coords"] = values, coords
                file.attrs.update(encoder_hash=kind, mpp=1.0, patch_size=16, patch_size_level0=SIDE, slide_id=name)
        _write_slide(folder / "slides" / f"{name}.tiff", coords[marked] if label else coords[:0])
        _write_foci(folder / "truth" / name / "foci.geojson", coords[marked] if label else coords[:0])
        site = "far" if role == "external" else f"near{patient % 3}"
        rows.append({"slide_id": name, "uri": f"slides/{name}.tiff", "patient_id": f"p{patient}", "site": site, "mpp": 0.5})
        months = float(rng.exponential(10 if label else 40))
        rows[-1] |= {"role": role, "tumour": label, "grade": label * (1 + patient % 2), "size": 3.5 * label + patient % 3}
        rows[-1] |= {"months": round(min(months, 60), 2), "dead": int(months < 60)}
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def _write_slide(path: Path, marked: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.full((ROWS * SIDE, COLUMNS * SIDE, 3), (200, 140, 180), np.uint8)
    for x, y in marked:
        pixels[y : y + SIDE, x : x + SIDE] = (90, 40, 130)
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(64, 64), photometric="rgb", compression="deflate", subifds=0)
        file.write(pixels[::2, ::2], tile=(64, 64), photometric="rgb", compression="deflate", subfiletype=1)


def _write_foci(path: Path, corners: np.ndarray) -> None:
    path.parent.mkdir(parents=True)
    squares = [[[x, y], [x + SIDE, y], [x + SIDE, y + SIDE], [x, y + SIDE], [x, y]] for x, y in corners.tolist()]
    shapes = [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}} for ring in squares]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": shapes}))


def arguments(cohort: Path, out: Path) -> tuple[str, ...]:
    places = (f"embeddings={cohort / 'stores'}", f"manifest={cohort / 'manifest.csv'}", f"out={out}")
    return (*places, "mil.epochs=8", "mil.repeats=1", "interval.draws=200", "logging.progress=lines")


def extras(cohort: Path) -> tuple[str, ...]:
    return f"catalog={cohort / 'catalog'}", f"annotations={cohort / 'truth'}", f"floor_embeddings={cohort / 'colour'}"


@pytest.fixture(scope="module")
def studied(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("mil") / "out"
    assert execute("index", [f"manifest={cohort / 'manifest.csv'}", f"out={cohort / 'catalog'}", "logging.progress=off"]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "histoscale.launch.cli", "mil", *arguments(cohort, out), *extras(cohort)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def test_numbers_stand_where_they_are_promised(studied: tuple[Path, str]) -> None:
    found = json.loads((studied[0] / "summary.json").read_text())["mil"]
    auc = found["external"]["auc"]
    assert auc["low"] <= auc["value"] <= auc["high"] and auc["value"] > 0.8 and auc["patients"] == PATIENTS // 4
    assert {"near0", "near1", "near2", "far"} == set(found["sites"])
    assert found["internal"]["slides"] == PATIENTS // 4
    floors = {"mean_pooling", "colour_abmil", "colour_mean_pooling", "site_prior", "tissue_area", "number_of_tiles"}
    assert set(found["external"]["floors"]) == set(found["external"]["minus"]) == floors
    for part in (found["internal"], found["external"]):
        for operating in part["operating"].values():
            assert operating["fnr"]["value"] == pytest.approx(1 - operating["sensitivity"]["value"])
            assert operating["sensitivity"]["wilson"]["low"] <= operating["sensitivity"]["value"]
    assert found["pointing"]["external"]["hits"] > 0.7 > found["pointing"]["external"]["chance"]
    assert found["cannot_say"]


def test_every_slide_has_its_score_and_the_threshold_is_carried_over(studied: tuple[Path, str]) -> None:
    """The table's decisions can be recomputed from scores.csv and the threshold, which comes from training slides alone."""
    found = json.loads((studied[0] / "summary.json").read_text())["mil"]
    with (studied[0] / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == PATIENTS
    at = found["thresholds"]["0.9"]
    train = sorted((float(r["score"]) for r in rows if r["part"] == "train" and r["label"] == "1"), reverse=True)
    assert at["positives"] == len(train)
    assert at["value"] == train[int(np.ceil(0.9 * (len(train) + 1) - 1e-12)) - 1]
    positive = [r for r in rows if r["part"] == "external" and r["label"] == "1"]
    hits = sum(float(r["score"]) >= at["value"] for r in positive)
    assert found["external"]["operating"]["0.9"]["sensitivity"]["hits"] == hits == sum(r["flagged_0.9"] == "1" for r in positive)


def test_what_a_person_reads(studied: tuple[Path, str]) -> None:
    for words in ("external", "near1", "mean pooling", "What this study cannot say", "sensitivity 0.95", "meets an outline"):
        assert words in studied[1], words


def test_pictures_and_their_numbers(studied: tuple[Path, str]) -> None:
    from PIL import Image
    from pyarrow.parquet import read_table

    pictures = sorted((studied[0] / "slides").glob("*/overlay.png"))
    assert len(pictures) == 6
    for picture in pictures:
        assert np.asarray(Image.open(picture).convert("L")).std() > 10
        tiles = read_table(picture.with_name("tiles.parquet"))
        assert tiles.num_rows == COLUMNS * ROWS and sum(tiles["attention"].to_pylist()) == pytest.approx(1, abs=1e-6)
        # A tile that raises the logit lowers it when it goes: the two maps have one sign.
        assert np.corrcoef(tiles["contribution"], tiles["occlusion"])[0, 1] > 0.3
    assert (studied[0] / "slides/index.html").exists()
    found = json.loads((studied[0] / "summary.json").read_text())["mil"]
    assert found["evidence"]["deletion_gain"]["occlusion"]["value"] > 0 and found["evidence"]["artefacts"]["pen"]["slides"] == 6
    assert found["heatmaps"] and all((studied[0] / name).exists() for name in found["heatmaps"])


@pytest.mark.parametrize(
    ("more", "headline", "least"),
    [
        (
            ("task=classes", "task.label=grade", "task.classes={none: ['0'], low: ['1'], high: ['2']}", "task.ordered=true"),
            "quadratic_kappa",
            0.2,
        ),
        (("task=regression", "task.label=size"), "r2", 0.2),
        (("task=survival", "task.label=months", "task.event=dead"), "c_index", 0.55),
    ],
)
def test_other_heads(cohort: Path, tmp_path: Path, more: tuple[str, ...], headline: str, least: float) -> None:
    assert execute("mil", [*arguments(cohort, tmp_path / "out"), *more, "mil.epochs=25"]) == 0
    found = json.loads((tmp_path / "out/summary.json").read_text())["mil"]
    assert found["headline"] == headline and found["external"]["headline"]["value"] > least > found["chance"]


@pytest.mark.parametrize(("split", "trials"), [("folds", 3), ("sites", 4)])
def test_every_slide_is_read_by_a_model_that_never_saw_its_patient(cohort: Path, tmp_path: Path, split: str, trials: int) -> None:
    """Folds, and one site at a time with the random folds beside it; the gap between them is printed."""
    count = "split.folds=3"
    assert execute("mil", [*arguments(cohort, tmp_path / "out"), f"split={split}", count, "mil.epochs=4", "mil.folds=3"]) == 0
    found = json.loads((tmp_path / "out/summary.json").read_text())["mil"]
    with (tmp_path / "out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    for part in ("internal", "external")[: 1 if split == "folds" else 2]:
        read = [r for r in rows if r["part"] == part]
        assert len(read) == len({r["slide_id"] for r in read}) == found[part]["slides"] == PATIENTS
    for trial in {r["trial"] for r in rows}:
        inside = {r["patient_id"] for r in rows if r["trial"] == trial and r["part"] == "train"}
        assert not inside & {r["patient_id"] for r in rows if r["trial"] == trial and r["part"] != "train"}
    if split == "sites":
        assert found["gap"]["auroc"]["value"] == pytest.approx(
            found["internal"]["auc"]["value"] - found["external"]["auc"]["value"]
        )
        assert set(found["sites"]) == {"near0", "near1", "near2", "far"} and len(found["external_sites"]) == trials


def test_run_again_it_has_nothing_to_do_and_another_result_is_refused(
    cohort: Path, studied: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*arguments(cohort, studied[0]), *extras(cohort)]
    assert execute("mil", again) == 0 and "nothing to do" in capsys.readouterr().err
    assert execute("mil", [*again, "mil.optimizer.lr=0.1"]) == 2 and "mil.optimizer.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("task.label=stage",), "no label column 'stage'; it has dead, grade, months, role, size, tumour"),
        (("split=patients", "split.external_sites=[moon]"), "moon, which no labelled slide comes from"),
        (("task.decision=nurse",), "expected slide or patient"),
        (("mil.aggregator.kind=attention",), "'abmil', 'clam', 'transmil', 'mean', 'max'"),
        (("evidence.display=hot",), "expected relative, rank"),
        (("embeddings=/nowhere",), "holds no store"),
    ],
)
def test_errors_are_one_sentence(
    cohort: Path, tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute("mil", [*arguments(cohort, tmp_path / "out"), *more]) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_what_cannot_be_read_is_left_out_by_name(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store that is no HDF5, one with a feature that is no number, a slide that the catalog lacks, one that is gone, one of a
    single tile without a side: the study goes on, and says so before it trains."""
    shutil.copytree(cohort / "stores", tmp_path / "stores")
    (tmp_path / "stores/s00.h5").write_bytes(b"nothing")
    with h5py.File(tmp_path / "stores/s01.h5", "r+") as file:
        file["features"][3, 2] = np.nan
    for alone in ("s05", "s06"):  # one trains, one is read
        with h5py.File(tmp_path / f"stores/{alone}.h5", "r+") as file:
            tile, corner = file["features"][:1], file["coords"][:1]
            del file["features"], file["coords"], file.attrs["patch_size"], file.attrs["patch_size_level0"]
            file["features"], file["coords"] = tile, corner
    rows = (cohort / "manifest.csv").read_text().splitlines()
    shorter = tmp_path / "shorter.csv"
    shorter.write_text("\n".join(rows[:-1]).replace("slides/", f"{cohort}/slides/") + "\n")
    assert execute("index", [f"manifest={shorter}", f"out={tmp_path / 'catalog'}", "logging.progress=off"]) == 0
    (cohort / "slides/s02.tiff").rename(tmp_path / "s02.tiff")
    more = (f"catalog={tmp_path / 'catalog'}", f"annotations={cohort / 'truth'}", "evidence.slides=null", "mil.folds=3")
    few = ("evidence.deletion.steps=2", "evidence.deletion.draws=2", "mil.epochs=2", f"embeddings={tmp_path / 'stores'}")
    assert execute("mil", [*arguments(cohort, tmp_path / "out"), *more, *few]) == 0
    said = capsys.readouterr().err
    before, after = said.split("slide models: ", 1)
    for words in (f"2 of the {PATIENTS} labelled slides have no usable store", "by part train 2 of 32; by hospital near0 1 of",
                  "its store holds features that are not finite: 1 (s01)"):  # fmt: skip
        assert words in before, words
    assert "no page can be drawn of s06" in after and f"open {tmp_path / 'out' / 'report.html'}" in after
    lead = (tmp_path / "out/report.html").read_text().split('class="lead"')[1].split("</p>")[0]
    assert f"2 of the {PATIENTS} labelled slides have no usable store" in lead
    (tmp_path / "s02.tiff").rename(cohort / "slides/s02.tiff")
    found = json.loads((tmp_path / "out/summary.json").read_text())["mil"]
    assert "cannot be read" in found["slides"]["s02"]["unread"]
    assert found["left_out"] == {
        "s00": "its store is no whole HDF5 file (its signature is missing)",
        "s01": "its store holds features that are not finite",
    }
    last = rows[-1].split(",")[0]
    assert found["slides"][last]["picture"] == "" and len(found["slides"]) == PATIENTS // 2 - 1
    assert found["absent"]["parts"]["train"] == {"absent": 2, "of": 32} and found["train"]["slides"] == 30
