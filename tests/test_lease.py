"""Two runs at one folder: on one machine and on two, alive, dead, silent, and at the same moment; nothing that dies blocks."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from histoscale.data.living import Process, lives, machine, this_process
from histoscale.launch import lease
from histoscale.launch.lease import Lost, Refused, take

HERE = this_process()
STALE_S = 30.0
# Another process: says `ready`, and looks when a line comes. argv: out, its machine, how long a silent lease is waited for, and
# the seconds between its beats.
OTHER = """
import sys, threading
from dataclasses import replace
from pathlib import Path
from histoscale.data.living import this_process
from histoscale.launch.lease import Refused, take
out, machine, stale_s, beat_s = Path(sys.argv[1]), sys.argv[2], *map(float, sys.argv[3:])
me = replace(this_process(), machine=machine or this_process().machine)
print("ready", flush=True)
sys.stdin.readline()
try:
    mine = take(out, me, lambda text: None, stale_s)
except Refused as refused:
    sys.exit(print(f"refused: {refused}", flush=True))
threading.Thread(target=mine.keep, args=(beat_s,), daemon=True).start()
print("holds", flush=True)
sys.stdin.read()
mine.end()
"""


def other(out: Path, machine: str, stale_s: float, beat_s: float = 0.2) -> subprocess.Popen[str]:
    pipe, words = subprocess.PIPE, [str(out), machine, str(stale_s), str(beat_s)]
    return subprocess.Popen([sys.executable, "-c", OTHER, *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def begun(*children: subprocess.Popen[str]) -> list[str]:
    """What each says that was let go at the same moment, when all were ready."""
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    return [child.stdout.readline() for child in children if child.stdout is not None]


@contextlib.contextmanager
def holding(out: Path, machine: str) -> Iterator[subprocess.Popen[str]]:
    child = other(out, machine, stale_s=1.0)
    try:
        assert begun(child) == ["holds\n"]
        yield child
    finally:
        child.kill()
        child.communicate()


def silent(text: str) -> None:
    pytest.fail(f"it said: {text}")


def left(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_a_folder_is_taken_and_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with lease.alone(tmp_path, silent) as mine:
            assert left(tmp_path) == [".lease-1", ".lock"] and lease.busy(tmp_path) and mine.kept()
        assert left(tmp_path) == [".lock"] and not lease.busy(tmp_path)


@pytest.mark.parametrize("where", ["", "another machine"])
def test_who_lives_is_named_and_not_disturbed(tmp_path: Path, where: str) -> None:
    """On one machine at once; on two, which need not agree about the time, as soon as it beats."""
    with holding(tmp_path, where) as child:
        assert lease.busy(tmp_path)
        began = time.monotonic()
        words = rf"another run is writing to .* \(process {child.pid} on .*, begun .* UTC, last heard of .* UTC\); wait for it"
        with pytest.raises(Refused, match=words):
            take(tmp_path, HERE, silent, stale_s=STALE_S)
        assert time.monotonic() - began < STALE_S and left(tmp_path) == [".lease-1"]


def test_one_that_was_killed_here_blocks_nobody(tmp_path: Path) -> None:
    with holding(tmp_path, "") as child:
        child.send_signal(signal.SIGKILL)
        while lives(Process(machine(), child.pid, 0)):  # it need not be reaped: nobody may be there who would
            time.sleep(0.01)
        mine = take(tmp_path, HERE, silent)
    assert left(tmp_path) == [".lease-2"]
    mine.end()
    assert left(tmp_path) == []


def test_an_id_that_was_given_away_again_is_another_process() -> None:
    assert lives(HERE) and lives(replace(HERE, started=HERE.started + 1)) is False
    assert lives(replace(HERE, machine="elsewhere")) is None


def test_one_that_fell_silent_on_another_machine_is_taken_over_after_a_while(tmp_path: Path) -> None:
    """Its clock may stand anywhere: what counts is how long the looker saw nothing new."""
    with holding(tmp_path, "another machine") as child:
        child.send_signal(signal.SIGSTOP)  # a machine that hangs, and comes back
        record = tmp_path / ".lease-1"
        os.utime(record, (2e9, 2e9))
        said: list[str] = []
        began = time.monotonic()
        mine = take(tmp_path, HERE, said.append, stale_s=2.0)
        assert time.monotonic() - began >= 2.0 and len(said) == 1 and f"process {child.pid} on" in said[0]
        child.send_signal(signal.SIGCONT)
        assert child.wait(60) == lease.EXIT_LOST  # it notices before it does harm, and says so in one line
        out, error = child.communicate()
        assert error.count("\n") == 1 and f"another run took {tmp_path} over (process {os.getpid()} on" in error
        assert mine.kept() and left(tmp_path) == [".lease-2"]
        mine.end()


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_lease_without_a_name_is_waited_for_and_then_void(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lease-7").write_text(text)
    assert lease.busy(tmp_path)
    take(tmp_path, HERE, lambda text: None, stale_s=1.0).end()
    assert left(tmp_path) == []


def test_a_folder_that_is_deleted_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with holding(out, "") as child:
        shutil.rmtree(out)
        assert child.stderr is not None
        assert child.wait(60) == lease.EXIT_LOST
        assert child.stderr.read() == (
            f"histoscale: {out} was deleted or moved while this run wrote to it: it stops here; the same command begins anew\n"
        )
    out.mkdir()
    mine = take(out, HERE, silent)
    shutil.rmtree(out)
    out.mkdir()  # made again by what writes into it
    with pytest.raises(Lost, match="was deleted or moved"):
        mine.check()
    mine.end()
    assert left(out) == []


def test_the_beat_does_not_keep_a_process_alive(tmp_path: Path) -> None:
    code = "import sys, pathlib; from histoscale.launch import lease; lease.alone(pathlib.Path(sys.argv[1]), print).__enter__()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    take(tmp_path, HERE, silent).end()


@settings(max_examples=4, suppress_health_check=list(HealthCheck), database=None)
@given(before=st.sampled_from(["nobody", "dead", "silent"]), where=st.lists(st.sampled_from("abc"), min_size=4, max_size=4))
def test_of_those_who_come_at_once_exactly_one_wins(
    tmp_path_factory: pytest.TempPathFactory, before: str, where: list[str]
) -> None:
    """Real processes on one to three machines, without any lock but the lease."""
    out = tmp_path_factory.mktemp("race")
    if before != "nobody":
        gone = replace(HERE, pid=2**22 + 1, machine="d" if before == "silent" else where[0])
        os.close(take(out, gone, silent)._descriptor)  # as SIGKILL leaves it
    stale_s = 3.0 if before == "silent" else 10.0  # only who fell silent is waited for; a beat may wait as long for the disk
    children = [other(out, place, stale_s) for place in where]
    said = begun(*children)
    for child in children:
        child.communicate()
    assert sorted(text.partition(":")[0].strip() for text in said) == ["holds", "refused", "refused", "refused"], said
    assert left(out) == []


@settings(max_examples=30, database=None)
@given(count=st.integers(2, 6), leases=st.integers(0, 2))
def test_threads_of_many_machines_race_for_the_making(tmp_path_factory: pytest.TempPathFactory, count: int, leases: int) -> None:
    """The same look at the same moment: one file can be made once, and whoever finds others beside it steps back."""
    out = tmp_path_factory.mktemp("made")
    for number in range(leases):
        (out / f".lease-{number + 1}").write_text(json.dumps("gone"))
    together, won = threading.Barrier(count), []

    def run(place: int) -> None:
        together.wait()
        won.append(lease._made(out, [*range(1, leases + 1)], replace(HERE, machine=str(place))))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(mine is not None for mine in won) <= 1 and left(out) == [f".lease-{leases + 1}"] * any(won)
