"""How one slide serves one magnification: the level that is read, how it is shrunk, and where patches may lie on it."""

from collections.abc import Sequence
from dataclasses import dataclass

from histoscale.data.catalog import Catalog
from histoscale.data.cells import Cells, Tissue
from histoscale.data.plan import SamplerConfig
from histoscale.data.readers.pyramid import Level
from histoscale.data.readers.scale import Scale, choose_scale, reduction


@dataclass(frozen=True)
class Serving:
    """cells: on the level averaged over squares of `reduce` pixels, so that each place is one that decodes at reduced scale."""

    scale: Scale
    reduce: int
    cells: Cells


def tissue_of(catalog: Catalog, slide: int) -> Tissue:
    """Where a slide has tissue."""
    return Tissue(catalog.bitmap(slide), catalog.mask_mpp(slide))


def serve(
    levels: Sequence[Level], mpps: Sequence[float], tissue: Tissue, sampler: SamplerConfig, mpp: float
) -> Serving | None:
    """How a slide with these levels (`mpps`: um/px of each) serves `mpp`; None where no level is near or fine enough."""
    scale = choose_scale(mpps, mpp, sampler.mpp_tolerance, sampler.max_upsample)
    if scale is None:
        return None
    level = levels[scale.level]
    reduce = reduction(scale, level)
    size, pitch = sampler.patch_px * scale.factor / reduce, mpps[scale.level] * reduce
    cells = Cells(tissue, level.width // reduce, level.height // reduce, pitch, size, sampler.tissue_fraction)
    return Serving(scale, reduce, cells)
