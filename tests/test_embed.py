"""Embedding stores: the right patches of the right slides, written once, and what happens to bad ones."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from corners import GRID, PIPE, RECIPE, catalog_of, corners, encoder
from test_release import PLAIN, RELEASE, checkpoint
from torch import Tensor

from histoscale.data.catalog import Catalog
from histoscale.data.journal import Journal
from histoscale.data.storage import StorageError, Store
from histoscale.data.tissue import TissueConfig
from histoscale.eval.embed import (
    Embedded,
    EmbedError,
    JitterConfig,
    check_served,
    embed_slides,
    grid_words,
    jittered,
    prepare,
    settle,
    shares,
)
from histoscale.eval.encoder import Encoder
from histoscale.eval.grid import GridConfig, Ineligible, PipeConfig, tile_slide
from histoscale.eval.stores import StoreConfig, StoreError, open_store
from histoscale.launch.run import invoke
from histoscale.pretrain.release import write_release


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
    recipe = replace(RECIPE, pool="cls+mean")
    found = embed_slides(encoder(), catalog, [0, 1], recipe, PIPE, store, journal.out, journal)
    assert found.slides == 2 and found.kept == 0 and not found.failed
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
        assert np.array_equal(coords, coords[np.lexsort((coords[:, 0], coords[:, 1]))])  # row by row
    assert found.patches == total
    assert not list(journal.out.glob("*.partial"))


@pytest.mark.parametrize("mpp, patch_px, read_px", [(0.5, 64, 4096), (0.9, 40, 256), (2.0, 32, 100)])
def test_the_grid_is_the_cells_with_enough_tissue(catalog: Catalog, mpp: float, patch_px: int, read_px: int) -> None:
    """Against counting mask pixels one cell at a time; the way of reading changes no cell."""
    grid = GridConfig(mpp, patch_px, 0.4, 0.05, 1.0)
    tiles = tile_slide(catalog, 0, mpp, patch_px, grid, read_px)
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
        return embed_slides(who, catalog, [0, 1], replace(RECIPE, grid=grid), PIPE, store, journal.out, journal).kept

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


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_sizes_of_batches_and_regions_change_no_byte(catalog: Catalog, store: Store, journal: Journal, dtype: str) -> None:
    written = []
    for number, pipe in enumerate((PIPE, PipeConfig(1000, 1, 2048), PipeConfig(16, 3, 64))):
        out = journal.out / str(number)
        out.mkdir()
        embed_slides(encoder(), catalog, [0, 1], replace(RECIPE, store=StoreConfig(dtype)), pipe, store, out, journal)
        written.append([(out / f"{name}.h5").read_bytes() for name in "ab"])
    assert written[0] == written[1] == written[2]
    assert open_store(journal.out / "0/a.h5").dtype == {"fp16": "float16", "fp32": "float32"}[dtype]


def test_a_feature_beyond_fp16_fails_its_slide_alone(catalog: Catalog, store: Store, journal: Journal) -> None:
    def large(pixels: Tensor) -> tuple[Tensor, Tensor]:
        cls, tokens = corners(pixels)
        calls.append(len(pixels))
        return cls * (1e4 if len(calls) == 1 else 1), tokens

    calls: list[int] = []
    embed_slides(encoder(), catalog, [0], RECIPE, PIPE, store, journal.out, journal)
    recipe = replace(RECIPE, store=StoreConfig("fp16"))
    found = embed_slides(encoder(tokens=large), catalog, [0, 1], recipe, PIPE, store, journal.out, journal)
    assert "give store.dtype=fp32" in found.failed["a"] and found.slides == 1
    assert not (journal.out / "a.h5").exists()  # the older store would pass for this one


def test_jittered_copies_hold_the_same_tiles_with_other_stains(catalog: Catalog, store: Store, journal: Journal) -> None:
    """Each patch by draws of its own, whatever it is read and batched with; the plain store is as without copies."""
    written = []
    for number, (copies, pipe) in enumerate(((0, PIPE), (2, PIPE), (2, PipeConfig(1000, 1, 64)))):
        out = journal.out / str(number)
        recipe = replace(RECIPE, pool="mean", jitter=JitterConfig(copies, 0.2, 0))
        prepare(out, recipe.jitter)
        embed_slides(encoder(), catalog, [0, 1], recipe, pipe, store, out, journal)
        written.append({str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.h5"))})
    assert written[1] == written[2] and written[0] == {name: written[1][name] for name in ("a.h5", "b.h5")}
    assert len(written[1]) == 6
    plain, first, second = (read(journal.out / "1" / name) for name in ("a.h5", "jitter-1/a.h5", "jitter-2/a.h5"))
    for copy in (first, second):
        np.testing.assert_array_equal(copy[1], plain[1])
        assert (copy[0] != plain[0]).any(axis=1).mean() > 0.9
        assert (
            len({tuple(row) for row in np.round(np.log(copy[0] + 1) - np.log(plain[0] + 1), 2)}) > 10
        )  # no one shift of the slide
    assert (first[0] != second[0]).any()
    assert plain[2]["jitter"] == "" and json.loads(second[2]["jitter"]) == {"copy": 2, "seed": 0, "sigma_od": 0.2}
    (out / "jitter-2/a.h5").unlink()
    assert embed_slides(encoder(), catalog, [0], recipe, PIPE, store, out, journal).kept == 0
    assert (out / "jitter-2/a.h5").read_bytes() == written[1]["jitter-2/a.h5"]


def test_no_jitter_changes_no_pixel() -> None:
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = torch.arange(5)
    assert (jittered(pixels, drawn, 0.0).int() - pixels.int()).abs().max() <= 1  # there and back through densities
    moved = jittered(pixels, drawn, 0.3)
    assert torch.equal(moved[2:3], jittered(pixels[2:3], drawn[2:3], 0.3)) and not torch.equal(moved, pixels)


def test_a_bad_tile_costs_its_patches_and_a_missing_slide_is_named(
    tmp_path: Path, catalog: Catalog, store: Store, journal: Journal
) -> None:
    embed_slides(encoder(), catalog, [0], RECIPE, PIPE, store, journal.out, journal)
    whole = read(journal.out / "a.h5")
    level = catalog.layout(0).levels[0]
    tile = int(2 * level.columns + 2)  # row 2, column 2 of 256 px
    with (tmp_path / "a.tif").open("r+b") as file:
        file.seek(int(level.offsets[tile]))
        file.write(b"\xff" * int(level.counts[tile]))
    (tmp_path / "b.tif").unlink()
    found = embed_slides(encoder("e2"), catalog, [0, 1], RECIPE, PIPE, store, journal.out, journal)
    features, coords, attrs = read(journal.out / "a.h5")
    inside = (whole[1] // 256 == 2).all(axis=1)
    assert attrs["lost_patches"] == inside.sum() > 0
    kept = {tuple(corner): value for corner, value in zip(coords.tolist(), features.tolist(), strict=True)}
    assert kept == {tuple(c): v for c, v, lost in zip(whole[1].tolist(), whole[0].tolist(), inside, strict=True) if not lost}
    assert list(found.failed) == ["b"] and found.slides == 1 and settle([found]) == found
    noted = [json.loads(line) for line in (journal.out / "failures.jsonl").read_text().splitlines()]
    assert noted[0]["slide_id"] == "b" and "no such file" in noted[0]["reason"]
    with pytest.raises(EmbedError, match="none of 1 slides"):
        settle([embed_slides(encoder("e2"), catalog, [1], RECIPE, PIPE, store, journal.out, journal)])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_a_truncated_slide_is_listed_and_the_others_go_on(
    tmp_path: Path, catalog: Catalog, store: Store, journal: Journal, share: float
) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    found = embed_slides(encoder(), catalog, [0, 1], RECIPE, PIPE, store, journal.out, journal)
    assert list(found.failed) == ["a"] and found.slides == 1 and not (journal.out / "a.h5").exists()
    assert len(read(journal.out / "b.h5")[0]) == found.patches


def test_what_the_encoder_does_not_say_must_be_given(catalog: Catalog, store: Store, journal: Journal) -> None:
    def embed(grid: GridConfig) -> Embedded:
        return embed_slides(encoder(), catalog, [0, 1], replace(RECIPE, grid=grid), PIPE, store, journal.out, journal)

    for mpp, patch_px, words in ((None, 64, "grid.mpp="), (0.5, None, "grid.patch_px=")):
        with pytest.raises(EmbedError, match=words):
            embed(GridConfig(mpp, patch_px, 0.4, 0.05, 1.0))
    coarse = GridConfig(0.1, 64, 0.4, 0.05, 1.0)
    with pytest.raises(EmbedError, match="none of 2 slides .* ineligible: no patch of 64 px at 0.1"):
        settle([embed(coarse)])
    with pytest.raises(Ineligible):
        tile_slide(catalog, 0, 0.1, 64, coarse, 300)


@pytest.mark.parametrize(
    ("mpps", "words"),
    [([0.5], "48 px at 0.5 µm/px, the default of e1$"), ([0.25, 0.5], r"at 0.5 .* e1 \(trained at 0.25 too: grid.mpp=\)")],
)
def test_what_chose_the_patches_is_one_line(mpps: list[float], words: str) -> None:
    who = replace(encoder(), name="e1", mpps=tuple(mpps), mpp=0.5, tile_px=48)
    assert re.search(words, grid_words(who, GridConfig(None, None, 0.4, 0.05, 1.0)))
    assert grid_words(who, GridConfig(1.0, 64, 0.4, 0.05, 1.0)) == "patches of 64 px at 1 µm/px"


@pytest.mark.parametrize(("mpps", "better"), [((0.25,), "0.5"), ((0.25, 1.0), "1"), ((0.25, 0.5, 2.0), "0.5")])
def test_a_catalog_that_cannot_serve_the_default_names_what_it_can(catalog: Catalog, mpps: Any, better: str) -> None:
    who = replace(encoder(), mpps=mpps, mpp=0.25, tile_px=64)
    with pytest.raises(EmbedError, match=rf"none of 2 slides can serve 0.25 µm/px \(.* 0.5 µm/px\): add grid.mpp={better}$"):
        check_served(catalog, who, GridConfig(None, None, 0.4, 0.05, 1.0))
    check_served(catalog, who, GridConfig(float(better), None, 0.4, 0.05, 1.0))


def test_a_release_and_a_checkpoint_of_several_magnifications_need_no_grid(
    tmp_path: Path, catalog: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained at 0.5 and 1: both look at 0.5, and are one encoder."""
    state = checkpoint(tmp_path / "run", PLAIN)
    write_release(state, tmp_path / "release", "fp32", RELEASE, None)
    found = []
    for name in ("release", "run/step-20"):
        keys = [f"encoder={tmp_path / name}", f"catalog={tmp_path / 'catalog'}", f"out={tmp_path / 'of' / Path(name).name}"]
        found.append(invoke("embed", [*keys, "precision=fp32", "hardware.device=cpu", "logging.progress=lines"])["embed"])
        said = capsys.readouterr().err
        assert "patches of 32 px at 0.5 µm/px, the default of" in said and "trained at 1 too: grid.mpp=" in said
        assert "next: histoscale mil embeddings=" in said
    assert [one["mpp"] for one in found] == [0.5, 0.5] and found[0]["encoder_hash"] == found[1]["encoder_hash"]
    assert len(list((tmp_path / "of/release").glob("*.h5"))) == 2


