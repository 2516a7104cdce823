"""BACH, ICIAR 2018: 400 photographs of breast tissue in four classes (Zenodo 3632035, CC BY-NC-ND 4.0).

`ICIAR2018_BACH_Challenge/Photos/{Benign,InSitu,Invasive,Normal}/*.tif`. The split is that of kaiko-ai/eva
(src/eva/vision/data/datasets/classification/bach.py, Apache-2.0), which selects on the part that it reports.
"""

import csv
import re
from pathlib import Path

import numpy as np

from histoscale.data.fingerprint import content, contents
from histoscale.eval.datasets.imagefiles import ImageFiles, common_side, measure
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches, Usage, check_roles, hash_of
from histoscale.eval.datasets.public import (
    PublicConfig,
    check_class_folders,
    check_classes,
    check_counts,
    folder_in,
    images_in,
    wants_official,
)

ARCHIVE = "ICIAR2018_BACH_Challenge.zip"
PHOTOS = "ICIAR2018_BACH_Challenge/Photos"
TRUTH = "microscopy_ground_truth.csv"
PREFIXES = {"Benign": "b", "InSitu": "is", "Invasive": "iv", "Normal": "n"}
EACH = 100
SIZE_PX = (2048, 1536)
# Half-open ranges of the index 100 · class + number − 1; all others are reported.
TRAIN = ((0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400))
USAGE = Usage(choose="folds", eva_select="report", eva_report=("report",), positive=None)
NOTES = ("groups: none; the organisers' sheet names the patients of a part of the images only, so intervals are too narrow",)


def open_bach(root: Path, config: PublicConfig, threads: int) -> LabelledPatches:
    """Images of 2048 x 1536 px in eva's order: by class, then by name. Roles train (268) and report (132).

    Raises DatasetError: a folder or a class is missing, a name is none of the set's, counts differ, the ground truth that lies
    beside the folders names another class.
    """
    photos = folder_in(root, PHOTOS, ARCHIVE)
    check_class_folders(photos, tuple(PREFIXES))
    paths, index = [], []
    for label, (name, prefix) in enumerate(PREFIXES.items()):
        for path in images_in(photos / name, ".tif"):
            number = re.fullmatch(rf"{prefix}(\d{{3}})", path.stem)
            if number is None or not 1 <= int(number[1]) <= EACH:
                raise DatasetError(
                    f"{path} is no image of BACH: expected the names {prefix}001.tif to {prefix}{EACH}.tif in {name}; "
                    "move it out of the folder"
                )
            paths.append(path)
            index.append(EACH * label + int(number[1]) - 1)
    place = np.array(index, dtype=np.int64)
    labels = place // EACH
    found = {name: int((labels == i).sum()) for i, name in enumerate(PREFIXES)}
    name, notes = check_counts(config, photos, dict.fromkeys(PREFIXES, EACH), found)
    _check_truth(photos, paths)
    roles = roles_of(place)
    check_roles(roles, place.astype(str), "none")
    check_classes(labels, roles == "train", tuple(PREFIXES), photos)
    sizes = np.tile(SIZE_PX, (len(paths), 1)) if wants_official(config) else measure(paths, threads)
    names = np.array([path.stem for path in paths])
    return LabelledPatches(
        name=name,
        classes=tuple(PREFIXES),
        labels=labels,
        roles=roles,
        patients=names,
        sites=np.full(len(paths), ""),
        groups="none",
        mpp=config.mpp,
        size_px=common_side(sizes),
        hash=hash_of("bach", place, contents(paths)),
        read=ImageFiles(paths, sizes, threads),
        blocks=names,
        slide_ids=np.full(len(paths), ""),
        usage=USAGE,
        notes=NOTES + notes,
    )


def roles_of(index: np.ndarray) -> np.ndarray:
    """The role of each place in the order of the 400 images."""
    train = np.zeros(len(index), bool)
    for start, stop in TRAIN:
        train |= (index >= start) & (index < stop)
    return np.where(train, "train", "report").astype("<U8")


def _check_truth(photos: Path, paths: list[Path]) -> None:
    """The list of the organisers, where it was unpacked, against the folders."""
    if not (photos / TRUTH).is_file():
        return
    content(photos / TRUTH)
    with (photos / TRUTH).open(newline="", encoding="utf-8-sig", errors="replace") as file:
        truth = {row[0].strip(): row[1].strip() for row in csv.reader(file) if len(row) > 1}
    for path in paths:
        if truth.get(path.name, path.parent.name) != path.parent.name:
            raise DatasetError(
                f"{path} lies in {path.parent.name}, and {TRUTH} calls it {truth[path.name]}: expected one class; unpack "
                f"{ARCHIVE} again"
            )
