"""Images of one's own: every layout, whole patients, any size; nothing is guessed that could be wrong."""

import csv
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from pydantic import TypeAdapter
from set_fixtures import picture

from histoscale.eval.datasets.folder import FolderConfig, open_folder
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches
from histoscale.launch.config import load

OWN = FolderConfig("folder", "auto", "auto", ["train"], [], ["test"], [], 0.5)


def image(path: Path, value: int, side: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(path)


def listing(root: Path, found: list[dict[str, str]]) -> None:
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0].keys())
        writer.writeheader()
        writer.writerows(found)


def own_rows(root: Path) -> list[dict[str, str]]:
    found = []
    for i in range(8):
        image(root / f"img/{i}.png", 10 * i)
        split = "train" if i < 4 else "test"
        found.append({"path": f"img/{i}.png", "label": "uv"[i % 2], "split": split, "patient_id": f"P{i // 2}"})
    return found


def opened(root: Path, **changes: Any) -> LabelledPatches:
    return open_folder(root, replace(OWN, **changes), 2)


def test_a_list_of_images_with_patients(tmp_path: Path) -> None:
    listing(tmp_path, own_rows(tmp_path))
    patches = opened(tmp_path)
    assert patches.groups == "patient" and patches.classes == ("u", "v") and patches.size_px == 16 and not patches.notes
    assert (np.asarray(patches.read(np.array([3, 7])))[:, 0, 0, 0] == [30, 70]).all()
    image(tmp_path / "img/3.png", 31)
    assert opened(tmp_path).hash != patches.hash


def test_a_list_may_name_slides_a_part_to_select_on_and_rows_of_no_role(tmp_path: Path) -> None:
    rows = [{**row, "slide_id": f"S{i}"} for i, row in enumerate(own_rows(tmp_path))]
    rows[2]["split"] = rows[3]["split"] = "val"
    rows[6]["split"] = rows[7]["split"] = "later"
    listing(tmp_path, rows)
    patches = opened(tmp_path, select=["val"])
    assert patches.roles.tolist() == ["train", "train", "select", "select", "report", "report"]
    assert patches.usage.choose == "select" and patches.slide_ids.tolist() == [f"S{i}" for i in range(6)]
    assert patches.notes == ("2 images of the splits later have no role and are not used",)


def test_a_list_without_splits_is_reported_by_outer_folds(tmp_path: Path) -> None:
    listing(tmp_path, [{k: v for k, v in row.items() if k != "split"} for row in own_rows(tmp_path)])
    patches = opened(tmp_path)
    assert patches.usage.choose == "outer" and len(set(patches.blocks.tolist())) == 4 and set(patches.roles) == {"train"}
    assert "folds over all 4 patients are reported" in patches.notes[0]


@pytest.mark.parametrize("linked", [False, True], ids=["plain", "through a link"])
def test_a_list_of_whole_paths_is_read_from_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    (tmp_path / "set").mkdir()
    rows = own_rows(tmp_path / "set")
    (tmp_path / "link").symlink_to("set")
    home = tmp_path / ("link" if linked else "set")
    listing(tmp_path / "set", rows)
    wanted = opened(tmp_path / "set")
    listing(tmp_path / "set", [{**row, "path": f"{home}/{row['path']}"} for row in rows])
    monkeypatch.chdir(tmp_path)
    for root in (Path("set"), tmp_path / "set", Path("link")):
        assert opened(root).read(np.array([3]))[0][0, 0, 0] == 30 and len(opened(root)) == len(wanted)
    assert opened(Path("set")).hash == wanted.hash


