"""The class map of one slide: fragments of tissue, compartments, foci of tumour, regions that only look like it."""

import numpy as np
from scipy.ndimage import binary_fill_holes, distance_transform_edt, label

from histoscale.data.cohort import morphology as m
from histoscale.data.cohort.fields import generator, smooth_field
from histoscale.data.cohort.roles import SlideSpec
from histoscale.data.cohort.tissue import MAP_UM
from histoscale.data.keys import key

Array = np.ndarray
LEAST_FOCUS_UM2 = 9000.0  # 15 tumour nuclei at a low nuclear fraction


def class_map(spec: SlideSpec, height_um: float, width_um: float) -> Array:
    """uint8 [h, w] at MAP_UM, codes of `morphology.CLASSES`."""
    rng = generator(key(spec.key, "cohort/map"))
    h, w = int(np.ceil(height_um / MAP_UM)), int(np.ceil(width_um / MAP_UM))
    tissue = _fragments(rng, h, w)
    codes = np.array(m.MATCHED if spec.kind == "panel" else (m.STROMA, m.BENIGN, m.LYMPHOID, m.ADIPOSE, m.NECROSIS), np.uint8)
    bias = np.zeros(len(codes)) if spec.kind == "panel" else np.array([0.5, 0.4, 0.0, -0.3, -0.9])
    best, classes = np.full((h, w), -np.inf, np.float32), np.zeros((h, w), np.uint8)
    for code, offset in zip(codes, bias, strict=True):
        field = smooth_field(rng, (h, w), MAP_UM, rng.uniform(90, 130)) + np.float32(offset)
        classes[field > best] = code
        np.maximum(best, field, out=best)
    classes[~tissue] = m.BACKGROUND
    area = tissue.sum() * MAP_UM**2
    if spec.tumour:
        _seed(rng, classes, m.TUMOUR, max(spec.tumour_share * area, LEAST_FOCUS_UM2), spec.foci)
    if spec.mimic:
        low, high = (0.001, 0.20)
        _seed(rng, classes, m.MIMIC, max(low * (high / low) ** rng.random() * area, LEAST_FOCUS_UM2), int(rng.integers(1, 4)))
    return classes


def _fragments(rng: np.random.Generator, h: int, w: int) -> Array:
    """Tissue on 55 to 75 % of the slide in at most three pieces without small holes: bool [h, w]."""
    field = smooth_field(rng, (h, w), MAP_UM, 200) + 0.15 * smooth_field(rng, (h, w), MAP_UM, 25)
    y, x = np.abs(np.linspace(-1, 1, h))[:, None], np.abs(np.linspace(-1, 1, w))[None, :]
    field = field - 2.5 * np.maximum(y, x) ** 4
    tissue = field > np.quantile(field, 1 - rng.uniform(0.55, 0.75))
    pieces, count = label(tissue)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    return binary_fill_holes(np.isin(pieces, np.argsort(-sizes)[:3]) & tissue)


def _seed(rng: np.random.Generator, classes: Array, code: int, area_um2: float, count: int) -> None:
    """Turn `area_um2` of the tissue into class `code`, in `count` ragged foci (fewer where each would be under
    LEAST_FOCUS_UM2)."""
    count = max(1, min(count, int(area_um2 / LEAST_FOCUS_UM2)))
    shares = rng.dirichlet(np.full(count, 4.0)) * (area_um2 - count * LEAST_FOCUS_UM2 * 0.999) + LEAST_FOCUS_UM2 * 0.999
    ragged = smooth_field(rng, classes.shape, MAP_UM, 30)
    for share in shares:
        free = (classes != m.BACKGROUND) & (classes != m.TUMOUR) & (classes != m.MIMIC)
        inner = np.flatnonzero(distance_transform_edt(free) * MAP_UM > min(20.0, 0.25 * np.sqrt(share)))
        cells = inner if len(inner) else np.flatnonzero(free)
        row, column = np.divmod(int(cells[rng.integers(len(cells))]), classes.shape[1])
        y, x = np.ogrid[: classes.shape[0], : classes.shape[1]]
        radius = np.sqrt(share / np.pi) / MAP_UM
        distance = np.hypot(y - row, x - column) + 0.3 * radius * ragged
        distance[~free] = np.inf
        n = min(max(1, round(share / MAP_UM**2)), int(free.sum()))
        classes.ravel()[np.argpartition(distance.ravel(), n - 1)[:n]] = code
