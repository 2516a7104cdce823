"""Pixels of one slide to fit on: places in its tissue drawn by a fixed key, so that they depend on the slide alone."""

from dataclasses import dataclass

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.data.cells import Cells
from histoscale.data.keys import key
from histoscale.data.normalise.density import NotFitted
from histoscale.data.readers.pyramid import Damage, Reader
from histoscale.data.readers.scale import choose_scale, read_scaled
from histoscale.data.serving import tissue_of


@dataclass(frozen=True)
class SampleConfig:
    """patches: so many squares of patch_px at mpp (um/px), each with a share of tissue_fraction; a slide whose finest level is
    coarser than mpp gives that one. A level within mpp_tolerance is taken unscaled. pixels: at most so many, evenly taken."""

    mpp: float
    mpp_tolerance: float
    patches: int
    patch_px: int
    tissue_fraction: float
    pixels: int


def read_sample(catalog: Catalog, slide: int, reader: Reader, config: SampleConfig) -> np.ndarray:
    """uint8 [n, 3]; squares that touch an undecodable tile are left out. Raises NotFitted, StorageError, Missing, Changed."""
    mpps = catalog.level_mpps(slide)
    scale = choose_scale(mpps, max(config.mpp, min(mpps)), config.mpp_tolerance, 1.0)
    assert scale is not None  # the target is never finer than the finest level
    level = catalog.layout(slide).levels[scale.level]
    size = config.patch_px * scale.factor
    cells = Cells(tissue_of(catalog, slide), level.width, level.height, mpps[scale.level], size, config.tissue_fraction)
    if not cells.any():
        raise NotFitted(f"no square of {config.patch_px} px at {scale.mpp:.3g} um/px holds {config.tissue_fraction:.0%} tissue")
    found = []
    for i in range(config.patches):
        x, y, _ = cells.region(key(0, "normalise", i), 1, 1)
        damage: list[Damage] = []
        pixels = read_scaled(reader, scale, x, y, config.patch_px, config.patch_px, damage)
        if not damage:
            found.append(pixels.reshape(-1, 3))
    if not found:
        raise NotFitted(f"not one of {config.patches} squares of tissue could be decoded")
    pixels = np.concatenate(found)
    return pixels[:: -(-len(pixels) // config.pixels)]
