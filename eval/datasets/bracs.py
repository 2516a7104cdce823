"""BRACS: regions of interest of breast tissue in seven classes from benign to invasive, of any size (arXiv 2111.04740)."""

import re
from pathlib import Path

import numpy as np

from histoscale.data.fingerprint import contents
from histoscale.eval.datasets.imagefiles import ImageFiles, measure
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches, Usage, check_roles, hash_of
from histoscale.eval.datasets.public import PublicConfig, check_class_folders, check_classes, check_counts, folder_in, images_in

CLASSES = ("N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC")
PARTS = {"train": "train", "val": "select", "test": "report"}
FOLDERS = tuple(f"{label}_{name}" for label, name in enumerate(CLASSES))
ARCHIVE = "BRACS_RoI"
# Images by part and class, read off the archive (MedARC-AI/nanopath:benchmarking/bracs.json).
COUNTS = {
    "train": (357, 714, 389, 624, 387, 665, 521),
    "val": (46, 43, 46, 49, 41, 40, 47),
    "test": (81, 79, 82, 83, 79, 85, 81),
}
USAGE = Usage(choose="select", eva_select="select", eva_report=("select", "report"), positive=None)
_NAME = re.compile(r"BRACS_(?P<slide>\d+)_(?P<label>[A-Z]+)_\d+\.png")


def open_bracs(root: Path, config: PublicConfig, threads: int) -> LabelledPatches:
    """Rows by part (train, val, test), class and name. Intervals resample slides: patients are not published.

    root: the folder that holds BRACS_RoI, as BRACS_RoI/latest_version/{train,val,test}/0_N/BRACS_<slide>_N_<n>.png.
    Raises DatasetError: a folder is missing, counts differ, a name says another class than its folder, a slide stands in two
    parts.
    """
    top = folder_in(root, "BRACS_RoI/latest_version", ARCHIVE)
    paths: list[Path] = []
    labels: list[int] = []
    roles: list[str] = []
    found, expected = {}, {}
    for part, role in PARTS.items():
        check_class_folders(folder_in(root, f"BRACS_RoI/latest_version/{part}", ARCHIVE), FOLDERS)
        for label, folder in enumerate(FOLDERS):
            images = list(images_in(top / part / folder, ".png"))
            found[f"{part}/{folder}"], expected[f"{part}/{folder}"] = len(images), COUNTS[part][label]
            paths += images
            labels += [label] * len(images)
            roles += [role] * len(images)
    slides = np.array([_slide(path, CLASSES[label]) for path, label in zip(paths, labels, strict=True)], dtype="<U16")
    name, notes = check_counts(config, top, expected, found)
    parts = np.array(roles, dtype="<U8")
    check_roles(parts, slides, "slide")
    check_classes(np.array(labels), parts == "train", CLASSES, top)
    return LabelledPatches(
        name=name,
        classes=CLASSES,
        labels=np.array(labels, np.int64),
        roles=parts,
        patients=slides,
        sites=np.full(len(paths), ""),
        groups="slide",
        mpp=config.mpp,
        size_px=None,
        hash=hash_of("bracs", [path.relative_to(top).as_posix() for path in paths], contents(paths)),
        read=ImageFiles(paths, measure(paths, threads), threads),
        blocks=slides,
        slide_ids=slides,
        usage=USAGE,
        notes=notes,
    )


def _slide(path: Path, label: str) -> str:
    """`BRACS_<slide>` of an image."""
    match = _NAME.fullmatch(path.name)
    if match is None or match["label"] != label:
        raise DatasetError(
            f"{path} is no image of its folder's class: expected BRACS_<slide>_{label}_<n>.png, move it or remove it"
        )
    return f"BRACS_{match['slide']}"
