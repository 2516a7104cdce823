"""Policies: eva's pixels bit for bit, the encoder's own resize as it was, tiles where they must be, and what is said of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from histoscale.eval.resolution import ResolutionConfig, ResolutionError, View, sight_of, view_of

SIZES = [(96, 96), (32, 32), (20, 31), (75, 50), (50, 77), (33, 32), (301, 200)]  # height, width
EVA, RESIZE, NATIVE = (ResolutionConfig(name, None) for name in ("eva", "resize", "native"))


def image(height: int, width: int) -> np.ndarray:
    """uint8 [3, h, w] in memory as image files are decoded: channels last."""
    return np.random.default_rng((height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8).transpose(2, 0, 1)


def of_one(view: View, pixels: np.ndarray, uniform: bool = False) -> torch.Tensor:
    inputs, counts = view.inputs([pixels], uniform)
    assert counts.tolist() == [len(inputs)] and inputs.dtype in (torch.uint8, torch.float32)
    return inputs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("uniform", [True, False])
def test_eva_is_torchvisions_resize_and_centre_crop_on_uint8(size: tuple[int, int], uniform: bool) -> None:
    theirs = v2.Compose([v2.Resize(size=32, antialias=True), v2.CenterCrop(size=32)])
    pixels = image(*size)
    ours = of_one(view_of(32, "bicubic", EVA, None), pixels, uniform)
    assert ours.dtype == torch.uint8 and torch.equal(ours[0], theirs(torch.from_numpy(pixels.copy())))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(96, 96), (32, 32), (20, 20), (33, 33)])
def test_square_images_are_resized_as_ever(size: tuple[int, int], mode: str) -> None:
    pixels = image(*size)
    x = torch.from_numpy(pixels.copy())[None].float() / 255
    if size != (32, 32):
        x = F.interpolate(x, (32, 32), mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    assert torch.equal(of_one(view_of(32, mode, RESIZE, None), pixels), x)


@pytest.mark.parametrize("size", SIZES)
def test_resize_has_evas_geometry_and_the_encoders_interpolation(size: tuple[int, int]) -> None:
    modes = v2.InterpolationMode
    for mode, theirs in (("bicubic", modes.BICUBIC), ("bilinear", modes.BILINEAR)):
        x = torch.from_numpy(image(*size).copy()).float() / 255
        expected = v2.CenterCrop(32)(v2.Resize(32, theirs, antialias=True)(x).clamp(0, 1))
        assert torch.equal(of_one(view_of(32, mode, RESIZE, None), image(*size))[0], expected)


def test_native_cuts_the_centre_into_tiles_row_by_row() -> None:
    pixels = image(75, 101)  # 2 × 3 tiles of 32 px; 11 rows and 5 columns are left over
    found = of_one(view_of(32, "bicubic", NATIVE, 0.5), pixels)
    corners = [(5 + 32 * row, 2 + 32 * column) for row in range(2) for column in range(3)]
    expected = np.stack([pixels[:, y : y + 32, x : x + 32] for y, x in corners])
    assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), expected)


def test_native_at_a_target_resamples_the_whole_image_once() -> None:
    pixels = image(150, 202)
    found = of_one(view_of(32, "bilinear", ResolutionConfig("native", 1.0), 0.5), pixels)
    x = torch.from_numpy(pixels.copy())[None].float() / 255
    half = F.interpolate(x, (75, 101), mode="bilinear", antialias=True, align_corners=False)[0]
    assert found.shape == (6, 3, 32, 32) and torch.equal(found[4], half[:, 37:69, 34:66])


def test_native_enlarges_what_is_smaller_than_a_tile_and_says_so() -> None:
    view = view_of(32, "bicubic", NATIVE, 0.5)
    found = of_one(view, image(20, 50))
    x = torch.from_numpy(image(20, 50).copy())[None].float() / 255
    large = F.interpolate(x, (32, 80), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)[0]
    assert torch.equal(found, torch.stack([large[:, :, 8:40], large[:, :, 40:72]]))
    seen = sight_of(np.array([[20, 50], [75, 101]]), view, 0.5)
    assert seen.effective_mpp is not None and (seen.effective_mpp.low, seen.effective_mpp.high) == (0.5 * 20 / 32, 0.5)


def test_a_mixture_of_sizes_counts_its_tiles() -> None:
    view = view_of(32, "bicubic", NATIVE, None)
    with_equal_types = [image(64, 64), image(32, 40), image(100, 33)]
    inputs, counts = view.inputs(with_equal_types, False)
    assert counts.tolist() == [4, 1, 3] and len(inputs) == 8
    assert torch.equal(inputs[5:], of_one(view, image(100, 33)))


def test_an_encoder_of_any_size_sees_the_image_as_it_is() -> None:
    for config in (EVA, RESIZE, NATIVE):
        view = view_of(None, "bicubic", config, 0.5)
        assert view.identity == "whole" and np.array_equal(of_one(view, image(20, 31))[0].numpy(), image(20, 31))
    seen = sight_of(np.array([[20, 31]]), view, 0.5)
    assert str(seen) == "0.5 µm/px, a field of 10 µm"


def test_what_an_encoder_sees_is_told_in_numbers() -> None:
    """BACH at eva's resize is 2.88 µm/px and loses a quarter of the image; at 392 px 1.65; PCam is enlarged × 2.33
    (arithmetic of the sets' public sizes)."""
    bach, pcam = np.array([[1536, 2048]] * 3), np.array([[96, 96]])
    seen = sight_of(bach, view_of(224, "bicubic", EVA, 0.42), 0.42)
    assert seen.effective_mpp is not None and seen.effective_mpp.median == pytest.approx(2.88)
    assert seen.share.median == pytest.approx(0.75, abs=2e-3)
    assert str(seen) == "2.88 µm/px, a field of 645.1 µm, 75.2 % of the image"
    assert str(sight_of(bach, view_of(392, "bicubic", RESIZE, 0.42), 0.42)).startswith("1.646 µm/px")
    assert str(sight_of(pcam, view_of(224, "bicubic", EVA, 0.972), 0.972)) == "0.4166 µm/px, a field of 93.31 µm"
    tiled = sight_of(bach, view_of(224, "bicubic", ResolutionConfig("native", 0.5), 0.42), 0.42)
    assert tiled.tiles.median == 5 * 7 and tiled.effective_mpp is not None
    assert tiled.effective_mpp.median == pytest.approx(0.5, rel=1e-3)
    unknown = sight_of(np.array([[448, 448], [224, 300], [2240, 2240]]), view_of(224, "bicubic", RESIZE, None), None)
    assert unknown.effective_mpp is None and unknown.field_um is None
    assert str(unknown).startswith("unknown µm/px (images zoomed × 0.5 (0.1 to 1))")


def test_equal_scales_are_one_view_and_others_are_not() -> None:
    half = [view_of(32, "bicubic", ResolutionConfig("native", target), mpp) for target, mpp in ((0.5, 0.25), (1.0, 0.5))]
    assert half[0] == half[1] and half[0].identity != view_of(32, "bicubic", NATIVE, 0.5).identity
    assert view_of(32, "bicubic", EVA, 0.5) == view_of(32, "bilinear", EVA, 0.25)


@pytest.mark.parametrize("config, mpp, words", [
    (ResolutionConfig("crop", None), 0.5, "resolution is 'crop': expected one of resize, eva, native"),
    (ResolutionConfig("eva", 0.5), 0.5, "only resolution=native has a target, set null for eva"),
    (ResolutionConfig("native", 0.5), None, "unknown: set dataset.mpp="),
    (ResolutionConfig("native", 0.0), 0.5, "above 0"),
])  # fmt: skip
def test_what_cannot_be_followed_is_refused(config: ResolutionConfig, mpp: float | None, words: str) -> None:
    with pytest.raises(ResolutionError, match=words):
        view_of(32, "bicubic", config, mpp)
