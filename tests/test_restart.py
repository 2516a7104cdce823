"""Killed at random moments, also inside a checkpoint write: a run goes on from the last whole one and ends as it would have."""

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

import psutil
import pytest
import torch

from histoscale.data.journal import keep_rows
from histoscale.pretrain.checkpoint import newest_checkpoint, read_checkpoint, read_tensors

PROGRAM = Path(__file__).with_name("train_tiny.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "30"]
KILLS, INSIDE = 10, 3


def rows(out: Path) -> list[dict[str, Any]]:
    """Whole rows of steps, in the order of their writing."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if "loss" in row]


def last_rows(out: Path) -> list[dict[str, Any]]:
    """The row of each step that counted in the end."""
    return [row for _, row in sorted({row["step"]: row for row in rows(out)}.items())]


def being_written(out: Path) -> bool:
    return any((out / "checkpoints").glob("step-*.partial"))


def wait_for(what: Callable[[], bool], child: subprocess.Popen[bytes], every_s: float = 0.02) -> bool:
    """Poll until it is so; False when the child has ended before."""
    while child.poll() is None:
        if what():
            return True
        time.sleep(every_s)
    return False


def trained_further(out: Path, by: int, since: int) -> Callable[[], bool]:
    return lambda: len(rows(out)) >= since + by


def moment(out: Path, child: subprocess.Popen[bytes], chance: random.Random, inside: bool) -> bool:
    """Wait for a random moment of training or, `inside`, of a checkpoint's writing; False when the child has ended before."""
    state, _ = newest_checkpoint(out / "checkpoints")
    since = state.step if state else 0
    keep_rows(out / "metrics.jsonl", lambda row: row.get("step", 0) <= since)  # as the child will do, which has yet to import
    if not wait_for(trained_further(out, chance.randint(1, 2), since), child):
        return False
    if inside:
        return wait_for(lambda: being_written(out), child, every_s=0.001)
    time.sleep(chance.uniform(0, 0.2))
    return child.poll() is None


def started(command: list[str], out: Path, keys: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*command, str(PROGRAM), str(out), *keys], env=ENVIRONMENT)


def every_tensor(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(read_checkpoint(out), "")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_process_killed_ten_times_ends_bit_equal(tmp_path: Path) -> None:
    keys = ["schedule.steps=44", "checkpoint.every=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert started([sys.executable], whole, keys).wait() == 0
    chance, caught, fell_back = random.Random(0), 0, 0
    for kill in range(KILLS):
        child = started([sys.executable], killed, keys)
        assert moment(killed, child, chance, inside=kill % 2 == 0), f"the run ended before kill {kill + 1}"
        child.kill()
        assert child.wait() == -signal.SIGKILL
        caught += being_written(killed)
        state, _ = newest_checkpoint(killed / "checkpoints")
        fell_back += (state.step if state else 0) < max(row["step"] for row in rows(killed))
    assert caught >= INSIDE and fell_back > 0
    assert started([sys.executable], killed, keys).wait() == 0
    ours, theirs = every_tensor(killed), every_tensor(whole)
    assert ours.keys() == theirs.keys() and [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    names = ("step", "loss", "loss/dino", "loss/ibot", "loss/koleo", "lr", "grad_norm/backbone")
    assert [[row[n] for n in names] for row in last_rows(killed)] == [[row[n] for n in names] for row in last_rows(whole)]
    assert [row["step"] for row in rows(killed)] == list(range(1, 45))  # steps that were trained again stand there once


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_restarts_two_processes_after_every_kill_of_one(tmp_path: Path) -> None:
    keys = ["schedule.steps=40", "checkpoint.every=2", "hardware.shard_over=all"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert started([sys.executable], whole, keys).wait() == 0
    chance, caught = random.Random(1), 0
    agent = started(TORCHRUN, killed, keys)
    for kill in range(KILLS):
        assert moment(killed, agent, chance, inside=kill % 2 == 0), f"the run ended before kill {kill + 1}"
        workers = [child for child in psutil.Process(agent.pid).children() if str(PROGRAM) in child.cmdline()]
        assert len(workers) == 2
        chance.choice(workers).send_signal(signal.SIGKILL)
        wait_for(lambda gone=workers: not any(map(psutil.Process.is_running, gone)), agent)  # type: ignore[misc]
        caught += being_written(killed)
    assert agent.wait() == 0 and caught >= INSIDE
    assert read_checkpoint(killed).step == 40
    pairs = list(zip(last_rows(whole), last_rows(killed), strict=True))
    assert [a["step"] for a, _ in pairs] == list(range(1, 41))
    for name in ("loss/dino", "loss/ibot"):
        assert max(abs(a[name] - b[name]) / abs(a[name]) for a, b in pairs) < 1e-4
    assert max(abs(a["loss/koleo"] - b["loss/koleo"]) for a, b in pairs) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trained_on_two_sharded_ranks_it_goes_on_on_one_and_on_four(tmp_path: Path) -> None:
    keys = ["schedule.steps=20", "checkpoint.every=20", "method.group=2"]
    whole, two, four, one = (tmp_path / name for name in ("whole", "two", "four", "one"))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    assert started([sys.executable], whole, keys).wait() == 0
    assert started([*run, "2"], two, [*keys, "hardware.shard_over=all", "stop_at=9", "stop_rank=1"]).wait() == 0
    assert read_checkpoint(two).step == 10
    shutil.copytree(two, one)
    shutil.copytree(two, four)
    assert started([sys.executable], one, keys).wait() == 0
    assert started([*run, "4"], four, [*keys, "hardware.shard_over=2"]).wait() == 0  # two copies of two parts
    for out in (one, four):
        pairs = list(zip(last_rows(whole), last_rows(out), strict=True))
        assert len(pairs) == 20
        assert max(abs(a[name] - b[name]) / abs(a[name]) for a, b in pairs for name in ("loss/dino", "loss/ibot")) < 1e-4
        assert max(abs(a["loss/koleo"] - b["loss/koleo"]) for a, b in pairs) < 1e-4
