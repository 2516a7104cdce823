"""Eligibility from window sums equals the exact rule on the mask, for whatever slide and sampler."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from histoscale.data import eligible
from histoscale.data.bitmap import Bitmap
from histoscale.data.catalog import Catalog, open_catalog
from histoscale.data.eligible import serves, slide_table
from histoscale.data.manifest import Slide
from histoscale.data.merge import write_catalog
from histoscale.data.parts import Entry, Known, row_of
from histoscale.data.plan import SamplerConfig
from histoscale.data.readers.pyramid import Layout, Level
from histoscale.data.serving import serve, tissue_of
from histoscale.data.storage import Fingerprint, Store
from histoscale.data.tissue import TissueConfig
from histoscale.data.windows import SIDES, tissue_windows

CatalogOf = Callable[[list[Entry]], Catalog]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def sampler() -> SamplerConfig:
    """The committed default."""
    return TypeAdapter(SamplerConfig).validate_python(yaml.safe_load((ROOT / "configs/sampler/default.yaml").read_text()))


def blobs(draw: np.random.Generator, shape: tuple[int, int], count: int) -> np.ndarray:
    """bool [h, w]: ellipses of any size, some of them a pixel or two."""
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    mask = np.zeros(shape, bool)
    for _ in range(count):
        y, x = draw.uniform(0, 1, 2) * shape
        high, wide = np.exp(draw.uniform(0, np.log(max(shape)), 2))
        mask |= ((rows - y) / high) ** 2 + ((columns - x) / wide) ** 2 < 1
    mask.flat[draw.integers(mask.size)] = True
    return mask & (draw.uniform(size=shape) < draw.choice([1, 0.7, 0.4]))


def slide_of(draw: np.random.Generator, number: int) -> Entry:
    width, height = (int(draw.integers(60, 9000)) for _ in range(2))
    mpp = float(draw.choice([0.25, 0.2527, 0.5, 0.497, 1.0, 2.1]))
    levels = []
    for downsample in (1, 2, 4, 8, 16)[: draw.integers(1, 6)]:
        wide, high = max(1, width // downsample), max(1, height // downsample)
        true = float(draw.choice([downsample, downsample * 1.0005]))
        tile = int(draw.choice([240, 256, 250]))
        empty = np.zeros(0, np.int64)
        levels.append(Level(wide, high, tile, tile, true, "jpeg", "rgb", 1, b"", empty, empty))
    mask_mpp = 8.0 * float(draw.choice([1, 0.999, 1.31]))
    shape = int(np.ceil(height * mpp / mask_mpp)), int(np.ceil(width * mpp / mask_mpp))
    mask = blobs(draw, shape, int(draw.integers(1, 6)))
    slide = Slide(f"s{number:04d}", "none", None, None, None, None, None, mpp, None, None, None, {})
    known = Known("none", None, Fingerprint(1, ""), None)
    return Entry(slide, known, Layout("tiff", tuple(levels), mpp, None, None), mask, mask_mpp, b"")


@pytest.fixture
def catalog_of(tmp_path: Path, store: Store, tissue_config: TissueConfig) -> CatalogOf:
    def write(entries: list[Entry]) -> Catalog:
        write_catalog(tmp_path, map(row_of, entries), tissue_config)
        return open_catalog(str(tmp_path), store)

    return write


def exact(catalog: Catalog, row: int, mpp: float, sampler: SamplerConfig) -> bool:
    found = serve(catalog.layout(row).levels, catalog.level_mpps(row), tissue_of(catalog, row), sampler, mpp)
    return found is not None and found.cells.any()


@pytest.mark.parametrize("seed", range(6))
def test_the_rule_on_windows_is_the_rule_on_the_mask(
    seed: int, sampler: SamplerConfig, catalog_of: CatalogOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(seed)
    catalog = catalog_of([slide_of(draw, i) for i in range(40)])
    sampler = replace(
        sampler, patch_px=int(draw.choice([32, 224, 256])), tissue_fraction=float(draw.choice([0.01, 0.4, 0.75, 1.0])),
        max_upsample=float(draw.choice([1.0, 1.5])), mpp_tolerance=float(draw.choice([0.0, 0.05])),
    )  # fmt: skip
    asked = []
    real = eligible._asked
    monkeypatch.setattr(eligible, "_asked", lambda *given: asked.append(given) or real(*given))
    mpps = [0.125, 0.25, 0.253, 0.5, 0.77, 1.0, 2.0, 4.0, 8.0]
    rows = np.repeat(np.arange(len(catalog)), len(mpps))
    found = serves(catalog, rows, np.tile(mpps, len(catalog)), sampler).reshape(-1, len(mpps))
    expected = [[exact(catalog, row, mpp, sampler) for mpp in mpps] for row in range(len(catalog))]
    np.testing.assert_array_equal(found, expected)
    assert found.any() and not found.all()
    if sampler.tissue_fraction == 0.4:
        assert len(asked) < 0.5 * found.size  # specks on slides of a few mm: worse than any that is scanned


def test_ordinary_slides_are_decided_without_their_mask(
    sampler: SamplerConfig, catalog_of: CatalogOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of tissue from 1 to 6 mm on slides of 10 x 7.5 mm at the default mix."""
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[0:938, 0:1250]
    entries = []
    for number in range(40):
        entry = slide_of(draw, number)
        mask = np.zeros((938, 1250), bool)
        for _ in range(3):
            y, x = draw.uniform(0.2, 0.8, 2) * mask.shape
            mask |= ((rows - y) / draw.uniform(60, 400)) ** 2 + ((columns - x) / draw.uniform(60, 400)) ** 2 < 1
        empty = np.zeros(0, np.int64)
        levels = tuple(Level(40000 // d, 30000 // d, 256, 256, d, "jpeg", "rgb", 1, b"", empty, empty) for d in (1, 4, 16))
        entries.append(replace(entry, slide=replace(entry.slide, mpp=0.25), layout=replace(entry.layout, levels=levels),
                               mask=mask, mask_mpp=8.0))  # fmt: skip
    catalog = catalog_of(entries)
    monkeypatch.setattr(eligible, "_asked", None)
    table, ineligible = slide_table(catalog, sampler)
    assert table.eligible.all() and not ineligible
    np.testing.assert_allclose(table.area, [entry.mask.sum() * 64e-6 for entry in entries])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 17), st.integers(1, 17))
