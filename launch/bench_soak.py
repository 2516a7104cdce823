"""Does anything grow? Minutes of pretraining from a store that fails, thousands of slides opened, a thousand embedded: memory,
threads, descriptors, shared and device memory of the processes, looked at from outside, each with its slope and an interval.

The slope is Theil and Sen's, the median over all pairs, of medians of blocks of looks: neither a jump nor an outlier moves it
much. What was seen while caches filled is left out.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import theilslopes

from histoscale.data.journal import Journal
from histoscale.data.processes import settle, worker_context
from histoscale.data.readers import vendor
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import Store
from histoscale.launch.bench_remote import behind
from histoscale.launch.footprint import descriptors, family, own_pss_bytes, threads
from histoscale.launch.loopback import Proxy, azurite, connection_string, filled_container, proxy, tied
from histoscale.launch.run import EXIT_PREEMPTED, invoke

if TYPE_CHECKING:
    from histoscale.launch.bench import Config, FaultsConfig, SoakConfig

WORDS = {
    "main_pss_bytes": "PSS of the main process",
    "main_own_bytes": "  of it not of files",
    "workers_pss_bytes": "PSS of its workers",
    "workers_own_bytes": "  of it not of files",
    "processes": "processes",
    "threads": "threads",
    "descriptors": "file descriptors",
    "shm_bytes": "/dev/shm of this machine",
    "device_bytes": "memory of the device",
}
Look = dict[str, float]  # by the names above
_ENDLESS = 1_000_000_000  # steps: the clock ends it
_STOP_S = 120.0  # to save itself in
_FEWEST = 8  # looks that a slope is fitted to
_REGION_PX = 64
_SHM = Path("/dev/shm")
_NOT_OF_FILES = ("Pss_Anon", "Pss_Shmem")  # pages of files count for less while other programs have them too


@dataclass(frozen=True)
class Trend:
    """level: the median. slope with its interval: per hour, or per 1,000 slides."""

    level: float
    slope: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "grows" if self.low > 0 else "falls" if self.high < 0 else "flat"


def soak(config: "Config", journal: Journal) -> dict[str, Any]:
    """Measure, print, and return the numbers. Raises Absent where Azurite is not installed, ValueError where the system has no
    smaps_rollup or the looks are too few, OSError where a run ends by itself."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise ValueError("bench what=soak reads /proc/PID/smaps_rollup, which this system lacks: run it on Linux")
    rule, folder = config.soak, journal.path(f"soak/{time.time_ns()}/x").parent
    _quiet("cohort", *rule.cohort, f"out={folder}/cohort")
    slides = sorted((folder / "cohort/slides").iterdir())
    found = {}
    with azurite(None) as server, proxy(server) as between, filled_container(server, {p.name: p for p in slides}) as container:
        option = f"storage.options.az.connection_string='{connection_string(between.url)}'"
        manifest = folder / "cohort/manifest.csv"
        (folder / "remote.csv").write_text(manifest.read_text().replace(",slides/", f",{container}/"))
        _quiet("index", f"manifest={manifest}", f"out={folder}/local")
        _quiet("index", f"manifest={folder}/remote.csv", f"out={folder}/remote", option)
        found["pretrain"] = _pretrain(folder, option, between, rule)
        journal.say(_text("pretrain", found["pretrain"], rule))
        between.set()
        store = behind(config.storage, config.storage.backend, between)
        found["opens"] = _opens([f"{container}/{path.name}" for path in slides], slides, store, rule)
        journal.say(_text("opens", found["opens"], rule))
    found["embeds"] = _embeds(folder, slides, rule)
    journal.say(_text("embeds", found["embeds"], rule))
    return found


def _quiet(command: str, *words: str) -> None:
    invoke(command, [*words, "logging.progress=off"])


def look(pid: int) -> Look:
    """What a process and its descendants hold now. /dev/shm and the device are those of the machine: what nobody maps any more
    counts too."""
    main, *others = list(family(pid)) or [pid]
    now: Look = {
        "main_pss_bytes": own_pss_bytes(main),
        "main_own_bytes": own_pss_bytes(main, _NOT_OF_FILES),
        "workers_pss_bytes": sum(map(own_pss_bytes, others)),
        "workers_own_bytes": sum(own_pss_bytes(other, _NOT_OF_FILES) for other in others),
        "processes": 1 + len(others),
        "threads": sum(map(threads, (main, *others))),
        "descriptors": sum(map(descriptors, (main, *others))),
    }
    if _SHM.exists():
        disk = os.statvfs(_SHM)
        now["shm_bytes"] = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        now["device_bytes"] = total - free
    return now


