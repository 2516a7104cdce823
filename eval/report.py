"""One self-contained HTML page: what was streamed, what was learned, what it is worth, and what cannot be said."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

INK, HAEMATOXYLIN, EOSIN, GREY = "#2b2440", "#4b3b8f", "#d1487f", "#9a93a8"
STYLE: Any = {  # matplotlib types the keys as one long literal
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "svg.fonttype": "none",
    "axes.titlesize": 10, "axes.titleweight": "bold",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Rows of plain text; the first column is the row's name. `note` stands below."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


@dataclass(frozen=True)
class Section:
    """title, opening words, then tables and pictures in order."""

    title: str
    text: str
    tables: Sequence[Table]
    pictures: Sequence[tuple[Markup, str]]  # an <img> or <svg>, and its caption


def write_report(path: Path, title: str, lead: str, facts: Mapping[str, str], sections: Sequence[Section]) -> None:
    """Render the page to `path`; everything is inside the file and all text is escaped."""
    template = resources.files("histoscale.eval").joinpath("report.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(title=title, lead=lead, facts=facts, sections=sections)
    partial = path.with_suffix(".partial")
    partial.write_text(page)
    partial.replace(path)


def figure_svg(figure: Figure, words: str) -> Markup:
    """A matplotlib figure as inline SVG with a text alternative."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return Markup('<div role="img" aria-label="{}">').format(words) + Markup(svg[svg.index("<svg") :]) + Markup("</div>")


def picture(pixels: np.ndarray, words: str, jpeg_quality: int | None = None) -> Markup:
    """uint8 [H, W, 3] as an inline PNG, or JPEG at the given quality."""
    buffer = io.BytesIO()
    kind = "png" if jpeg_quality is None else "jpeg"
    Image.fromarray(pixels).save(buffer, kind, **({} if jpeg_quality is None else {"quality": jpeg_quality}))
    return _inline(buffer.getvalue(), kind, words)


def picture_file(path: Path, words: str) -> Markup:
    """A PNG file, inline."""
    return _inline(path.read_bytes(), "png", words)


def _inline(data: bytes, kind: str, words: str) -> Markup:
    return Markup('<img alt="{}" src="data:image/{};base64,{}">').format(words, kind, base64.b64encode(data).decode())


def patch_sheet(patches: np.ndarray, columns: int, gap_px: int = 3) -> np.ndarray:
    """uint8 [N, 3, S, S] -> one uint8 picture [rows*(S+gap)-gap, columns*(S+gap)-gap, 3] on white."""
    n, _, side, _ = patches.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (side + gap_px) - gap_px, columns * (side + gap_px) - gap_px, 3), 255, np.uint8)
    for i, patch in enumerate(patches):
        y, x = (i // columns) * (side + gap_px), (i % columns) * (side + gap_px)
        sheet[y : y + side, x : x + side] = patch.transpose(1, 2, 0)
    return sheet


def curves_figure(
    rows: Sequence[Mapping[str, Any]], panels: Mapping[str, Mapping[str, str]], lines: Mapping[str, float]
) -> Markup:
    """Metric rows as small multiples. panels: title -> {metric key: label}; lines: title -> a horizontal reference."""
    with rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(panels), 2.5), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)
        for axis, (title, series) in zip(axes[0], panels.items(), strict=True):
            colours = [HAEMATOXYLIN, EOSIN, GREY, "#3a8f7b", "#c98a1b"]
            for colour, (key, label) in zip(colours, series.items(), strict=False):
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.4)
            if title in lines:
                axis.axhline(lines[title], color=INK, linestyle=":", linewidth=1)
            axis.set(title=title, xlabel="step")
            axis.legend(frameon=False, fontsize=8)
        return figure_svg(figure, "Curves over the steps of training: " + ", ".join(panels))


def interval_figure(scores: Mapping[str, Mapping[str, Any]], label: str, chance: float | None) -> Markup:
    """One horizontal interval a row. scores: name -> {value, low, high} (low and high may be None: withheld)."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.2, 0.38 * len(scores) + 0.8), layout="constrained")
        axis = figure.subplots()
        names = list(reversed(list(scores)))
        for y, score in enumerate(scores[name] for name in names):
            colour = EOSIN if y == len(scores) - 1 else HAEMATOXYLIN
            if score.get("low") is not None:
                axis.plot([score["low"], score["high"]], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
            if score.get("value") is not None:
                axis.plot(score["value"], y, "o", color=colour, markersize=5)
        axis.set(yticks=range(len(scores)), yticklabels=names, xlabel=label, ylim=(-0.6, len(scores) - 0.4))
        _mark_chance(axis, chance)
        return figure_svg(figure, f"{label} with 95 % intervals: {', '.join(scores)}")


def _mark_chance(axis: Axes, chance: float | None) -> None:
    if chance is not None:
        axis.axvline(chance, color=GREY, linestyle=":", linewidth=1)
        axis.annotate("chance", (chance, axis.get_ylim()[1]), fontsize=7, ha="center", va="bottom", color=GREY)


def number(score: Mapping[str, Any] | None, digits: int = 3) -> str:
    """`0.812 [0.774, 0.850]`, `0.812 [withheld: 7 patients]`, or `–`."""
    if score is None or score.get("value") is None:
        return "–"
    value = f"{score['value']:.{digits}f}"
    if score.get("low") is None or score.get("high") is None:
        return f"{value} [{score.get('note') or 'no interval'}]"
    return f"{value} [{score['low']:.{digits}f}, {score['high']:.{digits}f}]"
