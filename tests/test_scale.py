"""From mpp to level and factor; one resampling without seams."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from histoscale.data.readers.pyramid import Canvas, Damage, Layout, Level
from histoscale.data.readers.scale import Scale, choose_scale, read_scaled, reduction

NONE = np.zeros(0, np.int64)


def level(tile: int, compression: str = "jpeg") -> Level:
    return Level(4096, 4096, tile, tile, 1.0, compression, "rgb", 1, b"", NONE, NONE)


class Picture:
    """A reader of one array; white outside; `holes` are undecodable."""

    layout = Layout("tiff", (level(64),), None, None, None)

    def __init__(self, pixels: np.ndarray, hole: Damage | None = None) -> None:
        self.pixels, self.hole = pixels, hole
        self.reduced: list[int] = []

    def region(
        self, level: int, x: int, y: int, width: int, height: int, damage: list[Damage] | None = None, reduce: int = 1,
        wanted: np.ndarray | None = None, canvas: Canvas | None = None,
    ) -> np.ndarray:  # fmt: skip
        self.reduced.append(reduce)
        if reduce > 1:
            whole = self.region(level, x * reduce, y * reduce, width * reduce, height * reduce)
            return np.asarray(Image.fromarray(whole).reduce(reduce))
        pad = 200
        framed = np.pad(self.pixels, ((pad, pad), (pad, pad), (0, 0)), constant_values=255)
        if self.hole is not None and damage is not None:
            left, right = max(self.hole.left - x, 0), min(self.hole.right - x, width)
            top, bottom = max(self.hole.top - y, 0), min(self.hole.bottom - y, height)
            if left < right and top < bottom:
                damage.append(Damage(left, top, right, bottom))
        return framed[y + pad : y + pad + height, x + pad : x + pad + width]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.25, Scale(0, 0.252, 1.0)),  # within 5 %: as it is, its true mpp recorded
        (0.26, Scale(0, 0.252, 1.0)),
        (0.5, Scale(0, 0.504, 2.0)),  # twice a stored level is within 5 %: averaged over squares
        (0.6, Scale(0, 0.6, 0.6 / 0.252)),
        (1.0, Scale(1, 1.008, 1.0)),
        (2.0, Scale(1, 2.016, 2.0)),
        (2.6, Scale(1, 2.6, 2.6 / 1.008)),
        (4.1, Scale(2, 4.032, 1.0)),
        (16.0, Scale(2, 16.128, 4.0)),
        (0.2, Scale(0, 0.2, 0.2 / 0.252)),
        (0.1, None),
    ],
)
def test_level_and_factor(target: float, expected: Scale | None) -> None:
    assert choose_scale([0.252, 1.008, 4.032], target, 0.05, 1.5) == expected


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.floats(0.05, 20), st.floats(0, 0.1), st.floats(1, 4))
def test_scales_are_what_they_promise(mpps: list[float], target: float, tolerance: float, most: float) -> None:
    scale = choose_scale(mpps, target, tolerance, most)
    if scale is None:
        assert min(mpps) > target * most * (1 - 1e-9) and min(mpps) > target * (1 + tolerance) * (1 - 1e-9)
    elif scale.factor in (1.0, 2.0, 4.0, 8.0) and scale.mpp == mpps[scale.level] * scale.factor:
        assert abs(scale.mpp / target - 1) <= tolerance
    else:
        assert scale.mpp == target and scale.factor == pytest.approx(target / mpps[scale.level])
        assert scale.factor >= 1 / most * (1 - 1e-9)


def test_a_target_must_be_positive() -> None:
    with pytest.raises(ValueError, match="target_mpp is 0"):
        choose_scale([0.5], 0, 0.05, 1.0)


@pytest.mark.parametrize(
    ("factor", "tile", "expected"),
    [
        (1.0, 64, 1),
        (2.0, 64, 2),
        (4.0, 64, 4),
        (8.0, 64, 8),
        (8.0, 100, 4),
        (2.0, 99, 1),
        (3.9, 64, 1),
        (4.1, 64, 2),
        (16.0, 64, 8),
    ],
)
def test_what_decodes_at_reduced_scale(factor: float, tile: int, expected: int) -> None:
    assert reduction(Scale(0, 1.0, factor), level(tile)) == expected
    assert reduction(Scale(0, 1.0, 8.0), level(99, "openslide")) == 8


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("corner", [(0, 0), (16, 8), (13, 7)])
def test_whole_factors_are_averages(factor: int, corner: tuple[int, int], draw_tissue: object) -> None:
    pixels = draw_tissue(512, 512, whole=True)  # type: ignore[operator]
    side, (x, y) = 400 // factor, corner
    picture = Picture(pixels)
    ours = read_scaled(picture, Scale(0, 1.0, float(factor)), x, y, side, side)
    squares = pixels[y : y + side * factor, x : x + side * factor].reshape(side, factor, side, factor, 3)
    assert np.abs(ours - squares.mean((1, 3))).max() <= 0.5 + 1e-6
    assert factor in picture.reduced if x % factor == y % factor == 0 else factor not in picture.reduced


def test_averages_of_averages(draw_tissue: object) -> None:
    """A factor of 8 where tiles decode to a quarter at most."""
    pixels = draw_tissue(512, 512, whole=True)  # type: ignore[operator]
    picture = Picture(pixels)
    picture.layout = Layout("tiff", (level(100),), None, None, None)
    ours = read_scaled(picture, Scale(0, 1.0, 8.0), 8, 16, 40, 30)
    squares = pixels[16 : 16 + 240, 8 : 8 + 320].reshape(30, 8, 40, 8, 3)
    assert picture.reduced[0] == 4 and np.abs(ours - squares.mean((1, 3))).max() <= 1.01


@pytest.mark.parametrize(("factor", "kernel"), [(1.37, "hamming"), (3.968, "hamming"), (0.8, "cubic")])
def test_other_factors_are_one_antialiased_resampling(factor: float, kernel: str, draw_tissue: object) -> None:
    pixels = draw_tissue(512, 512, whole=True)  # type: ignore[operator]
    side = int(400 / factor)
    ours = read_scaled(Picture(pixels), Scale(0, 1.0, factor), 0, 0, side, side)
    framed = np.pad(pixels, ((40, 0), (40, 0), (0, 0)), constant_values=255)[:520, :520].astype(float)
    grid = sample(framed, 40.0, factor, side, kernel)
    assert np.abs(ours.astype(float) - grid.clip(0, 255)).max() <= 1.5  # 8-bit fixed point, twice rounded


def sample(pixels: np.ndarray, start: float, factor: float, side: int, kernel: str) -> np.ndarray:
    """A kernel widened by the factor when shrinking, centred on every output pixel: float [side, side, 3]. cubic: Keys, a = -0.5;
    hamming: sinc under Hamming's window."""
    width = max(factor, 1.0)
    centres = start + (np.arange(side) + 0.5) * factor
    distance = np.abs(np.arange(pixels.shape[0])[None] + 0.5 - centres[:, None]) / width
    if kernel == "cubic":
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    else:
        window = 0.54 + 0.46 * np.cos(np.pi * distance)
        weights = np.where(distance < 1, np.sinc(distance) * window, 0)
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("ar,rcx,bc->abx", weights, pixels, weights, optimize=True)


