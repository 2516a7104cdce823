"""MHIST: colorectal polyps, hyperplastic (HP) against sessile serrated adenoma (SSA), by agreement from bmirds.github.io/MHIST.

`mhist/images/MHIST_*.png` and `mhist/annotations.csv`. SSA is the positive class, as in the field; eva numbers it 0. The official
test part is both what eva selects on and what it reports.
"""

import csv
from pathlib import Path

import numpy as np

from histoscale.data.fingerprint import content, contents
from histoscale.eval.datasets.imagefiles import ImageFiles, common_side, measure
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches, Usage, check_roles, hash_of
from histoscale.eval.datasets.public import (
    PublicConfig,
    check_classes,
    check_counts,
    file_in,
    folder_in,
    listed,
    wants_official,
)

SOURCE = "the MHIST download"
TABLE, IMAGES = "mhist/annotations.csv", "mhist/images"
VOTES = "Number of Annotators who Selected SSA (Out of 7)"
COLUMNS = ("Image Name", "Majority Vote Label", VOTES, "Partition")
CLASSES = ("SSA", "HP")
ROLES = {"train": "train", "test": "report"}
READERS = 7
COUNTS = {"train HP": 1545, "train SSA": 630, "test HP": 617, "test SSA": 360}
SIZE_PX = 224
USAGE = Usage(choose="folds", eva_select="report", eva_report=("report",), positive="SSA")
NOTES = (
    "groups: none; one centre and no patient ids, so intervals are too narrow",
    "no µm per pixel is assumed: eva says 2.0, other sources 8x",
)


def open_mhist(root: Path, config: PublicConfig, threads: int) -> LabelledPatches:
    """Images of 224 px in the order of the table.

    Raises DatasetError: the table or an image is missing, the columns or a value are not the published ones, counts differ.
    """
    rows = _rows(root)
    folder = folder_in(root, IMAGES, SOURCE)
    paths = [folder / row["Image Name"] for row in rows]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DatasetError(
            f"{folder} lacks {len(missing)} of the {len(rows)} images of {TABLE}: expected {missing[0]} and found "
            f"{listed(folder)}; unpack all images of {SOURCE} there"
        )
    parts = [f"{row['Partition']} {row['Majority Vote Label']}" for row in rows]
    name, notes = check_counts(config, folder.parent, COUNTS, {part: parts.count(part) for part in sorted(set(parts))})
    labels = np.array([CLASSES.index(row["Majority Vote Label"]) for row in rows], dtype=np.int64)
    roles = np.array([ROLES[row["Partition"]] for row in rows], dtype="<U8")
    names = np.array([row["Image Name"] for row in rows])
    check_roles(roles, names, "none")
    check_classes(labels, roles == "train", CLASSES, root / TABLE)
    sizes = np.full((len(paths), 2), SIZE_PX) if wants_official(config) else measure(paths, threads)
    return LabelledPatches(
        name=name,
        classes=CLASSES,
        labels=labels,
        roles=roles,
        patients=names,
        sites=np.full(len(paths), ""),
        groups="none",
        mpp=config.mpp,
        size_px=common_side(sizes),
        hash=hash_of("mhist", *parts, contents(paths)),
        read=ImageFiles(paths, sizes, threads),
        blocks=names,
        slide_ids=np.full(len(paths), ""),
        usage=USAGE,
        notes=(*(NOTES if config.mpp is None else NOTES[:1]), _disagreement(read_votes(root), roles), *notes),
    )


def read_votes(root: Path) -> np.ndarray:
    """int64 [n]: how many of the seven readers called each image SSA, in the order of the table. Raises DatasetError."""
    return np.array([int(row[VOTES]) for row in _rows(root)], dtype=np.int64)


def _disagreement(votes: np.ndarray, roles: np.ndarray) -> str:
    """How noisy the labels are: no probe is better than readers who differ."""
    close = int(np.isin(votes[roles == "report"], (3, 4)).sum())
    total = int((roles == "report").sum())
    return f"labels are the majority of {READERS} readers: {close} of the {total} reported images were called 4 to 3"


def _rows(root: Path) -> list[dict[str, str]]:
    path = file_in(root, TABLE, SOURCE)
    content(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise DatasetError(
                f"{path} has the columns {', '.join(reader.fieldnames or ()) or 'none'}: expected {', '.join(COLUMNS)}; "
                f"use the table of {SOURCE} unchanged"
            )
        rows = list(reader)
    allowed = {"Majority Vote Label": CLASSES, "Partition": tuple(ROLES), VOTES: tuple(str(i) for i in range(READERS + 1))}
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        for column, values in allowed.items():
            if row[column] not in values:
                raise DatasetError(
                    f"{path} line {number} has {row[column]!r} as {column}: expected {', '.join(values)}; "
                    f"use the table of {SOURCE} unchanged"
                )
        name = row["Image Name"]
        if name in seen or Path(name).name != name:
            problem = "stands there twice: expected once" if name in seen else "leaves the folder: expected a name in it"
            raise DatasetError(f"{path} line {number}: the image {name!r} {problem}; use the table of {SOURCE} unchanged")
        seen.add(name)
    return rows
