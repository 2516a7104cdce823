"""Reading patches: rates per core-second beside the decoder's limit and OpenSlide, in shuffled rounds of one run."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg

from histoscale.data.catalog import Catalog, open_catalog
from histoscale.data.cohort.write import write_cohort
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.keys import key, permutation
from histoscale.data.manifest import read_manifest
from histoscale.data.plan import Plan, Visit, target_name
from histoscale.data.readers.codec import decode_tile, jpegparts, with_tables
from histoscale.data.readers.pyramid import Canvas, Damage, Level, Reader
from histoscale.data.readers.region import touched
from histoscale.data.readers.scale import Scale, read_scaled
from histoscale.data.storage import Store
from histoscale.data.stream import Stream
from histoscale.data.visit import Opened, SlideSource
from histoscale.launch.bench_peers import Place, open_peers

if TYPE_CHECKING:
    from histoscale.launch.bench import Config


@dataclass(frozen=True)
class Rate:
    """Patches per core-second: median, lowest and highest over rounds."""

    median: float
    low: float
    high: float


def read(config: "Config", journal: Journal) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    store = Store(config.storage)
    catalog = open_catalog(config.catalog, store) if config.catalog else draw_slide(config, store, journal)
    methods = _methods(config, catalog, store)
    rates: dict[str, list[float]] = {name: [] for name in methods}
    stream = _OurStream(config, catalog, store)
    methods["stream"] = stream.window
    rates["stream"] = []
    names = list(methods)
    try:
        with journal.progress(config.rounds * len(names), "bench", "measurements") as progress:
            for number in range(config.rounds):
                for i in permutation(key(config.seed, "bench round", number), len(names)):
                    patches, seconds = methods[names[i]]()
                    rates[names[i]].append(patches / seconds)
                    progress.advance(1, method=names[i])
    finally:
        stream.close()
    found = {name: Rate(float(np.median(r)), min(r), max(r)) for name, r in rates.items()}
    ratios = {
        f"{one}/{other}": float(np.median(np.divide(rates[one], rates[other])))
        for one, other in (
            ("region", "openslide"), ("region", "area_limit"), ("single", "openslide"), ("single", "tile_limit"),
            ("visit", "openslide"), ("visit", "area_limit"), ("stream", "openslide_filtered"), ("stream", "visit"),
            ("region", "tiffslide"), ("region", "wsistream"),
        )
        if one in rates and other in rates
    }  # fmt: skip
    refused = 1 - stream.stream.stats()["data/accepted"]
    journal.say(_text(config, found, ratios, refused))
    return {
        "rates": {name: vars(rate) for name, rate in found.items()},
        "ratios": ratios,
        "filter_refused": refused,
        "jpeg_in_place": jpegparts is not None,
        "slides": len(catalog),
        "catalog": catalog.hash,
    }


def draw_slide(config: "Config", store: Store, journal: Journal) -> Catalog:
    """A synthetic slide and its catalog, in `out`; an earlier one is used again."""
    folder = journal.path("slide/manifest.csv").parent
    if not (folder / "catalog" / "catalog.json").exists():
        journal.say("bench: no catalog given, drawing a synthetic slide")
        write_cohort(folder, config.cohort, journal)
        (folder / "catalog").mkdir(exist_ok=True)
        slides = read_manifest(str(folder / "manifest.csv"), store)
        build_catalog(slides, store, config.tissue, folder / "catalog", 0, None, journal)
    return open_catalog(str(folder / "catalog"), store)


Asked = tuple[Reader, int, int, int, int, int, int, np.ndarray | None]


class _Traced:
    """A reader that notes which regions were asked for."""

    def __init__(self, reader: Reader, notes: list[Asked]) -> None:
        self.reader, self.layout, self.notes = reader, reader.layout, notes

    def region(
        self,
        level: int,
        x: int,
        y: int,
        width: int,
        height: int,
        damage: list[Damage] | None = None,
        reduce: int = 1,
        wanted: np.ndarray | None = None,
        canvas: Canvas | None = None,
    ) -> np.ndarray:
        self.notes.append((self.reader, level, x, y, width, height, reduce, wanted))
        return self.reader.region(level, x, y, width, height, damage, reduce, wanted, canvas)


class _TracedSource(SlideSource):
    """A source whose readers are traced."""

    notes: list[Asked]

    def open_slide(self, slide: int) -> Opened:
        opened = super().open_slide(slide)
        return Opened(_Traced(opened.reader, self.notes), opened.mpps, opened.tissue, self.sampler)


_LOOKS = 512  # places of a visit that are tried
_TURNS = 16  # visits for each region: slides too small for one are passed over


@dataclass(frozen=True)
class _Region:
    """A square of grid x grid cells beside one another, as a visit draws it; x, y: level px."""

    reader: Reader
    scale: Scale
    x: int
    y: int
    grid: int


def _regions(source: SlideSource, plan: Plan, count: int) -> list[_Region]:
    """Those of the first visits that have one. Raises ValueError with fewer than `count`."""
    visits = (plan.visit(slot, 0, turn) for turn in range(_TURNS) for slot in range(count))
    found = list(islice(filter(None, (_region(source, visit) for visit in visits)), count))
    if len(found) < count:
        grid, side = source.sampler.grid, source.sampler.grid * source.sampler.patch_px
        mpps = " or ".join(map(target_name, plan.targets))
        wanted = f"{grid} x {grid} patches, {side} px at {mpps} um/px, with tissue in their middle"
        raise ValueError(
            f"{len(found)} of {_TURNS * count} visits to {len(source.catalog)} slides have room for {wanted}, and visits={count} "
            f"regions are measured: give a smaller sampler.grid=, or larger slides"
        )
    return found


def _region(source: SlideSource, visit: Visit) -> _Region | None:
    """The first place of a visit whose region lies inside the level with tissue in its middle, as single patches have: glass is
    quick to decode. Its corners may be glass. None where the slide has none."""
    opened, grid = source.open_slide(visit.slide), source.sampler.grid
    serving = opened.at(visit.mpp)
    sides = (serving.cells.width, serving.cells.height)
    half = slice((grid - 1) // 2, grid // 2 + 1)
    for i in range(_LOOKS):
        x, y, _ = serving.cells.region(key(visit.key, "region", i), grid, grid**2)
        corner = [max(0, min(at, int(side - grid * serving.cells.size))) for at, side in zip((x, y), sides, strict=True)]
        fits = serving.cells.fits(np.array(corner[:1]), np.array(corner[1:]), grid)[0]
        if fits[half, half].all():
            x, y = corner
            return _Region(opened.reader, serving.scale, x * serving.reduce, y * serving.reduce, grid)
    return None


def _cut(region: _Region, side: int) -> list[np.ndarray]:
    """Its patches, uint8 [S, S, 3] each, views of one array."""
    whole = region.grid * side
    image = read_scaled(region.reader, region.scale, region.x, region.y, whole, whole)
    corners = range(0, whole, side)
    return [image[top : top + side, left : left + side] for top in corners for left in corners]


def _methods(config: "Config", catalog: Catalog, store: Store) -> dict[str, Callable[[], tuple[int, float]]]:
    """What is measured, by name: each call reads the same patches again and returns patches and CPU seconds."""
    sampler = replace(config.sampler, pixel_filter=replace(config.sampler.pixel_filter, kind="none"))
    single = replace(sampler, grid=1)
    patches = config.visits * sampler.grid**2
    plans = {grid.grid: (Plan(config.seed, patches, grid, source.table()), source)
             for grid in (sampler, single) for source in (SlideSource(catalog, store, grid),)}  # fmt: skip

    def ours(grid: int) -> Callable[[], tuple[int, float]]:
        plan, source = plans[grid]
        visits = [plan.visit(slot, 0, 0) for slot in range(patches // grid**2)]

        def read() -> None:
            for visit in visits:
                source.read(visit)

        return _timed(read, patches)

    regions = _regions(plans[sampler.grid][1], plans[sampler.grid][0], config.visits)
    methods = {
        "region": _timed(lambda: [_cut(region, sampler.patch_px) for region in regions], patches),
        "visit": ours(sampler.grid),
        "single": ours(1),
    }
    notes: list[Asked] = []
    for region in regions:
        _cut(replace(region, reader=_Traced(region.reader, notes)), sampler.patch_px)
    tiles = _tiles(notes)
    if tiles is not None:  # what decoding costs if not one pixel beside the patches were decoded
        needed = sampler.grid**2 * sum((sampler.patch_px * region.scale.factor) ** 2 for region in regions)
        decoded = sum(level.tile_width * level.tile_height for level, _, _ in tiles)
        methods["area_limit"] = _timed(_decoder(tiles), patches * decoded / needed)
    traced = _TracedSource(catalog, store, single)
    traced.notes = []
    for slot in range(patches):
        traced.read(plans[1][0].visit(slot, 0, 0))
    tiles = _tiles(traced.notes)
    if tiles is not None:  # whole tiles, at full scale
        methods["tile_limit"] = _timed(_decoder([(level, data, 1) for level, data, _ in tiles]), patches)
    plan, source = plans[1]
    visits = [plan.visit(slot, 0, 0) for slot in range(patches)]
    places = []
    for visit in visits:
        read, scale = source.read(visit), source.open_slide(visit.slide).at(visit.mpp).scale
        places.append(Place(visit.slide, scale.level, int(read.x[0]), int(read.y[0]), scale.factor, read.pixels[0]))
    peers = open_peers([store.local(slide.uri) for slide in catalog.slides], places, single)
    methods |= {name: _timed(work, count) for name, (work, count) in peers.items()}
    return methods


class _OurStream:
    """The whole stream behind the HSV filter, in worker processes and handed over; CPU time of all of them together."""

    def __init__(self, config: "Config", catalog: Catalog, store: Store) -> None:
        filtered = replace(config.sampler.pixel_filter, kind="hsv")
        sampler = replace(config.sampler, pixel_filter=filtered)
        source = SlideSource(catalog, store, sampler)
        self.stream = Stream(Plan(config.seed, config.batch, sampler, source.table()), source, config.stream)
        self.round = sampler.grid**2 * sampler.lanes_per_slot  # in so many steps each lane reads one visit
        self.batch = config.batch
        for _ in range(self.round):  # all lanes are open from here on
            next(self.stream)

    def window(self) -> tuple[int, float]:
        before = self._cpu_s()
        for _ in range(self.round):
            next(self.stream)
        return self.round * self.batch, self._cpu_s() - before

    def _cpu_s(self) -> float:
        """CPU time of this process and the workers (Linux's clock of another process: bits of its id, inverted)."""
        return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in self.stream.worker_pids())

    def close(self) -> None:
        self.stream.close()


