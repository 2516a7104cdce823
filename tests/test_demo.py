"""The demo, small: every stage through its own command, in one process, ending in a page."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from histoscale.data.journal import Journal, JournalConfig, aside
from histoscale.launch.demo_report import worth

SMALL = [
    "stages.cohort=['cohort=tiny','cohort.cases=2']",
    "stages.pretrain=['recipe=demo','stream.workers=0','optim.global_batch=16','schedule.steps=6','schedule.warmup_steps=2']",
    "stages.mil=['task=cohort','mil.folds=2','mil.epochs=2','evidence.slides=2']",
]


def demo(out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "histoscale.launch.cli", "demo", f"out={out}", *SMALL, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_what_is_said_aside_leaves_the_terminal_and_progress_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal, log = Journal(tmp_path, JournalConfig("lines", 0.0, "off", "test", False)), io.StringIO()
    with aside(log):
        journal.say("a table, https://h/x?token=abcdefgh")
        with journal.progress(2, "counting", "things") as progress:
            progress.advance()
            progress.advance()
    journal.say("the end")
    shown = capsys.readouterr().err.splitlines()
    assert log.getvalue() == "a table, https://h/x?token=***\n"
    assert [line.split("  ")[0] for line in shown] == ["counting: 1/2 things", "counting: 2/2 things", "the end"]  # each once


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
    assert "encoder less floor" in page and page.count("<img") >= 3 and page.count("<svg") >= 2

    shown = re.findall(r"^\$ (histoscale .*)$", first.stderr, re.MULTILINE)
    assert len(shown) == 8  # what it ran can be typed
    log = (out / "log.txt").read_text()
    assert "What this study cannot say" in log and "What this study cannot say" not in first.stderr
    assert not re.search(r"^\s*NOT\b", first.stderr, re.MULTILINE)  # ranges over many cohorts are no verdict on one
    opened, following = re.findall(r"^(?:open|next): (.*)$", first.stderr, re.MULTILINE)[-2:]
    assert Path(url2pathname(urlsplit(opened).path)) == out / "report.html"
    assert re.fullmatch(r"\S*histoscale index manifest=manifest.csv out=runs/catalog   \(.*\)", following)
    links = set(re.findall(r'href="([^"#]+)"', page))
    assert {"mil/report.html", "probe/report.html", "release/README.md"} <= links
    assert all((out / link).exists() for link in links)
    again = demo(out)
    assert again.returncode == 0 and "nothing to do" in again.stderr
    other = demo(out, "seed=1")
    assert other.returncode == 2 and "seed: 0 there, 1 now" in other.stderr
