"""PatchCamelyon: the right tiles in the right order, read lazily, each chunk once, in bounded memory."""

import csv
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from set_fixtures import PCAM, write_pcam

from histoscale.eval.datasets.patches import DatasetError
from histoscale.eval.datasets.pcam import TileFiles, open_pcam
from histoscale.eval.datasets.public import PublicConfig

ANY = PublicConfig("pcam", "any", 0.972)


def stem(root: Path, split: str) -> str:
    return str(root / f"camelyonpatch_level_2_split_{split}")


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 64])
def test_tiles_come_in_the_order_of_the_files(tmp_path: Path, chunk: int | None) -> None:
    write_pcam(tmp_path, 12, 16, None if chunk is None else min(chunk, 12))
    patches = open_pcam(tmp_path, ANY)
    whole = np.concatenate([h5py.File(f"{stem(tmp_path, split)}_x.h5")["x"][:] for split in PCAM]).transpose(0, 3, 1, 2)
    assert len(patches) == 36 and patches.size_px == 16 and patches.usage.positive == "tumor"
    assert patches.roles.tolist() == ["train"] * 12 + ["select"] * 12 + ["report"] * 12
    assert patches.labels.tolist() == [0, 1] * 18 and patches.classes == ("no_tumor", "tumor")
    for rows in (np.arange(36), np.array([35, 0, 13, 12, 0, 11, 24]), np.array([], int)):
        found = np.asarray(patches.read(rows))
        assert found.dtype == np.uint8 and len(found) == len(rows)
        assert len(rows) == 0 or (found == whole[rows]).all()
    again = pickle.loads(pickle.dumps(patches.read))
    assert (again(np.array([20])) == whole[[20]]).all()


def test_slides_are_what_intervals_resample(tmp_path: Path) -> None:
    write_pcam(tmp_path)
    patches = open_pcam(tmp_path, ANY)
    assert patches.groups == "slide" and patches.slide_ids[0] == "camelyon16_train_tumor_001"
    assert len(set(patches.patients.tolist())) == 12 and patches.notes[0].startswith("dataset.counts=any: 36 images")
    for split in PCAM:
        Path(f"{stem(tmp_path, split)}_meta.csv").unlink()
    without = open_pcam(tmp_path, replace(ANY, name="pcam_10shot"))
    assert without.groups == "none" and set(without.slide_ids.tolist()) == {""} and without.name == "pcam_10shot (part)"
    assert "meta.csv and the other two are not there" in without.notes[0] and without.hash != patches.hash


