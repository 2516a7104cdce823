"""Gleason grades of prostate cancer on tissue microarrays (Arvaniti 2018, doi 10.1038/s41598-018-30535-1)."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histoscale.data.fingerprint import contents
from histoscale.eval.datasets.imagefiles import ImageFiles, common_side, measure
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches, Usage, check_roles, hash_of
from histoscale.eval.datasets.public import PublicConfig, check_classes, check_counts, folder_in, wants_official

CLASSES = ("benign", "gleason_3", "gleason_4", "gleason_5")
ARRAYS = {"ZT111": "train", "ZT199": "train", "ZT204": "train", "ZT76": "select", "ZT80": "report"}
FOLDERS = {"train_validation_patches_750": ("ZT111", "ZT199", "ZT204", "ZT76"), "test_patches_750/patho_1": ("ZT80",)}
SECOND = "test_patches_750/patho_2"
ARCHIVE = "the patches of eiriniar/gleason_CNN (create_patches.py)"
COUNTS = {"train": 15303, "select": 2482, "report": 4967}
SIDE = 750
# eva reports the part that it chooses on; the honest protocol folds over train and select by array and reports ZT80.
USAGE = Usage(choose="folds", eva_select="select", eva_report=("select",), positive=None)
_NAME = re.compile(r"(?P<array>ZT\d+)(?P<core>_.+)?_patch_\d+_class_(?P<grade>[0-3])\.jpg")


def open_gleason(root: Path, config: PublicConfig, threads: int) -> LabelledPatches:
    """Rows by folder and path. Blocks are arrays; intervals resample cores, or arrays where a name does not say its core.

    root: the folder that holds train_validation_patches_750/ and test_patches_750/patho_1/, in which patches are called
    <array>_<core>_patch_<i>_class_<c>.jpg. Labels of the test part are those of the first reader.
    Raises DatasetError: a folder is missing, counts differ, a name is none, an array is in the wrong folder.
    """
    paths = [path for inside in FOLDERS for path in _patches_in(folder_in(root, inside, ARCHIVE))]
    parsed = [_parsed(path, root) for path in paths]
    arrays = np.array([one["array"] for one in parsed], dtype="<U8")
    labels = np.array([int(one["grade"]) for one in parsed], np.int64)
    roles = np.array([ARRAYS[one["array"]] for one in parsed], dtype="<U8")
    name, notes = check_counts(config, root, COUNTS, {role: int((roles == role).sum()) for role in COUNTS})
    check_roles(roles, arrays, "array")
    check_classes(labels, roles == "train", CLASSES, root)
    cores = all(one["core"] for one in parsed)
    groups = np.array([one["array"] + one["core"] for one in parsed]) if cores else arrays
    if not cores:
        notes = ("some names do not say their core, so intervals resample arrays, of which there are 5", *notes)
    sizes = np.full((len(paths), 2), SIDE) if wants_official(config) else measure(paths, threads)
    return LabelledPatches(
        name=name,
        classes=CLASSES,
        labels=labels,
        roles=roles,
        patients=groups,
        sites=np.full(len(paths), ""),
        groups="core" if cores else "slide",
        mpp=config.mpp,
        size_px=common_side(sizes),
        hash=hash_of("gleason", [path.relative_to(root).as_posix() for path in paths], contents(paths)),
        read=ImageFiles(paths, sizes, threads),
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


def _patches_in(folder: Path) -> list[Path]:
    """All JPEG files at any depth, sorted by path."""
    return sorted(path for path in folder.rglob("*.jpg") if not path.name.startswith("."))


def _by_bytes(folder: Path, root: Path) -> dict[str, int]:
    """sha256 of the core and the file's bytes -> grade."""
    found = {}
    contents(_patches_in(folder))
    for path in _patches_in(folder):
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
