"""Embedding stores: one HDF5 file a slide, `features [n, D]` and `coords [n, 2]`; written as ours, read also as TRIDENT and CLAM
write them.

Layouts (mahmoodlab/TRIDENT trident/IO.py, mahmoodlab/CLAM utils/file_utils.py): both keep the two datasets under these keys, with
or without a leading axis of one; TRIDENT's attributes stand on `features` (encoder) and `coords` (patch_size, patch_size_level0,
target_magnification); CLAM's feature files have none.
"""

import errno
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from histoscale.data.manifest import check_slide_id
from histoscale.eval.annotations import FARTHEST_PX
from histoscale.eval.examine import Examiner
from histoscale.eval.hdf5 import Hdf5Error, array, attributes, check_written

DTYPES = {"fp16": np.float16, "fp32": np.float32}
_FLOATS = ("float16", "float32")
_BLOCK = 1 << 16
_KINDS = {"features": "f", "coords": "iuf"}  # the data sets, and the kinds of their types
_TOLD = ("slide_id", "encoder_hash", "encoder", "mpp", "target_magnification", "level0_mpp", "patch_size", "patch_size_level0")
_WIDEST_PX = 1 << 24  # side of a tile
_SHOWN = 6  # names that an error lists
_SLIDE_MPP = 10.0  # um/px at 1x: the convention by which magnifications are turned into mpp (20x is 0.5)


@dataclass(frozen=True)
class StoreConfig:
    """dtype: fp16 or fp32; fp16 is half the bytes, and a feature beyond its range (65504) fails that slide."""

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"store.dtype is {self.dtype!r}: expected {' or '.join(DTYPES)}")


class StoreError(ValueError):
    """An embedding store that cannot be read, or a slide id that is no file name; the message says what to do. why: its cause
    alone, without file and advice, as it stands behind a slide that is left out."""

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why


class StoreLocked(StoreError):
    """A store that another process holds open to write: nothing is wrong with it, and it can be read later."""


_AGAIN = "embed that slide again"
_GIVE = "give a folder of <slide_id>.h5"


def unreadable(path: Path, why: str, advice: str = _AGAIN) -> StoreError:
    """The error of a store: its path, `why` as a predicate (`holds no tile`), and what to do."""
    return StoreError(f"{path} {why}: {advice}", why)


@dataclass(frozen=True)
class StoreInfo:
    """encoder: ours by hash, TRIDENT's by name, "" where the store does not say. mpp: µm/px of the patches, NaN where the store
    does not say; by nominal magnification in TRIDENT's. patch_px: side that was read, 0 where the store does not say.
    size_px: side of a tile in level-0 px, 0 where neither the store nor its coordinates say (a single tile): enough to train on,
    not to draw. dtype: float16 or float32."""

    path: Path
    encoder: str
    width: int
    tiles: int
    mpp: float
    patch_px: int
    size_px: int
    dtype: str


@dataclass(frozen=True)
class Extent:
    """The rows of `features` as they lie in the file: [tiles, width] of `dtype` from byte `offset` on, without a gap; offset is
    None where HDF5 has to put them together (chunks, compression, another byte order)."""

    path: Path
    tiles: int
    width: int
    dtype: np.dtype
    offset: int | None

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.tiles * self.row_bytes


def store_path(folder: Path, slide_id: str) -> Path:
    """`<folder>/<slide_id>.h5`. Raises StoreError for an id that is no plain file name."""
    try:
        check_slide_id(slide_id)
    except ValueError as error:
        raise StoreError(f"no store for this slide: {error}") from error
    return folder / f"{slide_id}.h5"


def copy_path(path: Path, copy: int) -> Path:
    """Of a plain store: its stain-jittered copy of that number, from 1 on; 0 is the plain store itself."""
    return path.parent / f"jitter-{copy}" / path.name if copy else path


