"""Camelyon16: 399 sentinel lymph nodes of two hospitals, with tumour or without (doi 10.1093/gigascience/giy065).

`training/{normal,tumor}/*.tif`, `testing/images/test_*.tif`, `testing/reference.csv` (no header: slide, Tumor or Normal, type,
size), lesions as XML of ASAP, named like their slides. Files are found by their names, so the folders of other mirrors do too.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.pyramid import LayoutError
from histoscale.data.storage import StorageError, Store
from histoscale.eval.cohorts.cohort import Cohort, CohortError, by_name, check_counts, find, one_file

PUBLISHED = {"training normal": 159, "training tumor": 111, "testing": 129}
TEST_TUMOR = 49
# Slides of eva's validation part (kaiko-ai/eva:src/eva/vision/data/datasets/classification/camelyon16.py, Apache-2.0), those of
# PatchCamelyon's; all other training slides are its training part.
EVA_VALIDATION = {
    "normal": (
        10, 13, 16, 17, 19, 20, 25, 30, 31, 32, 52, 56, 57, 67, 76, 79, 85, 95, 98, 99, 101, 102, 105, 106, 109, 129, 132, 137,
        142, 143, 148, 152,
    ),
    "tumor": (1, 5, 11, 12, 13, 19, 31, 37, 43, 46, 57, 65, 69, 71, 73, 79, 80, 81, 82, 85, 97, 109),
}  # fmt: skip
REMOVED = {
    "normal_086": "it holds tumour and became tumor_111",
    "test_049": "it is a duplicate of another test slide and was withdrawn",
}
NOTES = (
    "a slide is taken as a patient of its own: Camelyon16 publishes no patient ids",
    "test_114 and several training slides are not outlined exhaustively, so a tile outside every lesion may still hold tumour",
    "Camelyon16 shares slides with PatchCamelyon and hospitals with Camelyon17",
)
# Training slides come in the order of the hospitals: Radboud (Nijmegen) first, then Utrecht.
LAST_OF_RUMC = {"normal": 100, "tumor": 70}
RUMC, UMCU = "RUMC", "UMCU"
_BETWEEN_MPP = 0.235  # Radboud's scanner made 0.243 µm/px, Utrecht's 0.227
_NAME = re.compile(r"(?P<kind>normal|tumor|test)_(?P<number>\d{3})")


@dataclass(frozen=True)
class Camelyon16Config:
    """counts: `published` refuses all but the published numbers of slides; `any` takes what is there, and says so."""

    kind: Literal["camelyon16"]
    counts: str


def read_camelyon16(root: Path, config: Camelyon16Config, store: Store) -> Cohort:
    """Columns: label (tumor, normal), size (Macro, Micro; of test slides), split (train, test), eva (train, val, test),
    annotations (the lesions' XML). site: by number in training; of the others by the pixel size in the file's header, "" where
    it has none.

    Raises CohortError: folders, counts or reference.csv are not as published.
    """
    slides = by_name([path for path in find(root, (".tif", ".tiff")) if _NAME.fullmatch(path.stem)], "the slide")
    lesions = by_name([path for path in find(root, (".xml",)) if _NAME.fullmatch(path.stem)], "the lesions")
    left_out = {name: why for name, why in REMOVED.items() if name in slides}
    slides = {name: path for name, path in slides.items() if name not in REMOVED}
    reference = read_reference(one_file(root, ("reference.csv",))) if any(name.startswith("test") for name in slides) else {}
    rows = []
    for name, path in sorted(slides.items()):
        match = _NAME.fullmatch(name)
        assert match is not None
        kind, number = match["kind"], int(match["number"])
        if kind == "test" and name not in reference:
            raise CohortError(f"reference.csv does not name {name}: expected a row for every test slide, get the file again")
        label, size = reference[name] if kind == "test" else (kind, "")
        rows.append(
            {
                "slide_id": name,
                "uri": str(path.absolute()),
                "patient_id": name,
                "site": _site(path, kind, number, store),
                "cohort": "CAMELYON16",
                "organ": "lymph node",
                "stain": "H&E",
                "label": label,
                "size": size,
                "split": "test" if kind == "test" else "train",
                "eva": "test" if kind == "test" else "val" if number in EVA_VALIDATION[kind] else "train",
                "annotations": str(lesions[name].absolute()) if name in lesions else "",
            }
        )
    found = {
        "training normal": sum(row["split"] == "train" and row["label"] == "normal" for row in rows),
        "training tumor": sum(row["split"] == "train" and row["label"] == "tumor" for row in rows),
        "testing": sum(row["split"] == "test" for row in rows),
        "testing tumor": sum(row["split"] == "test" and row["label"] == "tumor" for row in rows),
        "with lesions": sum(bool(row["annotations"]) for row in rows),
    }
    notes = check_counts("Camelyon16", config.counts, {**PUBLISHED, "testing tumor": TEST_TUMOR}, found)
    unknown = [row["slide_id"] for row in rows if not row["site"]]
    if unknown:
        notes += (f"{len(unknown)} slides have no site ({', '.join(unknown[:3])}, …): their headers tell no pixel size",)
    return Cohort("Camelyon16", tuple(rows), ("split", "eva"), found, left_out, NOTES + notes)


def read_reference(path: Path) -> dict[str, tuple[str, str]]:
    """Test slide -> (tumor or normal, size: Macro, Micro or ""). Raises CohortError for a row of another form."""
    found: dict[str, tuple[str, str]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, cells in enumerate(csv.reader(file), 1):
            if not cells:
                continue
            name, label, size = cells[0].strip().removesuffix(".tif"), _cell(cells, 1).lower(), _cell(cells, 3)
            if not re.fullmatch(r"test_\d{3}", name, re.IGNORECASE) or label not in ("tumor", "normal"):
                raise CohortError(f"{path}, line {number}: {cells}: expected a test slide, Tumor or Normal, type and size")
            found[name.lower()] = label, "" if size.lower() == "none" else size
    return found


def _cell(cells: Sequence[str], place: int) -> str:
    return cells[place].strip() if place < len(cells) else ""


def _site(path: Path, kind: str, number: int, store: Store) -> str:
    """tumor_111 stands behind the numbers, so its header decides, as for test slides."""
    if kind in LAST_OF_RUMC and (kind, number) != ("tumor", 111):
        return RUMC if number <= LAST_OF_RUMC[kind] else UMCU
    try:
        mpp = read_layout(str(path), store).mpp
    except (LayoutError, StorageError):  # `index` will refuse the slide with its reason
        return ""
    return "" if mpp is None else RUMC if mpp > _BETWEEN_MPP else UMCU
