"""What goes wrong on glass and in the scanner, each with its mask: pen, fold, defocus, bubble, dust, tear, stitching."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from histoscale.data.cohort.fields import generator, smooth_field
from histoscale.data.cohort.tissue import MAP_UM
from histoscale.data.keys import key

Array = np.ndarray
KINDS = ("pen", "fold", "defocus", "bubble", "dust", "tear", "stitching")  # bit i of the mask
RATES = (0.12, 0.15, 0.15, 0.07, 0.08, 0.08, 0.07)  # share of slides
_INKS = np.array([[0.18, 0.30, 0.75], [0.20, 0.60, 0.30], [0.16, 0.16, 0.18], [0.80, 0.20, 0.25]], np.float32)


@dataclass
class Artefacts:
    """mask uint8 [h, w]: bits of KINDS at MAP_UM. thickness [h, w]: factor on both densities. light [3, h, w]: factor on the
    light. defocus [h, w]: share of the blurred picture, of sigma `defocus_um`. plain: nothing to do."""

    mask: Array
    thickness: Array
    light: Array
    defocus: Array
    defocus_um: float

    @property
    def plain(self) -> bool:
        return not self.mask.any()


def draw_artefacts(k: int, shape: tuple[int, ...], rate: float, pen: bool = False) -> Artefacts:
    """rate: factor on the usual rates; pen: force a pen mark. shape: (rows, columns) of the map."""
    rng = generator(key(k, "cohort/artefacts"))
    height, width = shape
    found = dict(zip(KINDS, rng.random(len(KINDS)) < np.array(RATES) * rate, strict=True))
    found["pen"] |= pen
    result = Artefacts(
        np.zeros((height, width), np.uint8), np.ones((height, width), np.float32), np.ones((3, height, width), np.float32),
        np.zeros((height, width), np.float32), 0.0,
    )
    yy, xx = np.meshgrid(np.arange(height) * MAP_UM, np.arange(width) * MAP_UM, indexing="ij")
    size = np.hypot(height, width) * MAP_UM

    def stripe(half_um: float, wander_um: float) -> Array:
        """Distance inside a winding stripe across the slide, um, negative outside."""
        angle, y, x = rng.uniform(0, np.pi), rng.uniform(0.2, 0.8) * height * MAP_UM, rng.uniform(0.2, 0.8) * width * MAP_UM
        across = (yy - y) * np.cos(angle) - (xx - x) * np.sin(angle) + wander_um * smooth_field(rng, (height, width), MAP_UM, 150)
        along = (yy - y) * np.sin(angle) + (xx - x) * np.cos(angle)
        return np.minimum(half_um - np.abs(across), 0.3 * size * rng.uniform(0.4, 1) - np.abs(along))

    def disc(radius_um: float) -> Array:
        """Distance inside a disc, um, negative outside."""
        return radius_um - np.hypot(yy - rng.random() * height * MAP_UM, xx - rng.random() * width * MAP_UM)

    def note(kind: str, where: Array) -> None:
        result.mask[where] |= 1 << KINDS.index(kind)

    if found["pen"]:
        depth = stripe(rng.uniform(30, 60), 20)
        ink = _INKS[rng.integers(len(_INKS))][:, None, None]
        cover = np.clip(depth / 6, 0, 1).astype(np.float32)
        result.light *= 1 - cover * (1 - ink)
        note("pen", depth > 0)
    if found["fold"]:
        depth = stripe(rng.uniform(15, 40), 25)
        result.thickness *= 1 + 0.6 * np.clip(depth / 4, 0, 1).astype(np.float32)
        note("fold", depth > 0)
    if found["tear"]:
        depth = stripe(rng.uniform(6, 18), 30)
        result.thickness *= 1 - np.clip(depth / 3, 0, 1).astype(np.float32)
        note("tear", depth > 0)
    if found["bubble"]:
        depth = disc(rng.uniform(60, 140))
        rim = np.exp(-((depth - 5) ** 2) / 18).astype(np.float32)
        result.light *= (1 - 0.5 * rim) * (1 + 0.06 * (depth > 5))
        result.defocus[depth > 5], result.defocus_um = 1.0, 2.0
        note("bubble", depth > -4)
    if found["dust"]:
        for _ in range(int(rng.integers(3, 9))):
            depth = disc(rng.uniform(4, 12)) + 2 * smooth_field(rng, (height, width), MAP_UM, 8)
            result.light *= 1 - 0.75 * np.clip(depth / 3, 0, 1).astype(np.float32)
            note("dust", depth > 0)
    if found["defocus"]:
        depth = disc(rng.uniform(120, 260))
        share = np.clip(depth / 20, 0, 1).astype(np.float32)
        result.defocus, result.defocus_um = np.maximum(result.defocus, share), float(rng.uniform(1.5, 4))
        note("defocus", share > 0.05)
    if found["stitching"]:
        column = int(rng.uniform(0.2, 0.8) * width)
        result.light[:, :, column:] *= np.float32(1 + rng.choice([-1, 1]) * rng.uniform(0.03, 0.07))
        note("stitching", np.abs(xx - column * MAP_UM) < 8)
    result.defocus = gaussian_filter(result.defocus, 2.0) if result.defocus.any() else result.defocus
    return result
