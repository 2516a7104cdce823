"""The same patches through other readers: OpenSlide, and tiffslide and wsistream where they are installed."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from PIL import Image

from histoscale.data.pixelfilter import passes
from histoscale.data.plan import SamplerConfig

Work = tuple[Callable[[], None], int]  # what to time, and how many patches it gives


@dataclass(frozen=True)
class Place:
    """A patch: slide, level, corner (level px), level pixels per output pixel, and what our reader saw there."""

    slide: int
    level: int
    x: int
    y: int
    factor: float
    pixels: np.ndarray


def open_peers(paths: list[Path], places: list[Place], sampler: SamplerConfig) -> dict[str, Work]:
    """By name; empty where OpenSlide does not read the slides. Handles are kept open, slides are opened before the clock runs."""
    try:
        handles = [openslide.OpenSlide(path) for path in paths]
    except openslide.OpenSlideError:
        return {}
    rule = replace(sampler.pixel_filter, kind="hsv")
    found: dict[str, Work] = {"openslide": (_single(handles, places, sampler.patch_px), len(places))}
    kept = sum(bool(passes([place.pixels], rule)[0]) for place in places)
    if kept:
        reading = _single(handles, places, sampler.patch_px, lambda patch: passes([patch], rule))
        found["openslide_filtered"] = (reading, kept)
    if find_spec("tiffslide"):
        warnings.filterwarnings("ignore", message="location=.* is out-of-bounds")  # at the edge of a level; once a read
        slides = [import_module("tiffslide").TiffSlide(path) for path in paths]
        found["tiffslide"] = (_single(slides, places, sampler.patch_px), len(places))
    if find_spec("wsistream"):
        found["wsistream"] = (_wsistream(paths, sampler, len(places)), len(places))
    return found


def _single(
    handles: list[Any], places: list[Place], patch_px: int, then: Callable[[np.ndarray], object] = lambda patch: None
) -> Callable[[], None]:
    """One read_region a patch, in level-0 coordinates as these interfaces want them; whole factors shrink by averaging, which is
    Pillow's fastest way."""

    def read() -> None:
        for place in places:
            handle, side = handles[place.slide], round(patch_px * place.factor)
            step = handle.level_downsamples[place.level]
            image = handle.read_region((round(place.x * step), round(place.y * step)), place.level, (side, side)).convert("RGB")
            if place.factor.is_integer():
                image = image.reduce(int(place.factor)) if place.factor > 1 else image
            else:
                image = image.resize((patch_px, patch_px), Image.Resampling.HAMMING)
            then(np.asarray(image))

    return read


def _wsistream(paths: list[Path], sampler: SamplerConfig, count: int) -> Callable[[], None]:
    """Its own pipeline on OpenSlide: its own tissue and places, as many patches, each slide opened once."""
    package = import_module("wsistream")
    pipeline = package.PatchPipeline(
        slide_paths=[str(path) for path in paths],
        backend=package.OpenSlideBackend(),
        tissue_detector=package.OtsuTissueDetector(),
        sampler=package.MultiMagnificationSampler(
            target_mpps=list(sampler.mpps),
            mpp_weights=[float(weight) for weight in sampler.weights],
            patch_size=sampler.patch_px,
            tissue_threshold=sampler.tissue_fraction,
        ),
        patches_per_slide=1 << 30,
        cycle=True,
        seed=0,
    )
    patches = iter(pipeline)
    next(patches)  # opens the slides

    def read() -> None:
        for _ in islice(patches, count):
            pass

    return read