def with_copies(paths: Sequence[Path], copies: int) -> list[list[Path]]:
    """Every plain store with so many of its jittered copies. Raises StoreError where one is missing: slides with and without
    other stains must not meet in one model."""
    stores = [[copy_path(path, copy) for copy in range(copies + 1)] for path in paths]
    absent = [path for each in stores for path in each[1:] if not path.exists()]
    if absent:
        raise StoreError(
            f"{len(absent)} of {copies * len(paths)} jittered copies do not exist, such as {absent[0]}: "
            f"embed with jitter.copies={copies} or more"
        )
    return stores


def open_store(path: Path) -> StoreInfo:
    """What a store holds, from its header and coordinates alone. Raises StoreError for one that is missing, cut short, hostile or
    of another shape."""
    return _examined(path)[0]


def read_extent(path: Path) -> Extent:
    """Shape, type and place of the features. Raises StoreError as `open_store`."""
    return _examined(path)[1]


_examiner = Examiner("histoscale.eval.stores")


def _examined(path: Path) -> tuple[StoreInfo, Extent]:
    """By the examiner's process, so that HDF5 opens nothing here that it cannot open there."""
    found = _examiner.ask(path)
    if isinstance(found, str):
        raise unreadable(path, found)
    if "error" in found:
        raise (StoreLocked if found["locked"] else StoreError)(found["error"], found["why"])
    extent = {**found["extent"], "path": path, "dtype": np.dtype(found["extent"]["dtype"])}
    return StoreInfo(**{**found["info"], "path": path}), Extent(**extent)


def answer(path: Path) -> dict[str, Any]:
    """What the examiner says of a store, in JSON."""
    try:
        extent = _extent(path)
        info = _info(path, extent)
    except StoreError as error:
        return {"error": str(error), "why": error.why, "locked": isinstance(error, StoreLocked)}
    return {"info": {**asdict(info), "path": ""}, "extent": {**asdict(extent), "path": "", "dtype": extent.dtype.name}}


def _info(path: Path, extent: Extent) -> StoreInfo:
    with _opened(path) as file:
        coords = file["coords"]
        attrs: dict[str, Any] = {}
        for holder in (file["features"], coords, file):
            attrs |= attributes(holder, _TOLD)
        shape = coords.shape[1:] if coords.ndim == 3 and coords.shape[0] == 1 else coords.shape
        if shape != (extent.tiles, 2):
            raise unreadable(path, f"holds {extent.tiles} tiles and coords of shape {coords.shape}")
        if "slide_id" in attrs and str(attrs["slide_id"]) != path.stem:
            why = f"holds the slide {str(attrs['slide_id'])!r} by its own account"
            raise unreadable(path, why, f"name it so, or {_AGAIN}")
        try:
            size, mpp = _size_px(attrs), _mpp(attrs)
            patch_px = int(attrs.get("patch_size", 0))
        except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise unreadable(path, f"has an attribute that is no number ({error})") from error
    if size is not None and not 0 < size <= _WIDEST_PX:
        raise unreadable(path, f"says that its tiles are {size} level-0 px wide")
    if mpp <= 0 or math.isinf(mpp):
        raise unreadable(path, f"says that its patches have {mpp} um/px")
    coords = read_coords(path)
    if size is None:
        try:
            size = spacing(coords)
        except StoreError:  # a biopsy of one tile
            size = 0
    return StoreInfo(path, _encoder(attrs), extent.width, extent.tiles, mpp, patch_px, size, extent.dtype.name)


def _extent(path: Path) -> Extent:
    with _opened(path) as file:
        features = file["features"]
        shape = features.shape[1:] if features.ndim == 3 and features.shape[0] == 1 else features.shape
        if len(shape) != 2:
            raise unreadable(path, f"holds features of shape {features.shape}, expected [tiles, width]")
        if 0 in shape:
            raise unreadable(path, f"holds no tile (features of shape {features.shape})", f"leave the slide out, or {_AGAIN}")
        dtype = features.dtype
        if dtype.newbyteorder("=").name not in _FLOATS:
            raise unreadable(path, f"holds features of {dtype}, expected {' or '.join(_FLOATS)}")
        for name in _KINDS:
            check_written(file[name], name)
        offset = features.id.get_offset() if features.chunks is None and dtype.isnative else None
    extent = Extent(path, shape[0], shape[1], dtype.newbyteorder("="), offset)
    if offset is not None and offset + extent.nbytes > path.stat().st_size:
        raise unreadable(path, "ends before its tiles do")
    return extent


