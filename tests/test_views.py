"""Views: the same pixels as torchvision for the same parameters, the intended laws, and draws that only step and slot decide."""

from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from scipy import stats
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from histoscale.data import views
from histoscale.data.keys import keys
from histoscale.data.views import Views, ViewsConfig, make_views


def config(name: str = "demo", **changes: Any) -> ViewsConfig:
    text = (resources.files("histoscale.configs") / "views" / f"{name}.yaml").read_text()
    return replace(TypeAdapter(ViewsConfig).validate_python(yaml.safe_load(text)), **changes)


PLAIN = {"hed_p": 0.0, "jitter_p": 0.0, "grey_p": 0.0, "global_blur_p": [0.0, 0.0], "local_blur_p": 0.0}
MANY = keys(0, "draws", 0, torch.arange(10_000))


def images(count: int, side: int) -> torch.Tensor:
    """Smooth colour with texture: what clamping and resampling meet in practice."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    return (smooth + 0.1 * torch.randn(count, 3, side, side, generator=generator)).clamp(0, 1)


def patches(count: int, side: int = 64) -> torch.Tensor:
    return (images(count, side) * 255).round().to(torch.uint8)


@pytest.mark.parametrize(("side", "px"), [(64, 48), (256, 98), (64, 96)])
def test_crop_equals_torchvision(side: int, px: int) -> None:
    x = images(6, side)
    boxes = views.crop_boxes(keys(3, "test", 0, torch.arange(12)), side, (0.1, 0.9), (0.75, 4 / 3))
    symmetry = torch.zeros(12, 3, dtype=torch.bool)
    ours = views.crop(x, boxes, symmetry, px)
    for row, (top, left, height, width) in enumerate(boxes.int().tolist()):
        theirs = tv.resized_crop(x[row % 6], top, left, height, width, [px, px], InterpolationMode.BICUBIC, antialias=True)
        assert torch.allclose(ours[row], theirs.clamp(0, 1), atol=1e-5)


def test_crop_of_everything_at_native_size_is_the_patch() -> None:
    x = images(2, 32)
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0]] * 2, dtype=torch.float64)
    assert torch.allclose(views.crop(x, boxes, torch.zeros(2, 3, dtype=torch.bool), 32), x, atol=1e-6)


def test_symmetries_are_flips_and_a_transpose() -> None:
    x = images(1, 16).expand(8, -1, -1, -1)
    boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0]] * 8, dtype=torch.float64)
    symmetry = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)
    ours = views.crop(x, boxes, symmetry, 16)
    for row, (rows, columns, transposed) in enumerate(symmetry.tolist()):
        expected = x[0].flip([1] * rows + [2] * columns)
        assert torch.allclose(ours[row], expected.transpose(1, 2) if transposed else expected, atol=1e-6)


def test_the_eight_symmetries_are_equally_likely() -> None:
    symmetry = views.symmetries(MANY, config()).long()
    counts = torch.bincount(symmetry @ torch.tensor([4, 2, 1]), minlength=8).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("turn", range(4))
def test_quarter_turns_are_rotations(turn: int) -> None:
    """Without flips only the four rotations remain, each a quarter of the time."""
    symmetry = views.symmetries(MANY, config(hflip=0.0, vflip=0.0)).tolist()
    x = images(1, 8)[0]
    rotated = torch.rot90(x, turn, (1, 2))
    same = 0
    for rows, columns, transposed in ([False, False, False], [False, True, True], [True, True, False], [True, False, True]):
        moved = x.flip([1] * rows + [2] * columns)
        moved = moved.transpose(1, 2) if transposed else moved
        if torch.equal(moved, rotated):
            same += symmetry.count([rows, columns, transposed])
    assert abs(same - 2500) < 3 * (10_000 * 0.25 * 0.75) ** 0.5


def test_colour_jitter_equals_torchvision() -> None:
    x = images(20, 24)
    draws = torch.tensor([[1.3, 0.7, 1.4, 0.1], [0.7, 1.4, 0.5, -0.1], [1, 1, 1, 0], [1.1, 0.9, 0.0, 0.5]]).repeat(5, 1)
    ours = views.colour_jitter(x, draws)
    for row, (brightness, contrast, saturation, hue) in enumerate(draws.tolist()):
        theirs = tv.adjust_contrast(tv.adjust_brightness(x[row], brightness), contrast)
        theirs = tv.adjust_hue(tv.adjust_saturation(theirs, saturation), hue)
        assert torch.allclose(ours[row], theirs, atol=2 / 255)


def test_neutral_jitter_changes_nothing() -> None:
    x = images(3, 16)
    assert torch.allclose(views.colour_jitter(x, torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 3)), x, atol=1e-6)


def test_grey_equals_torchvision() -> None:
    x = images(3, 16)
    assert torch.allclose(views.saturate(x, torch.zeros(3)), tv.rgb_to_grayscale(x, 3), atol=1e-3)


@pytest.mark.parametrize("kernel_px", [5, 9])
def test_blur_equals_torchvision(kernel_px: int) -> None:
    x = images(4, 24)
    sigma = torch.tensor([0.1, 0.7, 2.0, 0.0])
    ours = views.blur(x, sigma, kernel_px)
    for row in range(3):
        theirs = tv.gaussian_blur(x[row], [kernel_px, kernel_px], [float(sigma[row])] * 2)
        assert torch.allclose(ours[row], theirs, atol=1e-5)
    assert torch.allclose(ours[3], x[3], atol=1e-6)


def test_solarize_equals_torchvision() -> None:
    pixels = patches(4)
    plain = config(**PLAIN, mean=[0.0] * 3, std=[1.0] * 3)
    before = make_views(pixels, 0, 0, torch.arange(4), plain).globals
    after = make_views(pixels, 0, 0, torch.arange(4), replace(plain, global_solarize_p=[0.0, 1.0])).globals
    assert torch.equal(after[:4], before[:4])
    assert torch.allclose(after[4:], tv.solarize(before[4:], 128 / 255), atol=1e-6)


def test_box_law_equals_torchvisions() -> None:
    """Areas and aspect ratios of accepted boxes, two-sample Kolmogorov-Smirnov against torchvision's own sampler."""
    from torchvision.transforms import RandomResizedCrop

    ours = views.crop_boxes(MANY, 224, (0.05, 0.32), (0.75, 4 / 3))
    torch.manual_seed(0)
    blank = torch.empty(3, 224, 224)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, [0.05, 0.32], [0.75, 4 / 3]) for _ in range(4000)])
    for law in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert stats.ks_2samp(law(ours.double()).numpy(), law(theirs.double()).numpy()).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2] <= 224).all() and (ours[:, 1] + ours[:, 3] <= 224).all() and (ours >= 0).all()


