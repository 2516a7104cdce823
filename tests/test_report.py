"""The page: self-contained, escaped, drawable; and what a run weighs."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histoscale.eval.report import (
    Section,
    Table,
    curves_figure,
    interval_figure,
    number,
    patch_sheet,
    picture,
    write_report,
)
from histoscale.launch.footprint import Footprint, memory_bytes

EVIL = '<script>document.title = "owned"</script>'


@pytest.fixture
def page(tmp_path: Path) -> Path:
    rows = [{"step": i, "loss": 1.0 / (i + 1), "gone": None} for i in range(5)]
    curves = curves_figure(rows, {EVIL: {"loss": "loss", "gone": "gone"}}, {EVIL: 0.5})
    scores = {EVIL: {"value": 0.7, "low": 0.6, "high": 0.8}, "withheld": {"value": 0.5, "low": None}}
    intervals = interval_figure(scores, "BA", 0.25)
    pixels = picture(np.zeros((4, 4, 3), np.uint8), EVIL)
    table = Table((EVIL,), [(EVIL,)], EVIL)
    section = Section(EVIL, f"{EVIL}\n\nsecond", [table], [(curves, EVIL), (intervals, EVIL), (pixels, EVIL)])
    write_report(tmp_path / "report.html", EVIL, EVIL, {EVIL: EVIL}, [section])
    return tmp_path / "report.html"


def test_nothing_outside_the_file_and_nothing_unescaped(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    links = re.findall(r"(?:src|href)=\"([^\"]*)", text)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert text.count("<svg") == 2 and text.count("<p>") >= 2
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


def test_numbers_say_why_an_interval_is_missing() -> None:
    assert number({"value": 0.81234, "low": 0.7, "high": 0.9}) == "0.812 [0.700, 0.900]"
    assert number({"value": 0.5, "low": None, "high": None, "note": "withheld: 7 patients"}) == "0.500 [withheld: 7 patients]"
    assert number(None) == number({"value": None}) == "–"


def test_patches_stand_in_reading_order() -> None:
    patches = np.stack([np.full((3, 2, 2), i, np.uint8) for i in range(5)])
    sheet = patch_sheet(patches, columns=3, gap_px=1)
    assert sheet.shape == (5, 8, 3)
    assert [int(sheet[y, x, 0]) for y, x in ((0, 0), (0, 3), (0, 6), (3, 0), (3, 3))] == [0, 1, 2, 3, 4]
    assert (sheet[2] == 255).all() and (sheet[3:, 6:] == 255).all()


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
