"""The page of a patch-level run: self-contained, escaped, bounded, drawable, and its pictures are the right ones."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from patch_results import EVIL, made_outcome, made_patches, made_run, made_score
from PIL import Image
from pydantic import TypeAdapter
from sklearn.metrics import precision_recall_fscore_support
from sklearn.neighbors import NearestNeighbors

from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.drawings import Mark, interval_plot
from histoscale.eval.gallery import Pictures, chosen_rows, nearest_rows, neighbour_gallery, tinted, worst_confusions, worst_pairs
from histoscale.eval.page import Cell
from histoscale.eval.patch_report import Genes, ReportConfig, Segmentation, Segmented, SetResults, class_grid, write_patch_report
from histoscale.eval.scores.calibration import brier, reliability
from histoscale.eval.scores.classification import confusion
from histoscale.eval.table import number

ROOT = Path(__file__).resolve().parents[1]
CONFIG = TypeAdapter(ReportConfig).validate_python(yaml.safe_load((ROOT / "configs/report/default.yaml").read_text()))


def write(path: Path, config: ReportConfig = CONFIG, name: str = EVIL) -> str:
    """A page in which every name that comes from outside is hostile."""
    three = made_patches(name, (f"a{name}", f"b{name}", f"c{name}"))
    two = made_patches(f"two {name}", ("no", name), seed=3)
    (outcomes, scores), (more, others) = made_run(three, name, 0.8), made_run(two, name, 0.8, seed=8)
    few = [
        made_score(made_outcome(three, name, 0.3 + k / 30, probe=f"few_shot/{k}", runs=3), three, "macro_f1") for k in (1, 4, 16)
    ]
    few.append(replace(few[0], encoder="random", floor=True, interval=replace(few[0].interval, low=None, high=None, note=name)))
    features = np.random.default_rng(0).normal(size=(len(three), 5))
    image = np.full((40, 60, 3), 200, np.uint8)
    mask = np.arange(2400).reshape(40, 60) // 800
    masks = Segmentation(
        name, name, ("background", name, "ambiguous"), 2, [Segmented(name, image, mask, mask.T.reshape(40, 60), name)]
    )
    genes = Genes(name, name, (name, "G2", "G3"), np.array([0.4, np.nan, -0.1]), np.array([0.1, 0.2, np.nan]), name)
    sets = [SetResults(three, {name: outcomes}, {name: features}), SetResults(two, {"resize": more}, {})]
    write_patch_report(path, name, [*scores, *few, *others], 0.95, config, sets, [masks], [genes], [name])
    return path.read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write(path)
    return path


def test_nothing_outside_the_file_and_nothing_unescaped(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "javascript" not in text
    links = re.findall(r"(?:src|href)=\"([^\"]*)", text)
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert "url(" not in text and "@import" not in text and "onload" not in text
    assert "nan" not in re.sub(r"data:[^\"]*", "", text).lower()
    assert list(page.parent.iterdir()) == [page]  # no partial file stays


def test_all_parts_are_there(page: Path) -> None:
    text = page.read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    for words in (
        "Scores",
        "Few images a class",
        "class by class",
        "what it looks like",
        "masks of",
        "gene by gene",
        "How to read",
    ):
        assert any(words in heading for heading in headings), words
    for words in (
        "selected on report",
        "ECE",
        "Brier",
        "Worst confusions",
        "prefers-color-scheme: dark",
        "@media print",
        "undefined",
    ):
        assert words in text, words
    assert text.count('class="matrix') == 4 and text.count("Reliability of") == 2  # two protocols of two sets; one set is binary


def test_every_score_stands_once_in_the_tables(tmp_path: Path) -> None:
    patches = made_patches("crc")
    outcomes, scores = made_run(patches, "ours")
    scores = [
        replace(s, interval=replace(s.interval, value=0.1 + 0.007 * i, low=0.05, high=0.95), spread=None)
        for i, s in enumerate(scores)
    ]
    write_patch_report(
        tmp_path / "r.html", "t", scores, 0.95, CONFIG, [SetResults(patches, {"resize": outcomes}, {})], [], [], []
    )
    cells = re.findall(r"<td[^>]*>([^<]*)", (tmp_path / "r.html").read_text())
    assert [cells.count(number(score)) for score in scores] == [1] * len(scores)


def test_pictures_stay_inside_their_budget(tmp_path: Path) -> None:
    small = replace(CONFIG, gallery=replace(CONFIG.gallery, budget_mb=0.02))
    text = write(tmp_path / "small.html", small, "made")
    spent = sum(map(len, re.findall(r"data:image/[^\"]*", text)))
    left = text.count(">left out<")
    assert 0 < spent <= 20_000 and left > 0 and f"{left} pictures are left out" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (480, False)])
def test_a_browser_draws_it(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    flags += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},2400",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    shot = tmp_path / "shot.png"

    def chromium(*what: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["chromium", *flags, *what, page.as_uri()], check=True, capture_output=True, text=True, timeout=120
        )  # fmt: skip

    drawn = chromium(f"--screenshot={shot}")
    assert "CONSOLE" not in drawn.stderr  # the browser writes errors of the page there
    assert "<title>&lt;script&gt;" in chromium("--dump-dom").stdout  # the browser kept the title as text and ran nothing
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert (pixels[0, 0].mean() < 60) == dark


def test_classes_agree_with_scikit_learn() -> None:
    patches = made_patches()
    outcome = made_outcome(patches, "e", 0.7)
    labels = patches.labels[outcome.rows]
    grid = class_grid(patches, outcome, confusion(labels, outcome.predicted[0], 3).astype(float))
    precision, recall, f1, support = precision_recall_fscore_support(labels, outcome.predicted[0])
    for place, row in enumerate(grid.rows):
        cells = [cell.share for cell in row[1:4] if isinstance(cell, Cell)]
        assert cells == pytest.approx([recall[place], precision[place], f1[place]])
        assert row[4] == str(support[place]) and row[5] == str(len(set(patches.patients[outcome.rows][labels == place])))


def test_neighbours_agree_with_scikit_learn() -> None:
    features = np.random.default_rng(0).normal(size=(9000, 6))  # more training rows than one product takes
    queries, train = np.arange(5), np.arange(10, 9000)
    rows, cosines = nearest_rows(features, queries, train, 7)
    distance, place = NearestNeighbors(n_neighbors=7, metric="cosine").fit(features[train]).kneighbors(features[queries])
    assert np.array_equal(rows, train[place]) and cosines == pytest.approx(1 - distance)
    few, _ = nearest_rows(features, queries, train[:3], 7)
    assert few.shape == (5, 3)


def test_the_gallery_asks_report_and_answers_with_train() -> None:
    patches = made_patches(patients=12)
    read: list[int] = []

    def spy(rows: np.ndarray) -> list[np.ndarray]:
        read.extend(rows.tolist())
        return list(patches.read(rows))

    watched = replace(patches, read=spy)
    outcome = made_outcome(patches, "e", 0.8)
    features = np.random.default_rng(0).normal(size=(len(patches), 5))
    gallery = neighbour_gallery(watched, outcome, features, Pictures(CONFIG.gallery))
    assert len(gallery.strips) == 3 * CONFIG.gallery.per_class
    by_strip = np.array(read).reshape(len(gallery.strips), -1)  # neighbours, then the query
    assert {patches.roles[row] for row in by_strip[:, -1]} == {"report"}
    assert {patches.roles[row] for row in by_strip[:, :-1].ravel()} == {"train"}
    for strip, rows in zip(gallery.strips, by_strip, strict=True):
        assert [tile.good for tile in strip.beside] == (patches.labels[rows[:-1]] == patches.labels[rows[-1]]).tolist()
        assert strip.query.image.startswith("data:image/jpeg;base64,")


def test_with_outer_folds_no_neighbour_is_of_the_same_patient() -> None:
    patches = made_patches(patients=12)
    everything = np.arange(len(patches))
    outcome = replace(made_outcome(patches, "e", 0.8), role="outer", rows=everything)
    logs = np.log(np.full((1, len(patches), 3), 1 / 3))
    read: list[int] = []
    watched = replace(patches, read=lambda rows: (read.extend(rows.tolist()), list(patches.read(rows)))[1])
    features = np.repeat(np.eye(12), 10, axis=0)[np.argsort(np.argsort(patches.patients, kind="stable"), kind="stable")]
    gallery = neighbour_gallery(watched, replace(outcome, logs=logs), features, Pictures(CONFIG.gallery))
    rows = np.array(read).reshape(len(gallery.strips), -1)
    assert (patches.patients[rows[:, :-1]] != patches.patients[rows[:, -1:]]).all()
    two = made_patches(patients=2)  # each patient has queries, and neighbours of the other one
    outcome = replace(made_outcome(two, "e", 0.8), role="outer", rows=np.arange(len(two)))
    logs = np.log(np.full((1, len(two), 3), 1 / 3))
    gallery = neighbour_gallery(two, replace(outcome, logs=logs), np.eye(len(two)), Pictures(CONFIG.gallery))
    assert gallery.strips and all(strip.beside for strip in gallery.strips) and "no training part" in gallery.note


def test_choice_is_by_seed_and_never_by_score() -> None:
    labels, rows = np.repeat([0, 1, 2], [50, 3, 0]), np.arange(53)
    first = chosen_rows(labels, rows, 3, 5, seed=0)
    assert labels[first].tolist() == [0] * 5 + [1] * 3 and np.array_equal(first, chosen_rows(labels, rows, 3, 5, seed=0))
    assert not np.array_equal(first, chosen_rows(labels, rows, 3, 5, seed=1))


def test_worst_confusions_come_first() -> None:
    labels, called = np.array([0] * 10 + [1] * 4), np.array([0] * 7 + [1] * 3 + [0] * 2 + [1] * 2)
    assert worst_pairs(labels, called, 3) == [(1, 0, 2), (0, 1, 3)]
    patches = made_patches()
    gallery = worst_confusions(patches, made_outcome(patches, "e", 0.6), Pictures(CONFIG.gallery))
    surest = [float(tile.words) for tile in (gallery.strips[0].query, *gallery.strips[0].beside)]
    assert surest == sorted(surest, reverse=True) and gallery.strips[0].query.good is False
    perfect = made_outcome(patches, "e", 1.0)
    clear = np.log(np.eye(3)[patches.labels[perfect.rows]] * 0.9 + 0.1 / 3)[None]
    assert worst_confusions(patches, replace(perfect, logs=clear), Pictures(CONFIG.gallery)).strips == []


def test_calibration_golden() -> None:
    """Values of the field's reference vectors: ECE with 15 bins .279167, Brier .152708."""
    p = np.array([0.9, 0.8, 0.8, 0.55, 0.3, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    y = np.arange(12) < 5
    bins = reliability(p, y, 15)
    assert bins.expected_calibration_error == pytest.approx(0.279167, abs=1e-6) and bins.count.sum() == 12
    assert brier(p, y) == pytest.approx(0.152708, abs=1e-6)
    assert reliability(np.array([0.9, 0.9, 0.1, 0.1]), np.array([1, 0, 0, 0]), 15).expected_calibration_error == pytest.approx(
        0.25
    )
    assert reliability(np.array([0.0, 1.0]), np.array([0, 1]), 15).expected_calibration_error == 0
    with pytest.raises(ValueError, match="calibration needs"):
        reliability(np.array([1.2]), np.array([1]), 15)


def test_masks_tint_their_pixels_alone() -> None:
    image = np.full((2, 3, 3), 200, np.uint8)
    mask = np.array([[0, 1, 2], [0, 1, 2]])
    out = tinted(image, mask, [(0, 0, 0), (9, 9, 9)], ignored=2)
    assert (out[:, 0] == 200).all() and (out[:, 1] == 90).all() and (out[:, 2] == int(0.3 * 200 + 0.7 * 128)).all()


def test_a_drawing_of_one_point_without_an_interval() -> None:
    svg = interval_plot([Mark(EVIL, 0.5, None, None, "ours", "0.5")], EVIL, None)
    assert "<script" not in svg and svg.count("<circle") == 1 and "whisker" not in svg


def test_a_class_that_is_never_called_or_never_there(tmp_path: Path) -> None:
    patches = made_patches()
    outcome = made_outcome(patches, "e", 0.9)
    kept = outcome.rows[patches.labels[outcome.rows] != 2]
    absent: LabelledPatches = patches
    part = replace(made_outcome(patches, "e", 0.9), rows=kept, logs=np.log(np.tile([0.98, 0.01, 0.01], (1, len(kept), 1))))
    counts = confusion(patches.labels[kept], part.predicted[0], 3).astype(float)
    rows = class_grid(absent, part, counts).rows
    assert [cell.text for cell in rows[2][1:4] if isinstance(cell, Cell)] == ["–", "–", "–"]
    assert [cell.text for cell in rows[1][1:4] if isinstance(cell, Cell)] == ["0.000", "–", "0.000"]
    write_patch_report(tmp_path / "r.html", "t", [made_score(part, patches, "balanced_accuracy")], 0.95, CONFIG,
                       [SetResults(patches, {"resize": [part]}, {"e": np.ones((len(patches), 2))})], [], [], [])  # fmt: skip


def test_a_floor_that_was_asked_for_alone_is_the_subject(tmp_path: Path) -> None:
    patches = made_patches(patients=12)
    whole = replace(patches, usage=replace(patches.usage, choose="outer"))
    outcome = replace(made_outcome(whole, "colour", 0.8), role="outer")
    score = replace(made_score(outcome, whole, "balanced_accuracy"), floor=True)
    sets = [SetResults(whole, {"resize": [outcome]}, {"colour": np.eye(len(whole))})]
    write_patch_report(tmp_path / "r.html", "t", [score], 0.95, CONFIG, sets, [], [], [])
    text = (tmp_path / "r.html").read_text()
    assert "Frozen features of colour on" in text and "has no training part" in text and "class by class" in text
    assert f"<b>{number(score).split(' [')[0]}</b>" in text
