"""`histoscale index` again, stopped, on several ranks, with a full disk: the catalog is the whole old or the whole new one."""

import base64
import csv
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histoscale.data.catalog import Catalog, open_catalog
from histoscale.data.contact import write_sheet
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import Slide
from histoscale.data.storage import Changed, StorageError, Store
from histoscale.data.tissue import TissueConfig
from histoscale.launch.run import Refused, invoke

MakeSlide = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[1]


def slide(path: Path, **values: object) -> Slide:
    known: dict[str, object] = dict.fromkeys(("patient_id", "site", "cohort", "organ", "stain", "mpp", "scanner", "preparation"))
    return Slide(path.stem, str(path), **{**known, "objective": None, "labels": {}, **values})  # type: ignore[arg-type]


def manifest(path: Path, slides: list[Path]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["slide_id", "uri"], *([one.stem, str(one)] for one in slides)])
    return path


@pytest.fixture
def paths(tmp_path: Path, make_slide: MakeSlide) -> list[Path]:
    """Forty slides, so three parts; ids are not in the order of the manifest."""
    names = [f"s{7 * i % 40:02d}" for i in range(40)]
    return [make_slide(tmp_path / f"{name}.svs", width=640, height=480, seed=i) for i, name in enumerate(names)]


def ruin(path: Path) -> None:
    """Whoever reads the slide again will refuse it; size and time of change are as they were."""
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def content(out: Path) -> tuple[str, dict[str, bytes]]:
    """Everything that a catalog consists of."""
    info = (out / "catalog.json").read_text()
    return info, {path.name: path.read_bytes() for path in (out / json.loads(info)["folder"]).iterdir()}


def index(manifest: Path, out: Path, *more: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "histoscale.launch.index", f"manifest={manifest}", f"out={out}", *more]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_again_reads_only_what_is_new_or_changed(tmp_path: Path, paths: list[Path], store: Store, make_slide: MakeSlide) -> None:
    out = tmp_path / "catalog"
    rows = manifest(tmp_path / "m.csv", [*paths[:20], tmp_path / "gone.svs"])
    first = invoke("index", [f"manifest={rows}", f"out={out}", "logging.progress=off"])["index"]
    opened = open_catalog(str(out), store)
    for path in paths[:20]:
        ruin(path)
    make_slide(paths[3], width=700, height=480, seed=99)  # this one did change
    make_slide(tmp_path / "gone.svs", width=640, height=480)
    manifest(rows, [*paths[1:22], tmp_path / "gone.svs"])
    again = invoke("index", [f"manifest={rows}", f"out={out}", "logging.progress=off"])["index"]
    assert again["rejected_by_reason"] == {}, open_catalog(str(out), store).rejected
    assert (first["accepted"], first["rejected"]) == (20, 1) and (again["accepted"], again["rejected"]) == (22, 0)
    grown = open_catalog(str(out), store)
    assert list(grown.slide_ids) == sorted([path.stem for path in paths[1:22]] + ["gone"])
    assert grown.layout(grown.row(paths[3].stem)).levels[0].width == 700
    assert len([path for path in out.iterdir() if path.name.startswith("data-")]) == 1 and not (out / "parts").exists()
    with pytest.raises(Changed, match="replaced while it was in use"):
        Catalog(str(out), store, opened.hash)
    np.testing.assert_array_equal(opened.mask(0), opened.mask(0))  # mapped files outlive their names
    assert again["catalog_hash"] == grown.hash != first["catalog_hash"]
    with pytest.raises(Refused, match="tissue.mpp"):
        invoke("index", [f"manifest={rows}", f"out={out}", "tissue.mpp=16", "logging.progress=off"])


