"""Labelled patches: places where one class fills the middle, and the mixed ones beside them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from histoscale.data.cohort import morphology as m
from histoscale.data.cohort.fields import generator
from histoscale.data.cohort.roles import SlideSpec
from histoscale.data.cohort.slide import VirtualSlide
from histoscale.data.cohort.tissue import MAP_UM
from histoscale.data.keys import key

_NATURAL = (m.BENIGN, m.TUMOUR, m.LYMPHOID, m.STROMA, m.ADIPOSE, m.NECROSIS)
PURITY = 0.80  # share of the middle half (by side) that a label needs
OPEN = 0.40  # share of the patch that is not lumen; fat is exempt


@dataclass(frozen=True)
class PatchesConfig:
    """Labelled patches of size_px at mpp; per_class: at most so many a slide and class; mixed: at most so many a slide for
    the stress set."""

    mpp: float
    size_px: int
    per_class: int
    mixed: int


def label_patches(spec: SlideSpec, site: str, slide: VirtualSlide, config: PatchesConfig) -> list[dict[str, Any]]:
    """Rows of patches.parquet for one slide: task `matched4` and its `mixed4` on panels, `natural6` on cases.

    Places lie on a grid of half a patch with a keyed phase, in keyed order; a patch holds no artefact and lies on the slide.
    """
    rng = generator(key(spec.key, "cohort/patches"))
    side = config.size_px * config.mpp / MAP_UM  # in map cells
    h, w = slide.tissue.classes.shape
    step, phase = side / 2, rng.random(2)
    tops, lefts = np.arange(phase[0] * step, h - side - 1, step), np.arange(phase[1] * step, w - side - 1, step)
    top, left = (grid.ravel() for grid in np.meshgrid(tops, lefts, indexing="ij"))
    order = rng.permutation(len(top))
    top, left = top[order], left[order]

    def share(mask: np.ndarray, inset: float) -> np.ndarray:
        """Share of the mask in each patch less `inset` sides at every edge."""
        total = np.pad(np.cumsum(np.cumsum(mask, 0, dtype=np.float64), 1), ((1, 0), (1, 0)))
        y0, x0, y1, x1 = (np.rint(v).astype(int) for v in (
            top + inset * side, left + inset * side, top + (1 - inset) * side, left + (1 - inset) * side))
        return (total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]) / np.maximum((y1 - y0) * (x1 - x0), 1)

    classes = slide.tissue.classes
    codes = m.MATCHED if spec.kind == "panel" else _NATURAL
    shares = np.stack([share(classes == code, 0.25) for code in codes])
    clean = (share(slide.artefacts.mask > 0, 0.0) == 0) & (share(classes == m.MIMIC, 0.0) == 0)
    tissue = share((slide.tissue.maps[0] < 0) | (classes == m.ADIPOSE), 0.0) >= OPEN
    usable, best = clean & tissue, shares.argmax(0)
    pure = shares.max(0) >= PURITY
    task = "matched4" if spec.kind == "panel" else "natural6"
    chosen = [(task, row) for c in range(len(codes)) for row in np.flatnonzero(usable & pure & (best == c))[: config.per_class]]
    if spec.kind == "panel":
        chosen += [("mixed4", row) for row in np.flatnonzero(usable & ~pure & (shares.sum(0) >= 0.99))[: config.mixed]]
    return [
        {
            "slide_id": spec.slide_id, "patient_id": spec.patient_id, "site": site, "role": spec.role, "task": name,
            "x": round(left[row] * MAP_UM / slide.mpp), "y": round(top[row] * MAP_UM / slide.mpp), "mpp": config.mpp,
            "size_px": config.size_px, "label": m.CLASSES[codes[best[row]]],
        }
        for name, row in chosen
    ]
