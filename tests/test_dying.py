"""Killed processes, folders that go away and catalogs that are rebuilt under a run: one sentence, and nothing is left behind."""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import yaml
from corners import catalog_of
from test_pretrain_cli import SMALL
from test_stopping import KEYS

from histoscale.data.catalog import Catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.living import orphaned, signature
from histoscale.data.manifest import read_manifest
from histoscale.data.memory import StreamConfig
from histoscale.data.pixelfilter import PixelFilterConfig
from histoscale.data.plan import Plan, SamplerConfig
from histoscale.data.storage import Store
from histoscale.data.stream import Stream, StreamError
from histoscale.data.tiles import TileSource, open_tiles
from histoscale.data.tissue import TissueConfig
from histoscale.data.visit import SlideSource
from histoscale.eval.stores import StoreConfig, write_store
from histoscale.launch.run import Refused, invoke
from histoscale.pretrain.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
READING = StreamConfig(workers=2, prefetch=1, in_flight=2, threads=1, memory_gb=2, memory_share=1.0, max_lost=0.5)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LONG = [key for key in KEYS if not key.startswith(("schedule.steps", "stream.workers"))]
LONG += ["schedule.steps=100000", "method.group=8"]
KILLED = (
    r"step \d+: the reading worker {pid} was killed by SIGKILL, as the system does when memory runs out; the same command goes on"
)


@pytest.fixture
def sampler() -> SamplerConfig:
    values = yaml.safe_load((ROOT / "configs/sampler/default.yaml").read_text())
    values |= {"mpps": [0.5], "weights": [1], "patch_px": 32, "grid": 1, "lanes_per_slot": 1}
    values["pixel_filter"] = PixelFilterConfig(**values["pixel_filter"])
    return SamplerConfig(**values)


def source_of(tiles: Path, sampler: SamplerConfig, store: Store) -> TileSource:
    return open_tiles(str(tiles), "^(.+)/", sampler, store)


def test_a_killed_worker_ends_the_stream_with_the_step(tiles: Path, sampler: SamplerConfig, store: Store) -> None:
    source = source_of(tiles, sampler, store)
    with Stream(Plan(0, 8, sampler, source.table()), source, READING, start=7) as stream:
        next(stream)
        pid = stream.worker_pids()[1]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(StreamError, match=KILLED.format(pid=pid)) as error:
            for _ in range(20):  # what was read ahead still comes
                next(stream)
        assert int(re.findall(r"step (\d+)", str(error.value))[0]) > 7


