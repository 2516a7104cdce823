"""The catalog: what `index` learned about the slides, packed so that opening a slide costs no request.

A directory of `catalog.json` (format, version, hash, counts, tissue settings, sizes and hashes of files), tables for people
(`slides.parquet`, `rejected.parquet`, `catalog.html`), and the folder that catalog.json names: Arrow tables and files of
independent blocks (tile tables, tissue masks, thumbnails), memory-mapped, so that all processes of a machine share them.

Nothing damaged is used: catalog.json holds its own checksum, the Arrow tables are compared with their hashes when they are
opened, and they hold a checksum of every block, which is compared when the block is read: opening reads no block.
"""

import hashlib
import json
import mmap
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import pyarrow
import pyarrow.ipc

from histoscale.data.bitmap import Bitmap
from histoscale.data.fingerprint import content
from histoscale.data.manifest import Slide
from histoscale.data.parts import BOX, KNOWN, LEVEL, VERSION, Known, Rejected, Row, known_of, rejected_of
from histoscale.data.readers.pyramid import Layout, Level, Reader
from histoscale.data.readers.region import open_reader
from histoscale.data.readers.vendor import FREE, Gate
from histoscale.data.storage import Changed, Fingerprint, Missing, Store, join
from histoscale.data.tables import Levels, unpack_table
from histoscale.data.tissue import TissueConfig
from histoscale.data.windows import SIDES

FORMAT = "histoscale-catalog"
_MAPPED_BYTES = 8 << 20  # pages of blocks that a process keeps mapped: more say nothing and look like a leak


class CatalogError(ValueError):
    """The directory is no catalog, or a damaged one."""


