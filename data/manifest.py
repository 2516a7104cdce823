"""The manifest: which slides there are, of which patients and sites, with which labels."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from histoscale.data.delimited import TableError, cleaned, damage, read_delimited, shown
from histoscale.data.names import NamesError, one_spelling, patient_key
from histoscale.data.secrets import has_credential
from histoscale.data.storage import Store, check_uri, names_user, resolve

MPP_RANGE = (0.05, 20.0)  # µm per pixel; outside is a unit error or no microscope slide
_UNSAFE = set('/\\:*?"<>|')
_SHOWN = 20  # rows listed in an error
_LONGEST = 200  # bytes of an id
_BATCH = 1024  # rows of a Parquet file that are unpacked at a time
_MOST_ROWS, _MOST_BYTES = 10_000_000, 1 << 29  # of a Parquet file: a hundred thousand slides with fifty labels take 100 MB


class ManifestError(ValueError):
    """The manifest cannot be used; the message lists the rows."""


@dataclass(frozen=True)
class Slide:
    """One row. patient_id, site: in one spelling each, however the rows write them. mpp: µm per pixel at level 0 (overrides the
    header). labels: every other column that is not empty.

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
_NEEDED = ("slide_id", "uri")
_NUMBERS = ("mpp", "objective")
_PLACES = ("uri", "mask")
_SECRET = "holds a token or a key, which is how they leak into files: drop it"


class Refused(NamedTuple):
    """A row that costs its slide. row: its number. slide_id: as far as it can be shown, without credentials."""

    row: int
    slide_id: str
    reason: str


def read_manifest(uri: str, store: Store, say: Callable[[str], None] | None = None) -> list[Slide]:
    """The slides of `parse_manifest`; `say` is told of the rows that were refused too."""
    slides, refused = parse_manifest(uri, store, say)
    if refused and say is not None:
        listed = "".join(f"\n  row {one.row} ({one.slide_id}): {one.reason}" for one in refused[:_SHOWN])
        say(f"{uri}: {len(refused)} rows are left out:{listed}")
    return slides


def parse_manifest(uri: str, store: Store, say: Callable[[str], None] | None = None) -> tuple[list[Slide], list[Refused]]:
    """The rows of a CSV (commas, semicolons or tabs; UTF-8 or UTF-16) or Parquet file, relative slide URIs resolved against its
    folder, and the rows that no person typed: control characters, ids that are no file names, cells of more than a spreadsheet
    holds. `nan`, `NA`, `null` and the like are missing values; patients and sites that differ by case, blanks or Unicode form
    are one, in the spelling that most rows have.

    say: is told which names were joined. Raises ManifestError for missing columns, empty or duplicate ids, cells that carry a
    token or a password, numbers that are none, patients or sites that a blank inside tells apart, and where no row is left.
    An absurd mpp is not an error here: `index` rejects that slide and keeps the others.
    """
    parquet = uri.lower().endswith((".parquet", ".pq"))
    rows = _read_parquet(uri, store) if parquet else _read_csv(uri, store)
    if not rows:
        raise ManifestError(f"{uri} has no rows")
    for name in filter(has_credential, rows[0][1]):
        raise ManifestError(f"{uri}: the name of the column {shown(name)} {_SECRET}")
    slides, problems, refused = [], [], []
    counts: dict[str, list[int]] = {}
    for number, row in rows:
        name = row.get("slide_id", "")
        try:
            _check_secrets(row)
            damaged = _damaged(row)
            if damaged:
                refused.append(Refused(number, shown(name) or "no slide_id", damaged))
                continue
            counts.setdefault(name, []).append(number)
            slides.append(_slide(row, uri))
        except ValueError as error:
            problems.append(f"row {number} ({shown(name) or 'no slide_id'}): {error}")
    for name, numbers in counts.items():
        if name and len(numbers) > 1:
            problems.append(f"slide_id {name} stands in rows {', '.join(map(str, numbers))}")
    if problems or not slides:
        problems += [f"row {one.row} ({one.slide_id}): {one.reason}" for one in refused]
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ManifestError(f"{uri} has {len(problems)} bad rows:\n  " + "\n  ".join(problems[:_SHOWN]) + more)
    try:
        patients, joined = one_spelling([slide.patient_id or "" for slide in slides], "patients", patient_key)
        sites, more_joined = one_spelling([slide.site or "" for slide in slides], "sites")
    except NamesError as error:
        raise ManifestError(f"{uri}: {error}") from error
    if say is not None:
        for sentence in (*joined, *more_joined):
            say(f"{uri}: {sentence}")
    whole = zip(slides, patients, sites, strict=True)
    return [replace(slide, patient_id=patient or None, site=site or None) for slide, patient, site in whole], refused


Rows = list[tuple[int, dict[str, str]]]


def _read_csv(uri: str, store: Store) -> Rows:
    """Row numbers are those that a spreadsheet shows: the header is row 1."""
    try:
        return read_delimited(store.read(uri), uri, _NEEDED, (*_COLUMNS, "mask")).rows
    except TableError as error:
        raise ManifestError(str(error)) from error


