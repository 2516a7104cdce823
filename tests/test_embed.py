"""Embedding stores: the right patches of the right slides, written once, and what happens to bad ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from corners import GRID, NONE, PIPE, catalog_of, corners, encoder
from torch import Tensor

from histoscale.data.catalog import Catalog
from histoscale.data.journal import Journal
from histoscale.data.storage import Store
from histoscale.data.tissue import TissueConfig
from histoscale.eval.embed import EmbedError, GridConfig, PipeConfig, embed_slides, tile_slide
from histoscale.eval.encoder import Encoder


@pytest.fixture
def catalog(
    tmp_path: Path, make_slide: Callable[..., Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> Catalog:
    for seed, name in enumerate("ab"):
        make_slide(tmp_path / f"{name}.tif", compression="deflate", kind="generic", seed=seed)
    return catalog_of(tmp_path, store, tissue_config, journal)


def read(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    with h5py.File(path) as file:
        assert dict(file["coords"].attrs) == dict(file.attrs)
        return file["features"][:], file["coords"][:], dict(file.attrs)


def test_features_and_coordinates_belong_together(
    catalog: Catalog, store: Store, journal: Journal, draw_tissue: Callable[..., np.ndarray]
) -> None:
    summary = embed_slides(encoder(), catalog, [0, 1], "cls+mean", GRID, NONE, PIPE, store, journal.out, journal)
    assert summary["slides"] == 2 and summary["kept"] == 0 and not summary["failed"]
    total = 0
    for seed, name in enumerate("ab"):
        features, coords, attrs = read(journal.out / f"{name}.h5")
        full = draw_tissue(1100, 900, seed).astype(np.float32)
        assert features.dtype == np.float32 and coords.dtype == np.int64 and len(coords) > 20
        np.testing.assert_array_equal(features[:, :3], full[coords[:, 1], coords[:, 0]])
        np.testing.assert_array_equal(features[:, 3:], full[coords[:, 1] + 63, coords[:, 0] + 63])
        assert (coords % 64 == 0).all() and len(np.unique(coords, axis=0)) == len(coords)
        assert (attrs["slide_id"], attrs["encoder_hash"], attrs["mpp"], attrs["patch_size"]) == (name, "e1", 0.5, 64)
        assert (attrs["patch_size_level0"], attrs["level0_width"], attrs["level0_height"]) == (64, 1100, 900)
        total += len(features)
    assert summary["patches"] == total
    assert not list(journal.out.glob("*.partial"))


@pytest.mark.parametrize("mpp, patch_px, read_px", [(0.5, 64, 4096), (0.9, 40, 256), (2.0, 32, 100)])
def test_the_grid_is_the_cells_with_enough_tissue(catalog: Catalog, mpp: float, patch_px: int, read_px: int) -> None:
    """Against counting mask pixels one cell at a time; the way of reading changes no cell."""
    grid = GridConfig(mpp, patch_px, 0.4, 0.05, 1.0)
    tiles = tile_slide(catalog, 0, mpp, patch_px, grid, read_px)
    assert tiles is not None
    mask, scale = catalog.mask(0), catalog.mask_mpp(0) / 0.5  # level-0 px a mask px
    side = patch_px * tiles.scale.mpp / 0.5
    found = {tuple(corner) for corner in np.rint(tiles.coords / side).astype(int).tolist()}
    fine = np.kron(mask, np.ones((8, 8)))
    pitch = scale / 8
    checked = 0
    for row in range(int(900 // side)):
        for column in range(int(1100 // side)):
            y, x = row * side / pitch, column * side / pitch
            share = fine[round(y) : round(y + side / pitch), round(x) : round(x + side / pitch)].mean()
            if abs(share - 0.4) > 0.1:  # near the rule, rounding decides
                assert ((column, row) in found) == (share > 0.4), (row, column, share)
                checked += 1
    assert checked > 10


def test_finished_stores_are_kept_and_others_are_made_again(catalog: Catalog, store: Store, journal: Journal) -> None:
    def again(who: Encoder, grid: GridConfig = GRID) -> int:
        return embed_slides(who, catalog, [0, 1], "cls", grid, NONE, PIPE, store, journal.out, journal)["kept"]

    calls = []

    def counting(pixels: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(pixels))
        return corners(pixels)

    assert again(encoder()) == 0
    assert again(encoder(tokens=counting)) == 2 and not calls
    (journal.out / "a.h5").write_bytes((journal.out / "a.h5").read_bytes()[:500])  # cut short
    (journal.out / "b.h5").unlink()
    assert again(encoder(tokens=counting)) == 0 and calls
    assert len(read(journal.out / "a.h5")[0])
    assert again(encoder("e2")) == 0 and again(encoder("e2")) == 2
    assert again(encoder("e2"), GridConfig(0.5, 48, 0.4, 0.05, 1.0)) == 0


def test_the_sizes_of_batches_and_regions_change_nothing(catalog: Catalog, store: Store, journal: Journal) -> None:
    for number, pipe in enumerate((PIPE, PipeConfig(1000, 1, 2048))):
        out = journal.out / str(number)
        out.mkdir()
        embed_slides(encoder(), catalog, [0], "cls", GRID, NONE, pipe, store, out, journal)
    first, second = (read(journal.out / f"{number}/a.h5") for number in range(2))
    order = [np.lexsort(found[1].T) for found in (first, second)]
    for part in range(2):
        np.testing.assert_array_equal(first[part][order[0]], second[part][order[1]])


def test_a_bad_tile_costs_its_patches_and_a_missing_slide_is_named(
    tmp_path: Path, catalog: Catalog, store: Store, journal: Journal
) -> None:
    embed_slides(encoder(), catalog, [0], "cls", GRID, NONE, PIPE, store, journal.out, journal)
    whole = read(journal.out / "a.h5")
    level = catalog.layout(0).levels[0]
    tile = int(2 * level.columns + 2)  # row 2, column 2 of 256 px
    with (tmp_path / "a.tif").open("r+b") as file:
        file.seek(int(level.offsets[tile]))
        file.write(b"\xff" * int(level.counts[tile]))
    (tmp_path / "b.tif").unlink()
    summary = embed_slides(encoder("e2"), catalog, [0, 1], "cls", GRID, NONE, PIPE, store, journal.out, journal)
    features, coords, attrs = read(journal.out / "a.h5")
    inside = (whole[1] // 256 == 2).all(axis=1)
    assert attrs["lost_patches"] == inside.sum() > 0
    kept = {tuple(corner): value for corner, value in zip(coords.tolist(), features.tolist(), strict=True)}
    assert kept == {tuple(c): v for c, v, lost in zip(whole[1].tolist(), whole[0].tolist(), inside, strict=True) if not lost}
    assert list(summary["failed"]) == ["b"] and summary["slides"] == 1
    noted = [json.loads(line) for line in (journal.out / "failures.jsonl").read_text().splitlines()]
    assert noted[0]["slide_id"] == "b" and "no such file" in noted[0]["reason"]
    with pytest.raises(EmbedError, match="none of 1 slides"):
        embed_slides(encoder("e2"), catalog, [1], "cls", GRID, NONE, PIPE, store, journal.out, journal)


def test_what_the_encoder_does_not_say_must_be_given(catalog: Catalog, store: Store, journal: Journal) -> None:
    for mpp, patch_px, words in ((None, 64, "grid.mpp="), (0.5, None, "grid.patch_px=")):
        grid = GridConfig(mpp, patch_px, 0.4, 0.05, 1.0)
        with pytest.raises(EmbedError, match=words):
            embed_slides(encoder(), catalog, [0], "cls", grid, NONE, PIPE, store, journal.out, journal)
    with pytest.raises(EmbedError, match="ineligible: no patch of 64 px at 0.1"):
        embed_slides(encoder(), catalog, [0], "cls", GridConfig(0.1, 64, 0.4, 0.05, 1.0), NONE, PIPE, store, journal.out, journal)
