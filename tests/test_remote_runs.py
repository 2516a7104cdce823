"""Whole commands on az://: the same catalog and pixels as from a local disk, and no credential in anything that they leave."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from loopback_fixtures import upload
from pydantic import TypeAdapter
from test_pretrain_cli import SMALL

from histoscale.data.catalog import open_catalog
from histoscale.data.plan import Plan, SamplerConfig
from histoscale.data.storage import Store
from histoscale.data.visit import SlideSource
from histoscale.launch.loopback import ACCOUNT_KEY, Proxy, Server, connection_string
from histoscale.launch.run import invoke

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, make_slide: Callable[..., Path]) -> Path:
    """Two slides and their manifest; ids and relative URIs serve a disk and a container alike."""
    folder = tmp_path_factory.mktemp("slides")
    for i, colour in enumerate(("rgb", "ycbcr")):
        make_slide(folder / f"{i}.svs", seed=i, colour=colour)
    (folder / "manifest.csv").write_text("slide_id,uri,patient_id,site\ns0,0.svs,p0,a\ns1,1.svs,p1,b\n")
    invoke("index", [f"manifest={folder / 'manifest.csv'}", f"out={folder / 'catalog'}", "workers=0", "logging.progress=off"])
    return folder


def uploaded(server: Server, slides: Path) -> str:
    files = {name: (slides / name).read_bytes() for name in ("0.svs", "1.svs", "manifest.csv")}
    return upload(connection_string(server.url), files, "cohort")


def sampler() -> SamplerConfig:
    found = TypeAdapter(SamplerConfig).validate_python(yaml.safe_load((ROOT / "configs/sampler/default.yaml").read_text()))
    return replace(found, mpps=[0.5, 1.0], weights=[1, 1], patch_px=64, grid=2)


@pytest.mark.parametrize("backend", ["fsspec", "obstore"])
def test_index_and_read_from_a_blob_store_are_those_from_a_disk(
    azure_server: Server, calm: Proxy, slides: Path, tmp_path: Path, store: Store, backend: str
) -> None:
    root = uploaded(azure_server, slides)
    connection = connection_string(calm.url)
    invoke("index", [f"manifest={root}/manifest.csv", f"out={tmp_path / 'catalog'}", "workers=0", "logging.progress=off",
                     f"storage.backend={backend}", f"storage.options.az.connection_string='{connection}'"])  # fmt: skip
    files = {f"catalog/{path.relative_to(tmp_path / 'catalog')}": path.read_bytes()
             for path in (tmp_path / "catalog").rglob("*") if path.is_file()}  # fmt: skip
    upload(connection_string(azure_server.url), files, "cohort")
    remote = Store(replace(store.config, backend=backend, options={"az": {"connection_string": connection}}))
    here, there = open_catalog(str(slides / "catalog"), store), open_catalog(f"{root}/catalog", remote)
    assert list(here.slide_ids) == list(there.slide_ids)
    local, distant = SlideSource(here, store, sampler()), SlideSource(there, remote, sampler())
    plans = [Plan(0, 8, sampler(), source.table()) for source in (local, distant)]
    asked = remote.requests, calm.counts()["requests"]
    for slide in range(2):
        distant.open_slide(slide)
    assert asked == (remote.requests, calm.counts()["requests"]), "opening a catalogued slide asks the store for nothing"
    for slot in range(8):
        one, other = (source.read(plan.visit(slot, 0, 0)) for source, plan in zip((local, distant), plans, strict=True))
        assert np.array_equal(np.stack(one.pixels), np.stack(other.pixels))
        assert np.array_equal(one.x, other.x) and np.array_equal(one.y, other.y) and one.mpp == other.mpp
    assert calm.counts()["requests"] - asked[1] == remote.requests - asked[0] > 0


def run(arguments: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "histoscale.launch.cli", *arguments]
    base = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "AWS_"))}
    return subprocess.run(command, cwd=folder, env={**base, **environment}, capture_output=True, text=True, timeout=300)


def leaks(secret: str, folder: Path, *outputs: subprocess.CompletedProcess[str]) -> list[str]:
    """Where a secret stands: files below the folder, and what was printed."""
    found = [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    return found + [name for one in outputs for name in ("stdout", "stderr") if secret in getattr(one, name)]


@pytest.mark.slow
def test_no_credential_is_left_by_index_and_pretrain(azure_server: Server, slides: Path, tmp_path: Path) -> None:
    root, connection = uploaded(azure_server, slides), connection_string(azure_server.url)
    option = f"storage.options.az.connection_string='{connection}'"
    index = ["index", f"manifest={root}/manifest.csv", "out=catalog", "workers=2"]
    pretrain = ["pretrain", *SMALL, "catalog=catalog", "out=run", "stream.workers=1", "logging.wandb=offline"]
    done = [run([*index, option], tmp_path, {}), run([*pretrain, option], tmp_path, {})]
    done.append(run([*pretrain, option, "storage.deadline_s=100"], tmp_path, {}))  # continues; notes what changed
    done.append(run([*index, option, "--cfg"], tmp_path, {}))
    assert [one.returncode for one in done] == [0] * 4, done
    by_environment = [argument.replace("out=catalog", "out=again") for argument in index]
    done.append(run(by_environment, tmp_path, {"AZURE_STORAGE_CONNECTION_STRING": connection}))
    assert done[-1].returncode == 0
    assert not leaks(ACCOUNT_KEY, tmp_path, *done)
    for text in ((tmp_path / "run/config.yaml").read_text(), done[3].stdout):
        assert yaml.safe_load(text)["storage"]["options"] == {"az": {"connection_string": "***"}}


@pytest.mark.parametrize("backend", ["fsspec", "obstore"])
def test_no_credential_is_left_by_a_command_that_fails(azure_server: Server, slides: Path, tmp_path: Path, backend: str) -> None:
    wrong = "bm90IHRoZSBrZXkgb2YgdGhpcyBhY2NvdW50LCBidXQgYSBzZWNyZXQ="
    root = uploaded(azure_server, slides)
    option = f"storage.options.az.connection_string='{connection_string(azure_server.url, wrong)}'"
    arguments = ["index", f"manifest={root}/manifest.csv", "out=catalog", "workers=0", f"storage.backend={backend}", option]
    failed = run(arguments, tmp_path, {"HISTOSCALE_TRACEBACK": "1"})
    assert failed.returncode == 2 and not leaks(wrong, tmp_path, failed)
    last = failed.stderr.strip().splitlines()[-1]
    assert "manifest.csv" in last and "refuses the credential in storage.options.az" in last

