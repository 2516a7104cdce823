"""Every page follows dark mode, and nothing on it is wider than the window without a way to scroll to it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import Page, needs_chromium, visit

from histoscale.data.contact import write_sheet
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import read_manifest
from histoscale.data.storage import Store
from histoscale.data.tissue import TissueConfig
from histoscale.eval.page import Chapter, Grid, Heading, Prose, write_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("eval/patch_report.html", "data/contact.html")
# What leaves the window and lies in nothing that scrolls.
CUT = """[...document.querySelectorAll("table, svg, p, h1, h2, h3, figure, li, summary, .fact, .card")].filter(one => {
  if (one.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let above = one; above; above = above.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(above).overflowX)) return false;
  return true;
}).map(one => one.tagName + " " + one.textContent.slice(0, 60))"""


@pytest.mark.parametrize("page", PAGES)
def test_tables_scroll_and_colours_follow(page: str) -> None:
    text = (ROOT / page).read_text()
    assert "prefers-color-scheme: dark" in text and 'name="color-scheme"' in text
    for place in re.finditer("<table", text):
        before = text[: place.start()].rstrip()
        assert before.endswith('<div class="wide" tabindex="0">'), before[-60:]


def seen(page: Path, profile: Path, width: int) -> list[tuple[list[str], str]]:
    """In light and dark: what is cut, and the colour of the paper."""

    async def act(opened: Page) -> list[tuple[list[str], str]]:
        found = []
        for scheme in ("light", "dark"):
            await opened.show(width, scheme)
            found.append((await opened.run(CUT), await opened.run("getComputedStyle(document.body).backgroundColor")))
        return found

    return visit(page, profile, act, width=width)


@needs_chromium
@pytest.mark.parametrize("width", [400, 1280])
def test_a_page_of_long_names_fits(tmp_path: Path, width: int) -> None:
    head = ["encoder", *(f"a_metric_with_a_long_name_{i}" for i in range(9))]
    rows = [["timm:vit_small_patch14_dinov2.lvd142m", *["0.812 [0.774, 0.850]"] * 9]] * 3
    parts = [Heading("x" * 80, "words"), Grid(head, rows, 1, "a note"), Prose("y" * 300)]
    write_page(tmp_path / "page.html", "t" * 90, "A lead.", {"what": "0.812 [0.774, 0.850]"}, [Chapter("Scores", parts)])
    light, dark = seen(tmp_path / "page.html", tmp_path / "profile", width)
    assert light[0] == dark[0] == [] and light[1] != dark[1]


@needs_chromium
def test_the_contact_sheet_fits(
    tmp_path: Path, make_slide: Callable[..., Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> None:
    make_slide(tmp_path / "a.tif", width=600, height=500, kind="generic")
    long = "a_name_that_goes_on_and_on_" * 4
    (tmp_path / "m.csv").write_text(f"slide_id,uri,site\n{long},a.tif,{long}\nb,none.tif,x\n")
    slides = read_manifest(str(tmp_path / "m.csv"), store)
    catalog = build_catalog(slides, store, tissue_config, tmp_path / "catalog", 0, None, journal)
    write_sheet(tmp_path / "sheet.html", catalog, 10)
    light, dark = seen(tmp_path / "sheet.html", tmp_path / "profile", 400)
    assert light[0] == dark[0] == [] and light[1] != dark[1]
