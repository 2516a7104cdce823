"""Where tissue is, at low resolution: saturation against Otsu's threshold between absolute bounds, or fixed bounds of colour."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from histoscale.data.pixelfilter import hsv

_BINS = 256


class NoTissue(ValueError):
    """The slide shows no tissue, or no bright-field image."""


@dataclass(frozen=True)
class TissueConfig:
    """mpp: µm per mask pixel that is wanted. kind: otsu: saturation above Otsu's threshold of the slide itself, kept between
    min_saturation and max_saturation (HSV, 0-1); hsv: pixels within the bounds hue, saturation and value (lowest and highest, in
    OpenCV's 8-bit units), the same for every slide, which leaves out pen and dark edges (and what is red as blood).

    black: HSV value (0-1) below which there is no light. min_light: darkest channel (0-1) that the brightest tenth must reach.
    close_um: gaps that are bridged; min_area_um2, max_hole_um2: smaller islands and holes vanish; min_tissue_um2: less is none.
    """

    mpp: float
    kind: str
    min_saturation: float
    max_saturation: float
    hue: list[int]
    saturation: list[int]
    value: list[int]
    black: float
    min_light: float
    close_um: float
    min_area_um2: float
    max_hole_um2: float
    min_tissue_um2: float


def tissue_mask(thumbnail: np.ndarray, mpp: float, config: TissueConfig) -> np.ndarray:
    """bool [h, w] of a uint8 [h, w, 3] thumbnail at `mpp` µm per pixel.

    Raises NoTissue for blank glass and for dark-background images (fluorescence), ValueError on an unknown kind.
    """
    if config.kind not in ("otsu", "hsv"):
        raise ValueError(f"tissue.kind is {config.kind!r}: expected otsu or hsv")
    # One pixel of smoothing: noise of dark or compressed glass has saturation of its own.
    smooth = np.stack([ndimage.gaussian_filter(thumbnail[..., i].astype(np.float32), 1.0) for i in range(3)], -1) / 255
    high, low = smooth.max(-1), smooth.min(-1)
    lit = high >= config.black
    if not lit.any() or np.quantile(low[lit], 0.9) < config.min_light:
        raise NoTissue("no bright-field tissue: the image is dark where transmitted light should be white (fluorescence?)")
    if config.kind == "otsu":
        saturation = np.where(lit, (high - low) / np.maximum(high, 1e-6), 0)
        found = saturation > min(max(otsu(saturation[lit]), config.min_saturation), config.max_saturation)
    else:
        found = lit.copy()
        for channel, (least, most) in zip(
            hsv(np.rint(smooth * 255).astype(np.uint8)), (config.hue, config.saturation, config.value), strict=True
        ):
            found &= (least <= channel) & (channel <= most)
    mask = _clean(found, mpp, config)
    area = float(mask.sum()) * mpp**2
    if area < config.min_tissue_um2:
        raise NoTissue(f"no tissue: {area / 1e6:.3f} mm² found, at least {config.min_tissue_um2 / 1e6:g} mm² expected")
    return mask


def otsu(values: np.ndarray) -> float:
    """The threshold in [0, 1] that best separates two classes of values (Otsu 1979, doi 10.1109/TSMC.1979.4310076)."""
    counts, edges = np.histogram(values, _BINS, (0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()
    above = below[-1] - below
    sums = (counts * centres).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1 + int(np.nan_to_num(between).argmax())])


def _clean(mask: np.ndarray, mpp: float, config: TissueConfig) -> np.ndarray:
    reach = max(1, round(config.close_um / 2 / mpp))
    disc = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= reach
    padded = np.pad(mask, reach, mode="edge")  # closing must not eat the border of a region that is all tissue
    closed = ndimage.binary_closing(padded, disc)[reach:-reach, reach:-reach]
    kept = _without_small(closed, config.min_area_um2 / mpp**2)
    return ~_without_small(~kept, config.max_hole_um2 / mpp**2)


def _without_small(mask: np.ndarray, pixels: float) -> np.ndarray:
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    keep = sizes >= math.ceil(pixels)
    keep[0] = False
    return keep[labels]
