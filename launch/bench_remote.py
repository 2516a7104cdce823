"""Reading from a blob store that is some way off: client CPU time beside local reading, requests, bytes, rates, memory.

The store is Azurite on this machine behind a proxy that adds a delay to every request, each in a process of its own: they share
the cores with the client, so its CPU time a patch is what carries over to other machines, and the wall rates do not.
"""

import ctypes
import gc
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histoscale.data.catalog import open_catalog
from histoscale.data.journal import Journal
from histoscale.data.keys import key, permutation
from histoscale.data.memory import StreamConfig, memory_bytes
from histoscale.data.plan import Plan, SamplerConfig, Visit
from histoscale.data.spreadsheet import write_table
from histoscale.data.storage import StorageConfig, Store
from histoscale.data.stream import Stream
from histoscale.data.visit import Patches, SlideSource
from histoscale.launch.bench_read import draw_slide
from histoscale.launch.footprint import Footprint
from histoscale.launch.footprint import memory_bytes as held_bytes
from histoscale.launch.loopback import Proxy, azurite, connection_string, filled_container, proxy

if TYPE_CHECKING:
    from histoscale.launch.bench import Config

_SAMPLE_S = 0.1  # between two looks at the memory


@dataclass(frozen=True)
class RemoteConfig:
    """mpp: um/px of all patches. near_s, far_s: delay a request. near, far: visits in flight at each. batch: slots. prefetch:
    batches read ahead. steps: batches that a round takes."""

    mpp: float
    near_s: float
    far_s: float
    near: int
    far: int
    batch: int
    prefetch: int
    steps: int


@dataclass(frozen=True)
class _Round:
    """What a round read, in this process. touched: bytes of the tiles under the patches."""

    patches: int
    cpu_s: float
    wall_s: float
    requests: int
    bytes: int
    retried: int
    touched: int


class _Counted(SlideSource):
    """A source that keeps the visits it read: those that were read ahead and never taken count too."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.done: list[tuple[Visit, Patches]] = []

    def read(self, visit: Visit) -> Patches:
        found = super().read(visit)
        self.done.append((visit, replace(found, pixels=[])))
        return found


def remote(config: "Config", journal: Journal) -> dict[str, Any]:
    """Measure, print, and return the numbers. Raises Absent where Azurite is not installed."""
    rule = config.remote
    sampler = replace(config.sampler, magnification="discrete", mpps=[rule.mpp], weights=[1])
    here = Store(config.storage)
    if config.catalog is None:
        draw_slide(config, here, journal)
    local = config.catalog or str(journal.path("slide/catalog/catalog.json").parent)
    files = {Path(slide.uri).name: here.local(slide.uri) for slide in open_catalog(local, here).slides}
    with azurite(None) as server, proxy(server) as between, filled_container(server, files) as container:
        between.set()
        there = _index(journal, container, list(files), connection_string(between.url))
        journal.say(f"bench: {', '.join(files)} in Azurite; opening a catalogued slide …")
        opening = _opening_requests(there, behind(config.storage, "obstore", between), sampler)
        found = _measure(config, sampler, local, there, between, journal)
    found["requests_to_open"] = opening
    journal.say(_text(found, rule, config.rounds))
    return found


def _index(journal: Journal, container: str, names: list[str], connection: str) -> str:
    """A catalog of the remote slides, in `out`."""
    from histoscale.launch.run import invoke

    folder = journal.path(f"remote/{time.time_ns()}/manifest.csv").parent
    rows = [{"slide_id": Path(name).stem, "uri": f"{container}/{name}", "patient_id": i} for i, name in enumerate(names)]
    write_table(folder / "manifest.csv", ("slide_id", "uri", "patient_id"), rows)
    options = f"storage.options.az.connection_string='{connection}'"
    invoke("index", [f"manifest={folder}/manifest.csv", f"out={folder}/catalog", "workers=0", "logging.progress=off", options])
    return str(folder / "catalog")


def behind(storage: StorageConfig, backend: str, between: Proxy) -> Store:
    options = {"az": {"connection_string": connection_string(between.url)}}
    return Store(replace(storage, backend=backend, options=options))


def _opening_requests(catalog: str, store: Store, sampler: SamplerConfig) -> int:
    """Requests until a slide of an open catalog is ready to be read."""
    SlideSource(open_catalog(catalog, store), store, sampler).open_slide(0)
    return store.requests


def _measure(
    config: "Config", sampler: SamplerConfig, local: str, there: str, between: Proxy, journal: Journal
) -> dict[str, Any]:
    rule = config.remote
    at_home = _Reader(config, sampler, local, None, "", 0.0, config.stream.in_flight)
    methods: dict[str, _Reader] = {"local": at_home}
    for backend in ("obstore", "fsspec"):
        for name, delay, flight in (("near", rule.near_s, rule.near), ("far", rule.far_s, rule.far)):
            methods[f"{backend} {name}"] = _Reader(config, sampler, there, between, backend, delay, flight)
    rounds: dict[str, list[_Round]] = {name: [] for name in methods}
    memory = {}
    for name in methods:  # warm, and the memory while at it: watching costs time
        gc.collect()
        _give_back()
        before = held_bytes()
        watch = Footprint(_SAMPLE_S)
        with watch.stage(name):
            methods[name](-1)
        memory[name] = watch.stages[0].peak_bytes - before
    names = list(methods)
    with journal.progress(config.rounds * len(names), "bench", "measurements") as progress:
        for number in range(config.rounds):
            for i in permutation(key(config.seed, "bench round", number), len(names)):
                rounds[names[i]].append(methods[names[i]](number))
                progress.advance(1, method=names[i])
    cpu = {name: np.array([one.cpu_s / one.patches for one in taken]) for name, taken in rounds.items()}
    wall = {name: np.array([one.patches / one.wall_s for one in taken]) for name, taken in rounds.items()}
    total = {name: _Round(*(sum(getattr(one, field) for one in taken) for field in _Round.__annotations__))
             for name, taken in rounds.items()}  # fmt: skip
    return {
        "methods": {
            name: {
                "cpu_ms_a_patch": _spread(1e3 * cpu[name]),
                "cpu_to_local": _spread(cpu[name] / cpu["local"]),
                "patches_a_second": _spread(wall[name]),
                "requests_a_patch": total[name].requests / total[name].patches,
                "bytes_to_touched": total[name].bytes / total[name].touched if name != "local" else 1.0,
                "bytes_a_patch": total[name].touched / total[name].patches,
                "patches": total[name].patches,
                "retried": total[name].retried,
                "peak_bytes": memory[name],
                "budget_bytes": methods[name].budget_bytes,
            }
            for name in names
        },
        "far_to_near": {name: _spread(wall[f"{name} far"] / wall[f"{name} near"]) for name in ("obstore", "fsspec")},
    }


def _give_back() -> None:
    """What was freed leaves the process, so that what comes next is seen."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "low": float(values.min()), "high": float(values.max())}


