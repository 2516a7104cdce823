"""What never returns is left behind: a slide whose pixels are a pipe that nobody writes to, which OpenSlide waits for in C."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from histoscale.data import index
from histoscale.data.catalog import Catalog, open_catalog
from histoscale.data.index import build_catalog, examine
from histoscale.data.journal import Journal
from histoscale.data.manifest import Slide, read_manifest
from histoscale.data.memory import StreamConfig
from histoscale.data.parts import Rejected
from histoscale.data.pixelfilter import PixelFilterConfig
from histoscale.data.plan import Plan, SamplerConfig
from histoscale.data.readers import deadline
from histoscale.data.readers.deadline import let_go, within
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.pyramid import Damage, Layout, LayoutError, Stands
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import Store
from histoscale.data.stream import Stream
from histoscale.data.tissue import TissueConfig
from histoscale.data.visit import SlideSource, VisitFailed

ROOT = Path(__file__).resolve().parents[1]
READING = StreamConfig(workers=0, prefetch=1, in_flight=2, threads=2, memory_gb=1, memory_share=1.0, max_lost=0.9)
NEVER = 600.0  # s: longer than any test


@pytest.fixture
def hasty(store: Store) -> Store:
    return Store(replace(store.config, decode_s=1.0))


@pytest.fixture
def hamamatsu(tmp_path: Path, draw_tissue: Callable[..., np.ndarray]) -> Path:
    """A slide of Hamamatsu's first format, whose pixels lie in a file beside it."""
    whole = Image.fromarray(draw_tissue(1024, 768))
    for name, image in (("pixels.jpg", whole), ("map.jpg", whole.resize((128, 96)))):
        image.save(tmp_path / name, quality=80, subsampling=0, restart_marker_blocks=4)
    keys = "NoLayers=1 NoJpegColumns=1 NoJpegRows=1 ImageFile=pixels.jpg MapFile=map.jpg SourceLens=20 PhysicalWidth=512000"
    path = tmp_path / "stands.vms"
    path.write_text("\n".join(["[Virtual Microscope Specimen]", *keys.split(), "PhysicalHeight=384000", ""]))
    return path


def stop_answering(slide: Path) -> None:
    (slide.parent / "pixels.jpg").unlink()
    os.mkfifo(slide.parent / "pixels.jpg")


def stop_after_header(patched: pytest.MonkeyPatch, slide: Path) -> None:
    def read(uri: str, store: Store) -> Layout:
        layout = read_layout(uri, store)
        stop_answering(slide)
        return layout

    patched.setattr(index, "read_layout", read)


def answer(slide: Path) -> None:
    """Whoever waits for the pipe, again and again, gets its end."""
    for _ in range(10):
        pipe = os.open(slide.parent / "pixels.jpg", os.O_RDWR)
        time.sleep(0.05)
        os.close(pipe)


def writer_of(pipe: Path) -> int:
    """Its end for writing, once somebody waits at the other one; while it is open and nothing is written, they wait on."""
    while True:
        with suppress(OSError):  # ENXIO: nobody has opened it to read
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)


@pytest.fixture
def catalog(
    hamamatsu: Path, store: Store, make_slide: Callable[..., Path], tissue_config: TissueConfig, journal: Journal
) -> Catalog:
    make_slide(hamamatsu.parent / "fine.svs", width=1000, height=800, tile=64)
    manifest = hamamatsu.parent / "manifest.csv"
    manifest.write_text("slide_id,uri,patient_id\nstands,stands.vms,p\nfine,fine.svs,q\n")
    return build_catalog(read_manifest(str(manifest), store), store, tissue_config, hamamatsu.parent / "c", 0, None, journal)


@pytest.fixture
def sampler() -> SamplerConfig:
    values = yaml.safe_load((ROOT / "configs/sampler/default.yaml").read_text())
    values |= {"mpps": [0.5], "weights": [1], "patch_px": 32, "grid": 2, "lanes_per_slot": 2}
    values["pixel_filter"] = PixelFilterConfig(**values["pixel_filter"])
    return SamplerConfig(**values)


def test_what_returns_in_time_is_what_it_was() -> None:
    assert within(5.0, "a.svs", lambda: 7) == 7
    with pytest.raises(KeyError, match="its own"):
        within(5.0, "a.svs", lambda: {}["its own"])
    with pytest.raises(Stands, match=r"a\.svs: told by itself \(storage\.decode_s=5\)"):
        within(5.0, "a.svs", lambda: (_ for _ in ()).throw(TimeoutError("told by itself")), keeps_time=True)


def test_one_call_stands_for_a_slide_and_no_other_slide_waits() -> None:
    gate = threading.Event()
    with pytest.raises(Stands, match=r"a\.svs: its decoder has not returned after 0\.2 s"):
        within(0.2, "a.svs", gate.wait)
    started = time.monotonic()
    with pytest.raises(Stands, match="an earlier call of its decoder"):
        within(NEVER, "a.svs", lambda: 1)
    assert within(5.0, "b.svs", lambda: 2) == 2
    assert time.monotonic() - started < 5
    gate.set()
    deadline._standing["a.svs"].join()
    assert within(5.0, "a.svs", lambda: 3) == 3  # it came back, and so does the slide


