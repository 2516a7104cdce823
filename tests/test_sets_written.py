"""Labelled sets as people write them: spellings, tables, encodings and odd files change nothing, or are named in a sentence."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_names import rewritten
from test_sets_folder import OWN, image, listing, opened, own_rows, tree

from histoscale.data.picturefolder import list_pictures
from histoscale.eval.datasets.folder import open_folder
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches, counted_classes
from histoscale.eval.honest import outer_questions, question_of
from histoscale.eval.scores.interval import IntervalConfig, Resampling

INTERVAL = IntervalConfig(50, 0.95, 0)


def same_set(one: LabelledPatches, other: LabelledPatches) -> None:
    """The same rows, labels and roles, and equal folds and draws."""
    assert np.array_equal(one.labels, other.labels) and np.array_equal(one.roles, other.roles)
    for mine, theirs in zip(_questions(one), _questions(other), strict=True):
        assert np.array_equal(mine.train, theirs.train) and mine.asked.keys() == theirs.asked.keys()
        assert all(np.array_equal(mine.asked[role], theirs.asked[role]) for role in mine.asked)
    draws = [Resampling.of(patches.patients, INTERVAL) for patches in (one, other)]
    assert np.array_equal(draws[0].codes, draws[1].codes) and np.array_equal(draws[0].counts, draws[1].counts)


def _questions(patches: LabelledPatches):  # type: ignore[no-untyped-def]
    return outer_questions(patches, 3, 0) if patches.usage.choose == "outer" else [question_of(patches)]


@pytest.mark.parametrize("splits", [True, False])
def test_no_spelling_of_classes_patients_or_splits_changes_a_set(tmp_path: Path, splits: bool) -> None:
    rows, draw = [], random.Random(0)
    for i in range(60):
        image(tmp_path / f"img/{i}.png", i)
        rows.append({"path": f"img/{i}.png", "label": ["Tumour tissue", "normal"][i % 2], "patient_id": f"Pat {i // 2}"})
        rows[-1] |= {"site": "Zürich"}
        rows[-1] |= {"split": "train" if i < 30 else "test"} if splits else {}
    listing(tmp_path, rows)
    plain = opened(tmp_path)
    assert plain.notes[0].startswith("no split") if not splits else not plain.notes
    for _ in range(3):
        listing(tmp_path, [{**row, **{k: rewritten(v, draw) for k, v in row.items() if k != "path"}} for row in rows])
        found = opened(tmp_path)
        same_set(plain, found)
        assert len(set(found.patients.tolist())) == 30 and len(set(found.sites.tolist())) == 1
        assert any(note.startswith("classes written in several ways are one each:") for note in found.notes)


def test_no_spelling_of_folders_changes_a_set(tmp_path: Path) -> None:
    paths = [f"P{patient}/{label}/{i}.png" for patient in (1, 2, 3) for label in ("normal", "Tumour") for i in range(2)]
    plain = opened(tree(tmp_path / "a", *paths))
    other = opened(tree(tmp_path / "b", *(p.replace("P2", "p2 ").replace("/Tumour/0", "/tumour /0") for p in paths)))
    same_set(plain, other)
    assert "as Tumour" in " ".join(other.notes) or "as tumour" in " ".join(other.notes)


def test_a_patient_under_two_spellings_stands_in_two_roles(tmp_path: Path) -> None:
    rows = own_rows(tmp_path)
    for spelling in ("p3", "P3 ", "Ｐ3"):
        listing(tmp_path, [{**rows[0], "patient_id": spelling}, *rows[1:]])
        with pytest.raises(DatasetError, match=r"1 patients stand in both train and report \(P3\)"):
            opened(tmp_path)
    listing(tmp_path, [{**rows[0], "patient_id": "P 3"}, *rows[1:]])
    with pytest.raises(DatasetError, match="'P 3' and 'P3' differ by a blank inside alone"):
        opened(tmp_path)


@pytest.mark.parametrize("missing", ["nan", "NA", "N/A", "null", "None", ""])
def test_a_missing_patient_is_no_patient(tmp_path: Path, missing: str) -> None:
    rows = [{**row, "patient_id": missing, "site": missing} for row in own_rows(tmp_path)]
    listing(tmp_path, rows)
    found = opened(tmp_path)
    assert found.groups == "none" and set(found.sites.tolist()) == {""}
    listing(tmp_path, [{**rows[0], "patient_id": "P1"}, *rows[1:]])
    with pytest.raises(DatasetError, match="7 of 8 are missing"):
        opened(tmp_path)
    listing(tmp_path, [{**rows[0], "label": missing}, *rows[1:]])
    with pytest.raises(DatasetError, match="line 2: the image 'img/0.png' has no label"):
        opened(tmp_path)


@pytest.mark.parametrize("words, classes", [
    (("True", "False"), ("False", "True")), (("yes", "no"), ("no", "yes")), (("1.0", "0.0"), ("0.0", "1.0")),
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("mark", [";", "\t"])
def test_labels_of_any_form_in_tables_of_any_form(
    tmp_path: Path, words: tuple[str, str], classes: tuple[str, str], encoding: str, mark: str
) -> None:
    rows = own_rows(tmp_path)
    lines = [mark.join(["Path", "Label", "Split", "Patient ID"])]
    lines += [mark.join([r["path"].replace("/", "\\"), words["uv".index(r["label"])], r["split"], r["patient_id"]]) for r in rows]
    (tmp_path / "labels.csv").write_bytes("\r\n".join(lines).encode(encoding))
    found = opened(tmp_path)
    assert found.classes == classes and found.groups == "patient" and len(found.rows("report")) == 4


def test_truths_and_numbers_are_joined_where_nothing_else_is_meant(tmp_path: Path) -> None:
    rows = own_rows(tmp_path)
    spelt = ["True", "0", "1.0", "False", "yes", "no", "1", "0.0"]
    listing(tmp_path, [{**row, "label": label} for row, label in zip(rows, spelt, strict=True)])
    found = opened(tmp_path)
    assert len(found.classes) == 2 and np.bincount(found.labels).tolist() == [4, 4]
    assert "written in several ways" in found.notes[0]


@pytest.mark.parametrize("told, words", [
    ("img/0", "the image 'img/0' is missing; the nearest there is 'img/0.png': is the suffix another one?"),
    ("img/0.svs", "the nearest there is 'img/0.png': is the suffix another one?"),
    ("IMG/0.png", "the nearest there is 'img': is that the one?"),
    ("nan", "line 2 names no image"),
])  # fmt: skip
def test_an_image_that_is_not_there_is_named_with_the_nearest(tmp_path: Path, told: str, words: str) -> None:
    rows = own_rows(tmp_path)
    listing(tmp_path, [{**rows[0], "path": told}, *rows[1:]])
    with pytest.raises(DatasetError) as error:
        opened(tmp_path)
    assert words in str(error.value)


def test_what_is_no_picture_is_counted_by_folder(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"{label}/{i}.png" for label in "uv" for i in range(3)))
    for name in ("u/a.jp2", "u/b.jp2", "v/notes.txt", ".hidden/x.jp2", "readme.md"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    said = opened(root).notes[0]
    assert said.startswith("3 files are no pictures that are read (.png, ") and said.endswith("u: 2 .jp2; v: 1 .txt")
    assert list_pictures(root).skipped[""] == {".md": 1}


@pytest.mark.parametrize("files, words", [
    (["w/a.jp2", "w/b.jp2"], r"1 class folders hold no image that is read: w \(2 .jp2\)"),
    (["w/"], r"w \(empty\)"),
])  # fmt: skip
def test_a_class_folder_without_an_image_is_an_error(tmp_path: Path, files: list[str], words: str) -> None:
    root = tree(tmp_path, *(f"{label}/{i}.png" for label in "uv" for i in range(3)))
    for name in files:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).mkdir() if name.endswith("/") else (root / name).write_bytes(b"x")
    with pytest.raises(DatasetError, match=words):
        opened(root)


def test_a_patient_may_lack_a_class(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"P{patient}/{label}/1.png" for patient in (1, 2, 3) for label in "uv"))
    (root / "P4/v").mkdir(parents=True)
    (root / "P4/u").mkdir()
    image(root / "P4/u/1.png", 9)
    assert "1 patients have an empty class folder (P4/v)" in opened(root).notes


def test_classes_are_counted_by_role(tmp_path: Path) -> None:
    listing(tmp_path, own_rows(tmp_path))
    words = counted_classes(opened(tmp_path))
    assert words.endswith("8 images in 2 classes: u 4 (train 2, report 2), v 4 (train 2, report 2)")


def test_pictures_of_many_kinds_are_one_set(tmp_path: Path) -> None:
    """A set saved with 16 bits, as palettes or as floats holds the pixels of the set saved with 8, dark pictures included."""
    grey = [np.full((8, 8), 4 * i + 1, np.uint8) + np.arange(8, dtype=np.uint8) for i in range(8)]
    ways = {
        "png": lambda x, path: Image.fromarray(x).save(path.with_suffix(".png")),
        "palette": lambda x, path: Image.fromarray(x).convert("P").save(path.with_suffix(".png")),
        "deep": lambda x, path: tifffile.imwrite(path.with_suffix(".tif"), x.astype(np.uint16) * 257, photometric="minisblack"),
        "floats": lambda x, path: tifffile.imwrite(path.with_suffix(".tif"), (x / 255).astype("f4"), photometric="minisblack"),
        "floats to 255": lambda x, path: tifffile.imwrite(path.with_suffix(".tif"), x.astype("f4"), photometric="minisblack"),
    }
    seen = {}
    for way, save in ways.items():
        for i, pixels in enumerate(grey):
            path = tmp_path / way / "uv"[i % 2] / str(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            save(pixels, path)
        found = open_folder(tmp_path / way, OWN, 2)
        seen[way] = np.asarray(found.read(np.arange(8)))
    assert all(np.array_equal(pixels, seen["png"]) for pixels in seen.values())
    assert seen["png"].max() < 60


def test_deep_pictures_that_use_few_bits_are_told_and_read_as_declared(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (8, 8), np.uint16)
    for way, tags in (("silent", []), ("declared", [(341, 3, 1, 4095, False)])):
        for i in range(4):
            path = tmp_path / way / "uv"[i % 2] / f"{i}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, values, photometric="minisblack", extratags=tags)
    silent, said = (opened(tmp_path / way) for way in ("silent", "declared"))
    told = [note for note in silent.notes if "use 12" in note]
    assert len(told) == 1 and "SMaxSampleValue=4095" in told[0] and not any("bits" in note for note in said.notes)
    assert np.array_equal(np.asarray(silent.read(np.arange(1)))[0, 0], values >> 8)
    assert np.array_equal(np.asarray(said.read(np.arange(1)))[0, 0], values >> 4)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without the permission to read it; root may read everything."""
    for name in ("dark", "light"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    scan = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "dark":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="Permission denied, so .* would be missing.*dark") as failed:
        list_pictures(tmp_path)
    assert failed.value.filename == str(tmp_path / "dark")
