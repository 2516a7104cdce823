"""The tissue of one slide: a class map, its nuclei, and the optical densities of both dyes through any window."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter, label
from scipy.special import ndtri

from histoscale.data.cohort import morphology as m
from histoscale.data.cohort.fields import Linear, between, generator, periodic_texture, smooth_field, wrapped
from histoscale.data.cohort.nuclei import Nuclei, covered, draw_nuclei, hard_core
from histoscale.data.keys import key

Array = np.ndarray
MAP_UM = 2.0  # step of the class map and of every map beside it
_TEXTURE = 1024


@lru_cache(maxsize=8)
def chromatin_texture(mpp: float) -> Array:
    """Chromatin at two scales (1.6 and 4 um), standard normal [512, 512] at this resolution."""
    rng = generator(key(0, "cohort/chromatin"))
    fine, coarse = (periodic_texture(rng, 512, (um / mpp * 0.4, um / mpp * 0.4)) for um in (1.6, 4.0))
    return (0.83 * fine + 0.55 * coarse).astype(np.float32)


@lru_cache(maxsize=1)
def _stroma_textures() -> tuple[Array, Array]:
    """Strands (7:1) and grain, standard normal [1024, 1024]; the steps are .5 um across strands, 3.5 um along them, and 1 um."""
    rng = generator(key(0, "cohort/strands"))
    grain = 0.6 * periodic_texture(rng, _TEXTURE, (1.2, 1.2)) + 0.8 * periodic_texture(rng, _TEXTURE, (4.0, 4.0))
    return periodic_texture(rng, _TEXTURE, (2.4, 2.4)), grain.astype(np.float32)


@dataclass
class Tissue:
    """classes uint8 [h, w] at MAP_UM; `maps` float32 [5, h, w]: lumen (logit), eosin, strand weight, coordinates along and
    across strands; `background_density` is the haematoxylin of the cytoplasm as a share of the eosin."""

    classes: Array
    maps: Array
    nuclei: Nuclei
    morphology: dict[int, m.Morphology]
    grain_at: tuple[int, int]
    background_density: float

    def densities(self, x_um: float, y_um: float, mpp: float, height: int, width: int) -> tuple[Array, Array]:
        """Haematoxylin and eosin, float32 [height, width] each, of the window with its corner at (x_um, y_um); white beyond the
        map.

        A window is a function of its place: two windows agree where they overlap.
        """
        first_y, first_x = int(np.floor(y_um)) - 1, int(np.floor(x_um)) - 1
        size = int(np.ceil(height * mpp)) + 4, int(np.ceil(width * mpp)) + 4
        lumen, eosin = self._texture(first_y, first_x, *size)
        rows = Linear((np.arange(height) + 0.5) * mpp + y_um - first_y - 0.5, size[0])
        columns = Linear((np.arange(width) + 0.5) * mpp + x_um - first_x - 0.5, size[1])
        tissue, eosin = between(1 - lumen, rows, columns), between(eosin, rows, columns)
        nuclear, cover = draw_nuclei(
            self.nuclei, self.morphology, chromatin_texture(mpp), x_um + mpp / 2, y_um + mpp / 2, mpp, (height, width)
        )
        haematoxylin = nuclear * (0.1 + 0.9 * tissue) + self.background_density * eosin
        return haematoxylin, eosin * (1 - 0.45 * cover)

    def _texture(self, y: int, x: int, height: int, width: int) -> tuple[Array, Array]:
        """Lumen (0 to 1) and eosin on the grid of 1 um whose first pixel starts at (y, x) um: float32 [height, width] each."""
        rows = Linear((np.arange(y, y + height) + 0.5) / MAP_UM - 0.5, self.maps.shape[1])
        columns = Linear((np.arange(x, x + width) + 0.5) / MAP_UM - 0.5, self.maps.shape[2])
        lumen, eosin, weight, along, across = between(self.maps, rows, columns)
        strands, grain = _stroma_textures()
        strand = _bilinear(strands, across * 2, along * np.float32(2 / 7))
        texture = (weight * strand + (1 - weight) * wrapped(grain, y + self.grain_at[0], x + self.grain_at[1], height, width))
        texture /= np.sqrt(weight**2 + (1 - weight) ** 2)
        lumen = 1 / (1 + np.exp(-np.clip(lumen, -30, 30)))
        return lumen, eosin * np.clip(1 + 0.22 * texture, 0.2, 2.5) * (1 - 0.97 * lumen)


def _bilinear(texture: Array, y: Array, x: Array) -> Array:
    """A texture that tiles the plane, read at real positions."""
    y0, x0 = np.floor(y), np.floor(x)
    fy, fx = y - y0, x - x0
    mask = _TEXTURE - 1
    y0, x0 = y0.astype(np.int32) & mask, x0.astype(np.int32) & mask
    y1, x1 = (y0 + 1) & mask, (x0 + 1) & mask
    flat, y0, y1 = texture.ravel(), y0 * _TEXTURE, y1 * _TEXTURE
    above = flat[y0 + x0] * (1 - fx) + flat[y0 + x1] * fx
    return above * (1 - fy) + (flat[y1 + x0] * (1 - fx) + flat[y1 + x1] * fx) * fy


def grow(classes: Array, law: m.Law, gap: float, natural: bool, k: int, nucleolus: float | None = None) -> Tissue:
    """Fill a class map with tissue.

    classes: uint8 [h, w] at MAP_UM, codes of `morphology.CLASSES`. natural: let nuclear and eosin density differ by class
    (`natural6`). nucleolus: share of tumour nuclei that show one, in place of the class's own. k: the key of every draw.
    """
    rng = generator(key(k, "cohort/tissue"))
    shapes = m.morphologies(gap)
    regions, count = _regions(classes)
    codes = np.zeros(count + 1, np.int64)
    codes[regions.ravel()] = classes.ravel()
    white = m.white_fraction(rng, codes)
    lumen = _lumen(rng, classes, white[regions])
    along, across, theta, glands = _strands(rng, *classes.shape)
    natural_fraction, natural_eosin = (
        np.array([table.get(c, 1.0) if natural else 1.0 for c in range(len(m.CLASSES))])
        for table in (m.NATURAL_FRACTION, m.NATURAL_EOSIN)
    )
    eosin = law.eosin_density[codes] * natural_eosin[codes] * np.exp(rng.normal(0, 0.08, len(codes)))
    eosin_map = eosin[regions] * (1 + 0.12 * smooth_field(rng, classes.shape, MAP_UM, 60))
    centre = np.mean([shapes[c].fibre for c in m.MATCHED])
    middle = np.array([shapes[c].fibre if c in shapes else 0.0 for c in range(len(m.CLASSES))])[codes]
    spread = rng.uniform(-0.22, 0.22, len(codes))
    weight = np.clip(np.where(middle > centre, np.maximum(middle + spread, 0.55), middle + spread), 0, 0.97)[regions]
    fraction = np.clip(law.nuclear_fraction * natural_fraction, 0.06, 0.40)[codes] * np.exp(rng.normal(0, 0.15, len(codes)))
    nuclei = _place(rng, classes, regions, lumen, theta, glands, np.clip(fraction, 0.06, 0.40), law, shapes, nucleolus)
    smooth = (gaussian_filter(p.astype(np.float32), 1.0) for p in (eosin_map, weight))
    maps = np.stack([lumen, *smooth, along, across]).astype(np.float32)
    return Tissue(classes, maps, nuclei, shapes, (int(rng.integers(_TEXTURE)), int(rng.integers(_TEXTURE))), 0.09)


def _regions(classes: Array) -> tuple[Array, int]:
    """Connected pieces of one class, numbered from 1: int [h, w], and how many."""
    regions, count = np.zeros(classes.shape, np.int64), 0
    for code in np.unique(classes):
        pieces, n = label(classes == code)
        regions[pieces > 0] = pieces[pieces > 0] + count
        count += n
    return regions, count


def _lumen(rng: np.random.Generator, classes: Array, white: Array) -> Array:
    """Logit of being white, float32 [h, w]: lumens, slits, vessels and fat cells, each class with its own shapes and the
    same share."""
    shape = classes.shape
    large, middle, fine, fat = (smooth_field(rng, shape, MAP_UM, scale) for scale in (26, 22, 9, 45))
    slits = (0.6 * smooth_field(rng, shape, MAP_UM, 18) + 0.4 * fine) / np.hypot(0.6, 0.4)
    clefts = (0.6 * middle + 0.4 * fine) / np.hypot(0.6, 0.4)
    cells = np.where(classes == m.ADIPOSE, np.abs(fat), 0)
    glands = np.isin(classes, (m.BENIGN, m.MIMIC))
    field = np.select([classes == m.TUMOUR, classes == m.STROMA, glands], [slits, clefts, large], middle)
    threshold = np.where(classes == m.ADIPOSE, ndtri(0.5 + 0.5 * (1 - white)), ndtri(1 - white))
    logit = 10 * (np.where(classes == m.ADIPOSE, cells, field) - threshold)
    logit = np.where(classes == m.BACKGROUND, 8.0, np.clip(logit, -8, 8))
    return gaussian_filter(logit.astype(np.float32), 1.0)  # no stairs along the tissue's edge


def _strands(rng: np.random.Generator, height: int, width: int) -> tuple[Array, Array, Array, Array]:
    """Coordinates along and across the strands (um), the strands' angle, and the field whose contours glands follow: float32
    [h, w] each.

    Strands are level lines of `across`: a plane wave bent by two smooth fields, so their angle is that of its tangent.
    """
    angle = rng.uniform(0, np.pi)
    yy, xx = np.meshgrid(np.arange(height) * MAP_UM, np.arange(width) * MAP_UM, indexing="ij")
    bend, wave, stretch = (smooth_field(rng, (height, width), MAP_UM, scale) for scale in (200, 60, 80))
    across = yy * np.cos(angle) - xx * np.sin(angle) + 70 * bend + 7 * wave
    along = xx * np.cos(angle) + yy * np.sin(angle) + 25 * stretch
    slope_y, slope_x = np.gradient(across)
    glands = smooth_field(rng, (height, width), MAP_UM, 50)
    return along, across, np.arctan2(slope_y, slope_x) + np.pi / 2, glands


def _place(
    rng: np.random.Generator, classes: Array, regions: Array, lumen: Array, theta: Array, glands: Array, fraction: Array,
    law: m.Law, shapes: dict[int, m.Morphology], nucleolus: float | None,
) -> Nuclei:  # fmt: skip
    """Nuclei until each region holds its fraction of nuclear area outside lumens."""
    open_ = (classes != m.BACKGROUND) & (lumen < 0)
    phase = np.abs((glands * 1.6) % 2 - 1)  # 0 on one contour of the gland field, 1 on the next
    clusters = smooth_field(rng, classes.shape, MAP_UM, 40)
    gland = np.isin(classes, (m.BENIGN, m.MIMIC))
    clustered = np.where((classes == m.TUMOUR) & (clusters < 0), 0.55, 1.0)
    appeal = np.where(gland, np.where(phase < 0.38, 1.0, 0.10), clustered) * open_
    area = np.bincount(regions[open_], minlength=len(fraction)) * MAP_UM**2
    codes = np.zeros(len(fraction), np.int64)
    codes[regions.ravel()] = classes.ravel()
    axis = np.array([shapes[c].semi_axis_um if c in shapes else 3.0 for c in range(len(m.CLASSES))]) * law.size
    wanted = np.bincount(codes, area * fraction, len(m.CLASSES)) / (np.pi * axis**2)
    parts = []
    for code in np.flatnonzero(wanted):
        weights = np.cumsum(np.where(classes == code, appeal, 0.0).ravel())
        if weights[-1] > 0:
            parts.append(np.searchsorted(weights, rng.random(int(wanted[code] * 3.5) + 8) * weights[-1], side="right"))
    cells = rng.permutation(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
    row, column = np.divmod(cells, classes.shape[1])
    n, kind = len(cells), classes[row, column]
    x, y = (column + rng.random(n)) * MAP_UM, (row + rng.random(n)) * MAP_UM
    table = np.array([[*vars(shapes[c]).values()] if c in shapes else [3.0, 0.1, 1, 0, 0, 0, 1] for c in range(len(m.CLASSES))])
    if nucleolus is not None:
        table[m.TUMOUR, 4] = nucleolus
    semi, variation, elongation, _, spotted, _, spacing = table[kind].T
    size = semi * law.size[kind] * np.exp(np.clip(rng.normal(0, 1, n), -2.5, 2.5) * variation)
    ratio = np.maximum(1.0, elongation * np.exp(rng.normal(0, 0.10, n)))
    slope_y, slope_x = np.gradient(glands)
    polar = np.arctan2(slope_y, slope_x)[row, column] + rng.normal(0, 0.22, n)
    along = theta[row, column] + rng.normal(0, 0.17, n)
    angle = np.select([kind == m.STROMA, np.isin(kind, (m.BENIGN, m.MIMIC))], [along, polar], rng.uniform(0, np.pi, n))
    kept, pairs = hard_core(x, y, size * spacing) if n else (np.zeros(0, bool), np.zeros((0, 2), np.int64))
    added = covered(x, y, size, pairs[kept[pairs].all(1)]) if n else np.zeros(0)
    region = regions[row, column]
    order = np.lexsort((np.arange(n), region))
    order = order[kept[order]]
    total = np.cumsum(added[order])
    start = np.searchsorted(region[order], region[order])
    before = np.where(start > 0, total[start - 1], 0.0)
    rows = order[total - before <= (area * fraction)[region[order]]]
    density = law.nuclear_density[kind] * np.where(kind == m.MIMIC, 1.25, 1.0) * np.exp(rng.normal(0, 0.22, n))
    nuclei = Nuclei(
        x, y, kind.astype(np.uint8), size * ratio**0.5, size / ratio**0.5, angle % np.pi, rng.random(n) < spotted, density,
        np.stack([rng.normal(0, 1, (n, 4)), rng.uniform(0, 2 * np.pi, (n, 4))], 2).astype(np.float32),
        rng.normal(0, 0.25, (n, 2)), rng.random((n, 2)),
    )
    return nuclei.take(rows)