def rewritten(path: str, change: Callable[[list[list[str]]], None]) -> None:
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    change(rows)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def stored(path: str, key: str, data: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file[key] = data


def a_slide_in_two_splits(root: Path) -> None:
    rewritten(f"{stem(root, 'test')}_meta.csv", lambda rows: rows[1].__setitem__(5, "camelyon16_train_tumor_001"))


@pytest.mark.parametrize("spoil, words", [
    (lambda root: Path(f"{stem(root, 'valid')}_x.h5").unlink(), "expected the file camelyonpatch_level_2_split_valid_x.h5"),
    (lambda root: Path(f"{stem(root, 'valid')}_x.h5").rename(f"{stem(root, 'valid')}_x.h5.gz"), "is expected: unpack it"),
    (lambda root: Path(f"{stem(root, 'train')}_x.h5").write_bytes(Path(f"{stem(root, 'train')}_x.h5").read_bytes()[:9000]),
     "is no whole HDF5 file: get it again"),
    (lambda root: stored(f"{stem(root, 'train')}_x.h5", "images", np.zeros(3)), "holds images: expected the array 'x'"),
    (lambda root: stored(f"{stem(root, 'train')}_x.h5", "x", np.zeros((12, 3, 96, 96), np.uint8)), r"expected uint8 \(N, 96, 96"),
    (lambda root: stored(f"{stem(root, 'train')}_x.h5", "x", np.zeros((12, 96, 96, 3), np.float32)), "holds x float32"),
    (lambda root: stored(f"{stem(root, 'train')}_x.h5", "x", np.zeros((11, 96, 96, 3), np.uint8)), "holds 11 tiles and its y"),
    (lambda root: stored(f"{stem(root, 'train')}_x.h5", "x", np.zeros((12, 50, 50, 3), np.uint8)), r"tiles of \[50, 96\] px"),
    (lambda root: stored(f"{stem(root, 'test')}_y.h5", "y", np.zeros(12, np.uint8)), r"expected uint8 \(N, 1, 1, 1\)"),
    (lambda root: stored(f"{stem(root, 'test')}_y.h5", "y", np.full((12, 1, 1, 1), 2, np.uint8)), r"labels \[2\]: expected 0"),
    (lambda root: Path(f"{stem(root, 'test')}_meta.csv").unlink(), "expected all three tables or none"),
    (lambda root: rewritten(f"{stem(root, 'test')}_meta.csv", lambda rows: rows.pop()), "has 11 rows for 12 tiles"),
    (lambda root: rewritten(f"{stem(root, 'test')}_meta.csv", lambda rows: rows[0].__setitem__(5, "slide")), "the columns wsi"),
    (lambda root: rewritten(f"{stem(root, 'test')}_meta.csv", lambda rows: rows[4].__setitem__(5, "")), "rows without a slide"),
    (lambda root: rewritten(f"{stem(root, 'test')}_meta.csv", lambda rows: rows.append(rows.pop(1))),
     "differs from the label of .* so its rows are not these tiles"),
    (a_slide_in_two_splits, r"1 slides stand in both train and report \(camelyon16_train_tumor_001\)"),
])  # fmt: skip
def test_what_is_not_pcam_is_refused(tmp_path: Path, spoil: Callable[[Path], object], words: str) -> None:
    write_pcam(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DatasetError, match=words) as error:
        open_pcam(tmp_path, ANY)
    assert "\n" not in str(error.value)


def test_official_counts_are_the_default_of_the_published_set(tmp_path: Path) -> None:
    write_pcam(tmp_path)
    with pytest.raises(DatasetError, match=r"12 of train \(expected 262144\), 12 of valid \(expected 32768\)"):
        open_pcam(tmp_path, replace(ANY, counts="official"))


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    write_pcam(tmp_path, slides=False)
    path = Path(f"{stem(tmp_path, 'train')}_x.h5")
    with h5py.File(path) as file:
        place = file["x"].id.get_chunk_info(1)
    with path.open("r+b") as file:
        file.seek(place.byte_offset)
        file.write(b"\xff" * place.size)
    patches = open_pcam(tmp_path, ANY)
    assert len(np.asarray(patches.read(np.arange(4)))) == 4
    with pytest.raises(DatasetError, match="x.h5 cannot be read at rows 5 to 6: it is damaged"):
        patches.read(np.array([5]))


def test_every_chunk_is_decoded_once_over_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches in order read as many rows as there are, chunk by chunk; rows in disorder read each of their chunks once."""
    write_pcam(tmp_path, 60, 8, 16, slides=False)
    reader = TileFiles([Path(f"{stem(tmp_path, split)}_x.h5") for split in PCAM], [60, 60, 60])
    spans: list[tuple[int, int]] = []
    data = TileFiles._data

    class Counted:
        def __init__(self, inner: h5py.Dataset) -> None:
            self.inner, self.shape, self.chunks = inner, inner.shape, inner.chunks

        def __getitem__(self, span: slice) -> np.ndarray:
            spans.append((span.start, span.stop))
            return self.inner[span]

    monkeypatch.setattr(TileFiles, "_data", lambda self, number: Counted(data(self, number)))
    for start in range(0, 180, 32):
        reader(np.arange(start, min(start + 32, 180)))
    assert sum(stop - start for start, stop in spans) == 180 and len(spans) <= 18
    spans.clear()
    reader(np.random.default_rng(0).permutation(60))
    assert spans == [(0, 16), (16, 32), (32, 48), (48, 60)]


PROGRAM = """
import resource, sys, numpy as np
from pathlib import Path
from histoscale.eval.datasets.pcam import open_pcam
from histoscale.eval.datasets.public import PublicConfig
patches = open_pcam(Path(sys.argv[1]), PublicConfig("pcam", "official", 0.972))
assert len(patches) == 327680 and patches.name == "pcam" and patches.size_px == 96, patches
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for start in range(0, 327680, 16384):
    assert patches.read(np.arange(start, start + 256)).shape == (256, 3, 96, 96)
print(before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_a_set_of_the_official_size_stays_on_the_disk(tmp_path: Path) -> None:
    """Sparse files of 9 GB in all, of which opening reads labels alone and a pass over batches keeps one batch."""
    for split, tiles in (("train", 262_144), ("valid", 32_768), ("test", 32_768)):
        with h5py.File(f"{stem(tmp_path, split)}_x.h5", "w") as file:
            file.create_dataset("x", (tiles, 96, 96, 3), np.uint8, chunks=(64, 96, 96, 3))
        stored(f"{stem(tmp_path, split)}_y.h5", "y", (np.arange(tiles) % 2).astype(np.uint8).reshape(-1, 1, 1, 1))
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opened, after = map(int, done.stdout.split())
    assert after - opened < 200, f"{after - opened} MiB more while batches of 7 MiB were read"
