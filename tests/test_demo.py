"""The demo, small: every stage through its own command, in one process, ending in a page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from histoscale.launch.demo_report import worth

SMALL = [
    "stages.cohort=['cohort=tiny','cohort.cases=2']",
    "stages.pretrain=['recipe=demo','stream.workers=0','optim.global_batch=16','schedule.steps=6','schedule.warmup_steps=2']",
    "stages.mil=['task=cohort','mil.folds=2','mil.epochs=2','evidence.slides=2']",
    "proof.ceiling.steps=4",
]


def demo(out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "histoscale.launch.cli", "demo", f"out={out}", *SMALL, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_from_nothing_to_a_page_and_again(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    first = demo(out)
    assert first.returncode == 0, first.stderr
    summary = json.loads((out / "summary.json").read_text())
    found = worth(summary["probe"], "linear", "report")
    for name in ("pretrain", "random", "colour"):
        assert {"value", "low", "high"} <= found[name]["balanced_accuracy"].keys()
    assert {"value", "low", "high"} <= found["pretrain"]["minus"]["random"]["balanced_accuracy"].keys()
    assert {"value", "low", "high"} <= summary["mil"]["external"]["auc"].keys()
    assert summary["peak_pss_bytes"] > 0
    assert set(summary["stages"]) >= {"cohort", "catalog", "pretrain", "probe", "release", "mil", "proof"}
    page = (out / "report.html").read_text()
    assert "above the untrained encoder" in page and page.count("<img") >= 3 and page.count("<svg") >= 2

    shown = re.findall(r"^\$ (histoscale .*)$", first.stderr, re.MULTILINE)
    assert len(shown) == 8  # what it ran can be typed
    again = demo(out)
    assert again.returncode == 0 and "nothing to do" in again.stderr
    other = demo(out, "seed=1")
    assert other.returncode == 2 and "seed: 0 there, 1 now" in other.stderr
