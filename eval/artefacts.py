"""Pen, folds, blur and glass, tile by tile from the pixels: what a slide model must not be looking at.

No detector is trained. Ink is told by hues that haematoxylin and eosin do not have; blur and folds by comparison with the other
tiles of the same slide, so that stain and scanner cancel. How far each can be trusted stands in `RELIABILITY`.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from histoscale.data.readers.pyramid import Reader, level_mpps
from histoscale.data.readers.scale import choose_scale, read_scaled

KINDS = ("pen", "fold", "blur", "glass")
# What is looked for; of the tiles that are half covered, the share that is found, and of clean tiles the share that is flagged:
# measured on the synthetic cohort by tests/validate_artefacts.py (tests/records/artefacts.md). None: by definition.
RELIABILITY: dict[str, tuple[str, float | None, float | None]] = {
    "pen": ("ink of hues that the dyes do not have", 0.99, 0.0),
    "fold": ("denser than the slide's tissue, in pale and in dark parts", 0.54, 0.019),
    "blur": ("softer than the slide's own sharp tiles", 0.80, 0.010),
    "glass": ("more than half of it is glass", None, None),
}
_FAINT = 0.12  # optical density below which a pixel is glass
_FINE_UM, _COARSE_UM = 0.8, (1.6, 3.2)  # bands: the one that blur empties, the one that it leaves
_NEAR_UM = 4.0  # contrast is that of so much around a pixel


@dataclass(frozen=True)
class ArtefactConfig:
    """mpp: that tiles are looked at. pen, glass: least share of a tile's pixels. blur: a tile whose fine detail, relative to its
    coarse, falls below this share of the slide's sharp tiles. fold: a tile so many times as dense as the slide's median, in its
    pale and in its dark parts alike."""

    mpp: float
    pen: float
    fold: float
    blur: float
    glass: float

    def __post_init__(self) -> None:
        if not (0 < self.pen < 1 and 0 < self.glass < 1 and 0 < self.blur < 1 < self.fold):
            given = f"pen {self.pen}, glass {self.glass}, blur {self.blur}, fold {self.fold}"
            raise ValueError(f"artefacts has {given}: expected shares between 0 and 1, and fold above 1")


@dataclass(frozen=True)
class Optics:
    """What pixels say of each tile, float64 [n] each. glass, pen: shares of its pixels. sharpness: fine over coarse detail.
    density: of its pale and its dark parts, optical density. read: false where a tile could not be read."""

    glass: np.ndarray
    pen: np.ndarray
    sharpness: np.ndarray
    density: np.ndarray
    read: np.ndarray


def white_point(picture: np.ndarray) -> np.ndarray:
    """float64 [3]: the glass of a whole-slide picture uint8 [h, w, 3]; between 200 and 255, for pictures without any."""
    return np.quantile(picture.reshape(-1, 3), 0.95, axis=0).clip(200, 255)


def look(pixels: np.ndarray, white: np.ndarray, mpp: float) -> tuple[float, float, float, float]:
    """glass, pen, sharpness and density of one tile, uint8 [h, w, 3] at mpp (µm a pixel)."""
    density = -np.log((pixels.astype(np.float32) + 1) / (white + 1).astype(np.float32))
    red, green, blue = density[..., 0], density[..., 1], density[..., 2]
    tissue = density.max(2) >= _FAINT
    # Both dyes absorb green most. Blue, green and black ink absorb red as much or more, red ink blue nearly as much as green.
    cold = (red > green + 0.1) & (red > 0.3)
    black = (density.min(2) > 1.0) & (density.max(2) < 1.6 * density.min(2))
    warm = (blue > 0.7 * green) & (green > 0.8) & (red < 0.45 * green)
    sharpness = _sharpness(density.mean(2), tissue, mpp)
    inside = density[tissue]
    dense = float(np.sqrt(np.quantile(inside[:, 1], 0.5) * max(np.quantile(inside[:, 2], 0.97), 0.0))) if len(inside) else 0.0
    return float(1 - tissue.mean()), float((cold | black | warm).mean()), sharpness, dense


def _sharpness(grey: np.ndarray, tissue: np.ndarray, mpp: float) -> float:
    """The median over tissue pixels of fine over coarse contrast nearby: half a tile may be sharp and it is still blurred."""
    if not tissue.any():
        return 0.0
    fine, middle, coarse, near = (um / mpp for um in (_FINE_UM, *_COARSE_UM, _NEAR_UM))
    smooth = gaussian_filter(grey, middle)
    high, low = grey - gaussian_filter(grey, fine), smooth - gaussian_filter(grey, coarse)
    ratio = gaussian_filter(high**2, near) / np.maximum(gaussian_filter(low**2, near), 1e-12)
    return float(np.sqrt(np.median(ratio[tissue])))


def read_optics(
    reader: Reader, coords: np.ndarray, size_px: int, mpp: float, white: np.ndarray, config: ArtefactConfig, threads: int
) -> Optics:
    """Look at the tiles [n, 2] (level-0 corners) of `size_px` level-0 px; mpp: of level 0. threads: tiles read at once. Raises
    what the reader raises, except for a tile whose bytes are damaged: it is not `read`."""
    scale = choose_scale(level_mpps(reader.layout.levels, mpp), max(config.mpp, mpp), 0.1, 1.0)
    assert scale is not None  # never finer than level 0
    downsample = reader.layout.levels[scale.level].downsample
    side = max(8, round(size_px * mpp / scale.mpp))

    def one(corner: np.ndarray) -> tuple[float, ...]:
        x, y = (round(value / downsample) for value in corner.tolist())
        damage: list = []
        pixels = read_scaled(reader, scale, x, y, side, side, damage)
        return (0.0, 0.0, 0.0, 0.0, 0.0) if damage else (*look(pixels, white, scale.mpp), 1.0)

    with ThreadPoolExecutor(threads) as pool:
        seen = np.array(list(pool.map(one, coords)), np.float64).reshape(-1, 5)
    glass, pen, sharpness, density, read = seen.T
    return Optics(glass, pen, sharpness, density, read > 0)


def judge(optics: Optics, reference: Sequence[int] | np.ndarray, config: ArtefactConfig) -> dict[str, np.ndarray]:
    """kind -> bool [n]. reference: rows of a fair sample of the slide's tiles, which blur and folds are compared with."""
    glass = optics.read & (optics.glass > config.glass)
    pen = optics.read & (optics.pen > config.pen)
    solid = optics.read & ~glass & ~pen
    rows = np.asarray(reference)[solid[reference]]
    if len(rows) == 0:
        nothing = np.zeros(len(glass), bool)
        return {"pen": pen, "fold": nothing, "blur": nothing, "glass": glass}
    sharp, dense = np.quantile(optics.sharpness[rows], 0.75), np.median(optics.density[rows])
    fold = solid & (optics.density > config.fold * dense)
    blur = solid & (optics.sharpness < config.blur * sharp)
    return {"pen": pen, "fold": fold, "blur": blur, "glass": glass}
