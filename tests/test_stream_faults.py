"""The stream over a store that fails: what time heals changes no patch, what the bytes say does, and both are told."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from histoscale.data import index
from histoscale.data.catalog import Catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import read_manifest
from histoscale.data.memory import StreamConfig
from histoscale.data.pixelfilter import PixelFilterConfig
from histoscale.data.plan import Plan, SamplerConfig
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.vendor import read_header
from histoscale.data.storage import StorageConfig, Store
from histoscale.data.stream import Stream, StreamError
from histoscale.data.tissue import TissueConfig
from histoscale.data.visit import SlideSource
from histoscale.launch.loopback import Proxy, proxy, range_server

ROOT = Path(__file__).resolve().parents[1]
READING = StreamConfig(workers=0, prefetch=1, in_flight=4, threads=2, memory_gb=1, memory_share=1.0, max_lost=0.5)
SLIDES, STEPS, BATCH = 4, 30, 16


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Proxy]:
    """A proxy before a server of the test's folder."""
    with range_server(tmp_path) as server, proxy(server) as between:
        yield between


@pytest.fixture
def sampler() -> SamplerConfig:
    values = yaml.safe_load((ROOT / "configs/sampler/default.yaml").read_text())
    values |= {"mpps": [0.5, 1.0], "weights": [1, 1], "patch_px": 32, "grid": 2, "lanes_per_slot": 2}
    values["pixel_filter"] = PixelFilterConfig(**values["pixel_filter"])
    return SamplerConfig(**values)


@pytest.fixture
def patient(tmp_path: Path) -> Store:
    return Store(StorageConfig({}, "fsspec", str(tmp_path / "cache"), 1 << 30, deadline_s=60, request_timeout_s=2, decode_s=60))


@pytest.fixture
def catalog(
    tmp_path: Path, far: Proxy, patient: Store, make_slide: Callable[..., Path], tissue_config: TissueConfig, journal: Journal
) -> Catalog:
    """Slides behind the proxy, one tile in a hundred damaged at rest (none of them all over)."""
    rows, damaged = ["slide_id,uri,patient_id"], 0
    for number in range(SLIDES):
        path = make_slide(tmp_path / f"s{number}.svs", width=1000, height=800, tile=64, downsamples=(1, 2), seed=number)
        rows.append(f"s{number},{far.url}/s{number}.svs,p{number}")
        levels = read_layout(str(path), patient).levels
        with path.open("r+b") as file:
            for level in levels:
                for tile in range(37, len(level.counts), 100):
                    file.seek(int(level.offsets[tile]))
                    file.write(bytes(int(level.counts[tile])))
                    damaged += 1
    assert damaged >= 8
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    slides = read_manifest(str(tmp_path / "manifest.csv"), patient)
    return build_catalog(slides, patient, tissue_config, tmp_path / "catalog", 0, None, journal)


def read(
    catalog: Catalog, store: Store, sampler: SamplerConfig, workers: int, at: dict[int, Callable[[], object]], lost: Path
) -> tuple[list[str], dict[str, float]]:
    """A hash of each of STEPS batches with its places, and the stream's own account; `at`: what to do before some steps."""
    source = SlideSource(catalog, store, sampler)
    plan = Plan(5, BATCH, sampler, source.table())
    found = []
    with Stream(plan, source, replace(READING, workers=workers), lost=lost) as stream:
        for step in range(STEPS):
            at.get(step, lambda: None)()
            batch = next(stream)
            digest = hashlib.sha256(batch.pixels.contiguous().numpy().tobytes())
            digest.update(json.dumps([t.tolist() for t in (batch.slots, batch.slide, batch.level, batch.x, batch.y)]).encode())
            found.append(digest.hexdigest())
        return found, stream.stats()


@pytest.mark.parametrize(("workers", "outage_s"), [(0, 3.0), pytest.param(2, 20.0, marks=pytest.mark.slow)])
def test_failing_requests_stalls_and_an_outage_change_no_patch(
    catalog: Catalog, patient: Store, sampler: SamplerConfig, far: Proxy, tmp_path: Path, workers: int, outage_s: float
) -> None:
    calm, quiet = read(catalog, patient, sampler, 0, {}, tmp_path / "calm.jsonl")
    assert quiet["data/retried"] == 0 and len(set(calm)) == STEPS
    faults = {"seed": 1, "throttle": 0.05, "cut": 0.02, "stall": 0.01}
    until = [0.0]

    def outage() -> None:
        until[0] = time.monotonic() + outage_s
        far.set(out=True)
        threading.Timer(outage_s, lambda: far.set(**faults)).start()

    before = far.counts()
    far.set(**faults)
    troubled, account = read(catalog, Store(patient.config), sampler, workers, {5: outage}, tmp_path / "troubled.jsonl")
    far.set()
    assert troubled == calm
    assert time.monotonic() > until[0]  # it went on when the store was back
    assert account["data/retried"] > 10
    after = far.counts()
    assert all(after.get(kind, 0) > before.get(kind, 0) for kind in ("throttle", "cut"))
    rows = [(tmp_path / name).read_text() if (tmp_path / name).exists() else "" for name in ("calm.jsonl", "troubled.jsonl")]
    assert rows[0] == rows[1]


