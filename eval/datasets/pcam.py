"""PatchCamelyon: 327,680 tiles of lymph nodes, tumour in their central 32 px or not (Zenodo 2546921, CC0).

`camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5`, unpacked, and `…_meta.csv` with the Camelyon16 slide of every tile. The
same tiles are `pcam_10shot`, of which eva learns from 10 tiles a class, drawn anew from train for each of 50 runs
(kaiko-ai/eva:configs/vision/pathology/offline/classification/patch_camelyon_10shot.yaml); the few-shot probe draws them.
"""

import csv
import os
import threading
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from histoscale.data.fingerprint import contents
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches, Usage, check_roles, hash_of
from histoscale.eval.datasets.public import PublicConfig, check_classes, check_counts, file_in, listed, wants_official
from histoscale.eval.hdf5 import Hdf5Error, array

SOURCE = "Zenodo 2546921"
STEM = "camelyonpatch_level_2_split_"
SPLITS = {"train": "train", "valid": "select", "test": "report"}
TILES = {"train": 262_144, "valid": 32_768, "test": 32_768}
CLASSES = ("no_tumor", "tumor")
COLUMNS = ("coord_y", "coord_x", "tumor_patch", "center_tumor_patch", "wsi")
SIZE_PX = 96
USAGE = Usage(choose="select", eva_select="select", eva_report=("report", "select"), positive="tumor")
UNBALANCED = 0.01  # all splits are balanced 50/50 (basveeling/pcam README); more than this off is another set
MISALIGNED = 0.01  # share of rows whose table and label may differ before they are not of the same tiles
SPAN_ROWS = 256  # read at once from a file without chunks
_SHOWN = 6  # names that an error lists
CACHE_BYTES = 64 << 20  # decoded chunks that a process keeps: a batch that ends inside a chunk does not decode it again


def open_pcam(root: Path, config: PublicConfig) -> LabelledPatches:
    """Tiles of 96 px: train, select (valid), report (test), each in the order of its file. Pixels are read when they are asked
    for; labels alone are in memory.

    Raises DatasetError: a file is missing, cut short, or of another form; counts differ; a slide stands in two splits; tables
    are there for some of the splits, or are not of the same tiles.
    """
    official = wants_official(config)
    tiles = [_file(root, split, "x") for split in SPLITS]
    labels = [_labels(root, split) for split in SPLITS]
    counts = [len(part) for part in labels]
    sides = {_side(path, rows) for path, rows in zip(tiles, counts, strict=True)}
    if len(sides) > 1 or (official and sides != {SIZE_PX}):
        raise DatasetError(f"{root} holds tiles of {sorted(sides)} px: expected {SIZE_PX} in all of {', '.join(SPLITS)}")
    name, notes = check_counts(config, root, TILES, dict(zip(SPLITS, counts, strict=True)))
    for split, part in zip(SPLITS, labels, strict=True):
        if official and abs(part.mean() - 0.5) > UNBALANCED:
            raise DatasetError(f"{root}: {part.mean():.1%} of {split} are tumour: expected half; get {SOURCE} again")
    truth = np.concatenate(labels)
    roles = np.repeat(np.array(list(SPLITS.values()), dtype="<U8"), counts)
    slides, said = _slides(root, labels)
    groups = "none" if slides is None else "slide"
    names = np.arange(len(truth)).astype(str) if slides is None else slides
    check_roles(roles, names, groups)
    check_classes(truth, roles == "train", CLASSES, root)
    return LabelledPatches(
        name=name,
        classes=CLASSES,
        labels=truth,
        roles=roles,
        patients=names,
        sites=np.full(len(truth), ""),
        groups=groups,
        mpp=config.mpp,
        size_px=sides.pop(),
        hash=hash_of("pcam", contents(tiles), truth, groups, names),
        read=TileFiles(tiles, counts),
        blocks=names,
        slide_ids=np.full(len(truth), "") if slides is None else names,
        usage=USAGE,
        notes=said + notes,
    )


