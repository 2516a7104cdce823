"""Examined slides on disk: one row a slide in Arrow files that appear whole, so that an index that was stopped goes on."""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.ipc

from histoscale.data.bitmap import Bitmap
from histoscale.data.manifest import Slide
from histoscale.data.readers.pyramid import Layout
from histoscale.data.storage import Fingerprint
from histoscale.data.tables import pack_table
from histoscale.data.tissue import TissueConfig
from histoscale.data.windows import SIDES, tissue_windows

VERSION = 3  # of the catalog and of its parts: 3 has a checksum for every block
LEVEL = ("width", "height", "tile_width", "tile_height", "downsample", "compression", "colour", "predictor", "tables")
BLOCKS = ("table", "mask", "thumbnail")  # bytes that a slide has one of; files are named by the plural
BOX = ("height", "width", "left", "top", "rows", "columns")  # of a Bitmap
_PARTS_OPEN = 64


class Known(NamedTuple):
    """What a slide was examined from: where nothing of it has changed, it need not be read again."""

    uri: str
    mpp: float | None  # as the manifest had it
    fingerprint: Fingerprint | None  # None: there was no such file, or its decoder did not return
    mask: str | None  # the drawn mask and its fingerprint


class Rejected(NamedTuple):
    """A slide that cannot be used. reason: a kind, and after a colon the particulars."""

    slide_id: str
    reason: str
    known: Known

    @property
    def uri(self) -> str:
        return self.known.uri


@dataclass(frozen=True, eq=False)
class Entry:
    """An accepted slide. slide: completed from the header. mask: bool [h, w]. thumbnail: JPEG of what the mask covers."""

    slide: Slide
    known: Known
    layout: Layout
    mask: np.ndarray
    mask_mpp: float
    thumbnail: bytes


Row = dict[str, Any]  # of SCHEMA


def row_of(found: Entry | Rejected) -> Row:
    """A slide as it is written: plain values, packed blocks, and a digest of all that decides about its pixels."""
    known = found.known
    mark = known.fingerprint
    row: Row = {"uri": known.uri, "manifest_mpp": known.mpp, "size": mark and mark.size, "tag": mark and mark.tag}
    row["mask_tag"] = known.mask
    if isinstance(found, Rejected):
        return {**row, "slide_id": found.slide_id, "reason": found.reason}
    layout, bitmap = found.layout, Bitmap.of(found.mask)
    blocks = [pack_table(level.offsets, level.counts) for level in layout.levels]
    levels = [
        {**{name: getattr(level, name) for name in LEVEL}, "tiles": len(level.offsets), **_block(block)}
        for level, block in zip(layout.levels, blocks, strict=True)
    ]
    return {
        **slide_columns(found.slide), **row, "header_mpp": layout.mpp, "header_objective": layout.objective,
        "header_scanner": layout.scanner, "kind": layout.kind, "level": levels, "table": b"".join(blocks),
        "mask": zlib.compress(bitmap.bits.tobytes()), **{f"mask_{name}": getattr(bitmap, name) for name in BOX},
        "mask_mpp": found.mask_mpp, "tissue_px": int(found.mask.sum()), "windows": tissue_windows(found.mask).tolist(),
        "thumbnail": found.thumbnail, "digest": _digest(found, bitmap),
    }  # fmt: skip


def _block(data: bytes) -> dict[str, int]:
    """Size and checksum of one level's table."""
    return {"block": len(data), "block_crc": zlib.crc32(data)}


def slide_columns(slide: Slide) -> Row:
    """The manifest's columns of a row."""
    row = {field.name: getattr(slide, field.name) for field in fields(Slide)}
    return {**row, "labels": json.dumps(slide.labels, sort_keys=True)}


def _digest(entry: Entry, bitmap: Bitmap) -> str:
    box = [getattr(bitmap, name) for name in BOX]
    digest = hashlib.sha256(json.dumps([entry.layout.kind, *box, entry.mask_mpp]).encode())
    for level in entry.layout.levels:
        digest.update(json.dumps([getattr(level, name) for name in LEVEL if name != "tables"]).encode())
        for data in (level.tables, level.offsets.astype("<i8").tobytes(), level.counts.astype("<i8").tobytes()):
            digest.update(hashlib.sha256(data).digest())
    digest.update(bitmap.bits.tobytes())
    return digest.hexdigest()


