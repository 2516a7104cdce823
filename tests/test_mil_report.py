"""The page of a slide-model run, for every kind of task, as a browser sees it."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from study_fixtures import BINARY, CONFIG, FIXED, FOLDS, INTERVAL, SITES, TASKS, made_bags, made_outputs, made_plan

from histoscale.eval.drawings import kaplan_meier
from histoscale.eval.mil.decodability import DecodabilityConfig, decodability
from histoscale.eval.mil.floors import plain_floors
from histoscale.eval.mil.report import write_mil_page
from histoscale.eval.mil.score_table import score_rows
from histoscale.eval.mil.seeds import seed_values
from histoscale.eval.mil.split import FixedSplit, FoldSplit, SiteSplit
from histoscale.eval.mil.study import study
from histoscale.eval.mil.task import ClassesTask, Task
from histoscale.eval.page import Cell, Chapter, Prose

HOSTILE = "<script>alert(1)</script>"


def write(path: Path, task: Task, split: FixedSplit | FoldSplit | SiteSplit, patients: int = 120) -> str:
    bags = made_bags(task, patients)
    plan = made_plan(bags, split)
    rows = tuple(replace(bag, site=HOSTILE) if bag.site == "by" else bag for bag in bags.rows)
    bags = replace(bags, rows=rows)
    outputs = made_outputs(bags, plan, task)
    found = study(bags, plan, outputs, plain_floors(bags, plan, task, {}), task, INTERVAL, CONFIG)
    means = np.random.default_rng(0).normal(size=(len(rows), 5))
    means[:, 1] = [bag.target for bag in rows]
    decoded = decodability(bags, means, task, INTERVAL, DecodabilityConfig(4, 0.1, 1e-4, 200, 0))
    seeds = seed_values(bags, plan, np.stack([outputs, made_outputs(bags, plan, task, seed=9)]), task)
    first = bags.rows[plan.trials[-1 if split.kind != "sites" else 0].external[0]].slide_id
    leakage = Chapter("Which slides stood where", [Prose("nothing shared")])
    table = score_rows(bags, plan, outputs, task)
    write_mil_page(path, found, plan.checks, leakage, decoded, seeds, {first: f"slides/{first}/page.html"}, table, "e" + HOSTILE)
    return path.read_text()


@pytest.mark.parametrize("split", [FIXED, FOLDS, SITES], ids=lambda split: split.kind)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_has_its_page(tmp_path: Path, task: Task, split: FixedSplit | FoldSplit | SiteSplit) -> None:
    page = write(tmp_path / "report.html", task, split, 90)
    for words in ("Inside and outside", "What it must beat", "Hospital beside biology", "Which slides stood where",
                  "internal minus external", "What this study cannot say", "One seed and another", "never a diagnosis",
                  'href="slides/s', "&lt;script&gt;alert"):  # fmt: skip
        assert words in page, words
    assert "<script" not in page and ">nan" not in page and " nan" not in page and "http" not in page
    own = {"tumour": "With a few local cases", "score": "Predicted over observed", "death": "higher risk"}
    assert own.get(task.name, "Recall of every class") in page
    assert ("matrix" in page.split("</style>")[1]) == isinstance(task, ClassesTask)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(path, replace(BINARY, name=HOSTILE), FIXED)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000", "--hide-scrollbars",
             "--enable-logging=stderr"]  # fmt: skip

    def chromium(*what: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["chromium", *flags, *what, path.as_uri()], check=True, capture_output=True, text=True, timeout=120
        )  # fmt: skip

    shot = tmp_path / "shot.png"
    assert "CONSOLE" not in chromium(f"--screenshot={shot}").stderr
    assert "<title>&lt;script&gt;" in chromium("--dump-dom").stdout
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50


def test_links_stay_beside_the_page() -> None:
    assert Cell("a", link="slides/a%20b/page.html").link
    for bad in ("javascript:alert(1)", "/etc/passwd", "https://elsewhere"):
        with pytest.raises(ValueError, match="expected a relative address"):
            Cell("a", link=bad)


def test_kaplan_meier_golden() -> None:
    """Five patients: deaths at 1, 3 and 5, censored at 2 and 4: 4/5, then of three 2/3, then none."""
    steps, censored = kaplan_meier(np.array([3.0, 1, 2, 5, 4]), np.array([True, True, False, True, False]))
    shares = dict(steps.tolist())  # the last of each time
    assert [shares[t] for t in (0, 1, 3, 5)] == pytest.approx([1, 0.8, 0.8 * 2 / 3, 0])
    assert censored.tolist() == [[2, 0.8], [4, pytest.approx(0.8 * 2 / 3)]]