def test_realised_frequencies_are_the_asked_ones() -> None:
    """Blur, the draw that public code inverted (facebookresearch/dinov3#286): per view, within three standard deviations."""
    on = views.chosen(MANY, "blur", [1.0, 0.1]).unflatten(0, (2, -1)).mean(1)
    assert on[0] == 1 and abs(on[1] - 0.1) < 3 * (0.1 * 0.9 / 5000) ** 0.5
    for name, p in (("jitter", 0.8), ("grey", 0.2)):
        assert abs(views.chosen(MANY, name, [p]).mean() - p) < 3 * (p * (1 - p) / 10_000) ** 0.5


def test_jitter_draws_follow_their_strengths() -> None:
    draws = views.jitter_draws(MANY, config(jitter_p=1.0, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1))
    for column, (centre, strength) in enumerate([(1, 0.4), (1, 0.3), (1, 0.2), (0, 0.1)]):
        assert stats.kstest((draws[:, column].numpy() - centre) / strength, stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_only_step_and_slot_decide() -> None:
    """Any batch that holds a slot gives it the same views; another step or seed gives others."""
    pixels, slots = patches(8), torch.arange(100, 108)
    settings = config()
    whole = make_views(pixels, 1, 5, slots, settings)
    part = make_views(pixels[4:], 1, 5, slots[4:], settings)
    by_slot = Views(*(x.unflatten(0, (-1, 8))[:, 4:].flatten(0, 1) for x in whole))
    assert torch.allclose(part.globals, by_slot.globals, atol=1e-5) and torch.allclose(part.locals, by_slot.locals, atol=1e-5)
    for seed, step in ((2, 5), (1, 6)):
        assert not torch.allclose(make_views(pixels, seed, step, slots, settings).globals, whole.globals, atol=1e-2)
    assert not torch.allclose(whole.globals[:8], whole.globals[8:], atol=1e-2)


def test_shapes_normalisation_and_the_global_generator() -> None:
    state = torch.get_rng_state()
    made = make_views(patches(3), 0, 0, torch.arange(3), config(local_count=0, global_count=2, global_px=32))
    assert made.globals.shape == (6, 3, 32, 32) and made.locals.shape == (0, 3, 24, 24)
    assert made.globals.dtype == torch.float32 and made.globals.min() >= -1 and made.globals.max() <= 1
    assert torch.equal(state, torch.get_rng_state())


def test_every_key_changes_something() -> None:
    changes = {
        "global_px": 32, "global_scale": [0.9, 1.0], "local_count": 2, "local_px": 16, "local_scale": [0.8, 0.9],
        "ratio": [1.0, 1.0], "hflip": 0.0, "vflip": 0.0, "quarter_turns": False,
        "hed_p": 0.0, "hed_sigma_od": 0.1, "jitter_p": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0,
        "hue": 0.0, "grey_p": 0.0, "global_blur_p": [1.0, 1.0], "local_blur_p": 1.0,
        "blur_kernel_px": 3, "blur_sigma_px": [2.0, 3.0], "global_solarize_p": [1.0, 0.0], "mean": [0.4] * 3, "std": [0.4] * 3,
    }  # fmt: skip
    pixels, slots = patches(8), torch.arange(8)
    start = config(global_blur_p=[0.5, 0.5])
    reference = make_views(pixels, 0, 0, slots, start)
    for name, value in changes.items():
        made = make_views(pixels, 0, 0, slots, replace(start, **{name: value}))
        same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(made, reference, strict=True))
        assert not same, name


def test_lists_must_have_one_entry_a_view() -> None:
    with pytest.raises(ValueError, match="global_blur_p"):
        make_views(patches(2), 0, 0, torch.arange(2), config(global_blur_p=[0.5]))
