"""Ready images with labels of your own: class folders, or a CSV with patients and splits."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from histoscale.eval.datasets.patches import (
    USAGE_OF_OWN,
    DatasetConfig,
    DatasetError,
    LabelledPatches,
    check_roles,
    check_sites,
    encode_labels,
    hash_of,
)

TABLE = "labels.csv"
COLUMNS = ("path", "label", "split")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def open_folder(root: Path, config: DatasetConfig) -> LabelledPatches:
    """Images of one size under `root`.

    With `labels.csv` (path, label, split, and patient_id, site where known): its rows. Else the folders
    `<split>/<class>/<image>`, which carry no patients, so the result says `groups: none`.
    Raises DatasetError: an image is missing, unreadable or of another size; a patient in two splits; a path outside the folder.
    """
    rows, groups = (_csv_rows(root), "patient") if (root / TABLE).is_file() else (_folder_rows(root, config), "none")
    if groups == "patient" and any(not row["patient_id"] for row in rows):
        if any(row["patient_id"] for row in rows):
            raise DatasetError(f"{root / TABLE}: some rows have a patient_id and some have none; fill in all or none")
        groups = "none"
    named = {config.train: "train", config.report: "report", config.external: "external"}
    rows = [row for row in rows if row["split"] in named]
    roles = np.array([named[row["split"]] for row in rows], dtype="<U8")
    # Without patients every image is its own group, and the result says so.
    patients = np.array([row["patient_id"] or row["path"] for row in rows])
    sites = np.array([row["site"] for row in rows])
    check_roles(roles, patients, groups)
    check_sites(roles, sites)
    classes, labels = encode_labels([row["label"] for row in rows], roles == "train", str(root))
    paths = [root / row["path"] for row in rows]
    side = _side(paths[0])

    def read(part: np.ndarray) -> np.ndarray:
        return np.stack([_pixels(paths[i], side) for i in part])

    stamps = [(row["path"], paths[i].stat().st_size, paths[i].stat().st_mtime_ns) for i, row in enumerate(rows)]
    return LabelledPatches(
        name=root.name,
        classes=classes,
        labels=labels,
        roles=roles,
        patients=patients,
        sites=sites,
        groups=groups,
        mpp=config.mpp,
        size_px=side,
        hash=hash_of("folder", stamps, classes, labels, *roles, *patients),
        read=read,
        blocks=patients,
        slide_ids=np.full(len(rows), ""),
        usage=USAGE_OF_OWN,
    )


def _csv_rows(root: Path) -> list[dict[str, str]]:
    path = root / TABLE
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = sorted(set(COLUMNS) - set(reader.fieldnames or ()))
        if missing:
            raise DatasetError(f"{path} lacks the columns {', '.join(missing)}; expected {', '.join(COLUMNS)}, and patient_id")
        rows = [{"patient_id": "", "site": "", **row} for row in reader]
    inside = root.resolve()
    for row in rows:
        image = (root / row["path"]).resolve()
        if not image.is_relative_to(inside):
            raise DatasetError(f"{path}: the path {row['path']!r} leaves the folder")
        if not image.is_file():
            raise DatasetError(f"{path}: the image {row['path']!r} is missing")
    return rows


def _folder_rows(root: Path, config: DatasetConfig) -> list[dict[str, str]]:
    rows = []
    for split in (config.train, config.report, config.external):
        if split is None or not (root / split).is_dir():
            continue
        for path in sorted((root / split).glob("*/*")):
            if path.suffix.lower() in SUFFIXES:
                name = path.relative_to(root).as_posix()
                rows.append({"path": name, "label": path.parent.name, "split": split, "patient_id": "", "site": ""})
    if not rows:
        raise DatasetError(f"{root} holds neither {TABLE} nor images in {config.train}/<class>/ and {config.report}/<class>/")
    return rows


def _side(path: Path) -> int:
    with Image.open(path) as image:
        if image.width != image.height:
            raise DatasetError(f"{path} is {image.width} x {image.height} px: expected square images")
        return image.width


def _pixels(path: Path, side: int) -> np.ndarray:
    """uint8 [3, side, side]."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DatasetError(f"{path} cannot be decoded: {error}") from error
    if pixels.shape[:2] != (side, side):
        raise DatasetError(f"{path} is {pixels.shape[1]} x {pixels.shape[0]} px: expected {side} x {side} as the first image")
    return pixels.transpose(2, 0, 1)
