"""JSON that another hand, an earlier run or a failing disk left: an object, or a reason that fits behind the file's name."""

import json
from pathlib import Path
from typing import Any


class JsonError(ValueError):
    """Why a text is no JSON object, without the name of its file: whoever reads it names the file and says what to do."""


def parse(data: bytes | str, once: bool = False) -> Any:
    """Any JSON value. Raises JsonError: empty, cut, no JSON, numbers or nesting beyond what Python reads; once: a name twice."""
    if not data.strip():
        raise JsonError("it is empty")
    try:
        return json.loads(data, object_pairs_hook=_unique if once else None)
    except RecursionError:
        raise JsonError("it is nested too deep") from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(f"it is no whole JSON: {error}") from None


def parse_object(data: bytes | str, once: bool = False) -> dict[str, Any]:
    """A JSON object. Raises JsonError, as `parse`."""
    found = parse(data, once)
    if not isinstance(found, dict):
        raise JsonError(f"it holds {'null' if found is None else f'a {type(found).__name__}'}, expected an object")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises JsonError, OSError."""
    return parse_object(path.read_bytes())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line. Raises JsonError, which says the line, and OSError."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(parse_object(line))
        except JsonError as error:
            raise JsonError(f"in line {number}, {error}") from None
    return rows


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise JsonError("it names something twice")
    return found
