"""BRACS: regions of interest of breast tissue in seven classes from benign to invasive, of any size (arXiv 2111.04740)."""

import re
from pathlib import Path

import numpy as np

from histoscale.eval.datasets.images import folder_of, images_in, reading, stamps
from histoscale.eval.datasets.official import check_config, check_counts, named
from histoscale.eval.datasets.patches import DatasetConfig, DatasetError, LabelledPatches, Usage, check_roles, hash_of

CLASSES = ("N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC")
PARTS = {"train": "train", "val": "select", "test": "report"}
LAYOUT = "BRACS_RoI/latest_version/{train,val,test}/{0_N,1_PB,2_UDH,3_FEA,4_ADH,5_DCIS,6_IC}/BRACS_<slide>_<class>_<n>.png"
MPP = 0.25
# Images by part and class, read off the archive (MedARC-AI/nanopath:benchmarking/bracs.json).
COUNTS = {
    "train": (357, 714, 389, 624, 387, 665, 521),
    "val": (46, 43, 46, 49, 41, 40, 47),
    "test": (81, 79, 82, 83, 79, 85, 81),
}
USAGE = Usage(choose="select", eva_select="select", eva_report=("select", "report"), positive=None)
_NAME = re.compile(r"BRACS_(?P<slide>\d+)_(?P<label>[A-Z]+)_\d+\.png")


def open_bracs(root: Path, config: DatasetConfig) -> LabelledPatches:
    """Rows by part (train, val, test), class and name. Intervals resample slides: patients are not published.

    root: the folder that holds BRACS_RoI. Raises DatasetError: a folder is missing, a count is not the published one, a name says
    another class than its folder, a slide stands in two parts.
    """
    check_config(config, "train", "test", MPP)
    top = folder_of(root, "BRACS_RoI/latest_version", LAYOUT)
    paths: list[Path] = []
    labels: list[int] = []
    roles: list[str] = []
    slides: list[str] = []
    found, expected = {}, {}
    for part, role in PARTS.items():
        for label, name in enumerate(CLASSES):
            folder = folder_of(top, f"{part}/{label}_{name}", LAYOUT)
            images = images_in(folder, "*.png")
            found[str(folder)], expected[str(folder)] = len(images), COUNTS[part][label]
            paths += images
            labels += [label] * len(images)
            roles += [role] * len(images)
            slides += [_slide(path, name) for path in images]
    notes = check_counts(config, found, expected)
    parts, groups = np.array(roles, dtype="<U8"), np.array(slides)
    check_roles(parts, groups, "slide")
    return LabelledPatches(
        name=named("bracs", notes),
        classes=CLASSES,
        labels=np.array(labels, np.int64),
        roles=parts,
        patients=groups,
        sites=np.full(len(paths), ""),
        groups="slide",
        mpp=MPP,
        size_px=None,
        hash=hash_of("bracs", stamps(top, paths)),
        read=reading(paths, None),
        blocks=groups,
        slide_ids=groups,
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
