"""The picture of a slide for a report: the slide beside its map, with scale bar, colour bar and, where known, outlines."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from histoscale.eval.evidence.display import Shown, bar_um, length_words

_DPI = 110
_OUTLINE = "#00c2d1"  # cyan: far from stain and from the colours of attention
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}


def draw_figure(
    path: Path,
    picture: np.ndarray,
    field: np.ndarray,
    shown: Shown,
    downsample: float,
    mpp: float,
    rings: Sequence[np.ndarray] | None,
    title: str,
    opacity: float,
) -> None:
    """Write a PNG. picture: uint8 [h, w, 3] of the whole slide; field: `shown` painted on it, NaN where no tile lies; downsample:
    level-0 px a pixel; mpp: µm a pixel. rings: outlines in level-0 px, [] where none was drawn, None where nothing is known."""
    height, width = picture.shape[:2]
    across = 5.2 if width >= height else 5.2 * width / height
    figure = Figure(figsize=(2 * across + 1.1, across * height / width + 0.75), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    plain, overlay = figure.subplots(1, 2)
    plain.imshow(picture, interpolation="antialiased")
    plain.set_title(
        "slide" if rings is None else "slide, annotations outlined" if rings else "slide, nothing annotated", fontsize=9
    )
    grey = picture.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8)
    overlay.imshow(grey, interpolation="antialiased")
    # Glass and left-out tissue keep the slide's own grey.
    seen = np.ma.masked_invalid(field)
    drawn = overlay.imshow(seen, cmap=shown.colours, alpha=opacity, vmin=shown.low, vmax=shown.high, interpolation="nearest")
    overlay.set_title(shown.words, fontsize=9)
    figure.colorbar(drawn, ax=overlay, fraction=0.045, pad=0.02).ax.tick_params(labelsize=8)
    for axis in (plain, overlay):
        axis.set_axis_off()
        _scale_bar(axis, width, height, mpp)
        for ring in rings or ():
            # Pixel (0, 0) spans [-.5, .5] in matplotlib's coordinates.
            axis.plot(*(np.concatenate([ring, ring[:1]]) / downsample - 0.5).T, color=_OUTLINE, linewidth=1.4)
        axis.set_xlim(-0.5, width - 0.5)
        axis.set_ylim(height - 0.5, -0.5)
    figure.suptitle(title, fontsize=10, parse_math=False)  # a name may hold $
    figure.savefig(path, format="png", metadata={"Software": None})


def _scale_bar(axis: Axes, width: int, height: int, mpp: float) -> None:
    length = bar_um(width * mpp)
    left, y = width * 0.03, height * 0.965
    axis.plot([left, left + length / mpp], [y, y], color="black", linewidth=3, solid_capstyle="butt")
    middle = left + length / mpp / 2
    axis.text(middle, y - height * 0.018, length_words(length), ha="center", va="bottom", fontsize=8, bbox=_PAPER)
