"""BACH, NCT-CRC, MHIST: the published order, split and labels, and one sentence for everything else."""

import csv
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from set_fixtures import BACH, CRC, picture, write_bach, write_crc, write_mhist

from histoscale.eval.datasets.bach import open_bach, roles_of
from histoscale.eval.datasets.crc import open_crc
from histoscale.eval.datasets.mhist import open_mhist, read_votes
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches
from histoscale.eval.datasets.public import PublicConfig

ANY = PublicConfig("bach", "any", 0.42)
OFFICIAL = dataclasses.replace(ANY, counts="official")
# The reference's table by name, which says the same as the index ranges in the code.
TRAIN_NAMES = {
    "b": [(1, 41), (60, 60), (91, 100)], "is": [(1, 39), (70, 100)], "iv": [(1, 40), (59, 60), (74, 100)],
    "n": [(1, 45), (69, 100)],
}  # fmt: skip


@pytest.fixture(scope="module")
def bach(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bach(tmp_path_factory.mktemp("bach"))


@pytest.fixture
def small(tmp_path: Path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        return {
            "bach": lambda: write_bach(tmp_path, 62),
            "crc": lambda: write_crc(tmp_path),
            "mhist": lambda: write_mhist(tmp_path),
        }[name]()

    return write


def opened(name: str, root: Path, counts: str = "any") -> LabelledPatches:
    openers = {"bach": open_bach, "crc": open_crc, "crc_nonorm": open_crc, "mhist": open_mhist}
    return openers[name](root, PublicConfig(name, counts, None), 2)


def one_sentence(error: pytest.ExceptionInfo[DatasetError]) -> None:
    assert "\n" not in str(error.value) and "expected" in str(error.value)


def test_bachs_split_is_the_published_one_by_name(bach: Path) -> None:
    patches = open_bach(bach, OFFICIAL, 2)
    names = [f"{prefix}{number:03}" for prefix in BACH.values() for number in range(1, 101)]
    assert patches.patients.tolist() == names and patches.classes == tuple(BACH) and patches.name == "bach"
    assert (patches.labels == np.repeat(np.arange(4), 100)).all()
    expected = []
    for name in names:
        prefix, number = name[:-3], int(name[-3:])
        expected.append("train" if any(a <= number <= b for a, b in TRAIN_NAMES[prefix]) else "report")
    assert patches.roles.tolist() == expected
    assert (len(patches.rows("train")), len(patches.rows("report"))) == (268, 132)
    for label, counts in enumerate([(52, 48), (70, 30), (69, 31), (77, 23)]):
        inside = patches.labels == label
        assert tuple(int((inside & (patches.roles == role)).sum()) for role in ("train", "report")) == counts
    assert patches.groups == "none" and "too narrow" in patches.notes[0] and patches.usage.eva_select == "report"
    assert (roles_of(np.array([40, 41, 399])) == ["train", "report", "train"]).all()


def test_bachs_pixels_are_held_to_the_published_size(bach: Path) -> None:
    with pytest.raises(DatasetError, match=r"n001.tif is 8 x 6 px: expected 2048 x 1536"):
        open_bach(bach, OFFICIAL, 1).read(np.array([300]))
    free = open_bach(bach, ANY, 1)
    assert free.size_px is None and free.name == "bach" and free.notes == open_bach(bach, OFFICIAL, 1).notes
    (pixels,) = free.read(np.array([217]))
    file = bach / "ICIAR2018_BACH_Challenge/Photos/Invasive/iv018.tif"
    assert (pixels == np.asarray(Image.open(file)).transpose(2, 0, 1)).all() and pixels.shape == (3, 6, 8)


def test_a_part_of_bach_keeps_its_places_and_says_that_it_is_one(small: Callable[[str], Path]) -> None:
    root = small("bach")
    part = open_bach(root, ANY, 1)
    assert part.name == "bach (part)" and "248 images are used where bach has 400" in part.notes[-1]
    assert part.roles[part.patients.tolist().index("b060")] == "train" and (part.roles == "report").sum() == 20 + 23 + 20 + 17
    with pytest.raises(DatasetError, match=r"62 of Benign \(expected 100\).*dataset.counts=any") as error:
        open_bach(root, OFFICIAL, 1)
    one_sentence(error)
    with pytest.raises(DatasetError, match="dataset.counts is 'some': expected official or any"):
        open_bach(root, dataclasses.replace(ANY, counts="some"), 1)


@pytest.mark.parametrize("name, spoil, words", [
    ("bach", lambda root: (root / "ICIAR2018_BACH_Challenge").rename(root / "bach"),
     "expected the folder ICIAR2018_BACH_Challenge/Photos, as ICIAR2018_BACH_Challenge.zip unpacks it, and found bach"),
    ("bach", lambda root: shutil.rmtree(root / "ICIAR2018_BACH_Challenge/Photos/InSitu"),
     "class folders Benign, Invasive, Normal: expected Benign, InSitu, Invasive, Normal; add InSitu, move away none"),
    ("bach", lambda root: picture(root / "ICIAR2018_BACH_Challenge/Photos/Test/x.tif", 1), "add none, move away Test"),
    ("bach", lambda root: picture(root / "ICIAR2018_BACH_Challenge/Photos/Benign/b101.tif", 1),
     r"b101.tif is no image of BACH: expected the names b001.tif to b100.tif"),
    ("bach", lambda root: picture(root / "ICIAR2018_BACH_Challenge/Photos/Benign/iv001.tif", 1), "iv001.tif is no image of BACH"),
    ("bach", lambda root: (root / "ICIAR2018_BACH_Challenge/Photos/microscopy_ground_truth.csv").write_text("b001.tif,Normal\n"),
     "b001.tif lies in Benign, and microscopy_ground_truth.csv calls it Normal"),
    ("crc", lambda root: (root / "CRC-VAL-HE-7K").rename(root / "val"), "expected the folder CRC-VAL-HE-7K, as CRC-VAL"),
    ("crc_nonorm", lambda root: None, "expected the folder NCT-CRC-HE-100K-NONORM"),
    ("crc", lambda root: (root / "NCT-CRC-HE-100K/TUM").rename(root / "NCT-CRC-HE-100K/CANCER"), "add TUM, move away CANCER"),
    ("crc", lambda root: picture(root / "NCT-CRC-HE-100K/ADI/TUM-AAAA.tif", 1), "TUM-AAAA.tif is no tile of ADI"),
    ("crc", lambda root: [path.unlink() for path in (root / "NCT-CRC-HE-100K/LYM").iterdir()], "no training image of LYM"),
    ("mhist", lambda root: (root / "mhist/annotations.csv").unlink(), "expected the file mhist/annotations.csv"),
    ("mhist", lambda root: (root / "mhist/images/MHIST_zaa.png").unlink(), "lacks 1 of the 12 .*: expected MHIST_zaa.png and"),
    ("mhist", lambda root: rewrite(root, lambda rows: [row[:3] for row in rows]), "has the columns .*: expected Image Name, Maj"),
    ("mhist", lambda root: rewrite(root, lambda rows: edited(rows, 2, 1, "MSS")), "line 3 has 'MSS' as Majority Vote Label"),
    ("mhist", lambda root: rewrite(root, lambda rows: edited(rows, 1, 2, "8")), "line 2 has '8' as Number of Annotators"),
    ("mhist", lambda root: rewrite(root, lambda rows: edited(rows, 1, 3, "val")), "line 2 has 'val' as Partition"),
    ("mhist", lambda root: rewrite(root, lambda rows: [*rows, rows[1]]), "the image 'MHIST_zaa.png' stands there twice"),
    ("mhist", lambda root: rewrite(root, lambda rows: edited(rows, 1, 0, "../x.png")), "'../x.png' leaves the folder"),
])  # fmt: skip
def test_a_wrong_layout_is_one_sentence(
    small: Callable[[str], Path], name: str, spoil: Callable[[Path], object], words: str
) -> None:
    root = small(name.removesuffix("_nonorm"))
    spoil(root)
    with pytest.raises(DatasetError, match=words) as error:
        opened(name, root)
    one_sentence(error)


def edited(rows: list[list[str]], row: int, column: int, value: str) -> list[list[str]]:
    rows[row][column] = value
    return rows


def rewrite(root: Path, change: Callable[[list[list[str]]], list[list[str]]]) -> None:
    path = root / "mhist/annotations.csv"
    with path.open(newline="") as file:
        rows = change(list(csv.reader(file)))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.parametrize("name, train", [("crc", "NCT-CRC-HE-100K"), ("crc_nonorm", "NCT-CRC-HE-100K-NONORM")])
def test_crc_learns_from_one_tree_and_reports_the_other(tmp_path: Path, name: str, train: str) -> None:
    write_crc(tmp_path, train)
    patches = opened(name, tmp_path)
    assert patches.classes == CRC and len(patches) == 36 and patches.size_px == 8 and patches.name == f"{name} (part)"
    assert patches.labels.tolist() == 2 * np.repeat(np.arange(9), 2).tolist() and patches.mpp is None
    assert patches.roles.tolist() == ["train"] * 18 + ["report"] * 18
    file = tmp_path / "CRC-VAL-HE-7K/MUC/MUC-TCGA-B001QX.tif"
    row = 18 + 2 * CRC.index("MUC") + 1
    assert patches.patients[row] == file.relative_to(tmp_path).as_posix()
    pixels = patches.read(np.array([row, 0]))
    assert isinstance(pixels, np.ndarray) and (pixels[0] == np.asarray(Image.open(file)).transpose(2, 0, 1)).all()
    with pytest.raises(DatasetError, match=r"18 of .*100K.* \(expected 100000\), 18 of CRC-VAL-HE-7K \(expected 7180\)"):
        opened(name, tmp_path, "official")
    before = patches.hash
    picture(file, 99, 8, 8)
    assert opened(name, tmp_path).hash != before


def test_the_published_counts_open(tmp_path: Path) -> None:
    """107,180 names, most of them links to one file of their class."""
    write_crc(tmp_path, each=1)
    for folder, total in (("NCT-CRC-HE-100K", 100_000), ("CRC-VAL-HE-7K", 7_180)):
        for i, kind in enumerate(CRC):
            first = next((tmp_path / folder / kind).iterdir())
            for number in range(1, total // 9 + (i < total % 9)):
                os.link(first, first.with_name(f"{kind}-{number:06}.tif"))
    patches = opened("crc", tmp_path, "official")
    assert patches.name == "crc" and len(patches.rows("train")) == 100_000 and len(patches.rows("report")) == 7_180
    assert patches.size_px == 224 and len(patches.notes) == 2
    with pytest.raises(DatasetError, match=r"is 8 x 8 px: expected 224 x 224"):
        patches.read(np.array([0]))


def test_the_two_trees_of_crc_are_two_sets(tmp_path: Path) -> None:
    write_crc(tmp_path)
    shutil.copytree(tmp_path / "NCT-CRC-HE-100K", tmp_path / "NCT-CRC-HE-100K-NONORM")
    assert opened("crc", tmp_path).hash != opened("crc_nonorm", tmp_path).hash


def test_real_tiles_of_nct_crc_are_read(tmp_path: Path, shared_data: Path) -> None:
    """Real files of the 100K in the layout of the archive: packbits TIFF of 224 px."""
    for source in sorted((shared_data / "tiles/nct-crc-he").glob("*.tif")):
        kind = next(kind for kind in CRC if kind in source.stem.upper())
        for name in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"):
            (tmp_path / name / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / kind / f"{kind}-{source.stem}.tif").symlink_to(source)
    patches = opened("crc", tmp_path)
    assert patches.size_px == 224 and len(patches) == 18
    assert np.asarray(patches.read(np.arange(18))).reshape(18, -1).std(axis=1).min() > 0


def test_mhist_keeps_the_order_of_its_table_and_its_votes(tmp_path: Path) -> None:
    write_mhist(tmp_path)
    patches = opened("mhist", tmp_path)
    assert patches.classes == ("SSA", "HP") and patches.usage.positive == "SSA" and patches.size_px == 8
    assert patches.labels.tolist() == [0, 1] * 6 and patches.roles.tolist() == ["train", "train", "report", "report"] * 3
    assert patches.patients[0] == "MHIST_zaa.png" and patches.mpp is None
    assert read_votes(tmp_path).tolist() == [4, 1, 6, 3, 4, 1, 6, 3, 4, 1, 6, 3]
    assert "3 of the 6 reported images were called 4 to 3" in " ".join(patches.notes)
    with pytest.raises(DatasetError, match=r"3 of train HP \(expected 1545\), 3 of train SSA \(expected 630\)"):
        opened("mhist", tmp_path, "official")
