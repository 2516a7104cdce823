"""The catalog: what `index` learned about the slides, packed so that opening a slide costs no request.

A directory of `catalog.json` (format, version, hash, counts, tissue settings, file sizes), `slides.parquet`, `levels.parquet`,
`rejected.parquet`, and two files of independent blocks: `tables.bin` (tile tables) and `masks.bin` (tissue masks).
"""

import hashlib
import io
import json
import mmap
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from histoscale.data.journal import write_atomic
from histoscale.data.manifest import Slide
from histoscale.data.readers.pyramid import Layout, Level, Reader
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import Changed, Fingerprint, Store, join
from histoscale.data.tissue import TissueConfig

FORMAT = "histoscale-catalog"
VERSION = 1
_FILES = ("slides.parquet", "levels.parquet", "rejected.parquet", "tables.bin", "masks.bin")
_LEVEL = ("width", "height", "tile_width", "tile_height", "downsample", "compression", "colour", "predictor", "tables")


class CatalogError(ValueError):
    """The directory is no catalog, or a damaged one."""


class Rejected(NamedTuple):
    """A slide that cannot be used. reason: a kind, and after a colon the particulars."""

    slide_id: str
    uri: str
    reason: str


@dataclass(frozen=True, eq=False)
class Entry:
    """An accepted slide. slide: completed from the header; manifest_mpp: what the manifest itself said; mask: bool [h, w]."""

    slide: Slide
    manifest_mpp: float | None
    layout: Layout
    mask: np.ndarray
    mask_mpp: float
    fingerprint: Fingerprint


def open_catalog(uri: str, store: Store) -> "Catalog":
    """Raises CatalogError (no catalog, another version, damaged), Missing or StorageError."""
    return Catalog(uri, store, None)


class Catalog:
    """Accepted slides by row, in the order of their ids. Pickled as its URI; blocks are memory-mapped, so workers share them."""

    def __init__(self, uri: str, store: Store, expected: str | None) -> None:
        self.uri, self.store = uri, store
        if not store.exists(join(uri, "catalog.json")):
            raise CatalogError(f"{uri} is no catalog (no catalog.json); `histoscale index manifest=… out={uri}` makes one")
        try:
            self.info: dict[str, Any] = json.loads(store.read(join(uri, "catalog.json")))
            found = (self.info["format"], self.info["version"])
            self.hash: str = self.info["hash"]
        except (ValueError, KeyError, TypeError) as error:
            raise CatalogError(f"{uri}/catalog.json is damaged: {error!r}") from error
        if found != (FORMAT, VERSION):
            raise CatalogError(f"{uri} has format {found}: expected {(FORMAT, VERSION)}; index the manifest again")
        if expected is not None and self.hash != expected:
            raise Changed(f"the catalog {uri} was replaced while it was in use (hash {self.hash}, was {expected})")
        self._slides = self._table("slides.parquet")
        self._levels = self._table("levels.parquet")
        self._first_level = np.concatenate([[0], np.cumsum(self._slides["levels"].to_numpy())])
        self._starts = {name: np.concatenate([[0], np.cumsum(self._slides[name].to_numpy())]) for name in ("tables", "mask")}
        self._bytes = {"tables": self._map("tables.bin"), "mask": self._map("masks.bin")}

    def __reduce__(self) -> tuple[type["Catalog"], tuple[str, Store, str]]:
        return Catalog, (self.uri, self.store, self.hash)

    def __len__(self) -> int:
        return self._slides.num_rows

    @cached_property
    def slides(self) -> list[Slide]:
        """Accepted slides, completed from their headers."""
        names = [field.name for field in fields(Slide) if field.name != "labels"]
        rows = self._slides.select([*names, "labels"]).to_pylist()
        return [Slide(**{name: row[name] for name in names}, labels=json.loads(row["labels"])) for row in rows]

    @cached_property
    def rejected(self) -> list[Rejected]:
        """Slides that `index` refused, with the reason."""
        return [Rejected(**row) for row in self._table("rejected.parquet").to_pylist()]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {slide_id: i for i, slide_id in enumerate(self._slides["slide_id"].to_pylist())}

    def row(self, slide_id: str) -> int:
        """The place of a slide; raises KeyError for one that was rejected or is not known."""
        if slide_id in self._rows:
            return self._rows[slide_id]
        reason = next((found.reason for found in self.rejected if found.slide_id == slide_id), "it was not in the manifest")
        raise KeyError(f"slide {slide_id} is not in the catalog {self.uri}: {reason}")

    def layout(self, i: int) -> Layout:
        """The levels and tile tables of a slide, unpacked (about a millisecond for 20,000 tiles)."""
        row = self._slide(i)
        sizes = self._levels.slice(self._first_level[i], self._first_level[i + 1] - self._first_level[i]).to_pylist()
        tables = unpack_tables(self._block("tables", i), [level["tiles"] for level in sizes])
        levels = tuple(
            Level(**{name: level[name] for name in _LEVEL}, offsets=offsets, counts=counts)
            for level, (offsets, counts) in zip(sizes, tables, strict=True)
        )
        return Layout(row["kind"], levels, row["header_mpp"], row["header_objective"], row["header_scanner"])

    def level_mpps(self, i: int) -> tuple[float, ...]:
        """µm per pixel of every level of a slide."""
        downsamples = self._levels["downsample"].slice(self._first_level[i], self._first_level[i + 1] - self._first_level[i])
        mpp = self._slides["mpp"][i].as_py()
        return tuple(mpp * downsample for downsample in downsamples.to_pylist())

    def mask(self, i: int) -> np.ndarray:
        """bool [h, w]: the tissue; pixel (r, c) covers level-0 pixels from (r, c) * mask_mpp / mpp on."""
        row = self._slide(i)
        shape = (row["mask_height"], row["mask_width"])
        bits = np.frombuffer(zlib.decompress(self._block("mask", i)), np.uint8)
        return np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)

    def mask_mpp(self, i: int) -> float:
        """µm per pixel of the mask."""
        return self._slides["mask_mpp"][i].as_py()

    def fingerprint(self, i: int) -> Fingerprint:
        """The slide file as it was indexed."""
        return Fingerprint(self._slides["size"][i].as_py(), self._slides["tag"][i].as_py())

    def reader(self, i: int, store: Store) -> Reader:
        """An open slide; costs no request where it is read by range."""
        return open_reader(self._slides["uri"][i].as_py(), self.layout(i), store)

    def unchanged(self, slide: Slide, fingerprint: Fingerprint, tissue: TissueConfig) -> Entry | None:
        """What is known of a row whose file, mpp and tissue settings are as they were; its other columns are taken anew."""
        i = self._rows.get(slide.slide_id)
        if i is None or self.info["tissue"] != asdict(tissue) or self.fingerprint(i) != fingerprint:
            return None
        row = self._slide(i)
        if row["uri"] != slide.uri or row["manifest_mpp"] != slide.mpp:
            return None
        layout = self.layout(i)
        return Entry(complete(slide, layout), slide.mpp, layout, self.mask(i), row["mask_mpp"], fingerprint)

    def _slide(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"the catalog {self.uri} has {len(self)} slides, there is no number {i}")
        return self._slides.slice(i, 1).to_pylist()[0]

    def _block(self, name: str, i: int) -> bytes:
        return self._bytes[name][self._starts[name][i] : self._starts[name][i + 1]]

    def _table(self, name: str) -> pyarrow.Table:
        data = self.store.read(join(self.uri, name))
        self._check_size(name, len(data))
        return pyarrow.parquet.read_table(io.BytesIO(data))

    def _map(self, name: str) -> "mmap.mmap | bytes":
        path = self.store.local(join(self.uri, name))
        size = path.stat().st_size
        self._check_size(name, size)
        if size == 0:
            return b""  # an empty file cannot be mapped
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _check_size(self, name: str, size: int) -> None:
        expected = self.info["files"][name]
        if size != expected:
            raise CatalogError(f"{self.uri}/{name} has {size} bytes: expected {expected}; index the manifest again")


