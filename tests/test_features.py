"""Features: each row of its own image, kept and checked; the same bytes after a kill, from two processes, after damage."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import features_ranks
import numpy as np
import psutil
import pytest
import torch
from corners import encoder as corners
from features_ranks import BATCH, RESIZE, ROWS, counted, embedded, labelled, vit
from safetensors.numpy import load_file
from torch import Tensor

from histoscale.eval.chunks import CHUNK_BATCHES, FeatureError, FeatureFile
from histoscale.eval.datasets.patches import DatasetError
from histoscale.eval.encoder import open_encoder
from histoscale.eval.features import pixel_hash
from histoscale.eval.resolution import ResolutionConfig, view_of

PROGRAM = Path(__file__).parent / "features_ranks.py"
CHUNK = BATCH * CHUNK_BATCHES


def files(out: Path) -> dict[str, bytes]:
    """Everything that is left in the folder of features, by name."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in (out / "features").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process leaves that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole")
    embedded(out, labelled(), [vit(0), vit(1)])
    found = files(out)
    assert len(found) == 2 and all(name.endswith(".safetensors") for name in found)
    return found


def start(out: Path, ranks: int, sleep_s: float) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(PROGRAM), str(out), str(sleep_s)], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said.decode()[-2000:]


def test_rows_belong_to_their_images_and_are_what_the_encoder_says(tmp_path: Path) -> None:
    patches, encoder = labelled(), vit()
    (found,) = embedded(tmp_path, patches, [encoder])
    for start_ in range(0, ROWS, BATCH):
        rows = np.arange(start_, min(start_ + BATCH, ROWS))
        cls, mean = encoder.vectors(torch.from_numpy(np.asarray(patches.read(rows))))
        np.testing.assert_array_equal(found.cls[rows], cls.numpy())
        np.testing.assert_array_equal(found.pooled("mean")[rows], mean.numpy())
    np.testing.assert_array_equal(found.pooled("cls+mean"), np.concatenate([found.cls, found.mean], axis=1))
    held = load_file(next((tmp_path / "features").glob("*.safetensors")))  # as anybody else may read it
    for name, array in held.items():
        np.testing.assert_array_equal(array, getattr(found, name))
    assert found.sizes is not None and (found.sizes == 40).all()
    with pytest.raises(ValueError, match="pool is 'max'"):
        found.pooled("max")


def test_one_pass_for_all_encoders_and_none_for_what_is_kept(tmp_path: Path) -> None:
    rows: list[int] = []
    patches = counted(labelled(), rows)
    first = embedded(tmp_path, patches, [corners("e1"), corners("e2"), corners("e1")])
    assert sorted(rows) == list(range(ROWS))
    np.testing.assert_array_equal(first[0].cls, [features_ranks.image(row, 40, 40)[:, 0, 0] for row in range(ROWS)])
    np.testing.assert_array_equal(first[1].pooled("mean"), [features_ranks.image(row, 40, 40)[:, -1, -1] for row in range(ROWS)])
    again = embedded(tmp_path, patches, [corners("e1"), corners("e2")])
    assert len(rows) == ROWS
    np.testing.assert_array_equal(again[1].cls, first[1].cls)
    embedded(tmp_path, patches, [corners("e1"), corners("e3")])
    assert len(rows) == 2 * ROWS
    embedded(tmp_path, replace(patches, hash="other"), [corners("e1")])
    assert len(rows) == 3 * ROWS
    embedded(tmp_path, patches, [corners("e1")], batch=7)  # what is finished is taken, in whatever batches it was made
    assert len(rows) == 3 * ROWS
    embedded(tmp_path, patches, [vit()], ResolutionConfig("eva", None))
    embedded(tmp_path, patches, [vit()], RESIZE)
    assert len(rows) == 5 * ROWS


def test_threads_change_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    embedded(tmp_path, labelled(), [vit(0), vit(1)], threads=5)
    assert files(tmp_path) == whole


