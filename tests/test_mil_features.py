"""Features of many slides: the same numbers whatever the layout, cache and threads; drawn without replacement; bounded memory."""

import os
import threading
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from mil_fixtures import ABMIL, TASK, cohort, fit_config, parts, quiet
from store_layouts import grid, write_clam, write_trident

from histoscale.eval.mil.bags import read_bags
from histoscale.eval.mil.features import Draw, Features, choose
from histoscale.eval.mil.fit import fit
from histoscale.eval.stores import StoreConfig, StoreError, read_features, write_store

WIDTH = 6


def slides(folder: Path) -> list[list[Path]]:
    """Five rows in four layouts, the first two with a jittered copy."""
    rng = np.random.default_rng(0)
    stores: list[list[Path]] = [[folder / f"s{row}.h5"] for row in range(5)]
    for row, (tiles, kind) in enumerate([(40, "fp16"), (500, "fp32"), (3, "fp32"), (700, "trident"), (300, "clam")]):
        features, path = rng.normal(size=(tiles, WIDTH)).astype(np.float32), stores[row][0]
        if kind == "trident":
            write_trident(path, features.astype(np.float16), 64, batched=True)
        elif kind == "clam":
            write_clam(path, features, 64)
        else:
            write_store(path, features, grid(tiles, 64), {"slide_id": path.stem}, StoreConfig(kind))
    for row in range(2):
        copy = folder / "jitter-1" / f"s{row}.h5"
        copy.parent.mkdir(exist_ok=True)
        features = read_features(stores[row][0])
        write_store(copy, features + 100, grid(len(features), 64), {"slide_id": copy.stem}, StoreConfig("fp32"))
        stores[row].append(copy)
    return stores


def plan(epochs: int = 4) -> list[list[Draw]]:
    draws = [Draw(row, row < 2 and epoch % 2, 10 * epoch + row) for epoch in range(epochs) for row in (3, 0, 4, 1, 2)]
    return [draws[i : i + 3] for i in range(0, len(draws), 3)]


@pytest.mark.parametrize("cache_bytes", [0, 10_000, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_the_drawn_tiles_whatever_the_cache_and_the_threads(tmp_path: Path, cache_bytes: int, threads: int) -> None:
    stores = slides(tmp_path)
    features = Features(stores, WIDTH, cache_bytes, threads)
    for draws, batch in zip(plan(), features.batches(iter(plan()), 50), strict=True):
        assert len(batch) == len(draws)
        for draw, values in zip(draws, batch, strict=True):
            whole = read_features(stores[draw.row][draw.copy])
            rows = choose(len(whole), 50, draw.key)
            np.testing.assert_array_equal(values, whole if rows is None else whole[rows])
            assert values.dtype == whole.dtype and len(values) == min(50, len(whole))


def test_tiles_are_drawn_without_replacement_and_every_tile_alike() -> None:
    assert choose(5, 5, 0) is None
    counts = np.zeros(40, int)
    for k in range(2000):
        rows = choose(40, 10, k)
        assert rows is not None and (np.diff(rows) > 0).all() and len(rows) == 10
        counts[rows] += 1
    assert abs(counts - 500).max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
    assert not np.array_equal(choose(40, 10, 1), choose(40, 10, 2))


def test_wide_gaps_between_tiles_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large slide of which few tiles are wanted: the same tiles, with a fraction of the bytes and of the memory."""
    path, width = tmp_path / "a.h5", 512
    values = np.random.default_rng(0).normal(size=(40_000, width)).astype(np.float16)
    write_store(path, values, grid(len(values), 64), {}, StoreConfig("fp16"))
    read: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(preadv(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr("os.preadv", counting)
    features = Features([[path]], width, 0, 1)
    for tiles, share in ((60, 0.05), (20_000, 1.1)):
        read.clear()
        tracemalloc.start()
        [[found]] = features.batches([[Draw(0, 0, 7)]], tiles)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(found, values[choose(len(values), tiles, 7)])
        assert sum(read) < share * values.nbytes
        assert peak < found.nbytes + 3 * (4 << 20)


def test_the_cache_keeps_the_first_stores_within_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = slides(tmp_path)
    features = Features(stores, WIDTH, 40 * WIDTH * 2 + 3 * WIDTH * 4, 1)
    for row in range(5):
        features.whole(row)
    for row in (0, 2):
        stores[row][0].unlink()
        assert len(features.whole(row))  # from memory
    stores[1][0].unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        features.whole(1)


def test_moments_are_those_of_the_plain_store(tmp_path: Path) -> None:
    stores = slides(tmp_path)
    features = Features(stores, WIDTH, 0, 1)
    for row in range(5):
        values = read_features(stores[row][0]).astype(np.float64)
        mean, squares = features.moments(row)
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(squares, (values**2).mean(0), rtol=1e-12)
        stores[row][0].unlink()
        assert features.moments(row) == (mean, squares)  # held


def test_a_store_that_fails_is_named_in_its_place(tmp_path: Path) -> None:
    stores = slides(tmp_path)
    with h5py.File(stores[1][0], "a") as file:
        file["features"][:, 2] = np.inf
    batches = Features(stores, WIDTH, 0, 2).batches([[Draw(0, 0, 0)], [Draw(1, 0, 0)], [Draw(2, 0, 0)]], 50)
    assert len(next(batches)) == 1
    with pytest.raises(StoreError, match="s1.h5 holds features that are not finite"):
        next(batches)
    features = Features(stores, WIDTH, 0, 1)
    features.moments(2)
    stores[2][0].write_bytes(stores[2][0].read_bytes()[:100])  # cut after it was opened
    with pytest.raises(StoreError, match="ends before its tiles do"):
        features.whole(2)
    with pytest.raises(StoreError, match="6 numbers a tile, the study 7"):
        Features(stores, WIDTH + 1, 0, 1).whole(0)


def test_a_plan_that_is_left_early_leaves_no_thread(tmp_path: Path) -> None:
    stores = slides(tmp_path)
    batches = Features(stores, WIDTH, 0, 2).batches(plan(), 50)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("features")]


def test_a_slide_model_of_stores_of_trident_or_clam_is_that_of_ours(tmp_path: Path) -> None:
    """The same features in another tool's layout train the same model, to the bit."""
    slides = cohort(tmp_path / "ours", patients=16)
    for each in slides:
        features = read_features(tmp_path / f"ours/{each.slide_id}.h5")
        write_trident(tmp_path / f"trident/{each.slide_id}.h5", features, 64, batched=True)
        write_clam(tmp_path / f"clam/{each.slide_id}.h5", features, 64)
    config = fit_config(ABMIL, folds=2, repeats=1, epochs=2)
    found = {}
    for layout in ("ours", "trident", "clam"):
        bags = read_bags(tmp_path / layout, slides, TASK, "patient")
        assert len(bags.rows) == len(slides) and not bags.left_out and {bag.size_px for bag in bags.rows} == {64}
        features = Features([[bag.path] for bag in bags.rows], bags.width, 0, 2)
        fitted = fit(bags, parts(bags).train, features, TASK, config, quiet())
        found[layout] = np.array([fitted.read(row, features).output[0] for row in range(len(bags.rows))])
    np.testing.assert_array_equal(found["ours"], found["trident"])
    np.testing.assert_array_equal(found["ours"], found["clam"])
    assert found["ours"].std() > 0.01
