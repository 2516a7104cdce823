"""BreaKHis at 40X, the four breast tumour types with enough patients (Spanhol 2016, doi 10.1109/TBME.2015.2496264)."""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from histoscale.data.fingerprint import contents
from histoscale.eval.datasets.imagefiles import ImageFiles, measure
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches, Usage, hash_of
from histoscale.eval.datasets.public import PublicConfig, check_classes, check_counts, folder_in, images_in

CLASSES = ("TA", "MC", "F", "DC")
FOLDERS = {
    "TA": "benign/SOB/tubular_adenoma",
    "MC": "malignant/SOB/mucinous_carcinoma",
    "F": "benign/SOB/fibroadenoma",
    "DC": "malignant/SOB/ductal_carcinoma",
}
ARCHIVE, BREAST = "BreaKHis_v1.tar.gz", "BreaKHis_v1/histology_slides/breast"
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


def open_breakhis(root: Path, config: PublicConfig, threads: int) -> LabelledPatches:
    """Rows by path, as eva sorts them. Roles are eva's split; blocks and intervals go by the number of the slide.

    root: the folder that holds BreaKHis_v1, as BreaKHis_v1/histology_slides/breast/benign/SOB/<type>/SOB_B_TA_14-<id>/40X/.
    An id is a slide number and section letters, and eva's split sets `16184CD` against `16184`: how many of its validation images
    share their number with a training image stands in the notes.
    Raises DatasetError: a folder is missing, counts differ, a name says another type than its folder.
    """
    top = folder_in(root, BREAST, ARCHIVE)
    known: dict[Path, dict[str, str]] = {}
    for label, inside in FOLDERS.items():
        for folder in sorted(folder_in(root, f"{BREAST}/{inside}", ARCHIVE).glob("*/40X")):
            known |= {path: _parsed(path, label) for path in images_in(folder, ".png")}
    paths = sorted(known)
    labels = np.array([CLASSES.index(known[path]["label"]) for path in paths], np.int64)
    ids = np.array([known[path]["id"] for path in paths], dtype="<U16")
    numbers = np.array([known[path]["number"] for path in paths], dtype="<U16")
    roles = np.where(np.isin(ids, list(VALIDATION)), "select", "train").astype("<U8")
    name, notes = _counted(config, top, labels, ids, roles)
    check_classes(labels, roles == "train", CLASSES, top)
    return LabelledPatches(
        name=name,
        classes=CLASSES,
        labels=labels,
        roles=roles,
        patients=numbers,
        sites=np.full(len(paths), ""),
        groups="slide",
        mpp=config.mpp,
        size_px=None,
        hash=hash_of("breakhis", [path.relative_to(top).as_posix() for path in paths], contents(paths)),
        read=ImageFiles(paths, measure(paths, threads), threads),
        blocks=numbers,
        slide_ids=ids,
        usage=USAGE,
        notes=(*_shared(numbers, roles), *notes),
    )


def _parsed(path: Path, label: str) -> dict[str, str]:
    match = _NAME.fullmatch(path.name)
    kind = "B" if FOLDERS[label].startswith("benign") else "M"
    if match is None or match["label"] != label or match["kind"] != kind:
        raise DatasetError(
            f"{path} is no 40X image of its folder's type: expected SOB_{kind}_{label}-14-<id>-40-<n>.png, move it away"
        )
    return match.groupdict()


def _counted(
    config: PublicConfig, top: Path, labels: np.ndarray, ids: np.ndarray, roles: np.ndarray
) -> tuple[str, tuple[str, ...]]:
    """Against the published numbers: of training, and of validation by class and by id."""
    held = roles == "select"
    expected = {"train": TRAIN, **{f"val {name}": count for name, count in VALIDATION_CLASSES.items()}}
    found = {"train": int((~held).sum()), **{f"val {name}": int((labels[held] == i).sum()) for i, name in enumerate(CLASSES)}}
    if expected == found:  # then where the ids differ
        by_id = Counter(ids[held].tolist())
        expected = {f"id {one}": count for one, count in VALIDATION.items()}
        found = {f"id {one}": by_id[one] for one in VALIDATION}
    return check_counts(config, top, expected, found)


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
