"""A visit: exactly grid^2 patches, each where it says, by the tissue rule, every position equally likely, whatever is damaged."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tifffile
import yaml
from PIL import Image

import histoscale.data.cells as cells_module
from histoscale.data.catalog import Catalog
from histoscale.data.cells import Cells, Tissue
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.keys import key
from histoscale.data.manifest import read_manifest
from histoscale.data.pixelfilter import PixelFilterConfig
from histoscale.data.plan import SamplerConfig, Visit
from histoscale.data.storage import Store
from histoscale.data.tissue import TissueConfig
from histoscale.data.visit import SlideSource, VisitFailed, in_rows

ROOT = Path(__file__).resolve().parents[1]
Index = Callable[[Sequence[Path]], Catalog]


@pytest.fixture
def sampler() -> SamplerConfig:
    """The committed default with small patches."""
    values = yaml.safe_load((ROOT / "configs/sampler/default.yaml").read_text())
    values |= {"mpps": [0.5], "weights": [1], "patch_px": 48, "grid": 3}
    values["pixel_filter"] = PixelFilterConfig(**values["pixel_filter"])
    return SamplerConfig(**values)


@pytest.fixture
def index(tmp_path: Path, store: Store, tissue_config: TissueConfig, journal: Journal) -> Index:
    """A catalog of slide files; ids are the files' names."""

    def build(paths: Sequence[Path]) -> Catalog:
        manifest = tmp_path / "manifest.csv"
        manifest.write_text("slide_id,uri\n" + "".join(f"{path.stem},{path}\n" for path in paths))
        return build_catalog(read_manifest(str(manifest), store), store, tissue_config, tmp_path / "catalog", 0, None, journal)

    return build


def visit(number: int, slide: int = 0, target: int = 0, mpp: float = 0.5) -> Visit:
    return Visit(0, 0, number, 0, slide, target, key(11, "visit", number), mpp)


def speckled(height: int, width: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width)) < share


@pytest.mark.parametrize("size", [17.0, 17.3, 40.0])
def test_the_tissue_rule_is_the_share_of_the_area(size: float) -> None:
    mask = speckled(20, 30, 0.4, 0)
    cells = Cells(Tissue(mask, 5.0), 300, 200, 0.5, size, 0.4)
    fine = np.kron(mask, np.ones((100, 100)))  # ten samples a level pixel
    draw = np.random.default_rng(1)
    x, y = draw.integers(-50, 300, 300), draw.integers(-50, 200, 300)
    fits = cells.fits(x, y, 3)
    for i in range(300):
        for row in range(3):
            for column in range(3):
                left, top = x[i] + column * size, y[i] + row * size
                inside = left >= 0 and top >= 0 and left + size <= 300 and top + size <= 200
                area = fine[round(top * 10) : round((top + size) * 10), round(left * 10) : round((left + size) * 10)]
                assert fits[i, row, column] == (inside and area.mean() >= 0.4)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_a_slide_is_eligible_when_one_whole_position_fits(fraction: float) -> None:
    found = set()
    for seed in range(60):
        mask = speckled(9, 12, 0.08, seed)
        cells = Cells(Tissue(mask, 3.3), 80, 60, 0.5, 14.2, fraction)
        x, y = np.meshgrid(np.arange(80), np.arange(60))
        expected = bool(cells.fits(x.ravel(), y.ravel(), 1).any())
        assert cells.any() == expected
        found.add(expected)
    assert found == {True, False} or fraction in (0.05, 0.5)
    assert not Cells(Tissue(np.ones((9, 12), bool), 3.3), 13, 60, 0.5, 14.2, fraction).any()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("rare", [False, True])
