"""Kills random processes of index, pretrain, probe, embed and mil, starts what died again, and compares with a calm run.

    python tests/chaos.py KILLS SEED FOLDER

Slides lie behind a server and a proxy on loopback; index and pretrain have workers, embed is two ranks under torchrun. A kill is
SIGKILL, at a random moment, to the main process, a worker, a rank, the server or the proxy: one of a kind that was killed least
so far. A command that gets none of few kills is run once, for the others to read, or not at all. It prints what it did, and ends
with 1 where a result differs, a command hangs, or one ends otherwise than it says in the README.
"""

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import h5py
import numpy as np
import psutil
from PIL import Image
from slide_fixtures import tissue_pixels, write_slide

from histoscale.launch.loopback import Server, proxy, range_server
from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors

SLIDES, LIMIT_S = 24, 300.0
STEPS = {  # and who of each can be killed
    "index": ("main", "worker"),
    "pretrain": ("main", "worker"),
    "probe": ("main",),
    "embed": ("main", "rank"),
    "mil": ("main",),
}
SHARED = ("embed", "pretrain", "mil", "index", "probe")  # the order in which kills are handed out: only embed has ranks
ENDS = ("probe", "mil")  # nothing reads what they make
RUN = [sys.executable, "-m"]
TWO = [*RUN, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
QUIET = ["logging.progress=lines"]
SMALL = [
    "recipe=demo", "sampler.mpps=[0.5]", "sampler.weights=[1]", "sampler.patch_px=32", "sampler.grid=2", "views.global_px=32",
    "views.local_px=16", "views.local_count=2", "model.img_size=32", "model.width=48", "model.depth=1",
    "method.head.prototypes=32", "method.head.hidden=64", "method.group=4", "optim.global_batch=8", "precision=fp32",
    "schedule.steps=30", "checkpoint.every=3", "monitor.every=5", "stream.workers=2", "stream.threads=1", "hardware.device=cpu",
    "hardware.threads=1",
]  # fmt: skip
PROBE = ["dataset=folder", "honest.probes=[knn]", "floors.trees=3", "scoring.interval.draws=20", "precision=fp32",
         "hardware.device=cpu", "hardware.batch=4"]  # fmt: skip
EMBED = ["precision=fp32", "hardware.device=cpu", "hardware.batch=8", "stream.threads=1"]
MIL = ["task=slide", "task.label=tumour", "split=patients", "mil.epochs=3", "mil.folds=2", "mil.repeats=1", "interval.draws=20"]


class Found(Exception):
    """Something that must not be; the message says what."""


class Far:
    """Slides behind a server and a proxy, each of which can be killed and comes back at its old place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        self.servers: dict[str, Server] = {"server": range_server(folder)}
        self.servers["proxy"] = proxy(self.servers["server"])
        self.ports = {name: server.port for name, server in self.servers.items()}
        self.up = set(self.servers)

    def kill(self, name: str, away_s: float) -> None:
        self.up.discard(name)
        self.servers[name].stop()
        threading.Timer(away_s, self.back, [name]).start()

    def back(self, name: str) -> None:
        with self.lock:
            if name == "server":
                self.servers[name] = range_server(self.folder, self.ports[name])
            else:
                self.servers[name] = proxy(self.servers["server"], self.ports[name])
        self.up.add(name)

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop()


def lay(folder: Path) -> None:
    """Slides, and labelled tiles."""
    for number in range(SLIDES):
        write_slide(folder / "far" / f"s{number:02d}.svs", width=640, height=480, seed=number)
    rows = []
    for number in range(32):
        pixels = tissue_pixels(64, 64, number, whole=True)
        (folder / "tiles").mkdir(exist_ok=True)
        Image.fromarray(pixels - 40 * np.uint8(number % 2)).save(folder / "tiles" / f"{number}.png")
        split = "train" if number < 16 else "test"
        rows.append({"path": f"{number}.png", "label": "ab"[number % 2], "split": split, "patient_id": f"p{number // 2}"})
    table(folder / "tiles/labels.csv", rows)


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def command(step: str, folder: Path, out: Path) -> list[str]:
    manifest, catalog, trained = folder / "manifest.csv", out / "index", out / "pretrain"
    keys = {
        "index": [f"manifest={manifest}", "workers=2", "tissue.mpp=4"],
        "pretrain": [f"catalog={catalog}", *SMALL],
        "probe": [f"encoder={trained}", f"data_root={folder / 'tiles'}", *PROBE],
        "embed": [f"encoder={trained}", f"catalog={catalog}", *EMBED],
        "mil": [f"embeddings={out / 'embed'}", f"manifest={manifest}", *MIL],
    }[step]
    start = TWO if step == "embed" else RUN
    return [*start, f"histoscale.launch.{step}", *keys, *QUIET, f"out={out / step}"]


@dataclass
class Account:
    """killed: by kind. faults: what must not be. pids: of whoever may have left something in /dev/shm when it was killed."""

    killed: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)


@dataclass
class Child:
    """A command that runs; `text`: where its output goes."""

    process: subprocess.Popen[bytes]
    text: Path
    began: float

    @staticmethod
    def start(step: str, folder: Path, out: Path) -> "Child":
        text = out / f"{step}.txt"
        with text.open("wb") as file:
            words, environment = command(step, folder, out), {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True, env=environment)
        return Child(process, text, time.monotonic())

    def family(self) -> dict[str, list[psutil.Process]]:
        """Who can be killed, by kind."""
        found: dict[str, list[psutil.Process]] = {"main": [psutil.Process(self.process.pid)]}
        for one in found["main"][0].children(recursive=True):
            try:
                words, above = " ".join(one.cmdline()), " ".join(one.parent().cmdline())  # type: ignore[union-attr]
            except (psutil.Error, AttributeError):
                continue
            if "forkserver" in words and "forkserver" in above:
                found.setdefault("worker", []).append(one)
            elif "torch.distributed.run" in above and "histoscale.launch" in words:
                found.setdefault("rank", []).append(one)
        return found

    def ended(self, within_s: float) -> int | None:
        """The exit code; None when it still runs after so long."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Of a command that hangs, and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def all_gone(self, family: dict[str, list[psutil.Process]]) -> None:
        """Waits for its family and whoever was in its session: ranks have sessions of their own, and save themselves when their
        torchrun was killed. Raises Found for those that stay."""
        until = time.monotonic() + LIMIT_S
        _, stay = psutil.wait_procs([one for some in family.values() for one in some], LIMIT_S)
        if stay:
            raise Found(f"left behind: {stay}; {self.text.read_text()}")
        while left := [one for one in psutil.process_iter() if session(one.pid) == self.process.pid != one.pid]:
            if time.monotonic() > until:
                raise Found(f"left behind: {[' '.join(one.cmdline()) for one in left]}; {self.text.read_text()}")
            time.sleep(0.1)


def session(pid: int) -> int:
    """The session that a process belongs to; 0 for one that has ended."""
    try:
        return os.getsid(pid) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else 0
    except (ProcessLookupError, psutil.Error):
        return 0


def calm(steps: list[str], folder: Path, out: Path) -> dict[str, float]:
    """Every command once, undisturbed; the seconds of each."""
    taken = {}
    for step in steps:
        child = Child.start(step, folder, out)
        if child.ended(LIMIT_S * 2) != 0:
            raise Found(f"{step} of the calm run: {child.text.read_text()}")
        taken[step] = time.monotonic() - child.began
        print(f"calm: {step} took {taken[step]:.1f} s", flush=True)
    return taken


def disturbed(
    step: str, kills: int, chance: random.Random, folder: Path, out: Path, seconds: float, far: Far, account: Account
) -> None:
    """One command, killed so often and started again until it is done."""
    done = account.killed
    child, until = Child.start(step, folder, out), done.total() + kills
    while done.total() < until:
        if (code := child.ended(chance.uniform(0, seconds))) is not None:
            finished(step, code, child)  # before the next kill: from the start again
            rmtree(out / step)
            child = Child.start(step, folder, out)
            continue
        kinds = [*STEPS[step], *sorted(far.up)]
        least = [kind for kind in kinds if done[kind] == min(done[kind] for kind in kinds)]
        kind = "rank" if "rank" in least else chance.choice(least)
        family = child.family()
        if kind not in family and kind not in far.up:
            continue  # it has yet to come
        account.pids |= {one.pid for some in family.values() for one in some}
        done[kind] += 1
        print(f"{step} after {time.monotonic() - child.began:.1f} s: kill {done.total()}: {kind}", flush=True)
        if kind in ("server", "proxy"):
            far.kill(kind, chance.uniform(0, 3))
            continue
        try:
            chance.choice(family[kind]).kill()
        except psutil.NoSuchProcess:
            continue
        try:
            told(step, kind, child.ended(LIMIT_S), child)
            child.all_gone(family)
        except Found as wrong:  # one must not hide the others
            print(f"FOUND {wrong}", flush=True)
            account.faults.append(str(wrong))
            child.end()
        child = Child.start(step, folder, out)
    if (code := child.ended(LIMIT_S * 2)) is None:
        raise Found(f"{step} hangs: {child.text.read_text()}")
    finished(step, code, child)
    child.all_gone({})


def finished(step: str, code: int, child: Child) -> None:
    if code != 0:
        raise Found(f"{step} ended with {code}: {child.text.read_text()}")


def told(step: str, kind: str, code: int | None, child: Child) -> None:
    """How a command may end when one of its processes was killed: soon, in a sentence, with the code of the README."""
    text = child.text.read_text()
    if code is None:
        raise Found(f"{step} hangs after the death of a {kind}: {text}")
    own = [line for line in text.split("\n") if "Traceback" in line]
    expected = {"main": (-signal.SIGKILL, 0), "worker": (2, 0), "rank": (1, 0)}[kind]  # 0: it was done already
    if code not in expected or (own and kind != "rank"):
        raise Found(f"{step} ended with {code} after the death of a {kind}: {text}")


def results(out: Path, steps: Iterable[str]) -> dict[str, Any]:
    """What must be equal, whatever was killed."""
    return {f"{step} {name}": value for step in steps for name, value in RESULTS[step](out / step).items()}


def index_results(out: Path) -> dict[str, Any]:
    catalog = json.loads((out / "catalog.json").read_text())
    return {name: catalog[name] for name in ("hash", "folder", "files")}


def pretrain_results(out: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tensors = read_tensors(read_checkpoint(out), "")
    return {name: x.numpy().tobytes() for name, x in tensors.items()} | {
        "losses": [(row["step"], row["loss"]) for row in rows if "loss" in row]
    }


def probe_results(out: Path) -> dict[str, Any]:
    with np.load(out / "predictions.npz") as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files if name != "about"}


def embed_results(out: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(out.glob("*.h5")):
        with h5py.File(path) as file:
            found |= {f"{path.name} {name}": file[name][()].tobytes() for name in ("features", "coords")}
    return found


def mil_results(out: Path) -> dict[str, Any]:
    return {"scores": (out / "scores.csv").read_bytes()}


RESULTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "index": index_results, "pretrain": pretrain_results, "probe": probe_results, "embed": embed_results, "mil": mil_results,
}  # fmt: skip


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def leftovers(pids: set[int], *outs: Path) -> list[str]:
    """What the last start should have cleaned; in /dev/shm, where others of this machine work too, of these processes."""
    found = [str(path) for out in outs for path in (*out.rglob("*.partial"), *out.rglob(".lease-*"))]
    return found + [str(path) for path in Path("/dev/shm").glob("sem.hs*") if int(path.name.split("-")[1]) in pids]


def main(kills: int, seed: int, folder: Path) -> Counter[str]:
    """Raises Found."""
    chance, began, account = random.Random(seed), time.monotonic(), Account()
    shares = Counter(SHARED[number % len(SHARED)] for number in range(kills))
    steps = [step for step in STEPS if shares[step] or step not in ENDS]
    lay(folder)
    far = Far(folder / "far")
    try:
        rows = [{"slide_id": f"s{n:02d}", "uri": f"{far.servers['proxy'].url}/s{n:02d}.svs", "patient_id": f"p{n}",
                 "site": "ab"[n % 2], "tumour": n // 2 % 2} for n in range(SLIDES)]  # fmt: skip
        table(folder / "manifest.csv", rows)
        for name in ("calm", "wild"):
            (folder / name).mkdir()
        seconds = calm(steps, folder, folder / "calm")
        for step in steps:
            if shares[step]:
                disturbed(step, shares[step], chance, folder, folder / "wild", seconds[step], far, account)
            else:
                copytree(folder / "calm" / step, folder / "wild" / step)
    finally:
        far.stop()
    one, other = (results(folder / name, shares) for name in ("calm", "wild"))
    wrong, left = differences(one, other), leftovers(account.pids, folder / "calm", folder / "wild")
    done, faults, took_s = account.killed, account.faults, time.monotonic() - began
    print(f"{done.total()} kills in {took_s:.0f} s: {dict(done)}; {len(one)} results compared", flush=True)
    if wrong or left or faults:
        raise Found(f"results differ: {wrong}; left over: {left}; {len(faults)} commands ended otherwise than they should")
    return done


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    except Found as found:
        sys.exit(f"FOUND {found}")
