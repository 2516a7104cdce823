"""Tiles on pictures and pyramids: every pixel belongs to the tile that holds its centre, at any downsample, in every file."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from evidence_cases import MPP, grid, open_slide
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from histoscale.data.readers.pyramid import Reader
from histoscale.data.readers.scale import Scale
from histoscale.data.storage import Store
from histoscale.eval.annotations import read_annotations
from histoscale.eval.evidence.display import attention_shown, bar_um, common_limit, signed_shown
from histoscale.eval.evidence.geometry import Canvas, Plan, paint, read_picture, shrink, whole_slide
from histoscale.eval.evidence.pyramid import write_overlay, write_values
from histoscale.eval.evidence.qupath import regions, write_geojson


def square(side: int, downsample: float) -> Canvas:
    return Canvas(side, side, downsample, downsample)


@settings(deadline=None, max_examples=150)
@given(
    x=st.integers(0, 500),
    y=st.integers(0, 500),
    size=st.integers(1, 200),
    downsample=st.one_of(st.just(1.0), st.just(4.0), st.just(32.0085), st.floats(1, 70)),
)
def test_a_tile_lights_the_pixels_whose_centres_it_holds(x: int, y: int, size: int, downsample: float) -> None:
    side = int(600 / downsample)
    field = paint(np.array([[x, y]]), size, np.array([2.0]), square(side, downsample))
    centres = (np.arange(side) + 0.5) * downsample
    inside = ((centres >= y) & (centres < y + size))[:, None] & ((centres >= x) & (centres < x + size))[None]
    np.testing.assert_array_equal(field == 2, inside)
    assert np.isnan(field[~inside]).all()


@settings(deadline=None, max_examples=60)
@given(size=st.integers(20, 200), downsample=st.floats(1, 19))
def test_neighbours_leave_no_gap_and_do_not_overlap(size: int, downsample: float) -> None:
    """A grid of tiles with value = its number: every pixel carries exactly the number of the tile that its centre lies in."""
    columns, rows = 7, 5
    coords = grid(columns * size, rows * size, size)
    height, width = (int(n * size / downsample) for n in (rows, columns))
    field = paint(coords, size, np.arange(len(coords), dtype=float), Canvas(width, height, downsample, downsample))
    down, across = (((np.arange(n) + 0.5) * downsample // size).astype(int) for n in (height, width))
    np.testing.assert_array_equal(field, down[:, None] * columns + across[None])


def test_bands_are_parts_of_the_whole_and_overlapping_tiles_share_the_mean() -> None:
    coords = np.random.default_rng(0).integers(0, 300, (40, 2))
    canvas, values = Canvas(90, 70, 4.3, 5.1), np.arange(40.0)
    whole = paint(coords, 50, values, canvas)
    parts = [paint(coords, 50, values, canvas, top, min(16, 70 - top)) for top in range(0, 70, 16)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    field = paint(np.array([[0, 0], [2, 0]]), 4, np.array([1.0, 3.0]), Canvas(8, 4, 1, 1))
    np.testing.assert_array_equal(field[0, :6], [1, 1, 2, 2, 3, 3])
    assert np.isnan(field[:, 6:]).all()


@pytest.fixture
def bright(tmp_path: Path, store: Store) -> tuple[Reader, int, tuple[int, int], int]:
    """A slide that is black but for one white square: reader, its side, the square's corner and side."""
    side, size, corner = 2050, 192, (448, 320)
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[corner[1] : corner[1] + size, corner[0] : corner[0] + size] = 255
    path = tmp_path / "square.tiff"
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(64, 64), photometric="rgb", compression="deflate")
        file.write(pixels[::4, ::4], tile=(64, 64), photometric="rgb", compression="deflate", subfiletype=1)
    return open_slide(path, store), side, corner, size


