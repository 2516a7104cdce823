"""The stream: the same patches for any ranks and workers, resumed anywhere, with damage, without leftovers."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml

from histoscale.data.catalog import Catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import read_manifest
from histoscale.data.memory import MemoryTooSmall, StreamConfig, memory_bytes
from histoscale.data.pixelfilter import PixelFilterConfig
from histoscale.data.plan import Plan, SamplerConfig
from histoscale.data.storage import Store
from histoscale.data.stream import Batch, Stream, StreamError
from histoscale.data.tissue import TissueConfig
from histoscale.data.visit import SlideSource

ROOT = Path(__file__).resolve().parents[1]
READING = StreamConfig(workers=0, prefetch=1, in_flight=2, threads=2, memory_gb=1, memory_share=1.0, max_lost=0.05)
G = 96


@pytest.fixture
def sampler() -> SamplerConfig:
    """Small patches at two magnifications behind a filter that refuses about 30 %."""
    values = yaml.safe_load((ROOT / "configs/sampler/default.yaml").read_text())
    values |= {"mpps": [0.5, 1.0], "weights": [2, 1], "patch_px": 32, "grid": 2, "lanes_per_slot": 2}
    values["pixel_filter"] |= {"kind": "hsv", "value": [180, 255], "fraction": 0.8, "stride": 4}
    values["pixel_filter"] = PixelFilterConfig(**values["pixel_filter"])
    return SamplerConfig(**values)


@pytest.fixture
def catalog(
    tmp_path: Path, make_slide: Callable[..., Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> Catalog:
    """Five slides of three patients and two sites; every tile of `bad` is damaged after it was indexed."""
    rows = ["slide_id,uri,patient_id,site,organ"]
    for number, name in enumerate(("a", "b", "bad", "c", "d")):
        path = make_slide(tmp_path / f"{name}.svs", width=800, height=600, tile=128, downsamples=(1, 2), seed=number)
        rows.append(f"{name},{path},p{number // 2},{'north' if number < 2 else 'south'},skin")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    slides = read_manifest(str(tmp_path / "manifest.csv"), store)
    catalog = build_catalog(slides, store, tissue_config, tmp_path / "catalog", 0, None, journal)
    with (tmp_path / "bad.svs").open("r+b") as file:
        for level in catalog.layout(catalog.row("bad")).levels:
            for offset, count in zip(level.offsets.tolist(), level.counts.tolist(), strict=True):
                file.seek(offset)
                file.write(b"\0" * count)
    return catalog


def streamed(
    source: SlideSource, world: int, workers: int, steps: range, seed: int = 3, lost: Path | None = None
) -> list[tuple[list[tuple[float, ...]], str]]:
    """For every step the (step, slot, slide, mpp, level, x, y) rows and a hash of the pixels, ranks joined in order."""
    plan = Plan(seed, G, source.sampler, source.table())
    reading = replace(READING, workers=workers)
    streams = [Stream(plan, source, reading, rank, world, steps.start, lost) for rank in range(world)]
    found = []
    try:
        for step in steps:
            batches = [next(stream) for stream in streams]
            assert {batch.step for batch in batches} == {step}
            digest = hashlib.sha256()
            for batch in batches:
                digest.update(batch.pixels.contiguous().numpy().tobytes())
            found.append(([row for batch in batches for row in rows(batch)], digest.hexdigest()))
    finally:
        for stream in streams:
            stream.close()
    return found


def rows(batch: Batch) -> list[tuple[float, ...]]:
    columns = (batch.slots, batch.slide, batch.mpp, batch.level, batch.x, batch.y)
    return [(batch.step, *row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def test_patches_do_not_depend_on_ranks_workers_or_where_the_run_was_stopped(
    catalog: Catalog, store: Store, sampler: SamplerConfig, tmp_path: Path
) -> None:
    source = SlideSource(catalog, store, sampler)
    steps = range(12)
    lost = tmp_path / "lost.jsonl"
    whole = streamed(source, 1, 0, steps, lost=lost)
    assert [slot for _, slot, *_ in whole[0][0]] == list(range(G))
    failed = [json.loads(line) for line in lost.read_text().splitlines()]
    assert failed and {row["slide_id"] for row in failed} == {"bad"}
    for world in (1, 2, 3):
        for workers in (0, 3):
            if (world, workers) == (1, 0):
                continue
            again = tmp_path / f"lost-{world}-{workers}.jsonl"
            assert streamed(source, world, workers, steps, lost=again) == whole
            assert sorted(again.read_text().splitlines()) == sorted(lost.read_text().splitlines())
    assert streamed(source, 2, 3, range(10)) + streamed(source, 3, 0, range(10, 12)) == whole
    assert streamed(source, 1, 0, range(2), seed=4)[0] != whole[0]


def test_what_is_counted(catalog: Catalog, store: Store, sampler: SamplerConfig) -> None:
    source = SlideSource(catalog, store, sampler)
    plan = Plan(3, 24, sampler, source.table())
    seen: list[Batch] = []
    with Stream(plan, source, READING) as stream:
        for batch in stream:
            seen.append(batch)
            if batch.step == 15:
                break
        stats = stream.stats()
        assert stats["data/patches"] == 16 * 24
        assert 0.6 < stats["data/accepted"] < 0.8  # the filter refuses about 30 %
        assert stats["data/failed"] > 0 and 0 <= stats["data/wait_fraction"] <= 1
        mix = stream.tally.mix()
        assert sum(row["patches"] for row in mix) == 16 * 24
        assert {(row["mpp"], row["site"]) for row in mix} == {(m, s) for m in (0.5, 1.0) for s in ("north", "south")}
        assert all(row["organ"] == "skin" and row["scanner"] == "TEST1" for row in mix)
        shares = stream.tally.acceptance()
        assert set(shares["mpp"]) == {"0.5", "1"} and set(shares["site"]) == {"north", "south"}
        assert set(shares["slide"]) == {"a", "b", "c", "d"}  # nothing of `bad` could be looked at
        assert "north" in stream.tally.text()
        doubled = stream.tally.summed(lambda counts: counts * 2)
        assert doubled.totals()["served"] == 2 * 16 * 24
        with pytest.raises(StreamError, match=r"max_lost=0.05"):
            stream.check_lost(lambda counts: counts * 3)
    targets = torch.cat([batch.target for batch in seen])
    assert abs((targets == 0).float().mean().item() - 2 / 3) < 0.06
    one = seen[0]
    assert one.pixels.shape == (24, 3, 32, 32) and one.pixels.dtype == torch.uint8
    assert one.mpp.dtype == torch.float32 and set(one.mpp.tolist()) <= {0.5, 1.0}
    picky = replace(sampler, pixel_filter=replace(sampler.pixel_filter, fraction=0.95))
    with Stream(Plan(3, 24, picky, source.table()), SlideSource(catalog, store, picky), READING) as stream:
        next(stream)
        assert any("accepts only" in warning for warning in stream.tally.warnings())


def test_a_slide_deleted_while_running_is_replaced(
    catalog: Catalog, store: Store, sampler: SamplerConfig, tmp_path: Path
) -> None:
    source = SlideSource(catalog, store, sampler)
    plan = Plan(3, 24, sampler, source.table())
    with Stream(plan, source, READING, lost=tmp_path / "lost.jsonl") as stream:
        next(stream)
        (tmp_path / "a.svs").unlink()
        later = [next(stream) for _ in range(12)][-1]
    failed = [json.loads(line) for line in (tmp_path / "lost.jsonl").read_text().splitlines()]
    gone = [row for row in failed if row["slide_id"] == "a"]
    assert gone and all("no such file" in row["reason"].lower() or "a.svs" in row["reason"] for row in gone)
    assert catalog.row("a") not in later.slide.tolist()
    for row in gone:  # what stands in the file is what the plan says
        place = plan.place(row["step"], row["slot"])
        assert plan.visit(row["slot"], place.lane, place.turn, row["attempt"]).slide == row["slide"]


def test_ranks_must_divide_the_batch(catalog: Catalog, store: Store, sampler: SamplerConfig) -> None:
    source = SlideSource(catalog, store, sampler)
    plan = Plan(3, 97, sampler, source.table())
    with pytest.raises(ValueError, match="nearest are 96 and 100"):
        Stream(plan, source, READING, 0, 4)
    with pytest.raises(ValueError, match="at least 1 for threads"):
        Stream(plan, source, replace(READING, threads=0))


def test_what_memory_does_not_hold_is_read_slower_not_otherwise(
    catalog: Catalog, store: Store, sampler: SamplerConfig
) -> None:
    """The budget shrinks what is in flight and ahead; the plan itself is never touched, and refused where it is too large."""
    source = SlideSource(catalog, store, sampler)
    plan = Plan(3, G, sampler, source.table())
    fast = replace(READING, in_flight=64, prefetch=4)
    least = memory_bytes(3, sampler, range(G), replace(READING, in_flight=1, prefetch=1))
    with Stream(plan, source, fast) as stream:
        wanted = [next(stream) for _ in range(3)]
    with Stream(plan, source, replace(fast, memory_gb=least / 1e9)) as stream:
        assert (stream.config.in_flight, stream.config.prefetch) == (1, 1)
        found = [next(stream) for _ in range(3)]
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(wanted, found, strict=True))
    with pytest.raises(MemoryTooSmall, match=r"96 slots x 2 lanes x 4 patches of 32 px.*sampler.lanes_per_slot=1 "):
        Stream(plan, source, replace(READING, memory_gb=least / 1e9 * 0.9))


def test_batches_that_are_kept_do_not_change(catalog: Catalog, store: Store, sampler: SamplerConfig) -> None:
    """Workers write into the same buffers again and again: what was handed over must not be one of them."""
    source = SlideSource(catalog, store, sampler)
    plan = Plan(3, 24, sampler, source.table())
    with Stream(plan, source, READING) as stream:
        expected = [next(stream).pixels.clone() for _ in range(14)]
    for workers in (1, 2):
        with Stream(plan, source, replace(READING, workers=workers)) as stream:
            kept = []
            for step in range(14):
                kept.append(next(stream).pixels)
                time.sleep(0.05 * (step % 3 == 0))  # the workers are as far ahead as they may be
        assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))


def test_nothing_is_left_behind_after_an_interrupt(catalog: Catalog, sampler: SamplerConfig, tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(
        "import sys\n"
        "from histoscale.data.catalog import open_catalog\n"
        "from histoscale.data.pixelfilter import PixelFilterConfig\n"
        "from histoscale.data.plan import Plan, SamplerConfig\n"
        "from histoscale.data.storage import Store, StorageConfig\n"
        "from histoscale.data.memory import StreamConfig\n"
        "from histoscale.data.stream import Stream\n"
        "from histoscale.data.visit import SlideSource\n"
        "if __name__ == '__main__':\n"
        "    store = Store(StorageConfig({}, 'fsspec', 'cache', 1 << 30, 5.0, 5.0, 60.0))\n"
        f"    source = SlideSource(open_catalog({catalog.uri!r}, store), store, {sampler!r})\n"
        "    plan = Plan(1, 8, source.sampler, source.table())\n"
        f"    with Stream(plan, source, {replace(READING, workers=2)!r}) as stream:\n"
        "        for batch in stream:\n"
        "            print('step', batch.step, *stream.worker_pids(), flush=True)\n"
    )
    command = [sys.executable, script]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True, cwd=tmp_path
    )
    assert process.stdout is not None
    line = process.stdout.readline().split()
    assert line[:2] == ["step", "0"] and len(line) == 4
    family = psutil.Process(process.pid).children(recursive=True)
    assert {int(pid) for pid in line[2:]} <= {child.pid for child in family}
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: all of them at once
    process.stdout.close()
    assert process.wait(timeout=60) != 0
    assert psutil.wait_procs(family, timeout=60)[1] == []


def test_threads_and_prefetch_change_nothing(catalog: Catalog, store: Store, sampler: SamplerConfig) -> None:
    source = SlideSource(catalog, store, sampler)
    plan = Plan(9, 6, sampler, source.table())
    found = []
    for prefetch, threads in ((1, 1), (5, 3)):
        with Stream(plan, source, replace(READING, prefetch=prefetch, threads=threads), start=5) as stream:
            batches = [next(stream) for _ in range(12)]
        found.append([(rows(batch), batch.pixels.numpy().tobytes()) for batch in batches])
    assert found[0] == found[1]
    assert np.unique([row[2] for rows_, _ in found[0] for row in rows_]).size > 1


@pytest.mark.slow
def test_real_processes_list_the_same_patches_views_and_masks(catalog: Catalog, sampler: SamplerConfig, tmp_path: Path) -> None:
    """1, 2 and 3 processes under torchrun, 0 and 3 workers each, and a run that stops on 2 and goes on on 3."""
    (tmp_path / "sampler.yaml").write_text(yaml.safe_dump(asdict(sampler)))
    script = str(Path(__file__).with_name("list_patches.py"))

    def listed(processes: int, workers: int, start: int, stop: int) -> list[str]:
        out = tmp_path / f"{processes}-{workers}-{start}"
        out.mkdir()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]
        arguments = [str(tmp_path / "catalog"), str(tmp_path / "sampler.yaml"), str(workers), str(start), str(stop), str(out)]
        subprocess.run([*torchrun, *arguments], check=True, capture_output=True, timeout=300)
        lines = [line for rank in range(processes) for line in (out / f"{rank}.jsonl").read_text().splitlines()]
        return sorted(lines, key=lambda line: json.loads(line)[:2])

    whole = listed(1, 0, 0, 12)
    assert [json.loads(line)[:2] for line in whole] == [[step, slot] for step in range(12) for slot in range(G)]
    for processes, workers in ((1, 3), (2, 0), (2, 3), (3, 0), (3, 3)):
        assert listed(processes, workers, 0, 12) == whole
    assert sorted(listed(2, 1, 0, 10) + listed(3, 1, 10, 12), key=lambda line: json.loads(line)[:2]) == whole
