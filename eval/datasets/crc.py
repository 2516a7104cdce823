"""NCT-CRC-HE: colorectal tiles in nine tissue classes (Zenodo 1214456, CC BY 4.0).

`NCT-CRC-HE-100K/` (normalised by Macenko; `crc`) or `NCT-CRC-HE-100K-NONORM/` (`crc_nonorm`) is learnt from, and
`CRC-VAL-HE-7K/`, of 50 other patients, is reported; `<CLASS>/<CLASS>-<name>.tif` in each.
"""

from pathlib import Path

import numpy as np

from histoscale.data.fingerprint import contents
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

TRAIN = {"crc": "NCT-CRC-HE-100K", "crc_nonorm": "NCT-CRC-HE-100K-NONORM"}
REPORT = "CRC-VAL-HE-7K"
CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
IMAGES = {"train": 100_000, "report": 7_180}
SIZE_PX = 224
USAGE = Usage(choose="folds", eva_select="report", eva_report=("report",), positive=None)
NOTES = (
    "groups: none; no patient ids are published, so intervals are too narrow and inner folds may hold one patient on two sides",
    "colour and JPEG blocks differ between classes and reach far without any morphology (arXiv 2409.11546): a sanity check",
)


def open_crc(root: Path, config: PublicConfig, threads: int) -> LabelledPatches:
    """Tiles of 224 px in eva's order: by class, then by name, train before report.

    Raises DatasetError: a folder or a class is missing, a file lies in the folder of another class, counts differ.
    """
    paths: list[Path] = []
    labels: list[int] = []
    roles: list[str] = []
    for role, name in (("train", TRAIN[config.name]), ("report", REPORT)):
        folder = folder_in(root, name, f"{name}.zip")
        check_class_folders(folder, CLASSES)
        for label, kind in enumerate(CLASSES):
            for path in images_in(folder / kind, ".tif"):
                if not path.name.startswith(f"{kind}-"):
                    raise DatasetError(f"{path} is no tile of {kind}: expected the names {kind}-….tif there; move it out")
                paths.append(path)
                labels.append(label)
                roles.append(role)
    truth, parts = np.array(labels, dtype=np.int64), np.array(roles, dtype="<U8")
    expected = {f"{TRAIN[config.name]}": IMAGES["train"], REPORT: IMAGES["report"]}
    found = {TRAIN[config.name]: int((parts == "train").sum()), REPORT: int((parts == "report").sum())}
    name, notes = check_counts(config, root, expected, found)
    check_roles(parts, parts, "none")
    check_classes(truth, parts == "train", CLASSES, root / TRAIN[config.name])
    sizes = np.full((len(paths), 2), SIZE_PX) if wants_official(config) else measure(paths, threads)
    names = np.array([path.relative_to(root).as_posix() for path in paths])
    return LabelledPatches(
        name=name,
        classes=CLASSES,
        labels=truth,
        roles=parts,
        patients=names,
        sites=np.full(len(paths), ""),
        groups="none",
        mpp=config.mpp,
        size_px=common_side(sizes),
        hash=hash_of("crc", *names.tolist(), contents(paths)),
        read=ImageFiles(paths, sizes, threads),
        blocks=names,
        slide_ids=np.full(len(paths), ""),
        usage=USAGE,
        notes=NOTES + notes,
    )