def test_windows_hold_the_most_tissue_of_every_place(seed: int, height: int, width: int) -> None:
    mask = blobs(np.random.default_rng(seed), (height, width), 2)
    found = tissue_windows(mask)
    for side, most in zip(SIDES.tolist(), found.tolist(), strict=True):
        if side > 17:
            assert most == mask.sum()
            continue
        reach = [(y, x) for y in range(max(1, height - side + 1)) for x in range(max(1, width - side + 1))]
        assert most == max(int(mask[y : y + side, x : x + side].sum()) for y, x in reach)


@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(1, 50))
def test_a_bitmap_is_its_mask(seed: int, height: int, width: int) -> None:
    draw = np.random.default_rng(seed)
    mask = draw.uniform(size=(height, width)) < draw.choice([0.0, 0.01, 0.5])
    bitmap = Bitmap.of(mask)
    np.testing.assert_array_equal(bitmap.mask(), mask)
    if bitmap.rows:
        left, right = sorted(draw.integers(0, bitmap.columns + 1, 2).tolist())
        top, bottom = sorted(draw.integers(0, bitmap.rows + 1, 2).tolist())
        box = mask[bitmap.top : bitmap.top + bitmap.rows, bitmap.left : bitmap.left + bitmap.columns]
        np.testing.assert_array_equal(bitmap.window(left, top, right, bottom), box[top:bottom, left:right])
