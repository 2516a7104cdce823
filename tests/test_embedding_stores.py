"""Embedding stores: what is written is what is read, other tools' layouts open, and what is broken is named."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_layouts import grid, write_clam, write_trident

from histoscale.eval.stores import (
    StoreConfig,
    StoreError,
    StoreInfo,
    check_finite,
    copy_path,
    open_store,
    read_coords,
    read_extent,
    read_features,
    read_rows,
    spacing,
    store_path,
    with_copies,
    write_store,
)

ATTRS = {"slide_id": "a", "encoder_hash": "e1", "mpp": 0.5, "patch_size": 32, "level0_mpp": 0.26, "patch_size_level0": 62}


def drawn(tiles: int, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tiles, width)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_store_is_read_as_it_was_written(tmp_path: Path, dtype: str) -> None:
    path, features = store_path(tmp_path, "a"), drawn(20)
    write_store(path, features, grid(20, 62), ATTRS, StoreConfig(dtype))
    name = {"fp16": "float16", "fp32": "float32"}[dtype]
    assert open_store(path) == StoreInfo(path, "e1", 6, 20, 0.5, 32, 62, name)  # 32 * .5 / .26 = 61.5: rounded up
    np.testing.assert_array_equal(read_features(path), features.astype(name))
    assert read_features(path).dtype == name
    np.testing.assert_array_equal(read_coords(path), grid(20, 62))
    extent = read_extent(path)
    assert extent.offset is not None  # contiguous: the bytes can be read at their place
    raw = path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
    np.testing.assert_array_equal(np.frombuffer(raw, name).reshape(20, 6), read_features(path))


def test_equal_inputs_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for _ in range(2):
        path = store_path(tmp_path, "a")
        write_store(path, drawn(50), grid(50, 62), ATTRS, StoreConfig("fp16"))
        written.append(path.read_bytes())
        monkeypatch.setattr("time.time", lambda: 2e9)
        path.unlink()
    assert written[0] == written[1]
    assert not list(tmp_path.iterdir())


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path) -> None:
    features = drawn(5)
    features[3, 2] = 1e5
    with pytest.raises(StoreError, match="features of a are not finite in fp16; give store.dtype=fp32"):
        write_store(tmp_path / "a.h5", features, grid(5, 62), ATTRS, StoreConfig("fp16"))
    assert not list(tmp_path.iterdir())
    write_store(tmp_path / "a.h5", features, grid(5, 62), ATTRS, StoreConfig("fp32"))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_stores_of_trident_open(tmp_path: Path, batched: bool, kind: type) -> None:
    path, features = tmp_path / "slide.1.h5", drawn(37).astype(kind)
    write_trident(path, features, 512, batched=batched)
    assert open_store(path) == StoreInfo(path, "uni_v1", 6, 37, 0.5, 256, 512, np.dtype(kind).name)
    np.testing.assert_array_equal(read_features(path), features)
    np.testing.assert_array_equal(read_coords(path), grid(37, 512))
    np.testing.assert_array_equal(read_rows(path, np.array([0, 5, 36])), features[[0, 5, 36]])
    write_trident(path, features, 512, encoder=None)
    assert open_store(path).encoder == ""


def test_stores_of_clam_open_and_their_tile_size_comes_from_the_coordinates(tmp_path: Path) -> None:
    path, features = tmp_path / "slide.h5", drawn(300)
    write_clam(path, features, 448)
    found = open_store(path)
    assert (found.encoder, found.tiles, found.size_px, found.patch_px, found.dtype) == ("", 300, 448, 0, "float32")
    assert np.isnan(found.mpp)
    np.testing.assert_array_equal(read_features(path), features)
    np.testing.assert_array_equal(read_coords(path), grid(300, 448))


def test_the_step_between_tiles_survives_pieces_that_lie_off_the_grid() -> None:
    pieces = np.concatenate([grid(30, 224), grid(20, 224) + (5000, 13), grid(20, 224) + (5100, 13 + 224 * 7)])
    assert spacing(np.random.default_rng(0).permutation(pieces)) == 224
    with pytest.raises(StoreError, match="cannot be told from 2 coordinates"):
        spacing(np.array([[0, 0], [5, 7]]))


def no_file(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_early(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:90])


def no_hdf5(path: Path) -> None:
    path.write_text("not HDF5" * 100)


def edited(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            change(file)

    return apply


def swapped(name: str, values: np.ndarray) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = values

    return edited(change)


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (no_file, "does not exist"),
    (cut, "no whole HDF5 file"),
    (cut_early, "no whole HDF5 file"),
    (no_hdf5, "no whole HDF5 file"),
    (edited(lambda file: file.__delitem__("coords")), r"no dataset coords \(it holds features\)"),
    (swapped("features", np.zeros(9, np.float32)), r"features of shape \(9,\)"),
    (swapped("features", np.zeros((0, 6), np.float32)), "holds no tile"),
    (swapped("features", np.zeros((20, 6), np.int32)), "features of int32"),
    (swapped("coords", np.zeros((19, 2), np.int64)), r"coords of shape \(19, 2\)"),
    (edited(lambda file: file.attrs.update(slide_id="b")), "the slide 'b' by its own account"),
    (edited(lambda file: file.attrs.update(mpp="fine")), "no number"),
    (edited(lambda file: file.attrs.update(level0_mpp=0.0)), "no number"),
    (edited(lambda file: file.attrs.update(patch_size=0)), "0 level-0 px wide"),
]


@pytest.mark.parametrize(("harm", "words"), BROKEN)
def test_a_broken_store_is_named_with_what_to_do(tmp_path: Path, harm: Callable[[Path], None], words: str) -> None:
    path = tmp_path / "a.h5"
    write_store(path, drawn(20), grid(20, 62), ATTRS, StoreConfig("fp32"))
    harm(path)
    with pytest.raises(StoreError, match=words) as caught:
        open_store(path)
    assert "a.h5" in str(caught.value) and "embed" in str(caught.value)


def test_features_that_are_not_finite_are_refused_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_store(path, drawn(20), grid(20, 62), ATTRS, StoreConfig("fp16"))
    with h5py.File(path, "a") as file:
        file["features"][7, 1] = np.nan
    assert open_store(path).tiles == 20
    with pytest.raises(StoreError, match="not finite"):
        read_features(path)


def test_copies_are_there_for_every_slide_or_an_error(tmp_path: Path) -> None:
    paths = [store_path(tmp_path, name) for name in "ab"]
    assert with_copies(paths, 0) == [[paths[0]], [paths[1]]]
    for copy, name in ((1, "a"), (1, "b"), (2, "b")):
        path = copy_path(store_path(tmp_path, name), copy)
        assert path == tmp_path / f"jitter-{copy}" / f"{name}.h5"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert with_copies(paths, 1) == [[path, copy_path(path, 1)] for path in paths]
    with pytest.raises(StoreError, match=r"1 of 4 jittered copies do not exist, such as .*jitter-2/a.h5: .*jitter.copies=2"):
        with_copies(paths, 2)


@pytest.mark.parametrize("slide_id", ["../x", "/tmp/x", "a/b", "..", ".", "", "a\\b", "a\0b", "x" * 300])
def test_ids_that_are_no_file_names_are_refused(tmp_path: Path, slide_id: str) -> None:
    with pytest.raises(StoreError, match="no store for this slide"):
        store_path(tmp_path, slide_id)
    assert store_path(tmp_path, "TCGA-1.2-x") == tmp_path / "TCGA-1.2-x.h5"


def test_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="store.dtype is 'int8': expected fp16 or fp32"):
        StoreConfig("int8")


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_every_infinity_and_every_nan_is_found(tmp_path: Path, kind: type) -> None:
    """And nothing else: the greatest numbers, the smallest and negative zero are finite."""
    limits = np.finfo(kind)
    values = np.tile(np.array([0, -0.0, limits.max, limits.min, limits.smallest_subnormal, 1.5], kind), (30_000, 1))
    check_finite(values, tmp_path)
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for place in (0, 65_537, values.size - 1):
            harmed = values.copy()
            harmed.reshape(-1)[place] = bad
            with pytest.raises(StoreError, match="not finite"):
                check_finite(harmed, tmp_path)
