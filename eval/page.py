"""A self-contained page of typed parts: text, tables, drawings, confusion matrices and galleries, all escaped by the template.

No script, nothing fetched; readable in light and dark, on a phone and on paper.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from histoscale.data.secrets import scrubbed


@dataclass(frozen=True)
class Cell:
    """Text of a table with the numbers of its notes; look: "" or some of `strong`, `indent`, `quiet`; share: a bar of 0 to 1.
    link: a relative address, escaped as such by the caller."""

    text: str
    notes: Sequence[int] = ()
    look: str = ""
    share: float | None = None
    link: str = ""

    def __post_init__(self) -> None:
        if ":" in self.link or self.link.startswith("/"):
            raise ValueError(f"a page links to {self.link!r}: expected a relative address, whose names are percent-encoded")


@dataclass(frozen=True)
class Heading:
    """Of a part of a chapter; words: what it rests on, "" for nothing."""

    title: str
    words: str
    kind: str = "heading"


@dataclass(frozen=True)
class Prose:
    """Paragraphs, divided by an empty line."""

    text: str
    kind: str = "prose"


@dataclass(frozen=True)
class Grid:
    """A table; the first `names` columns are text, the others figures. Strings are plain cells. note stands below."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    names: int
    note: str
    kind: str = "grid"


@dataclass(frozen=True)
class Drawing:
    """An inline SVG and its caption."""

    svg: Markup
    caption: str
    kind: str = "drawing"


@dataclass(frozen=True)
class Picture:
    """image: a data URI, from `inline`. words: what it shows, for those who do not see it. caption: below it."""

    image: str
    words: str
    caption: str
    kind: str = "picture"


@dataclass(frozen=True)
class Matrix:
    """counts: float [K, K], row = true class, column = predicted; fractional where it is a mean over runs."""

    classes: Sequence[str]
    counts: np.ndarray
    caption: str
    counted: str = "images"
    kind: str = "matrix"

    @property
    def rows(self) -> list[tuple[str, float, list[tuple[float, float]]]]:
        """(true class, its total, [(count, share of the row)])."""
        totals = self.counts.sum(axis=1)
        return [
            (name, total, [(count, count / total if total else 0.0) for count in row])
            for name, total, row in zip(self.classes, totals.tolist(), self.counts.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Tile:
    """A small picture. image: a data URI, "" where the page's budget was spent. good: None for a query, else how it is marked."""

    image: str
    words: str
    good: bool | None


@dataclass(frozen=True)
class Strip:
    """One query picture and what lies beside it; words stand above, "" for none."""

    query: Tile
    beside: Sequence[Tile]
    words: str


@dataclass(frozen=True)
class Gallery:
    strips: Sequence[Strip]
    note: str
    kind: str = "gallery"


@dataclass(frozen=True)
class Legend:
    """Colours (CSS) and what they stand for."""

    entries: Sequence[tuple[str, str]]
    kind: str = "legend"


@dataclass(frozen=True)
class Notes:
    """words -> their number at the cells; filled until the page is written."""

    numbers: Mapping[str, int]
    kind: str = "notes"


@dataclass(frozen=True)
class Folded:
    """Parts that open on a click; printed open."""

    title: str
    parts: Sequence["Part"]
    kind: str = "folded"


Part = Heading | Prose | Grid | Drawing | Picture | Matrix | Gallery | Legend | Notes | Folded


@dataclass(frozen=True)
class Chapter:
    """title, and the parts in order; folded parts may hold others."""

    title: str
    parts: Sequence[Part]


def inline(data: bytes, kind: str) -> str:
    """The bytes of a picture (`png`, `jpeg`) as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def write_page(path: Path, title: str, lead: str, facts: Mapping[str, str], chapters: Sequence[Chapter]) -> None:
    """Render to `path`, whole or not at all. facts: what it is of -> the value."""
    template = resources.files("histoscale.eval").joinpath("patch_report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=without_credentials
    )
    page = environment.from_string(template).render(title=title, lead=lead, facts=facts, chapters=chapters)
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def without_credentials(value: Any) -> Any:
    """Names of encoders and stores may carry them, in drawings too; pictures are ours, and long."""
    if not isinstance(value, str) or value.startswith("data:"):
        return value
    return Markup(scrubbed(str(value))) if isinstance(value, Markup) else scrubbed(value)
