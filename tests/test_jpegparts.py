"""Parts of JPEG tiles decoded in place: the same pixels and the same verdicts as whole tiles by another build of the decoder."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from histoscale.data.readers import codec
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.pyramid import Damage
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import Store

jpegparts = codec.jpegparts
pytestmark = pytest.mark.skipif(
    jpegparts is None, reason="jpegparts was not compiled: this machine lacks a C compiler or libjpeg-turbo's headers"
)
SUBSAMPLINGS = ["444", "422", "420", "440", "411"]


def drawn(draw: np.random.Generator, width: int, height: int, subsampling: str) -> bytes:
    """A JPEG with coarse shapes and fine grain."""
    coarse = Image.fromarray(draw.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)).resize((width, height))
    pixels = np.asarray(coarse).astype(int) + draw.integers(-20, 20, (height, width, 3))
    pixels = np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))
    return simplejpeg.encode_jpeg(pixels, quality=75, colorspace="RGB", colorsubsampling=subsampling)


def whole(data: bytes, width: int, height: int, reduce: int) -> np.ndarray:
    small = {} if reduce == 1 else {"min_height": height // reduce, "min_width": width // reduce, "min_factor": 1}
    return simplejpeg.decode_jpeg(data, "RGB", strict=True, **small)


def some_part(draw: np.random.Generator, side: int) -> tuple[int, int]:
    if draw.random() < 0.2:
        return 0, side
    first, last = sorted(draw.choice(side + 1, 2, replace=False).tolist())
    return first, last


@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_a_part_is_bit_equal_to_the_whole_tile(subsampling: str, reduce: int) -> None:
    draw = np.random.default_rng(SUBSAMPLINGS.index(subsampling) * 8 + reduce)
    for width, height in ((240, 240), (256, 256), (512, 256), (64, 48)):
        data = drawn(draw, width, height, subsampling)
        expected = whole(data, width, height, reduce)
        for _ in range(12):
            (left, right), (top, bottom) = some_part(draw, width // reduce), some_part(draw, height // reduce)
            x, y = draw.integers(0, 9, 2).tolist()
            region = np.zeros((y + bottom - top + 3, x + right - left + 3, 3), np.uint8)
            place = np.array([[left, top, right, bottom, x, y]])
            assert jpegparts.paint(region, [data], place, b"", True, width, height, reduce) == {}
            there = region[y : y + bottom - top, x : x + right - left]
            np.testing.assert_array_equal(there, expected[top:bottom, left:right])
            there[:] = 0
            assert not region.any()  # and nothing around it


def harmed(draw: np.random.Generator, data: bytes, kind: str) -> bytes:
    at, size = int(draw.integers(len(data))), int(draw.integers(1, 60))
    if kind == "cut":
        return data[:at]
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ 1 << int(draw.integers(8))]) + data[at + 1 :]
    filling = bytes(size) if kind == "zeros" else draw.bytes(size)
    return (data[:at] + filling + data[at + size :])[: len(data)]


@pytest.mark.parametrize("kind", ["cut", "bit", "zeros", "noise"])
def test_damage_is_found_wherever_it_is_and_however_little_is_wanted(kind: str) -> None:
    """The verdict does not depend on the part: what follows it is read to its end."""
    draw = np.random.default_rng(len(kind))
    verdicts = []
    for number in range(150):
        data = harmed(draw, drawn(draw, 128, 128, SUBSAMPLINGS[number % 3]), kind)
        try:
            good = whole(data, 128, 128, 1).shape == (128, 128, 3)
        except ValueError:
            good = False
        verdicts.append(good)
        for place in ([0, 0, 128, 128, 0, 0], [70, 8, 75, 10, 0, 0]):
            found = jpegparts.paint(np.zeros((128, 128, 3), np.uint8), [data], np.array([place]), b"", True, 128, 128, 1)
            assert (found == {}) == good, (number, found)
    assert not all(verdicts)


def saved(pixels: np.ndarray, **how: Any) -> bytes:
    """A JPEG by Pillow, which has more kinds of them."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **how)
    return file.getvalue()


