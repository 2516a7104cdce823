"""BRACS: order, roles, slides as groups, and every refusal."""

import re
from pathlib import Path

import numpy as np
import pytest
from public_layouts import hest_config, pixels_of, public_config, tp53_config, write_bracs, write_image

from histoscale.eval.datasets.bracs import COUNTS, open_bracs
from histoscale.eval.datasets.patches import DatasetError
from histoscale.launch.config import load

ANY = public_config("bracs", counts="any")
TOP = "BRACS_RoI/latest_version"


def test_labels_roles_and_pixels_in_the_order_of_parts_and_classes(tmp_path: Path) -> None:
    patches = open_bracs(write_bracs(tmp_path), ANY, 1)
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
    patches = open_bracs(write_bracs(tmp_path), ANY, 1)
    assert patches.name == "bracs (part)" and len(patches.notes) == 1
    assert "84 images are used where bracs has 4539" in patches.notes[0]
    write_image(tmp_path / TOP / "train/0_N/BRACS_1000_N_0.png", 20, 20, 5)
    assert open_bracs(tmp_path, ANY, 1).hash != patches.hash


def test_the_published_counts_are_held_to(tmp_path: Path) -> None:
    write_bracs(tmp_path, COUNTS, pixels=False)
    patches = open_bracs(tmp_path, public_config("bracs"), 1)
    assert patches.name == "bracs" and patches.notes == ()
    assert [len(patches.rows(role)) for role in ("train", "select", "report")] == [3657, 312, 570]
    (tmp_path / TOP / "val/3_FEA/BRACS_1500_FEA_0.png").unlink()
    with pytest.raises(DatasetError, match=r"holds 48 of val/3_FEA \(expected 49\): .* dataset.counts=any"):
        open_bracs(tmp_path, public_config("bracs"), 1)
    assert open_bracs(tmp_path, ANY, 1).name == "bracs (part)"


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    write_bracs(tmp_path)
    with pytest.raises(DatasetError, match="expected the folder BRACS_RoI/latest_version"):
        open_bracs(tmp_path / "elsewhere", ANY, 1)
    place = tmp_path / TOP / "train/6_IC"
    place.rename(tmp_path / "kept")
    with pytest.raises(DatasetError, match="train has the class folders 0_N, .*: expected 0_N, .*; add 6_IC"):
        open_bracs(tmp_path, ANY, 1)
    place.mkdir()
    with pytest.raises(DatasetError, match="holds no training image of IC"):
        open_bracs(tmp_path, ANY, 1)
    place.rmdir()
    (tmp_path / "kept").rename(place)
    stray = place / "BRACS_1000_DCIS_9.png"
    stray.touch()
    with pytest.raises(DatasetError, match=re.escape("expected BRACS_<slide>_IC_<n>.png")):
        open_bracs(tmp_path, ANY, 1)
    stray.rename(place / "BRACS_1500_IC_9.png")
    with pytest.raises(DatasetError, match="1 slides stand in both train and select .BRACS_1500."):
        open_bracs(tmp_path, ANY, 1)
    (place / "BRACS_1500_IC_9.png").unlink()
    (place / "BRACS_1000_IC_0.png").write_text("no image")
    with pytest.raises(DatasetError, match="BRACS_1000_IC_0.png cannot be decoded"):
        open_bracs(tmp_path, ANY, 1)


def test_counts_are_official_or_any(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="dataset.counts is 'some': expected official or any"):
        open_bracs(write_bracs(tmp_path), public_config("bracs", counts="some"), 1)


@pytest.mark.parametrize("name", ["bracs", "breakhis", "gleason", "tp53", "hest"])
def test_the_committed_configurations_compose(name: str) -> None:
    composed = load("probe", [f"dataset={name}", "encoder=colour", "data_root=sets"])
    of_name = {"tp53": tp53_config, "hest": hest_config}
    assert composed.config.dataset == (of_name[name]() if name in of_name else public_config(name))