class _Reader:
    """Reads a round through the stream, in this process; the same round of any reader takes the same patches of its catalog."""

    def __init__(
        self,
        config: "Config",
        sampler: SamplerConfig,
        catalog: str,
        between: Proxy | None,
        backend: str,
        delay_s: float,
        flight: int,
    ) -> None:
        self.rule, self.between, self.delay_s = config.remote, between, delay_s
        self.store = behind(config.storage, backend, between) if between is not None else Store(config.storage)
        self.source = _Counted(open_catalog(catalog, self.store), self.store, sampler)
        self.plan = Plan(config.seed, self.rule.batch, sampler, self.source.table())
        self.stream = _in_flight(config.stream, flight, self.rule.prefetch)
        self.budget_bytes = memory_bytes(config.seed, sampler, range(self.rule.batch), self.stream)

    def __call__(self, number: int) -> _Round:
        store, source, steps = self.store, self.source, self.rule.steps
        if self.between is not None:
            self.between.set(delay_s=self.delay_s)
        source.done.clear()
        before = store.requests, store.bytes, store.retried
        cpu, wall = time.process_time(), time.perf_counter()
        with Stream(self.plan, source, self.stream, start=(number + 1) * steps) as batches:
            for _ in range(steps):
                next(batches)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        patches = len(source.done) * source.sampler.grid**2
        touched = sum(_touched(source, visit, found) for visit, found in source.done)
        requests, read, retried = store.requests - before[0], store.bytes - before[1], store.retried - before[2]
        return _Round(patches, cpu, wall, requests, read, retried, touched)


def _in_flight(stream: StreamConfig, visits: int, prefetch: int) -> StreamConfig:
    """So many visits in flight, in this process."""
    return replace(stream, workers=0, prefetch=prefetch, in_flight=visits)


def _touched(source: SlideSource, visit: Visit, found: Patches) -> int:
    """Bytes of the tiles that lie under the patches of a visit, each tile once."""
    level = source.catalog.layout(visit.slide).levels[found.level]
    side = source.sampler.patch_px * found.mpp / source.catalog.level_mpps(visit.slide)[found.level]
    tiles = set()
    for x, y in zip(found.x.tolist(), found.y.tolist(), strict=True):
        right, bottom = min(x + side, level.width), min(y + side, level.height)
        for row in range(max(0, y) // level.tile_height, -int(-bottom // level.tile_height)):
            tiles |= {row * level.columns + c for c in range(max(0, x) // level.tile_width, -int(-right // level.tile_width))}
    return int(level.counts[sorted(tiles)].sum())


def _text(found: dict[str, Any], rule: RemoteConfig, rounds: int) -> str:
    lines = [f"reading at {rule.mpp:g} um/px; medians of {rounds} rounds, CPU time of the client alone"]
    for name, one in found["methods"].items():
        backend, _, where = name.partition(" ")
        far = f", {rule.far_s * 1e3:.0f} ms, {rule.far} visits in flight" if where == "far" else ""
        near = f", {rule.near_s * 1e3:.0f} ms, {rule.near} visits in flight" if where == "near" else ""
        cpu, ratio, rate = one["cpu_ms_a_patch"], one["cpu_to_local"], one["patches_a_second"]
        memory = f"at most {one['peak_bytes'] / 1e6:.0f} MB of {one['budget_bytes'] / 1e6:.0f} granted"
        lines.append(
            f"  {backend + near + far:<42} {cpu['median']:.3f} ms CPU a patch, {ratio['median']:.2f} [{ratio['low']:.2f}, "
            f"{ratio['high']:.2f}] x local; {rate['median']:.0f} patches/s wall; {one['requests_a_patch']:.2f} requests a patch; "
            f"{one['bytes_to_touched']:.2f} x the bytes of the touched tiles; {memory}"
        )
    for name, one in found["far_to_near"].items():
        lines.append(f"  {name}: {one['median']:.2f} [{one['low']:.2f}, {one['high']:.2f}] of the near rate when far")
    lines.append(f"  requests to open a catalogued slide: {found['requests_to_open']}")
    return "\n".join(lines)
