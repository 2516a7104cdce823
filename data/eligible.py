"""Which slide can serve which magnification: what the plan must know before the first patch is read."""

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.data.plan import SamplerConfig, SlideTable, targets
from histoscale.data.readers.pyramid import REDUCTIONS
from histoscale.data.serving import serve, tissue_of
from histoscale.data.windows import decide

_NAMED = 1000  # slides that can serve nothing, of which it is said what they could serve


def slide_table(catalog: Catalog, sampler: SamplerConfig) -> tuple[SlideTable, list[tuple[str, str]]]:
    """Slides, tissue areas, and which slide can serve which target: a level is near or fine enough, and one cell fits, at both
    of its ends.

    With it the slides that can serve none: id and why.
    """
    count, ends = len(catalog), np.array(targets(sampler)).reshape(-1, 2)
    wanted, place = np.unique(ends, return_inverse=True)
    at = serves(catalog, np.repeat(np.arange(count), len(wanted)), np.tile(wanted, count), sampler).reshape(count, -1)
    eligible = np.all(at[:, place.reshape(ends.shape)], axis=2)
    slide_ids = list(catalog.slide_ids)
    table = SlideTable(
        slide_ids=slide_ids,
        patients=[patient or slide for patient, slide in zip(catalog.texts("patient_id"), slide_ids, strict=True)],
        organs=[organ or "" for organ in catalog.texts("organ")],
        sites=[site or "" for site in catalog.texts("site")],
        cohorts=[cohort or "" for cohort in catalog.texts("cohort")],
        area=catalog.numbers("tissue_px") * catalog.numbers("mask_mpp") ** 2 / 1e6,
        eligible=eligible,
    )
    useless = np.flatnonzero(~np.any(eligible, axis=1)).tolist()
    return table, [(slide_ids[row], _instead(catalog, row, sampler, i < _NAMED)) for i, row in enumerate(useless)]


def serves(catalog: Catalog, rows: np.ndarray, mpps: np.ndarray, sampler: SamplerConfig) -> np.ndarray:
    """Whether the slide rows[i] can serve mpps[i] (um/px): bool [n], as `serve` and `Cells.any` have it.

    Nearly all is decided from the largest tissue in square windows, which the catalog holds; else the mask is asked.
    """
    own = catalog.numbers("mpp")[:, None] * catalog.levels("downsample")
    level, factor, unclear = _scales(own[rows], mpps, sampler.mpp_tolerance, sampler.max_upsample)
    there = level >= 0
    level = np.maximum(level, 0)
    width, height = (catalog.levels(name)[rows, level] for name in ("width", "height"))
    mask_mpp = catalog.numbers("mask_mpp")[rows]
    pitch, size = own[rows, level] / mask_mpp, sampler.patch_px * factor  # mask px a level px; level px a patch
    reduce = np.clip(np.floor(factor), 1, max(REDUCTIONS))  # corners are multiples of so many level px, or of fewer
    overhang = sum(
        np.maximum(catalog.numbers(mask)[rows] - side * pitch, 0)
        for mask, side in (("mask_width", width), ("mask_height", height))
    )
    yes, no = decide(catalog.windows()[rows], size * pitch, sampler.tissue_fraction, reduce * pitch, overhang)
    spare = np.minimum(width, height) - size
    no |= spare < -0.01
    yes &= spare >= reduce  # a level that is cut to whole squares may be so much smaller
    found = there & yes & ~no
    for i in np.flatnonzero(unclear | (there & ~yes & ~no)).tolist():
        found[i] = _asked(catalog, int(rows[i]), float(mpps[i]), sampler)
    return found


def _scales(
    own: np.ndarray, wanted: np.ndarray, tolerance: float, max_upsample: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`choose_scale` of many slides: level (-1: none) and factor [n] each, and bool [n]: too close to call in another arithmetic.

    own: um/px of the levels, 0 where there is none [n, levels]. wanted: um/px [n].
    """
    rows = np.arange(len(own))
    level, factor = np.full(len(own), -1), np.ones(len(own))
    unclear = np.zeros(len(own), bool)
    there = own > 0
    with np.errstate(divide="ignore"):
        for whole in (1, *reversed(REDUCTIONS)):
            away = np.where(there, np.abs(np.log(own * whole / wanted[:, None])), np.inf)
            near = away.argmin(axis=1)
            off = np.abs(own[rows, near] * whole / wanted - 1)
            hit = (level < 0) & (off <= tolerance)
            level[hit], factor[hit] = near[hit], whole
            second = np.partition(away, 1, axis=1)[:, 1] if away.shape[1] > 1 else np.inf
            unclear |= hit & (second - away[rows, near] < 1e-9)
            unclear |= np.abs(off - tolerance) < 1e-9
    finer = there & (own < wanted[:, None])
    coarsest = np.where(finer, own, 0).argmax(axis=1)
    finest = np.where(there, own, np.inf).argmin(axis=1)
    other = np.where(finer.any(axis=1), coarsest, finest)
    shrunk = wanted / own[rows, other]
    rest = (level < 0) & (shrunk * max_upsample >= 1)
    level[rest], factor[rest] = other[rest], shrunk[rest]
    return level, factor, unclear


def _asked(catalog: Catalog, row: int, mpp: float, sampler: SamplerConfig) -> bool:
    found = serve(catalog.layout(row).levels, catalog.level_mpps(row), tissue_of(catalog, row), sampler, mpp)
    return found is not None and found.cells.any()


def _instead(catalog: Catalog, row: int, sampler: SamplerConfig, named: bool) -> str:
    """Why a slide serves none of the magnifications, and which of its own it could serve."""
    own = np.array(catalog.level_mpps(row))
    wanted = ", ".join(f"{mpp:g}" for mpp in sampler.mpps)
    why = f"its finest level has {own.min():.3g} um/px: it cannot serve {wanted}"
    if not named:
        return why
    could = ", ".join(f"{mpp:.3g}" for mpp in own if _asked(catalog, row, float(mpp), sampler))
    return f"{why}; it could serve {could or 'none'}"
