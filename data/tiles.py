"""Ready tiles as a source of visits: a folder of images, Parquet, WebDataset shards. A visit is grid^2 tiles of one slide id."""

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import pyarrow
import pyarrow.parquet

from histoscale.data.fingerprint import sketch_of, sketches
from histoscale.data.keys import key, permute
from histoscale.data.names import NamesError, known, one_spelling, patient_key
from histoscale.data.picturefolder import counted, list_pictures
from histoscale.data.pictures import SUFFIXES, UNREAD, PictureError, pixels_of
from histoscale.data.pixelfilter import passes
from histoscale.data.plan import SamplerConfig, SlideTable, Target, Visit, targets
from histoscale.data.readers.vendor import FREE, Gate
from histoscale.data.shards import ABOUT, Shards, TilesError, shards_of
from histoscale.data.storage import StorageError, Store
from histoscale.data.visit import Patches, VisitFailed

_ROW_GROUPS_KEPT = 4
_SHOWN = 4


class Tiles(Protocol):
    """A list of encoded images. columns: slide_id and, where known, mpp and what is known of the slide; one value a tile.

    identity: plain values that change when the tiles do, wherever they lie. notes: what was passed over, in sentences.
    """

    columns: dict[str, list[Any]]
    identity: Sequence[Any]
    notes: tuple[str, ...]

    def images(self, numbers: Sequence[int]) -> list[bytes | None]:
        """The encoded images of some tiles, None for what is not there. Raises StorageError for what time might heal."""


class Folder:
    """Images below a folder, in the order of their paths. pattern: its first group in the relative path is the slide id."""

    def __init__(self, path: Path, pattern: str) -> None:
        self.path = path
        listing = list_pictures(path)
        self.files, self.notes = sorted(listing.pictures), listing.told()
        if not self.files:
            raise TilesError(f"{path} holds no images ({', '.join(SUFFIXES)}){''.join(f'; {told}' for told in self.notes)}")
        full = {str(parent) for file in self.files for parent in PurePosixPath(file).parents}
        bare = [name for name, kinds in listing.skipped.items() if name and name not in full and kinds.keys() & set(UNREAD)]
        if bare:  # a folder of tables is none of tiles
            told = "; ".join(f"{name}: {counted(listing.skipped[name])}" for name in bare[:_SHOWN])
            raise TilesError(
                f"{path}: {len(bare)} folders hold images and none that is read ({told}): save them as "
                f"{', '.join(SUFFIXES)}, or move the folders away"
            )
        found = [re.search(pattern, file) for file in self.files]
        nameless = [file for file, match in zip(self.files, found, strict=True) if match is None or not match.groups()]
        if nameless:
            others = f" and {len(nameless) - 1} more" if len(nameless) > 1 else ""
            raise TilesError(f"the pattern {pattern!r} finds no slide id (its first group) in {nameless[0]!r}{others}")
        self.identity: Sequence[Any] = [self.files, sketches([path / file for file in self.files])]
        self.columns = {"slide_id": [match.group(1) for match in found if match is not None]}

    def images(self, numbers: Sequence[int]) -> list[bytes | None]:
        return [self._image(self.path / self.files[i]) for i in numbers]

    def _image(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"{path}: {error}") from error