def complete(slide: Slide, layout: Layout) -> Slide:
    """The manifest's values, completed from the header."""
    values = {field.name: getattr(slide, field.name) for field in fields(Slide)}
    for name in ("mpp", "scanner", "objective"):
        values[name] = getattr(layout, name) if values[name] is None else values[name]
    return Slide(**values)


def write_catalog(
    out: Path, accepted: Sequence[Entry], rejected: Sequence[Rejected], tissue: TissueConfig, store: Store
) -> Catalog:
    """Write a catalog into `out` and open it; `catalog.json` comes last, so that a half-written one does not exist for readers.

    The hash covers what decides about pixels: ids, metadata, labels, file sizes, levels, tile tables and masks. URIs, etags and
    times of change are not in it: the same files at another place are the same catalog.
    """
    entries = sorted(accepted, key=lambda entry: entry.slide.slide_id)
    digest = hashlib.sha256(f"{FORMAT} {VERSION}".encode())
    rows, levels = [], []
    out.mkdir(parents=True, exist_ok=True)
    with _partial(out, "tables.bin").open("wb") as tables, _partial(out, "masks.bin").open("wb") as masks:
        for entry in entries:
            mask = np.packbits(entry.mask)
            digest.update(_identity(entry, mask))
            blocks = pack_tables(entry.layout.levels), zlib.compress(mask.tobytes())
            tables.write(blocks[0])
            masks.write(blocks[1])
            rows.append(_row(entry, len(blocks[0]), len(blocks[1])))
            levels += [{**{name: getattr(x, name) for name in _LEVEL}, "tiles": len(x.offsets)} for x in entry.layout.levels]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, _SLIDE_SCHEMA), _partial(out, "slides.parquet"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(levels, _LEVEL_SCHEMA), _partial(out, "levels.parquet"))
    refused = [found._asdict() for found in sorted(rejected)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(refused, _REJECTED_SCHEMA), _partial(out, "rejected.parquet"))
    info = {
        "format": FORMAT, "version": VERSION, "hash": digest.hexdigest()[:32], "slides": len(entries), "rejected": len(rejected),
        "tissue": asdict(tissue), "files": {name: _partial(out, name).stat().st_size for name in _FILES},
    }  # fmt: skip
    (out / "catalog.json").unlink(missing_ok=True)
    for name in _FILES:
        _partial(out, name).replace(out / name)
    write_atomic(out / "catalog.json", json.dumps(info, indent=2) + "\n")
    return open_catalog(str(out), store)