def trends(at: list[float], looks: list[Look], rule: "SoakConfig") -> dict[str, dict[str, Any]]:
    """The trend of each series, with its verdict. Raises ValueError for too few looks."""
    found = {}
    for name in looks[0] if looks else ():
        one = trend(np.array(at), np.array([each[name] for each in looks]), rule)
        found[name] = {**asdict(one), "verdict": one.verdict}
    return found


def trend(at: np.ndarray, values: np.ndarray, rule: "SoakConfig") -> Trend:
    """at, values: [n] in the order of time. Raises ValueError for too few."""
    late = at >= at[0] + rule.warm_up * (at[-1] - at[0])
    if late.sum() < _FEWEST:
        wanted = f"expected at least {_FEWEST}; let it run longer, or look more often (soak.look_s={rule.look_s:g})"
        raise ValueError(f"{late.sum()} looks are left behind the warm-up: {wanted}")
    at, values = at[late], values[late]
    blocks = np.array_split(np.arange(len(at)), min(rule.blocks, len(at)))
    x, y = ([float(np.median(series[block])) for block in blocks] for series in (at, values))
    slope, _, low, high = theilslopes(y, x, alpha=rule.confidence)
    return Trend(float(np.median(values)), float(slope), float(low), float(high))


def _pretrain(folder: Path, option: str, between: Proxy, rule: "SoakConfig") -> dict[str, Any]:
    """A run on the remote catalog, probed on the local one, which is asked to stop when its time is over."""
    out = folder / "pretrain"
    inputs = [f"catalog={folder}/remote", f"monitor.labelled={folder}/cohort", f"online.catalog={folder}/local"]
    words = [*rule.pretrain, *inputs, f"schedule.steps={_ENDLESS}", option]
    hours: list[float] = []
    looks: list[Look] = []
    with _running("pretrain", words, out) as run:
        while not (out / "metrics.jsonl").exists() and run.poll() is None:  # its first row, behind the first probe
            time.sleep(rule.look_s)
        start = time.monotonic()
        while (seconds := time.monotonic() - start) < 60 * rule.minutes and run.poll() is None:
            _spoil(between, rule.faults, seconds)
            hours.append(seconds / 3600)
            looks.append(look(run.pid))
            time.sleep(rule.look_s)
        _spoil(between, rule.faults, 0)
        run.send_signal(signal.SIGTERM)
        _ended(run, EXIT_PREEMPTED, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "per": "hour",
        "looks": len(looks),
        "steps": max(row.get("step", 0) for row in rows),
        "probes": sum("online/knn" in row for row in rows),
        "proxy": between.counts(),
        "trends": trends(hours, looks, rule),
    }


def _spoil(between: Proxy, wanted: "FaultsConfig", seconds: float) -> None:
    """Tells the proxy its faults so long after the start; every outage ends a turn."""
    out = seconds % wanted.outage_every_s > wanted.outage_every_s - wanted.outage_s
    shares = {"throttle": wanted.throttle, "cut": wanted.cut, "corrupt": wanted.corrupt, "stall": wanted.stall}
    between.set(delay_s=wanted.delay_s, **shares, out=out)


