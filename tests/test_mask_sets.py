"""CoNSeP and MoNuSAC in their exact layouts: labels to the pixel, and one sentence for whatever is wrong."""

import math
import re
from dataclasses import replace
from pathlib import Path

import mask_fixtures as fixtures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import loadmat, savemat

from histoscale.eval.datasets.consep import MERGED, open_consep
from histoscale.eval.datasets.masks import LabelledMasks
from histoscale.eval.datasets.monusac import open_monusac
from histoscale.eval.datasets.patches import DatasetError
from histoscale.eval.datasets.polygons import paint, read_polygons

SLIDE = "TCGA-AB-1000-01Z-00-DX1"


def refused(opened: object, match: str) -> str:
    """The message of a refusal, which is one sentence."""
    with pytest.raises(DatasetError, match=match) as caught:
        opened()  # type: ignore[operator]
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".") and "expected" in text, text
    return text


@pytest.mark.parametrize("older", [False, True])
def test_consep_is_read_to_the_pixel_from_both_releases(tmp_path: Path, older: bool) -> None:
    truth = fixtures.write_consep(tmp_path, older=older)
    masks = open_consep(tmp_path, fixtures.CONSEP)
    assert masks.names.tolist() == ["train_1", "train_2", "train_3", "test_1", "test_2"]
    assert masks.roles.tolist() == ["train"] * 3 + ["report"] * 2
    assert masks.groups == "image" and masks.mpp == 0.25 and masks.tile_px == 250
    assert masks.classes == ("background", "other", "inflammatory", "epithelial", "spindle-shaped")
    assert any("a part of the set: 3 images in 'Train' and 2 images in 'Test'" in note for note in masks.notes)
    assert any("patients" in note for note in masks.notes)
    seen: set[int] = set()
    for row, name in enumerate(masks.names):
        pixels, mask = masks.read(row)
        merged = {0: 0, 1: 1, 2: 2, 3: 3, 4: 3, 5: 4, 6: 4, 7: 4}
        np.testing.assert_array_equal(mask, np.vectorize(merged.get)(truth[name]))
        folder = "Train" if name.startswith("train") else "Test"
        np.testing.assert_array_equal(
            pixels, np.asarray(Image.open(tmp_path / folder / "Images" / f"{name}.png")).transpose(2, 0, 1)
        )
        seen |= set(np.unique(truth[name]).tolist())
    assert seen == set(range(8)) and len(MERGED) == 8


def test_the_whole_of_consep_is_known_by_its_counts(tmp_path: Path) -> None:
    official = replace(fixtures.CONSEP, counts="official")
    fixtures.write_consep(tmp_path, 1, 1)
    text = refused(
        lambda: open_consep(tmp_path, official), "holds 1 images in 'Train' and 1 images in 'Test': expected 27 and 14"
    )
    assert "dataset.counts=any" in text
    blank, flat = np.zeros((1000, 1000), np.uint8), Image.new("RGB", (1000, 1000), "white")
    for part, count in (("Train", 27), ("Test", 14)):
        for number in range(1, count + 1):
            flat.save(tmp_path / part / "Images" / f"{part.lower()}_{number}.png")
            savemat(tmp_path / part / "Labels" / f"{part.lower()}_{number}.mat", {"inst_map": blank, "type_map": blank})
    masks = open_consep(tmp_path, official)
    assert len(masks) == 41 and not any("a part of" in note for note in masks.notes)
    Image.new("RGB", (800, 1000)).save(tmp_path / "Train/Images/train_9.png")
    refused(lambda: open_consep(tmp_path, official), "train_9.png is 800 x 1000 px, expected 1000 x 1000|maps are")


