"""The page of one slide for a second reader, and the list of all: self-contained, nothing fetched, verdicts saved as files."""

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
from PIL import Image

from histoscale.eval.artefacts import RELIABILITY
from histoscale.eval.evidence.case import Case, Finding, Measured
from histoscale.eval.evidence.display import Shown, bar_um, length_words
from histoscale.eval.evidence.geometry import Canvas
from histoscale.eval.evidence.verdicts import FORMAT, VERDICTS
from histoscale.eval.mil.faithfulness import Deletion
from histoscale.eval.page import without_credentials


@dataclass(frozen=True)
class About:
    """What all pages share. task: its name. question: such as "tumour against normal". model: facts of the model (encoder, hash,
    aggregator, µm per pixel), shown as they are."""

    task: str
    question: str
    model: Mapping[str, str]


@dataclass(frozen=True)
class Layer:
    """A map over the picture. image: a PNG as a data URI, transparent where no tile lies."""

    name: str
    words: str
    image: str
    gradient: str
    low: str
    high: str


@dataclass(frozen=True)
class Patch:
    """A tile read from the slide. image: a data URI; place: level-0 corner; notes: what to know of it."""

    number: int
    image: str
    words: str
    notes: Sequence[str]
    square: tuple[float, float, float]  # x, y, side in px of the picture


def write_slide_page(
    path: Path,
    case: Case,
    about: About,
    measured: Measured,
    picture: np.ndarray,
    canvas: Canvas,
    layers: Sequence[Layer],
    patches: tuple[Sequence[Patch], Sequence[Patch]],
    curves: Deletion,
    opacity: float,
    top: float,
    files: Sequence[tuple[str, str]],
) -> None:
    """picture: uint8 [h, w, 3] on `canvas`. patches: the most and the least attended. files: name beside the page -> its
    words."""
    mpp = case.mpp * canvas.across
    bar = bar_um(canvas.width * mpp)
    facts = {"format": FORMAT, "slide_id": case.slide_id, "task": about.task, "model": dict(about.model),
             "value": case.finding.value, "output": case.finding.output, "flagged": case.finding.flagged}  # fmt: skip
    _render(
        path, "slide_page.html", case=case, about=about, measured=measured, picture=jpeg(picture, 88), layers=layers,
        width=canvas.width, height=canvas.height, outlines=_outlines(case, canvas), bar_share=bar / mpp / canvas.width,
        bar=length_words(bar), most=patches[0], least=patches[1], plot=deletion_plot(curves), opacity=round(100 * opacity),
        top=top, verdicts=VERDICTS, facts=facts, files=files, reliability=RELIABILITY, sentence=sentence(case.finding),
        draws=len(curves.random),
    )  # fmt: skip


def write_index(path: Path, about: About, measured: Sequence[Measured]) -> None:
    """The slides in the order given, with links to their pages; columns sort on a click."""
    _render(path, "slide_index.html", about=about, slides=measured)


def sentence(finding: Finding) -> str:
    """What the model's output asks of the reader."""
    if finding.flagged is None:
        return "The model gives an estimate for this slide and flags nothing."
    if finding.sweeping == "every":
        return "The model's rule flags every slide, this one too: the flag says nothing about it."
    if finding.sweeping == "no":
        return "The model's rule flags no slide, nor this one: that says nothing about it."
    if finding.flagged:
        return "The model flags this slide for review."
    return "The model does not flag this slide. That rules nothing out: read it as any other."


def layer(name: str, shown: Shown, field: np.ndarray) -> Layer:
    """field: `shown` painted on the picture, NaN where no tile lies."""
    covered = np.where(np.isnan(field), 0, 255).astype(np.uint8)
    pixels = np.dstack([shown.rgb(field), covered])
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").quantize(method=Image.Quantize.FASTOCTREE).save(buffer, "png", optimize=True)
    gradient = ", ".join(shown.gradient())
    return Layer(name, shown.words, _uri(buffer, "png"), gradient, f"{shown.low:.3g}", f"{shown.high:.3g}")


def jpeg(pixels: np.ndarray, quality: int) -> str:
    """uint8 [h, w, 3] as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
    return _uri(buffer, "jpeg")


def _uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _outlines(case: Case, canvas: Canvas) -> str:
    """The annotations as an SVG path in pixels of the picture; "" without any."""
    if case.annotations is None:
        return ""
    scale = np.array([canvas.across, canvas.down])
    rings = [ring / scale for polygon in (*case.annotations.inside, *case.annotations.outside) for ring in polygon.rings]
    return " ".join("M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in ring.tolist()) + " Z" for ring in rings)


def deletion_plot(curves: Deletion) -> Markup:
    """The logit over the share of tiles that were taken away: each order, and the band of the random ones."""
    left, top, wide, tall = 64, 12, 440, 220
    everything = np.concatenate([curves.random.ravel(), *curves.curves.values()])
    low, high = float(everything.min()), float(everything.max())
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-9 else (low, high)

    def points(values: np.ndarray) -> str:
        x = left + curves.removed / curves.removed[-1] * wide
        y = top + (high - values) / (high - low) * tall
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))

    upper, lower = points(curves.random.max(0)), points(curves.random.min(0))
    parts = [Markup('<polygon class="band" points="{} {}"/>').format(upper, " ".join(lower.split()[::-1]))]
    parts.append(Markup('<polyline class="random" points="{}"/>').format(points(curves.random.mean(0))))
    text = Markup('<text x="{:.0f}" y="{:.0f}" text-anchor="{}" class="{}">{}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + share * wide
        parts.append(text.format(x, top + tall + 18, "middle", "quiet", f"{share * curves.removed[-1]:.0%}"))
    for value in (low, (low + high) / 2, high):
        y = top + (high - value) / (high - low) * tall
        parts.append(Markup('<line class="gridline" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(left, left + wide, y, y))
        parts.append(text.format(left - 8, y + 4, "end", "quiet", f"{value:.2f}"))
    for number, (name, values) in enumerate(curves.curves.items()):
        parts.append(Markup('<polyline class="order o{}" points="{}"/>').format(number, points(values)))
        y = top + 14 + 20 * number
        parts.append(Markup('<line class="order o{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            number, left + wide + 18, left + wide + 44, y, y))  # fmt: skip
        parts.append(text.format(left + wide + 52, y + 4, "start", "", name))
    y = top + 14 + 20 * len(curves.curves)
    key = Markup('<rect class="band" x="{}" y="{}" width="26" height="10"/>').format(left + wide + 18, y - 5)
    parts += [key, text.format(left + wide + 52, y + 4, "start", "", f"{len(curves.random)} random orders")]
    parts.append(text.format(left + wide / 2, top + tall + 38, "middle", "quiet", "share of the tiles taken away"))
    head = '<svg viewBox="0 0 {} {}" role="img" aria-label="The model\'s logit as tiles are taken away">'
    return Markup(head).format(left + wide + 210, top + tall + 46) + Markup("").join(parts) + Markup("</svg>")


def _render(path: Path, template: str, **values: Any) -> None:
    """Whole or not at all; everything escaped, credentials scrubbed."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=without_credentials
    )
    source = resources.files("histoscale.eval.evidence").joinpath(template).read_text(encoding="utf-8")
    partial = path.with_suffix(".partial")
    partial.write_text(environment.from_string(source).render(**values), encoding="utf-8")
    partial.replace(path)
