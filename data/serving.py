"""How one slide serves one magnification: the level that is read, how it is shrunk, and where patches may lie on it."""

from histoscale.data.catalog import Catalog
from histoscale.data.cells import Cells, Tissue
from histoscale.data.plan import SamplerConfig
from histoscale.data.readers.scale import Scale, choose_scale


def tissue_of(catalog: Catalog, slide: int) -> Tissue:
    """The integral image of a slide's mask."""
    return Tissue(catalog.mask(slide), catalog.mask_mpp(slide))


def serve(catalog: Catalog, slide: int, tissue: Tissue, sampler: SamplerConfig, mpp: float) -> tuple[Scale, Cells] | None:
    """Scale and cells of a slide at `mpp` (um/px); None where no level is near or fine enough."""
    mpps = catalog.level_mpps(slide)
    scale = choose_scale(mpps, mpp, sampler.mpp_tolerance, sampler.max_upsample)
    if scale is None:
        return None
    level = catalog.layout(slide).levels[scale.level]
    size = sampler.patch_px * scale.factor
    return scale, Cells(tissue, level.width, level.height, mpps[scale.level], size, sampler.tissue_fraction)