@pytest.mark.parametrize("longest", [2050, 700, 400, 333])
def test_the_picture_says_its_true_scale(bright: tuple[Reader, int, tuple[int, int], int], longest: int) -> None:
    reader, side, (x, y), size = bright
    plan = whole_slide(reader, MPP, longest)
    picture = read_picture(reader, plan)
    assert picture.shape == (plan.canvas.height, plan.canvas.width, 3) and longest / 2 <= plan.canvas.width <= longest
    assert plan.canvas.width * plan.canvas.across >= side and plan.mpp == pytest.approx(MPP * plan.canvas.across)
    whole = int(side / plan.canvas.across)  # what lies over the border is white
    lit = np.argwhere(picture[:whole, :whole, 0] > 127)
    np.testing.assert_allclose(lit.min(0) * plan.canvas.down, [y, x], atol=plan.canvas.down)
    np.testing.assert_allclose((lit.max(0) + 1) * plan.canvas.down, [y + size, x + size], atol=plan.canvas.down)


@pytest.mark.parametrize("base", [1.0, 3.0, 32.0085])
def test_a_known_tile_lights_exactly_its_pixels_at_every_level(tmp_path: Path, base: float) -> None:
    """Read back with another library: each level's pixels, by the level's own extent, and the physical size in the OME-XML."""
    width, height, size, (x, y) = 21013, 17011, 1777, (5003, 4001)
    canvas = Canvas(round(width / base / 7), round(height / base / 7), base * 7, base * 7)
    plan = whole_plan(canvas)
    coords = np.array([[x, y], [15000, 12000]])
    values = np.array([0.75, np.float64(np.float32(0.1))])
    write_values(tmp_path / "values.ome.tif", coords, size, {"attention": values, "contribution": -values}, plan)
    with tifffile.TiffFile(tmp_path / "values.ome.tif") as file:
        assert file.is_ome and f'PhysicalSizeX="{plan.mpp}"' in (file.ome_metadata or "")
        levels = file.series[0].levels
        assert len(levels) == 1 + max(0, int(np.ceil(np.log2(max(canvas.width, canvas.height) / 256))))
        for number, level in enumerate(levels):
            seen = level.asarray()
            assert seen.dtype == np.float32 and seen.shape[0] == 2 and level.axes == "CYX"
            high, wide = seen.shape[1:]
            down, across = canvas.height * base * 7 / high, canvas.width * base * 7 / wide  # what the level's extent says
            assert number or (down, across) == pytest.approx((base * 7, base * 7))
            rows, columns = (np.arange(high) + 0.5) * down, (np.arange(wide) + 0.5) * across
            for (left, top), value in zip(coords, values, strict=True):
                lit = ((rows >= top) & (rows < top + size))[:, None] & ((columns >= left) & (columns < left + size))[None]
                np.testing.assert_array_equal(seen[0] == np.float32(value), lit)
                np.testing.assert_array_equal(seen[1] == np.float32(-value), lit)
            assert np.isnan(seen).sum() == seen.size - 2 * ((seen[0] > 0).sum())


def whole_plan(canvas: Canvas) -> Plan:
    return Plan(canvas, Scale(0, MPP * canvas.across, canvas.across), MPP * canvas.across)


def test_the_overlay_lies_on_the_slide_and_leaves_the_rest_alone(
    tmp_path: Path, bright: tuple[Reader, int, tuple[int, int], int]
) -> None:
    reader, side, corner, size = bright
    plan = whole_slide(reader, MPP, 1100)
    picture = read_picture(reader, plan)
    coords = np.array([corner, (0, 0)])
    shown = attention_shown(np.array([0.9, 0.1]), "relative", 1.0)
    write_overlay(tmp_path / "attention.ome.tif", coords, size, shown, picture, plan, 0.5, 95)
    with tifffile.TiffFile(tmp_path / "attention.ome.tif") as file:
        levels = file.series[0].levels
        assert len(levels) == 3 and levels[0].axes == "YXS" and levels[0].dtype == np.uint8
        assert file.pages[0].compression == 7 and file.pages[0].is_tiled
        for number, level in enumerate(levels):
            seen, canvas = level.asarray().astype(int), plan.canvas.level(number)
            assert seen.shape == (canvas.height, canvas.width, 3)
            covered = ~np.isnan(paint(coords, size, np.ones(2), canvas))
            assert np.abs(seen - shrink(picture, canvas))[~covered].mean() < 3
            red = seen[..., 0] - seen[..., 1] > 30
            lit = ~np.isnan(paint(coords[:1], size, np.ones(1), canvas))
            assert (red & lit).sum() > 0.7 * lit.sum() and (red & ~lit).sum() < 0.5 * lit.sum() ** 0.5 * 4 + 4


