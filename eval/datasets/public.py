"""What all public data sets have in common: a published layout, published counts, and one sentence when either is not there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histoscale.eval.datasets.patches import DatasetError

COUNTS = ("official", "any")
_SHOWN = 6


@dataclass(frozen=True)
class PublicConfig:
    """A public set by its name.

    counts: `official` refuses all but the published numbers of images; `any` takes a part of a set, and every result says so.
    mpp: µm per pixel as published; null where sources disagree.
    """

    name: str
    counts: str
    mpp: float | None


def wants_official(config: PublicConfig) -> bool:
    """Raises DatasetError for a value of dataset.counts that is none."""
    if config.counts not in COUNTS:
        raise DatasetError(f"dataset.counts is {config.counts!r}: expected {' or '.join(COUNTS)}")
    return config.counts == "official"


def folder_in(root: Path, relative: str, archive: str) -> Path:
    """The folder `relative` of `root`. Raises DatasetError: it is not there; what was found instead."""
    path = root / relative
    if not path.is_dir():
        raise DatasetError(
            f"{root}: expected the folder {relative}, as {archive} unpacks it, and found {listed(root)}; give the folder that "
            f"holds {Path(relative).parts[0]} as data_root"
        )
    return path


def file_in(root: Path, relative: str, archive: str) -> Path:
    """The file `relative` of `root`. Raises DatasetError: it is not there; what was found instead."""
    path = root / relative
    if not path.is_file():
        raise DatasetError(
            f"{root}: expected the file {relative} of {archive} and found {listed(path.parent)}; give the folder that holds "
            f"{Path(relative).parts[0]} as data_root"
        )
    return path


def check_class_folders(folder: Path, classes: Sequence[str]) -> None:
    """Raises DatasetError unless the folders in `folder` are the classes, no fewer and no more."""
    found = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    if found != set(classes):
        missing, unknown = sorted(set(classes) - found), sorted(found - set(classes))
        raise DatasetError(
            f"{folder} has the class folders {', '.join(sorted(found)) or 'none'}: expected {', '.join(classes)}; "
            f"add {', '.join(missing) or 'none'}, move away {', '.join(unknown) or 'none'}"
        )


def images_in(folder: Path, suffix: str) -> Iterator[Path]:
    """The files of a folder that end in `suffix`, sorted by name."""
    return (path for path in sorted(folder.iterdir()) if path.suffix.lower() == suffix and not path.name.startswith("."))


def check_counts(
    config: PublicConfig, where: Path, expected: Mapping[str, int], found: Mapping[str, int]
) -> tuple[str, tuple[str, ...]]:
    """(the name that results carry, notes for them): `crc`, or `crc (part)`, which no published score is set beside.

    expected, found: images by part (a class, a split, or both in words); parts of `found` that are not expected count too.
    Raises DatasetError with counts=official when a part has another number of images.
    """
    wrong = [part for part in {**expected, **found} if expected.get(part, 0) != found.get(part, 0)]
    if wants_official(config):
        if wrong:
            told = ", ".join(f"{found.get(part, 0)} of {part} (expected {expected.get(part, 0)})" for part in wrong[:_SHOWN])
            raise DatasetError(
                f"{where} holds {told}{' and more' if len(wrong) > _SHOWN else ''}: get the whole set as published, or set "
                "dataset.counts=any to use what is there"
            )
    if not wrong:
        return config.name, ()
    total, published = sum(found.values()), sum(expected.values())
    note = f"dataset.counts=any: {total} images are used where {config.name} has {published}, so published scores do not compare"
    return f"{config.name} (part)", (note,)


def check_classes(labels: np.ndarray, train: np.ndarray, classes: Sequence[str], where: Path) -> None:
    """Raises DatasetError when a class has no training image."""
    absent = [name for i, name in enumerate(classes) if not (labels[train] == i).any()]
    if absent:
        raise DatasetError(f"{where} holds no training image of {', '.join(absent)}: expected some of every class")


def listed(folder: Path) -> str:
    """The first names in a folder, for an error."""
    if not folder.is_dir():
        return f"no folder {folder}"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return (", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")) or "nothing"
