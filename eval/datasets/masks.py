"""Images with a class for every pixel: what the decoder probes are fitted and scored on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histoscale.data.pictures import PictureError, pixels_of, size_of
from histoscale.eval.datasets.patches import DatasetError
from histoscale.eval.datasets.public import COUNTS, PublicConfig

MASK_ROLES = ("train", "report")

MaskReading = Callable[[int], tuple[np.ndarray, np.ndarray]]  # row -> uint8 [3, h, w], int64 [h, w]


@dataclass(frozen=True)
class LabelledMasks:
    """n images of any size. classes: names of the labels 0 (background), 1, …; roles: [n] of MASK_ROLES.

    ignore: a label above the classes whose pixels are neither learnt nor scored, None where there is none.
    names: of the images. shapes: int64 [n, 2], height and width. mpp: µm per pixel of all of them.
    tile_px: an image is cut into a grid of such squares, None: taken whole, and learnt from random crops.
    patients, groups: what an interval resamples, and what that is (`patient`, or `image` where no patient is known).
    blocks: what no fold may split. slide_ids: of the source slides, "" where unknown. notes: sentences that must stand beside
    every score of this set. hash: of everything that makes pixels and labels.
    """

    name: str
    classes: tuple[str, ...]
    ignore: int | None
    names: np.ndarray
    shapes: np.ndarray
    roles: np.ndarray
    patients: np.ndarray
    groups: str
    blocks: np.ndarray
    slide_ids: np.ndarray
    mpp: float
    tile_px: int | None
    hash: str
    read: MaskReading
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, role: str) -> np.ndarray:
        return np.flatnonzero(self.roles == role)


def check_public(config: PublicConfig, mpp: float) -> None:
    """Raises DatasetError for settings that a public set of masks has no use for."""
    if config.counts not in COUNTS:
        raise DatasetError(f"dataset.counts is {config.counts!r}: expected {' or '.join(COUNTS)}")
    if config.mpp is not None and config.mpp != mpp:
        raise DatasetError(f"dataset.mpp is {config.mpp}: {config.name} was scanned at {mpp} µm/px, so set it to null")


def check_counts(root: Path, found: Mapping[str, int], official: Mapping[str, int], counts: str) -> tuple[str, ...]:
    """The note that a part of a set carries, none for the whole. Raises DatasetError when a part was not asked for."""
    if dict(found) == dict(official):
        return ()
    have = " and ".join(f"{number} images in {part!r}" for part, number in found.items())
    want = " and ".join(str(number) for number in official.values())
    if counts == "official":
        raise DatasetError(
            f"{root} holds {have}: expected {want}; complete the folder, or set dataset.counts=any to use a part, "
            "which the result then says"
        )
    return (f"a part of the set: {have} where the whole has {want}",)


def folder_of(root: Path, *parts: str) -> Path:
    """A folder of the layout. Raises DatasetError when it is not there, with what is."""
    folder = root.joinpath(*parts)
    if not folder.is_dir():
        near = sorted(p.name for p in root.iterdir())[:6] if root.is_dir() else []
        holds = f"it holds {', '.join(near) or 'nothing'}" if root.is_dir() else "it is no folder"
        raise DatasetError(f"{root}: expected the folder {'/'.join(parts)!r}, {holds}: point data_root at its parent")
    return folder


def inside(root: Path, path: Path) -> Path:
    """Raises DatasetError for a path that leads out of `root`, by a link or by `..`."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise DatasetError(f"{path} leads to {path.resolve()}, outside {root}: put the file itself into the folder")
    return path


def image_shape(path: Path) -> tuple[int, int]:
    """Height and width from the header alone. Raises DatasetError."""
    try:
        width, height = size_of(path)
    except (PictureError, OSError) as error:
        raise DatasetError(f"{path} cannot be opened ({error}), expected an image: fetch it again") from error
    return height, width


def rgb(path: Path) -> np.ndarray:
    """uint8 [3, h, w]. Raises DatasetError."""
    try:
        return pixels_of(path).transpose(2, 0, 1)
    except (PictureError, OSError) as error:
        raise DatasetError(f"{path} cannot be decoded ({error}), expected an image: fetch it again") from error