def test_shrinking_averages_and_keeps_what_is_plain() -> None:
    pixels = np.full((301, 407, 3), 93, np.uint8)
    assert (shrink(pixels, Canvas(100, 77, 1, 1)) == 93).all()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    halves = shrink(pixels, Canvas(30, 20, 1, 1))
    np.testing.assert_allclose(halves, pixels.reshape(20, 2, 30, 2, 3).mean((1, 3)), atol=0.51)
    parts = [shrink(pixels, Canvas(23, 17, 1, 1), top, min(5, 17 - top)) for top in range(0, 17, 5)]
    np.testing.assert_array_equal(shrink(pixels, Canvas(23, 17, 1, 1)), np.concatenate(parts))


# --- GeoJSON ---


def test_geojson_corners_are_level_0_coordinates(tmp_path: Path) -> None:
    coords = grid(1000, 700, 100) + [13, 29]
    attention = np.full(len(coords), 0.001)
    attention[[11, 12, 22, 45]] = [0.4, 0.2, 0.1, 0.05]
    contribution = np.where(np.arange(len(coords)) == 3, np.nan, attention - 0.01)
    top = np.array([11, 12, 22, 45])
    path = tmp_path / "heatmap.geojson"
    shown = attention_shown(attention, "relative", 1.0)
    write_geojson(path, coords, 100, {"attention": attention, "contribution": contribution}, shown, top)
    features = json.loads(path.read_text())["features"]
    tiles = [each for each in features if each["properties"]["objectType"] == "detection"]
    assert len(tiles) == len(coords)
    for i, tile in enumerate(tiles):
        ring = np.array(tile["geometry"]["coordinates"][0])
        np.testing.assert_array_equal(ring[0], ring[-1])
        np.testing.assert_array_equal([ring.min(0), ring.max(0)], [coords[i], coords[i] + 100])
        assert tile["properties"]["measurements"]["attention"] == attention[i]
        assert ("contribution" in tile["properties"]["measurements"]) == (i != 3)
        assert tile["properties"]["classification"] == {"name": "tile", "color": [128, 128, 128]}
    found = [each for each in features if each["properties"]["objectType"] == "annotation"]
    assert [each["properties"]["name"] for each in found] == ["attended region 1", "attended region 2"]
    assert found[0]["properties"]["measurements"] == {"tiles": 3.0, "attention": pytest.approx(0.7)}
    # QuPath's files are ours to read too: the regions hold the centres of their tiles and of no other.
    (first, second) = read_annotations(path, ["tile"]).inside
    centres = coords + 50
    assert np.flatnonzero(Outline(first.rings[0]).contains_points(centres)).tolist() == [11, 12, 22]
    assert np.flatnonzero(Outline(second.rings[0]).contains_points(centres)).tolist() == [45]
    unknown, again = np.where(np.arange(len(coords)) == 11, np.nan, attention), tmp_path / "again.geojson"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_geojson(again, coords, 100, {"attention": unknown}, shown, top)
    assert not again.exists()


@settings(deadline=None, max_examples=80)
@given(cells=st.lists(st.booleans(), min_size=36, max_size=36), gap=st.integers(0, 1))
def test_outlines_of_regions_hold_exactly_their_tiles(cells: list[bool], gap: int) -> None:
    """Any pattern of tiles, corner contacts and holes among them, also on a grid whose columns are rounded apart by a pixel."""
    coords = grid(60, 60, 10)
    coords = coords + gap * (coords[:, :1] > 20) * [1, 0]
    top = np.flatnonzero(cells)
    found = regions(coords, 10, top, np.ones(36))
    assert sorted(row for _, rows in found for row in rows.tolist()) == top.tolist()
    centres = coords + 5.0
    for rings, rows in found:
        inside = np.zeros(36, bool)
        for ring in rings:
            assert ring[0] == ring[-1] and len(ring) >= 5
            assert len({tuple(point) for point in ring[:-1]}) == len(ring) - 1  # no ring touches itself
            inside ^= Outline(np.array(ring)).contains_points(centres)
        assert np.flatnonzero(inside).tolist() == sorted(rows.tolist())
        areas = [signed_area(ring) for ring in rings]
        assert areas[0] > 0 and all(area < 0 for area in areas[1:]) and sum(areas) == 100 * len(rows)


