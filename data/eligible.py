"""Which slide can serve which magnification: what the plan must know before the first patch is read."""

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.data.cells import Tissue
from histoscale.data.plan import SamplerConfig, SlideTable, targets
from histoscale.data.serving import serve, tissue_of


def slide_table(catalog: Catalog, sampler: SamplerConfig) -> tuple[SlideTable, list[tuple[str, str]]]:
    """Slides, tissue areas, and which slide can serve which target: a level is near or fine enough, and one cell fits, at both
    of its ends.

    With it the slides that can serve none: id and why.
    """
    slides = catalog.slides
    eligible = np.zeros((len(slides), len(sampler.weights)), bool)
    area = np.zeros(len(slides))
    ineligible = []
    for row, slide in enumerate(slides):
        tissue = tissue_of(catalog, row)
        area[row] = tissue.integral[-1, -1] * tissue.mpp**2 / 1e6
        eligible[row] = [all(_serves(catalog, row, tissue, sampler, mpp) for mpp in {*ends}) for ends in targets(sampler)]
        if not eligible[row].any():
            ineligible.append((slide.slide_id, _instead(catalog, row, tissue, sampler)))
    table = SlideTable(
        slide_ids=[slide.slide_id for slide in slides],
        patients=[slide.patient_id or slide.slide_id for slide in slides],
        organs=[slide.organ or "" for slide in slides],
        sites=[slide.site or "" for slide in slides],
        cohorts=[slide.cohort or "" for slide in slides],
        area=area,
        eligible=eligible,
    )
    return table, ineligible


def _serves(catalog: Catalog, slide: int, tissue: Tissue, sampler: SamplerConfig, mpp: float) -> bool:
    found = serve(catalog.layout(slide).levels, catalog.level_mpps(slide), tissue, sampler, mpp)
    return found is not None and found.cells.any()


def _instead(catalog: Catalog, slide: int, tissue: Tissue, sampler: SamplerConfig) -> str:
    """Why a slide serves none of the magnifications, and which of its own it could serve."""
    own = catalog.level_mpps(slide)
    could = ", ".join(f"{mpp:.3g}" for mpp in own if _serves(catalog, slide, tissue, sampler, mpp))
    wanted = ", ".join(f"{mpp:g}" for mpp in sampler.mpps)
    return f"its finest level has {min(own):.3g} um/px: it cannot serve {wanted}; it could serve {could or 'none'}"
