"""Stores that mean harm: values that lie in other files or nowhere, sizes that are not there, and files that hang the library."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_layouts import grid, write_trident

from histoscale.eval.examine import Examiner
from histoscale.eval.stores import StoreConfig, StoreError, matches, open_store, read_coords, read_features, write_store

ATTRS = {"slide_id": "a", "encoder_hash": "e1", "mpp": 0.5, "patch_size": 32, "level0_mpp": 0.26}
SECRET = np.full((20, 6), 7, np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "a.h5", SECRET, grid(20, 62), ATTRS, StoreConfig("fp32"))
    SECRET.tofile(tmp_path / "other.bin")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = SECRET
    return tmp_path / "a.h5"


def soft_link(file: h5py.File, folder: Path) -> None:
    file["elsewhere"] = SECRET
    file["features"] = h5py.SoftLink("/elsewhere")


def link_to_another_file(file: h5py.File, folder: Path) -> None:
    file["features"] = h5py.ExternalLink(str(folder / "other.h5"), "/features")


def loop(file: h5py.File, folder: Path) -> None:
    h5py.h5o.link(file.id, file.id, b"features")  # the root under its own name: walked, it never ends


def external(file: h5py.File, folder: Path) -> None:
    where = [(str(folder / "other.bin"), 0, SECRET.nbytes)]
    file.create_dataset("features", SECRET.shape, np.float32, external=where)


def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout(SECRET.shape, np.float32)
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "features", SECRET.shape)
    file.create_virtual_dataset("features", layout)


def never_written(file: h5py.File, folder: Path) -> None:
    file.create_dataset("features", (20, 6), np.float32)


def partly_written(file: h5py.File, folder: Path) -> None:
    file.create_dataset("features", (20, 6), np.float32, chunks=(5, 6))[:5] = 1


def absurd(file: h5py.File, folder: Path) -> None:
    file.create_dataset("features", (2**40, 6), np.float32, chunks=(2**20, 6))


def bomb(file: h5py.File, folder: Path) -> None:
    file.create_dataset("features", (2**15, 1024), np.float32, chunks=(2**15, 1024), compression="gzip", fillvalue=0)[:] = 0


def compound(file: h5py.File, folder: Path) -> None:
    file["features"] = np.zeros(20, [("a", "f4"), ("b", "i4")])


def references(file: h5py.File, folder: Path) -> None:
    file["features"] = np.array([[file.ref] * 6] * 20, dtype=h5py.ref_dtype)


def lengths_of_their_own(file: h5py.File, folder: Path) -> None:
    rows = file.create_dataset("features", (20,), h5py.vlen_dtype(np.float32))
    rows[0] = np.ones(3, np.float32)


def no_filter(file: h5py.File, folder: Path) -> None:
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((20, 6))
    made.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    space = h5py.h5s.create_simple((20, 6))
    data = h5py.h5d.create(file.id, b"features", h5py.h5t.IEEE_F32LE, space, dcpl=made)
    data.write_direct_chunk((0, 0), SECRET.tobytes(), 0)


HARM: list[tuple[Callable[[h5py.File, Path], None], str]] = [
    (soft_link, "holds features as a soft link"),
    (link_to_another_file, "holds features as a link to another file"),
    (loop, "holds features as a group"),
    (external, "holds features as an external data set, whose values lie in other files"),
    (virtual, "holds features as a virtual data set, whose values lie in other files"),
    (never_written, "never wrote 480 of its 480 bytes"),
    (partly_written, "never wrote 3 of its 4 chunks"),
    (absurd, "never wrote 1048576 of its 1048576 chunks"),
    (bomb, "nothing real is so even"),
    (compound, "holds features of "),
    (references, "holds features of object"),
    (lengths_of_their_own, "holds features of object"),
    (no_filter, "compressed by zstd, which is not installed here"),
]


@pytest.mark.parametrize(("harm", "words"), HARM)
def test_values_that_a_store_does_not_hold_are_refused(store: Path, harm: Callable[[h5py.File, Path], None], words: str) -> None:
    with h5py.File(store, "a") as file:
        del file["features"]
        harm(file, store.parent)
    for reading in (open_store, read_features):
        with pytest.raises(StoreError, match=words) as error:
            reading(store)
        assert str(error.value).startswith(str(store)) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.zeros(1 << 18), np.zeros((2, 2)), h5py.Empty("f"), "x" * (1 << 17)])
def test_attributes_are_single_numbers_and_texts(store: Path, value: object) -> None:
    with h5py.File(store, "w", libver="latest") as file:  # which keeps large attributes outside of the header
        file["features"], file["coords"] = SECRET, grid(20, 62)
        file.attrs.create("patch_size", value)
    with pytest.raises(StoreError, match="patch_size"):
        open_store(store)
    assert not matches(store, ATTRS)


@pytest.mark.parametrize("place", [np.nan, np.inf, 1e18])
def test_tiles_lie_on_a_slide(store: Path, place: float) -> None:
    with h5py.File(store, "a") as file:
        del file["coords"]
        file["coords"] = np.full((20, 2), place)
    for reading in (open_store, read_coords):
        with pytest.raises(StoreError, match="a.h5 holds coords that are no places on a slide"):
            reading(store)


@pytest.mark.parametrize(("name", "value"), [("mpp", np.inf), ("mpp", -0.5), ("patch_size", 1e300), ("level0_mpp", 1e-300)])
def test_sizes_are_those_of_a_microscope(store: Path, name: str, value: float) -> None:
    with h5py.File(store, "a") as file:
        file.attrs[name] = value
    with pytest.raises(StoreError, match="a.h5 (says that its|has an attribute that is no number)"):
        open_store(store)


def test_a_file_that_hangs_the_library_is_left_out_and_the_next_one_opens(store: Path) -> None:
    """An object of no length in the heap of the texts: HDF5 2.0 looks at it for ever, and hears no signal meanwhile."""
    whole = store.read_bytes()
    place = whole.index(b"GCOL") + 16
    store.write_bytes(whole[:place] + bytes(16) + whole[place + 16 :])
    begun = time.process_time()
    with pytest.raises(StoreError, match="a.h5 (kept HDF5 busy for|cannot be read)"):
        open_store(store)
    assert time.process_time() - begun < 1  # it was the other process that worked
    store.write_bytes(whole)
    assert open_store(store).tiles == 20


def test_a_pipe_is_no_store(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.h5")
    for reading in (open_store, read_coords):
        with pytest.raises(StoreError, match="a.h5 is no file: give a folder of"):
            reading(tmp_path / "a.h5")
    assert not matches(tmp_path / "a.h5", ATTRS)


def test_a_file_that_keeps_its_reader_waiting_is_given_up_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waits.py").write_text("def answer(path):\n    return {'read': path.read_text()}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "whole").write_text("text")
    examiner = Examiner("waits", patience_s=1.0)
    assert examiner.ask(tmp_path / "pipe") == "did not answer for 1 s (is its disk there?)"
    assert examiner.ask(tmp_path / "whole") == {"read": "text"}


def test_what_others_write_in_chunks_still_opens(tmp_path: Path) -> None:
    path, features = tmp_path / "s.h5", np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    write_trident(path, features, 512)
    for options in ({"compression": "gzip"}, {"compression": "lzf", "shuffle": True}, {"fletcher32": True}):
        with h5py.File(path, "a") as file:
            del file["features"]
            file.create_dataset("features", data=features, chunks=(64, 8), **options)
        assert open_store(path).tiles == 300
        np.testing.assert_array_equal(read_features(path), features)
