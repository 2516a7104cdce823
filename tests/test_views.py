"""Views: the same pixels as torchvision for the same parameters, the intended laws, and draws that only step and slot decide."""

from collections import Counter
from dataclasses import fields, replace
from importlib import resources
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from histoscale.data import augment, views
from histoscale.data.keys import keys
from histoscale.data.views import BlurConfig, Views, ViewsConfig, make_views


def config(name: str = "demo", preset: str | None = None, **changes: Any) -> ViewsConfig:
    folder = resources.files("histoscale.configs") / "views"
    values = yaml.safe_load((folder / f"{name}.yaml").read_text())
    chosen = preset or values.pop("defaults")[0]["blur"]
    values.pop("defaults", None)
    values["blur"] = yaml.safe_load((folder / "blur" / f"{chosen}.yaml").read_text())
    return replace(TypeAdapter(ViewsConfig).validate_python(values), **changes)


SHARP = BlurConfig(global_p=[0.0, 0.0], local_p=0.0, kernel_px=5, sigma_px=[0.1, 1.0])
PLAIN = {"hed_p": 0.0, "jitter_p": 0.0, "grey_p": 0.0, "blur": SHARP, "mean": [0.0] * 3, "std": [1.0] * 3}
MANY = keys(0, "draws", 0, torch.arange(10_000))


def images(count: int, side: int) -> torch.Tensor:
    """Smooth colour with texture: what clamping and resampling meet in practice."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    return (smooth + 0.1 * torch.randn(count, 3, side, side, generator=generator)).clamp(0, 1)


def patches(count: int, side: int = 64) -> torch.Tensor:
    return (images(count, side) * 255).round().to(torch.uint8)


def whole(side: int, count: int) -> torch.Tensor:
    return torch.tensor([[0.0, 0.0, side, side]] * count, dtype=torch.float64)


@pytest.mark.parametrize(
    ("side", "px", "scale", "ratio"),
    [(64, 48, (0.1, 0.9), 4 / 3), (256, 98, (0.05, 0.32), 4 / 3), (64, 96, (0.1, 0.9), 4 / 3), (256, 24, (0.9, 1.0), 1.02),
     (200, 96, (0.5, 2.0), 4 / 3)],
)  # fmt: skip
def test_crop_equals_torchvision(side: int, px: int, scale: tuple[float, float], ratio: float) -> None:
    """Shrinking, enlarging, whole patches: with every symmetry."""
    pixels = patches(6, side)
    area = (scale[0] * side**2, scale[1] * side**2)
    boxes = views.crop_boxes(keys(3, "test", 0, torch.arange(24)), side, area, (1 / ratio, ratio))
    symmetry = torch.cartesian_prod(*[torch.tensor([False, True])] * 3).repeat(3, 1)
    ours = augment.crop(augment.lines(pixels), boxes, symmetry, px, float(boxes[:, 2:].max()))
    for row, (top, left, height, width) in enumerate(boxes.int().tolist()):
        x = pixels[row % 6].float() / 255
        theirs = tv.resized_crop(x, top, left, height, width, [px, px], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        rows, columns, transposed = symmetry[row].tolist()
        theirs = theirs.flip([1] * rows + [2] * columns)
        assert torch.allclose(ours[row], theirs.transpose(1, 2) if transposed else theirs, atol=1e-5)


def test_crop_of_everything_at_native_size_is_the_patch() -> None:
    pixels = patches(2, 32)
    ours = augment.crop(augment.lines(pixels), whole(32, 2), torch.zeros(2, 3, dtype=torch.bool), 32, 32)
    assert torch.allclose(ours, pixels / 255, atol=1e-6)


def test_boxes_are_never_longer_than_the_taps_were_counted_for() -> None:
    """One tap too few would cut the kernel off in silence."""
    for name, side in (("default", 256), ("demo", 64), ("ect", 392), ("default", 224)):
        settings = config(name)
        kinds = ((settings.global_px, settings.global_scale), (settings.local_px, settings.local_scale))
        for px, scale in kinds:
            area, longest = views.crop_area("", px, scale, side, settings)
            boxes = views.crop_boxes(MANY, side, area, settings.ratio)
            assert boxes[:, 2:].max() <= longest <= side
            flat = torch.zeros(len(MANY), dtype=torch.bool)
            reach = boxes[:500, 2] / px
            wide = augment.resize_taps(boxes[:500, 0], boxes[:500, 2], flat[:500], px, augment.needed_taps(longest, px) + 2)[1]
            assert (wide[..., -2:] == 0).all() and reach.max() > 0.5


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


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_colour_jitter_equals_torchvision(order: tuple[int, ...]) -> None:
    x = images(20, 24)
    draws = torch.tensor([[1.3, 0.7, 1.4, 0.1], [0.7, 1.4, 0.5, -0.1], [1, 1, 1, 0], [1.1, 0.9, 0.0, 0.5]]).repeat(5, 1)
    ours = augment.colour_jitter(x, draws, order)
    changes = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for row, values in enumerate(draws.tolist()):
        theirs = x[row]
        for operation in order:
            theirs = changes[operation](theirs, values[operation])
        assert torch.allclose(ours[row], theirs, atol=2 / 255)


def test_neutral_jitter_changes_nothing() -> None:
    x = images(3, 16)
    assert torch.allclose(augment.colour_jitter(x, torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 3), range(4)), x, atol=1e-6)


def test_orders_of_the_jitter_are_uniform() -> None:
    """All 24 as often over the steps, and independent between views: as torchvision's random permutation."""
    drawn = [[tuple(views.jitter_order(0, step, view)) for step in range(4800)] for view in ("global/0", "local/3")]
    for orders in drawn:
        assert stats.chisquare(list(Counter(orders).values())).pvalue > 1e-3 and len(set(orders)) == 24
    alike = sum(a == b for a, b in zip(*drawn, strict=True))
    assert stats.binomtest(alike, 4800, 1 / 24).pvalue > 1e-3