def test_what_is_wrong_with_consep_is_said(tmp_path: Path) -> None:
    def opened() -> LabelledMasks:
        return open_consep(tmp_path, fixtures.CONSEP)

    refused(opened, "expected the folder 'Train/Images', it holds nothing")
    refused(lambda: open_consep(tmp_path / "absent", fixtures.CONSEP), "it is no folder")
    fixtures.write_consep(tmp_path)
    label = tmp_path / "Train/Labels/train_2.mat"
    instances, types = (loadmat(label)[key] for key in ("inst_map", "type_map"))
    label.unlink()
    refused(opened, r"1 names have an image or a label alone \(train_2\)")
    savemat(label, {"inst_map": instances, "classes": types})
    refused(opened, "holds classes, inst_map: expected inst_map and type_map, or one array")
    savemat(label, {"inst_map": instances[:9], "type_map": types[:9]})
    refused(opened, r"its maps are \(9, 260\) and its image \(260, 260\), expected one size")
    label.write_bytes(b"not a matrix at all" * 20)
    refused(opened, "expected MATLAB version 4 to 7.2")
    savemat(label, {"inst_map": instances, "type_map": types + 1})
    refused(lambda: opened().read(1), "type_map holds 1.0 to 8.0, expected whole types 0 to 7")
    savemat(label, {"inst_map": instances, "type_map": types + 0.5})
    refused(lambda: opened().read(1), "expected whole types")
    savemat(label, {"inst_map": instances, "type_map": types})
    (tmp_path / "Train/Images/train_2.png").write_text("no image")
    refused(opened, "train_2.png cannot be opened")