def read_features(path: Path) -> np.ndarray:
    """[n, D] in the type of the store. Raises StoreError: unreadable, or not finite."""
    extent = read_extent(path)
    with _opened(path) as file:
        values = np.empty((extent.tiles, extent.width), extent.dtype)
        file["features"].read_direct(values.reshape(file["features"].shape))
    check_finite(values, path)
    return values


def read_coords(path: Path) -> np.ndarray:
    """int64 [n, 2]: x and y of the top-left corners in level-0 px. Raises StoreError."""
    with _opened(path) as file:
        coords = np.rint(file["coords"][()]).reshape(-1, 2)
    if not (np.abs(coords.astype(np.float64)) <= FARTHEST_PX).all():
        raise unreadable(path, "holds coords that are no places on a slide")
    return coords.astype(np.int64)


def read_rows(path: Path, rows: np.ndarray) -> np.ndarray:
    """The features of some tiles, rows int64 [m] ascending, by HDF5: for stores without an offset."""
    with _opened(path) as file:
        features = file["features"]
        values = features[0, rows] if features.ndim == 3 else features[rows]
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def check_finite(values: np.ndarray, path: Path) -> None:
    """Raises StoreError where a feature (float16 or float32) is infinite or NaN: where every bit of its exponent is set.

    By bits and in blocks that stay in the processor's cache, six times as fast as numpy.isfinite on float16.
    """
    kind, exponent = (np.uint16, 0x7C00) if values.dtype == np.float16 else (np.uint32, 0x7F800000)
    bits = np.ascontiguousarray(values).reshape(-1).view(kind)
    for start in range(0, len(bits), _BLOCK):
        if np.bitwise_and(bits[start : start + _BLOCK], kind(exponent)).max() == exponent:
            raise unreadable(path, "holds features that are not finite")


def spacing(coords: np.ndarray) -> int:
    """Side of a tile in level-0 px, from coords [n, 2] alone: the most frequent step to the next tile of a row or column.

    Raises StoreError where no two tiles share a row or column.
    """
    steps = []
    for along, across in ((0, 1), (1, 0)):
        order = np.lexsort((coords[:, along], coords[:, across]))
        ahead = np.diff(coords[order], axis=0)
        steps.append(ahead[(ahead[:, across] == 0) & (ahead[:, along] > 0), along])
    found, counts = np.unique(np.concatenate(steps), return_counts=True)
    if not len(found):
        raise StoreError(f"the size of the tiles is not stored and cannot be told from {len(coords)} coordinates: {_AGAIN}")
    return int(found[counts.argmax()])


def write_store(path: Path, features: np.ndarray, coords: np.ndarray, attrs: Mapping[str, Any], config: StoreConfig) -> None:
    """Write features [n, D] and coords [n, 2], whole or not at all; equal inputs give equal bytes.

    The attributes stand on the file and on `coords`, where TRIDENT's readers look for them. Raises StoreError where a feature is
    not finite, or too large for fp16, and OSError, which names the file, as on a full disk.
    """
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(features, DTYPES[config.dtype])
    if not np.isfinite(values).all():
        limit = "; give store.dtype=fp32" if np.isfinite(features).all() else ""
        raise StoreError(f"features of {path.stem} are not finite in {config.dtype}{limit}")
    need, disk = values.nbytes + coords.size * 8, os.statvfs(path.parent)
    if need > disk.f_bavail * disk.f_frsize:  # asked first, since HDF5 tells of a full disk in many lines, at several places
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for a store of {need} bytes", str(path))
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with h5py.File(partial, "w", libver="earliest", track_order=False) as file:
            file.create_dataset("features", data=values, track_times=False)
            file.create_dataset("coords", data=coords.astype(np.int64), track_times=False)
            for name, value in attrs.items():
                file.attrs[name] = value
                file["coords"].attrs[name] = value
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path} cannot be written ({' '.join(str(error).split())[:200]}); the same command goes on") from error
    finally:
        partial.unlink(missing_ok=True)