def test_grey_equals_torchvision() -> None:
    x = images(3, 16)
    assert torch.allclose(augment.saturate(x, torch.zeros(3)), tv.rgb_to_grayscale(x, 3), atol=1e-3)


@pytest.mark.parametrize("kernel_px", [5, 9])
def test_blur_equals_torchvision(kernel_px: int) -> None:
    x = images(4, 24)
    sigma = torch.tensor([0.1, 0.7, 2.0, 0.0])
    ours = augment.blur(x, sigma, kernel_px)
    for row in range(3):
        theirs = tv.gaussian_blur(x[row], [kernel_px, kernel_px], [float(sigma[row])] * 2)
        assert torch.allclose(ours[row], theirs, atol=1e-5)
    assert torch.allclose(ours[3], x[3], atol=1e-6)


def test_solarize_equals_torchvision() -> None:
    pixels = patches(4)
    plain = config(**PLAIN)
    before = make_views(pixels, 0, 0, torch.arange(4), plain).globals
    after = make_views(pixels, 0, 0, torch.arange(4), replace(plain, global_solarize_p=[0.0, 1.0])).globals
    assert torch.equal(after[:4], before[:4])
    assert torch.allclose(after[4:], tv.solarize(before[4:], 128 / 255), atol=1e-6)


@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.32, 1.0)])
def test_box_law_equals_torchvisions(scale: tuple[float, float]) -> None:
    """Areas, aspect ratios and places of boxes, two-sample Kolmogorov-Smirnov against torchvision v2's own sampler."""
    torch.manual_seed(0)
    sampler, blank = v2.RandomResizedCrop(224, scale=scale, ratio=(0.75, 4 / 3)), torch.empty(3, 224, 224)
    made = [sampler.make_params([blank]) for _ in range(4000)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in made])
    ours = views.crop_boxes(MANY, 224, [s * 224**2 for s in scale], (0.75, 4 / 3))
    laws = (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0] + b[:, 2] / 2, lambda b: b[:, 1])
    for law in laws:
        assert stats.ks_2samp(law(ours.double()).numpy(), law(theirs.double()).numpy()).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2] <= 224).all() and (ours[:, 1] + ours[:, 3] <= 224).all() and (ours >= 0).all()


