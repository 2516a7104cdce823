"""The catalog: what goes in comes out, from anywhere, deterministic, incremental, and refused when damaged."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoscale.data.catalog import Catalog, CatalogError, open_catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import Slide
from histoscale.data.storage import Changed, Store
from histoscale.data.tables import pack_table, unpack_table
from histoscale.data.tissue import TissueConfig

MakeSlide = Callable[..., Path]


def slide(name: str, path: Path, **values: object) -> Slide:
    return replace(Slide(name, str(path), None, None, None, None, None, None, None, None, None, {}), **values)  # type: ignore[arg-type]


@pytest.fixture
def slides(tmp_path: Path, make_slide: MakeSlide) -> list[Slide]:
    a = slide("b", make_slide(tmp_path / "b.svs", seed=1), patient_id="p1", site="x", labels={"tumour": "1"})
    b = slide("a", make_slide(tmp_path / "a.tif", kind="generic", missing=(3,), compression="deflate"))
    return [a, b, slide("gone", tmp_path / "gone.svs")]


@pytest.fixture
def catalog(slides: list[Slide], store: Store, tissue_config: TissueConfig, journal: Journal) -> Catalog:
    return build_catalog(slides, store, tissue_config, journal.out, 0, None, journal)


def test_round_trip(catalog: Catalog, slides: list[Slide], store: Store, tmp_path: Path) -> None:
    again = open_catalog(catalog.uri, store)
    assert [s.slide_id for s in again.slides] == ["a", "b"]
    assert again.slides[1] == replace(slides[0], mpp=0.5, objective=20.0, scanner="TEST1")
    assert again.row("b") == 1 and len(again) == 2
    assert [found.slide_id for found in again.rejected] == ["gone"]
    with pytest.raises(KeyError, match="gone is not in the catalog .*missing"):
        again.row("gone")
    layout = again.layout(0)
    assert layout.levels[0].counts[3] == 0 and len(layout.levels) == 2
    assert again.level_mpps(0) == pytest.approx((0.5, 2.0))
    assert again.mask(1).dtype == bool and again.mask_mpp(1) == pytest.approx(8.0)
    assert again.mask(1).shape == (57, 69)
    pixels = again.reader(1, store).region(0, 300, 200, 400, 300)
    with pytest.raises(IndexError, match="no number 2"):
        again.layout(2)
    copy = pickle.loads(pickle.dumps(again))
    assert len(pickle.dumps(again)) < 2000
    np.testing.assert_array_equal(copy.reader(1, store).region(0, 300, 200, 400, 300), pixels)
    np.testing.assert_array_equal(copy.mask(0), again.mask(0))


def test_a_catalog_in_an_object_store(catalog: Catalog, store: Store) -> None:
    fsspec.filesystem("memory").put(catalog.uri, "/bucket/catalog", recursive=True)
    remote = open_catalog("memory://bucket/catalog", store)
    assert remote.hash == catalog.hash
    np.testing.assert_array_equal(remote.mask(1), catalog.mask(1))
    np.testing.assert_array_equal(remote.layout(1).levels[0].offsets, catalog.layout(1).levels[0].offsets)


def test_the_hash_follows_content_and_not_place(
    catalog: Catalog, slides: list[Slide], store: Store, tissue_config: TissueConfig, tmp_path: Path, journal: Journal
) -> None:
    def build(found: list[Slide], tissue: TissueConfig = tissue_config) -> str:
        return build_catalog(found, store, tissue, journal.out, 0, None, journal).hash

    moved = []
    for old in slides[:2]:
        path = tmp_path / "moved" / Path(old.uri).name
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(old.uri, path)
        os.utime(path, (1, 1))
        moved.append(replace(old, uri=str(path)))
    assert build(moved[::-1]) == catalog.hash
    assert build(moved[:1]) != catalog.hash
    assert build([replace(moved[0], labels={"tumour": "0"}), moved[1]]) != catalog.hash
    assert build([replace(moved[0], mpp=0.4), moved[1]]) != catalog.hash
    assert build(moved, replace(tissue_config, mpp=16.0)) != catalog.hash


def test_unchanged_slides_are_taken_over_unread(
    catalog: Catalog, slides: list[Slide], store: Store, tissue_config: TissueConfig, tmp_path: Path, journal: Journal,
    make_slide: MakeSlide,
) -> None:  # fmt: skip
    class Watching(Store):
        read_from: set[str] = set()

        def ranges(self, uri: str, spans: object) -> list[bytes]:
            Watching.read_from.add(Path(uri).name)
            return super().ranges(uri, spans)  # type: ignore[arg-type]

    watching = Watching(store.config)
    relabelled = [replace(slides[0], labels={"tumour": "0"}), slides[1], slide("c", make_slide(tmp_path / "c.svs"))]
    grown = build_catalog(relabelled, watching, tissue_config, tmp_path / "grown", 0, catalog, journal)
    assert Watching.read_from == {"c.svs"}
    assert grown.slides[grown.row("b")].labels == {"tumour": "0"}
    fresh = build_catalog(relabelled, store, tissue_config, tmp_path / "fresh", 0, None, journal)
    assert grown.hash == fresh.hash
    for changed in ({"mpp": 0.4}, {"uri": str(tmp_path / "c.svs")}):
        Watching.read_from.clear()
        build_catalog([replace(slides[0], **changed)], watching, tissue_config, tmp_path / "x", 0, catalog, journal)  # type: ignore[arg-type]
        assert Watching.read_from
    Watching.read_from.clear()
    build_catalog(slides[:1], watching, replace(tissue_config, mpp=4.0), tmp_path / "x", 0, catalog, journal)
    os.utime(slides[1].uri, (5, 5))
    build_catalog(slides[1:2], watching, tissue_config, tmp_path / "x", 0, catalog, journal)
    assert Watching.read_from == {"a.tif", "b.svs"}


def test_what_is_no_catalog_is_said(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="histoscale index"):
        open_catalog(str(tmp_path / "none"), store)
    folder = Path(catalog.uri)
    info = json.loads((folder / "catalog.json").read_text())
    blocks, table = folder / info["folder"] / "tables.bin", folder / info["folder"] / "slides.arrow"
    whole = blocks.read_bytes()
    blocks.write_bytes(whole[:-1])
    with pytest.raises(CatalogError, match="tables.bin has"):
        open_catalog(catalog.uri, store)
    blocks.write_bytes(whole)
    table.write_bytes(bytes(table.stat().st_size))
    with pytest.raises(CatalogError, match="slides.arrow is damaged"):
        open_catalog(catalog.uri, store)
    (folder / "catalog.json").write_text(json.dumps({**info, "version": 1}))
    with pytest.raises(CatalogError, match="index the manifest again"):
        open_catalog(catalog.uri, store)
    (folder / "catalog.json").write_text(json.dumps({**info, "version": 99}))
    with pytest.raises(CatalogError, match="99"):
        open_catalog(catalog.uri, store)
    (folder / "catalog.json").write_text("{")
    with pytest.raises(CatalogError, match="damaged"):
        open_catalog(catalog.uri, store)


def test_a_catalog_replaced_under_a_run_is_noticed(
    catalog: Catalog, slides: list[Slide], store: Store, tissue_config: TissueConfig, journal: Journal
) -> None:
    travelling = pickle.dumps(catalog)
    build_catalog(slides[:1], store, tissue_config, journal.out, 0, None, journal)
    with pytest.raises(Changed, match="replaced while it was in use"):
        pickle.loads(travelling)


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 40)), max_size=40), st.booleans())
def test_tile_tables_pack_without_loss(tiles: list[tuple[int, int]], packed: bool) -> None:
    counts = np.array([count for count, _ in tiles], np.int64)
    offsets = np.array([offset for _, offset in tiles], np.int64)
    if packed:
        offsets = np.cumsum(np.concatenate([[16], counts[:-1]]))[: len(tiles)].astype(np.int64)
    found = unpack_table(pack_table(offsets, counts), len(tiles))
    np.testing.assert_array_equal(found[0], offsets)
    np.testing.assert_array_equal(found[1], counts)
    assert found[0].dtype == found[1].dtype == np.int64


def test_tile_tables_are_small() -> None:
    rng = np.random.default_rng(0)
    counts = rng.normal(15000, 4000, 20000).clip(500).astype(np.int64)
    offsets = np.cumsum(np.concatenate([[16], counts[:-1]]))
    packed = len(pack_table(offsets, counts))
    assert packed < 2 * 20000  # noise of 14 bits
    moved = offsets.copy()
    moved[5000:] += 1 << 33  # one gap, beyond 4 GiB
    assert len(pack_table(moved, counts)) < packed + 64  # offsets cost nothing but the gap