@given(st.integers(-50, 300), st.integers(-50, 300))
def test_no_seam_where_two_regions_meet(x: int, y: int) -> None:
    rng = np.random.default_rng(1)
    reader = Picture(rng.integers(0, 256, (400, 400, 3), np.uint8))
    for factor, step in ((2.0, 60), (1.5, 45)):
        scale = Scale(0, 1.0, factor)
        whole = read_scaled(reader, scale, x, y, 60, 40)
        right = read_scaled(reader, scale, x + step, y, 30, 40)
        np.testing.assert_array_equal(whole[:, 30:], right)


def test_unscaled_pixels_are_untouched() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (100, 100, 3), np.uint8)
    np.testing.assert_array_equal(read_scaled(Picture(pixels), Scale(0, 0.5, 1.0), 10, 20, 30, 40), pixels[20:60, 10:40])


@pytest.mark.parametrize("factor", [1.0, 1.7, 3.0])
def test_damage_covers_every_pixel_that_changed(factor: float) -> None:
    pixels = np.full((400, 400, 3), 120, np.uint8)
    hole = Damage(128, 100, 200, 164)
    pixels[hole.top : hole.bottom, hole.left : hole.right] = 255
    damage: list[Damage] = []
    side = int(300 / factor)
    found = read_scaled(Picture(pixels, hole), Scale(0, 1.0, factor), 20, 30, side, side, damage)
    marked = np.zeros((side, side), bool)
    for part in damage:
        marked[part.top : part.bottom, part.left : part.right] = True
    assert (found[~marked] == 120).all() and (found[marked] == 255).any()
    assert marked.sum() < 2.5 * (72 + 8 * factor) * (64 + 8 * factor) / factor**2
