"""A catalog of a hundred thousand slides: how fast it opens, what it weighs in memory, and what planning costs beside reading.

The slides are simulated (a few hundred distinct ones under many ids); the tiles that they point to are real JPEG in one file that
all of them share, so that visits are read and decoded for real: where planning is compared with reading, and in the processes
whose memory is watched.
"""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from scipy import ndimage

from histoscale.data.catalog import open_catalog
from histoscale.data.journal import Journal, write_atomic
from histoscale.data.keys import key
from histoscale.data.manifest import Slide
from histoscale.data.merge import write_catalog
from histoscale.data.parts import Entry, Known, Row, row_of, slide_columns
from histoscale.data.plan import Plan, Visit
from histoscale.data.processes import settle, worker_context
from histoscale.data.readers.pyramid import Layout, Level
from histoscale.data.storage import Fingerprint, Store
from histoscale.data.visit import SlideSource
from histoscale.launch.footprint import memory_bytes

if TYPE_CHECKING:
    from histoscale.launch.bench import Config

_TILE = 256
_DOWNSAMPLES = (1, 4, 16, 32)
_BATCH = 64  # slots of the plan


@dataclass(frozen=True)
class ScaleConfig:
    """slides: in the simulated catalog, distinct: of them different. visits: read by `workers` processes while memory is
    watched. read_visits: read and decoded for the share of planning."""

    slides: int
    distinct: int
    visits: int
    read_visits: int
    workers: int


def catalog(config: "Config", journal: Journal) -> dict[str, Any]:
    """Measure, print, and return the numbers."""
    scale, store = config.catalog_scale, Store(config.storage)
    folder = journal.path("catalog/x").parent
    simulate(folder, config, journal)
    size = sum(path.stat().st_size for path in folder.glob("data-*/*"))
    opening = []
    for _ in range(config.rounds):
        start = time.perf_counter()
        source = SlideSource(open_catalog(str(folder), store), store, config.sampler)
        opened = time.perf_counter()
        table = source.table()
        opening.append((time.perf_counter() - start, opened - start))
    start = time.perf_counter()
    plan = Plan(config.seed, _BATCH, config.sampler, table)
    planned = time.perf_counter() - start
    memory = _memory(plan, source, scale, journal)  # before this process reads visits itself, and keeps what it opened
    shares = _planning(plan, source, scale.read_visits, journal)
    found = {
        "slides": len(table.slide_ids),
        "bytes_a_slide": size / len(table.slide_ids),
        "open_and_table_s": float(np.median([total for total, _ in opening])),
        "open_s": float(np.median([first for _, first in opening])),
        "plan_s": planned,
        "ineligible": len(source.ineligible),
        **shares,
        **memory,
    }
    journal.say(_text(found, scale))
    return found


def simulate(folder: Path, config: "Config", journal: Journal) -> None:
    """A catalog of config.catalog_scale.slides in `folder`, beside the file of their tiles; an earlier one is used again."""
    scale, mark = config.catalog_scale, folder / "simulated.json"
    words = json.dumps([scale.slides, scale.distinct, config.seed])
    if mark.exists() and mark.read_text() == words:
        return
    journal.say(f"bench: simulating a catalog of {scale.slides:,} slides")
    draw = np.random.default_rng(config.seed)
    counts = _write_tiles(folder / "tiles.jpg", draw)
    distinct = [row_of(_slide(i, folder / "tiles.jpg", counts, draw)) for i in range(scale.distinct)]
    write_catalog(folder, _rows(distinct, scale.slides), config.tissue)
    write_atomic(mark, words)


def _rows(distinct: list[Row], count: int) -> Iterator[Row]:
    """The distinct slides in turn under `count` ids of their own, three slides a patient."""
    for i in range(count):
        row = distinct[i % len(distinct)]
        organ, site = f"organ {i // 3 % 25}", f"site {i // 3 % 40}"
        name = f"TCGA-{i:06d}-01Z-00-DX1.{hashlib.md5(str(i).encode()).hexdigest()}"
        slide = Slide(
            name, row["uri"], f"TCGA-{i // 3:06d}", site, "tcga", organ, "H&E", row["mpp"], "Aperio", None, 40.0,
            {"fold": str(i % 5)},
        )  # fmt: skip
        yield {**row, **slide_columns(slide)}


