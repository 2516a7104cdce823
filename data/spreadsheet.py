"""Tables that spreadsheets open: a text that one of them would run is marked as text, and our readers take the mark off again.

A cell that begins with = + - @, a tab or a line's end (also behind blanks, in full width, or behind marks) gets an apostrophe in
front, unless it is a number; that is what people type to make a text of it. `shown` and `meant` are each other's inverse for
every text.
"""

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_RUN = re.compile(r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r\n])")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def shown(value: Any) -> Any:
    """A cell as it is written; numbers stay what they are."""
    return f"'{value}" if isinstance(value, str) and _RUN.match(value) and not _NUMBER.fullmatch(value) else value


def meant(cell: str) -> str:
    """A cell as it was before it was written."""
    return cell[1:] if cell.startswith("'") and _RUN.match(cell) else cell


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV in UTF-8, whole or not at all. Raises ValueError for a row with other columns."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writerow({name: shown(name) for name in columns})
            writer.writerows({name: shown(value) for name, value in row.items()} for row in rows)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV of `write_table`. Raises ValueError for one that is none, OSError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = [[meant(cell) for cell in row] for row in csv.reader(file)] or [[]]
        return [dict(zip(head, row, strict=True)) for row in rows]
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} is no whole table ({error})") from error