def test_a_truncated_label_is_said_when_it_is_read(tmp_path: Path) -> None:
    fixtures.write_consep(tmp_path)
    label = tmp_path / "Train/Labels/train_1.mat"
    whole = label.read_bytes()
    for size in (100, 140, len(whole) // 3):
        label.write_bytes(whole[:size])
        with pytest.raises(DatasetError, match="train_1.mat"):
            open_consep(tmp_path, fixtures.CONSEP).read(0)


def test_settings_that_a_public_set_has_no_use_for_are_refused(tmp_path: Path) -> None:
    fixtures.write_consep(tmp_path)
    for change, match in [
        ({"mpp": 0.5}, "dataset.mpp is 0.5: consep was scanned at 0.25"),
        ({"counts": "some"}, "dataset.counts is 'some': expected official or any"),
    ]:
        with pytest.raises(DatasetError, match=match):
            open_consep(tmp_path, replace(fixtures.CONSEP, **change))


@pytest.mark.parametrize("name", ["consep", "monusac"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "secret"
    root = tmp_path / "data"
    if name == "consep":
        fixtures.write_consep(root)
        linked = root / "Test/Images/test_1.png"
    else:
        fixtures.write_monusac(root)
        linked = root / fixtures.TRAIN / SLIDE / f"{SLIDE}_1.xml"
    linked.rename(outside)
    linked.symlink_to(outside)
    config = fixtures.CONSEP if name == "consep" else fixtures.MONUSAC
    with pytest.raises(DatasetError, match=f"leads to {re.escape(str(outside))}, outside"):
        (open_consep if name == "consep" else open_monusac)(root, config)


def test_monusac_is_read_with_columns_first_and_later_outlines_on_top(tmp_path: Path) -> None:
    fixtures.write_monusac(tmp_path)
    square = [(10, 20), (10, 29), (39, 29), (39, 20)]  # X is the column: 30 wide, 10 high, outline included
    inner = [(20, 22), (20, 25), (25, 25), (25, 22)]
    regions = [("Epithelial", square), ("Macrophage", inner), ("Something else", [(0, 0), (0, 3), (3, 3), (3, 0)])]
    fixtures.write_monusac_image(tmp_path, fixtures.TRAIN, SLIDE, 1, regions)
    masks = open_monusac(tmp_path, fixtures.MONUSAC)
    expected = np.zeros((60, 90), np.int64)
    expected[20:30, 10:40] = 1
    expected[22:26, 20:26] = 4
    expected[:4, :4] = 5  # an unknown name is ambiguous
    row = masks.names.tolist().index(f"{SLIDE}_1")
    np.testing.assert_array_equal(masks.read(row)[1], expected)
    assert masks.ignore == 5 and len(masks.classes) == 5 and masks.tile_px is None and masks.groups == "patient"
    assert masks.patients[row] == "TCGA-AB-1000" and masks.slide_ids[row] == SLIDE
    assert masks.roles.tolist() == ["train"] * 4 + ["report"] * 3 and masks.shapes.tolist() == [[60, 90]] * 7
    assert (masks.read(6)[1] == 5).sum() == 14 * 12
    assert all("a part of the set" in note for note in masks.notes)


def test_what_is_wrong_with_monusac_is_said(tmp_path: Path) -> None:
    def opened() -> LabelledMasks:
        return open_monusac(tmp_path, fixtures.MONUSAC)

    fixtures.write_monusac(tmp_path)
    official = replace(fixtures.MONUSAC, counts="official")
    refused(lambda: open_monusac(tmp_path, official), "holds 4 images in .* and 3 images in .*: expected 209 and 85; complete")
    xml = tmp_path / fixtures.TRAIN / SLIDE / f"{SLIDE}_1.xml"
    text = xml.read_text()
    for change, match in [
        (text.replace('Name="Epithelial"', 'Title="Epithelial"'), "stands in an annotation without a name"),
        (text.replace('X="', 'Q="', 1), "has no X and Y that are numbers"),
        (re.sub('X="[^"]*"', 'X="nan"', text, count=1), r"lies at \(nan"),
        (re.sub('Y="[^"]*"', 'Y="1e300"', text, count=1), "lies at"),
        (text[:-30], "it is not XML"),
        (text.replace("?>", '?><!DOCTYPE a [<!ENTITY b "c">]>'), "declares a document type"),
    ]:
        xml.write_text(change)
        row = opened().names.tolist().index(f"{SLIDE}_1")
        refused(lambda: opened().read(row), match)  # noqa: B023
    xml.unlink()
    refused(opened, rf"1 of 4 images have no XML beside them \({SLIDE}_1.tif\)")
    xml.write_text(text)
    fixtures.write_monusac_image(tmp_path, fixtures.TEST, "TCGA-AB-1001-01A-02-BS2", 1, [])
    with pytest.raises(DatasetError, match="1 patients stand in both train and report .TCGA-AB-1001"):
        opened()
    (tmp_path / fixtures.TEST / "TCGA-AB-1001-01A-02-BS2").rename(tmp_path / fixtures.TEST / "patient7")
    refused(opened, "patient7 is no TCGA slide, expected a folder such as")


def test_entities_are_never_expanded(tmp_path: Path) -> None:
    bomb = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
    file = f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>'
    (tmp_path / "secret").write_text("Epithelial")
    for declaration in (bomb, file, "<!DOCTYPE a>"):
        path = tmp_path / "a.xml"
        path.write_text(f'<?xml version="1.0"?>{declaration}<Annotations>&x;</Annotations>')
        with pytest.raises(DatasetError, match="declares a document type"):
            read_polygons(path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000))
def test_lattice_polygons_hold_what_pick_counts(seed: int) -> None:
    """Pick: a simple polygon of whole numbers holds A + B/2 + 1 lattice points, its outline included."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 12)))
    if np.diff(angles, append=angles[0] + 2 * np.pi).max() > 3:
        return  # the centre must be inside, so that the outline cannot cross itself
    radii = rng.uniform(8, 25, len(angles))
    corners = np.rint(30 + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1))
    turns = [_turn(np.array([30.0, 30.0]), a, b) for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True)]
    if min(turns) <= 0:
        return  # rounding has put two corners on one ray
    x, y = corners[:, 0], corners[:, 1]
    area = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
    steps = np.abs(corners - np.roll(corners, -1, axis=0)).astype(int)
    outline = sum(math.gcd(int(dx), int(dy)) for dx, dy in steps)
    mask = np.zeros((64, 64), np.int64)
    paint(mask, corners, 1)
    assert mask.sum() == area + outline / 2 + 1


def _turn(centre: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    u, v = a - centre, b - centre
    return float(u[0] * v[1] - u[1] * v[0])


def test_outlines_are_clipped_to_the_image() -> None:
    mask = np.zeros((10, 12), np.int64)
    paint(mask, np.array([(-5.0, -5.0), (-5.0, 30.0), (3.4, 30.0), (3.4, -5.0)]), 2)
    assert (mask[:, :4] == 2).all() and (mask[:, 4:] == 0).all()
    paint(mask, np.zeros((0, 2)), 7)
    paint(mask, np.array([(20.0, 20.0), (25.0, 20.0), (25.0, 25.0)]), 7)
    assert 7 not in mask


def test_any_change_of_a_file_changes_the_hash(tmp_path: Path) -> None:
    fixtures.write_monusac(tmp_path)
    first = open_monusac(tmp_path, fixtures.MONUSAC).hash
    assert open_monusac(tmp_path, fixtures.MONUSAC).hash == first
    fixtures.write_monusac_image(tmp_path, fixtures.TRAIN, SLIDE, 1, [("Neutrophil", [(1, 1), (1, 5), (6, 6)])])
    assert open_monusac(tmp_path, fixtures.MONUSAC).hash != first