def test_extended_context_translation_keeps_cells_at_their_size() -> None:
    """arXiv 2408.00738: views of 224 and 98 px from 392 px, areas 0.9-1.1 of the view's own, aspect 0.95-1.05, anywhere."""
    settings = config("ect")
    assert (settings.global_px, settings.local_px) == (224, 98) and settings.global_scale == settings.local_scale == [0.9, 1.1]
    for px in (224, 98):
        area, _ = views.crop_area("", px, [0.9, 1.1], 392, settings)
        boxes = views.crop_boxes(MANY, 392, area, settings.ratio).numpy()
        height, width = boxes[:, 2], boxes[:, 3]
        assert np.abs(height * width / px**2 - 1).max() < 0.1 + 1.2 / px and np.abs(width / height - 1).max() < 0.05 + 1.2 / px
        jittered = height * width / px**2 + np.random.default_rng(0).uniform(-0.5, 0.5, len(height)) / px
        assert stats.kstest(jittered, stats.uniform(0.9, 0.2).cdf).statistic < 0.03
        for corner, free in ((boxes[:, 0], 393 - height), (boxes[:, 1], 393 - width)):
            spread = (corner + np.random.default_rng(1).uniform(size=len(corner))) / free
            assert stats.kstest(spread, "uniform").pvalue > 1e-3
    with pytest.raises(ValueError, match="sampler.patch_px to at least 242"):
        make_views(patches(2, 224), 0, 0, torch.arange(2), settings)


def test_realised_frequencies_are_the_asked_ones() -> None:
    """Blur, the draw that public code inverted (facebookresearch/dinov3#286): per view, within three standard deviations."""
    for name, listed in (("blur_intended", [1.0, 0.1]), ("blur_dinov2_released", [0.0, 0.9])):
        blur = config("default", name).blur
        assert (blur.global_p, blur.local_p) == (listed, 0.5)
        on = views.chosen(MANY, "blur", blur.global_p).float().unflatten(0, (2, -1)).mean(1)
        for found, p in zip(on.tolist(), listed, strict=True):
            assert abs(found - p) <= 3 * (p * (1 - p) / 5000) ** 0.5
    for name, p in (("jitter", 0.8), ("grey", 0.2)):
        assert abs(views.chosen(MANY, name, [p]).float().mean() - p) < 3 * (p * (1 - p) / 10_000) ** 0.5


@pytest.mark.parametrize("name", ["blur_intended", "blur_dinov2_released"])
def test_as_many_views_are_blurred_as_the_preset_says(name: str) -> None:
    """In the pixels: views that differ from those of the same draws without blur, over 1,000 patches, within three deviations."""
    blur = replace(config("default", name).blur, sigma_px=[0.5, 2.0])  # one near 0.1 moves less than a float can show
    pixels = patches(250, 16)
    small = {"global_px": 8, "local_px": 8, "local_count": 1}
    on = []
    for step in range(4):
        slots = torch.arange(250)
        sharp, soft = (make_views(pixels, 0, step, slots, config(**PLAIN | small | {"blur": b})) for b in (SHARP, blur))
        changed = [(a - b).abs().amax((1, 2, 3)) > 1e-7 for a, b in zip(sharp, soft, strict=True)]
        on.append(torch.cat(changed).view(3, 250))
    share = torch.cat(on, 1).float().mean(1).tolist()
    for found, p in zip(share, [*blur.global_p, blur.local_p], strict=True):
        assert abs(found - p) <= 3 * (p * (1 - p) / 1000) ** 0.5


