"""Slide models on many large slides: how fast embedding stores are read from a cold disk, and what an epoch waits for and weighs.

The stores are drawn (numbers without meaning, in the layout of `embed`). Before every measurement the page cache is emptied of
them, and the share of their pages that is still in memory is counted. Reading is set beside the disk's own rate: the same files
from first byte to last in large plain reads, by one thread and by as many as the reader has, whichever is faster, in the same
round. A disk that belongs to a virtual machine may be cached outside it; all methods of a round then profit alike.
"""

import ctypes
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from histoscale.data.journal import Journal, Progress, write_atomic
from histoscale.data.keys import key, permutation
from histoscale.data.manifest import Slide
from histoscale.eval.mil.bags import read_bags
from histoscale.eval.mil.ensemble import build_aggregator
from histoscale.eval.mil.features import Draw, Features
from histoscale.eval.mil.fit import fit
from histoscale.eval.stores import DTYPES, StoreConfig, store_path, write_store
from histoscale.launch.config import load
from histoscale.launch.footprint import Footprint

if TYPE_CHECKING:
    from histoscale.launch.bench import BaggedConfig, Config

_PLAIN_BYTES = 8 << 20  # of one plain read
_LABELLED = ["embeddings=drawn", "manifest=drawn", "task=slide", "task.label=label", "out=drawn"]


def mil(config: "Config", journal: Journal) -> dict[str, Any]:
    """Measure, print, and return the numbers. Raises ValueError where the page cache cannot be emptied, or the disk is full."""
    if not hasattr(os, "posix_fadvise"):
        raise ValueError("bench what=mil empties the page cache of its files with posix_fadvise, which this system lacks")
    wanted = config.bagged
    folder = journal.path("stores/x").parent
    paths = simulate(folder, wanted, config.seed, journal)
    rates, cold = _read(paths, config, journal)
    found = {
        "slides": len(paths),
        "asked": wanted.slides,
        "tiles": wanted.tiles,
        "width": wanted.width,
        "dtype": wanted.dtype,
        "bytes": len(paths) * _store_bytes(wanted),
        "cold": cold,
        "rates": {name: _spread(each) for name, each in rates.items()},
        "ratios": {name: _spread(np.divide(rates[name], rates["disk"])) for name in ("whole", "drawn")},
        "epoch": _epoch(paths, config, journal),
    }
    journal.say(_text(found, wanted))
    return found


def simulate(folder: Path, wanted: "BaggedConfig", seed: int, journal: Journal) -> list[Path]:
    """The stores of as many slides as the disk has room for; earlier ones of the same sizes are used again."""
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob("*.h5"))
    slides = min(wanted.slides, int(wanted.disk_share * free / _store_bytes(wanted)))
    if slides < 4:
        raise ValueError(f"{free / 1e9:.1f} GB are free at {folder}: no room for 4 stores of {_store_bytes(wanted) / 1e9:.2f} GB")
    mark, words = folder / "drawn.json", json.dumps([slides, wanted.tiles, wanted.width, wanted.dtype, seed])
    paths = [store_path(folder, f"slide-{i:05d}") for i in range(slides)]
    if mark.exists() and mark.read_text() == words and all(path.exists() for path in paths):
        return paths
    for path in folder.glob("*"):
        path.unlink()
    less = "" if slides == wanted.slides else f" in place of {wanted.slides:,}: more than that would fill the disk"
    size = slides * _store_bytes(wanted) / 1e9
    journal.say(
        f"bench: writing stores of {slides:,} slides, {wanted.tiles:,} x {wanted.width} {wanted.dtype} ({size:.1f} GB){less}"
    )
    rng = np.random.default_rng(seed)
    pool = rng.normal(size=(wanted.tiles + 1024, wanted.width)).astype(DTYPES[wanted.dtype])
    places = np.arange(wanted.tiles)
    coords = np.stack([places % 100, places // 100], 1) * 512
    with journal.progress(slides, "stores", "slides") as progress:
        for i, path in enumerate(paths):
            start = int(rng.integers(1024))
            features = np.roll(pool[start : start + wanted.tiles], int(rng.integers(wanted.width)), axis=1)
            attrs = {"slide_id": path.stem, "encoder_hash": "drawn", "mpp": 0.5, "patch_size": 256, "patch_size_level0": 512,
                     "number": i}  # fmt: skip
            write_store(path, features, coords, attrs, StoreConfig(wanted.dtype))
            progress.advance(1)
    write_atomic(mark, words)
    return paths


def _store_bytes(wanted: "BaggedConfig") -> int:
    return wanted.tiles * wanted.width * np.dtype(DTYPES[wanted.dtype]).itemsize


# Reading alone.


def _read(paths: Sequence[Path], config: "Config", journal: Journal) -> tuple[dict[str, list[float]], float]:
    """Bytes a second of each method over all rounds (of the stores that were passed over), and the greatest share of their pages
    that was in memory when one began."""
    wanted, size = config.bagged, _store_bytes(config.bagged)

    def through(tiles: int) -> Callable[[], int]:
        def read() -> int:
            features = Features([[path] for path in paths], wanted.width, 0, wanted.read_threads)
            plan = ([Draw(row, 0, row)] for row in range(len(paths)))
            return sum(len(batch) for batch in features.batches(plan, tiles)) * size

        return read

    methods = {
        "plain_1": lambda: _plain(paths, 1),
        "plain_n": lambda: _plain(paths, wanted.read_threads),
        "whole": through(wanted.tiles),
        "drawn": through(wanted.bag),
    }
    rates: dict[str, list[float]] = {name: [] for name in methods}
    names, cold = list(methods), 0.0
    with journal.progress(config.rounds * len(names), "bench", "measurements") as progress:
        for turn in range(config.rounds):
            for i in permutation(key(config.seed, "bench round", turn), len(names)):
                cold = max(cold, drop(paths))
                start = time.perf_counter()
                done = methods[names[i]]()
                rates[names[i]].append(done / (time.perf_counter() - start))
                progress.advance(1, method=names[i])
    rates["disk"] = [max(pair) for pair in zip(rates["plain_1"], rates["plain_n"], strict=True)]
    return rates, cold


def _plain(paths: Sequence[Path], threads: int) -> int:
    """Every file from its first byte to its last in large reads into one buffer a thread; the bytes that were read."""

    def read(share: Sequence[Path]) -> int:
        buffer, total = memoryview(bytearray(_PLAIN_BYTES)), 0
        for path in share:
            with path.open("rb", buffering=0) as file:
                while got := file.readinto(buffer):
                    total += got
        return total

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(read, [paths[i::threads] for i in range(threads)]))


def drop(paths: Sequence[Path]) -> float:
    """Put the files out of the page cache; the share of their pages that is still there."""
    here = pages = 0
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            held = resident(file.fileno(), path.stat().st_size)
        here, pages = here + int(held.sum()), pages + len(held)
    return here / pages


def resident(descriptor: int, size: int) -> np.ndarray:
    """Which pages of a file are in memory: bool [pages], by mincore(2)."""
    found = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), found.ctypes.data_as(ctypes.c_void_p)
        )
        del start
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed")
    return (found & 1).astype(bool)