def test_two_processes_give_the_bytes_of_one_and_share_the_reading(tmp_path: Path, whole: dict[str, bytes]) -> None:
    ended(start(tmp_path, 2, 0.0))
    assert files(tmp_path) == whole
    read = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert sorted(read[0] + read[1]) == list(range(ROWS)) and min(map(len, read)) > ROWS / 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(tmp_path: Path, whole: dict[str, bytes], ranks: int) -> None:
    process = start(tmp_path, ranks, 0.15)
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "features").glob("*/*.safetensors"))) < 6:  # three chunks of two encoders
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]  # torchrun's ranks lead groups
    assert len(family) == (1 if ranks == 1 else 1 + ranks)
    for one in family:
        one.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(family[1:], timeout=30)
    kept = len({path.name for path in (tmp_path / "features").glob("*/*.safetensors")})
    assert 3 <= kept < -(-ROWS // CHUNK) and not list((tmp_path / "features").glob("*.safetensors"))
    rows: list[int] = []
    embedded(tmp_path, counted(labelled(), rows), [vit(0), vit(1)])
    assert files(tmp_path) == whole
    assert ROWS - kept * CHUNK <= len(rows) <= ROWS - (kept - ranks) * CHUNK  # one of the two encoders may lack a chunk a rank


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def exchange(path: Path) -> None:
    """A chunk in another's place, whole in itself."""
    path.write_bytes(path.with_name("000001.safetensors").read_bytes())


@pytest.mark.parametrize("harm", [spoil, cut, empty, exchange])
def test_a_damaged_chunk_is_found_made_again_and_said(
    tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str], harm: object
) -> None:
    class Stop(Exception):
        pass

    def stopping(rows: np.ndarray) -> np.ndarray:
        if rows[0] >= 6 * CHUNK:
            raise Stop
        return np.asarray(labelled().read(rows))

    with pytest.raises(Stop):
        embedded(tmp_path, replace(labelled(), read=stopping), [vit(0), vit(1)])
    parts = sorted((tmp_path / "features").glob(f"{vit(1).hash}*/*.safetensors"))
    kept = len(parts)
    assert kept > 3
    harm(parts[2])  # type: ignore[operator]
    rows: list[int] = []
    journal = features_ranks.quiet_journal(tmp_path, progress="lines")
    embedded(tmp_path, counted(labelled(), rows), [vit(0), vit(1)], journal=journal)
    assert "1 chunks of vit 1" in (said := capsys.readouterr().err) and "do not hold what was written" in said
    assert sorted(rows) == [*range(2 * CHUNK, 3 * CHUNK), *range(kept * CHUNK, ROWS)]
    assert files(tmp_path) == whole


@pytest.mark.parametrize("harm, read", [(spoil, [*range(9 * CHUNK, ROWS)]), (cut, [*range(ROWS)]), (empty, [*range(ROWS)])])
def test_damage_in_the_finished_file_is_found_too(
    tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str], harm: object, read: list[int]
) -> None:
    for name, data in whole.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    harm(next((tmp_path / "features").glob(f"{vit(0).hash}*")))  # type: ignore[operator]
    rows: list[int] = []
    journal = features_ranks.quiet_journal(tmp_path, progress="lines")
    embedded(tmp_path, counted(labelled(), rows), [vit(0), vit(1)], journal=journal)
    assert "chunks of vit 0" in capsys.readouterr().err
    assert sorted(rows) == read and files(tmp_path) == whole


def test_chunks_of_other_batches_are_not_mixed(tmp_path: Path, whole: dict[str, bytes]) -> None:
    class Stop(Exception):
        pass

    def stopping(rows: np.ndarray) -> np.ndarray:
        if rows[0] > 100:
            raise Stop
        return np.asarray(labelled().read(rows))

    with pytest.raises(Stop):
        embedded(tmp_path, replace(labelled(), read=stopping), [vit(0), vit(1)], batch=5)
    assert list((tmp_path / "features").glob("*.parts-5-cpu/*"))
    rows: list[int] = []
    embedded(tmp_path, counted(labelled(), rows), [vit(0), vit(1)])
    assert len(rows) == ROWS and files(tmp_path) == whole


@pytest.mark.parametrize("resolution", [RESIZE, ResolutionConfig("eva", None), ResolutionConfig("native", None),
                                        ResolutionConfig("native", 0.3)])  # fmt: skip
