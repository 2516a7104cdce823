"""Gleason grades of prostate cancer on tissue microarrays (Arvaniti 2018, doi 10.1038/s41598-018-30535-1)."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histoscale.eval.datasets.images import folder_of, images_in, reading, stamps
from histoscale.eval.datasets.official import check_config, check_counts, named
from histoscale.eval.datasets.patches import DatasetConfig, DatasetError, LabelledPatches, Usage, check_roles, hash_of

CLASSES = ("benign", "gleason_3", "gleason_4", "gleason_5")
ARRAYS = {"ZT111": "train", "ZT199": "train", "ZT204": "train", "ZT76": "select", "ZT80": "report"}
FOLDERS = {"train_validation_patches_750": ("ZT111", "ZT199", "ZT204", "ZT76"), "test_patches_750/patho_1": ("ZT80",)}
SECOND = "test_patches_750/patho_2"
LAYOUT = "train_validation_patches_750/ and test_patches_750/patho_1/ with <array>_<core>_patch_<i>_class_<c>.jpg"
COUNTS = {"train": 15303, "select": 2482, "report": 4967}
MPP, SIDE = 0.23, 750
# eva reports the part that it chooses on; the honest protocol folds over train and select by array and reports ZT80.
USAGE = Usage(choose="folds", eva_select="select", eva_report=("select",), positive=None)
_NAME = re.compile(r"(?P<array>ZT\d+)(?P<core>_.+)?_patch_\d+_class_(?P<grade>[0-3])\.jpg")


def open_gleason(root: Path, config: DatasetConfig) -> LabelledPatches:
    """Rows by folder and path. Blocks are arrays; intervals resample cores, or arrays where a name does not say its core.

    root: the folder that holds train_validation_patches_750. Labels of the test part are those of the first reader.
    Raises DatasetError: a folder is missing, a count is not the published one, a name is none, an array is in the wrong folder.
    """
    check_config(config, "ZT111+ZT199+ZT204", "ZT80", MPP)
    paths = [path for inside in FOLDERS for path in images_in(folder_of(root, inside, LAYOUT), "**/*.jpg")]
    parsed = [_parsed(path, root) for path in paths]
    arrays = np.array([one["array"] for one in parsed], dtype="<U8")
    roles = np.array([ARRAYS[one["array"]] for one in parsed], dtype="<U8")
    found = {f"{root} ({role})": int((roles == role).sum()) for role in COUNTS}
    notes = check_counts(config, found, {f"{root} ({role})": count for role, count in COUNTS.items()})
    check_roles(roles, arrays, "array")
    cores = all(one["core"] for one in parsed)
    groups = np.array([one["array"] + one["core"] for one in parsed]) if cores else arrays
    if not cores:
        notes = (*notes, "some names do not say their core, so intervals resample arrays, of which there are 5")
    return LabelledPatches(
        name=named("gleason", notes),
        classes=CLASSES,
        labels=np.array([int(one["grade"]) for one in parsed], np.int64),
        roles=roles,
        patients=groups,
        sites=np.full(len(paths), ""),
        groups="core" if cores else "slide",
        mpp=MPP,
        size_px=SIDE,
        hash=hash_of("gleason", stamps(root, paths)),
        read=reading(paths, SIDE),
        blocks=arrays,
        slide_ids=arrays,
        usage=USAGE,
        notes=notes,
    )


@dataclass(frozen=True)
class Agreement:
    """The second reader against the first: confusion int64 [4, 4] (rows: the first reader), over the patches that both have; of:
    patches of the first. balanced_accuracy: mean over the first reader's classes, a ceiling for what is scored against them."""

    confusion: np.ndarray
    of: int
    balanced_accuracy: float


def reader_agreement(root: Path) -> Agreement | None:
    """How the second reader graded the test patches; None where `test_patches_750/patho_2` was not made.

    Patches are matched by their bytes: whether equal numbers mean equal places in both folders is not established.
    Raises DatasetError where no patch of the second folder is one of the first.
    """
    if not (root / SECOND).is_dir():
        return None
    first, second = (_by_bytes(root / inside, root) for inside in ("test_patches_750/patho_1", SECOND))
    both = sorted(first.keys() & second.keys())
    if not both:
        raise DatasetError(
            f"{root / SECOND} shares no patch with patho_1: expected the same patches under other grades, make both again"
        )
    confusion = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    np.add.at(confusion, ([first[key] for key in both], [second[key] for key in both]), 1)
    total = confusion.sum(axis=1)
    share = confusion.diagonal()[total > 0] / total[total > 0]
    return Agreement(confusion, len(first), float(share.mean()))


def _by_bytes(folder: Path, root: Path) -> dict[str, int]:
    """sha256 of the core and the file's bytes -> grade."""
    found = {}
    for path in images_in(folder, "**/*.jpg"):
        parsed = _parsed(path, root)
        core = f"{parsed['array']}{parsed['core']}".encode()
        found[hashlib.sha256(core + path.read_bytes()).hexdigest()] = int(parsed["grade"])
    return found


def _parsed(path: Path, root: Path) -> dict[str, str]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise DatasetError(f"{path} is no patch: expected <array>_<core>_patch_<i>_class_<0-3>.jpg, move it away")
    fitting, testing = FOLDERS
    inside = fitting if path.is_relative_to(root / fitting) else testing
    if match["array"] not in FOLDERS[inside]:
        raise DatasetError(
            f"{path} is of the array {match['array']}: expected {', '.join(FOLDERS[inside])} there, move it to its folder"
        )
    return {name: value or "" for name, value in match.groupdict().items()}