def _write_tiles(path: Path, draw: np.random.Generator) -> np.ndarray:
    """JPEG tiles one after another, with a random end that decoders pass over: bytes of each, int64 [tiles]."""
    jpegs = []
    for _ in range(16):
        field = ndimage.gaussian_filter(draw.normal(size=(_TILE, _TILE)), 6) * 12
        grain = draw.normal(0, 6, (_TILE, _TILE, 1))
        pixels = np.array([205, 130, 175]) + field[..., None] * np.array([25, 45, 20]) + grain
        jpegs.append(simplejpeg.encode_jpeg(pixels.clip(0, 255).astype(np.uint8), quality=75, colorsubsampling="420"))
    counts = []
    with path.open("wb") as file:
        for number in range(40_000):
            jpeg = jpegs[number % len(jpegs)]
            counts.append(len(jpeg) + int(draw.gamma(2.0, 1500)))
            file.write(jpeg)
            file.seek(counts[-1] - len(jpeg), os.SEEK_CUR)
        file.truncate(sum(counts))
    return np.array(counts, np.int64)


def _slide(number: int, path: Path, counts: np.ndarray, draw: np.random.Generator) -> Entry:
    """A slide of 20x14 to 44x36 thousand pixels with three to seven pieces of tissue."""
    width, height = int(draw.integers(20_000, 44_000)), int(draw.integers(14_000, 36_000))
    mpp = float(draw.choice([0.2325, 0.25, 0.2523, 0.2527, 0.4990, 0.5021])) + float(draw.normal(0, 1e-5))
    first, levels = int(draw.integers(0, 1000)), []
    for downsample in _DOWNSAMPLES:
        size = width // downsample, height // downsample
        tiles = -(-size[0] // _TILE) * -(-size[1] // _TILE)
        offsets = np.concatenate([[0], np.cumsum(counts)])[first : first + tiles]
        levels.append(
            Level(*size, _TILE, _TILE, (width / size[0] + height / size[1]) / 2, "jpeg", "ycbcr", 1, b"", offsets,
                  counts[first : first + tiles])
        )  # fmt: skip
        first += tiles
    mask_mpp = 8.0
    shape = -(-int(height * mpp) // 8), -(-int(width * mpp) // 8)
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    mask = np.zeros(shape, bool)
    for _ in range(int(draw.integers(3, 8))):
        y, x = draw.uniform(0.15, 0.85, 2) * shape
        high, wide = draw.uniform(0.04, 0.22, 2) * shape
        mask |= ((rows - y) / high) ** 2 + ((columns - x) / wide) ** 2 < 1 + 0.3 * np.sin(rows / 9) * np.cos(columns / 7)
    slide = Slide(str(number), str(path), None, None, None, None, None, mpp, None, None, None, {})
    known = Known(str(path), None, Fingerprint(int(counts.sum()), str(number)), None)
    return Entry(slide, known, Layout("tiff", tuple(levels), mpp, 40.0, "Aperio"), mask, mask_mpp, zlib.compress(bytes(4000), 0))


def _visits(plan: Plan, start: int, stop: int) -> Iterator[Visit]:
    """As a stream takes them: each visit is found by its place, and each of its patches asks for one too."""
    for number in range(start, stop):
        turn, slot = divmod(number, _BATCH)
        for step in range(plan.per_visit):
            plan.place(turn * plan.per_visit + step, slot)
        yield plan.visit(slot, turn % plan.lanes, turn)


def _planning(plan: Plan, source: SlideSource, count: int, journal: Journal) -> dict[str, float]:
    """CPU seconds of the parts of a visit, over the same visits: the plan, opening the slide, placing, and reading."""
    spent = {"plan": 0.0, "open": 0.0, "place": 0.0, "read": 0.0}
    with journal.progress(count, "bench", "visits") as progress:
        visits = _visits(plan, 0, count)
        for _ in range(count):
            ticks = [time.process_time()]
            visit = next(visits)
            ticks.append(time.process_time())
            opened = source.open_slide(visit.slide)
            serving = opened.at(visit.mpp)
            _ = opened.reader.layout.levels[serving.scale.level].counts
            ticks.append(time.process_time())
            serving.cells.region(key(visit.key, "region", 0), plan.sampler.grid, plan.sampler.grid**2)
            ticks.append(time.process_time())
            source.read(visit)
            ticks.append(time.process_time())
            steps = np.diff(ticks)
            for name, seconds in zip(spent, steps, strict=True):
                spent[name] += seconds
            progress.advance(1)
    whole = spent["plan"] + spent["open"] + spent["read"]  # reading places its regions itself
    return {
        **{f"{name}_ms_a_visit": 1000 * seconds / count for name, seconds in spent.items()},
        "plan_share": spent["plan"] / whole,
        "plan_and_open_share": (spent["plan"] + spent["open"]) / whole,
    }


def _memory(plan: Plan, source: SlideSource, scale: ScaleConfig, journal: Journal) -> dict[str, float]:
    """PSS in bytes, summed over this process and its workers: when they have opened the catalog, half way, and at the end."""
    context = worker_context()
    share = scale.visits // scale.workers // 2
    workers = []
    for number in range(scale.workers):
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(plan, source, number, share, there), daemon=True)
        process.start()
        there.close()
        workers.append((process, here))
    seen = []
    with journal.progress(2 * share * scale.workers, "bench", "visits read") as progress:
        for stage in range(3):
            for _, pipe in workers:
                pipe.recv()
            seen.append(memory_bytes())
            progress.advance(0 if stage == 0 else share * scale.workers, pss=f"{seen[-1] / 2**20:.0f} MiB")
            for _, pipe in workers:
                pipe.send(None)
    for process, _ in workers:
        process.join()
    return {"pss_opened_bytes": seen[0], "pss_half_bytes": seen[1], "pss_bytes": seen[2], "visits": 2 * share * scale.workers}


def _work(plan: Plan, source: SlideSource, number: int, share: int, pipe: Connection) -> None:
    """A worker: open the catalog, then plan and read its visits in two halves."""
    settle()
    for half in (None, 0, 1):
        if half is not None:
            start = (2 * number + half) * share
            for visit in _visits(plan, start, start + share):
                source.read(visit)
        pipe.send(None)
        pipe.recv()


def _text(found: dict[str, Any], scale: ScaleConfig) -> str:
    mib = {name: f"{found[f'pss_{name}bytes'] / 2**20:.0f} MiB" for name in ("opened_", "half_", "")}
    cost = {name: f"{found[f'{name}_ms_a_visit']:.2f} ms" for name in ("plan", "open", "place", "read")}
    return "\n".join(
        [
            f"a simulated catalog of {found['slides']:,} slides, {found['bytes_a_slide'] / 1000:.1f} kB each on disk",
            f"  opens with its slide table in {found['open_and_table_s']:.2f} s ({found['open_s']:.2f} s without); "
            f"the plan takes {found['plan_s']:.2f} s",
            f"  a visit costs {cost['plan']} to plan, {cost['open']} to open its slide (layout, tiles, mask), "
            f"{cost['read']} to read, of which {cost['place']} to place",
            f"  planning takes {found['plan_share']:.1%} of a visit, with opening {found['plan_and_open_share']:.1%}",
            f"  memory of {1 + scale.workers} processes (sum of PSS): {mib['opened_']} opened, "
            f"{mib['half_']} after {found['visits'] // 2:,} visits, {mib['']} after {found['visits']:,}",
        ]
    )
