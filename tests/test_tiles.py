"""Ready tiles through the same plan and stream: one visit is grid^2 tiles of one slide id."""

import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from histoscale.data.keys import key
from histoscale.data.memory import StreamConfig
from histoscale.data.pixelfilter import PixelFilterConfig
from histoscale.data.plan import Plan, SamplerConfig, Visit
from histoscale.data.storage import StorageConfig, Store
from histoscale.data.stream import Stream
from histoscale.data.tiles import TilesError, TileSource, open_tiles
from histoscale.data.visit import VisitFailed

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def sampler() -> SamplerConfig:
    values = yaml.safe_load((ROOT / "configs/sampler/default.yaml").read_text())
    values |= {"mpps": [0.5], "weights": [1], "patch_px": 24, "grid": 2, "lanes_per_slot": 2}
    values["pixel_filter"] = PixelFilterConfig(**values["pixel_filter"])
    return SamplerConfig(**values)


@pytest.fixture
def files(tmp_path: Path) -> Store:
    return Store(StorageConfig({}, "fsspec", str(tmp_path / "cache"), 1 << 30, 5.0, 5.0, 60.0))


def tile(number: int, side: int = 24) -> np.ndarray:
    """A flat tile whose colour is its number."""
    return np.full((side, side, 3), (number, 255 - number, 40), np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three slides of 7, 3 and 9 tiles; one file of the last is no image."""
    number = 0
    for slide, count in (("s1", 7), ("s2", 3), ("s3", 9)):
        (tmp_path / "tiles" / slide).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "tiles" / slide / f"{slide}_x{i}.png").write_bytes(encoded(tile(number)))
            number += 1
    (tmp_path / "tiles" / "s3" / "s3_x0.png").write_bytes(b"no image")
    return tmp_path / "tiles"


def visit(number: int, slide: int) -> Visit:
    return Visit(0, 0, number, 0, slide, 0, key(1, "visit", number), 0.5)


@pytest.mark.parametrize("pattern", [r"^(.+)/", r"/(\w+)_x\d+\.png$"])
def test_a_visit_is_tiles_of_one_slide(folder: Path, files: Store, sampler: SamplerConfig, pattern: str) -> None:
    source = open_tiles(str(folder), pattern, sampler, files)
    assert source.slide_ids == ["s1", "s2", "s3"]
    table = source.table()
    assert table.eligible.all() and table.area.tolist() == [7, 3, 9]
    for number in range(20):
        for slide, own in enumerate((range(7), range(7, 10), range(10, 19))):
            read = source.read(visit(number, slide))
            colours = [int(patch[0, 0, 0]) for patch in read.pixels]
            assert colours == read.x.tolist() and set(colours) <= set(own) - {10}
            assert len(set(colours)) == min(4, len(own)) and read.repeated == 4 - len(set(colours))
            assert np.isnan(read.mpp) and read.y.tolist() == [0, 0, 0, 0]


def test_every_tile_is_equally_likely(folder: Path, files: Store, sampler: SamplerConfig) -> None:
    source = open_tiles(str(folder), "^(.+)/", sampler, files)
    drawn = np.bincount(np.concatenate([source.read(visit(n, 0)).x for n in range(1000)]), minlength=7)
    assert drawn.sum() == 4000
    assert np.abs(drawn / 4000 - 1 / 7).max() < 0.025


def test_large_tiles_are_cropped_by_key_and_small_ones_refused(folder: Path, files: Store, sampler: SamplerConfig) -> None:
    ramp = np.zeros((40, 50, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(40)[:, None], np.arange(50)
    for file in (folder / "s2").iterdir():
        file.write_bytes(encoded(ramp))
    source = open_tiles(str(folder), "^(.+)/", sampler, files)
    corners = {tuple(patch[0, 0, :2].tolist()) for n in range(20) for patch in source.read(visit(n, 1)).pixels}
    assert len(corners) > 30
    small = open_tiles(str(folder), "^(.+)/", replace(sampler, patch_px=32), files)
    with pytest.raises(ValueError, match="a tile of s1 is 24 x 24 px: sampler.patch_px=32"):
        small.read(visit(0, 0))


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_with_magnifications(tmp_path: Path, files: Store, sampler: SamplerConfig, nested: bool) -> None:
    images = [encoded(tile(i)) for i in range(12)]
    columns = {
        "slide_id": ["b"] * 4 + ["a"] * 8,
        "image": [{"bytes": image, "path": None} for image in images] if nested else images,
        "mpp": [0.5] * 4 + [0.25] * 6 + [0.51] * 2,
        "patient_id": ["p"] * 12,
        "site": ["north"] * 12,
    }
    path = tmp_path / "tiles.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    source = open_tiles(str(path), "", replace(sampler, mpps=[0.5, 0.25, 1.0], weights=[1, 1, 1]), files)
    table = source.table()
    assert table.eligible.tolist() == [[True, True, False], [True, False, False]]
    assert table.patients == ["p", "p"] and source.describe(0) == ("north", "", "")
    again: TileSource = pickle.loads(pickle.dumps(source))
    read = again.read(visit(0, 0))
    assert set(read.x.tolist()) == {10, 11} and read.repeated == 2 and read.mpp == 0.51
    assert [int(patch[0, 0, 0]) for patch in again.read(visit(0, 1)).pixels] == again.read(visit(0, 1)).x.tolist()
    with pytest.raises(TilesError, match="no column image"):
        pyarrow.parquet.write_table(pyarrow.table({"slide_id": ["a"]}), path)
        open_tiles(str(path), "", sampler, files)


def test_bad_folders_and_tiles(tmp_path: Path, folder: Path, files: Store, sampler: SamplerConfig) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TilesError, match="holds no images"):
        open_tiles(str(tmp_path / "empty"), "^(.+)/", sampler, files)
    with pytest.raises(TilesError, match="finds no slide id"):
        open_tiles(str(folder), "^(nothing)/", sampler, files)
    for file in (folder / "s2").iterdir():
        file.write_bytes(b"")
    with pytest.raises(VisitFailed, match="none of 3 tiles"):
        open_tiles(str(folder), "^(.+)/", sampler, files).read(visit(0, 1))


def test_the_same_stream_reads_tiles(folder: Path, files: Store, sampler: SamplerConfig) -> None:
    source = open_tiles(str(folder), "^(.+)/", sampler, files)
    plan = Plan(1, 4, sampler, source.table())
    found = []
    for workers in (0, 2):
        reading = StreamConfig(workers=workers, prefetch=1, in_flight=2, threads=1, memory_gb=1, memory_share=1.0, max_lost=0.1)
        with Stream(plan, source, reading) as stream:
            found.append([next(stream) for _ in range(10)])
    for one, other in zip(*found, strict=True):
        assert one.pixels.numpy().tobytes() == other.pixels.numpy().tobytes()
        assert one.x.tolist() == other.x.tolist() == one.pixels[:, 0, 0, 0].tolist()


def test_tiles_name_what_they_pass_over(folder: Path, sampler: SamplerConfig, files: Store) -> None:
    for name in ("s1/a.jp2", "s1/b.jp2", "s3/list.csv", "tables/x.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    notes = open_tiles(str(folder), "^(.+)/", sampler, files).notes
    assert len(notes) == 1 and notes[0].startswith("4 files are no pictures")
    assert notes[0].endswith("s1: 2 .jp2; s3: 1 .csv; tables: 1 .csv")
    (folder / "s4").mkdir()
    (folder / "s4/a.jp2").write_bytes(b"x")
    with pytest.raises(TilesError, match=r"1 folders hold images and none that is read \(s4: 1 .jp2\)"):
        open_tiles(str(folder), "^(.+)/", sampler, files)


def test_patients_of_tiles_are_one_however_they_are_written(tmp_path: Path, sampler: SamplerConfig, files: Store) -> None:
    rows = [
        {"slide_id": slide, "image": encoded(tile(i)), "patient_id": patient, "site": site, "mpp": mpp}
        for i, (slide, patient, site, mpp) in enumerate(
            [("a", "P1", "North", "0.5"), ("b", "p1 ", "north", "NA"), ("c", "nan", None, "0.5"), ("d", None, "NaN", None)]
        )
    ]
    path = tmp_path / "tiles.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    source = open_tiles(str(path), "", sampler, files)
    table = source.table()
    assert list(table.patients) == ["P1", "P1", "c", "d"] and list(table.sites) == ["North", "North", "", ""]
    assert np.isnan(source.mpp[[1, 3]]).all() and len(source.notes) == 2 and table.eligible.all()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**rows[0], "slide_id": "NA"}, *rows[1:]]), path)
    with pytest.raises(TilesError, match="1 of 4 tiles have no slide_id"):
        open_tiles(str(path), "", sampler, files)