@contextmanager
def _running(command: str, words: list[str], out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process of its own, which ends with this one; what it says goes to a file beside its `out`."""
    program = [sys.executable, "-m", "histoscale.launch.cli", command, *words, "logging.progress=lines", f"out={out}"]
    with out.with_suffix(".txt").open("wb") as said:
        run = subprocess.Popen(tied(program), stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            yield run
        finally:
            run.kill()
            run.wait()


def _ended(run: subprocess.Popen[bytes], expected: int, out: Path) -> None:
    """Waits for its end. Raises OSError for another exit code, or none."""
    try:
        code: int | str = run.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        code = f"nothing after {_STOP_S:.0f} s"
    if code != expected:
        raise OSError(f"{out.name} ended with {code}, not {expected}: see {out.with_suffix('.txt')}")


def _opens(uris: list[str], paths: list[Path], store: Store, rule: "SoakConfig") -> dict[str, Any]:
    """Slides are opened in turn, in the store and on the disk, by a child that waits while it is looked at."""
    turns = [(uri, False) for uri in uris] + [(str(path), vendors) for path in paths for vendors in (False, True)]
    context = worker_context()
    here, there = context.Pipe()
    every = max(1, rule.opens // (4 * rule.blocks))
    child = context.Process(target=_open, args=(turns, store, rule.opens, every, there), daemon=True)
    child.start()
    there.close()
    thousands: list[float] = []
    looks: list[Look] = []
    try:
        while (opened := here.recv()) is not None:
            assert child.pid is not None
            thousands.append(opened / 1000)
            looks.append(look(child.pid))
            here.send(None)
    except EOFError:
        raise OSError(f"the child that opens slides ended after some {1000 * thousands[-1]:.0f}") from None
    finally:
        child.kill()
        child.join()
    return {"per": "1,000 slides", "looks": len(looks), "slides": rule.opens, "trends": trends(thousands, looks, rule)}


def _open(turns: list[tuple[str, bool]], store: Store, count: int, every: int, pipe: Connection) -> None:
    """Reads header and a region of the smallest level of one after the other, and lets go of each. vendors: by OpenSlide."""
    settle()
    for number in range(count):
        uri, vendors = turns[number % len(turns)]
        layout = vendor.read_header(uri, store) if vendors else read_layout(uri, store)
        open_reader(uri, layout, store).region(len(layout.levels) - 1, 0, 0, _REGION_PX, _REGION_PX)
        if number % every == 0:
            pipe.send(number)
            pipe.recv()
    pipe.send(None)


def _embeds(folder: Path, slides: list[Path], rule: "SoakConfig") -> dict[str, Any]:
    """As many names as are asked for of the slides that were drawn, embedded in one run with what was trained."""
    many, out = folder / "many", folder / "embeddings"
    many.mkdir()
    rows = []
    for number in range(rule.embeds):
        os.link(slides[number % len(slides)], many / f"{number}.svs")
        rows.append(f"{number},{number}.svs,{number}")
    (many / "manifest.csv").write_text("\n".join(["slide_id,uri,patient_id", *rows]) + "\n")
    _quiet("index", f"manifest={many}/manifest.csv", f"out={folder}/catalog")
    words = [*rule.embed, f"encoder={folder}/pretrain", f"catalog={folder}/catalog"]
    thousands: list[float] = []
    looks: list[Look] = []
    with _running("embed", words, out) as run:
        while run.poll() is None:
            done = len(list(out.glob("*.h5"))) / 1000
            if done > (thousands[-1] if thousands else 0):
                thousands.append(done)
                looks.append(look(run.pid))
            time.sleep(rule.look_s)
        _ended(run, 0, out)
    return {"per": "1,000 slides", "looks": len(looks), "slides": rule.embeds, "trends": trends(thousands, looks, rule)}


def _text(what: str, found: dict[str, Any], rule: "SoakConfig") -> str:
    counts = ", ".join(f"{found[name]:,} {name}" for name in ("steps", "probes", "slides", "looks") if name in found)
    lines = [f"{what}: {counts}, the first {rule.warm_up:.0%} left out; {rule.confidence:.0%} intervals"]
    if "proxy" in found:
        lines.append("  the proxy counted " + ", ".join(f"{count:,} {kind}" for kind, count in found["proxy"].items() if count))
    for name, one in found["trends"].items():
        unit, scale = ("MB ", 1e-6) if name.endswith("bytes") else ("", 1)
        level, slope, low, high = (scale * one[part] for part in ("level", "slope", "low", "high"))
        verdict = "flat:" if one["verdict"] == "flat" else f"{one['verdict'].upper()} by"
        change = f"{verdict} {slope:.3g} [{low:.3g}, {high:.3g}] {unit}per {found['per']}"
        lines.append(f"  {WORDS[name]:26} {level:9.4g} {unit:3} {change}")
    return "\n".join(lines)
