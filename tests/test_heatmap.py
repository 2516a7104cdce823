"""Heatmaps: every pixel belongs to the tile that holds its centre, at any downsample, on slides that are really read."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow.parquet import read_table

from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.heatmap import HeatmapConfig, Thumbnail, Tiles, bar_um, choose, displayed, draw, paint, read_thumbnail
from histoscale.eval.mil.pointing import coverage, pointing, read_foci
from histoscale.eval.scores.interval import IntervalConfig

CONFIG = HeatmapConfig(slides=6, longest_px=400, display="relative", opacity=0.6, level_tolerance=0.1, seed=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(StorageConfig({}, "fsspec", str(tmp_path / "cache"), 1 << 20, 5.0, 5.0))


def tiles_of(coords: np.ndarray, size_px: int, attention: np.ndarray) -> Tiles:
    return Tiles(coords, size_px, attention, attention * 2 - 0.1)


# --- geometry ---


@settings(deadline=None, max_examples=150)
@given(
    x=st.integers(0, 500),
    y=st.integers(0, 500),
    size=st.integers(1, 200),
    downsample=st.one_of(st.just(1.0), st.just(4.0), st.just(32.0085), st.floats(1, 70)),
)
def test_a_tile_lights_the_pixels_whose_centres_it_holds(x: int, y: int, size: int, downsample: float) -> None:
    side = int(600 / downsample)
    field = paint(np.array([[x, y]]), size, np.array([2.0]), side, side, downsample)
    centres = (np.arange(side) + 0.5) * downsample
    inside = ((centres >= y) & (centres < y + size))[:, None] & ((centres >= x) & (centres < x + size))[None]
    np.testing.assert_array_equal(field == 2, inside)
    assert np.isnan(field[~inside]).all()


@settings(deadline=None, max_examples=60)
@given(size=st.integers(20, 200), downsample=st.floats(1, 19))
def test_neighbours_leave_no_gap_and_do_not_overlap(size: int, downsample: float) -> None:
    """A grid of tiles with value = its number: every pixel carries exactly the number of the tile that its centre lies in."""
    columns, rows = 7, 5
    coords = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2) * size
    height, width = (int(n * size / downsample) for n in (rows, columns))
    field = paint(coords, size, np.arange(len(coords), dtype=float), height, width, downsample)
    down, across = (((np.arange(n) + 0.5) * downsample // size).astype(int) for n in (height, width))
    np.testing.assert_array_equal(field, down[:, None] * columns + across[None])


def test_tiles_that_overlap_share_the_mean_and_the_rest_has_no_value() -> None:
    field = paint(np.array([[0, 0], [2, 0]]), 4, np.array([1.0, 3.0]), 4, 8, 1.0)
    np.testing.assert_array_equal(field[0, :6], [1, 1, 2, 2, 3, 3])
    assert np.isnan(field[:, 6:]).all()


@pytest.mark.parametrize("shrunk", [2, 3.2, 4, 7.9])
def test_a_bright_square_lights_exactly_its_pixels_on_a_real_pyramid(tmp_path: Path, store: Store, shrunk: float) -> None:
    """A slide with a white square, and a level that samples level 0 at its pixels' centres: the painted tile is that square,
    read back through the reader, on level 0 and on the level, whole downsample or not."""
    side, size, (x, y) = 1280, 192, (448, 320)
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[y : y + size, x : x + size] = 255
    small = int(side / shrunk)
    at = np.floor((np.arange(small) + 0.5) * side / small).astype(int)
    path = tmp_path / "square.tiff"
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(64, 64), photometric="rgb", compression="deflate")
        file.write(pixels[at][:, at], tile=(64, 64), photometric="rgb", compression="deflate", subfiletype=1)
    layout = read_layout(str(path), store)
    reader = open_reader(str(path), layout, store)
    assert len(layout.levels) == 2
    for number, level in enumerate(layout.levels):
        seen = reader.region(number, 0, 0, level.width, level.height)[..., 0] == 255
        field = paint(np.array([[x, y]]), size, np.array([1.0]), level.height, level.width, level.downsample)
        np.testing.assert_array_equal(field == 1, seen)


def test_the_thumbnail_says_its_true_scale(tmp_path: Path, store: Store) -> None:
    """A square at a known place lies where downsample says, whether the level is taken as it is or shrunk."""
    side, size, (x, y) = 2000, 400, (1200, 800)
    pixels = np.full((side, side, 3), 255, np.uint8)
    pixels[y : y + size, x : x + size] = 0
    path = tmp_path / "square.tiff"
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="deflate")
    layout = read_layout(str(path), store)
    for longest in (2000, 700, 333):
        thumbnail = read_thumbnail(open_reader(str(path), layout, store), 0.5, longest, 0.1)
        assert abs(max(thumbnail.pixels.shape) - longest) <= 1 and thumbnail.mpp == pytest.approx(0.5 * thumbnail.downsample)
        dark = np.argwhere(thumbnail.pixels[..., 0] < 128)
        expected = np.array([y, x]) / thumbnail.downsample
        np.testing.assert_allclose(dark.min(0), expected, atol=1)
        np.testing.assert_allclose(dark.max(0) + 1, expected + size / thumbnail.downsample, atol=1)


# --- the figure ---


def test_the_figure_shows_the_lit_tile_and_keeps_the_raw_numbers(tmp_path: Path) -> None:
    pixels = np.full((240, 320, 3), 230, np.uint8)
    coords = np.stack(np.meshgrid(np.arange(5), np.arange(4)), -1).reshape(-1, 2) * 256
    attention = np.full(20, 0.01)
    attention[7] = 0.81
    ring = np.array([[512, 256], [768, 256], [768, 512], [512, 512], [512, 256]], float)
    path = tmp_path / "maps" / "s.png"
    draw(path, Thumbnail(pixels, 4.0, 2.0), tiles_of(coords, 256, attention), [ring], "slide s", CONFIG)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    half = picture.shape[1] // 2
    warm = (picture[..., 0] - picture[..., 2] > 45).sum(0)
    assert warm[:half].sum() == 0 and warm[half:].sum() > 500  # the lit tile is red, on the right panel alone
    cyan = (picture[..., 2] - picture[..., 0] > 100).sum(0)
    assert cyan[:half].sum() > 50 and cyan[half:].sum() > 50
    table = read_table(path.with_suffix(".parquet"))
    assert table["attention"].to_pylist() == attention.tolist() and table["x"].to_pylist() == coords[:, 0].tolist()
    assert set(table.column_names) == {"x", "y", "width", "height", "attention", "contribution"}
    again = tmp_path / "again.png"
    draw(again, Thumbnail(pixels, 4.0, 2.0), tiles_of(coords, 256, attention), [ring], "slide s", CONFIG)
    assert again.read_bytes() == path.read_bytes()


def test_displays() -> None:
    attention = np.array([0.1, 0.6, 0.3])
    np.testing.assert_allclose(displayed(attention, "relative")[0], [0.3, 1.8, 0.9])
    np.testing.assert_allclose(displayed(attention, "rank")[0], [0, 1, 0.5])
    with pytest.raises(ValueError, match="expected relative or rank"):
        HeatmapConfig(slides=1, longest_px=10, display="hot", opacity=0.5, level_tolerance=0.1, seed=0)


@pytest.mark.parametrize(("width_um", "length"), [(1000, 200), (800, 200), (20_000, 5000), (799, 100), (4, 1)])
def test_scale_bars_are_round(width_um: float, length: float) -> None:
    assert bar_um(width_um) == pytest.approx(length)


@given(labels=st.lists(st.integers(0, 1), max_size=40), slides=st.integers(0, 12), seed=st.integers(0, 99))
def test_slides_are_chosen_by_name_and_balanced(labels: list[int], slides: int, seed: int) -> None:
    names = [f"s{i}" for i in range(len(labels))]
    chosen = choose(names, labels, slides, seed)
    assert len(set(chosen)) == len(chosen) == min(slides, len(labels))
    positive = sum(labels[i] for i in chosen)
    enough = min(sum(labels), len(labels) - sum(labels)) >= slides // 2 + 1
    assert not enough or abs(2 * positive - slides) <= 1
    assert [names[i] for i in chosen] == [names[::-1][i] for i in choose(names[::-1], labels[::-1], slides, seed)]


# --- pointing ---


def test_coverage_is_the_share_of_the_tile_and_holes_are_outside() -> None:
    outer = np.array([[0, 0], [150, 0], [150, 200], [0, 200], [0, 0]], float)
    hole = np.array([[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]], float)[::-1]
    coords = np.array([[0, 0], [100, 0], [0, 100], [300, 300]])
    np.testing.assert_allclose(coverage(coords, 100, [outer]), [1, 0.5, 1, 0], atol=1e-9)
    np.testing.assert_allclose(coverage(coords, 100, [outer, hole]), [0, 0.5, 1, 0], atol=1e-9)
    np.testing.assert_array_equal(coverage(coords, 100, []), np.zeros(4))


def test_pointing_against_chance() -> None:
    config = IntervalConfig(draws=200, level=0.95, seed=0)
    rng = np.random.default_rng(0)
    covered = [np.where(rng.permutation(50) < 5, 0.3, 0.0) for _ in range(40)]
    patients = [f"p{i}" for i in range(40)]
    right = pointing([share + 0.01 for share in covered], covered, patients, config)
    assert right is not None and right.hits == 1 and right.chance == pytest.approx(0.1) and right.gain.low == pytest.approx(0.9)
    blind = pointing([rng.random(50) for _ in range(40)], covered, patients, config)
    assert blind is not None and blind.gain.low is not None and blind.gain.high is not None
    assert blind.gain.low < 0 < blind.gain.high
    unseen = pointing([np.ones(3)], [np.zeros(3)], ["p"], config)
    assert unseen is not None and unseen.hits == 0 and unseen.unseen == 1
    assert pointing([], [], [], config) is None


def test_foci_files(tmp_path: Path) -> None:
    path = tmp_path / "foci.geojson"
    square = [[0, 0], [1, 0], [1, 1], [0, 0]]
    shapes = [{"type": "Polygon", "coordinates": [square, square]}, {"type": "MultiPolygon", "coordinates": [[square], [square]]}]
    path.write_text(str({"features": [{"geometry": shape} for shape in shapes]}).replace("'", '"'))
    assert [ring.shape for ring in read_foci(path)] == [(4, 2)] * 4
    path.write_text('{"features": [{"geometry": {"type": "Point"}}]}')
    with pytest.raises(ValueError, match="no GeoJSON file of polygons"):
        read_foci(path)