def signed_area(ring: list[list[int]]) -> float:
    x, y = np.array(ring, float).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


# --- display ---


def test_displays() -> None:
    attention = np.array([0.1, 0.6, 0.3])
    np.testing.assert_allclose(attention_shown(attention, "relative", 9.0).values, [0.3, 1.8, 0.9])
    assert attention_shown(attention, "relative", 9.0).high == pytest.approx(1.8)
    np.testing.assert_allclose(attention_shown(attention, "rank", 9.0).values, [0, 1, 0.5])
    assert attention_shown(attention, "global", 9.0).high == 9.0
    with pytest.raises(ValueError, match="expected relative, rank, global"):
        attention_shown(attention, "hot", 1.0)
    assert common_limit([np.full(100, 0.01), np.full(50, 0.02)]) == pytest.approx(1.0)
    signed = signed_shown(np.array([-0.5, 2.0]), "w")
    assert (signed.low, signed.high) == (-2.0, 2.0) and len(signed.gradient()) == 9
    red, blue = signed.rgb(np.array([2.0, -2.0]))
    assert red[0] > red[2] and blue[2] > blue[0]  # orange supports, violet speaks against


@pytest.mark.parametrize(("width_um", "length"), [(1000, 200), (800, 200), (20_000, 5000), (799, 100), (4, 1)])
def test_scale_bars_are_round(width_um: float, length: float) -> None:
    assert bar_um(width_um) == pytest.approx(length)


def write_both(folder: Path, bright: tuple[Reader, int, tuple[int, int], int]) -> float:
    """Overlay and values of the bright square; µm per pixel of their base."""
    reader, _, corner, size = bright
    plan, place = whole_slide(reader, MPP, 1100), np.array([corner])
    shown = attention_shown(np.array([1.0]), "relative", 1.0)
    write_overlay(folder / "attention.ome.tif", place, size, shown, read_picture(reader, plan), plan, 0.5, 90)
    write_values(folder / "values.ome.tif", place, size, {"attention": np.ones(1), "contribution": np.ones(1)}, plan)
    return plan.mpp


def test_the_overlay_opens_as_a_slide(tmp_path: Path, store: Store, bright: tuple[Reader, int, tuple[int, int], int]) -> None:
    """Our own slide reader finds µm per pixel in the OME-XML, the levels, and the lit square where it belongs."""
    mpp = write_both(tmp_path, bright)
    opened = open_slide(tmp_path / "attention.ome.tif", store)
    assert opened.layout.mpp == pytest.approx(mpp) and [level.width for level in opened.layout.levels] == [1025, 512, 256]
    _, _, corner, size = bright
    middle = [int((place + size / 2) * MPP / mpp) for place in corner]
    red, green, _ = opened.region(0, *middle, 1, 1)[0, 0].astype(int)
    assert red - green > 30


def test_ome_types_reads_both_files(tmp_path: Path, bright: tuple[Reader, int, tuple[int, int], int]) -> None:
    """tlambert03/ome-types checks the XML against the schema of OME."""
    ome_types = pytest.importorskip("ome_types", reason="ome-types is not installed")
    mpp = write_both(tmp_path, bright)
    for name, channels in (("attention.ome.tif", 3), ("values.ome.tif", 2)):
        pixels = ome_types.from_tiff(tmp_path / name).images[0].pixels
        assert pixels.physical_size_x == pixels.physical_size_y == mpp and pixels.physical_size_x_unit.value == "µm"
        assert (pixels.size_x, pixels.size_y, pixels.size_c) == (1025, 1025, channels)
    assert [channel.name for channel in pixels.channels] == ["attention", "contribution"]
