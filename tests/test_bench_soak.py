"""`bench what=soak`: a slope with its interval, and a leak that is put into a process is named."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from histoscale.launch.bench import SoakConfig
from histoscale.launch.bench_soak import look, trend, trends
from histoscale.launch.config import load
from histoscale.launch.footprint import family
from histoscale.launch.loopback import Absent, find_azurite, tied
from histoscale.launch.run import invoke

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system has no smaps_rollup")
CALM = "import time; kept = bytearray(8 << 20); print(flush=True); time.sleep(60)"
LEAKS = {
    "main_own_bytes": "kept.append(bytearray(100_000))",
    "descriptors": "kept.append(open('/dev/null'))",
    "threads": "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "processes": "kept.append(subprocess.Popen(['sleep', '60']))",
}
LEAKING = "import subprocess, threading, time\nkept = []\nprint(flush=True)\nwhile True:\n    {}\n    time.sleep(0.01)"
# What site runs in every Python of the run: descriptors are lost in the main process of pretrain alone.
SITE = """
import sys
if "pretrain" in sys.orig_argv and "-m" in sys.orig_argv[:2]:
    import threading, time
    lost = []
    def leak():
        while True:
            lost.append(open("/dev/null"))
            time.sleep(0.2)
    threading.Thread(target=leak, daemon=True).start()
"""


@pytest.fixture(scope="module")
def rule() -> SoakConfig:
    found: SoakConfig = load("bench", ["what=soak"]).config.soak
    return found


def watched(code: str, rule: SoakConfig) -> dict[str, str]:
    """The verdicts on a program, looked at for two seconds from its first line on, but for what other programs move."""
    at, looks = [], []
    with subprocess.Popen(tied([sys.executable, "-c", code]), stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"\n"
        for number in range(40):
            at.append(float(number))
            looks.append(look(child.pid))
            time.sleep(0.05)
        child.kill()
    moved = ("main_pss_bytes", "workers_pss_bytes", "shm_bytes", "device_bytes")
    return {name: one["verdict"] for name, one in trends(at, looks, rule).items() if name not in moved}


def test_a_calm_process_is_flat(rule: SoakConfig) -> None:
    assert set(watched(CALM, rule).values()) == {"flat"}


@pytest.mark.parametrize("what", LEAKS)
def test_a_leak_is_named(what: str, rule: SoakConfig) -> None:
    verdicts = watched(LEAKING.format(LEAKS[what]), rule)
    assert verdicts[what] == "grows"
    others = set(verdicts) - {what, "main_own_bytes"}
    assert what == "processes" or {verdicts[name] for name in others} == {"flat"}  # a process has threads and descriptors too


def test_a_process_whose_threads_end_while_it_is_looked_at_is_there() -> None:
    code = "import threading\nprint(flush=True)\nwhile True:\n    threading.Thread(target=len, args=('',)).start()"
    with subprocess.Popen(tied([sys.executable, "-c", code]), stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"\n"
        assert all(next(family(child.pid), None) == child.pid for _ in range(2000))
        child.kill()


def test_a_slope_and_its_interval(rule: SoakConfig) -> None:
    """3 an hour under noise, one outlier in ten, and a warm-up that rises ten times as fast."""
    draw, hours = np.random.default_rng(0), np.linspace(0, 2, 600)
    values = 100 + 3 * hours + draw.normal(0, 0.5, 600) + 50 * (draw.random(600) < 0.1) + 30 * np.minimum(hours, 0.5)
    found = trend(hours, values, rule)
    assert found.low < 3 < found.high and found.high - found.low < 2 and found.verdict == "grows"
    assert trend(hours, -values, rule).verdict == "falls"
    still = trend(hours, np.full(600, 7.0), rule)
    assert (still.level, still.slope, still.low, still.high, still.verdict) == (7.0, 0.0, 0.0, 0.0, "flat")
    jump = trend(hours, np.where(hours < 1.6, 5.0, 9.0), rule)
    assert jump.low <= 0 <= jump.high


def test_calm_noise_is_rarely_called_growth(rule: SoakConfig) -> None:
    draw, hours = np.random.default_rng(1), np.linspace(0, 0.5, 300)
    grown = sum(trend(hours, draw.normal(0, 1, 300), rule).verdict != "flat" for _ in range(300))
    assert grown <= 12  # 1 % of 300 is 3


def test_too_few_looks_are_refused(rule: SoakConfig) -> None:
    with pytest.raises(ValueError, match=r"5 looks are left behind the warm-up: expected at least 8.*soak.look_s=2"):
        trend(np.arange(8.0), np.arange(8.0), rule)


@pytest.mark.slow
def test_a_soak_in_miniature_names_the_leak_that_was_put_into_pretrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        find_azurite()
    except Absent as absent:
        pytest.skip(str(absent))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")
    sizes = ["soak.minutes=0.5", "soak.opens=150", "soak.embeds=200", "soak.look_s=0.1", "soak.cohort=[cohort=tiny]"]
    outages = ["soak.faults.outage_s=2", "soak.faults.outage_every_s=10"]
    small = "recipe=demo,model.depth=1,optim.global_batch=8,method.group=8,monitor.labelled_every=10"
    probed = "online.dataset.report=test,online.patches=64,online.initialisations=1"
    fast = [f"soak.pretrain=[{small},{probed}]", f"out={tmp_path}/out", "logging.progress=off"]
    found = invoke("bench", ["what=soak", *sizes, *outages, *fast])["bench"]["soak"]
    pretrain = found["pretrain"]
    assert pretrain["steps"] > 0 and pretrain["probes"] > 0 and pretrain["proxy"]["throttle"] > 0 and pretrain["proxy"]["cut"] > 0
    leak = pretrain["trends"]["descriptors"]
    assert leak["verdict"] == "grows" and 0.2 * 18_000 < leak["slope"] < 2 * 18_000  # one in .2 s; connections come and go
    for name in ("opens", "embeds"):
        assert found[name]["trends"]["descriptors"]["verdict"] == "flat", found[name]["trends"]