class TileFiles:
    """Rows of several HDF5 files as if they were one; for any thread, opened anew in each process, pickled closed."""

    def __init__(self, paths: list[Path], counts: list[int]) -> None:
        self.paths, self.first = paths, np.concatenate([[0], np.cumsum(counts)])
        self._pid, self._open, self._lock = 0, dict[int, h5py.Dataset](), threading.Lock()

    def __reduce__(self) -> tuple[type["TileFiles"], tuple[list[Path], list[int]]]:
        return TileFiles, (self.paths, np.diff(self.first).tolist())

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [b, 3, S, S]. Every chunk that holds a wanted row is decoded once. Raises DatasetError for a damaged file."""
        order = np.argsort(rows, kind="stable")
        pixels: np.ndarray | None = None
        with self._lock:
            for number in range(len(self.paths)):
                inside = order[(rows[order] >= self.first[number]) & (rows[order] < self.first[number + 1])]
                if not len(inside):
                    continue
                data = self._data(number)
                wanted = rows[inside] - self.first[number]
                if pixels is None:
                    pixels = np.empty((len(rows), 3, *data.shape[1:3]), np.uint8)
                step = data.chunks[0] if data.chunks else SPAN_ROWS
                for part in np.split(np.arange(len(inside)), np.flatnonzero(np.diff(wanted // step)) + 1):
                    low, high = int(wanted[part[0]]), int(wanted[part[-1]]) + 1
                    try:
                        span = data[low:high]
                    except OSError as error:
                        raise DatasetError(
                            f"{self.paths[number]} cannot be read at rows {low} to {high}: it is damaged, get it again ({error})"
                        ) from error
                    pixels[inside[part]] = span[wanted[part] - low].transpose(0, 3, 1, 2)
        return np.empty((0, 3, 0, 0), np.uint8) if pixels is None else pixels

    def _data(self, number: int) -> h5py.Dataset:
        if self._pid != os.getpid():  # HDF5 handles do not survive a fork
            self._pid, self._open = os.getpid(), {}
        if number not in self._open:
            file = h5py.File(self.paths[number], "r", rdcc_nbytes=CACHE_BYTES)
            self._open[number] = array(file, "x", "u")
        return self._open[number]


def _file(root: Path, split: str, key: str) -> Path:
    name = f"{STEM}{split}_{key}.h5"
    if not (root / name).is_file() and (root / f"{name}.gz").is_file():
        raise DatasetError(f"{root} holds {name}.gz where {name} is expected: unpack it with gunzip")
    return file_in(root, name, SOURCE)


def _opened(path: Path, key: str) -> h5py.File:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path} is no whole HDF5 file: get it again from {SOURCE} ({error})") from error
    try:
        if file.get(key, getlink=True) is None:
            held = ", ".join(islice(file, _SHOWN)) or "nothing"
            raise DatasetError(f"{path} holds {held}: expected the array {key!r}; get it again from {SOURCE}")
        array(file, key, "iuf")
    except DatasetError:
        file.close()
        raise
    except (Hdf5Error, RuntimeError, OSError, KeyError) as error:
        file.close()
        raise DatasetError(f"{path} {error}: get it again from {SOURCE}") from error
    return file


def _labels(root: Path, split: str) -> np.ndarray:
    path = _file(root, split, "y")
    with _opened(path, "y") as file:
        data = file["y"]
        if data.ndim != 4 or data.shape[1:] != (1, 1, 1) or data.dtype != np.uint8:
            raise DatasetError(f"{path} holds y {data.dtype} {data.shape}: expected uint8 (N, 1, 1, 1); get it from {SOURCE}")
        try:
            labels = data[:].reshape(-1).astype(np.int64)
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: it is damaged, get it again from {SOURCE} ({error})") from error
    if not np.isin(labels, (0, 1)).all():
        raise DatasetError(f"{path} holds the labels {np.unique(labels)[:6].tolist()}: expected 0 and 1; get it from {SOURCE}")
    return labels


def _side(path: Path, rows: int) -> int:
    with _opened(path, "x") as file:
        data = file["x"]
        if data.ndim != 4 or data.shape[3] != 3 or data.shape[1] != data.shape[2] or data.dtype != np.uint8:
            raise DatasetError(
                f"{path} holds x {data.dtype} {data.shape}: expected uint8 (N, {SIZE_PX}, {SIZE_PX}, 3); get it from {SOURCE}"
            )
        if len(data) != rows:
            raise DatasetError(f"{path} holds {len(data)} tiles and its y file {rows} labels: expected as many; get both again")
        return int(data.shape[1])


def _slides(root: Path, labels: list[np.ndarray]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The slide of every tile, None without tables, and what is to be said of them."""
    paths = [root / f"{STEM}{split}_meta.csv" for split in SPLITS]
    there = [path for path in paths if path.is_file()]
    if not there:
        return None, (f"groups: none; {paths[0].name} and the other two are not there, so intervals are too narrow",)
    if len(there) < len(paths):
        absent = next(path for path in paths if path not in there)
        raise DatasetError(f"{root} holds {there[0].name} and no {absent.name}: expected all three tables or none of them")
    found, notes = [], []
    contents(paths)
    for path, truth in zip(paths, labels, strict=True):
        slides, centre = _table(path)
        if len(slides) != len(truth):
            raise DatasetError(f"{path} has {len(slides)} rows for {len(truth)} tiles: expected one each; found {listed(root)}")
        differ = int((centre != truth).sum())
        if differ > MISALIGNED * len(truth):
            raise DatasetError(
                f"{path}: center_tumor_patch differs from the label of {differ} of {len(truth)} tiles, so its rows are not these "
                "tiles: get it again, or move all three tables away to go without slides"
            )
        notes += [f"{path.name} and the labels differ for {differ} tiles; the labels are used"] if differ else []
        found.append(slides)
    return np.concatenate(found), tuple(notes)


def _table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Slide ids, and whether the centre is tumour: [n] each."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = sorted(set(COLUMNS) - set(reader.fieldnames or ()))
        if missing:
            raise DatasetError(
                f"{path} lacks the columns {', '.join(missing)}: expected {', '.join(COLUMNS)}; get it from {SOURCE}"
            )
        rows = [(row["wsi"] or "", (row["center_tumor_patch"] or "").strip().lower() in ("true", "1")) for row in reader]
    if any(not slide for slide, _ in rows):
        raise DatasetError(f"{path} has rows without a slide in the column wsi: expected one each; get it from {SOURCE}")
    return np.array([slide for slide, _ in rows], dtype=str), np.array([centre for _, centre in rows], dtype=np.int64)
