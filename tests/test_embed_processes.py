"""Real processes that embed: killed and started again, or two ranks, they leave the same bytes; bad slides and ids do no harm."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corners import catalog_of

from histoscale.data.catalog import checksum, sha256_of
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.manifest import ManifestError, read_manifest
from histoscale.data.storage import StorageConfig, Store
from histoscale.data.tissue import TissueConfig

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ONE = [sys.executable, "-m", "histoscale.launch.embed"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "histoscale.launch.embed"]
KEYS = ["encoder=random:test_vit", "grid.mpp=0.5", "grid.patch_px=48", "jitter.copies=1", "store.dtype=fp16",
        "precision=fp32", "hardware.device=cpu", "hardware.batch=5", "stream.threads=1", "logging.progress=off"]  # fmt: skip
SLIDES = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_slide: Callable[..., Path], tissue_config: TissueConfig) -> Path:
    """A folder with a catalog of slides, one of them cut after it was indexed."""
    folder = tmp_path_factory.mktemp("embedded")
    for seed in range(SLIDES):
        make_slide(folder / f"s{seed}.tif", compression="deflate", kind="generic", seed=seed)
    store = Store(StorageConfig({}, "fsspec", str(folder / "cache"), 1 << 30, 20.0, 5.0, 60.0))
    catalog_of(folder, store, tissue_config, Journal(folder / "index", JournalConfig("off", 10, "off", "test", False)))
    path = folder / "s3.tif"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    return folder


def started(command: list[str], folder: Path, out: str, *more: str) -> subprocess.Popen[str]:
    keys = [*KEYS, f"catalog={folder / 'catalog'}", f"out={folder / out}", *more]
    return subprocess.Popen([*command, *keys], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(command: list[str], folder: Path, out: str, *more: str) -> dict[str, Any]:
    child = started(command, folder, out, *more)
    said = child.communicate()[0]
    assert child.returncode == 0, said
    return json.loads((folder / out / "summary.json").read_text())["embed"]


def stores(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.h5"))}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_again_and_again_or_by_two_ranks_the_bytes_are_the_same(made: Path) -> None:
    whole = finished(ONE, made, "whole")
    expected = stores(made / "whole")
    assert len(expected) == 2 * (SLIDES - 1) and list(whole["failed"]) == ["s3"] and whole["slides"] == SLIDES - 1
    noted = [json.loads(line)["slide_id"] for line in (made / "whole/failures.jsonl").read_text().splitlines()]
    assert noted == ["s3"]

    out, chance, killed = made / "killed", random.Random(0), 0
    for number in range(3):  # while the first store is half written, and after one and two more are whole
        child, there = started(ONE, made, "killed"), len(stores(out))
        while child.poll() is None and len(stores(out)) < there + max(number, 1):
            if number == 0 and list(out.rglob(f"*.{child.pid}.partial")):
                break
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        killed += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert killed == 3
    before = {name: (out / name).stat().st_mtime_ns for name in stores(out)}
    assert before and len(before) < len(expected)
    found = finished(ONE, made, "killed")
    assert stores(out) == expected and not list(out.rglob("*.partial"))
    whole_slides = [name for name in before if "/" not in name and f"jitter-1/{name}" in before]
    assert found["kept"] == len(whole_slides)  # what was whole was not made again
    assert all((out / name).stat().st_mtime_ns == before[name] for name in before)

    found = finished(TWO, made, "ranks")
    assert stores(made / "ranks") == expected
    assert {name: found[name] for name in ("slides", "kept", "patches", "failed")} == {
        name: whole[name] for name in ("slides", "kept", "patches", "failed")
    }
    shutil.rmtree(made / "ranks")


@pytest.mark.slow
def test_ids_that_leave_the_folder_are_refused(
    tmp_path: Path, make_slide: Callable[..., Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> None:
    """By the manifest, and by `embed` in a catalog that somebody else made."""
    make_slide(tmp_path / "qqqq.tif", compression="deflate", kind="generic")
    for slide_id in ("../x", "/tmp"):
        (tmp_path / "bad.csv").write_text(f"slide_id,uri\n{slide_id},qqqq.tif\n")
        with pytest.raises(ManifestError, match="it becomes a file name"):
            read_manifest(str(tmp_path / "bad.csv"), store)
    catalog_of(tmp_path, store, tissue_config, journal)
    [table] = (tmp_path / "catalog").rglob("slides.arrow")
    honest = table.read_bytes()
    table.write_bytes(honest.replace(b"qqqq", b"../x"))
    told = tmp_path / "catalog/catalog.json"
    info = json.loads(told.read_text())
    info["files"][table.name][1] = sha256_of(table)
    told.write_text(json.dumps({**info, "checksum": checksum(info)}))
    keys = [f"catalog={tmp_path / 'catalog'}", f"out={tmp_path / 'out' / 'embeddings'}", "encoder=colour", *KEYS[1:]]
    child = subprocess.run([*ONE, *keys], env=ENVIRONMENT, capture_output=True, text=True)
    assert child.returncode == 2 and "no store for this slide" in child.stderr and "../x" in child.stderr, child.stderr
    assert not list(tmp_path.rglob("*.h5"))