def test_an_outage_loses_only_what_was_under_way(
    tmp_path: Path, paths: list[Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> None:
    class Failing(Store):
        def ranges(self, uri: str, spans: object) -> list[bytes]:
            if Path(uri) == sorted(paths)[20]:
                raise StorageError("the store is away")
            return super().ranges(uri, spans)  # type: ignore[arg-type]

    slides, out = [slide(path) for path in paths], tmp_path / "catalog"
    whole = build_catalog(slides, store, tissue_config, tmp_path / "whole", 0, None, journal)
    with pytest.raises(StorageError, match="away"):
        build_catalog(slides, Failing(store.config), tissue_config, out, 0, None, journal)
    assert not (out / "catalog.json").exists() and len(list((out / "parts").iterdir())) == 1
    for path in sorted(paths)[:16]:
        ruin(path)
    (out / "parts" / "000001-00000001.partial").write_bytes(b"cut")
    (out / "parts" / "000001-00000002.arrow").write_bytes(b"cut")
    assert build_catalog(slides, store, tissue_config, out, 0, None, journal).hash == whole.hash
    assert content(out) == content(tmp_path / "whole")


def test_parts_of_other_tissue_settings_do_not_count(
    tmp_path: Path, paths: list[Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> None:
    slides, out = [slide(path) for path in paths[:16]], tmp_path / "catalog"
    with pytest.raises(StorageError):
        away = replace(slides[0], slide_id="z", uri="http://127.0.0.1:9/z.svs")
        build_catalog([*slides, away], Store(replace(store.config, deadline_s=0.2)),
                      replace(tissue_config, mpp=16.0), out, 0, None, journal)  # fmt: skip
    assert len(list((out / "parts").iterdir())) == 1
    build_catalog(slides, store, tissue_config, out, 0, None, journal)
    build_catalog(slides, store, tissue_config, tmp_path / "whole", 0, None, journal)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path, paths: list[Path]) -> None:
    rows, out = manifest(tmp_path / "m.csv", paths), tmp_path / "catalog"
    command = [sys.executable, "-m", "histoscale.launch.index", f"manifest={rows}", f"out={out}", "workers=1", "threads=1"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(out.glob("parts/*.arrow")) and running.poll() is None:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    if not (out / "parts").exists():
        pytest.skip("this machine was done before it could be stopped")
    assert index(rows, tmp_path / "whole").returncode == 0
    for path in sorted(paths)[:16]:
        ruin(path)
    done = index(rows, out)
    assert done.returncode == 0, done.stderr
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_make_the_catalog_of_one_process(tmp_path: Path, paths: list[Path]) -> None:
    rows = manifest(tmp_path / "m.csv", [*paths, tmp_path / "gone.svs"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "histoscale.launch.index", f"manifest={rows}", f"out={tmp_path / 'two'}", "logging.progress=off"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert index(rows, tmp_path / "one", "workers=2").returncode == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["index"]["accepted"] == 40


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_catalog(tmp_path: Path, paths: list[Path], store: Store) -> None:
    """No file may grow beyond the limit, as on a disk that is full: the same error from the same system calls."""
    rows, out = manifest(tmp_path / "m.csv", paths[:4]), tmp_path / "catalog"
    assert index(rows, out).returncode == 0
    before = content(out)
    manifest(rows, paths)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    assert sum(len(data) for name, data in before[1].items() if name == "slides.arrow") < 20_000
    failed = index(rows, out, preexec_fn=full)
    assert failed.returncode == 2 and "File too large" in failed.stderr, failed.stderr
    assert content(out) == before and len(open_catalog(str(out), store)) == 4
    assert not list(out.glob("writing*"))
    assert index(rows, out).returncode == 0
    assert len(open_catalog(str(out), store)) == 40


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]


def test_the_contact_sheet(
    tmp_path: Path, paths: list[Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    slides = [slide(path, site=hostile, patient_id="p1") for path in paths[:6]]
    slides.append(slide(tmp_path / "gone.svs"))
    catalog = build_catalog(slides, store, tissue_config, tmp_path / "c", 0, None, journal)
    write_sheet(tmp_path / "catalog.html", catalog, 6)
    text = (tmp_path / "catalog.html").read_text()
    page = Page(text)
    assert hostile not in text and "&lt;img src=x" in text and page.tags.count("img") == 12
    assert all(link.startswith("data:image/") for link in page.links)
    assert "gone" in text and "no such file" in text
    pictures = [Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) for link in page.links]
    for row, (picture, outline) in enumerate(zip(pictures[::2], pictures[1::2], strict=True)):
        assert picture.format == "JPEG" and picture.size == outline.size
        line = np.asarray(outline.convert("RGBA"))[..., 3] > 0
        mask = np.asarray(Image.fromarray(catalog.mask(row)).resize(picture.size, Image.Resampling.NEAREST))
        assert line.any() and not (line & mask).any()  # around the tissue, not on it
    write_sheet(tmp_path / "few.html", catalog, 2)
    few = (tmp_path / "few.html").read_text()
    assert Page(few).tags.count("article") == 2 and "2 of 6 slides are shown" in re.sub(r"\s+", " ", few)