def test_a_signal_reaches_who_waits_and_a_run_that_stops_waits_for_nobody() -> None:
    gate, ended = threading.Event(), []

    def elsewhere() -> None:
        with pytest.raises(Stands, match="when the run was stopped"):
            within(NEVER, "a.svs", gate.wait)
        ended.append(time.monotonic())

    def stop(number: int, frame: object) -> None:
        let_go(True)
        raise InterruptedError

    before = signal.signal(signal.SIGUSR2, stop)
    other = threading.Thread(target=elsewhere)
    try:
        other.start()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        with pytest.raises(InterruptedError):
            within(NEVER, "b.svs", gate.wait)
        other.join(20)
        assert ended
    finally:
        signal.signal(signal.SIGUSR2, before)
        let_go(False)
        gate.set()


def test_a_header_and_a_region_that_stand_are_named(hamamatsu: Path, hasty: Store) -> None:
    layout = read_layout(str(hamamatsu), hasty)
    reader = open_reader(str(hamamatsu), layout, hasty)
    assert reader.region(0, 0, 0, 64, 64).shape == (64, 64, 3)
    stop_answering(hamamatsu)
    damage: list[Damage] = []
    with pytest.raises(Stands, match=r"stands\.vms: its decoder has not returned after 1 s \(storage\.decode_s=1\)"):
        reader.region(0, 512, 512, 200, 200, damage)
    with pytest.raises(LayoutError, match=r"stands\.vms: an earlier call"):
        read_layout(str(hamamatsu), hasty)
    answer(hamamatsu)
    with pytest.raises(LayoutError, match=r"stands\.vms: its decoder has not returned after 1 s"):
        read_layout(str(hamamatsu), hasty)
    answer(hamamatsu)


@pytest.mark.parametrize("part", ["header", "pixels"])
def test_what_stood_once_is_looked_at_again(
    hamamatsu: Path, hasty: Store, tissue_config: TissueConfig, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A disk that stands for a while, or a process that was suspended, is no fault of the slide."""
    slide = Slide("stands", str(hamamatsu), *[None] * 5, 0.5, *[None] * 3, {})
    with monkeypatch.context() as patched:
        if part == "pixels":
            stop_after_header(patched, hamamatsu)
        else:
            stop_answering(hamamatsu)
        found = examine(slide, hasty, tissue_config)
    answer(hamamatsu)
    deadline._standing[str(hamamatsu)].join()
    assert isinstance(found, Rejected) and found.known.fingerprint is None
    words = r"un\w+: .*has not returned after 1 s \(storage\.decode_s=1\).*; the next index looks again"
    assert re.fullmatch(words, found.reason)
    (hamamatsu.parent / "pixels.jpg").unlink()
    again = examine(slide, hasty, tissue_config, found.known)
    assert isinstance(again, Rejected) and again.known.fingerprint is not None and "looks again" not in again.reason


@pytest.mark.parametrize("workers", [0, 2])
def test_a_visit_that_stands_is_lost_by_name_and_the_stream_goes_on_and_ends(
    catalog: Catalog, hasty: Store, sampler: SamplerConfig, hamamatsu: Path, tmp_path: Path, workers: int
) -> None:
    stop_answering(hamamatsu)
    source = SlideSource(catalog, hasty, sampler)
    plan = Plan(3, 8, sampler, source.table())
    with Stream(plan, source, replace(READING, workers=workers), lost=tmp_path / "lost.jsonl") as stream:
        seen = {catalog.slide_ids[row] for _ in range(12) for row in next(stream).slide.tolist()}
        started = time.monotonic()
    assert time.monotonic() - started < 30
    lost = [json.loads(line) for line in (tmp_path / "lost.jsonl").read_text().splitlines()]
    assert seen == {"fine"} and {row["slide_id"] for row in lost} == {"stands"}
    assert any("has not returned after 1 s (storage.decode_s=1)" in row["reason"] for row in lost)
    answer(hamamatsu)


def test_a_visit_of_slow_tiles_is_given_up_by_the_time_that_it_computes(
    catalog: Catalog, store: Store, sampler: SamplerConfig
) -> None:
    source = SlideSource(catalog, Store(replace(store.config, decode_s=1e-9)), sampler)
    plan = Plan(3, 8, sampler, source.table())
    fine = next(visit for slot in range(8) if catalog.slide_ids[(visit := plan.visit(slot, 0, 0)).slide] == "fine")
    with pytest.raises(VisitFailed, match=r"storage\.decode_s=1e-09"):
        source.read(fine)


def command(*words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "histoscale.launch.cli", *words]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_index_refuses_it_and_hears_sigterm_while_it_stands(
    catalog: Catalog, store: Store, hamamatsu: Path, tmp_path: Path
) -> None:
    stop_answering(hamamatsu)
    manifest, out = f"manifest={tmp_path / 'manifest.csv'}", f"out={tmp_path / 'index'}"
    refusing = command("index", manifest, out, "storage.decode_s=1")
    said, _ = refusing.communicate(timeout=100)
    assert refusing.returncode == 0, said
    (refused,) = open_catalog(str(tmp_path / "index"), store).rejected
    assert refused.slide_id == "stands" and "stands.vms: its decoder has not returned after 1 s" in refused.reason
    assert refused.known.fingerprint is None and refused.reason.endswith("; the next index looks again")
    other = tmp_path / "other"
    standing = command("index", manifest, f"out={other}", f"storage.decode_s={NEVER}")
    pipe = writer_of(hamamatsu.parent / "pixels.jpg")
    assert standing.poll() is None
    standing.send_signal(signal.SIGTERM)
    said, _ = standing.communicate(timeout=60)
    os.close(pipe)
    assert standing.returncode == 75, said