@pytest.mark.parametrize("size", [8.0, 7.5])
def test_every_position_of_a_cell_is_equally_likely(
    rare: bool, size: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corners are drawn with weight E / min(E, count), so that cells taken with a chance of min(E, count) / E come out even, by
    trying and (rare) by blocks alone."""
    if rare:
        monkeypatch.setattr(cells_module, "_TRIES", (64,))
        monkeypatch.setattr(Cells, "_first", _after(Cells._first, 1))
    mask = np.zeros((6, 9), bool)
    mask[1:3, 1:6], mask[4, 7] = True, True
    cells = Cells(Tissue(mask, 2.0), 36, 24, 0.5, size, 0.4)
    x, y = (c.ravel() for c in np.meshgrid(np.arange(-20, 36), np.arange(-20, 24)))
    fits = cells.fits(x, y, 2)
    possible = {(int(a), int(b)): f for a, b, f in zip(x, y, fits, strict=True) if f.any()}
    weights = np.array([f.sum() / min(f.sum(), count) for f in possible.values()])
    drawn, positions = Counter[tuple[int, int]](), Counter[tuple[float, float]]()
    draws = 4_000
    for i in range(draws):
        left, top, held = cells.region(key(5, "region", i), 2, count)
        assert (held == possible[left, top]).all()
        drawn[left, top] += 1
        share = min(held.sum(), count) / held.sum()
        for r, c in np.argwhere(held):
            positions[left + c * size, top + r * size] += share
    assert len(possible) > 100 and (count == 4 or len(set(weights)) > 1)
    expected = weights / weights.sum() * draws
    assert scipy.stats.chisquare([drawn[corner] for corner in possible], expected).pvalue > 1e-3
    every = Counter((a + c * size, b + r * size) for (a, b), f in possible.items() for r, c in np.argwhere(f))
    if size == 8.0:
        assert set(every.values()) == {4}  # each whole position stands in one region for each of its four places
    rates = np.array([positions[p] / n for p, n in every.items()]) * weights.sum() / draws
    assert abs(rates.mean() - 1) < 0.03
    assert rates.std() < 1.2 * np.sqrt(weights.sum() / draws)


def test_the_edge_of_tissue_is_as_likely_as_its_inside() -> None:
    """Whole visits' worth of cells (a region of six, sixteen taken row by row), by how much tissue is around a patch."""
    grid = np.hypot(*np.mgrid[-30:30, -40:40]) < 27
    cells = Cells(Tissue(grid ^ (np.hypot(*np.mgrid[-36:24, -30:50]) < 9), 4.0), 1280, 960, 0.25, 64.0, 0.4)
    corners = []
    for i in range(1_500):
        x, y, fits = cells.region(key(3, "region", i), 6, 16)
        taken = in_rows(fits, key(3, "order", i))[:16]
        assert all(fits[at] for at in taken) and len(taken) == min(16, fits.sum())
        corners += [(x + c * 64, y + r * 64) for r, c in taken]
    x, y = (c.ravel() for c in np.meshgrid(np.arange(0, 1217, 7), np.arange(0, 897, 7)))
    free = cells.fits(x, y, 1)[:, 0, 0]

    def around(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Share of tissue cells among the 5 x 5 around each corner, in five bins: shares of all corners."""
        share = cells.fits(x - 128, y - 128, 5).mean((1, 2))
        return np.histogram(share, [0.0, 0.5, 0.65, 0.8, 0.95, 1.01])[0] / len(x)

    ratio = around(*np.array(corners).T) / around(x[free], y[free])
    assert (np.abs(ratio - 1) < 0.12).all(), ratio


def _after(first: Callable[..., object], skipped: int) -> Callable[..., object]:
    """`first`, blind on its first calls of each region: the random tries then find nothing."""
    calls = [0]

    def blind(self: Cells, *region: object) -> object:
        calls[0] += 1
        if calls[0] <= skipped:
            return None
        found = first(self, *region)
        if found is not None:
            calls[0] = 0
        return found

    return blind


def test_patches_are_the_pixels_of_the_level_at_their_corners(
    tmp_path: Path, make_slide: Callable[..., Path], index: Index, store: Store, sampler: SamplerConfig
) -> None:
    path = make_slide(tmp_path / "a.svs", downsamples=(1, 2), tile=64)
    catalog = index([path])
    source = SlideSource(catalog, store, replace(sampler, mpps=[0.5, 1.02], weights=[1, 1], patch_px=40))
    assert source.table().eligible.all()
    with tifffile.TiffFile(path) as file:
        levels = [page.asarray() for page in file.pages]
    tissue = np.kron(catalog.mask(0), np.ones((16, 16)))  # 8 um a mask px, 0.5 um a level-0 px
    for target, true in ((0, 0.5), (1, 1.0)):
        seen = set()
        for number in range(20):
            read = source.read(visit(number, target=target, mpp=source.sampler.mpps[target]))
            assert np.stack(read.pixels).shape == (9, 40, 40, 3)
            assert (read.level, read.mpp, read.repeated) == (target, true, 0)
            corners = list(zip(read.x.tolist(), read.y.tolist(), strict=True))
            for patch, (x, y) in zip(read.pixels, corners, strict=True):
                assert (patch == levels[target][y : y + 40, x : x + 40]).all()
                assert tissue[y << target : (y + 40) << target, x << target : (x + 40) << target].mean() >= 0.4
            seen.update(corners)
            again = source.read(visit(number, target=target, mpp=source.sampler.mpps[target]))
            assert np.array_equal(again.pixels, read.pixels)
        assert len(seen) == 20 * 9


def test_cells_of_one_region_are_disjoint(
    tmp_path: Path, make_slide: Callable[..., Path], draw_tissue: Callable[..., np.ndarray], index: Index, store: Store,
    sampler: SamplerConfig,
) -> None:  # fmt: skip
    path = make_slide(tmp_path / "whole.svs", pixels=draw_tissue(1600, 1400, whole=True))
    source = SlideSource(index([path]), store, sampler)
    inside = 0
    for number in range(30):
        read = source.read(visit(number))
        corners = set(zip(read.x.tolist(), read.y.tolist(), strict=True))
        if len({(x % 48, y % 48) for x, y in corners}) == 1:  # one region held them all: they stand on its grid
            inside += 1
            assert len(corners) == 9 and np.ptp(read.x) <= 3 * 48
    assert inside > 15


def test_other_magnifications_are_resampled_once_and_their_mpp_is_true(
    tmp_path: Path, make_slide: Callable[..., Path], index: Index, store: Store, sampler: SamplerConfig
) -> None:
    path = make_slide(tmp_path / "a.svs", downsamples=(1,))
    sampler = replace(sampler, mpps=[0.8, 0.52, 0.25], weights=[1, 1, 1], patch_px=64, grid=2)
    source = SlideSource(index([path]), store, sampler)
    assert source.table().eligible.tolist() == [[True, True, False]]
    with tifffile.TiffFile(path) as file:
        level = Image.fromarray(file.pages[0].asarray())
    for number in range(5):
        read = source.read(visit(number, mpp=0.8))
        assert read.mpp == 0.8
        for patch, x, y in zip(read.pixels, read.x, read.y, strict=True):
            box = (float(x), float(y), x + 64 * 1.6, y + 64 * 1.6)
            other = np.asarray(level.resize((64, 64), Image.Resampling.HAMMING, box), np.int16)
            inner = np.abs(patch.astype(np.int16) - other)[4:-4, 4:-4]
            assert inner.mean() < 4  # up to half a level pixel beside it: corners are recorded as whole numbers
    assert source.read(visit(0, target=1, mpp=0.52)).mpp == 0.5  # within 5 %: taken as it is, and said so
    enlarged = SlideSource(source.catalog, store, replace(sampler, max_upsample=2.0))
    assert enlarged.table().eligible.all()
    assert enlarged.read(visit(0, target=2, mpp=0.25)).mpp == 0.25


def test_a_small_level_gives_several_small_regions(
    tmp_path: Path, make_slide: Callable[..., Path], draw_tissue: Callable[..., np.ndarray], index: Index, store: Store,
    sampler: SamplerConfig,
) -> None:  # fmt: skip
    path = make_slide(tmp_path / "small.svs", pixels=draw_tissue(500, 420, whole=True), downsamples=(1,))
    source = SlideSource(index([path]), store, replace(sampler, patch_px=200, grid=3))
    read = source.read(visit(1))  # holds 2 x 2 cells, wants 9
    assert len(read.pixels) == 9
    distinct = len(set(zip(read.x.tolist(), read.y.tolist(), strict=True)))
    assert distinct >= 9 - read.repeated and distinct > 4


def test_the_pixel_filter_repeats_what_passed_or_fails(
    tmp_path: Path, make_slide: Callable[..., Path], index: Index, store: Store, sampler: SamplerConfig
) -> None:
    catalog = index([make_slide(tmp_path / "a.svs")])
    hsv = replace(sampler.pixel_filter, kind="hsv", stride=4)
    plain, some = (SlideSource(catalog, store, replace(sampler, pixel_filter=f)) for f in (sampler.pixel_filter, hsv))
    assert all(plain.read(visit(n)).tested == plain.read(visit(n)).passed for n in range(5))
    reads = [some.read(visit(n)) for n in range(20)]
    assert 0 < sum(r.passed for r in reads) < sum(r.tested for r in reads)
    picky = replace(hsv, hue=[120, 155], fraction=0.25)  # only the purple dots
    few = [SlideSource(catalog, store, replace(sampler, pixel_filter=picky, grid=4)).read(visit(n)) for n in range(6)]
    repeated = next(read for read in few if read.repeated)
    kept = 16 - repeated.repeated
    for i in range(kept, 16):
        assert (repeated.pixels[i] == repeated.pixels[i % kept]).all()
        assert (repeated.x[i], repeated.y[i]) == (repeated.x[i % kept], repeated.y[i % kept])
    with pytest.raises(VisitFailed, match="pixel filter") as failed:
        SlideSource(catalog, store, replace(sampler, pixel_filter=replace(hsv, hue=[30, 40]))).read(visit(0))
    assert failed.value.tested > 0


def test_damaged_tiles_cost_their_cells_only(
    tmp_path: Path, make_slide: Callable[..., Path], draw_tissue: Callable[..., np.ndarray], index: Index, store: Store,
    sampler: SamplerConfig,
) -> None:  # fmt: skip
    path = make_slide(tmp_path / "a.svs", pixels=draw_tissue(1100, 900, whole=True), downsamples=(1,), tile=128)
    catalog = index([path])
    whole = [SlideSource(catalog, store, sampler).read(visit(n)) for n in range(30)]
    level = catalog.layout(0).levels[0]
    bad = {3, 11, 12, 30}
    with path.open("r+b") as file:
        for tile in bad:
            file.seek(int(level.offsets[tile]))
            file.write(b"\0" * int(level.counts[tile]))
    changed = 0
    for number in range(30):
        read = SlideSource(catalog, store, sampler).read(visit(number))
        for x, y in zip(read.x.tolist(), read.y.tolist(), strict=True):
            rows, columns = range(y // 128, (y + 47) // 128 + 1), range(x // 128, (x + 47) // 128 + 1)
            touched = {row * level.columns + column for row in rows for column in columns}
            assert not touched & bad
        changed += not np.array_equal(read.pixels, whole[number].pixels)
    assert 0 < changed < 30


def test_a_slide_that_is_gone_fails_its_visits(
    tmp_path: Path, make_slide: Callable[..., Path], index: Index, store: Store, sampler: SamplerConfig
) -> None:
    path = make_slide(tmp_path / "a.svs")
    source = SlideSource(index([path]), store, sampler)
    path.unlink()
    with pytest.raises(VisitFailed, match="a.svs"):
        source.read(visit(0))


def test_a_slide_that_serves_nothing_says_what_it_could(
    tmp_path: Path, make_slide: Callable[..., Path], index: Index, store: Store, sampler: SamplerConfig
) -> None:
    catalog = index([make_slide(tmp_path / "coarse.svs", mpp=3.19, downsamples=(1, 2)), make_slide(tmp_path / "fine.svs")])
    source = SlideSource(catalog, store, sampler)
    assert source.table().eligible.tolist() == [[False], [True]]
    assert source.ineligible == [
        ("coarse", "its finest level has 3.19 um/px: it cannot serve 0.5; it could serve 3.19, 6.38")
    ]
