"""BreaKHis at 40X, the four breast tumour types with enough patients (Spanhol 2016, doi 10.1109/TBME.2015.2496264)."""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from histoscale.eval.datasets.images import folder_of, images_in, reading, stamps
from histoscale.eval.datasets.official import check_config, check_counts, named
from histoscale.eval.datasets.patches import DatasetConfig, DatasetError, LabelledPatches, Usage, hash_of

CLASSES = ("TA", "MC", "F", "DC")
FOLDERS = {
    "TA": "benign/SOB/tubular_adenoma",
    "MC": "malignant/SOB/mucinous_carcinoma",
    "F": "benign/SOB/fibroadenoma",
    "DC": "malignant/SOB/ductal_carcinoma",
}
LAYOUT = "BreaKHis_v1/histology_slides/breast/{benign,malignant}/SOB/<type>/SOB_*_14-<id>/40X/SOB_<B|M>_<type>-14-<id>-40-<n>.png"
TRAIN = 1132
# The slides that eva validates on, with their images, and its images by class (kaiko-ai/eva, Apache-2.0).
VALIDATION = {
    "18842D": 16, "19979": 26, "15275": 12, "15792": 14, "16875": 14, "3909": 26, "5287": 23, "16716": 38, "2773": 30, "5695": 23,
    "16184CD": 35, "23060CD": 14, "21998CD": 37, "21998EF": 31,
}  # fmt: skip
VALIDATION_CLASSES = {"TA": 47, "MC": 42, "F": 82, "DC": 168}
# No test part: eva chooses and reports on the same images; the honest protocol holds out numbers over all of them.
USAGE = Usage(choose="outer", eva_select="select", eva_report=("select",), positive=None)
_NAME = re.compile(r"SOB_(?P<kind>[BM])_(?P<label>[A-Z]+)-\d+-(?P<id>(?P<number>\d+)[A-Z]*)-40-\d+\.png")


def open_breakhis(root: Path, config: DatasetConfig) -> LabelledPatches:
    """Rows by path, as eva sorts them. Roles are eva's split; blocks and intervals go by the number of the slide.

    An id is a slide number and section letters, and eva's split sets `16184CD` against `16184`: how many of its validation images
    share their number with a training image stands in the notes. mpp: the configuration's; 0.25 (eva) and about 0.49 (the optics
    of the archive) are both claimed. root: the folder that holds BreaKHis_v1.
    Raises DatasetError: a folder is missing, a count is not the published one, a name says another type than its folder.
    """
    check_config(config, "train", "val")
    top = folder_of(root, "BreaKHis_v1/histology_slides/breast", LAYOUT)
    folders = {label: folder_of(top, FOLDERS[label], LAYOUT) for label in CLASSES}
    known = {path: _parsed(path, label) for label, folder in folders.items() for path in images_in(folder, "*/40X/*.png")}
    paths = sorted(known)
    labels = np.array([CLASSES.index(known[path]["label"]) for path in paths], np.int64)
    ids = np.array([known[path]["id"] for path in paths], dtype="<U16")
    numbers = np.array([known[path]["number"] for path in paths], dtype="<U16")
    roles = np.where(np.isin(ids, list(VALIDATION)), "select", "train").astype("<U8")
    notes = (*_counted(config, top, labels, ids, roles), *_shared(numbers, roles))
    return LabelledPatches(
        name=named("breakhis", notes),
        classes=CLASSES,
        labels=labels,
        roles=roles,
        patients=numbers,
        sites=np.full(len(paths), ""),
        groups="slide",
        mpp=config.mpp,
        size_px=None,
        hash=hash_of("breakhis", stamps(top, paths)),
        read=reading(paths, None),
        blocks=numbers,
        slide_ids=ids,
        usage=USAGE,
        notes=notes,
    )


def _parsed(path: Path, label: str) -> dict[str, str]:
    match = _NAME.fullmatch(path.name)
    kind = "B" if FOLDERS[label].startswith("benign") else "M"
    if match is None or match["label"] != label or match["kind"] != kind:
        raise DatasetError(
            f"{path} is no 40X image of its folder's type: expected SOB_{kind}_{label}-14-<id>-40-<n>.png, move it away"
        )
    return match.groupdict()


def _counted(config: DatasetConfig, top: Path, labels: np.ndarray, ids: np.ndarray, roles: np.ndarray) -> tuple[str, ...]:
    held = roles == "select"
    by_class, by_id = Counter(labels[held].tolist()), Counter(ids[held].tolist())
    # A part may hold images of some of the slides only, but must have every class on both sides.
    found = {f"{top} (train)": int((~held).sum())}
    expected = {f"{top} (train)": TRAIN}
    for label, name in enumerate(CLASSES):
        found[f"{top} (val, {name})"], expected[f"{top} (val, {name})"] = by_class[label], VALIDATION_CLASSES[name]
    notes = check_counts(config, found, expected)
    unlearnt = [name for label, name in enumerate(CLASSES) if not (labels[~held] == label).any()]
    if unlearnt:
        raise DatasetError(
            f"{top} has no training image of {unlearnt[0]}: expected images of ids outside eva's validation, fetch it again"
        )
    differing = [one for one, count in VALIDATION.items() if by_id[one] != count]
    if differing and config.counts == "official":
        one = differing[0]
        raise DatasetError(f"{top} has {by_id[one]} images of the id {one}: expected {VALIDATION[one]}, fetch the set again")
    return notes


def _shared(numbers: np.ndarray, roles: np.ndarray) -> tuple[str, ...]:
    """How far the published split shares slide numbers between its sides."""
    held = roles == "select"
    both = np.intersect1d(numbers[held], numbers[~held])
    if not len(both):
        return ()
    count = int(np.isin(numbers[held], both).sum())
    return (
        f"{count} of {int(held.sum())} images that eva validates on share their slide number with training images "
        f"({', '.join(both)}); whether these are one case is not established, so honest folds keep a number whole",
    )