def checksum(info: Mapping[str, Any]) -> str:
    """Of what catalog.json says beside it."""
    said = {name: value for name, value in info.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def sha256_of(path: Path) -> str:
    """Of a file of a catalog."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_name(files: Mapping[str, Sequence[Any]]) -> str:
    """Of the folder of a catalog's files: by the size and sha256 of each."""
    return f"data-{hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]}"


def open_catalog(uri: str, store: Store) -> "Catalog":
    """Raises CatalogError (no catalog, another version, damaged), Missing or StorageError."""
    return Catalog(uri, store, None)


class Catalog:
    """Accepted slides by row, in the order of their ids. Pickled as its URI; no Python object is kept for a slide."""

    def __init__(self, uri: str, store: Store, expected: str | None) -> None:
        self.uri, self.store = uri, store
        try:
            self._open()
        except Missing:
            self._open()  # `index` replaced it between catalog.json and the files that this names
        if expected is not None and self.hash != expected:
            raise Changed(f"the catalog {uri} was replaced while it was in use (hash {self.hash}, was {expected})")

    def _open(self) -> None:
        if not self.store.exists(join(self.uri, "catalog.json")):
            made = f"`histoscale index manifest=… out={self.uri}` makes one"
            raise CatalogError(f"{self.uri} is no catalog (no catalog.json); {made}")
        try:
            self.info: dict[str, Any] = json.loads(self.store.read(join(self.uri, "catalog.json")))
            found = (self.info["format"], self.info["version"])
            self.hash: str = self.info["hash"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CatalogError(f"{self.uri}/catalog.json is damaged: {error!r}") from error
        if found != (FORMAT, VERSION):
            raise CatalogError(f"{self.uri} has format {found}: expected {(FORMAT, VERSION)}; index the manifest again")
        if self.info.get("checksum") != checksum(self.info):
            raise CatalogError(f"{self.uri}/catalog.json is damaged: it is not as `index` wrote it; index the manifest again")
        self._table, self._level = self._arrow("slides.arrow"), self._arrow("levels.arrow")
        self._first_level = _starts(self._table["levels"])
        self._blocks = {
            "table": Blocks(self._file("tables.bin"), self._level["block"], self._level["block_crc"]),
            "mask": Blocks(self._file("masks.bin"), self._table["mask_bytes"], self._table["mask_crc"]),
            "thumbnail": Blocks(self._file("thumbnails.bin"), self._table["thumbnail_bytes"], self._table["thumbnail_crc"]),
        }

    def __reduce__(self) -> tuple[type["Catalog"], tuple[str, Store, str]]:
        return Catalog, (self.uri, self.store, self.hash)

    def __len__(self) -> int:
        return self._table.num_rows

    @property
    def slides(self) -> "Slides":
        """Accepted slides, completed from their headers; each is made when it is asked for."""
        return Slides(self._table)

    @cached_property
    def slide_ids(self) -> "Texts":
        return Texts(self._table["slide_id"])

    @cached_property
    def rejected(self) -> list[Rejected]:
        """Slides that `index` refused, with the reason."""
        return [rejected_of(row) for row in self._arrow("rejected.arrow").to_pylist()]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {slide_id: i for i, slide_id in enumerate(self._table["slide_id"].to_pylist())}

    def row(self, slide_id: str) -> int:
        """The place of a slide; raises KeyError for one that was rejected or is not known."""
        if slide_id in self._rows:
            return self._rows[slide_id]
        reason = next((found.reason for found in self.rejected if found.slide_id == slide_id), "it was not in the manifest")
        raise KeyError(f"slide {slide_id} is not in the catalog {self.uri}: {reason}")

    def numbers(self, column: str) -> np.ndarray:
        """A column of numbers over all slides (mpp, tissue_px, mask_mpp, …), shared between processes: [slides]."""
        return _numbers(self._table[column])

    def texts(self, column: str) -> list[str | None]:
        """A column of texts over all slides (patient_id, site, …)."""
        return self._table[column].to_pylist()

    def text(self, column: str, i: int) -> str | None:
        """One text of a column."""
        return self._table[column][i].as_py()

    def labels(self, name: str) -> list[str | None]:
        """A label over all slides."""
        return [json.loads(text).get(name) for text in self._table["labels"].to_pylist()]

    def windows(self) -> np.ndarray:
        """The most tissue in square windows, mask px: int32 [slides, len(windows.SIDES)]."""
        column = self._table["windows"].combine_chunks()
        return column.flatten().to_numpy().reshape(len(self), len(SIDES))

    def levels(self, column: str) -> np.ndarray:
        """A column of numbers over all levels (width, height, downsample, …): [slides, most levels], 0 where there is none."""
        counts = self.numbers("levels")
        there = np.arange(counts.max(initial=1)) < counts[:, None]
        values = _numbers(self._level[column])
        whole = np.zeros(there.shape, values.dtype)
        whole[there] = values
        return whole

    def layout(self, i: int) -> Layout:
        """The levels of a slide; the tile table of each is unpacked when it is first used."""
        first, stop = self._span(i)
        kind, *header = (self._table[name][i].as_py() for name in ("kind", "header_mpp", "header_objective", "header_scanner"))
        return Layout(kind, Levels(stop - first, lambda number: self._unpacked(first + number)), *header)

    def level_mpps(self, i: int) -> tuple[float, ...]:
        """µm per pixel of every level of a slide."""
        first, stop = self._span(i)
        return tuple((self.numbers("mpp")[i] * _numbers(self._level["downsample"])[first:stop]).tolist())

    def mask(self, i: int) -> np.ndarray:
        """bool [h, w]: the tissue; pixel (r, c) covers level-0 pixels from (r, c) * mask_mpp / mpp on."""
        return self.bitmap(i).mask()

    def bitmap(self, i: int) -> Bitmap:
        """The mask as it is kept, from which windows can be unpacked."""
        bits = np.frombuffer(zlib.decompress(self._block("mask", i)), np.uint8)
        box = {name: int(self.numbers(f"mask_{name}")[i]) for name in BOX}
        return Bitmap(**box, bits=bits.reshape(box["rows"], -1) if len(bits) else np.zeros((0, 0), np.uint8))

    def mask_mpp(self, i: int) -> float:
        """µm per pixel of the mask."""
        return float(self.numbers("mask_mpp")[i])

    def thumbnail(self, i: int) -> bytes:
        """A small JPEG of what the mask covers."""
        return self._block("thumbnail", i)

    def fingerprint(self, i: int) -> Fingerprint:
        """The slide file as it was indexed."""
        return Fingerprint(self._table["size"][i].as_py(), self._table["tag"][i].as_py())

    def reader(self, i: int, store: Store, decoding: Gate = FREE) -> Reader:
        """An open slide; costs no request where it is read by range. decoding: held while pixels are decoded."""
        return open_reader(self._table["uri"][i].as_py(), self.layout(i), store, decoding)

    def content(self) -> str:
        """Names all of its bytes, which are read: what is known of the slides, wherever they lie, and the files themselves where
        they are not as `index` wrote them."""
        said = {name: value for name, value in self.info.items() if name not in ("folder", "files", "checksum")}
        files = {name: [size, content(self._file(name), belongs=False)] for name, (size, _) in self.info["files"].items()}
        said |= {} if folder_name(files) == self.info["folder"] else {"changed": files}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]

    def same_tissue(self, tissue: TissueConfig) -> bool:
        """Whether its masks were made with these settings."""
        return self.info["tissue"] == asdict(tissue)

    def known(self) -> dict[str, Known]:
        """What every slide, accepted or rejected, was examined from."""
        light = self._table.select(["slide_id", *KNOWN]).to_pylist()
        return {row["slide_id"]: known_of(row) for row in light} | {found.slide_id: found.known for found in self.rejected}

    def packed(self, i: int) -> Row:
        """A slide as parts.py packs it, nothing unpacked."""
        first, stop = self._span(i)
        row = self._table.slice(i, 1).to_pylist()[0]
        level = self._level.slice(first, stop - first).to_pylist()
        table = b"".join(self._blocks["table"].read(number) for number in range(first, stop))
        return {**row, "level": level, "table": table, "mask": self._block("mask", i), "thumbnail": self._block("thumbnail", i)}

    def _unpacked(self, number: int) -> Level:
        values = {name: self._level[name][number].as_py() for name in LEVEL}
        offsets, counts = unpack_table(self._blocks["table"].read(number), self._level["tiles"][number].as_py())
        return Level(**values, offsets=offsets, counts=counts)

    def _span(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"the catalog {self.uri} has {len(self)} slides, there is no number {i}")
        return int(self._first_level[i]), int(self._first_level[i + 1])

    def _block(self, name: str, i: int) -> bytes:
        self._span(i)
        return self._blocks[name].read(i)

    def _arrow(self, name: str) -> pyarrow.Table:
        path = self._file(name)
        if sha256_of(path) != self.info["files"][name][1]:
            raise CatalogError(f"{path} is damaged: it is not as `index` wrote it; index the manifest again")
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()

    def _file(self, name: str) -> Path:
        """A file of the catalog on a local disk, its size as catalog.json has it."""
        try:
            uri, expected = join(self.uri, f"{self.info['folder']}/{name}"), self.info["files"][name][0]
        except KeyError as error:
            raise CatalogError(f"{self.uri}/catalog.json is damaged: it lacks {error}") from error
        path = self.store.local(uri)
        if path.stat().st_size != expected:
            raise CatalogError(f"{uri} has {path.stat().st_size} bytes: expected {expected}; index the manifest again")
        return path


class Slides(Sequence[Slide]):
    """Slides of an Arrow table."""

    _NAMES = tuple(field.name for field in fields(Slide))

    def __init__(self, table: pyarrow.Table) -> None:
        self._columns = table.select(self._NAMES)

    def __len__(self) -> int:
        return self._columns.num_rows

    @overload
    def __getitem__(self, i: SupportsIndex) -> Slide: ...
    @overload
    def __getitem__(self, i: slice) -> list[Slide]: ...
    def __getitem__(self, i: SupportsIndex | slice) -> Slide | list[Slide]:
        if isinstance(i, slice):
            return [_slide(row) for row in self._columns.take(list(range(*i.indices(len(self))))).to_pylist()]
        place = i.__index__()
        if not -len(self) <= place < len(self):
            raise IndexError(f"there are {len(self)} slides, there is no number {place}")
        return _slide(self._columns.slice(place % len(self), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Slide]:
        for batch in self._columns.to_batches(1024):
            yield from map(_slide, batch.to_pylist())


class Texts(Sequence[str]):
    """A column of texts, without a Python object for each."""

    def __init__(self, column: pyarrow.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, i: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: SupportsIndex | slice) -> str | list[str]:
        if isinstance(i, slice):
            return self._column.to_pylist()[i]
        return self._column[i.__index__()].as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self._column.to_pylist())


class Blocks:
    """A file of independent blocks, mapped; threads may share it. Its pages are the system's, so they are let go now and then.

    sizes, crcs: bytes and CRC-32 of every block, one behind the other.
    """

    def __init__(self, path: Path, sizes: pyarrow.ChunkedArray, crcs: pyarrow.ChunkedArray) -> None:
        self.path, self._starts, self._crcs = path, _starts(sizes), _numbers(crcs)
        self._touched = 0
        self._lock = threading.Lock()
        with path.open("rb") as file:  # an empty file cannot be mapped
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""

    def read(self, number: int) -> bytes:
        """Raises CatalogError for a block that is not as it was written."""
        start, stop = self._starts[number], self._starts[number + 1]
        found = self._map[start:stop]
        with self._lock:
            self._touched += _PAGES + len(found)
            if self._touched > _MAPPED_BYTES and isinstance(self._map, mmap.mmap):
                self._touched = 0
                self._map.madvise(mmap.MADV_DONTNEED)
        if zlib.crc32(found) != self._crcs[number]:
            raise CatalogError(f"{self.path} is damaged in its bytes {start} to {stop}; index the manifest again")
        return found


_PAGES = 64 << 10  # a fault maps the pages around it too


def _slide(row: Row) -> Slide:
    return Slide(**{**row, "labels": json.loads(row["labels"])})


def _numbers(column: pyarrow.ChunkedArray) -> np.ndarray:
    return column.chunk(0).to_numpy() if column.num_chunks else np.zeros(0)


def _starts(sizes: pyarrow.ChunkedArray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(_numbers(sizes))]).astype(np.int64)