class Table:
    """A Parquet file with the columns slide_id and image (bytes, or a struct that holds `bytes`), and mpp and others if known."""

    def __init__(self, path: Path, mark: str) -> None:
        self.path = path
        self.notes: tuple[str, ...] = ()
        self.identity: Sequence[Any] = [mark]
        try:
            self._open()
        except (pyarrow.ArrowException, OSError) as error:
            raise TilesError(f"{path} is no Parquet file, or a damaged one: {error}") from error
        names = self.file.schema_arrow.names
        missing = [name for name in ("slide_id", "image") if name not in names]
        if missing:
            raise TilesError(f"{path} has no column {' and no column '.join(missing)}: it has {', '.join(names)}")
        self.columns = self.file.read([name for name in ("slide_id", "mpp", *ABOUT) if name in names]).to_pydict()

    def _open(self) -> None:
        self.file = pyarrow.parquet.ParquetFile(self.path, memory_map=True)
        sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.metadata.num_row_groups)]
        self.starts = np.cumsum([0, *sizes])
        self._groups: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "columns": self.columns, "identity": self.identity, "notes": self.notes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def images(self, numbers: Sequence[int]) -> list[bytes | None]:
        return [self._image(i) for i in numbers]

    def _image(self, i: int) -> bytes | None:
        group = int(np.searchsorted(self.starts, i, side="right")) - 1
        with self._lock:  # a Parquet file has one position
            if group not in self._groups:
                self._groups[group] = self.file.read_row_group(group, ["image"])["image"]
                while len(self._groups) > _ROW_GROUPS_KEPT:
                    self._groups.popitem(last=False)
            value = self._groups[group][i - int(self.starts[group])].as_py()
        return value["bytes"] if isinstance(value, dict) else value


