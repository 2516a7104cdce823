"""BreaKHis: eva's split as it is, its shared numbers counted, and blocks that keep a number whole."""

from pathlib import Path

import numpy as np
import pytest
from public_layouts import TRAIN, VALIDATION, pixels_of, public_config, write_breakhis

from histoscale.eval.datasets.breakhis import open_breakhis
from histoscale.eval.datasets.patches import DatasetError
from histoscale.eval.probe import inner_folds

ANY = public_config("breakhis", counts="any")
SMALL = {
    "TA": {"16184CD": 2, "16184": 2, "13412": 3},
    "MC": {"18842D": 2, "13412": 2},
    "F": {"21998CD": 2, "29960AB": 2},
    "DC": {"2773": 2, "20629": 3},
}


def test_eva_roles_and_honest_blocks(tmp_path: Path) -> None:
    patches = open_breakhis(write_breakhis(tmp_path, SMALL), ANY, 1)
    assert patches.classes == ("TA", "MC", "F", "DC") and len(patches) == 20
    # Sorted by path, as eva sorts: benign before malignant, fibroadenoma before tubular adenoma.
    assert patches.labels.tolist() == [2] * 4 + [0] * 7 + [3] * 5 + [1] * 4
    held = set(patches.slide_ids[patches.rows("select")])
    assert held == {"16184CD", "18842D", "21998CD", "2773"}
    assert set(patches.roles) == {"train", "select"} and patches.usage.choose == "outer"
    assert set(patches.blocks[np.isin(patches.slide_ids, ["16184", "16184CD"])]) == {"16184"}
    one = patches.read(np.array([0]))[0]
    assert one.shape == (3, 23, 35)
    assert (one == pixels_of(35, 23, 12).transpose(2, 0, 1)).all()  # 7 of TA and 4 of MC were written before the first of F


def test_no_fold_splits_a_number(tmp_path: Path) -> None:
    patches = open_breakhis(write_breakhis(tmp_path, {k: {**VALIDATION[k], **TRAIN[k]} for k in TRAIN}, pixels=False), ANY, 1)
    for outside in inner_folds(patches.labels, patches.blocks, 5, 0):
        assert not set(patches.blocks[outside]) & set(patches.blocks[~outside])


def test_published_counts_and_the_91_of_339(tmp_path: Path) -> None:
    write_breakhis(tmp_path, {k: {**VALIDATION[k], **TRAIN[k]} for k in TRAIN}, pixels=False)
    patches = open_breakhis(tmp_path, public_config("breakhis"), 1)
    assert (len(patches.rows("train")), len(patches.rows("select"))) == (1132, 339)
    assert patches.name == "breakhis" and len(patches.notes) == 1 and patches.mpp is None
    assert patches.notes[0].startswith("91 of 339 images that eva validates on share their slide number")
    assert "16184, 18842, 19979, 23060" in patches.notes[0]
    assert open_breakhis(tmp_path, public_config("breakhis", mpp=0.49), 1).mpp == 0.49
    folder = tmp_path / "BreaKHis_v1/histology_slides/breast/malignant/SOB/ductal_carcinoma/SOB_M_DC_14-2773/40X"
    image = folder / "SOB_M_DC-14-2773-40-001.png"
    image.rename(folder / "SOB_M_DC-14-3909-40-099.png")  # the class still has 168
    with pytest.raises(DatasetError, match=r"27 of id 3909 \(expected 26\), 29 of id 2773 \(expected 30\)"):
        open_breakhis(tmp_path, public_config("breakhis"), 1)
    (folder / "SOB_M_DC-14-3909-40-099.png").unlink()
    with pytest.raises(DatasetError, match=r"holds 167 of val DC \(expected 168\)"):
        open_breakhis(tmp_path, public_config("breakhis"), 1)


def test_without_shared_numbers_nothing_is_noted(tmp_path: Path) -> None:
    apart = {"TA": {"15275": 2, "13412": 2}, "MC": {"18842D": 2, "7": 2}, "F": {"21998CD": 2, "8": 2}, "DC": {"2773": 2, "9": 2}}
    notes = open_breakhis(write_breakhis(tmp_path, apart), ANY, 1).notes
    assert len(notes) == 1 and notes[0].startswith("dataset.counts=any: 16 images are used where breakhis has 1471")


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    write_breakhis(tmp_path, SMALL)
    with pytest.raises(
        DatasetError, match="expected the folder BreaKHis_v1/histology_slides/breast, as BreaKHis_v1.tar.gz unpacks it"
    ):
        open_breakhis(tmp_path / "BreaKHis_v1", ANY, 1)
    breast = tmp_path / "BreaKHis_v1/histology_slides/breast"
    stray = breast / "benign/SOB/fibroadenoma/SOB_B_F_14-29960AB/40X/SOB_B_TA-14-29960AB-40-001.png"
    stray.touch()
    with pytest.raises(DatasetError, match="expected SOB_B_F-14-<id>-40-<n>.png"):
        open_breakhis(tmp_path, ANY, 1)
    stray.unlink()
    for image in (breast / "benign/SOB/fibroadenoma/SOB_B_F_14-29960AB/40X").iterdir():
        image.unlink()
    with pytest.raises(DatasetError, match="holds no training image of F"):
        open_breakhis(tmp_path, ANY, 1)