@pytest.mark.parametrize(("path", "words"), [
    ("img/\0.png", "line 3: the path .* holds a character that no name of a file does: name an image"),
    ("x" * 300, "line 3: the path 'x+' cannot be followed .File name too long.: name an image"),
    ("img", "line 3: the path 'img' is a folder: name an image"),
    ("pipe", "line 3: the path 'pipe' is no plain file: name an image"),
    ("circle", "line 3: the path 'circle' cannot be followed .Symlink loop .*: name an image"),
])  # fmt: skip
def test_what_can_be_no_image_is_named_with_its_line(tmp_path: Path, path: str, words: str) -> None:
    rows = own_rows(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    listing(tmp_path, [rows[0], {**rows[1], "path": path}, *rows[2:]])
    with pytest.raises(DatasetError, match=words):
        opened(tmp_path)


def test_a_broken_picture_of_floats_is_named_and_no_other(tmp_path: Path) -> None:
    rows = [{**row, "path": row["path"].replace("png", "tif")} for row in own_rows(tmp_path)]
    for row in rows:
        tifffile.imwrite(tmp_path / row["path"], np.full((16, 16), 0.5, np.float32), compression="zlib")
    listing(tmp_path, rows)
    patches, broken = opened(tmp_path), tmp_path / rows[6]["path"]
    broken.write_bytes(broken.read_bytes()[:-8])
    with pytest.raises(DatasetError, match=f"{broken} cannot be decoded"):
        patches.read(np.array([0]))


def tree(root: Path, *paths: str) -> Path:
    for i, path in enumerate(paths):
        image(root / path, i)
    return root


def test_split_folders_have_no_patients_and_say_so(tmp_path: Path) -> None:
    patches = opened(tree(tmp_path, *(f"{split}/{label}/1.png" for split in ("train", "test") for label in "uv")))
    assert patches.groups == "none" and len(patches) == 4 and len(patches.rows("report")) == 2
    assert "groups: none" in patches.notes[0]


def test_class_folders_are_reported_by_outer_folds(tmp_path: Path) -> None:
    patches = opened(tree(tmp_path, "u/1.png", "u/2.png", "v/1.png", "v/2.png", ".hidden/x.png", "__MACOSX/u/1.png"))
    assert patches.usage.choose == "outer" and patches.groups == "none" and len(patches) == 4
    with pytest.raises(DatasetError, match="holds the splits none, and none is called test, train: name them"):
        opened(tmp_path, split="named")


PATIENTS = [f"P{patient}/{label}/{i}.png" for patient in (1, 2, 3) for label in "uv" for i in range(2)]


def test_patient_folders_are_patients(tmp_path: Path) -> None:
    root = tree(tmp_path, *PATIENTS)
    outer = opened(root)
    assert outer.groups == "patient" and outer.usage.choose == "outer" and set(outer.blocks.tolist()) == {"P1", "P2", "P3"}
    assert "no patient is called train, test: folds over all 3 patients are reported" in outer.notes[0]
    named = opened(root, train=["P1", "P3"], report=["P2"])
    assert named.usage.choose == "folds" and set(named.patients[named.rows("train")].tolist()) == {"P1", "P3"}
    assert set(named.patients[named.rows("report")].tolist()) == {"P2"} and not named.notes and named.hash != outer.hash
    part = opened(root, train=["P1"], report=["P2"])
    assert part.notes == ("4 images of the patients P3 have no role and are not used",)
    assert opened(root, train=["P1"], report=["P2"], split="outer").usage.choose == "outer"


@pytest.mark.parametrize("changes, words", [
    ({"train": ["P1"], "report": ["P9"]}, "holds the patients P1, P2, P3, and none is called P9"),
    ({"train": ["P1"], "report": []}, "dataset.train and dataset.report must name some"),
    ({"train": ["P1"], "report": ["P1"]}, "are P1, P1: expected different names"),
    ({"layout": "split"}, "holds the splits P1, P2, P3, and none is called test, train"),
    ({"layout": "class"}, "does not fit dataset.layout=class: expected <class>/<image>"),
    ({"layout": "csv"}, "holds no labels.csv"),
    ({"layout": "tree"}, "dataset.layout is 'tree': expected auto, csv, split, class, patient"),
    ({"split": "mine"}, "dataset.split is 'mine': expected auto, named, outer"),
])  # fmt: skip
def test_names_that_fit_nothing_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetError, match=words) as error:
        opened(tree(tmp_path, *PATIENTS), **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("paths, words", [
    (["train/u/1.png", "P1/u/1.png"], "the folders P1, train of .* may be splits or patients: say dataset.layout="),
    (["north/u/1.png", "south/u/1.png"], "may be splits or patients"),
    (["fold1/u/1.png", "P2/u/1.png"], "may be splits or patients"),
    (["u/1.png", "P1/v/1.png"], "found images 1 and 2 folders deep"),
    (["train/1.png", "test/1.png"], "found images 1 folders deep"),
    (["1.png"], "found images 0 folders deep"),
    ([], "holds neither labels.csv nor images in .*: found no image"),
    (["a/b/c/1.png"], "found images 3 folders deep"),
])  # fmt: skip
def test_what_could_be_two_things_is_not_guessed(tmp_path: Path, paths: list[str], words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        opened(tree(tmp_path, *paths))
    with pytest.raises(DatasetError, match="none is no folder: expected one that holds"):
        opened(tmp_path / "none")


@pytest.mark.parametrize("changes, words", [
    ({"patient_id": "P3"}, r"1 patients stand in both train and report \(P3\)"),
    ({"patient_id": ""}, "some rows have a patient_id and some have none"),
    ({"path": "../outside.png"}, "leaves the folder"),
    ({"path": "img/none.png"}, "is missing"),
    ({"path": "img/7.png"}, r"lists 1 images twice \(img/7.png\)"),
    ({"label": ""}, "line 2: the image 'img/0.png' has no label"),
    ({"label": "w", "split": "test", "patient_id": "P9"}, "the class 'w' has no training patch"),
    ({"split": "external", "patient_id": "P9"}, "external patches have no site"),
])  # fmt: skip
def test_own_images_are_checked(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    found = own_rows(tmp_path)
    listing(tmp_path, [{**found[0], **changes}, *found[1:]])
    with pytest.raises(DatasetError, match=words):
        opened(tmp_path, external=["external"]) if changes.get("split") == "external" else opened(tmp_path)


def test_images_of_any_size(tmp_path: Path) -> None:
    sizes = [(8, 6), (6, 8), (10, 10), (8, 6)]
    pixels = [picture(tmp_path / label / f"{i}.png", i, *sizes[2 * n + i]) for n, label in enumerate("uv") for i in range(2)]
    patches = opened(tmp_path)
    assert patches.size_px is None
    found = patches.read(np.arange(4))
    assert isinstance(found, list) and [one.shape for one in found] == [(3, 6, 8), (3, 8, 6), (3, 10, 10), (3, 6, 8)]
    for one, drawn in zip(found, pixels, strict=True):
        assert (one == drawn.transpose(2, 0, 1)).all()


def test_an_image_that_changed_or_is_none_is_named(tmp_path: Path) -> None:
    listing(tmp_path, own_rows(tmp_path))
    patches = opened(tmp_path)
    image(tmp_path / "img/5.png", 1, side=20)
    with pytest.raises(DatasetError, match="5.png is 20 x 20 px: expected 16 x 16"):
        patches.read(np.arange(8))
    (tmp_path / "img/5.png").write_text("no image")
    for look in (lambda: patches.read(np.arange(8)), lambda: opened(tmp_path)):
        with pytest.raises(DatasetError, match="5.png cannot be decoded"):
            look()
    with pytest.raises(DatasetError, match="holds neither labels.csv nor images"):
        opened(tmp_path / "img")


@pytest.mark.parametrize("value, names", [("14082", ["14082"]), ("[14082,a]", ["14082", "a"]), ("null", []), ("007", ["007"])])
def test_patients_may_be_numbers_on_the_command_line(value: str, names: list[str]) -> None:
    keys = ["encoder=colour", "dataset=folder", "data_root=x", f"dataset.train={value}"]
    assert load("probe", keys).config.dataset.train == names
    assert TypeAdapter(FolderConfig).validate_python({**vars(OWN), "train": 7}).train == ["7"]


def test_real_tiles_of_two_patients(shared_data: Path) -> None:
    """909 patches; the patients are folders, so auto holds each of them out, and both may be named."""
    root = shared_data / "labelled/idc_2patients"
    outer = opened(root)
    assert outer.usage.choose == "outer" and len(outer) == 909 and outer.classes == ("0", "1") and outer.groups == "patient"
    assert set(outer.blocks.tolist()) == {"14082", "14306"} and np.bincount(outer.labels).tolist() == [545, 364]
    named = opened(root, train=["14082"], report=["14306"])
    assert set(named.patients[named.rows("train")].tolist()) == {"14082"} and len(named) == 909
    assert set(named.patients[named.rows("report")].tolist()) == {"14306"} and named.usage.choose == "folds"
    pixels = named.read(named.rows("report")[:64])
    assert len(pixels) == 64 and all(one.dtype == np.uint8 and len(one) == 3 for one in pixels)


@pytest.mark.parametrize("look, words", [
    (lambda root: opened(root), "holds 8 images in 8 classes, and 01_TUMOR has 1 of the images: folds over everything need at l"),
    (lambda root: opened(root, split="named"), "holds the splits none, and none is called test, train"),
])  # fmt: skip
def test_eight_tiles_of_eight_classes_teach_nothing(
    shared_data: Path, look: Callable[[Path], LabelledPatches], words: str
) -> None:
    with pytest.raises(DatasetError, match=words):
        look(shared_data / "labelled/kather2016_8x1")