# An epoch.


class _Waits(Features):
    """Features that note how long whoever trains on them waited."""

    waited = 0.0
    steps = 0

    def batches(self, plan: Iterable[Sequence[Draw]], tiles: int) -> Iterator[list[np.ndarray]]:
        ready = super().batches(plan, tiles)
        while True:
            start = time.perf_counter()
            batch = next(ready, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            self.steps += 1
            yield batch


def _epoch(paths: Sequence[Path], config: "Config", journal: Journal) -> dict[str, Any]:
    """Two models, each of which trains on half of the slides once, so that together they visit every slide. What standardises the
    tiles is read before, timed on its own, and the cache is emptied again."""
    wanted = config.bagged
    model = load("mil", [*_LABELLED, f"mil={wanted.mil}", *wanted.overrides, f"mil.tiles={wanted.bag}", "mil.folds=2",
                         "mil.repeats=1", "mil.epochs=1"]).config  # fmt: skip
    slides = [Slide(path.stem, path.name, f"p{i}", "s", None, None, None, None, None, None, None, {"label": str(i % 2)})
              for i, path in enumerate(paths)]  # fmt: skip
    bags = read_bags(paths[0].parent, slides, model.task, "patient")
    features = _Waits([[bag.path] for bag in bags.rows], bags.width, wanted.cache_bytes, wanted.read_threads)
    footprint, before = Footprint(0.1), torch.get_num_threads()
    torch.set_num_threads(wanted.torch_threads)
    try:
        cold = drop(paths)
        with footprint.stage("moments"):
            for row in range(len(bags.rows)):
                features.moments(row)
        cold = max(cold, drop(paths))
        quiet = Progress(1, "fit", "epochs", "off", 10)
        with footprint.stage("epoch"):
            fit(bags, range(len(bags.rows)), features, model.task, model.mil, quiet)
    finally:
        torch.set_num_threads(before)
    moments, epoch = footprint.stages
    aggregator = build_aggregator(model.mil.aggregator, bags.width, model.task.outputs)
    return {
        "steps": features.steps,
        "batch": model.mil.batch,
        "step_ms": 1e3 * epoch.seconds / features.steps,
        "wait_ms": 1e3 * features.waited / features.steps,
        "wait_share": features.waited / epoch.seconds,
        "seconds": epoch.seconds,
        "pss_bytes": max(stage.peak_bytes for stage in footprint.stages),
        "moments_s": moments.seconds,
        "cold": cold,
        "parameters": sum(each.numel() for each in aggregator.parameters()),
    }


def _spread(values: Iterable[float]) -> dict[str, float]:
    each = list(values)
    return {"median": float(np.median(each)), "low": float(min(each)), "high": float(max(each))}


def _text(found: dict[str, Any], wanted: "BaggedConfig") -> str:
    rates, epoch = found["rates"], found["epoch"]
    cold = max(found["cold"], epoch["cold"])
    lines = [
        f"{found['slides']:,} stores of {found['tiles']:,} x {found['width']} {found['dtype']}, {found['bytes'] / 1e9:.1f} GB; "
        f"{cold:.2%} of their pages in memory when a measurement began"
    ]
    names = {"plain_1": "plain reads, one thread", "plain_n": f"plain reads, {wanted.read_threads} threads",
             "whole": "reader, whole slides", "drawn": f"reader, bags of {wanted.bag:,}"}  # fmt: skip
    for name, words in names.items():
        ratio = f"   {found['ratios'][name]['median']:.2f} of the disk" if name in found["ratios"] else ""
        rate = rates[name]
        lines.append(f"  {words:26} {rate['median'] / 1e6:7.0f} MB/s [{rate['low'] / 1e6:.0f}, {rate['high'] / 1e6:.0f}]{ratio}")
    lines += [
        f"  an epoch ({wanted.mil}, {epoch['parameters']:,} parameters, {epoch['steps']} steps of {epoch['batch']} bags): "
        f"{epoch['step_ms']:.0f} ms a step, {epoch['wait_ms']:.1f} of them waiting for data ({epoch['wait_share']:.1%})",
        f"  sum of PSS at most {epoch['pss_bytes'] / 2**30:.2f} GiB; standardising the tiles took {epoch['moments_s']:.1f} s",
    ]
    return "\n".join(lines)
