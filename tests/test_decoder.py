"""The decoder and its loss: size, order of operations, torch's own interpolation, and a loss by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from histoscale.eval.decoder import ConvDecoderWithImage, bilinear, dice_loss, new_decoder


@pytest.mark.parametrize("side", [14, 16, 28])
def test_shapes_and_parameters(side: int) -> None:
    decoder = ConvDecoderWithImage(384, 5).eval()
    assert sum(p.numel() for p in decoder.parameters()) == 250_245  # the reference's 250 k
    with torch.inference_mode():
        assert decoder(torch.zeros(2, side * side, 384), torch.zeros(2, 3, 224, 224)).shape == (2, 5, 224, 224)


def test_it_is_the_published_chain_of_operations() -> None:
    decoder = new_decoder(6, 4, 0, "test", 0).train()
    again = new_decoder(6, 4, 0, "test", 0).train()
    tokens, rgb = torch.randn(3, 16, 6), torch.randn(3, 3, 20, 20)
    x = F.interpolate(tokens.reshape(3, 4, 4, 6).permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    x = F.interpolate(again.tokens(x), (20, 20), mode="bilinear", align_corners=False)
    expected = again.classifier(again.image(torch.cat([x, rgb], dim=1)))
    torch.testing.assert_close(decoder(tokens, rgb), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(28, 224), (32, 224), (7, 20), (56, 50), (3, 3)])
def test_bilinear_is_torchs(old: int, new: int) -> None:
    x = torch.randn(2, 3, old, old + 1)
    torch.testing.assert_close(bilinear(x, new, new), F.interpolate(x, (new, new), mode="bilinear"), atol=3e-5, rtol=0)


def test_the_loss_by_hand() -> None:
    """Two pixels, two classes: p = (.75, .25) and (.5, .5), the truth 0 and 1."""
    logits = torch.log(torch.tensor([[[[0.75, 0.5]], [[0.25, 0.5]]]]))
    labels = torch.tensor([[[0, 1]]])
    first = 1 - (2 * 0.75 + 1e-5) / (1.25 + 1 + 1e-5)
    second = 1 - (2 * 0.5 + 1e-5) / (0.75 + 1 + 1e-5)
    assert float(dice_loss(logits, labels)) == pytest.approx((first + second) / 2, abs=1e-7)


def test_sums_run_over_the_batch() -> None:
    logits, labels = torch.randn(4, 3, 5, 5), torch.randint(0, 3, (4, 5, 5))
    joined = dice_loss(logits.permute(1, 0, 2, 3).reshape(1, 3, 20, 5), labels.reshape(1, 20, 5))
    assert float(dice_loss(logits, labels)) == pytest.approx(float(joined), abs=1e-6)


def test_ignored_pixels_leave_the_loss() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[:, :, 3] = 5
    expected = dice_loss(logits[..., :3], labels[..., :3])
    assert float(dice_loss(logits, labels, ignore=5)) == pytest.approx(float(expected), abs=1e-6)
    eva = dice_loss(logits, labels, ignore=5, masked_by="prediction")  # they are background with equal logits there
    filled = dice_loss(torch.where(labels[:, None] == 5, 0.0, logits), torch.where(labels == 5, 0, labels))
    assert float(eva) == pytest.approx(float(filled), abs=1e-6) and abs(float(eva) - float(expected)) > 1e-3


def test_weights_are_drawn_by_key_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second, other = (new_decoder(8, 3, 0, "run", run).classifier.weight for run in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_a_grid_that_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match="there are 6 patch tokens: expected a square grid"):
        ConvDecoderWithImage(4, 2)(torch.zeros(1, 6, 4), torch.zeros(1, 3, 8, 8))
    assert np.isfinite(float(dice_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long))))