def test_a_credential_that_expires_ends_in_one_clear_error(
    catalog: Catalog, patient: Store, sampler: SamplerConfig, far: Proxy, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(StreamError, match=r"slide s\d: .*refuses the credential in storage\.options\.http") as error:
        read(catalog, patient, sampler, 0, {3: lambda: far.set(refuse=1.0)}, tmp_path / "lost.jsonl")
    assert time.monotonic() - started < 30 and "\n" not in str(error.value)


@pytest.mark.parametrize(("workers", "fault", "words"), [(0, "throttle", "503"), (2, "throttle", "503"), (2, "stall", "Timeout")])
def test_a_store_that_fails_for_good_stops_the_run_with_the_slide_and_the_cause(
    catalog: Catalog, patient: Store, sampler: SamplerConfig, far: Proxy, tmp_path: Path, workers: int, fault: str, words: str
) -> None:
    """Also one that takes every request and answers none."""
    hasty = Store(replace(patient.config, deadline_s=3.0))
    with pytest.raises(StreamError, match=rf"slide s\d: .*storage.deadline_s=3.*{words}"):
        read(catalog, hasty, sampler, workers, {3: lambda: far.set(**{fault: 1.0})}, tmp_path / "lost.jsonl")
    assert not (tmp_path / "lost.jsonl").exists()  # an outage is nobody's lost visit


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_that_cannot_be_written_ends_the_run_in_a_sentence_that_names_the_file(
    far: Proxy, patient: Store, sampler: SamplerConfig, make_slide: Callable[..., Path], tissue_config: TissueConfig,
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int,
) -> None:  # fmt: skip
    """A slide that OpenSlide reads, from a copy. The errors of a full disk and of this one are of one kind."""
    monkeypatch.setattr(index, "read_layout", read_header)
    make_slide(tmp_path / "s0.svs", width=1000, height=800, tile=64)
    (tmp_path / "manifest.csv").write_text(f"slide_id,uri\ns0,{far.url}/s0.svs\n")
    slides = read_manifest(str(tmp_path / "manifest.csv"), patient)
    copied = build_catalog(slides, patient, tissue_config, tmp_path / "copied", 0, None, journal)
    (tmp_path / "no folder").touch()
    source = SlideSource(copied, Store(replace(patient.config, cache_dir=str(tmp_path / "no folder/cache"))), sampler)
    with Stream(Plan(5, BATCH, sampler, source.table()), source, replace(READING, workers=workers)) as stream:
        with pytest.raises(StreamError, match=r"slide s0: .*Not a directory: '.*/no folder/cache/") as error:
            next(stream)
    assert "\n" not in str(error.value)


def test_a_slide_that_was_replaced_is_lost_not_mixed(
    catalog: Catalog, patient: Store, sampler: SamplerConfig, tmp_path: Path, make_slide: Callable[..., Path]
) -> None:
    make_slide(tmp_path / "s2.svs", width=1200, height=700, tile=64, downsamples=(1, 2), seed=99)
    read(catalog, patient, sampler, 0, {}, tmp_path / "lost.jsonl")
    reasons = [json.loads(line) for line in (tmp_path / "lost.jsonl").read_text().splitlines()]
    assert reasons and {row["slide_id"] for row in reasons} == {"s2"}
    assert any("not the file that was indexed" in row["reason"] for row in reasons)


@pytest.mark.parametrize("in_flight", [1, 8])
def test_so_many_visits_are_in_flight(
    catalog: Catalog, patient: Store, sampler: SamplerConfig, far: Proxy, in_flight: int
) -> None:
    """Against a slow store, where all of them wait. A visit asks for one span at a time here: its region is one row of tiles."""
    far.set(delay_s=0.1)
    source = SlideSource(catalog, patient, sampler)
    plan = Plan(5, BATCH, sampler, source.table())
    with Stream(plan, source, replace(READING, in_flight=in_flight)) as stream:
        for _ in range(4):
            next(stream)
    assert far.counts()["most_at_once"] >= in_flight
    far.set()