class TileSource:
    """Tiles as a source for the same plan and stream. A tile without mpp serves every magnification; its true mpp is then nan.

    The position of a patch is (level 0, x: number of the tile, y: 0).
    """

    def __init__(self, tiles: Tiles, sampler: SamplerConfig, store: Store) -> None:
        self.tiles, self.sampler, self.store = tiles, sampler, store
        self._decoding: Gate = FREE
        of_tile = [known(_text(slide_id)) for slide_id in tiles.columns["slide_id"]]
        if "" in of_tile:
            raise TilesError(f"{of_tile.count('')} of {len(of_tile)} tiles have no slide_id: fill it in, or drop the tiles")
        self.slide_ids: Sequence[str] = sorted(set(of_tile))
        rows = {slide_id: row for row, slide_id in enumerate(self.slide_ids)}
        self.slide = np.array([rows[slide_id] for slide_id in of_tile])
        told = [known(_text(mpp)) for mpp in tiles.columns.get("mpp", [None] * len(self.slide))]
        try:
            self.mpp = np.array([float(mpp) if mpp else np.nan for mpp in told], np.float64)
        except ValueError as error:
            raise TilesError(f"the column mpp of the tiles holds no number: {error}") from error
        self.order = np.argsort(self.slide, kind="stable")
        self.first = np.searchsorted(self.slide[self.order], np.arange(len(self.slide_ids) + 1))
        every = range(len(self.slide_ids))
        try:
            patients, of_patients = one_spelling([self._about(slide, "patient_id") for slide in every], "patients", patient_key)
            self.sites, of_sites = one_spelling([self._about(slide, "site") for slide in every], "sites")
        except NamesError as error:
            raise TilesError(str(error)) from error
        self.patients = [patient or slide_id for patient, slide_id in zip(patients, self.slide_ids, strict=True)]
        self.notes = (*tiles.notes, *of_patients, *of_sites)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_decoding": FREE}  # a semaphore is this process's own

    def decode_threads(self, count: int) -> None:
        self._decoding = threading.BoundedSemaphore(count)

    def traffic(self) -> tuple[int, int, int]:
        return self.store.requests, self.store.bytes, self.store.retried

    def describe(self, slide: int) -> tuple[str, str, str]:
        return self.sites[slide], self._about(slide, "scanner"), self._about(slide, "organ")

    def table(self) -> SlideTable:
        """Slides by id; the area is the number of tiles."""
        every = range(len(self.slide_ids))
        eligible = [[len(self._serving(slide, target)) > 0 for target in targets(self.sampler)] for slide in every]
        return SlideTable(
            slide_ids=self.slide_ids,
            patients=self.patients,
            organs=[self._about(slide, "organ") for slide in every],
            sites=self.sites,
            cohorts=[self._about(slide, "cohort") for slide in every],
            area=np.diff(self.first).astype(np.float64),
            eligible=np.array(eligible, bool),
        )

    def read(self, visit: Visit) -> Patches:
        """Tiles in keyed order until grid^2 have passed the pixel filter, then repeats. Raises VisitFailed, StorageError, and
        ValueError for a tile that is smaller than a patch."""
        tiles = self._serving(visit.slide, targets(self.sampler)[visit.target])
        wanted, tested = self.sampler.grid**2, 0
        pixels: list[np.ndarray] = []
        numbers: list[int] = []
        taken = 0
        while len(pixels) < wanted and taken < len(tiles):
            some = range(taken, min(taken + wanted - len(pixels), len(tiles)))  # no more than may be needed, fetched together
            taken = some.stop
            chosen = [int(tiles[permute(visit.key, len(tiles), i)]) for i in some]
            for number, data in zip(chosen, self.tiles.images(chosen), strict=True):
                image = self._decoded(data)
                if image is None:
                    continue
                patch = self._crop(image, key(visit.key, "crop", number), visit.slide)
                tested += 1
                if passes([patch], self.sampler.pixel_filter)[0]:
                    pixels.append(patch)
                    numbers.append(number)
        if not pixels:
            raise VisitFailed(f"none of {len(tiles)} tiles could be read and passed the pixel filter", tested)
        again = np.arange(wanted) % len(pixels)
        x = np.array(numbers, np.int64)[again]
        mpp = float(self.mpp[numbers[0]])
        return Patches([pixels[i] for i in again], x, np.zeros_like(x), 0, mpp, tested, len(pixels), wanted - len(pixels))

    def _decoded(self, data: bytes | None) -> np.ndarray | None:
        """uint8 [h, w, 3]; None for what is no image, or a damaged one."""
        if data is None:
            return None
        try:
            with self._decoding:
                return pixels_of(data)
        except PictureError:
            return None

    def _crop(self, image: np.ndarray, k: int, slide: int) -> np.ndarray:
        side, (height, width) = self.sampler.patch_px, image.shape[:2]
        if min(height, width) < side:
            raise ValueError(f"a tile of {self.slide_ids[slide]} is {width} x {height} px: sampler.patch_px={side} does not fit")
        top, left = key(k, "top") % (height - side + 1), key(k, "left") % (width - side + 1)
        return image[top : top + side, left : left + side].copy()  # a tile may be much larger

    def _serving(self, slide: int, target: Target) -> np.ndarray:
        """The tiles of a slide at a target mpp: a tile has the mpp that it was cut at, so of a range all tiles in it serve."""
        tiles, slack = self.order[self.first[slide] : self.first[slide + 1]], self.sampler.mpp_tolerance
        known = self.mpp[tiles]
        return tiles[np.isnan(known) | ((known >= target[0] * (1 - slack)) & (known <= target[1] * (1 + slack)))]

    def _about(self, slide: int, name: str) -> str:
        values = self.tiles.columns.get(name)
        return "" if values is None else known(_text(values[self.order[self.first[slide]]]))


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def open_tiles(uri: str, pattern: str, sampler: SamplerConfig, store: Store) -> TileSource:
    """The tiles of WebDataset shards anywhere (a .tar file, a folder of them, `train-{000..041}.tar`), of a folder of images on
    this machine, or of a Parquet file anywhere (a remote one is copied into the cache).

    pattern: for folders and shards, a regular expression on the relative path or the key whose first group is the slide id;
    `^(.+)/` takes the folder. Raises TilesError, StorageError.
    """
    shards = shards_of(uri, store)
    if shards:
        return TileSource(Shards(shards, pattern, store), sampler, store)
    path = store.local(uri)
    tiles = Folder(path, pattern) if path.is_dir() else Table(path, sketch_of(uri, store, store.fingerprint(uri)))
    return TileSource(tiles, sampler, store)
