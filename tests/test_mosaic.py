"""Regions read bit by bit, and tiles decoded at reduced scale."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from histoscale.data.readers.codec import decode_tile
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.mosaic import Mosaic
from histoscale.data.readers.pyramid import Damage, DecodeError, Level
from histoscale.data.readers.region import TiffReader, open_reader
from histoscale.data.readers.scale import Scale, read_scaled
from histoscale.data.storage import Store

MakeSlide = Callable[..., Path]
FACTORS = [1.0, 2.0, 4.0, 1.6]


@pytest.mark.parametrize("factor", FACTORS)
def test_parts_are_the_whole_and_no_tile_is_decoded_twice(
    tmp_path: Path, store: Store, make_slide: MakeSlide, draw_tissue: Callable[..., np.ndarray], factor: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = make_slide(tmp_path / "a.svs", pixels=draw_tissue(1600, 1400, whole=True), tile=64, downsamples=(1,))
    layout = read_layout(str(path), store)
    level = layout.levels[0]
    with path.open("r+b") as file:  # damaged tiles, one in the region of each factor
        for tile in (28, 60, 131):
            file.seek(int(level.offsets[tile]))
            file.write(bytes(int(level.counts[tile])))
    reader = open_reader(str(path), layout, store)
    side, scale = 40, Scale(0, 0.5 * factor, factor)
    damage: list[Damage] = []
    whole = read_scaled(reader, scale, 96, 64, 5 * side, 4 * side, damage)
    decoded: list[int] = []
    original = TiffReader._paint

    def noted(self: TiffReader, *given: Any) -> list[int]:
        decoded.extend(given[2].numbers[given[4]].tolist())
        return original(self, *given)

    monkeypatch.setattr(TiffReader, "_paint", noted)
    draw = np.random.default_rng(3)
    mosaic = Mosaic(reader, scale, 96, 64, np.ones((4, 5), bool), side)
    left = draw.permutation(20).tolist()
    readable = np.zeros((4, 5), bool)
    while left:
        wanted = np.zeros(20, bool)
        wanted[left[:3]], left = True, left[3:]
        found = mosaic.read(wanted.reshape(4, 5))
        assert not (found & ~wanted.reshape(4, 5)).any()
        readable |= found
    hurt = np.zeros((4 * side, 5 * side), bool)
    for part in damage:
        hurt[part.top : part.bottom, part.left : part.right] = True
    for row in range(4):
        for column in range(5):
            here = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
            assert readable[row, column] == (not hurt[here].any())
            if readable[row, column]:
                np.testing.assert_array_equal(mosaic.cell(row, column), whole[here])
    assert not readable.all() and readable.any()
    assert len(decoded) == len(set(decoded))


def off(level: Level, data: bytes, reduce: int) -> np.ndarray:
    """How far a tile decoded at reduced scale is from the averages of the whole tile, grey levels."""
    whole = np.asarray(Image.fromarray(decode_tile(data, level)).reduce(reduce)).astype(int)
    return np.abs(decode_tile(data, level, reduce) - whole)


def tiles(path: Path, store: Store, count: int) -> tuple[Level, list[bytes]]:
    level = read_layout(str(path), store).levels[0]
    there = np.flatnonzero(level.counts)
    chosen = np.random.default_rng(0).permutation(there)[:count].tolist()
    spans = [(int(level.offsets[t]), int(level.offsets[t] + level.counts[t])) for t in chosen]
    return level, store.ranges(str(path), spans)


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize(
    ("compression", "colour", "subsampling"),
    [("jpeg", "rgb", (1, 1)), ("jpeg", "ycbcr", (1, 1)), ("jpeg", "ycbcr", (2, 1)), ("jpeg", "ycbcr", (2, 2)),
     ("j2k_rgb", "rgb", (1, 1)), ("deflate", "rgb", (1, 1))],
)  # fmt: skip
def test_reduced_tiles_are_nearly_averages(
    tmp_path: Path, store: Store, make_slide: MakeSlide, compression: str, colour: str, subsampling: tuple[int, int], reduce: int
) -> None:
    kind = {"compression": compression, "colour": colour, "subsampling": subsampling}
    level, data = tiles(make_slide(tmp_path / "a.svs", width=1200, height=900, tile=128, **kind), store, 20)
    found = np.stack([off(level, one, reduce) for one in data])
    assert found.shape[1:] == (128 // reduce, 128 // reduce, 3)
    if level.compression == "jpeg":
        assert found.mean() <= 1 and found.max() <= 32 and found.max() > 0
    else:
        assert found.max() == 0
    broken = bytearray(data[0])
    broken[len(broken) // 3 :] = bytes(len(broken) - len(broken) // 3)
    with pytest.raises(DecodeError):
        decode_tile(bytes(broken), level, reduce)


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize(
    "name",
    ["svs/CMU-1-Small-Region.svs", "tiff/CMU-0-small.tiff", "ome-tiff/OS-1-detail.ome.tif", "svs/tcga-cr-7395-01a-01-ts1.svs"],
)
def test_reduced_tiles_of_real_slides_are_nearly_averages(shared_data: Path, store: Store, name: str, reduce: int) -> None:
    level, data = tiles(shared_data / "slides" / name, store, 12)
    found = np.stack([off(level, one, reduce) for one in data])
    assert found.mean() <= 1 and found.max() <= 32
    assert (found.max() == 0) == (level.compression == "jpeg2000")