def matches(path: Path, attrs: Mapping[str, Any]) -> bool:
    """Whether there is a store with these attributes; what is no whole HDF5 file is none."""
    if not path.exists():
        return False
    try:
        with _opened(path) as file:
            held = attributes(file, attrs.keys())
            return all(name in held and held[name] == value for name, value in attrs.items())
    except StoreError:
        return False


def read_attribute(path: Path, name: str) -> str:
    """One attribute of a store of ours. Raises StoreError."""
    with _opened(path) as file:
        return str(attributes(file, (name,))[name])


class _opened:
    """The file, open to read, with both data sets in it; what is wrong with it becomes a StoreError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> h5py.File:
        try:
            if self.path.exists() and not self.path.is_file():  # HDF5 would wait at a pipe until somebody writes into it
                raise unreadable(self.path, f"is {'a folder' if self.path.is_dir() else 'no file'}", _GIVE)
            self.file = h5py.File(self.path, "r")
        except OSError as error:
            raise _refusal(self.path, error) from error
        try:
            self._check()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self.file

    def _check(self) -> None:
        absent = [name for name in _KINDS if self.file.get(name, getlink=True) is None]
        if absent:
            held = ", ".join(repr(name).strip("'")[:40] for name in islice(self.file, _SHOWN)) or "nothing"
            advice = "rename its datasets, or " + _AGAIN
            raise unreadable(self.path, f"has no dataset {' and '.join(absent)} (it holds {held})", advice)
        for name, kinds in _KINDS.items():
            array(self.file, name, kinds)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.file.close()
        if isinstance(error, Hdf5Error):
            raise unreadable(self.path, str(error)) from error
        if isinstance(error, (OSError, KeyError, RuntimeError, MemoryError)):
            raise unreadable(self.path, f"cannot be read ({_first_line(error)})") from error


def _refusal(path: Path, error: OSError) -> StoreError:
    """What HDF5 means when it does not open a file."""
    text = _first_line(error)
    match error:
        case FileNotFoundError():
            return unreadable(path, "does not exist", "embed that slide")
        case BlockingIOError():
            why = "is locked by another process"
            return StoreLocked(f"{path} {why}, which writes to it: wait until it is done, or stop it", why)
        case PermissionError():
            return unreadable(path, "may not be read (permission denied)", "let this user read it")
    if path.stat().st_size == 0:
        return unreadable(path, "is an empty file")
    if "truncated" in text:
        return unreadable(path, "is no whole HDF5 file (cut short)")
    if "signature" in text:
        return unreadable(path, "is no whole HDF5 file (its signature is missing)")
    return unreadable(path, f"cannot be read ({text})")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _encoder(attrs: Mapping[str, Any]) -> str:
    said = str(attrs.get("encoder_hash", attrs.get("encoder", "")))
    return "" if said == "None" else said  # TRIDENT writes the word where an encoder has no name


def _mpp(attrs: Mapping[str, Any]) -> float:
    if "mpp" in attrs:
        return float(attrs["mpp"])
    return _SLIDE_MPP / float(attrs["target_magnification"]) if "target_magnification" in attrs else math.nan


def _size_px(attrs: Mapping[str, Any]) -> int | None:
    """Side in level-0 px, rounded up where it is known exactly: corners are rounded too, and no gap may open between tiles."""
    if {"level0_mpp", "mpp", "patch_size"} <= set(attrs):
        return math.ceil(float(attrs["patch_size"]) * float(attrs["mpp"]) / float(attrs["level0_mpp"]) - 1e-6)
    return int(attrs["patch_size_level0"]) if "patch_size_level0" in attrs else None
