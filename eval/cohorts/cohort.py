"""A public cohort as rows of a manifest: what each adapter returns, its published counts, and labels of another table."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from histoscale.data.delimited import TableError, read_delimited
from histoscale.data.manifest import check_slide_id
from histoscale.data.names import nearest, patient_key, slide_key, value_key
from histoscale.data.spreadsheet import write_table

COUNTS = ("published", "any")
KEYS = ("slide_id", "patient_id")
_SHOWN = 6


class CohortError(ValueError):
    """A cohort whose files are not what was published; the message names the file and what to do."""


@dataclass(frozen=True)
class Cohort:
    """rows: one a slide, all with the same columns, in the order of their slide_id. splits: the columns that name parts.
    counts: what was counted -> slides. left_out: slide or file -> why. notes: what a reader of any result must know."""

    name: str
    rows: tuple[dict[str, str], ...]
    splits: tuple[str, ...]
    counts: dict[str, int]
    left_out: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LabelTable:
    """Labels of another table (commas, semicolons or tabs). path: null for none. key: its column that names slides
    or patients, `by` says which. columns: of the table -> of the manifest; a column of that name is replaced where the table has
    a value."""

    path: str | None
    key: str
    by: str
    columns: dict[str, str]

    def __post_init__(self) -> None:
        if self.by not in KEYS:
            raise CohortError(f"labels.by is {self.by!r}: expected {' or '.join(KEYS)}")
        if self.path is not None and not (self.key and self.columns):
            raise CohortError(
                f"labels.path={self.path} needs labels.key and labels.columns: say which column names the {self.by} and which "
                "columns to take"
            )


def find(root: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Files below `root` that end in one of the suffixes, by path; linked folders are followed, hidden files and unfinished
    downloads passed over. Raises CohortError when there is no such folder."""
    if not root.is_dir():
        raise CohortError(f"root={root} is no folder: give the folder that holds the cohort as it was published")
    return iter(sorted(path for path in _files(root) if path.suffix.lower() in suffixes))


def by_name(paths: Sequence[Path], what: str) -> dict[str, Path]:
    """Stem -> path. Raises CohortError for two files of one name."""
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise CohortError(f"{path} and {found[path.stem]} are both {what} of {path.stem}: keep one of them")
        found[path.stem] = path
    return found


def one_file(root: Path, names: Sequence[str]) -> Path:
    """The only file below `root` with one of the names. Raises CohortError for none and for several."""
    found = sorted(path for path in _files(root) if path.name in names)
    if len(found) != 1:
        told = f"holds {', '.join(map(str, found))}" if found else "holds none"
        raise CohortError(f"{root} {told}: expected one file {' or '.join(names)}, as it was published")
    return found[0]


def _files(root: Path) -> Iterator[Path]:
    """Every visible file below; a folder that is linked several times, or into itself, is entered once."""
    entered: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            below.clear()
            continue
        entered.add(real)
        below.sort()
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a table with a header, in any form of `read_delimited`. Raises CohortError: no such file, no text, a column is
    missing."""
    try:
        return [row for _, row in read_delimited(path.read_bytes(), str(path), columns).rows]
    except OSError as error:
        raise CohortError(f"{path} cannot be read as a table ({error}): put it there as it was published") from error
    except TableError as error:
        raise CohortError(f"{error}: put the table there as it was published") from error


def check_counts(cohort: str, counts: str, published: Mapping[str, int], found: Mapping[str, int]) -> tuple[str, ...]:
    """Notes for a part of a cohort. Raises CohortError with counts=published when a count differs, or another value of counts."""
    if counts not in COUNTS:
        raise CohortError(f"collection.counts is {counts!r}: expected {' or '.join(COUNTS)}")
    wrong = [
        f"{found.get(name, 0)} {name} (published: {number})" for name, number in published.items() if found.get(name) != number
    ]
    if wrong and counts == "published":
        raise CohortError(
            f"{cohort}: found {', '.join(wrong)}: get the whole cohort, or set collection.counts=any to use what is there"
        )
    return (f"a part of {cohort}: {', '.join(wrong)}; published scores do not compare",) if wrong else ()


def with_labels(cohort: Cohort, table: LabelTable) -> Cohort:
    """The cohort with columns of another table; rows without one there keep what they had, or nothing.

    Raises CohortError: no such file or column, a key with two values, not one slide that the table names.
    """
    if table.path is None:
        return cohort
    named = slide_key if table.by == "slide_id" else patient_key
    found: dict[str, dict[str, str]] = {}
    path = Path(table.path).expanduser()
    for row in read_table(path, [table.key, *table.columns]):
        if not row[table.key]:
            continue
        values = {column: row[source] for source, column in table.columns.items()}
        before = found.setdefault(named(row[table.key]), values)
        if any(value_key(before[column]) != value_key(value) for column, value in values.items()):
            raise CohortError(f"{table.path} says two things of {row[table.key]}: {before} and {values}; keep one row for it")
    matched, changed, rows = 0, 0, []
    for row in cohort.rows:
        values = found.get(named(row[table.by]), {}) if row[table.by] else {}
        matched += bool(values)
        changed += any(row.get(column) and value and row[column] != value for column, value in values.items())
        old = {column: row.get(column, "") for column in table.columns.values()}
        rows.append({**row, **{column: values.get(column) or before for column, before in old.items()}})
    if not matched:
        example = next((row[table.by] for row in cohort.rows if row[table.by]), "none")
        near = nearest(example, found)
        guess = f"; the nearest in the table is {near}" if near else ""
        raise CohortError(
            f"{table.path} names none of the {len(rows)} slides by labels.key={table.key} "
            f"(a {table.by} here is {example}{guess}): look at labels.key and labels.by"
        )
    asked = {named(row[table.by]) for row in cohort.rows if row[table.by]}
    absent = len(found.keys() - asked)
    counts = {"named by the label table": matched, "relabelled": changed, "of the label table without a slide": absent}
    return replace(cohort, rows=tuple(rows), counts={**cohort.counts, **counts})


def check_rows(cohort: Cohort) -> None:
    """Raises CohortError: no row, an id that is no file name, the same slide twice."""
    if not cohort.rows:
        raise CohortError(f"{cohort.name}: not one slide was found; give the folder that holds the slides as they were published")
    names = Counter(slide_key(row["slide_id"]) for row in cohort.rows)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise CohortError(f"{cohort.name}: {', '.join(twice[:_SHOWN])} is there more than once: keep one file of each slide")
    for row in cohort.rows:
        try:
            check_slide_id(row["slide_id"])
        except ValueError as error:
            raise CohortError(f"{cohort.name}: {error}; rename the file {row['uri']}") from error


def digest(cohort: Cohort, column: str, part: str) -> str:
    """sha256 of the sorted slide ids of a part, one a line: how equal splits are known."""
    ids = sorted(row["slide_id"] for row in cohort.rows if row[column] == part)
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def write_manifest(path: Path, cohort: Cohort) -> None:
    """A CSV that `index` and `mil` take, whole or not at all."""
    write_table(path, list(cohort.rows[0]), cohort.rows)
