"""The leakage page: one slide under two names is found by ids, features, files and looks; what an encoder saw is told by part."""

import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import h5py
import numpy as np
import pytest
from mil_fixtures import TASK, cohort, slide, write_store
from PIL import Image
from slide_fixtures import tissue_pixels, write_slide

from histoscale.data.catalog import Catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.manifest import Slide
from histoscale.data.splits import SplitError
from histoscale.data.storage import StorageConfig, Store
from histoscale.data.tissue import TissueConfig
from histoscale.eval.mil.bags import Bags, read_bags
from histoscale.eval.mil.leakage import leakage_chapter, leakage_checks
from histoscale.eval.mil.lookalikes import Pair, alike, equal_files, equal_tiles
from histoscale.eval.mil.split import Check, FixedSplit, Plan, make_plan
from histoscale.eval.page import write_page
from histoscale.eval.stores import read_features

SPLIT = FixedSplit(
    kind="fixed", unit="patient", role="role", train=["train"], internal=["test"], external=["external"], external_sites=[],
    test=0.25, seed=0,
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    bags: Bags
    plan: Plan
    slides: list[Slide]

    def checks(
        self,
        catalog: Catalog | None = None,
        pretraining: Catalog | None = None,
        roles: list[str] | None = None,
        corpora: tuple[str, ...] | None = (),
        slides: list[Slide] | None = None,
    ) -> dict[str, Check]:
        found = leakage_checks(self.bags, self.plan, slides or self.slides, catalog, "the encoder", pretraining, roles, corpora)
        return {check.name: check for check in found}

    def row(self, part: str, place: int = 0) -> int:
        return int(getattr(self.plan.trials[0], part)[place])


def study_of(folder: Path, slides: list[Slide]) -> Study:
    bags = read_bags(folder, slides, TASK, "patient")
    return Study(bags, make_plan(bags, SPLIT), slides)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("stores")
    return study_of(folder, cohort(folder, patients=12))


def test_a_clean_study_says_what_was_compared(studied: Study) -> None:
    checks = studied.checks()
    assert list(checks) == ["slides", "patients", "sites", "internal sites", "features", "public collections"]
    assert all(check.holds for check in checks.values())


# --- one slide under two names ---


def copied(studied: Study, folder: Path, source: int, part: str, change: Callable[[np.ndarray], np.ndarray]) -> Study:
    """The study with one more slide, of a new patient in `part`, whose store is that of the row `source`, changed."""
    for bag in studied.bags.rows:
        shutil.copy(bag.path, folder / bag.path.name)
    write_store(folder, "copy", change(read_features(studied.bags.rows[source].path)))
    site = "out" if part == "external" else "site0"
    role = {"train": "train", "internal": "test", "external": "external"}[part]
    return study_of(folder, [*studied.slides, slide("copy", "somebody", site, tumour="1", role=role)])


@pytest.mark.parametrize("part", ["internal", "external"])
def test_equal_stores_on_two_sides_are_refused(studied: Study, tmp_path: Path, part: str) -> None:
    source = studied.row("train")
    again = copied(studied, tmp_path, source, part, lambda x: x.astype(np.float16))  # the same slide in another type
    with pytest.raises(SplitError, match=f"{studied.bags.rows[source].slide_id} and copy"):
        again.checks()


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("corners", ["kept", "moved along", "elsewhere"])
def test_equal_features_in_another_order_are_one_slide(studied: Study, tmp_path: Path, kind: type, corners: str) -> None:
    """Whether the corners stay where they were, move with their tiles, or are of another frame."""
    source = studied.row("train")
    order = np.random.default_rng(1).permutation(studied.bags.rows[source].tiles)
    again = copied(studied, tmp_path, source, "internal", lambda x: x[order].astype(kind))
    with h5py.File(tmp_path / "copy.h5", "a") as file:
        known = file["coords"][()]
        file["coords"][...] = {"kept": known, "moved along": known[order], "elsewhere": 3 * known[::-1] + 17}[corners]
    with pytest.raises(SplitError, match=f"{studied.bags.rows[source].slide_id} and copy"):
        again.checks()


def test_as_many_tiles_of_the_same_mean_are_no_copy(studied: Study, tmp_path: Path) -> None:
    """Mirrored through its mean, a slide keeps count, mean and variance, and shares no tile."""
    again = copied(studied, tmp_path, studied.row("train"), "internal", lambda x: 2 * x.mean(0) - x)
    assert again.checks()["features"].holds and equal_tiles(again.bags.rows) == []


def test_equal_stores_on_one_side_are_told(studied: Study, tmp_path: Path) -> None:
    check = copied(studied, tmp_path, studied.row("train"), "train", lambda x: x).checks()["features"]
    assert not check.holds and "1 pairs on one side are equal" in check.found


def test_equal_grids_with_other_features_are_two_slides(studied: Study, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    again = copied(studied, tmp_path, studied.row("train"), "internal", lambda x: x + noise.normal(0, 0.3, x.shape))
    assert again.checks()["features"].holds and equal_tiles(again.bags.rows) == []


@pytest.fixture(scope="module")
def pictured(studied: Study, tmp_path_factory: pytest.TempPathFactory, tissue_config: TissueConfig) -> Callable[..., Catalog]:
    """A catalog of real slide files for the study's ids: pixels of its own for each, or those that are given; copies: id -> whose
    file it is."""

    def made(given: dict[str, np.ndarray], copies: Mapping[str, str] = MappingProxyType({})) -> Catalog:
        folder = tmp_path_factory.mktemp("slides")
        store = Store(StorageConfig({}, "fsspec", str(folder / "cache"), 1 << 30, 20.0, 5.0, 60.0))
        journal = Journal(folder / "out", JournalConfig("off", 10, "off", "test", False))
        slides = []
        for i, one in enumerate(studied.slides):
            pixels = given.get(one.slide_id, tissue_pixels(320, 280, seed=100 + i))
            path = folder / f"{one.slide_id}.tif"
            write_slide(path, pixels=pixels, tile=128, downsamples=(1,), compression="deflate", kind="generic")
            slides.append(replace(one, uri=str(path), mpp=8.0))
        for copy, source in copies.items():
            shutil.copy2(folder / f"{source}.tif", folder / f"{copy}.tif")
        return build_catalog(slides, store, tissue_config, folder / "catalog", 0, None, journal)

    return made


def recoded(pixels: np.ndarray) -> np.ndarray:
    """Another scan of the section: turned by a half, brighter, compressed hard."""
    file = io.BytesIO()
    bright = np.clip(pixels[::-1, ::-1].astype(np.float32) * 0.9 + 20, 0, 255).astype(np.uint8)
    Image.fromarray(bright).save(file, "JPEG", quality=40)
    return np.asarray(Image.open(file))


def test_look_alikes_on_two_sides_are_named(studied: Study, pictured: Callable[..., Catalog]) -> None:
    first, second = studied.row("train"), studied.row("external")
    names = [studied.bags.rows[i].slide_id for i in (first, second)]
    pixels = tissue_pixels(320, 280, seed=1)
    catalog = pictured({names[0]: pixels, names[1]: recoded(pixels)})
    pairs, shown = alike(studied.bags.rows, catalog)
    assert pairs == [Pair(*sorted((first, second)))] and shown == len(catalog) > 15
    check = studied.checks(catalog)["look-alikes"]
    assert not check.holds and all(name in check.found for name in names)


def strip(seed: int) -> np.ndarray:
    """A thin biopsy from corner to corner with a texture of its own."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:280, 0:320]
    inside = np.abs(rows - columns * 0.8) < rng.uniform(22, 30)
    coarse = Image.fromarray(rng.normal(0, 25, (28, 32)).astype(np.float32)).resize((320, 280), Image.Resampling.BICUBIC)
    grey = np.asarray(coarse)[..., None] + np.array([190, 120, 170])
    return np.clip(np.where(inside[..., None], grey, 240) + rng.normal(0, 2, (280, 320, 1)), 0, 255).astype(np.uint8)


def test_biopsies_of_one_outline_are_not_alike(studied: Study, pictured: Callable[..., Catalog]) -> None:
    names = [one.slide_id for one in studied.slides]
    strips = {name: strip(i) for i, name in enumerate(names)}
    assert alike(studied.bags.rows, pictured(strips))[0] == []
    first, second = studied.row("train"), studied.row("internal")
    strips[studied.bags.rows[second].slide_id] = recoded(strips[studied.bags.rows[first].slide_id])
    assert alike(studied.bags.rows, pictured(strips))[0] == [Pair(*sorted((first, second)))]


def test_equal_files_on_two_sides_are_named(studied: Study, pictured: Callable[..., Catalog]) -> None:
    clean = studied.checks(pictured({}))
    assert clean["files"].holds and clean["look-alikes"].holds
    first, second = (studied.bags.rows[studied.row(part)].slide_id for part in ("train", "internal"))
    catalog = pictured({}, {second: first})
    assert equal_files(studied.bags.rows, catalog) == [Pair(*sorted((studied.row("train"), studied.row("internal"))))]
    check = studied.checks(catalog)["files"]
    assert not check.holds and first in check.found and second in check.found


# --- pretraining ---


def test_what_pretraining_saw_is_told_by_part(studied: Study, pictured: Callable[..., Catalog]) -> None:
    catalog = pictured({})  # it holds every slide of the study
    checks = studied.checks(pretraining=catalog)
    trial = studied.plan.trials[0]
    for part in ("train", "internal", "external"):
        count = len(getattr(trial, part))
        assert f"{part}: {count} of {count} slides, by slides" in checks["pretraining"].found
    assert not checks["pretraining"].holds and not checks["pretraining sites"].holds
    assert f"{len(trial.external)} of out" in checks["pretraining sites"].found


def test_pretraining_on_some_roles_saw_those_slides_alone(studied: Study, pictured: Callable[..., Catalog]) -> None:
    checks = studied.checks(pretraining=pictured({}), roles=["train"])
    assert checks["pretraining"].holds and checks["pretraining sites"].holds
    assert checks["pretraining"].found.startswith("train: ") and "internal" not in checks["pretraining"].found
    with pytest.raises(ValueError, match="selects no slide"):
        studied.checks(pretraining=pictured({}), roles=["moon"])


@pytest.mark.parametrize(
    ("cohorts", "corpora", "holds", "words"),
    [
        (None, (), True, "none shared"),
        ("PANDA", ("TCGA",), True, "none shared (it saw TCGA)"),
        ("CAMELYON16", ("CAMELYON", "TCGA"), False, "pretraining saw CAMELYON"),
        ("TCGA-LUAD", ("TCGA",), False, "pretraining saw TCGA"),
        ("PANDA", None, False, "not known"),
    ],
)
def test_collections_are_compared_by_name(
    studied: Study, cohorts: str | None, corpora: tuple[str, ...] | None, holds: bool, words: str
) -> None:
    slides = [replace(one, cohort=cohorts) for one in studied.slides]
    check = studied.checks(corpora=corpora, slides=slides)["public collections"]
    assert check.holds == holds and words in check.found and "the encoder" in check.compared


# --- the page ---


def test_the_page_shows_what_does_not_hold_first_and_escapes_names(tmp_path: Path) -> None:
    checks = (
        Check("slides", "ids", "none of 3 on two sides", True),
        Check("look-alikes", "thumbnails", "look at <script>alert(1)</script> and b", False),
    )
    chapter = leakage_chapter(checks)
    write_page(tmp_path / "page.html", "t", "l", {}, [chapter])
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert page.index("look-alikes") < page.index("none of 3") and "1 of 2 checks found something" in page
