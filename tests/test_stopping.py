"""SIGTERM and SIGUSR1 at any moment: one line, exit code 75, no traceback, nothing left running, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from histoscale.pretrain.preempted import SIGNALS, Preempted, stop_signals, stoppable, was_asked

KEYS = [
    "recipe=demo", "sampler.mpps=[0.5]", "sampler.weights=[1]", "sampler.patch_px=32", "sampler.grid=1", "views.global_px=32",
    "views.local_px=16", "views.local_count=1", "model.img_size=32", "model.width=48", "model.depth=1", "optim.global_batch=16",
    "method.head.prototypes=32", "method.head.hidden=64", "schedule.steps=60", "hardware.device=cpu", "hardware.threads=1",
    "logging.progress=lines", "logging.interval_s=0", "monitor.every=1", "stream.workers=1",
]  # fmt: skip


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_whatever_is_done(number: int) -> None:
    before = {one: signal.getsignal(one) for one in SIGNALS}
    with pytest.raises(Preempted, match="^stopped on request; the same command continues$"), stoppable():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except Exception:  # what handles errors must not take it for one
            pytest.fail("it was handled")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # who asks twice does not interrupt the stopping
    assert {one: signal.getsignal(one) for one in SIGNALS} == before


def test_what_fails_because_of_the_signal_is_stopping() -> None:
    """A worker that the same signal ended, a connection to a rank that has gone."""
    with pytest.raises(Preempted), stoppable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            raise RuntimeError("a worker exited")
    with pytest.raises(RuntimeError), stoppable():
        raise RuntimeError("of its own")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_was_lost_in_a_finalizer_is_not_forgotten() -> None:
    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.getsignal(signal.SIGTERM)  # handlers run between two instructions

    with pytest.raises(Preempted), stoppable():
        Swallows()
        assert was_asked()
        with stop_signals() as asked:
            assert asked == [signal.SIGTERM]
        raise EOFError("a worker that the same signal ended")
    assert not was_asked()


def test_while_a_step_is_trained_signals_are_noted() -> None:
    with pytest.raises(Preempted), stoppable():
        with stop_signals() as asked:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked == [signal.SIGUSR1, signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    with pytest.raises(Preempted), stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError("a worker that the same signal ended")
    with pytest.raises(OSError, match="of its own"), stop_signals():
        raise OSError("of its own")
    seen: list[list[int]] = []

    def elsewhere() -> None:
        with stoppable(), stop_signals() as asked:
            seen.append(asked)

    thread = threading.Thread(target=elsewhere)  # only the main thread may set handlers
    thread.start()
    thread.join()
    assert seen == [[]]


STARTS = """
import os, signal, time
from histoscale.data.processes import out_of_the_way, worker_context
if __name__ == "__main__":
    context = worker_context("json")
    with out_of_the_way():
        worker = context.Process(target=time.sleep, args=(3,))
        worker.start()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
        os.killpg(0, number)
    worker.join()
    print(worker.exitcode)
"""


def test_what_a_batch_system_sends_to_every_process_ends_neither_workers_nor_their_servers(tmp_path: Path) -> None:
    (tmp_path / "starts.py").write_text(STARTS)
    command = [sys.executable, tmp_path / "starts.py"]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "numbers", "everyone"),
    [
        ("reading holds", [signal.SIGTERM], False),  # before sources are opened
        ("phase base, steps 0", SIGNALS, True),  # the model is built, workers start, the first batch is read
        ("pretrain: 3/60", SIGNALS, True),  # a batch system tells every process of a job
    ],
)
def test_a_run_that_is_stopped_ends_with_75_and_goes_on(
    tmp_path: Path, tiles: Path, start: Callable[..., "subprocess.Popen[str]"], moment: str, numbers: Sequence[int],
    everyone: bool,
) -> None:  # fmt: skip
    for number in numbers:
        command = [sys.executable, "-m", "histoscale.launch.pretrain", *KEYS, f"tiles={tiles}", f"out={tmp_path / str(number)}"]
        process = start(command, stderr=subprocess.PIPE)
        assert process.stderr is not None
        said, family = [], list[psutil.Process]()
        for line in process.stderr:
            said.append(line)
            if moment in line and not family:
                family = psutil.Process(process.pid).children(recursive=True)
                os.killpg(process.pid, number) if everyone else process.send_signal(number)
                family = family or [psutil.Process(process.pid)]
        assert process.wait() == 75
        assert said[-1].endswith("; the same command continues\n") and not any("Traceback" in line for line in said)
        assert psutil.wait_procs(family, timeout=60)[1] == []
        state = json.loads((tmp_path / str(number) / "state.json").read_text())
        assert state["preempted"] and (state["step"] is None) == ("3/60" not in moment)
    again = subprocess.run([*command, "logging.progress=off"], capture_output=True, text=True)  # whichever signal it was
    assert again.returncode == 0, again.stderr
    rows = map(json.loads, (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "step" in row] == list(range(61))  # each once, whatever was computed twice
