"""From mpp to level and factor; one resampling without seams."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from histoscale.data.readers.pyramid import Damage, Layout
from histoscale.data.readers.scale import Scale, choose_scale, read_scaled


class Picture:
    """A reader of one array; white outside; `holes` are undecodable."""

    layout = Layout("tiff", (), None, None, None)

    def __init__(self, pixels: np.ndarray, hole: Damage | None = None) -> None:
        self.pixels, self.hole = pixels, hole

    def region(self, level: int, x: int, y: int, width: int, height: int, damage: list[Damage] | None = None) -> np.ndarray:
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
        (0.5, Scale(0, 0.5, 0.5 / 0.252)),
        (1.0, Scale(1, 1.008, 1.0)),
        (2.0, Scale(1, 2.0, 2.0 / 1.008)),
        (4.1, Scale(2, 4.032, 1.0)),
        (16.0, Scale(2, 16.0, 16.0 / 4.032)),
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
    elif scale.factor == 1.0:
        assert abs(scale.mpp / target - 1) <= tolerance and scale.mpp == mpps[scale.level]
    else:
        assert scale.mpp == target and scale.factor == pytest.approx(target / mpps[scale.level])
        assert scale.factor >= 1 / most * (1 - 1e-9)


def test_a_target_must_be_positive() -> None:
    with pytest.raises(ValueError, match="target_mpp is 0"):
        choose_scale([0.5], 0, 0.05, 1.0)


@pytest.mark.parametrize("factor", [2.0, 1.37, 3.968, 0.8])
def test_equals_antialiased_cubic_of_torch(factor: float, draw_tissue: object) -> None:
    pixels = draw_tissue(512, 512, whole=True)  # type: ignore[operator]
    side = int(400 / factor)
    ours = read_scaled(Picture(pixels), Scale(0, 1.0, factor), 0, 0, side, side)
    framed = np.pad(pixels, ((40, 0), (40, 0), (0, 0)), constant_values=255)[:520, :520].astype(float)
    grid = sample_cubic(framed, 40.0, factor, side)
    assert np.abs(ours.astype(float) - grid.clip(0, 255)).max() <= 1.5  # 8-bit fixed point, twice rounded
    if factor == 2.0:
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(pixels[:400, :400]).permute(2, 0, 1)[None], size=(200, 200), mode="bicubic", antialias=True
        )[0].permute(1, 2, 0).numpy()
        inner = slice(4, -4)
        assert np.abs(ours.astype(int) - theirs)[inner, inner].max() <= 1


def sample_cubic(pixels: np.ndarray, start: float, factor: float, side: int) -> np.ndarray:
    """Keys' cubic (a = -0.5), widened by the factor when shrinking, centred on every output pixel: float [side, side, 3]."""
    width = max(factor, 1.0)
    centres = start + (np.arange(side) + 0.5) * factor
    distance = np.abs(np.arange(pixels.shape[0])[None] + 0.5 - centres[:, None]) / width
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("ar,rcx,bc->abx", weights, pixels, weights, optimize=True)


@given(st.integers(-50, 300), st.integers(-50, 300))
def test_no_seam_where_two_regions_meet(x: int, y: int) -> None:
    rng = np.random.default_rng(1)
    reader = Picture(rng.integers(0, 256, (400, 400, 3), np.uint8))
    scale = Scale(0, 1.0, 2.0)
    whole = read_scaled(reader, scale, x, y, 60, 40)
    right = read_scaled(reader, scale, x + 60, y, 30, 40)
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