def _timed(work: Callable[[], object], patches: float) -> Callable[[], tuple[int, float]]:
    def measure() -> tuple[int, float]:
        start = time.process_time()
        work()
        return int(patches), time.process_time() - start

    return measure


def _tiles(notes: list[Asked]) -> list[tuple[Level, bytes, int]] | None:
    """The encoded tiles that the regions touched, as often as they did, and the scale they were decoded at; None where tiles are
    not read by range."""
    found = []
    for reader, number, x, y, width, height, reduce, wanted in notes:
        if reader.layout.kind != "tiff":
            return None
        level = reader.layout.levels[number]
        numbers = touched(level, x, y, width, height, reduce, wanted).numbers.tolist()
        spans = [(int(level.offsets[t]), int(level.offsets[t] + level.counts[t])) for t in numbers if level.counts[t]]
        found += [(level, data, reduce) for data in reader.store.ranges(reader.uri, spans)]  # type: ignore[attr-defined]
    return found


def _decoder(tiles: list[tuple[Level, bytes, int]]) -> Callable[[], None]:
    """Decode the tiles from memory, and nothing else."""
    ready = []
    for level, data, reduce in tiles:
        whole = with_tables(data, level.tables, level.colour) if level.compression == "jpeg" else data
        ready.append((level, whole, reduce, level.tile_height // reduce, level.tile_width // reduce))

    def decode() -> None:
        for level, data, reduce, height, width in ready:
            if level.compression != "jpeg":
                decode_tile(data, level, reduce)
            elif reduce == 1:
                simplejpeg.decode_jpeg(data, "RGB")
            else:
                simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=1)

    return decode


def _text(config: "Config", rates: dict[str, Rate], ratios: dict[str, float], refused: float) -> str:
    grid = config.sampler.grid
    words = {
        "region": f"{grid} x {grid} patches at a time, reading alone",
        "visit": f"visits of {grid} x {grid} under the tissue rule",
        "single": "patches one by one, reading alone",
        "stream": f"the whole stream: filter, {config.stream.workers} workers, hand-over",
        "openslide": "OpenSlide, kept handle, single patches",
        "openslide_filtered": "OpenSlide behind the same filter",
        "tiffslide": "tiffslide, kept handle, single patches",
        "wsistream": "wsistream, its own pipeline (it does not rescale)",
        "area_limit": "decoding the same tiles, no pixel too many",
        "tile_limit": "decoding the whole tiles of single patches",
    }
    lines = [f"patches of {config.sampler.patch_px} px per core-second: median [lowest, highest] of {config.rounds} rounds"]
    for name, rate in sorted(rates.items(), key=lambda item: -item[1].median):
        lines.append(f"  {words[name]:<55} {rate.median:8.0f} [{rate.low:.0f}, {rate.high:.0f}]")
    lines += [f"  {words[a]} / {words[b]}: {value:.2f}" for (a, b), value in ((n.split("/"), v) for n, v in ratios.items())]
    lines.append(f"  JPEG: {'in place' if jpegparts else 'whole tiles, copied (jpegparts is not compiled)'}")
    lines.append(f"  the pixel filter refused {refused:.1%} of the patches of the stream; {os.cpu_count()} cores")
    return "\n".join(lines)