def _read_parquet(uri: str, store: Store) -> Rows:
    """Batch by batch, texts by their dictionaries: a value that is repeated is held once."""
    data = pyarrow.py_buffer(store.read(uri))
    rows: Rows = []
    try:
        schema = pyarrow.parquet.read_schema(pyarrow.BufferReader(data))
        texts = [field.name for field in schema if _is_text(field.type)]
        with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), read_dictionary=texts) as file:
            _check_schema(uri, file)
            for batch in file.iter_batches(_BATCH, use_threads=False):
                columns = [_texts(column) for column in batch.columns]
                rows += [
                    (len(rows) + i, dict(zip(batch.schema.names, row, strict=True)))
                    for i, row in enumerate(zip(*columns, strict=True), 1)
                ]
    except ManifestError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError) as error:  # by what is damaged in it
        raise ManifestError(f"{uri} is no Parquet file: {error}") from error
    return rows


def _check_schema(uri: str, file: pyarrow.parquet.ParquetFile) -> None:
    names, held = file.schema_arrow.names, file.metadata
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise ManifestError(f"{uri} lacks the column {' and '.join(missing)}; it has {', '.join(map(shown, names)) or 'none'}")
    for name in names:
        if damage(name) or names.count(name) > 1:
            raise ManifestError(f"{uri}: the name of the column {shown(name)} {damage(name) or 'stands there twice'}")
    size = sum(held.row_group(i).total_byte_size for i in range(held.num_row_groups))
    if held.num_rows > _MOST_ROWS or size > _MOST_BYTES:
        raise ManifestError(
            f"{uri} has {held.num_rows} rows in {size} bytes: expected at most {_MOST_ROWS} rows in {_MOST_BYTES} of a manifest"
        )


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _texts(column: pyarrow.Array) -> list[str]:
    """The cells of a column. Texts that are no UTF-8 keep what is damaged as halves of characters, which `damage` finds."""
    if isinstance(column, pyarrow.DictionaryArray):
        held = [*_texts(column.dictionary), ""]
        return [held[-1 if i is None else i] for i in column.indices.to_pylist()]
    if _is_text(column.type):
        column = column.cast(pyarrow.large_binary() if pyarrow.types.is_large_string(column.type) else pyarrow.binary())
        return ["" if value is None else cleaned(value.decode("utf-8", "surrogateescape")) for value in column.to_pylist()]
    return [_text(value) for value in column.to_pylist()]


def _text(value: Any) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else cleaned(str(value))


def _check_secrets(row: Mapping[str, str]) -> None:
    """Raises ValueError for a row with a password or a token in any cell; what it says has nothing of it."""
    for name, value in row.items():
        if name in _PLACES:  # _resolved says which option to set instead
            continue
        if "://" in value and names_user(value):
            raise ValueError(f"{name} holds a URI that names a user or a password, which is how they leak into files: drop them")
        if has_credential(value, strictly=name != "slide_id"):
            raise ValueError(f"{name} {_SECRET}")


def _damaged(row: Mapping[str, str]) -> str | None:
    """Why a row costs its slide, None: it does not."""
    for name, value in row.items():
        wrong = damage(value)
        if wrong:
            return f"its {name} {wrong}"
    for name in _PLACES:
        if set(row.get(name, "")) & set("\t\n\r"):
            return f"its {name} holds a line break or a tab"
    try:
        check_slide_id(row.get("slide_id") or "none")
    except ValueError as error:
        return str(error)
    return None


def _slide(row: dict[str, str], manifest: str) -> Slide:
    check_slide_id(row.get("slide_id", ""))
    uri = row.get("uri", "")
    if not uri:
        raise ValueError("no uri")
    told: dict[str, Any] = {name: row.get(name) or None for name in _COLUMNS}
    for name in _NUMBERS:
        told[name] = _number(name, told[name])
    labels = {name: value for name, value in row.items() if name not in (*_COLUMNS, "mask") and value}
    mask = row.get("mask") or None
    return Slide(
        **{**told, "uri": _resolved("uri", uri, manifest)},
        labels=labels,
        mask_uri=None if mask is None else _resolved("mask", mask, manifest),
    )


def _resolved(name: str, uri: str, manifest: str) -> str:
    """Raises ValueError as `check_uri`, of the URI as it is written and of where it leads, and for a path with a token."""
    check_uri(uri)
    if has_credential(uri, strictly=False):
        raise ValueError(f"{name} {_SECRET}")
    found = resolve(manifest, uri)
    check_uri(found)
    return found


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
    if bad or slide_id.startswith(".") or len(slide_id.encode()) > _LONGEST:
        why = (
            f"holds {' '.join(bad)}"
            if bad
            else "starts with a dot"
            if slide_id.startswith(".")
            else f"is longer than {_LONGEST} bytes"
        )
        raise ValueError(f"slide_id '{shown(slide_id)}' {why}; it becomes a file name")


def mpp_problem(mpp: float | None) -> str | None:
    """Why a slide with this mpp cannot be used, or None."""
    if mpp is None:
        return "no mpp: neither the header nor the manifest has one (column mpp, µm per pixel at level 0)"
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        return f"absurd mpp: {mpp:g} µm/px is outside {MPP_RANGE[0]}-{MPP_RANGE[1]:g}; set it in the manifest's column mpp"
    return None
