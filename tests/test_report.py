"""The page: self-contained, escaped, drawable; and what a run weighs."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histoscale.eval.drawings import Line, steps_plot
from histoscale.eval.page import Chapter, Drawing, Picture, inline, write_page
from histoscale.launch.demo_report import chance_words, difference_words, number
from histoscale.launch.footprint import Footprint, memory_bytes, rss_bytes

EVIL = '<script>document.title = "owned"</script>'


@pytest.fixture
def page(tmp_path: Path) -> Path:
    line = Line(EVIL, np.array([[0.0, 1.0], [5.0, 0.9], [10.0, 0.7]]), np.zeros((0, 2)), "ours")
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 90)).save(picture, "png")
    parts = [Drawing(steps_plot([line], EVIL, 1.0), EVIL), Picture(inline(picture.getvalue(), "png"), EVIL, EVIL)]
    write_page(tmp_path / "report.html", EVIL, EVIL, {EVIL: EVIL}, [Chapter(EVIL, parts)])
    return tmp_path / "report.html"


def test_nothing_outside_the_file_and_nothing_unescaped(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    links = re.findall(r"(?:src|href)=\"([^\"]*)", text)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert text.count("<svg") == 1 and text.count("<img") == 1
    assert list(page.parent.iterdir()) == [page]  # no partial file stays


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_it(page: Path, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=800,1200", "--hide-scrollbars"]
    shot = tmp_path / "shot.png"


    def chromium(*what: str) -> str:
        command = ["chromium", *flags, *what, page.as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    chromium(f"--screenshot={shot}")
    assert "<title>&lt;script&gt;" in chromium("--dump-dom")  # the browser kept the title as text and ran nothing
    assert len(np.unique(np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_scores_are_told_with_what_may_be_chance() -> None:
    assert number({"value": 0.81234, "low": 0.7, "high": 0.9}) == "0.812 [0.700, 0.900]"
    assert number({"value": 0.5, "low": None, "high": None, "note": "withheld: 7 patients"}) == "0.500 [withheld]"
    assert number(None) == number({"value": None}) == "–"
    assert difference_words({"value": 0.1, "low": 0.05, "high": 0.15}) == "+0.100 [+0.050, +0.150]"
    assert difference_words({"value": 0.1, "low": -0.05, "high": 0.15}).endswith("which may be chance")
    said = {"It is better": (0.7, 0.55, 0.85), "It is worse": (0.3, 0.2, 0.4), "Its interval holds": (0.6, 0.4, 0.8)}
    for words, (value, low, high) in said.items():
        assert chance_words({"value": value, "low": low, "high": high}).startswith(words)
    assert chance_words({"value": 0.9, "low": None, "high": None}).startswith("Without an interval")


def test_footprint_sees_what_a_stage_held() -> None:
    footprint = Footprint(0.01)
    before = memory_bytes()
    with footprint.stage("big"):
        held = np.ones(200 << 20, np.uint8)
        assert memory_bytes() > before
    del held
    with footprint.stage("small"):
        assert memory_bytes() > 0
    big, small = footprint.stages
    assert big.peak_bytes > before + (150 << 20) > small.peak_bytes
    assert big.seconds > 0


def test_a_footprint_holds_the_children_of_a_stage() -> None:
    hold = "import sys; held = b'x' * (100 << 20); print('up', flush=True); sys.stdin.read()"
    before, alone, footprint = rss_bytes(os.getpid()), memory_bytes(), Footprint(0.01)
    with footprint.stage("child"), subprocess.Popen([sys.executable, "-c", hold], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "up\n"
        assert rss_bytes(os.getpid()) > before + (90 << 20)
        footprint._look()
        child.communicate()
    assert footprint.stages[0].peak_bytes > alone + (90 << 20)


def test_a_peak_is_seen_where_shared_pages_become_own_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident pages stay as many, while others let go of them: the share of this process rises."""
    from histoscale.launch import footprint as module

    shares = iter([100, 500, 300, 200])
    monkeypatch.setattr(module, "rss_bytes", lambda pid: 1000)
    monkeypatch.setattr(module, "memory_bytes", lambda: next(shares))
    footprint = Footprint(3600)
    with footprint.stage("shared"):
        footprint._look()
        footprint._look()
    assert footprint.stages[0].peak_bytes == 500