class Parts:
    """The journal of an index that is not finished: parts written with the same tissue settings, and as they were written (their
    names hold a checksum); others are removed, and their slides examined again.

    known: what the slides in it were examined from. A slide that was examined again in a later run counts as that run saw it.
    """

    def __init__(self, folder: Path, tissue: TissueConfig) -> None:
        self.folder, self._mark = folder, _mark(tissue)
        self.known: dict[str, Known] = {}
        self._where: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, list[Row]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.arrow")):
            table = _read(path) if path.stem.endswith(_checksum(path)) else None
            if table is None or table.schema.metadata != self._mark:
                path.unlink(missing_ok=True)
                continue
            for place, row in enumerate(table.select(["slide_id", *KNOWN]).to_pylist()):
                self.known[row["slide_id"]] = known_of(row)
                self._where[row["slide_id"]] = path, place

    def row(self, slide_id: str) -> Row:
        """The row of an examined slide; neighbours are kept, so ask in the order of the ids. Raises KeyError."""
        path, place = self._where[slide_id]
        if path not in self._open:
            while len(self._open) >= _PARTS_OPEN:
                del self._open[next(iter(self._open))]
            table = _read(path)
            if table is None:
                raise OSError(f"{path} was readable when the index began and is not any more")
            self._open[path] = table.to_pylist()
        return self._open[path][place]


def next_run(folder: Path) -> int:
    """Runs that go on with the same journal are numbered; parts of later ones count."""
    return 1 + max((int(path.name[:6]) for path in folder.glob("*.arrow")), default=0)


def write_part(folder: Path, run: int, chunk: int, rows: Sequence[Row], tissue: TissueConfig) -> None:
    """One part, whole or not at all. chunk: its number in this run, over all processes."""
    partial = folder / f"{run:06d}-{chunk:08d}.partial"
    schema = SCHEMA.with_metadata(_mark(tissue))
    with partial.open("wb") as file:
        with pyarrow.ipc.new_file(file, schema) as writer:
            writer.write_table(pyarrow.Table.from_pylist(list(rows), schema))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / f"{run:06d}-{chunk:08d}-{_checksum(partial)}.arrow")


def _checksum(path: Path) -> str:
    """Of a part; "none" where another process has removed it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except FileNotFoundError:
        return "none"


def known_of(row: Mapping[str, Any]) -> Known:
    """What the slide of a row was examined from."""
    mark = None if row["size"] is None else Fingerprint(row["size"], row["tag"])
    return Known(row["uri"], row["manifest_mpp"], mark, row["mask_tag"])


def rejected_of(row: Mapping[str, Any]) -> Rejected:
    """The rejected slide of a row."""
    return Rejected(row["slide_id"], row["reason"], known_of(row))


def _mark(tissue: TissueConfig) -> dict[bytes, bytes]:
    return {b"histoscale": json.dumps([VERSION, asdict(tissue)], sort_keys=True).encode()}


def _read(path: Path) -> pyarrow.Table | None:
    """None for a part that another process removed, or that a crash of the machine left without its end."""
    try:
        with pyarrow.memory_map(str(path)) as file:
            return pyarrow.ipc.open_file(file).read_all()
    except (FileNotFoundError, pyarrow.ArrowInvalid):
        return None


_TEXT, _WHOLE, _REAL, _BYTES = pyarrow.string(), pyarrow.int64(), pyarrow.float64(), pyarrow.binary()
KNOWN = {"uri": _TEXT, "manifest_mpp": _REAL, "size": _WHOLE, "tag": _TEXT, "mask_tag": _TEXT}
LEVEL_COLUMNS = {
    "width": _WHOLE, "height": _WHOLE, "tile_width": _WHOLE, "tile_height": _WHOLE, "downsample": _REAL, "compression": _TEXT,
    "colour": _TEXT, "predictor": _WHOLE, "tables": _BYTES, "tiles": _WHOLE, "block": _WHOLE, "block_crc": _WHOLE,
}  # fmt: skip
SLIDE_COLUMNS = {
    **{field.name: _REAL if field.name in ("mpp", "objective") else _TEXT for field in fields(Slide)}, **KNOWN,
    "header_mpp": _REAL, "header_objective": _REAL, "header_scanner": _TEXT, "kind": _TEXT,
    **{f"mask_{name}": _WHOLE for name in BOX}, "mask_mpp": _REAL, "tissue_px": _WHOLE,
    "windows": pyarrow.list_(pyarrow.int32(), len(SIDES)), "digest": _TEXT,
}  # fmt: skip
SCHEMA = pyarrow.schema(
    [*SLIDE_COLUMNS.items(), ("reason", _TEXT), ("level", pyarrow.list_(pyarrow.struct(list(LEVEL_COLUMNS.items()))))]
    + [(name, _BYTES) for name in BLOCKS]
)