def test_what_the_storage_refuses_ends_the_run_after_the_others(
    catalog: Catalog, store: Store, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Catalog.reader

    def refusing(self: Catalog, slide: int, *more: Any) -> Any:
        if slide == 0:
            raise StorageError("az://x/a.tif: 403 Forbidden")
        return reader(self, slide, *more)

    monkeypatch.setattr(Catalog, "reader", refusing)
    found = embed_slides(encoder(), catalog, [0, 1], RECIPE, PIPE, store, journal.out, journal)
    assert found.slides == 1 and list(found.refused) == ["a"]
    with pytest.raises(StorageError, match=r"1 of 2 slides not read \(a: .*403 Forbidden\); the same command goes on"):
        settle([found, Embedded(0.5, 64)])
    monkeypatch.undo()
    assert embed_slides(encoder(), catalog, [0, 1], RECIPE, PIPE, store, journal.out, journal).kept == 1


def test_a_rank_whose_only_slide_fails_stops_no_other() -> None:
    one = Embedded(0.5, 64, failed={"a": "bad"})
    both = settle([one, Embedded(0.5, 64, slides=3, kept=1, patches=40, model_s=2.0), Embedded(0.5, 64)])
    assert (both.slides, both.kept, both.patches, both.failed, both.model_s) == (3, 1, 40, {"a": "bad"}, 2.0)
    with pytest.raises(EmbedError, match=r"none of 1 slides could be embedded \(a: bad\)"):
        settle([one])


class Areas:
    """Slides by their tissue alone."""

    def __init__(self, areas: list[float], ids: list[str] | None = None) -> None:
        self.areas = areas
        self.slide_ids = [f"s{i}" for i in range(len(areas))] if ids is None else ids

    def numbers(self, name: str) -> np.ndarray:
        return np.array(self.areas) if name == "tissue_px" else np.ones(len(self.areas))


def test_ranks_share_the_tissue_that_is_left(tmp_path: Path) -> None:
    areas: Any = Areas([100, 1, 1, 1, 97, 60, 40, 0])
    given = shares(areas, tmp_path, 3)
    assert sorted(sum(given, [])) == list(range(8))
    assert sorted(sum(areas.areas[i] for i in each) for each in given) == [100, 100, 100]
    for done in (0, 4):
        (tmp_path / f"s{done}.h5").touch()
    loads = [sum(areas.areas[i] for i in each if i not in (0, 4)) for each in shares(areas, tmp_path, 2)]
    assert max(loads) <= 60
    with pytest.raises(StoreError, match="no store for this slide"):
        shares(Areas([1.0, 1.0], ["fine", "../x"]), tmp_path, 1)  # type: ignore[arg-type]


def test_half_written_stores_are_swept(tmp_path: Path) -> None:
    for name in ("a.h5", "a.77.partial", "jitter-1/a.5.partial", "failures.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    prepare(tmp_path, JitterConfig(1, 0.1, 0))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.h5"]
