"""Gleason: arrays in their roles, cores as groups, and the second reader."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from public_layouts import PIXEL, public_config, write_gleason, write_image

from histoscale.eval.datasets.gleason import open_gleason, reader_agreement
from histoscale.eval.datasets.patches import DatasetError

ANY = public_config("gleason", counts="any")
SMALL = {"ZT111": 4, "ZT199": 4, "ZT204": 4, "ZT76": 4, "ZT80": 8}


def test_arrays_cores_and_grades(tmp_path: Path) -> None:
    patches = open_gleason(write_gleason(tmp_path, SMALL), ANY, 1)
    assert patches.classes == ("benign", "gleason_3", "gleason_4", "gleason_5") and patches.groups == "core"
    assert [len(patches.rows(role)) for role in ("train", "select", "report")] == [12, 4, 8]
    assert set(patches.blocks[patches.rows("train")]) == {"ZT111", "ZT199", "ZT204"}
    assert set(patches.blocks[patches.rows("select")]) == {"ZT76"} and set(patches.blocks[patches.rows("report")]) == {"ZT80"}
    assert set(patches.patients[patches.rows("report")]) == {"ZT80_0_A_1", "ZT80_1_A_1", "ZT80_2_A_1"}
    assert sorted(patches.labels[patches.rows("report")].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert patches.read(np.array([0, 23])).shape == (2, 3, 750, 750)
    assert patches.name == "gleason (part)" and len(patches.notes) == 1


def test_published_counts(tmp_path: Path) -> None:
    write_gleason(tmp_path, {"ZT111": 5101, "ZT199": 5101, "ZT204": 5101, "ZT76": 2482, "ZT80": 4967}, pixels=False)
    patches = open_gleason(tmp_path, public_config("gleason"), 1)
    assert patches.name == "gleason" and patches.notes == () and len(patches) == 22752
    next((tmp_path / "train_validation_patches_750/ZT76_0_A_1").iterdir()).unlink()
    with pytest.raises(DatasetError, match=r"holds 2481 of select \(expected 2482\)"):
        open_gleason(tmp_path, public_config("gleason"), 1)


def test_a_name_without_a_core_falls_back_to_arrays_and_says_so(tmp_path: Path) -> None:
    write_gleason(tmp_path, SMALL, pixels=False)
    (tmp_path / "train_validation_patches_750/ZT76_patch_99_class_2.jpg").write_bytes(PIXEL)
    patches = open_gleason(tmp_path, ANY, 1)
    assert patches.groups == "slide" and (patches.patients == patches.blocks).all()
    assert patches.notes[0].startswith("some names do not say their core")


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected the folder train_validation_patches_750"):
        open_gleason(tmp_path, ANY, 1)
    write_gleason(tmp_path, SMALL, pixels=False)
    fitting, testing = "train_validation_patches_750", "test_patches_750/patho_1"
    for stray, words in (
        (f"{fitting}/ZT80_1_A_1_patch_0_class_0.jpg", "of the array ZT80: expected ZT111, ZT199, ZT204, ZT76 there"),
        (f"{testing}/ZT76_1_A_1_patch_0_class_0.jpg", "of the array ZT76: expected ZT80 there"),
        (f"{testing}/ZT80_1_A_1_patch_0_class_4.jpg", "is no patch: expected <array>_<core>_patch_<i>_class_<0-3>.jpg"),
    ):
        (tmp_path / stray).touch()
        with pytest.raises(DatasetError, match=re.escape(words)):
            open_gleason(tmp_path, ANY, 1)
        (tmp_path / stray).unlink()
    shutil.rmtree(tmp_path / "test_patches_750/patho_1")
    (tmp_path / "test_patches_750/patho_1").mkdir()
    with pytest.raises(DatasetError, match="no labelled patch has the role 'report'"):
        open_gleason(tmp_path, ANY, 1)


def test_the_second_reader_is_matched_by_bytes(tmp_path: Path) -> None:
    write_gleason(tmp_path, {"ZT80": 8})
    assert reader_agreement(tmp_path) is None
    second = tmp_path / "test_patches_750/patho_2"
    # Other numbers, two other grades (0 -> 1 and 3 -> 2), one patch less and one of its own.
    for i, path in enumerate(sorted((tmp_path / "test_patches_750/patho_1").rglob("*.jpg"))[:7]):
        core, grade = path.parent.name, int(path.stem[-1])
        grade = {0: 1, 1: 2}.get(i, 0) if i < 2 else grade
        copy = second / core / f"{core}_patch_{90 + i}_class_{grade}.jpg"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    write_image(second / "ZT80_9_A_1/ZT80_9_A_1_patch_0_class_0.jpg", 750, 750, 77)
    found = reader_agreement(tmp_path)
    assert found is not None and found.of == 8 and found.confusion.sum() == 7
    firsts = [int(path.stem[-1]) for path in sorted((tmp_path / "test_patches_750/patho_1").rglob("*.jpg"))[:7]]
    expected = np.zeros((4, 4), int)
    for i, grade in enumerate(firsts):
        expected[grade, {0: 1, 1: 2}.get(i, grade)] += 1
    assert (found.confusion == expected).all()
    assert found.balanced_accuracy == pytest.approx(np.mean(expected.diagonal() / expected.sum(1)))
    assert found.balanced_accuracy < 1
    shutil.rmtree(second)
    write_image(second / "ZT80_9_A_1/ZT80_9_A_1_patch_0_class_0.jpg", 750, 750, 77)
    with pytest.raises(DatasetError, match="shares no patch with patho_1"):
        reader_agreement(tmp_path)
