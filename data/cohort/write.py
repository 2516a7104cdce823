"""Write the synthetic cohort: slides, manifest, labelled patches and truth, byte for byte the same for the same configuration."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from histoscale.data.cohort import morphology as m
from histoscale.data.cohort.artefacts import draw_artefacts
from histoscale.data.cohort.patches import PatchesConfig, label_patches
from histoscale.data.cohort.plate import class_map
from histoscale.data.cohort.roles import SiteConfig, SlideSpec, draw_slides
from histoscale.data.cohort.scanner import site_scanner, slide_scanner
from histoscale.data.cohort.slide import VirtualSlide
from histoscale.data.cohort.tissue import MAP_UM, grow
from histoscale.data.cohort.truth import write_truth
from histoscale.data.journal import Journal
from histoscale.data.keys import key, unit
from histoscale.data.processes import follow, worker_context
from histoscale.data.spreadsheet import write_table


@dataclass(frozen=True)
class CohortConfig:
    """seed: of every draw. gap: distance between the classes (1.5 easy, 1, 0.6 hard). shift: distance of external sites (0
    none, 1.6 usual).
    rho: confounds the slide label with the site, 0 to 1. trap: share of the first training site's positives with a pen mark.
    panels, cases: slides a patient; panel_mm, case_mm: their [width, height]. prevalence: of tumour among cases.
    artefacts: factor on their usual rates."""

    seed: int
    gap: float
    shift: float
    rho: float
    trap: float
    sites: list[SiteConfig]
    panels: int
    cases: int
    panel_mm: list[float]
    case_mm: list[float]
    prevalence: float
    artefacts: float
    patches: PatchesConfig


MANIFEST = (
    "slide_id", "uri", "patient_id", "site", "cohort", "organ", "stain", "role", "kind", "tumour", "coin", "fine", "mimic",
    "stratum",
)  # fmt: skip


def slides_of(config: CohortConfig) -> list[SlideSpec]:
    """The slides that a configuration describes. Raises ValueError where its values are out of range."""
    for name, size in (("panel_mm", config.panel_mm), ("case_mm", config.case_mm)):
        if len(size) != 2 or min(size) < 0.1:
            raise ValueError(f"cohort.{name} is {size}: expected [width, height] in mm, each at least 0.1")
    return draw_slides(config.seed, config.sites, config.panels, config.cases, config.prevalence, config.rho)


def make_slide(spec: SlideSpec, config: CohortConfig, site: int | None = None) -> VirtualSlide:
    """One slide, ready to be drawn. site: show the same biology at another site (a twin); by default at its own."""
    own = spec.site if site is None else site
    place = config.sites[own]
    width_um, height_um = (1000 * v for v in (config.panel_mm if spec.kind == "panel" else config.case_mm))
    width, height = (int(v / place.mpp) // 16 * 16 for v in (width_um, height_um))
    classes = class_map(spec, height_um, width_um)
    nucleolus = None if spec.fine is None else (0.6 if spec.fine else 0.1)
    tissue = grow(classes, m.draw_law(config.seed, spec.patient), config.gap, spec.kind == "case", spec.key, nucleolus)
    trapped = own == 0 and bool(spec.tumour) and unit(key(spec.key, "cohort/trap")) < config.trap
    return VirtualSlide(
        width=width, height=height, mpp=place.mpp, objective=place.objective,
        device=f"SS{key(config.seed, 'cohort/device', own) % 10000:04d}",
        tissue=tissue, artefacts=draw_artefacts(spec.key, classes.shape, config.artefacts, trapped),
        scanner=slide_scanner(site_scanner(config.seed, own, config.shift if place.stranger else 1.0), spec.key),
    )


@dataclass(frozen=True)
class _Draw:
    """What a process needs to draw slides; called with one, it leaves its files and returns its pixels and labelled patches."""

    out: Path
    config: CohortConfig
    threads: int

    def __call__(self, spec: SlideSpec) -> tuple[int, list[dict[str, Any]]]:
        slide = make_slide(spec, self.config)
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(self.threads) as blocks:
            slide.write(self.out / "slides" / f"{spec.slide_id}.svs", blocks)
        write_truth(self.out / "truth" / spec.slide_id, slide)
        site = self.config.sites[spec.site].name
        return slide.width * slide.height, label_patches(spec, site, slide, self.config.patches)


def write_cohort(out: Path, config: CohortConfig, journal: Journal, workers: int | None = None) -> None:
    """Write slides/*.svs, manifest.csv, patches.parquet and truth/<slide_id>/ into `out`.

    workers: by default one a core of this process. Each is a process that draws a slide at a time; where slides are fewer, each
    draws several blocks of its slide at once. Raises ValueError for a configuration out of range, OSError when the disk refuses
    or a process dies.
    """
    out = Path(out)
    specs = slides_of(config)
    (out / "slides").mkdir(parents=True, exist_ok=True)
    workers = workers or len(os.sched_getaffinity(0))
    processes = max(1, min(workers, len(specs)))
    draw = _Draw(out, config, workers // processes)
    patches: list[dict[str, Any]] = []
    drawn = 0
    with journal.progress(len(specs), "drawing slides", "slides") as progress:
        for pixels, rows in _drawn(draw, specs, processes):
            patches += rows
            drawn += pixels
            progress.advance(1, megapixels=drawn / 1e6)
    names = ("slide_id", "patient_id", "site", "role", "task", "x", "y", "mpp", "size_px", "label")
    pq.write_table(pa.table({name: [row[name] for row in patches] for name in names}), out / "patches.parquet")
    write_table(out / "manifest.csv", MANIFEST, [_row(spec, config) for spec in specs])


def _drawn(draw: _Draw, specs: list[SlideSpec], processes: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """In the order of the slides."""
    if processes == 1:
        yield from map(draw, specs)
        return
    with ProcessPoolExecutor(processes, mp_context=worker_context(__name__), initializer=follow) as pool:
        try:
            yield from pool.map(draw, specs)
        except BrokenProcessPool as error:
            raise OSError("a process that draws slides died (out of memory?); the same command begins again") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _row(spec: SlideSpec, config: CohortConfig) -> dict[str, str]:
    """A manifest row; a label that does not apply is empty, resolution and scanner are left to the header."""
    def flag(value: bool | None) -> str:
        return "" if value is None else str(int(value))

    site = config.sites[spec.site]
    return {
        "slide_id": spec.slide_id, "uri": f"slides/{spec.slide_id}.svs", "patient_id": spec.patient_id, "site": site.name,
        "cohort": "external" if site.stranger else "internal", "organ": "synthetic", "stain": "H&E",
        "role": spec.role, "kind": spec.kind,
        "tumour": flag(spec.tumour), "coin": flag(spec.coin), "fine": flag(spec.fine),
        "mimic": flag(spec.mimic if spec.kind == "case" else None), "stratum": spec.stratum,
    }


def render_region(label: str, size_px: int, mpp: float, config: CohortConfig, patient: int, site: int, number: int) -> np.ndarray:
    """One region of a single class as uint8 [size_px, size_px, 3], without a file: for contact sheets, tests and trials.

    label: a name of `morphology.CLASSES`. The same (patient, label, number) under another site is its twin.
    """
    code, k = m.CLASSES.index(label), key(config.seed, "cohort/region", patient, m.CLASSES.index(label), number)
    cells = int(np.ceil(size_px * mpp / MAP_UM)) + 16
    tissue = grow(np.full((cells, cells), code, np.uint8), m.draw_law(config.seed, patient), config.gap, False, k)
    place = config.sites[site]
    scanner = slide_scanner(site_scanner(config.seed, site, config.shift if place.stranger else 1.0), k)
    slide = VirtualSlide(size_px, size_px, mpp, place.objective, "", tissue, draw_artefacts(k, (cells, cells), 0.0), scanner)
    corner = int(16 / mpp)
    return slide.pixels(corner, corner, size_px, size_px)
