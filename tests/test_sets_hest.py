"""HEST: expression that stays with its patch, the published splits, and every refusal."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from public_layouts import GENES, counts_of, hest_config, seed_of, write_expression, write_hest, write_patches

from histoscale.eval.colour import colour_features
from histoscale.eval.datasets.hest import AVERAGED, open_hest
from histoscale.eval.datasets.patches import DatasetError
from histoscale.eval.regression import Embedded, RegressionConfig, run_hest
from histoscale.eval.scores.interval import IntervalConfig

ONE = hest_config(task="IDC")
SPLITS = [(["S1", "S2"], ["S3"]), (["S2", "S3"], ["S1"])]
METADATA = "id,dataset_title,patient\nS1,Study,Patient 1\nS2,Study,Patient 2\nS3,Study,Patient 3\n"


@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "array"])
def test_targets_stay_with_their_patches(tmp_path: Path, form: str) -> None:
    (spots,) = open_hest(write_hest(tmp_path, "IDC", SPLITS, spots=5, form=form), ONE)
    assert spots.name == "hest/IDC" and spots.genes == tuple(GENES) and len(spots) == 15
    assert spots.slide_ids.tolist() == ["S1"] * 5 + ["S2"] * 5 + ["S3"] * 5
    assert spots.splits == ((("S1", "S2"), ("S3",)), (("S2", "S3"), ("S1",)))
    for number, sample in enumerate(("S1", "S2", "S3")):
        rows = spots.rows([sample])
        assert rows.tolist() == list(range(5 * number, 5 * number + 5))
        assert np.abs(spots.targets[rows] - np.log1p(counts_of(sample, 5).astype(np.float64))).max() < 1e-12
    asked = np.array([12, 3, 12, 0])
    pixels = spots.read(asked)
    images = {s: np.random.default_rng(seed_of(s)).integers(0, 256, (5, 224, 224, 3), np.uint8) for s in ("S1", "S3")}
    for patch, (sample, place) in zip(pixels, (("S3", 2), ("S1", 3), ("S3", 2), ("S1", 0)), strict=True):
        assert (patch == images[sample][place].transpose(2, 0, 1)).all()
    batches = list(spots.batches(4))
    assert [len(rows) for rows, _ in batches] == [4, 4, 4, 3]
    patches = spots.as_patches()
    assert (patches.hash, len(patches), patches.size_px, patches.mpp) == (spots.hash, 15, 224, 0.5)


def test_patients_come_from_the_metadata(tmp_path: Path) -> None:
    write_hest(tmp_path, "IDC", SPLITS, spots=3)
    (spots,) = open_hest(tmp_path, ONE)
    assert spots.groups == "slide" and "resample samples and not patients" in spots.notes[0]
    (tmp_path / "HEST_v1_1_0.csv").write_text(METADATA)
    (spots,) = open_hest(tmp_path, ONE)
    assert spots.groups == "patient" and set(spots.patients) == {f"Study/Patient {i}" for i in (1, 2, 3)} and spots.notes == ()
    (tmp_path / "HEST_v1_1_0.csv").write_text(METADATA.replace("Patient 3", "Patient 1"))
    with pytest.raises(DatasetError, match="the patient Study/Patient 1 stands on both sides of split 0 of hest/IDC"):
        open_hest(tmp_path, ONE)
    (tmp_path / "HEST_v1_1_0.csv").write_text(METADATA.replace("S3", "S4"))
    with pytest.raises(DatasetError, match="lacks the sample S3 of IDC"):
        open_hest(tmp_path, ONE)
    (tmp_path / "HEST_v1_0_0.csv").write_text(METADATA)
    with pytest.raises(DatasetError, match="expected one metadata file"):
        open_hest(tmp_path, ONE)


def test_nine_tasks_or_a_part_that_says_so(tmp_path: Path) -> None:
    for task in AVERAGED[:2]:
        write_hest(tmp_path, task, SPLITS, spots=3)
    with pytest.raises(DatasetError, match=f"lacks the task {', '.join(AVERAGED[2:])}: expected <TASK>/splits"):
        open_hest(tmp_path, hest_config())
    part = open_hest(tmp_path, hest_config(counts="any"))
    assert [spots.name for spots in part] == ["hest/IDC", "hest/PRAD"]
    assert all("dataset.counts=any: the average is withheld, without PAAD" in spots.notes[-1] for spots in part)
    with pytest.raises(DatasetError, match="lacks the task folders"):
        open_hest(tmp_path / "IDC", hest_config(counts="any"))
    with pytest.raises(DatasetError, match="dataset.task is 'BREAST' and dataset.mpp 0.5: expected null or one of IDC"):
        open_hest(tmp_path, hest_config(task="BREAST"))


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(DatasetError, match=re.escape(words)):
            open_hest(tmp_path, ONE)

    folder = write_hest(tmp_path, "IDC", SPLITS, spots=4) / "IDC"
    test0 = folder / "splits/test_0.csv"
    held = test0.read_text()
    test0.write_text(held.replace("expr_path", "expression"))
    refused("test_0.csv lacks the columns expr_path: expected sample_id, patches_path, expr_path")
    test0.write_text(held + "S1,patches/S1.h5,adata/S1.h5ad\n")
    refused("the sample S1 stands on both sides of split 0 of hest/IDC")
    test0.write_text(held.replace("patches/S3.h5", "../IDC2/S3.h5"))
    refused("the path '../IDC2/S3.h5' leaves")
    test0.write_text(held.replace("patches/S3.h5", "patches/S2.h5"))
    refused("gives other files for S3 than another split")
    test0.write_text(held.splitlines()[0] + "\n")
    refused("split 0 of hest/IDC has 2 train and 0 test samples")
    test0.unlink()
    refused("has test_1, train_0, train_1: expected train_<i>.csv and test_<i>.csv for i from 0 on")
    test0.write_text(held)
    (folder / "splits/notes.csv").touch()
    refused("notes.csv is no split")
    (folder / "splits/notes.csv").unlink()

    genes = folder / "var_50genes.json"
    genes.write_text(json.dumps({"genes": GENES[:49]}))
    refused("var_50genes.json has 49 genes: expected 50 different ones")
    genes.write_text("[]")
    refused("var_50genes.json cannot be read")
    genes.write_text(json.dumps({"genes": [*GENES[:49], "NEW"]}))
    refused("lacks the genes NEW")
    genes.write_text(json.dumps({"genes": GENES}))

    patches, expression = folder / "patches/S2.h5", folder / "adata/S2.h5ad"
    write_patches(patches, "S2", 4, size=200)
    refused("has patches uint8 [200, 200, 3]: expected uint8 [224, 224, 3]")
    write_patches(patches, "S2", 4)
    with h5py.File(patches, "r+") as file:
        file.move("img", "picture")
    refused("S2.h5 has the keys barcode, coords, picture: expected img or imgs or images")
    write_patches(patches, "S2", 4)
    with h5py.File(patches, "r+") as file:
        file["barcode"][1] = file["barcode"][0]
    refused("has 4 patches and 3 different barcodes")
    write_patches(patches, "S9", 4)
    refused("has no expression for 4 of 4 patches (S9-0)")
    write_patches(patches, "S2", 4)
    counts = counts_of("S2", 4)
    counts[2, 7] = -1
    write_expression(expression, "S2", 4, "csr_matrix", counts)
    refused("has counts that are negative or not finite: expected raw counts in X")
    write_expression(expression, "S2", 4, "csr_matrix")
    with h5py.File(expression, "r+") as file:
        file["X"].attrs["encoding-type"] = "coo_matrix"
    refused("has X as coo_matrix: expected a dense array, csr_matrix or csc_matrix")
    with h5py.File(expression, "r+") as file:
        del file["obs"].attrs["_index"]
    refused("has no index of obs: expected a file of anndata 0.7 or newer")
    expression.write_text("no")
    refused("S2.h5ad is no HDF5 file")
    expression.unlink()
    refused("S2.h5ad is missing")


def test_other_names_of_the_keys_and_other_data(tmp_path: Path) -> None:
    folder = write_hest(tmp_path, "IDC", SPLITS, spots=4) / "IDC"
    (before,) = open_hest(tmp_path, ONE)
    with h5py.File(folder / "patches/S2.h5", "r+") as file:
        file.move("img", "imgs")
        file.move("barcode", "barcodes")
    (after,) = open_hest(tmp_path, ONE)
    assert (after.read(np.array([5])) == before.read(np.array([1 + 4]))).all() and after.hash != before.hash


@pytest.mark.parametrize("name", ["ext/secret", "/obs/names", ".", ""])
def test_an_index_lies_in_its_group_and_in_no_other_file(tmp_path: Path, name: str) -> None:
    path = write_hest(tmp_path, "IDC", SPLITS, spots=4) / "IDC/adata/S2.h5ad"
    with h5py.File(path, "a") as file, h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = file["obs/names"] = file["obs/_index"][()]
        file["obs/ext"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/")
        file["obs"].attrs["_index"] = name
    with pytest.raises(DatasetError, match="S2.h5ad names '.*', expected the name of something that lies in the group itself"):
        open_hest(tmp_path, ONE)


def test_from_files_to_the_colour_floor(tmp_path: Path) -> None:
    """Counts that follow the green channel are read off the colours; the other genes are not."""
    folder = write_hest(tmp_path, "IDC", SPLITS, spots=30) / "IDC"
    for sample in ("S1", "S2", "S3"):
        rng = np.random.default_rng(seed_of(sample))
        green, counts = rng.integers(0, 40, 30), counts_of(sample, 30)
        counts[:, :25] = green[:, None]
        write_expression(folder / f"adata/{sample}.h5ad", sample, 30, "csr_matrix", counts)
        with h5py.File(folder / f"patches/{sample}.h5", "r+") as file:
            pixels = file["img"][()] // 2
            pixels[..., 1] = pixels[..., 1] // 2 + 3 * green[:, None, None].astype(np.uint8)
            file["img"][()] = pixels
    (spots,) = open_hest(tmp_path, ONE)
    features = np.concatenate([colour_features(np.asarray(pixels)) for _, pixels in spots.batches(16)])
    floor = Embedded("colour", "", "native", [features], None, None, True)
    (score,) = run_hest([floor], spots, RegressionConfig(256, 100.0, "exact", 1), IntervalConfig(50, 0.95, 0))
    assert 0.4 < score.interval.value < 0.6 and score.floor and score.interval.patients == 2
    assert "interval withheld: 2 patients" in score.interval.note and score.groups == "slide"
    assert "resample samples and not patients" in score.note