def test_parameters_follow_torchvisions_laws() -> None:
    """Jitter factors, hue and the blur's sigma: two-sample Kolmogorov-Smirnov against torchvision v2's own draws."""
    strengths = (0.4, 0.3, 1.5, 0.1)  # above 1, factors stop at 0
    torch.manual_seed(0)
    jitter = v2.ColorJitter(*strengths)
    made = [jitter.make_params([]) for _ in range(4000)]
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    settings = config(**dict(zip(("brightness", "contrast", "saturation", "hue"), strengths, strict=True)))
    draws = views.jitter_draws(MANY, settings).numpy()
    for column, name in enumerate(names):
        assert stats.ks_2samp(draws[:, column], [float(p[name]) for p in made]).pvalue > 1e-3
    sigma = v2.GaussianBlur(9, (0.1, 2.0))
    theirs = [sigma.make_params([])["sigma"][0] for _ in range(4000)]
    assert stats.ks_2samp(views.spread(MANY, "sigma", 0.1, 2.0).numpy(), theirs).pvalue > 1e-3


def test_stain_draws_are_uniform_and_independent() -> None:
    """Factors in 1 +- sigma, shifts in +- sigma (arXiv 1808.05896), one of each an image and stain."""
    draws = views.hed_draws(MANY, 0.2)
    moved = (draws - torch.tensor([[1.0], [0.0]])).flatten(1).numpy()
    for column in moved.T:
        assert stats.kstest(column / 0.2, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(moved.T) - np.eye(6)).max() < 0.05


def test_only_step_and_slot_decide() -> None:
    """Any batch that holds a slot gives it the same views; another step or seed gives others."""
    pixels, slots = patches(8), torch.arange(100, 108)
    settings = config()
    whole = make_views(pixels, 1, 5, slots, settings)
    part = make_views(pixels[4:], 1, 5, slots[4:], settings)
    by_slot = Views(*(x.unflatten(0, (-1, 8))[:, 4:].flatten(0, 1) for x in whole))
    assert torch.equal(part.globals, by_slot.globals) and torch.equal(part.locals, by_slot.locals)
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
    changes: dict[str, Any] = {
        "global_px": 32, "global_scale": [0.9, 1.0], "local_count": 3, "local_px": 16, "local_scale": [0.8, 0.9],
        "ratio": [1.0, 1.0], "scale_of": "view", "hflip": 0.0, "vflip": 0.0, "quarter_turns": False,
        "hed_p": 0.0, "hed_sigma_od": 0.1, "jitter_p": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0,
        "hue": 0.0, "grey_p": 0.0, "global_solarize_p": [1.0, 0.0], "mean": [0.4] * 3, "std": [0.4] * 3,
    }  # fmt: skip
    pixels, slots = patches(8), torch.arange(8)
    start = config(blur=BlurConfig(global_p=[0.5, 0.5], local_p=0.0, kernel_px=5, sigma_px=[0.1, 1.0]))
    blurs = {"global_p": [1.0, 1.0], "local_p": 1.0, "kernel_px": 3, "sigma_px": [2.0, 3.0]}
    changes |= {f"blur.{name}": replace(start.blur, **{name: value}) for name, value in blurs.items()}
    assert {name.split(".")[0] for name in changes} | {"global_count"} == {field.name for field in fields(ViewsConfig)}
    assert set(blurs) == {field.name for field in fields(BlurConfig)}
    reference = make_views(pixels, 0, 0, slots, start)
    for name, value in changes.items():
        made = make_views(pixels, 0, 0, slots, replace(start, **{name.split(".")[0]: value}))
        same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(made, reference, strict=True))
        assert not same, name


def test_lists_must_have_one_entry_a_view() -> None:
    with pytest.raises(ValueError, match="blur.global_p"):
        make_views(patches(2), 0, 0, torch.arange(2), config(blur=replace(SHARP, global_p=[0.5])))
    with pytest.raises(ValueError, match="global_solarize_p"):
        make_views(patches(2), 0, 0, torch.arange(2), config(global_solarize_p=[0.5]))
