"""A table as people save it: commas, semicolons or tabs; UTF-8 or UTF-16, with a mark at its start or without."""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from histoscale.data.names import column_key, known, nearest, tidy
from histoscale.data.secrets import scrub
from histoscale.data.spreadsheet import meant

_SEPARATORS = (",", ";", "\t", "|")
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
          (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))  # fmt: skip
_SHOWN = 20  # rows listed in an error
MOST_CELL = 32_767  # characters: what a cell of a spreadsheet holds
_MOST_SHORT = 1 << 20  # cells that rows shorter than the header may lack in all
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # all but the blanks of a text; halves of characters
_LONGEST = 100  # characters of a damaged cell in a message
_LETTERS = 3  # of a header that is in UTF-16, at least
_END = "\n\0end\0"  # a row that no file has: where it does not come back as one, a quote before it is open
csv.field_size_limit(1 << 30)  # a long cell is its row's fault; the default refuses the whole table


class TableError(ValueError):
    """A file that is no table, or lacks a column; the message says which, and what is there."""


@dataclass(frozen=True)
class Delimited:
    """columns: in their order. rows: (number that a spreadsheet shows, cells by column); missing values are ""."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]


def read_delimited(data: bytes, where: str, needed: Sequence[str], optional: Sequence[str] = ()) -> Delimited:
    """The rows of a table with a header; empty ones are left out. Columns that are named here are found however they are written
    (`Patient ID` is patient_id); others keep their name.

    The separator is the one under which most of `needed` stand in the header. Raises TableError: no text, a column missing or
    twice, a row with more cells than the header.
    """
    text, encoding = _decoded(data, where)
    first, _, rest = text.partition("\n")
    told = first.removeprefix("sep=").strip(" \r") if first.startswith("sep=") else ""  # as Excel writes; a tab is told too
    text, skipped = (rest, 1) if told else (text, 0)
    named = {column_key(name): name for name in (*needed, *optional)}
    headers = {mark: _header(text, mark, named) for mark in ([told] if told in _SEPARATORS else _SEPARATORS)}
    mark = max(headers, key=lambda mark: (len(set(needed) & set(headers[mark])), len(headers[mark])))
    columns = headers[mark]
    for name in columns:
        if damage(name):
            raise TableError(f"{where}: the name of the column {shown(name)} {damage(name)}")
    repeated = [name for name, count in Counter(filter(None, columns)).items() if count > 1]
    if repeated:
        raise TableError(f"{where} has the column {repeated[0]!r} twice")
    missing = [name for name in needed if name not in columns]
    if missing:
        there = ", ".join(filter(None, columns)) or "none"
        guesses = [(name, nearest(name, columns)) for name in missing]
        guess = "".join(f"; is {found!r} meant to be {name}?" for name, found in guesses if found)
        guess += "" if encoding == "utf-8" else f" (read as {encoding.upper()}, not UTF-8)"
        raise TableError(f"{where} lacks the column {' and '.join(missing)}; it has {there}{guess}")
    try:
        lines = list(csv.reader(io.StringIO(text + _END, newline=""), delimiter=mark))
    except csv.Error as error:
        raise TableError(f"{where} is no CSV file: {error}") from error
    if lines.pop() != [_END[1:]]:
        raise TableError(f"{where}: a quote in row {len(lines) + 1 + skipped} is never closed, so the rows behind it are no rows")
    if len(lines) * len(columns) > len(text) + _MOST_SHORT:  # every cell but missing ones takes a separator
        raise TableError(f"{where} has {len(columns)} columns, which its {len(lines)} rows leave empty: it is no table")
    rows, long = [], []
    for number, cells in enumerate(lines[1:], 2 + skipped):
        if any(cell.strip() for cell in cells):
            rows.append((number, {name: cleaned(meant(cell)) for name, cell in zip(columns, cells, strict=False) if name}))
            rows[-1][1].update({name: "" for name in columns[len(cells) :] if name})
            if any(cell.strip() for cell in cells[len(columns) :]):
                long.append(number)
    if long:
        listed = ", ".join(map(str, long[:_SHOWN]))
        raise TableError(f"{where}: rows {listed} have more cells than the header; quote cells that hold {mark!r}")
    return Delimited([name for name in columns if name], rows)


def damage(cell: str) -> str | None:
    """What is wrong with a cell that no person typed, in words that follow its name; None: nothing."""
    if len(cell) > MOST_CELL:
        return f"has {len(cell)} characters: expected at most {MOST_CELL}, what a cell of a spreadsheet holds"
    control = _CONTROL.search(cell)
    return f"holds the control character {control[0]!r}" if control else None


def cleaned(cell: str) -> str:
    """`known`, but a damaged cell as it is: cleaning would hide what it holds."""
    return cell if damage(cell) else known(cell)


def shown(cell: str) -> str:
    """The beginning of a cell as it can be printed, without credentials: they are looked for before it is cut."""
    whole = scrub("".join(c if c.isprintable() else repr(c)[1:-1] for c in cell[:MOST_CELL]))
    return whole[:_LONGEST] + ("…" if len(whole) > _LONGEST else "")


def _decoded(data: bytes, where: str) -> tuple[str, str]:
    """(the text, its encoding)."""
    encoding, start = next(((name, len(mark)) for mark, name in _MARKS if data.startswith(mark)), ("", 0))
    if not encoding:  # names of columns are Latin letters, so a header of UTF-16 is full of zeros, all on one side
        header = data[:200].partition(b"\n")[0]
        zeros = [header[place::2].count(0) for place in (0, 1)]
        wide = max(zeros) >= _LETTERS and not min(zeros)
        encoding = "utf-8" if not wide else "utf-16-le" if zeros[1] else "utf-16-be"
    try:
        return data[start:].decode(encoding), encoding
    except UnicodeDecodeError as error:
        raise TableError(
            f"{where} is not UTF-8 text, nor UTF-16 ({error}); expected a table: save it as CSV in UTF-8, or as .parquet"
        ) from error


def _header(text: str, mark: str, named: dict[str, str]) -> list[str]:
    try:
        cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), [])
    except csv.Error:
        return []
    return [named.get(column_key(cell), tidy(cell)) for cell in map(meant, cells)]
