"""The pages of a study: written, opened in a browser, answered by a reader, and their answers read back."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, in_the_dark, needs_chromium, visit
from evidence_cases import evidence_config, grid, open_slide, softmax_case
from PIL import Image
from pyarrow.parquet import read_table

from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.annotations import Annotations, Polygon
from histoscale.eval.evidence.case import Case, Finding, Measured
from histoscale.eval.evidence.measure import extremes, measure_deletion, pooled
from histoscale.eval.evidence.page import About, write_index
from histoscale.eval.evidence.verdicts import VerdictError, count_verdicts, read_verdicts
from histoscale.eval.evidence.write import EvidenceError, choose, write_slide_pages
from histoscale.eval.scores.interval import IntervalConfig

ABOUT = About("tumour", "tumour against normal", {"encoder": "random:<b>x</b>", "aggregator": "abmil"})
HOSTILE = "<script>document.title='run'<"  # as a folder's name it can hold no slash


def two_cases(folder: Path, store: Store, make_slide: Callable[..., Path]) -> list[Case]:
    path = make_slide(folder / "slide.svs", width=1100, height=900)
    coords = grid(1100, 900, 128)
    ring = np.array([[0, 0], [250, 0], [250, 250], [0, 250]], float)
    drawn = Annotations((Polygon("tumour", (ring,)),), ())
    first = softmax_case(open_slide(path, store), coords, 128, "s1", annotations=drawn, facts={"site": "</script><img src=x>"})
    finding = Finding(0.1, "probability of tumour 0.100", "", False, -1.0)
    return [first, replace(first, slide_id=HOSTILE, patient="p0", annotations=None, occlusion=None, finding=finding)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, make_slide: Callable[..., Path]) -> tuple[Path, list[Measured]]:
    home = tmp_path_factory.mktemp("pages")
    store = Store(StorageConfig({}, "fsspec", str(home / "cache"), 1 << 20, 5.0, 5.0, 60.0))
    folder = home / "slides"
    counted: list[int] = []
    cases = two_cases(home, store, make_slide)
    measured = write_slide_pages(folder, cases, ABOUT, evidence_config(), 1, lambda: counted.append(1))
    assert len(counted) == 2
    return folder, measured


def test_a_slide_gets_all_its_files_and_measures(pages: tuple[Path, list[Measured]]) -> None:
    folder, (first, second) = pages
    names = {"attention.ome.tif", "values.ome.tif", "heatmap.geojson", "tiles.parquet", "overlay.png", "thumb.jpg", "page.html"}
    assert {path.name for path in (folder / "s1").iterdir()} == names
    table = read_table(folder / "s1/tiles.parquet")
    assert table.column_names == ["x", "y", "width", "height", "attention", "contribution", "occlusion", "annotated"]
    assert table["annotated"][0].as_py() == 1.0 and sum(table["attention"].to_pylist()) == pytest.approx(1)
    assert first.overlap is not None and first.overlap["pointing"] == 1 and second.overlap is None
    assert first.overlap["attention"] > 0.5
    assert first.gains["attention"] > 0 and first.above["contribution"] == 1
    assert first.artefacts is not None and set(first.artefacts) == {"pen", "fold", "blur", "glass"}
    assert first.artefacts["glass"][1] > 0.2  # the slide's border is glass, and all of it was tiled
    assert json.loads(json.dumps(first.as_dict()))["beats_random"]["attention"] <= 1
    assert set(second.gains) == {"attention", "contribution"}  # a model without occlusion


@needs_chromium
@pytest.mark.parametrize("name", ["index.html", "s1/page.html"])
def test_pages_are_dark_where_the_reader_is_and_no_table_is_cut(
    pages: tuple[Path, list[Measured]], tmp_path: Path, name: str
) -> None:
    wider, paper, ink = in_the_dark(pages[0] / name, tmp_path / "profile")
    assert wider <= 0 and paper < 0.2 and ink > 0.8


@pytest.mark.parametrize(
    ("sweeping", "said"), [("every", ">flagged, as every slide is<"), ("no", ">not flagged, as no slide is<"), ("", ">flagged<")]
)
def test_the_list_says_where_flags_sort_nothing(tmp_path: Path, sweeping: str, said: str) -> None:
    finding = Finding(0.5, "score 0.500 for tumour", "", sweeping != "no", 1.0, sweeping)
    one = Measured("s", "p", 3, finding, {"pen": (0.1, 0.1)}, None, {"attention": 0.1}, {"attention": 1.0}, "s/overlay.png", "")
    write_index(tmp_path / "index.html", ABOUT, [one, one])
    page = (tmp_path / "index.html").read_text()
    assert page.count(f"The model's rule flags {sweeping} slide that it reads") == bool(sweeping)
    assert (said in page) and ('class="flag"' in page) == (not sweeping)


def test_the_list_says_nothing_of_all_slides_that_some_contradict(tmp_path: Path) -> None:
    every, no, sorts = (Finding(0.5, "score 0.500 for tumour", "", each != "no", 1.0, each) for each in ("every", "no", ""))
    one = Measured("s", "p", 3, every, {"pen": (0.1, 0.1)}, None, {"attention": 0.1}, {"attention": 1.0}, "s/overlay.png", "")
    write_index(tmp_path / "index.html", ABOUT, [replace(one, finding=each) for each in (every, no, sorts, sorts)])
    assert "slide that it reads" not in (tmp_path / "index.html").read_text()


def test_pages_need_nothing_from_outside_and_escape_names(pages: tuple[Path, list[Measured]]) -> None:
    folder, _ = pages
    for path in (folder / "index.html", folder / "s1/page.html", folder / HOSTILE / "page.html"):
        text = path.read_text()
        assert "document.title='run'" not in text and "http:" not in text and "https:" not in text
        assert "<img src=x>" not in text and "<b>x</b>" not in text
        assert (
            "diagnos" in text
            and text.count("makes no diagnosis") == 1
            and "Research software" in text
            or path.name == "index.html"
        )


@needs_chromium
def test_a_reader_looks_and_answers(pages: tuple[Path, list[Measured]], tmp_path: Path) -> None:
    folder, _ = pages

    async def act(page: Page) -> Any:
        seen = {"title": await page.run("document.title")}
        layers = "[...document.querySelectorAll('.layer')].map(l => getComputedStyle(l).display)"
        seen["before"] = await page.run(layers)
        await page.run("document.querySelectorAll('input[name=map]')[2].click()")
        seen["after"] = await page.run(layers)
        slide = "(id, v) => { const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event('input')); }"
        await page.run(f"({slide})('opacity', 20); ({slide})('zoom', 2)")
        seen["opacity"] = await page.run("document.querySelector('.layer').style.opacity")
        seen["wide"] = await page.run(
            "document.querySelector('.stage').offsetWidth / document.querySelector('.frame').clientWidth"
        )
        seen["outline"] = await page.run("getComputedStyle(document.querySelector('.outline')).display")
        await page.run("document.getElementById('outlines').click(); document.getElementById('marks').click()")
        seen["outlined"] = await page.run("getComputedStyle(document.querySelector('.outline')).display")
        seen["marks"] = await page.run("getComputedStyle(document.querySelector('.marks')).display")
        await page.run("document.querySelector('button[type=submit]').click()")
        seen["early"] = await page.run("document.getElementById('saved').textContent")  # nothing was answered yet
        await page.run("document.querySelector('input[value=disagree]').click()")
        await page.run(
            "const f = document.getElementById('verdict').elements; f.reader.value = 'Dr. Ö'; f.comment.value = '</x>\"'"
        )
        await page.run("document.querySelector('button[type=submit]').click()")
        await page.wait("Browser.downloadProgress")
        while not any(e["method"] == "Browser.downloadProgress" and e["params"]["state"] == "completed" for e in page.events):
            page._note(await page.socket.receive_json())
        seen["saved"] = await page.run("document.getElementById('saved').textContent")
        return seen

    seen = visit(folder / "s1/page.html", tmp_path / "profile", act)
    assert seen["title"] == "s1 · second reader"
    assert seen["before"] == ["block", "none", "none"] and seen["after"] == ["none", "none", "block"]
    assert seen["opacity"] == "0.2" and seen["wide"] == pytest.approx(2, abs=0.05)
    assert (seen["outline"], seen["outlined"], seen["marks"]) == ("none", "block", "none")
    assert seen["early"] == "" and seen["saved"].startswith("Saved as verdict-s1-Dr._")
    (verdict,) = read_verdicts(tmp_path / "profile/downloads")
    assert (verdict.slide_id, verdict.task, verdict.verdict, verdict.reader) == ("s1", "tumour", "disagree", "Dr. Ö")
    assert verdict.comment == '</x>"' and verdict.value == 0.93 and verdict.flagged is True and len(verdict.date) == 10
    assert count_verdicts([verdict])["flagged"]["disagree"] == 1


@needs_chromium
def test_hostile_names_stay_text_and_the_index_sorts(pages: tuple[Path, list[Measured]], tmp_path: Path) -> None:
    folder, _ = pages

    async def title(page: Page) -> Any:
        picture = await page.send("Page.captureScreenshot")
        shot = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["data"]))).convert("RGB"))
        return await page.run("[document.title, document.querySelector('h1').textContent]"), len(
            np.unique(shot.reshape(-1, 3), axis=0)
        )

    names, colours = visit(folder / HOSTILE / "page.html", tmp_path / "one", title)
    assert names == [f"{HOSTILE} · second reader", HOSTILE] and colours > 500

    async def sort(page: Page) -> Any:
        order = "[...document.querySelectorAll('tbody a')].map(a => a.textContent)"
        pictures = await page.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        before = await page.run(order)
        await page.run("document.querySelectorAll('th button')[2].click()")
        up = await page.run(order)
        await page.run("document.querySelectorAll('th button')[2].click()")
        page.events.clear()  # of the list's own loading
        await page.run("document.querySelector('tbody a[href*=s1]').click()")
        await page.wait("Page.loadEventFired")
        return pictures, before, up, await page.run(order)

    pictures, before, up, _ = visit(folder / "index.html", tmp_path / "two", sort)
    assert pictures and before == ["s1", HOSTILE] and up == [HOSTILE, "s1"]


def test_without_slides_the_raw_files_alone(tmp_path: Path) -> None:
    case = softmax_case(None, grid(640, 640, 64), 64)
    (measured,) = write_slide_pages(tmp_path / "slides", [case], ABOUT, evidence_config(), 1, lambda: None)
    assert {path.name for path in (tmp_path / "slides/s1").iterdir()} == {"tiles.parquet", "heatmap.geojson"}
    assert measured.artefacts is None and measured.picture == "" and not (tmp_path / "slides/index.html").exists()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ""])
def test_ids_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    case = softmax_case(None, grid(256, 256, 64), 64, name)
    with pytest.raises(EvidenceError, match="leaves the folder"):
        write_slide_pages(tmp_path / "slides", [case], ABOUT, evidence_config(), 1, lambda: None)
    assert not list(tmp_path.rglob("*.parquet"))


def test_files_are_the_same_again(tmp_path: Path, store: Store, make_slide: Callable[..., Path]) -> None:
    cases = two_cases(tmp_path, store, make_slide)[:1]
    for name in ("one", "two"):
        write_slide_pages(tmp_path / name, cases, ABOUT, evidence_config(), 1, lambda: None)
    for path in (tmp_path / "one/s1").iterdir():
        assert path.read_bytes() == (tmp_path / "two/s1" / path.name).read_bytes(), path.name


def test_the_most_and_the_least_attended() -> None:
    case = softmax_case(None, grid(320, 320, 64), 64)
    most, least = extremes(case, evidence_config(patches=8))
    assert most[0] == 0 and len(most) == len(least) == 8 and not set(most) & set(least)
    assert case.attention[least[0]] == case.attention.min() and case.attention[most].min() >= case.attention[least].max()
    few = softmax_case(None, grid(192, 64, 64), 64)
    most, least = extremes(few, evidence_config(patches=8))
    assert sorted([*most, *least]) == [0, 1, 2] and most[0] == 0
    assert few.top(0.05).tolist() == [0] and len(case.top(0.2)) == 5
    assert measure_deletion(case, evidence_config()).curves.keys() == {"attention", "contribution", "occlusion"}


def test_measures_are_pooled_over_patients() -> None:
    finding = Finding(0.5, "", "", True, 1.0)
    rows = [
        Measured(
            f"s{i}",
            f"p{i % 25}",
            9,
            finding,
            {"pen": (0.2, 0.1)},
            {"attention": 0.8} if i % 2 else None,
            {"attention": i % 3 - 0.5},
            {"attention": 1},
            "x",
            "",
        )  # fmt: skip
        for i in range(50)
    ]
    rows = [replace(row, artefacts=dict.fromkeys(("pen", "fold", "blur", "glass"), (0.2, 0.1))) for row in rows]
    found = pooled(rows, IntervalConfig(200, 0.95, 0))
    assert found["artefacts"]["pen"]["value"] == pytest.approx(0.1) and found["artefacts"]["pen"]["slides"] == 50
    gain = found["deletion_gain"]["attention"]
    assert gain["low"] < gain["value"] < gain["high"] and gain["patients"] == 25
    assert found["overlap"]["attention"]["slides"] == 25
    assert pooled([], IntervalConfig(200, 0.95, 0)) == {"artefacts": {}, "deletion_gain": {}, "overlap": {}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "its format is 'other'"),
        ({"verdict": "yes"}, "its verdict is 'yes'"),
        ({"reader": 3}, "reader is 3"),
        ({"flagged": "no"}, "flagged is 'no'"),
        ({"value": None}, "is no verdict"),
        ({"date": ...}, "'date'"),
    ],
)
def test_other_files_are_no_verdicts(tmp_path: Path, change: dict, words: str) -> None:
    good = {"format": "histoscale-verdict-1", "slide_id": "s", "task": "t", "value": 0.5, "flagged": False,
            "verdict": "agree", "comment": "", "reader": "r", "date": "2026-01-01", "model": {}}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(good))
    assert read_verdicts(tmp_path)[0].verdict == "agree"
    bad = {name: value for name, value in (good | change).items() if value is not ...}
    (tmp_path / "b.json").write_text(json.dumps(bad))
    with pytest.raises(VerdictError, match=words):
        read_verdicts(tmp_path)
    (tmp_path / "b.json").write_text(json.dumps(good))
    with pytest.raises(VerdictError, match=r"in a\.json and in b\.json"):
        read_verdicts(tmp_path)


def test_slides_are_chosen_by_name_and_balanced() -> None:
    names, labels = [f"s{i}" for i in range(30)], [int(i % 3 == 0) for i in range(30)]
    chosen = choose(names, labels, 6, 0)
    assert sum(labels[i] for i in chosen) == 3 and len(set(chosen)) == 6
    again = choose(names[::-1], labels[::-1], 6, 0)
    assert [names[::-1][i] for i in again] == [names[i] for i in chosen]
    assert sorted(choose(names, labels, None, 0)) == list(range(30)) and len(choose(names, None, 7, 0)) == 7
    assert choose(names, None, 7, 1) != choose(names, None, 7, 0)
    assert len(choose(names[:4], [1, 1, 1, 1], 3, 0)) == 3 and choose([], [], 6, 0) == []
