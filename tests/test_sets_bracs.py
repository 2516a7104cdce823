"""BRACS: order, roles, slides as groups, and every refusal."""

import re
from pathlib import Path

import numpy as np
import pytest
from public_layouts import dataset_config, pixels_of, write_bracs, write_image

from histoscale.eval.datasets.bracs import COUNTS, open_bracs
from histoscale.eval.datasets.patches import DatasetError
from histoscale.launch.config import load

ANY = dataset_config("bracs", counts="any")
TOP = "BRACS_RoI/latest_version"


def test_labels_roles_and_pixels_in_the_order_of_parts_and_classes(tmp_path: Path) -> None:
    patches = open_bracs(write_bracs(tmp_path), ANY)
    assert len(patches) == 3 * 7 * 4 and patches.size_px is None and patches.mpp == 0.25
    assert patches.classes == ("N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC")
    assert patches.labels.tolist() == np.tile(np.repeat(np.arange(7), 4), 3).tolist()
    assert patches.roles.tolist() == ["train"] * 28 + ["select"] * 28 + ["report"] * 28
    assert set(patches.patients) == {f"BRACS_{n}" for n in (1000, 1001, 1500, 1501, 2000, 2001)}
    assert (patches.groups, patches.blocks is patches.patients) == ("slide", True)
    read = patches.read(np.array([30, 2]))
    # Sorted by slide, then number: the third of a class was written second.
    assert (read[1] == pixels_of(22, 32, 2).transpose(2, 0, 1)).all()
    assert (read[0] == pixels_of(22, 30, 30).transpose(2, 0, 1)).all()


def test_a_part_says_so_and_a_changed_file_is_other_data(tmp_path: Path) -> None:
    patches = open_bracs(write_bracs(tmp_path), ANY)
    assert patches.name == "bracs (part)" and len(patches.notes) == 1
    assert patches.notes[0].startswith("a part of bracs (dataset.counts=any)") and "0_N 4 of 357" in patches.notes[0]
    write_image(tmp_path / TOP / "train/0_N/BRACS_1000_N_0.png", 20, 20, 5)
    assert open_bracs(tmp_path, ANY).hash != patches.hash


def test_the_published_counts_are_held_to(tmp_path: Path) -> None:
    write_bracs(tmp_path, COUNTS, pixels=False)
    patches = open_bracs(tmp_path, dataset_config("bracs"))
    assert patches.name == "bracs" and patches.notes == ()
    assert [len(patches.rows(role)) for role in ("train", "select", "report")] == [3657, 312, 570]
    (tmp_path / TOP / "val/3_FEA/BRACS_1500_FEA_0.png").unlink()
    with pytest.raises(DatasetError, match=r"val/3_FEA holds 48 images of bracs: expected 49, fetch .* dataset.counts=any"):
        open_bracs(tmp_path, dataset_config("bracs"))
    assert open_bracs(tmp_path, ANY).name == "bracs (part)"


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    write_bracs(tmp_path)
    with pytest.raises(DatasetError, match="BRACS_RoI/latest_version is no folder: expected BRACS_RoI"):
        open_bracs(tmp_path / "elsewhere", ANY)
    place = tmp_path / TOP / "train/6_IC"
    place.rename(tmp_path / "kept")
    with pytest.raises(DatasetError, match="train/6_IC is no folder"):
        open_bracs(tmp_path, ANY)
    place.mkdir()
    with pytest.raises(DatasetError, match="train/6_IC holds no images of bracs: expected 521"):
        open_bracs(tmp_path, ANY)
    place.rmdir()
    (tmp_path / "kept").rename(place)
    stray = place / "BRACS_1000_DCIS_9.png"
    stray.touch()
    with pytest.raises(DatasetError, match=re.escape("expected BRACS_<slide>_IC_<n>.png")):
        open_bracs(tmp_path, ANY)
    stray.rename(place / "BRACS_1500_IC_9.png")
    with pytest.raises(DatasetError, match="1 slides stand in both train and select .BRACS_1500."):
        open_bracs(tmp_path, ANY)
    (place / "BRACS_1500_IC_9.png").unlink()
    (place / "BRACS_1000_IC_0.png").write_text("no image")
    with pytest.raises(DatasetError, match="BRACS_1000_IC_0.png cannot be decoded"):
        open_bracs(tmp_path, ANY).read(np.array([24]))


@pytest.mark.parametrize("changes, words", [
    ({"counts": "some"}, "dataset.counts is 'some': expected official or any"),
    ({"report": "val"}, "has the published parts train, test and null"),
    ({"external": "test"}, "are train, test and test: bracs has the published parts"),
    ({"mpp": 0.5}, "dataset.mpp is 0.5: bracs was published at 0.25"),
    ({"task": "atypia"}, "dataset.task is atypia: bracs takes null"),
])  # fmt: skip
def test_a_key_that_would_do_nothing_is_refused(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        open_bracs(tmp_path, dataset_config("bracs", **changes))


@pytest.mark.parametrize("name", ["bracs", "breakhis", "gleason", "tp53", "hest"])
def test_the_committed_configurations_compose(name: str) -> None:
    composed = load("probe", [f"dataset={name}", "encoder=colour", "data_root=sets"])
    assert composed.config.dataset == dataset_config(name)