def read_again(data: bytes, side: int, reduce: int = 1) -> bool:
    """Whether libjpeg had to say; the pixels, whole and of a part, are those of simplejpeg in any case."""
    before, expected = jpegparts.read_twice(), whole(data, side, side, reduce)
    for left, top, right, bottom in ((0, 0, side, side), (side // 2, 5 * reduce, side - reduce, side // 2)):
        place = np.array([[left // reduce, top // reduce, right // reduce, bottom // reduce, 0, 0]])
        pixels = np.zeros((bottom // reduce - top // reduce, right // reduce - left // reduce, 3), np.uint8)
        assert jpegparts.paint(pixels, [data], place, b"", True, side, side, reduce) == {}
        np.testing.assert_array_equal(pixels, expected[top // reduce : bottom // reduce, left // reduce : right // reduce])
    return jpegparts.read_twice() > before


def kinds_of_pixels() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(3)
    board = np.indices((96, 96)).sum(0) % 2 * 255
    return {
        "flat": np.full((96, 96, 3), 200, np.uint8),  # blocks that end at once
        "noise": draw.integers(0, 256, (96, 96, 3), np.uint8),  # the longest symbols, and blocks of 64 of them
        "board": np.repeat(board[..., None], 3, 2).astype(np.uint8),  # runs of zeros before the last coefficient
        "steps": np.repeat(draw.integers(0, 2, (12, 12, 3), np.uint8) * 255, 8, 0).repeat(8, 1),  # means far apart
    }


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("quality", [1, 30, 75, 95, 100])
@pytest.mark.parametrize("pixels", list(kinds_of_pixels()))
def test_whole_tiles_of_any_content_and_code_are_read_once(pixels: str, quality: int, optimize: bool) -> None:
    for subsampling in (0, 2):
        data = saved(kinds_of_pixels()[pixels], quality=quality, subsampling=subsampling, optimize=optimize)
        for reduce in (1, 2, 4, 8):
            assert not read_again(data, 96, reduce)


@pytest.mark.parametrize("how", [{"progressive": True}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}])
def test_other_kinds_of_scan_are_left_to_libjpeg(how: dict[str, Any]) -> None:
    assert not read_again(saved(kinds_of_pixels()["steps"], quality=80, **how), 96)


def test_bytes_between_the_last_block_and_the_end_are_for_libjpeg_to_judge() -> None:
    data = saved(kinds_of_pixels()["noise"], quality=75)
    assert data[-2:] == b"\xff\xd9"
    assert not read_again(data[:-2] + b"\xff\xff\xff\xd9", 96)  # fill bytes before a marker are part of the format
    assert not read_again(data + b"behind the end", 96)
    for more in (1, 2, 5, 20, 200):
        extra = data[:-2] + bytes(more) + b"\xff\xd9"
        try:
            good = whole(extra, 96, 96, 1).size > 0
        except ValueError:
            good = False
        before = jpegparts.read_twice()
        found = jpegparts.paint(np.zeros((96, 96, 3), np.uint8), [extra], np.array([[0, 0, 9, 9, 0, 0]]), b"", True, 96, 96, 1)
        assert (found == {}) == good and jpegparts.read_twice() == before + 1
    assert not good


def test_threads_do_not_share_tables() -> None:
    """Each tile has Huffman tables of its own, more of them than are remembered."""
    draw = np.random.default_rng(0)
    tiles = [saved(draw.integers(0, 1 + 12 * i, (64, 64, 3), np.uint8), quality=30 + 3 * i, optimize=True) for i in range(20)]
    expected = [whole(tile, 64, 64, 1) for tile in tiles]

    def read(order: np.ndarray) -> None:
        for i in order.tolist():
            pixels = np.zeros((64, 64, 3), np.uint8)
            assert jpegparts.paint(pixels, [tiles[i]], np.array([[0, 0, 64, 64, 0, 0]]), b"", True, 64, 64, 1) == {}
            np.testing.assert_array_equal(pixels, expected[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, [draw.integers(0, 20, 200) for _ in range(8)]))


def test_a_damaged_tile_leaves_its_neighbours_alone() -> None:
    draw = np.random.default_rng(0)
    data = [drawn(draw, 64, 64, "420") for _ in range(5)]
    data[1], data[3] = data[1][:300], b""
    region = np.zeros((64, 320, 3), np.uint8)
    places = np.array([[0, 0, 64, 64, 64 * i, 0] for i in range(5)])
    found = jpegparts.paint(region, data, places, b"", True, 64, 64, 1)
    assert sorted(found) == [1, 3] and "empty" in found[3]
    for i in (0, 2, 4):
        np.testing.assert_array_equal(region[:, 64 * i : 64 * i + 64], whole(data[i], 64, 64, 1))


def test_a_tile_without_tables_does_not_borrow_its_neighbours() -> None:
    data = drawn(np.random.default_rng(0), 64, 64, "420")
    at = data.index(b"\xff\xdb")
    bare = data[:at]
    while data[at : at + 2] == b"\xff\xdb":  # quantisation tables
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    bare += data[at:]
    places = np.array([[0, 0, 64, 64, 0, 0]] * 2)
    found = jpegparts.paint(np.zeros((64, 64, 3), np.uint8), [data, bare], places, b"", True, 64, 64, 1)
    assert list(found) == [1] and "table" in found[1].lower()


@pytest.mark.parametrize(
    "place",
    [[-1, 0, 8, 8, 0, 0], [0, 0, 65, 8, 0, 0], [8, 0, 8, 8, 0, 0], [0, 0, 8, 8, 57, 0], [0, 0, 8, 8, 0, -1],
     [0, 0, 1 << 40, 8, 0, 0]],
)  # fmt: skip
def test_places_outside_are_refused_before_anything_is_written(place: list[int]) -> None:
    region = np.zeros((64, 64, 3), np.uint8)
    data = drawn(np.random.default_rng(0), 64, 64, "444")
    with pytest.raises(ValueError, match="place 0 is outside"):
        jpegparts.paint(region, [data], np.array([place]), b"", True, 64, 64, 1)
    assert not region.any()


def test_other_arrays_and_scales_are_refused() -> None:
    data, place = drawn(np.random.default_rng(0), 64, 64, "444"), np.array([[0, 0, 8, 8, 0, 0]])
    region = np.zeros((64, 64, 3), np.uint8)
    frozen = region.copy()
    frozen.flags.writeable = False
    for pixels in (region[:, ::2], frozen, region[..., 0].copy(), np.zeros((64, 64, 3), np.uint16)):
        with pytest.raises((ValueError, BufferError)):
            jpegparts.paint(pixels, [data], place, b"", True, 64, 64, 1)
    for reduce in (0, 3, 16, -1):
        with pytest.raises(ValueError, match="reduce 1, 2, 4 or 8"):
            jpegparts.paint(region, [data], place, b"", True, 64, 64, reduce)
    with pytest.raises(ValueError, match="n tiles"):
        jpegparts.paint(region, [data, data], place, b"", True, 64, 64, 1)
    assert "128" in jpegparts.paint(region, [data], place, b"", True, 128, 64, 1)[0]  # its frame is not the level's tile


@pytest.mark.parametrize(("colour", "subsampling"), [("rgb", (1, 1)), ("ycbcr", (2, 1)), ("ycbcr", (2, 2))])
def test_regions_are_the_same_with_and_without_it(
    tmp_path: Path, store: Store, make_slide: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, colour: str,
    subsampling: tuple[int, int],
) -> None:  # fmt: skip
    path = make_slide(tmp_path / "a.svs", width=1500, height=1100, tile=128, colour=colour, subsampling=subsampling)
    layout = read_layout(str(path), store)
    level = layout.levels[0]
    draw = np.random.default_rng(0)
    with path.open("r+b") as file:
        for tile in draw.permutation(np.flatnonzero(level.counts))[:12].tolist():
            file.seek(int(level.offsets[tile]) + int(level.counts[tile]) // 2)
            file.write(draw.bytes(40))
    reader = open_reader(str(path), layout, store)
    asked = []
    for _ in range(30):
        x, y = draw.integers(-50, 1000, 2).tolist()
        asked.append((0, x, y, 240, 240, int(draw.choice([1, 2, 4])), draw.random((3, 3)) < 0.5))

    def read() -> list[tuple[np.ndarray, list[Damage]]]:
        found = []
        for number, x, y, width, height, reduce, wanted in asked:
            damage: list[Damage] = []
            found.append((reader.region(number, x // reduce, y // reduce, width, height, damage, reduce, wanted), damage))
        return found

    one = read()
    monkeypatch.setattr(codec, "jpegparts", None)
    other = read()
    assert any(damage for _, damage in one)
    for (pixels, damage), (expected, expected_damage) in zip(one, other, strict=True):
        assert sorted(map(repr, damage)) == sorted(map(repr, expected_damage))
        np.testing.assert_array_equal(pixels, expected)
