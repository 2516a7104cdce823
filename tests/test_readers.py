"""Pixels: equal to OpenSlide's at level 0 and whole downsamples, to tifffile's elsewhere; white for nothing, never grey."""

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile

from histoscale.data.readers.codec import decode_tile, rgb_of_ycbcr, with_tables
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.pyramid import Damage, DecodeError, Layout, LayoutError, Level, Reader, downsample
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import Missing, Store

RECTANGLES = 200
MakeSlide = Callable[..., Path]


def rectangles(level: Level, count: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Random ones, many over an edge, and every corner."""
    rng = random.Random(seed)
    found = []
    for x in (-20, level.width - 20):
        for y in (-20, level.height - 20):
            found.append((x, y, 40, 40))
    while len(found) < count:
        width, height = rng.randint(1, 300), rng.randint(1, 300)
        found.append((rng.randint(-width, level.width), rng.randint(-height, level.height), width, height))
    return found


def against_openslide(reader: Reader, path: Path, count: int) -> int:
    """Compare the levels that OpenSlide gives a whole downsample: outside of it our pixels are white. Returns how many levels."""
    compared = 0
    with openslide.OpenSlide(path) as slide:
        for number, level in enumerate(reader.layout.levels):
            assert slide.level_dimensions[number] == (level.width, level.height)
            step = slide.level_downsamples[number]
            if step != int(step):
                continue
            compared += 1
            for x, y, width, height in rectangles(level, count, number):
                ours = reader.region(number, x, y, width, height)
                theirs = np.asarray(slide.read_region((x * int(step), y * int(step)), number, (width, height)))
                solid = theirs[..., 3] == 255
                np.testing.assert_array_equal(ours[solid], theirs[solid][:, :3])
                assert (ours[~solid] == 255).all()
    return compared


def against_tifffile(reader: Reader, path: Path, number: int, count: int) -> None:
    level = reader.layout.levels[number]
    with tifffile.TiffFile(path) as file:
        every = [page for top in file.pages for page in (top, *(top.pages or ()))]
        page = next(page for page in every if page.is_tiled and page.shape[:2] == (level.height, level.width))
        whole = page.asarray()
    framed = np.pad(whole, ((300, 300), (300, 300), (0, 0)), constant_values=255)
    for x, y, width, height in rectangles(level, count, number):
        expected = framed[y + 300 : y + 300 + height, x + 300 : x + 300 + width]
        np.testing.assert_array_equal(reader.region(number, x, y, width, height), expected)


def opened(path: Path, store: Store) -> Reader:
    return open_reader(str(path), read_layout(str(path), store), store)


@pytest.mark.parametrize(
    ("name", "levels"),
    [("svs/CMU-1-Small-Region.svs", 1), ("svs/tcga-cr-7395-01a-01-ts1.svs", 1), ("tiff/CMU-0-small.tiff", 2)],
)
def test_real_slides_equal_openslide(shared_data: Path, store: Store, name: str, levels: int) -> None:
    path = shared_data / "slides" / name
    reader = opened(path, store)
    assert reader.layout.kind == "tiff"
    assert against_openslide(reader, path, RECTANGLES) == levels


@pytest.mark.parametrize(
    ("name", "number"),
    [("svs/tcga-cr-7395-01a-01-ts1.svs", 1), ("tiff/CMU-0-small.tiff", 2), ("ome-tiff/OS-1-detail.ome.tif", 0)],
)
def test_real_levels_that_openslide_interpolates_or_refuses_equal_tifffile(
    shared_data: Path, store: Store, name: str, number: int
) -> None:
    path = shared_data / "slides" / name
    against_tifffile(opened(path, store), path, number, RECTANGLES)


def test_real_headers(shared_data: Path, store: Store) -> None:
    folder = shared_data / "slides"
    known = {
        "svs/CMU-1-Small-Region.svs": ("tiff", 0.499, 20.0, "CPAPERIOCS", 1),
        "svs/tcga-cr-7395-01a-01-ts1.svs": ("tiff", None, None, None, 2),
        "tiff/CMU-0-small.tiff": ("tiff", 3.195, None, None, 3),
        "ome-tiff/OS-1-detail.ome.tif": ("tiff", 0.2271, None, None, 1),
        "ndpi/hamamatsu-DAPI-387.ndpi": ("openslide", 0.2282, 40.0, "C9600-12", 7),
        "dicom/CMU-1-Small-Region-wsidicomizer": ("openslide", 0.499, None, None, 1),
        "dicom/camelyon16-lowres-jpeg.dcm": ("openslide", 28.9685, None, None, 1),
    }
    for name, (kind, mpp, objective, scanner, levels) in known.items():
        layout = read_layout(str(folder / name), store)
        assert (layout.kind, layout.objective, layout.scanner, len(layout.levels)) == (kind, objective, scanner, levels), name
        assert layout.mpp == (None if mpp is None else pytest.approx(mpp, abs=1e-3)), name


def test_a_dicom_series_is_one_slide_by_folder_or_by_any_file(shared_data: Path, store: Store) -> None:
    folder = shared_data / "slides/dicom/CMU-1-Small-Region-wsidicomizer"
    whole = opened(folder, store).region(0, 700, 900, 300, 200)
    for file in sorted(folder.iterdir()):
        np.testing.assert_array_equal(opened(file, store).region(0, 700, 900, 300, 200), whole)
    twin = opened(shared_data / "slides/svs/CMU-1-Small-Region.svs", store).region(0, 700, 900, 300, 200)
    assert np.abs(whole.astype(int) - twin).mean() < 6  # re-encoded, not re-scanned


def test_vendor_regions_overhang_in_white_and_survive_pickling(shared_data: Path, store: Store) -> None:
    path = shared_data / "slides/dicom/CMU-1-Small-Region-wsidicomizer"
    reader = opened(path, store)
    level = reader.layout.levels[0]
    corner = reader.region(0, level.width - 30, level.height - 20, 60, 50)
    assert (corner[20:] == 255).all() and (corner[:, 30:] == 255).all()
    again: Reader = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(again.region(0, level.width - 30, level.height - 20, 60, 50), corner)


@pytest.mark.parametrize(
    "options",
    [
        {"colour": "rgb"},
        {"colour": "ycbcr", "subsampling": (1, 1)},
        {"colour": "ycbcr", "subsampling": (2, 2)},
        {"colour": "ycbcr", "subsampling": (2, 1), "kind": "generic"},
        {"compression": "j2k_rgb"},
        {"compression": "j2k_ycc"},
        {"compression": "raw", "kind": "generic"},
        {"compression": "deflate", "kind": "generic", "predictor": True},
        {"compression": "lzw", "kind": "generic", "predictor": True},
        {"kind": "generic", "bigtiff": True, "missing": (0, 7)},
        {"tile": 240, "downsamples": (1, 2, 4)},
    ],
    ids=str,
)
def test_synthetic_slides_equal_openslide(tmp_path: Path, store: Store, make_slide: MakeSlide, options: dict[str, Any]) -> None:
    path = make_slide(tmp_path / "a.tif", **options)
    reader = opened(path, store)
    assert reader.layout.mpp == pytest.approx(0.5)
    assert against_openslide(reader, path, 20) == len(reader.layout.levels) >= 2


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "ome", "byteorder": ">", "subifds": True},
        {"kind": "ome", "bigtiff": True, "colour": "ycbcr", "subsampling": (2, 2)},
        {"kind": "generic", "byteorder": ">", "compression": "raw"},
        {"kind": "generic", "byteorder": ">", "compression": "lzw", "predictor": True},
        {"kind": "generic", "compression": "j2k"},
        {"downsamples": (1, 3.3)},
    ],
    ids=str,
)
def test_what_openslide_refuses_or_interpolates_equals_tifffile(
    tmp_path: Path, store: Store, make_slide: MakeSlide, options: dict[str, Any]
) -> None:
    path = make_slide(tmp_path / "a.tif", **options)
    reader = opened(path, store)
    assert reader.layout.mpp == pytest.approx(0.5) and len(reader.layout.levels) == 2
    for number in range(2):
        against_tifffile(reader, path, number, 20)


def test_missing_tiles_are_white(tmp_path: Path, store: Store, make_slide: MakeSlide) -> None:
    reader = opened(make_slide(tmp_path / "a.svs", missing=(1,)), store)
    assert (reader.region(0, 256, 0, 256, 256) == 255).all()
    assert (reader.region(0, 0, 0, 256, 256) < 255).any()


def test_ome_header(tmp_path: Path, store: Store, make_slide: MakeSlide) -> None:
    layout = read_layout(str(make_slide(tmp_path / "a.ome.tif", kind="ome", mpp=0.23)), store)
    assert (layout.mpp, layout.objective, layout.scanner) == (pytest.approx(0.23), 40.0, "Scope 9")


def test_neighbouring_tiles_are_one_request_a_row(tmp_path: Path, store: Store, make_slide: MakeSlide) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), np.uint8)  # rows far longer than a gap worth reading
    reader = opened(make_slide(tmp_path / "a.svs", pixels=noise, downsamples=(1,)), store)
    asked: list[int] = []

    class Counting(Store):
        def ranges(self, uri: str, spans: Any) -> list[bytes]:
            asked.append(len(spans))
            return super().ranges(uri, spans)

    counting = open_reader(str(tmp_path / "a.svs"), reader.layout, Counting(store.config))
    assert asked == []  # a catalogued slide opens without a request
    np.testing.assert_array_equal(counting.region(0, 300, 300, 500, 400), reader.region(0, 300, 300, 500, 400))
    assert asked == [2]  # 3 x 2 tiles


# Damage


def corrupt(path: Path, level: Level, tile: int, zeros: bool = False) -> None:
    data = bytearray(path.read_bytes())
    start, count = int(level.offsets[tile]), int(level.counts[tile])
    data[start + count // 2 : start + count] = bytes(count - count // 2)
    if zeros:
        data[start : start + count] = bytes(count)
    path.write_bytes(data)


@pytest.mark.parametrize("compression", ["jpeg", "j2k_rgb", "deflate", "lzw"])
@pytest.mark.parametrize("zeros", [False, True])
def test_damaged_tiles_raise_and_never_become_grey(
    tmp_path: Path, store: Store, make_slide: MakeSlide, compression: str, zeros: bool
) -> None:
    path = make_slide(tmp_path / "a.tif", compression=compression, kind="generic")
    layout = read_layout(str(path), store)
    before = open_reader(str(path), layout, store).region(0, 0, 0, 600, 300)
    corrupt(path, layout.levels[0], 1, zeros)
    reader = open_reader(str(path), layout, store)
    with pytest.raises(DecodeError, match=r"a\.tif, level 0, tile 1"):
        reader.region(0, 200, 0, 100, 100)
    damage: list[Damage] = []
    found = reader.region(0, 0, 0, 600, 300, damage)
    assert damage == [Damage(256, 0, 512, 256)]
    assert (found[:256, 256:512] == 255).all()
    np.testing.assert_array_equal(found[:, :256], before[:, :256])


def test_a_bad_transfer_is_fetched_again(tmp_path: Path, store: Store, make_slide: MakeSlide) -> None:
    path = make_slide(tmp_path / "a.svs")
    layout = read_layout(str(path), store)

    class Flipping(Store):
        calls = 0

        def ranges(self, uri: str, spans: Any) -> list[bytes]:
            Flipping.calls += 1
            found = super().ranges(uri, spans)
            return found if Flipping.calls > 1 else [bytes(len(data)) for data in found]

    reader = open_reader(str(path), layout, Flipping(store.config))
    good = open_reader(str(path), layout, store).region(0, 10, 10, 20, 20)
    np.testing.assert_array_equal(reader.region(0, 10, 10, 20, 20), good)


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.98])
def test_a_truncated_slide_is_no_slide(tmp_path: Path, store: Store, make_slide: MakeSlide, cut: float) -> None:
    data = make_slide(tmp_path / "a.svs", kind="generic").read_bytes()
    (tmp_path / "b.svs").write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(LayoutError):
        read_layout(str(tmp_path / "b.svs"), store)


def test_files_that_are_no_slides(tmp_path: Path, store: Store) -> None:
    (tmp_path / "text.svs").write_text("I am not a slide\n" * 100)
    (tmp_path / "empty.svs").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "magic.svs").write_bytes(b"II*\0" + bytes(100))
    tifffile.imwrite(tmp_path / "flat.tif", np.zeros((100, 100, 3), np.uint8))
    known = {"text.svs": "no TIFF", "empty.svs": "empty", "magic.svs": "TIFF", "flat.tif": "no tiled image"}
    for name, message in known.items():
        with pytest.raises(LayoutError, match=message):
            read_layout(str(tmp_path / name), store)
    for name in ("none.svs", "folder"):
        with pytest.raises(Missing):
            read_layout(str(tmp_path / name), store)


def test_vendor_errors_do_not_stick(tmp_path: Path, store: Store, shared_data: Path) -> None:
    """An OpenSlide handle that met an error repeats it for ever; the reader takes a new one."""
    source = shared_data / "slides/ndpi/hamamatsu-DAPI-387.ndpi"
    path = tmp_path / "a.ndpi"
    path.write_bytes(source.read_bytes())
    reader = opened(path, store)
    good = reader.region(0, 0, 0, 64, 64)
    path.write_bytes(source.read_bytes()[:1000])
    fresh = open_reader(str(path), reader.layout, store)
    with pytest.raises(DecodeError, match="a.ndpi"):
        fresh.region(0, 0, 0, 64, 64)
    path.write_bytes(source.read_bytes())
    np.testing.assert_array_equal(fresh.region(0, 0, 0, 64, 64), good)


# Parts


def tile_level(compression: str, colour: str = "rgb", tables: bytes = b"", side: int = 64) -> Level:
    nothing = np.zeros(0, np.int64)
    return Level(side, side, side, side, 1.0, compression, colour, 1, tables, nothing, nothing)


def test_shared_tables_and_colour_are_merged(draw_tissue: Callable[..., np.ndarray]) -> None:
    """A JPEG split into tables and an abbreviated stream, with a JFIF marker that lies about the colour space."""
    pixels = draw_tissue(64, 64)
    whole = imagecodecs.jpeg8_encode(pixels, level=85, colorspace="RGB", outcolorspace="RGB", subsampling=(1, 1))
    expected = imagecodecs.jpeg8_decode(whole, colorspace="RGB", outcolorspace="RGB")
    scan = whole.index(b"\xff\xda")
    tables, rest, place = b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00", 2
    while place < scan:
        stop = place + 2 + int.from_bytes(whole[place + 2 : place + 4], "big")
        if whole[place + 1] in (0xDB, 0xC4):
            tables += whole[place:stop]
        elif whole[place + 1] != 0xE0:
            rest += whole[place:stop]
        place = stop
    rest += whole[scan:]
    tables += b"\xff\xd9"
    np.testing.assert_array_equal(decode_tile(rest, tile_level("jpeg", "rgb", tables)), expected)
    assert with_tables(rest, tables, "rgb").count(b"JFIF") == 0


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"junk" * 50, b"\xff\xd8\xff\xdb\x00\x00" * 9])
def test_junk_is_a_decode_error_in_every_codec(data: bytes) -> None:
    for compression in ("jpeg", "jpeg2000", "raw", "deflate", "lzw"):
        with pytest.raises(DecodeError):
            decode_tile(data, tile_level(compression))


def test_a_tile_of_another_size_is_damage(draw_tissue: Callable[..., np.ndarray]) -> None:
    pixels = draw_tissue(32, 32)
    with pytest.raises(DecodeError, match="expected"):
        decode_tile(imagecodecs.jpeg8_encode(pixels), tile_level("jpeg", "ycbcr"))
    with pytest.raises(DecodeError, match="32x32"):
        decode_tile(imagecodecs.jpeg2k_encode(pixels, codecformat="j2k"), tile_level("jpeg2000"))
    bomb = imagecodecs.zlib_encode(bytes(10_000_000))
    with pytest.raises(DecodeError):
        decode_tile(bomb, tile_level("deflate"))


def test_ycbcr_is_within_one_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (64, 64, 3), np.uint8)
    y, cb, cr = (tile[..., i].astype(float) for i in range(3))
    exact = np.stack([y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)], -1)
    assert np.abs(rgb_of_ycbcr(tile) - exact.clip(0, 255)).max() <= 0.51


def test_downsamples_are_whole_within_rounding() -> None:
    assert downsample((4443, 3567), (2221, 1783)) == 2.0
    assert downsample((718, 514), (179, 128)) == 4.0
    assert downsample((40000, 30000), (1250, 937)) == 32.0
    assert downsample((1100, 900), (333, 272)) == pytest.approx(3.306, abs=1e-3)


def test_layouts_pickle(tmp_path: Path, store: Store, make_slide: MakeSlide) -> None:
    layout = read_layout(str(make_slide(tmp_path / "a.svs")), store)
    again: Layout = pickle.loads(pickle.dumps(layout))
    np.testing.assert_array_equal(again.levels[1].offsets, layout.levels[1].offsets)