def pack_tables(levels: Sequence[Level]) -> bytes:
    """Tile tables as one compressed block: counts by byte planes, offsets as the gaps that are not zero (most tiles follow one
    another); 1-1.5 bytes a tile."""
    parts = []
    for level in levels:
        counts, offsets = level.counts.astype("<i8"), level.offsets.astype("<i8")
        expected = np.concatenate([[0], (offsets + counts)[:-1]])[: len(offsets)]
        jumps = np.flatnonzero(offsets != expected)
        gaps = offsets[jumps] - expected[jumps]
        parts += [_planes(values) for values in (np.array([len(jumps)]), counts, jumps, gaps)]
    return zlib.compress(b"".join(part.tobytes() for part in parts))


def unpack_tables(block: bytes, tiles: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(offsets, counts), int64 [tiles] each, of every level."""
    data, place, found = zlib.decompress(block), 0, []

    def take(count: int) -> np.ndarray:
        nonlocal place
        planes = np.frombuffer(data, np.uint8, count * 8, place).reshape(8, count)
        place += count * 8
        return np.ascontiguousarray(planes.T).view("<i8").reshape(count)

    for count in tiles:
        jumps = int(take(1)[0])
        counts, where, gaps = take(count), take(jumps), take(jumps)
        steps = np.concatenate([[0], counts[:-1]])[:count]
        steps[where] += gaps
        found.append((np.cumsum(steps), counts))
    return found


def _planes(values: np.ndarray) -> np.ndarray:
    """Bytes of equal weight together: they compress better."""
    return np.ascontiguousarray(np.ascontiguousarray(values.astype("<i8")).view(np.uint8).reshape(-1, 8).T)


def _row(entry: Entry, table_bytes: int, mask_bytes: int) -> dict[str, Any]:
    slide, layout = entry.slide, entry.layout
    row = {field.name: getattr(slide, field.name) for field in fields(Slide)}
    row["labels"] = json.dumps(slide.labels, sort_keys=True)
    return {
        **row, "manifest_mpp": entry.manifest_mpp, "header_mpp": layout.mpp, "header_objective": layout.objective,
        "header_scanner": layout.scanner, "kind": layout.kind, "size": entry.fingerprint.size, "tag": entry.fingerprint.tag,
        "levels": len(layout.levels), "tables": table_bytes, "mask": mask_bytes, "mask_height": entry.mask.shape[0],
        "mask_width": entry.mask.shape[1], "mask_mpp": entry.mask_mpp,
    }  # fmt: skip


def _identity(entry: Entry, mask: np.ndarray) -> bytes:
    """What of a slide enters the hash."""
    known = {k: v for k, v in asdict(entry.slide).items() if k != "uri"}
    known |= {"kind": entry.layout.kind, "size": entry.fingerprint.size, "mask": [*entry.mask.shape, entry.mask_mpp]}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for level in entry.layout.levels:
        digest.update(json.dumps([getattr(level, name) for name in _LEVEL if name != "tables"]).encode())
        for data in (level.tables, level.offsets.astype("<i8").tobytes(), level.counts.astype("<i8").tobytes()):
            digest.update(hashlib.sha256(data).digest())
    digest.update(mask.tobytes())
    return digest.digest()


def _partial(out: Path, name: str) -> Path:
    return out / f"{name}.partial"


def _schema(**columns: pyarrow.DataType) -> pyarrow.Schema:
    return pyarrow.schema(list(columns.items()))


_TEXT, _WHOLE, _REAL = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
_SLIDE_SCHEMA = _schema(
    slide_id=_TEXT, uri=_TEXT, patient_id=_TEXT, site=_TEXT, cohort=_TEXT, organ=_TEXT, stain=_TEXT, mpp=_REAL, scanner=_TEXT,
    preparation=_TEXT, objective=_REAL, labels=_TEXT, manifest_mpp=_REAL, header_mpp=_REAL, header_objective=_REAL,
    header_scanner=_TEXT, kind=_TEXT, size=_WHOLE, tag=_TEXT, levels=_WHOLE, tables=_WHOLE, mask=_WHOLE, mask_height=_WHOLE,
    mask_width=_WHOLE, mask_mpp=_REAL,
)  # fmt: skip
_LEVEL_SCHEMA = _schema(
    width=_WHOLE, height=_WHOLE, tile_width=_WHOLE, tile_height=_WHOLE, downsample=_REAL, compression=_TEXT, colour=_TEXT,
    predictor=_WHOLE, tables=pyarrow.binary(), tiles=_WHOLE,
)  # fmt: skip
_REJECTED_SCHEMA = _schema(slide_id=_TEXT, uri=_TEXT, reason=_TEXT)
