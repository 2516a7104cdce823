"""Examined slides to a catalog on disk: streamed in the order of the ids, and in place of the old one at one instant."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from histoscale.data.catalog import FORMAT, checksum, folder_name, sha256_of
from histoscale.data.journal import write_json
from histoscale.data.manifest import Slide
from histoscale.data.parts import BLOCKS, KNOWN, LEVEL_COLUMNS, SLIDE_COLUMNS, VERSION, Rejected, Row, rejected_of
from histoscale.data.tissue import TissueConfig

_WRITING = "writing.partial"
_REPEATED = ("compression", "colour", "tables", "kind", "site", "cohort", "organ", "stain", "scanner", "preparation")
_WIDTHS = {"levels": pyarrow.int64(), **{f"{name}_{what}": pyarrow.int64() for name in BLOCKS for what in ("bytes", "crc")}}
_REJECTED = {"slide_id": pyarrow.string(), "reason": pyarrow.string(), **KNOWN}
_PEOPLE_SKIP = ("windows", "digest")
_PEOPLE_REJECTED = ("slide_id", "uri", "reason")


class NoneAccepted(ValueError):
    """Not one slide can be used. rejected: why."""

    def __init__(self, rejected: list[Rejected]) -> None:
        super().__init__(rejected)
        self.rejected = rejected

    def __str__(self) -> str:
        return f"none of the {len(self.rejected)} slides was accepted"


def write_catalog(out: Path, rows: Iterable[Row], tissue: TissueConfig) -> None:
    """Write a catalog of rows (as parts.py packs them, in the order of their ids) into `out`.

    Its files go into a folder named by their content, then `catalog.json` is replaced, then the old folder removed: a reader, and
    a stop or a full disk at any point, finds the old catalog or the new one. Raises OSError, and NoneAccepted where a catalog
    without slides would take another's place.

    The hash covers what decides about pixels: ids, metadata, labels, levels, tile tables and masks, sizes of files. URIs, etags
    and times of change are not in it: the same files at another place are the same catalog.
    """
    writing = out / _WRITING
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        info = _write(writing, rows, tissue)
        if not info["slides"] and (out / "catalog.json").exists():
            table = pyarrow.ipc.open_file(str(writing / "rejected.arrow")).read_all()
            raise NoneAccepted([rejected_of(row) for row in table.to_pylist()])
        for name in ("slides", "rejected"):
            _for_people(writing, name)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    folder = out / info["folder"]
    if folder.exists():
        shutil.rmtree(writing)
    else:
        writing.rename(folder)
    write_json(out / "catalog.json", info)
    for path in folder.glob("*.parquet"):
        path.replace(out / path.name)
    for old in out.glob("data-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, rows: Iterable[Row], tissue: TissueConfig) -> dict[str, Any]:
    digest = hashlib.sha256(f"{FORMAT} {VERSION}".encode())
    slides, levels = _Columns({**SLIDE_COLUMNS, **_WIDTHS}), _Columns(LEVEL_COLUMNS)
    rejected = _Columns(_REJECTED)
    files = {name: (folder / f"{name}s.bin").open("wb") for name in BLOCKS}
    try:
        for row in rows:
            if row.get("reason") is not None:
                rejected.add(row)
                continue
            digest.update(_identity(row))
            widths = {f"{name}_bytes": files[name].write(row[name]) for name in BLOCKS}
            widths |= {f"{name}_crc": zlib.crc32(row[name]) for name in BLOCKS}
            slides.add({**row, **widths, "levels": len(row["level"])})
            for level in row["level"]:
                levels.add(level)
    finally:
        for file in files.values():
            file.close()
    counts = {"slides": slides.count, "rejected": rejected.count}
    for name, columns in (("slides", slides), ("levels", levels), ("rejected", rejected)):
        columns.write(folder / f"{name}.arrow")
    content = {path.name: [path.stat().st_size, sha256_of(path)] for path in sorted(folder.iterdir())}
    info = {
        "format": FORMAT, "version": VERSION, "hash": digest.hexdigest()[:32], **counts, "tissue": asdict(tissue),
        "folder": folder_name(content), "files": content,
    }  # fmt: skip
    return {**info, "checksum": checksum(info)}


class _Columns:
    """Rows gathered by column, a batch at a time: a hundred thousand dictionaries would not be small."""

    def __init__(self, columns: dict[str, pyarrow.DataType]) -> None:
        self.schema = pyarrow.schema(list(columns.items()))
        self.count = 0
        self._batches: list[pyarrow.RecordBatch] = []
        self._values: dict[str, list[Any]] = {name: [] for name in columns}

    def add(self, row: Row) -> None:
        for name, values in self._values.items():
            values.append(row[name])
        self.count += 1
        if self.count % 4096 == 0:
            self._close_batch()

    def write(self, path: Path) -> None:
        """One Arrow IPC file of one batch, so that every column can be mapped as one array."""
        self._close_batch()
        table = pyarrow.Table.from_batches(self._batches, self.schema).combine_chunks()
        for place, name in enumerate(table.column_names):
            if name in _REPEATED:
                table = table.set_column(place, name, table[name].dictionary_encode())
        with pyarrow.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table.combine_chunks())

    def _close_batch(self) -> None:
        arrays = [pyarrow.array(self._values[field.name], field.type) for field in self.schema]
        self._batches.append(pyarrow.record_batch(arrays, schema=self.schema))
        self._values = {name: [] for name in self._values}


def _for_people(folder: Path, name: str) -> None:
    """The table as Parquet, for people and their tools: nothing here reads it."""
    table = pyarrow.ipc.open_file(str(folder / f"{name}.arrow")).read_all()
    kept = _PEOPLE_REJECTED if name == "rejected" else [column for column in table.column_names if column not in _PEOPLE_SKIP]
    pyarrow.parquet.write_table(table.select(kept), folder / f"{name}.parquet")


def _identity(row: Row) -> bytes:
    """What of a slide enters the hash."""
    known = {name: row[name] for name in Slide.__dataclass_fields__ if name not in ("uri", "mask_uri")}
    return hashlib.sha256(json.dumps([known, row["size"], row["digest"]], sort_keys=True).encode()).digest()
