"""Attention over the slide: exact geometry from tiles to thumbnail pixels, and the figure that people look at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from histoscale.data.keys import key
from histoscale.data.readers.pyramid import Reader, level_mpps
from histoscale.data.readers.scale import choose_scale, read_scaled

_DPI = 110
_TRUTH = "#00c2d1"  # cyan: far from stain and from the colours of attention
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}


@dataclass(frozen=True)
class HeatmapConfig:
    """slides: how many are drawn, half of them positive, chosen by `seed` and never by their score. longest_px: the thumbnail's
    longer side. display: `relative` (attention / uniform attention) or `rank` (0 least, 1 most attended tile of the slide).
    opacity: of the colours over the tissue. level_tolerance: a stored level so near the wanted size is taken as it is."""

    slides: int
    longest_px: int
    display: str
    opacity: float
    level_tolerance: float
    seed: int

    def __post_init__(self) -> None:
        if self.display not in ("relative", "rank"):
            raise ValueError(f"heatmap.display is {self.display!r}: expected relative or rank")


@dataclass(frozen=True)
class Thumbnail:
    """pixels: uint8 [h, w, 3] of the whole slide. downsample: level-0 px a pixel. mpp: µm a pixel."""

    pixels: np.ndarray
    downsample: float
    mpp: float


@dataclass(frozen=True)
class Tiles:
    """coords: int64 [n, 2] level-0 corners (x, y). size_px: level-0 side. attention, contribution: float64 [n]."""

    coords: np.ndarray
    size_px: int
    attention: np.ndarray
    contribution: np.ndarray


def paint(coords: np.ndarray, size_px: float, values: np.ndarray, height: int, width: int, downsample: float) -> np.ndarray:
    """float64 [height, width]: each pixel takes the value of the tile that holds its centre, NaN where none does.

    coords: [n, 2] corners and size_px: side, in level-0 px; downsample: level-0 px a pixel, whole or not. Tiles are half-open:
    neighbours neither overlap nor leave a gap at any downsample. Where tiles themselves overlap the mean is taken.
    """
    total, count = np.zeros((height, width)), np.zeros((height, width), np.int64)
    # Centre (i + 1/2) d lies in [x, x + s) exactly for ceil(x/d - 1/2) <= i < ceil((x + s)/d - 1/2).
    first = np.ceil(coords / downsample - 0.5).astype(np.int64).clip(0)
    last = np.ceil((coords + size_px) / downsample - 0.5).astype(np.int64).clip(0)
    for (left, top), (right, bottom), value in zip(first, last, values, strict=True):
        total[top:bottom, left:right] += value
        count[top:bottom, left:right] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def read_thumbnail(reader: Reader, mpp: float, longest_px: int, tolerance: float) -> Thumbnail:
    """The whole slide at about `longest_px`; mpp: of level 0. Raises what the reader raises."""
    full = reader.layout.levels[0]
    wanted = mpp * max(1.0, max(full.width, full.height) / longest_px)
    scale = choose_scale(level_mpps(reader.layout.levels, mpp), wanted, tolerance, 1.0)
    assert scale is not None  # never finer than level 0
    downsample = scale.mpp / mpp
    width, height = (max(1, math.floor(side / downsample)) for side in (full.width, full.height))
    return Thumbnail(read_scaled(reader, scale, 0, 0, width, height), downsample, scale.mpp)


def displayed(attention: np.ndarray, display: str) -> tuple[np.ndarray, str]:
    """What is shown of attention [n], and its words."""
    if display == "relative":
        return attention * len(attention), "attention, multiples of the mean tile"
    places = attention.argsort(kind="stable").argsort(kind="stable")
    return places / max(len(attention) - 1, 1), "rank of attention in this slide"


def draw(
    path: Path, thumbnail: Thumbnail, tiles: Tiles, foci: Sequence[np.ndarray] | None, title: str, config: HeatmapConfig
) -> None:
    """Write a PNG: the slide with the outlined truth (where known), and attention over it; `tiles` beside it as Parquet.

    foci: rings in level-0 px, [] when the slide is known to have none, None when nothing is known.
    """
    values, words = displayed(tiles.attention, config.display)
    height, width = thumbnail.pixels.shape[:2]
    field = paint(tiles.coords, tiles.size_px, values, height, width, thumbnail.downsample)
    across = 5.2 if width >= height else 5.2 * width / height
    figure = Figure(figsize=(2 * across + 1.1, across * height / width + 0.75), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    plain, overlay = figure.subplots(1, 2)
    plain.imshow(thumbnail.pixels, interpolation="antialiased")
    plain.set_title("slide" if foci is None else "slide, foci outlined" if foci else "slide, no focus in it", fontsize=9)
    grey = thumbnail.pixels.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8)
    overlay.imshow(grey, interpolation="antialiased")
    # Glass and left-out tissue keep the slide's own grey; a map that is pale at 0 does not darken what is little attended.
    seen = np.ma.masked_invalid(field)
    top = float(values.max())
    shown = overlay.imshow(seen, cmap="YlOrRd", alpha=config.opacity, vmin=0, vmax=top, interpolation="nearest")
    overlay.set_title(f"{words}; {len(tiles.coords)} tiles", fontsize=9)
    figure.colorbar(shown, ax=overlay, fraction=0.045, pad=0.02).ax.tick_params(labelsize=8)
    for axis in (plain, overlay):
        axis.set_axis_off()
        _scale_bar(axis, width, height, thumbnail.mpp)
        for ring in foci or ():
            # Pixel (0, 0) spans [-.5, .5] in matplotlib's coordinates.
            axis.plot(*(ring / thumbnail.downsample - 0.5).T, color=_TRUTH, linewidth=1.4)
        axis.set_xlim(-0.5, width - 0.5)
        axis.set_ylim(height - 0.5, -0.5)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    write_tiles(path.with_suffix(".parquet"), tiles)


def write_tiles(path: Path, tiles: Tiles) -> None:
    """The raw numbers: columns x, y, width, height (level-0 px), attention, contribution (sums to the slide's logit)."""
    side = np.full(len(tiles.coords), tiles.size_px)
    table = {"x": tiles.coords[:, 0], "y": tiles.coords[:, 1], "width": side, "height": side}
    pyarrow.parquet.write_table(
        pyarrow.table({**table, "attention": tiles.attention, "contribution": tiles.contribution}), path
    )


def choose(names: Sequence[str], labels: Sequence[int], slides: int, seed: int) -> list[int]:
    """Places of the slides to draw: positives and negatives in equal number where there are enough, in the order of a keyed
    hash of their names; no score is asked."""
    order = sorted(range(len(names)), key=lambda i: key(seed, f"heatmap/{names[i]}"))
    positive, negative = ([i for i in order if labels[i] == label] for label in (1, 0))
    take = min(len(positive), max(math.ceil(slides / 2), slides - len(negative)))
    return positive[:take] + negative[: slides - take]


def bar_um(width_um: float) -> float:
    """A round length of 1, 2 or 5 times a power of ten, at most a quarter of the width."""
    power = 10.0 ** math.floor(math.log10(width_um / 4))
    return max(step * power for step in (1, 2, 5) if step * power <= width_um / 4 * (1 + 1e-9))


def _scale_bar(axis: Axes, width: int, height: int, mpp: float) -> None:
    length = bar_um(width * mpp)
    words = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    left, y = width * 0.03, height * 0.965
    axis.plot([left, left + length / mpp], [y, y], color="black", linewidth=3, solid_capstyle="butt")
    axis.text(left + length / mpp / 2, y - height * 0.018, words, ha="center", va="bottom", fontsize=8, bbox=_PAPER)
