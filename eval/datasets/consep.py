"""CoNSeP: nuclei of colorectal adenocarcinoma with a type each (arXiv 1812.06499), as masks of four classes and background.

    <data_root>/{Train,Test}/Images/train_1.png, Labels/train_1.mat

The merged classes are HoVer-Net's and eva's: both epithelia are one class, and so are fibroblasts, muscle and endothelium.
"""

import zlib
from pathlib import Path

import numpy as np
from scipy.io import loadmat, whosmat
from scipy.io.matlab import MatReadError

from histoscale.data.fingerprint import contents
from histoscale.eval.datasets.masks import (
    MASK_ROLES,
    LabelledMasks,
    check_counts,
    check_public,
    folder_of,
    image_shape,
    inside,
    rgb,
)
from histoscale.eval.datasets.patches import DatasetError, hash_of
from histoscale.eval.datasets.public import PublicConfig

CLASSES = ("background", "other", "inflammatory", "epithelial", "spindle-shaped")
# 1 other, 2 inflammatory, 3 healthy and 4 malignant epithelium, 5 fibroblast, 6 muscle, 7 endothelium
MERGED = np.array([0, 1, 2, 3, 3, 4, 4, 4])
OFFICIAL = {"train": 27, "report": 14}
MPP = 0.25
PARTS = ("Train", "Test")
SIDE_PX = 1000
TILE_PX = 250  # eva's grid: 16 tiles an image, without overlap

_UNREADABLE = (MatReadError, ValueError, TypeError, KeyError, IndexError, OSError, NotImplementedError, zlib.error)


def open_consep(root: Path, config: PublicConfig) -> LabelledMasks:
    """The images under `root`, sorted by name in each part.

    Both releases of the labels are read: `type_map` beside `inst_map`, or one array [h, w, 2] of instance and type. The set names
    no patients, so an interval resamples images, and nobody can check that no patient stands in both parts.
    Raises DatasetError: a folder or label is missing, counts are not the official ones, keys or shapes are others.
    """
    check_public(config, MPP)
    images: list[Path] = []
    roles: list[str] = []
    found = {}
    for role, part in zip(MASK_ROLES, PARTS, strict=True):
        folder, labels = folder_of(root, part, "Images"), folder_of(root, part, "Labels")
        paths = sorted(folder.glob("*.png"))
        alone = sorted({p.stem for p in paths} ^ {p.stem for p in labels.glob("*.mat")})
        if alone:
            raise DatasetError(
                f"{root / part}: {len(alone)} names have an image or a label alone ({', '.join(alone[:4])}), expected "
                "Images/<name>.png and Labels/<name>.mat for each: complete the folder"
            )
        images += paths
        roles += [role] * len(paths)
        found[part] = len(paths)
    notes = check_counts(root, found, dict(zip(found, OFFICIAL.values(), strict=True)), config.counts)
    empty = [part for part, number in found.items() if number == 0]
    if empty:
        raise DatasetError(f"{root / empty[0]} holds no image, expected some in each of {', '.join(found)}: complete the folder")
    mats = [path.parent.parent / "Labels" / f"{path.stem}.mat" for path in images]
    for path in (*images, *mats):
        inside(root, path)
    shapes = [image_shape(path) for path in images]
    keys = [_type_key(mat, shape) for mat, shape in zip(mats, shapes, strict=True)]
    for path, (height, width) in zip(images, shapes, strict=True):
        if (height, width) != (SIDE_PX, SIDE_PX) if config.counts == "official" else min(height, width) < TILE_PX:
            raise DatasetError(f"{path} is {width} x {height} px, expected {SIDE_PX} x {SIDE_PX} px: fetch it again")

    def read(row: int) -> tuple[np.ndarray, np.ndarray]:
        pixels = rgb(images[row])
        return pixels, MERGED[_types(mats[row], keys[row], (pixels.shape[1], pixels.shape[2]))]

    names = np.array([path.stem for path in images])
    files = [*images, *mats]
    places = [path.relative_to(root).as_posix() for path in files]
    return LabelledMasks(
        name="consep",
        classes=CLASSES,
        ignore=None,
        names=names,
        shapes=np.array(shapes, np.int64),
        roles=np.array(roles, dtype="<U8"),
        patients=names,
        groups="image",
        blocks=names,
        slide_ids=np.full(len(names), ""),
        mpp=MPP,
        tile_px=TILE_PX,
        hash=hash_of("consep", places, contents(files), CLASSES, MERGED, TILE_PX, roles),
        read=read,
        notes=("the set names no patients: whether one stands in both parts cannot be checked", *notes),
    )


def _type_key(mat: Path, shape: tuple[int, int]) -> str:
    """The variable that holds the types, by the file's own directory. Raises DatasetError."""
    try:
        held = {name: tuple(size) for name, size, _ in whosmat(mat)}
    except _UNREADABLE as error:
        raise DatasetError(f"{mat} cannot be opened ({error}), expected MATLAB version 4 to 7.2: fetch it again") from error
    if "type_map" in held and "inst_map" in held:
        sizes = {held["type_map"], held["inst_map"]}
    else:
        sizes = {size[:2] for size in held.values() if len(size) == 3 and size[2] == 2}
        stacked = [name for name, size in held.items() if len(size) == 3 and size[2] == 2]
        if len(stacked) != 1:
            raise DatasetError(
                f"{mat} holds {', '.join(sorted(held)) or 'nothing'}: expected inst_map and type_map, or one array [h, w, 2] of "
                "instance and type as in the older release; fetch the labels again"
            )
    if sizes != {shape}:
        raise DatasetError(
            f"{mat}: its maps are {' and '.join(map(str, sorted(sizes)))} and its image {shape}, expected one size: fetch both "
            "again"
        )
    return "type_map" if "type_map" in held and "inst_map" in held else stacked[0]


def _types(mat: Path, key: str, shape: tuple[int, int]) -> np.ndarray:
    """int64 [h, w] in 0..7. Raises DatasetError."""
    try:
        types = loadmat(mat, variable_names=[key])[key]
    except _UNREADABLE as error:
        raise DatasetError(f"{mat}: {key} cannot be read ({error}), expected a map of types: fetch it again") from error
    types = types[..., 1] if types.ndim == 3 else types
    if types.shape != shape or types.dtype.kind not in "uif":
        raise DatasetError(f"{mat}: {key} is {types.dtype} {types.shape}, expected numbers {shape}: fetch it again")
    whole = types.astype(np.int64)
    if (whole != types).any() or whole.min() < 0 or whole.max() >= len(MERGED):
        raise DatasetError(f"{mat}: {key} holds {types.min()} to {types.max()}, expected whole types 0 to {len(MERGED) - 1}")
    return whole
