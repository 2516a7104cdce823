"""HED jitter in natural-log optical density, one draw an image and stain."""

import numpy as np
import torch

from histoscale.data.stain import HED, hed_jitter


def naive(image: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Per pixel, in float64: separate, change, mix."""
    stains = np.array(HED)
    density = -np.log(image.transpose(1, 2, 0) + 1e-6)
    concentration = density @ np.linalg.inv(stains)
    moved = np.exp(-((concentration * scale + shift) @ stains)) - 1e-6
    return moved.clip(0, 1).transpose(2, 0, 1)


def test_equals_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand(5, 3, 16, 16, generator=generator) * 0.9 + 0.05
    scale, shift = 1 + 0.2 * torch.randn(5, 3, generator=generator), 0.2 * torch.randn(5, 3, generator=generator)
    expected = np.stack([naive(*(v.double().numpy() for v in row)) for row in zip(rgb, scale, shift, strict=True)])
    assert np.abs(hed_jitter(rgb, scale, shift).numpy() - expected).max() < 1e-4
    exact = hed_jitter(rgb.double(), scale.double(), shift.double()).numpy()
    assert np.abs(exact - expected).max() < 1e-10


def test_no_jitter_is_the_identity() -> None:
    rgb = torch.linspace(0, 1, 3 * 64).view(1, 3, 8, 8)
    assert (hed_jitter(rgb, torch.ones(1, 3), torch.zeros(1, 3)) - rgb).abs().max() < 1 / 255


def test_a_shift_is_measured_in_natural_log_optical_density() -> None:
    """The unit that public code confuses: 0.1 on haematoxylin adds 0.1 of its vector to the optical density."""
    rgb = torch.full((1, 3, 4, 4), 0.5)
    moved = hed_jitter(rgb, torch.ones(1, 3), torch.tensor([[0.1, 0.0, 0.0]]))
    assert torch.allclose(-moved.log() + rgb.log(), 0.1 * torch.tensor(HED[0]).view(1, 3, 1, 1), atol=1e-4)


def test_a_constant_image_stays_constant() -> None:
    rgb = torch.tensor([0.7, 0.4, 0.6]).view(1, 3, 1, 1).expand(1, 3, 9, 9)
    moved = hed_jitter(rgb, torch.tensor([[1.2, 0.8, 1.1]]), torch.tensor([[0.1, -0.1, 0.05]]))
    assert (moved - moved[:, :, :1, :1]).abs().max() < 1e-6


def test_rgb_is_not_changed_in_place() -> None:
    rgb = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    before = rgb.clone()
    hed_jitter(rgb, torch.full((2, 3), 1.1), torch.full((2, 3), 0.1))
    assert torch.equal(rgb, before)