def test_a_worker_that_is_killed_within_a_message_leaves_nobody_waiting(
    tiles: Path, sampler: SamplerConfig, store: Store
) -> None:
    """Its part is larger than a pipe holds: it stands in the middle of writing until someone reads."""
    source = source_of(tiles, sampler, store)
    with Stream(Plan(0, 128, sampler, source.table()), source, replace(READING, workers=1)) as stream:
        next(stream)
        pid = stream.worker_pids()[0]
        worker, used = psutil.Process(pid), -1.0
        while used != (used := sum(worker.cpu_times()[:2])):  # it stands: nobody takes its part
            time.sleep(1.0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(StreamError, match=KILLED.format(pid=pid)):
            for _ in range(20):
                next(stream)


MAIN = """
import pickle, sys, time
from histoscale.data.stream import Stream

if __name__ == "__main__":
    with Stream(*pickle.load(sys.stdin.buffer)) as stream:
        next(stream)
        print(*stream.worker_pids(), flush=True)
        time.sleep(600)
"""


def test_workers_end_with_a_main_process_that_is_killed(
    tmp_path: Path, tiles: Path, sampler: SamplerConfig, store: Store
) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    source = source_of(tiles, sampler, store)
    with subprocess.Popen([sys.executable, tmp_path / "main.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as main:
        assert main.stdin is not None and main.stdout is not None
        pickle.dump((Plan(0, 8, sampler, source.table()), source, READING), main.stdin)
        main.stdin.close()
        workers = [psutil.Process(int(pid)) for pid in main.stdout.readline().split()]
        main.kill()
    assert len(workers) == READING.workers
    _, left = psutil.wait_procs(workers, timeout=30)
    assert not left


@pytest.fixture
def catalog(
    tmp_path: Path, make_slide: Callable[..., Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> Catalog:
    for seed in range(3):
        make_slide(tmp_path / f"s{seed}.tif", width=640, height=480, compression="deflate", kind="generic", seed=seed)
    return catalog_of(tmp_path, store, tissue_config, journal)


def test_a_catalog_that_is_rebuilt_harms_no_run_that_reads_it(
    catalog: Catalog, sampler: SamplerConfig, store: Store, tissue_config: TissueConfig, journal: Journal
) -> None:
    """Workers that have opened it keep what it was; those that come too late say that it is another."""
    source = SlideSource(catalog, store, sampler)
    plan = Plan(0, 8, sampler, source.table())
    with Stream(plan, source, replace(READING, workers=0)) as stream:
        expected = [next(stream).pixels for _ in range(8)]
    with Stream(plan, source, READING) as begun, Stream(plan, source, READING) as late:
        found = [next(begun).pixels]
        rows, out = read_manifest(str(Path(catalog.uri).with_name("manifest.csv")), store), Path(catalog.uri)
        assert build_catalog(rows, store, replace(tissue_config, mpp=32.0), out, 0, None, journal).hash != catalog.hash
        found += [next(begun).pixels for _ in range(7)]
        assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
        with pytest.raises(StreamError, match="^the catalog .* was replaced while it was in use [^\n]*$"):
            next(late)


@pytest.mark.slow
def test_a_run_on_a_catalog_that_was_rebuilt_goes_on_only_as_a_phase(tmp_path: Path, make_slide: Callable[..., Path]) -> None:
    for seed in range(2):
        make_slide(tmp_path / f"{seed}.svs", seed=seed)
    keys = [*SMALL, f"catalog={tmp_path / 'catalog'}", f"out={tmp_path / 'run'}", "schedule.steps=2"]

    def index(slides: int) -> str:
        rows = "".join(f"s{i},{i}.svs,p{i}\n" for i in range(slides))
        (tmp_path / "manifest.csv").write_text("slide_id,uri,patient_id\n" + rows)
        words = [f"manifest={tmp_path / 'manifest.csv'}", f"out={tmp_path / 'catalog'}", "workers=0", "logging.progress=off"]
        return str(invoke("index", words)["index"]["catalog_hash"])

    old = index(1)
    invoke("pretrain", keys)
    new = index(2)
    other = rf"other keys \(catalog: '{old}' there, '{new}' now\).* on a catalog that has grown, with longer="
    with pytest.raises(Refused, match=other):
        invoke("pretrain", keys)
    invoke("pretrain", [*keys, "longer=[2]"])
    facts = read_checkpoint(tmp_path / "run").facts["identity"]["facts"]
    assert facts["catalog"] == new != old


# Whole commands.


Train = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def train(start: Callable[..., "subprocess.Popen[str]"], tiles: Path) -> Train:
    """A pretrain that would go on for hours: its folder, further keys, what starts it, and variables of its shell."""

    def started(out: Path, *keys: str, by: Sequence[str] = (), **more: str) -> "subprocess.Popen[str]":
        words = [sys.executable, *by, "-m", "histoscale.launch.pretrain", *LONG, f"tiles={tiles}", *keys, f"out={out}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
        return start(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)

    return started


def until(said: str, child: subprocess.Popen[str]) -> list[str]:
    """What it has said when it says so."""
    assert child.stderr is not None
    lines = []
    for line in child.stderr:
        lines.append(line)
        if said in line:
            return lines
    pytest.fail(f"it ended without {said!r}: {''.join(lines)}")


def last_words(child: subprocess.Popen[str], within_s: float) -> list[str]:
    """What it says before it ends, soon, without a traceback; progress aside."""
    said = child.communicate(timeout=within_s)[1].splitlines()
    assert not [line for line in said if "Traceback" in line], said
    return [line for line in said if not line.startswith("pretrain: ")]


@pytest.mark.slow
def test_a_killed_worker_ends_pretrain_in_one_sentence(tmp_path: Path, train: Train) -> None:
    child = train(tmp_path / "run", "stream.workers=2")
    until("pretrain: 3/", child)
    workers = [
        one for one in psutil.Process(child.pid).children(recursive=True) if "forkserver" in " ".join(one.parent().cmdline())
    ]
    workers[-1].kill()
    said = last_words(child, 120)
    assert child.returncode == 2 and len(said) == 1, said
    assert re.fullmatch("histoscale pretrain: StreamError: " + KILLED.format(pid=workers[-1].pid) + ".*", said[0])
    assert psutil.wait_procs(workers, timeout=60)[1] == []


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_soon_and_in_one_sentence(tmp_path: Path, train: Train) -> None:
    child = train(tmp_path / "run", "stream.workers=0", by=TORCHRUN)
    until("pretrain: 3/", child)
    ranks = [one for one in psutil.Process(child.pid).children() if "torch.distributed.run" not in " ".join(one.cmdline())]
    ranks[1].kill()
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 1
    lost = r"histoscale pretrain: RankLost: rank 0 stops at step \d+: another rank has gone .*; the same command goes on"
    asked = "stopped on request.*; the same command continues"  # where torchrun, which saw the death too, was faster
    own = re.findall(rf"^(?:{lost}|{asked})$", said, re.M)
    assert len(own) == 1 and said.count("Traceback") <= 1, said  # it was not torchrun that ended it; the traceback is torchrun's


@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_save_themselves(tmp_path: Path, train: Train) -> None:
    child = train(tmp_path / "run", "stream.workers=0", by=TORCHRUN)
    until("pretrain: 3/", child)
    ranks = psutil.Process(child.pid).children()
    child.kill()
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
    state = json.loads((tmp_path / "run/state.json").read_text())
    assert state["status"] == "preempted" and (tmp_path / f"run/checkpoints/step-{state['step']}/state.json").exists()
    child.communicate()


def test_a_rank_that_waits_for_a_torchrun_that_is_gone_hears_that_it_should_stop(tmp_path: Path, train: Train) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1]), "GROUP_WORLD_SIZE": "1"}
        place |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        child = train(tmp_path / "run", "stream.workers=0", **place)
        silent.settimeout(120)
        with silent.accept()[0]:  # it waits for an answer now
            child.terminate()
            said = last_words(child, 60)
    assert said == ["stopped on request; the same command continues"] and child.returncode == 0, said
    assert not list((tmp_path / "run").glob(".lease-*"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, which can be full."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192m", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("only who may mount can make a disk that is full or read-only")
    yield place
    subprocess.run(f"umount {place}/run; umount {place}", shell=True, capture_output=True)


def take_away(out: Path, how: str) -> None:
    if how == "deleted":
        out.rename(out.with_name("gone"))
        shutil.rmtree(out.with_name("gone"))
    elif how == "full":
        with (out.parent / "other").open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            except OSError:
                pass
    else:
        for words in (["mount", "--bind", out, out], ["mount", "-o", "remount,bind,ro", out]):
            subprocess.run(words, check=True)


def test_a_store_on_a_full_disk_is_named_in_one_line_and_leaves_nothing(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    features, coords = np.ones((3000, 64), np.float32), np.zeros((3000, 2))
    write_store(disk / "old.h5", features, coords, {"a": 1}, StoreConfig("fp32"))
    take_away(disk / "run", "full")
    for name in ("new.h5", "old.h5"):
        with pytest.raises(OSError, match=f"^[^\n]*No space left[^\n]*{disk / name}[^\n]*$"):
            write_store(disk / name, features + 1, coords, {"a": 2}, StoreConfig("fp32"))
    assert capfd.readouterr().err == "" and sorted(path.name for path in disk.iterdir()) == ["old.h5", "other"]
    with h5py.File(disk / "old.h5") as file:
        assert (file["features"][()] == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "full", "read-only"])
def test_a_folder_that_goes_away_is_named_and_holds_nothing_half(disk: Path, train: Train, how: str) -> None:
    out = disk / "run"
    keys = ["stream.workers=0", "checkpoint.every=2"]
    child = train(out, *keys)
    until("pretrain: 5/", child)
    take_away(out, how)
    said = last_words(child, 120)
    assert child.returncode == 2 and len(said) == 1 and str(out) in said[0], said
    if how == "deleted":
        assert not (out / "state.json").exists() and not list(out.glob("checkpoints/*"))
        return
    subprocess.run(f"umount {out}; rm -f {disk}/other", shell=True, capture_output=True)
    assert json.loads((out / "state.json").read_text())["status"] in ("running", "failed")
    again = train(out, *keys)  # and goes on where it was
    assert any("continuing from" in line for line in until("pretrain: 8/", again))
    again.kill()
    again.wait()  # before its disk goes


# What the dead leave.


def test_names_of_the_dead_are_known_and_those_of_the_living_spared(tmp_path: Path) -> None:
    ask = [sys.executable, "-c", "from histoscale.data.living import signature; print(signature())"]
    dead = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    assert orphaned(f"sem.{dead}-x") and not orphaned(f"sem.{signature()}-x") and not orphaned("sem.mp-x")
    host, rest = dead[:6], dead[6:]
    assert orphaned(f"{host}{'0000' if rest[:4] != '0000' else '1111'}{rest[4:]}")  # before the host was booted
    assert not orphaned(f"hs{'0' * 4 if host[2:] != '0' * 4 else '1' * 4}{rest}")  # on another host


LEAVES = """
import os, signal, sys
from histoscale.data.processes import worker_context
context = worker_context()
kept = context.Queue(), context.Event()
print(os.getpid(), flush=True)
if sys.argv[1] == "die":
    os.killpg(0, signal.SIGKILL)
sys.stdin.read()
"""


def test_the_next_start_removes_what_a_killed_group_left(tmp_path: Path, start: Callable[..., "subprocess.Popen[str]"]) -> None:
    """In /dev/shm and in the temporary folder; a run that lives keeps its own."""

    def leaving(how: str) -> subprocess.Popen[str]:
        pipe, place = subprocess.PIPE, {**os.environ, "TMPDIR": str(tmp_path)}
        return start([sys.executable, "-c", LEAVES, how], stdin=pipe, stdout=pipe, env=place)

    def left(pid: int) -> list[str]:
        found = [path.name for place in (Path("/dev/shm"), tmp_path) for path in place.glob(f"*hs*-{pid}-*")]
        return sorted(name.partition("hs")[0] for name in found)

    def pid_of(child: subprocess.Popen[str]) -> int:
        assert child.stdout is not None
        return int(child.stdout.readline())

    lives = leaving("live")
    living = pid_of(lives)
    died = leaving("die")  # when the other has started, which would remove what this one leaves
    dead = pid_of(died)
    assert died.wait(60) == -signal.SIGKILL
    there = left(living)
    assert "" in there and "sem." in there
    assert "" in left(dead)  # its names in /dev/shm too, until anything of ours starts on this machine, another test say
    third = leaving("live")
    pid_of(third)
    assert left(dead) == [] and left(living) == there
    for child in (lives, third, died):
        child.communicate("")
    assert left(living) == []