def test_images_of_any_size_are_seen_one_by_one_and_tiles_are_meaned(tmp_path: Path, resolution: ResolutionConfig) -> None:
    patches, encoder, colour = labelled(40, None), vit(), open_encoder("colour", None)  # type: ignore[arg-type]
    found, colours = embedded(tmp_path, patches, [encoder, colour], resolution)
    view = view_of(32, "bicubic", resolution, 0.5)
    many = 0
    for row in range(40):
        image = features_ranks.image(row, *features_ranks.size_of(row))
        inputs, _ = view.inputs([image], False)
        cls, mean = encoder.vectors(inputs)
        np.testing.assert_allclose(found.cls[row], cls.mean(0).numpy(), atol=2e-6)
        np.testing.assert_allclose(found.mean[row], mean.mean(0).numpy(), atol=2e-6)
        np.testing.assert_array_equal(colours.cls[row], colour.vectors(torch.from_numpy(image)[None])[0][0].numpy())
        many += len(inputs) > 1
    assert (many > 10) == (resolution.name == "native")
    assert found.sizes is not None and [tuple(size) for size in found.sizes] == [features_ranks.size_of(row) for row in range(40)]


def test_equal_images_have_equal_hashes(tmp_path: Path) -> None:
    patches = labelled(ROWS, 40, lambda row: features_ranks.image(row % 100, 40, 40))
    (found,) = embedded(tmp_path, patches, [corners()])
    assert found.hashes is not None and found.hashes.dtype == np.uint64
    assert len(np.unique(found.hashes)) == 100 and (found.hashes[:50] == found.hashes[100:150]).all()
    assert found.hashes[3] == pixel_hash(features_ranks.image(3, 40, 40))
    flat = np.zeros((3, 4, 6), np.uint8)
    assert len({pixel_hash(x) for x in (flat, flat.reshape(3, 6, 4), flat[:, :, :3], flat + 1)}) == 4
    assert pixel_hash(np.arange(72, dtype=np.uint8).reshape(4, 6, 3).transpose(2, 0, 1)) == pixel_hash(
        np.ascontiguousarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3).transpose(2, 0, 1))
    )


def test_neither_pixels_nor_features_are_held_in_memory(tmp_path: Path) -> None:
    """393 MB of pixels and 131 MB of features in under 70 MB more than before."""
    rows, side, width = 2000, 256, 8192

    def wide(pixels: Tensor) -> tuple[Tensor, Tensor]:
        first = pixels[:, 0, 0, :1].float()
        return first.expand(-1, width), first[:, None].expand(-1, 1, width)

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    patches = labelled(rows, side, lambda row: np.full((3, side, side), row % 251, np.uint8))
    embedded(tmp_path / "warm", labelled(8), [corners()])
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        (found,) = embedded(tmp_path, patches, [replace(corners(tokens=wide), width=width)], batch=16)
    finally:
        done.set()
        watcher.join()
    assert found.cls.shape == (rows, width) and (found.mean[:, -1] == np.arange(rows) % 251).all()
    assert 0 < peak - before < 70 << 20, peak - before


@pytest.mark.parametrize("side, drawn, words", [
    (40, np.zeros((3, 40, 41), np.uint8), r"image 0 is uint8 \[3, 40, 41\]: expected uint8 \[3, 40, 40\]"),
    (None, np.zeros((40, 40, 3), np.uint8), r"image 0 is uint8 \[40, 40, 3\]: expected uint8 \[3, h, w\]"),
    (None, np.zeros((3, 40, 40), np.float32), "image 0 is float32"),
])  # fmt: skip
def test_a_set_that_reads_something_else_is_refused(tmp_path: Path, side: int | None, drawn: np.ndarray, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        embedded(tmp_path, labelled(10, side, lambda row: drawn), [vit()])


def test_numbers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for changed in ({"batch": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(changed))} is 0: expected at least 1"):
            embedded(tmp_path, labelled(), [corners()], **changed)


def test_a_folder_that_processes_do_not_share_is_named(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "e-d-resize.safetensors", ROWS, BATCH, "cpu")
    with pytest.raises(FeatureError, match="all processes must see the folder"):
        file.join()
    with pytest.raises(FeatureError, match="all processes must see the same folder"):
        file.open()


def test_half_precision_is_another_encoder(tmp_path: Path) -> None:
    full, half = embedded(tmp_path, labelled(), [vit(0), vit(0, "bf16")])
    assert half.cls.dtype == np.float32 and not np.array_equal(full.cls, half.cls)
    cosine = (full.cls * half.cls).sum(1) / np.linalg.norm(full.cls, axis=1) / np.linalg.norm(half.cls, axis=1)
    assert cosine.min() > 0.999
