"""A clock that somebody sets while a run is under way steers nothing: pauses, tokens, rates and results are as before."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_dying import LONG

from histoscale.data.clients.azure import Azure
from histoscale.data.clients.faults import Refusal, retry_after_s

# clock_gettime and its kin give the real time of day two days ahead in every other second; steady clocks are left alone.
JUMPS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static long shift(long seconds) { return seconds % 2 ? 172800 : 0; }
int clock_gettime(clockid_t which, struct timespec *found) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(which, found);
    if (!failed && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) found->tv_sec += shift(found->tv_sec);
    return failed;
}
int gettimeofday(struct timeval *found, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.mark.parametrize("ahead_s", [-172800.0, 0.0, 172800.0])
def test_a_date_to_wait_for_is_by_the_clock_of_the_store(ahead_s: float) -> None:
    now = time.time() + ahead_s
    headers = {"Retry-After": formatdate(now + 60, usegmt=True), "Date": formatdate(now, usegmt=True)}
    assert retry_after_s(Refusal(503, "busy", headers)) == 60.0


def test_a_token_is_asked_for_once_however_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    steady, asked = time.time, []

    class Credential:
        async def get_token(self, scope: str) -> SimpleNamespace:
            asked.append(scope)
            return SimpleNamespace(token=f"t{len(asked)}", expires_on=int(steady()) + 3600)

    async def tokens() -> list[str]:
        client, found = Azure("az", {"account_name": "a"}), []
        for ahead_s in (0.0, 172800.0, -172800.0):
            monkeypatch.setattr(time, "time", lambda ahead_s=ahead_s: steady() + ahead_s)
            found.append(await client._bearer(Credential()))
        return found

    assert asyncio.run(tokens()) == ["t1"] * 3


@pytest.fixture(scope="module")
def jumping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that, loaded first, makes the time of day jump for a process."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler that makes a library to be loaded first")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "jumps.c").write_text(JUMPS)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "jumps.so", folder / "jumps.c", "-ldl"], check=True)
    return folder / "jumps.so"


@pytest.mark.slow
def test_a_run_under_a_clock_that_jumps_is_the_run_of_a_steady_one(tmp_path: Path, tiles: Path, jumping: Path) -> None:
    keys = [key for key in LONG if "schedule.steps" not in key] + ["schedule.steps=6", "stream.workers=1", f"tiles={tiles}"]
    rows, base = [], {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, first in (("steady", ""), ("jumping", str(jumping))):
        words = [sys.executable, "-m", "histoscale.launch.pretrain", *keys, f"out={tmp_path / name}"]
        done = subprocess.run(words, env={**base, "LD_PRELOAD": first}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        read = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        rows.append([(row["step"], row["loss"]) for row in read if "loss" in row])
        rates = re.findall(r"  (\S+)/s  ", done.stderr)
        assert rates and all(0 <= float(rate) < 1e5 for rate in rates)
    assert rows[0] == rows[1]
    seen = [sys.executable, "-c", "import time; print({[time.time() // 86400, time.sleep(.3)][0] for _ in range(8)})"]
    assert "," in subprocess.run(seen, env={**os.environ, "LD_PRELOAD": str(jumping)}, capture_output=True, text=True).stdout
