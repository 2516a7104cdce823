"""The manifest: which slides there are, of which patients and sites, with which labels."""

import csv
import io
import math
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import pyarrow
import pyarrow.parquet

from histoscale.data.storage import Store, check_uri, resolve

MPP_RANGE = (0.05, 20.0)  # µm per pixel; outside is a unit error or no microscope slide
_UNSAFE = set('/\\:*?"<>|')
_SHOWN = 20  # rows listed in an error


class ManifestError(ValueError):
    """The manifest cannot be used; the message lists the rows."""


@dataclass(frozen=True)
class Slide:
    """One row. mpp: µm per pixel at level 0 (overrides the header). labels: every other column that is not empty.

    mask_uri: the column `mask`, a drawn tissue mask (masks.py) in place of the automatic one.
    """

    slide_id: str
    uri: str
    patient_id: str | None
    site: str | None
    cohort: str | None
    organ: str | None
    stain: str | None
    mpp: float | None
    scanner: str | None
    preparation: str | None
    objective: float | None
    labels: dict[str, str]
    mask_uri: str | None = None


_COLUMNS = tuple(field.name for field in fields(Slide) if field.name not in ("labels", "mask_uri"))
_NUMBERS = ("mpp", "objective")


def read_manifest(uri: str, store: Store) -> list[Slide]:
    """The rows of a CSV or Parquet file, relative slide URIs resolved against its folder.

    Raises ManifestError for missing columns, empty or duplicate or unsafe ids, URIs that carry a token, numbers that are none.
    An absurd mpp is not an error here: `index` rejects that slide and keeps the others.
    """
    columns, rows = _read_parquet(uri, store) if uri.lower().endswith((".parquet", ".pq")) else _read_csv(uri, store)
    missing = [name for name in ("slide_id", "uri") if name not in columns]
    if missing:
        raise ManifestError(f"{uri} lacks the column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}")
    if not rows:
        raise ManifestError(f"{uri} has no rows")
    slides, problems = [], []
    for number, row in rows:
        try:
            slides.append(_slide(row, uri))
        except ValueError as error:
            problems.append(f"row {number} ({row.get('slide_id') or 'no slide_id'}): {error}")
    counts = Counter(row.get("slide_id") for _, row in rows if row.get("slide_id"))
    for name, count in counts.items():
        if count > 1:
            where = ", ".join(str(number) for number, row in rows if row.get("slide_id") == name)
            problems.append(f"slide_id {name} stands in rows {where}")
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ManifestError(f"{uri} has {len(problems)} bad rows:\n  " + "\n  ".join(problems[:_SHOWN]) + more)
    return slides


Rows = list[tuple[int, dict[str, str]]]


def _read_csv(uri: str, store: Store) -> tuple[list[str], Rows]:
    """Row numbers are those that a spreadsheet shows: the header is row 1."""
    try:
        text = store.read(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{uri} is not UTF-8 text ({error}); expected .csv or .parquet") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        lines = list(reader)
    except csv.Error as error:
        raise ManifestError(f"{uri} is no CSV file: {error}") from error
    columns = [name.strip() for name in lines[0]] if lines else []
    repeated = [name for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise ManifestError(f"{uri} has the column {repeated[0]!r} twice")
    rows: Rows = []
    long: list[int] = []
    for number, cells in enumerate(lines[1:], 2):
        if any(cell.strip() for cell in cells):
            rows.append((number, {name: cell.strip() for name, cell in zip(columns, cells, strict=False)}))
            if len(cells) > len(columns):
                long.append(number)
    if long:
        listed = ", ".join(map(str, long[:_SHOWN]))
        raise ManifestError(f"{uri}: rows {listed} have more cells than the header; quote cells that hold commas")
    return columns, rows


def _read_parquet(uri: str, store: Store) -> tuple[list[str], Rows]:
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(store.read(uri)))
    except pyarrow.ArrowException as error:
        raise ManifestError(f"{uri} is no Parquet file: {error}") from error
    rows = [(i, {k: _text(v) for k, v in row.items()}) for i, row in enumerate(table.to_pylist(), 1)]
    return table.column_names, rows


def _text(value: Any) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _slide(row: dict[str, str], manifest: str) -> Slide:
    check_slide_id(row.get("slide_id", ""))
    uri = row.get("uri", "")
    if not uri:
        raise ValueError("no uri")
    check_uri(uri)
    known: dict[str, Any] = {name: row.get(name) or None for name in _COLUMNS}
    for name in _NUMBERS:
        known[name] = _number(name, known[name])
    labels = {name: value for name, value in row.items() if name not in (*_COLUMNS, "mask") and value}
    mask = row.get("mask") or None
    if mask is not None:
        check_uri(mask)
        mask = resolve(manifest, mask)
    return Slide(**{**known, "uri": resolve(manifest, uri)}, labels=labels, mask_uri=mask)


def _number(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}: expected a number or nothing") from error


def check_slide_id(slide_id: str) -> None:
    """Ids become file names: raises ValueError for one that is empty, hidden, or leaves its folder."""
    if not slide_id:
        raise ValueError("no slide_id")
    bad = sorted(set(slide_id) & _UNSAFE) + [repr(c) for c in slide_id if not c.isprintable()]
    if bad or slide_id.startswith(".") or len(slide_id.encode()) > 200:
        why = f"holds {' '.join(bad)}" if bad else "starts with a dot" if slide_id.startswith(".") else "is longer than 200 bytes"
        raise ValueError(f"slide_id {slide_id!r} {why}; it becomes a file name")


def mpp_problem(mpp: float | None) -> str | None:
    """Why a slide with this mpp cannot be used, or None."""
    if mpp is None:
        return "no mpp: neither the header nor the manifest has one (column mpp, µm per pixel at level 0)"
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        return f"absurd mpp: {mpp:g} µm/px is outside {MPP_RANGE[0]}-{MPP_RANGE[1]:g}; set it in the manifest's column mpp"
    return None
