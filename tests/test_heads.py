"""Projection heads: the definition, weight norm as an explicit pair, and what each option changes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from histoscale.pretrain.heads import Head, HeadConfig

CONFIG = HeadConfig(prototypes=12, hidden=16, bottleneck=6, scale="trainable", batch_norm=False)


def test_equals_the_definition() -> None:
    torch.manual_seed(0)
    head, x = Head(8, CONFIG).double(), torch.randn(5, 8, dtype=torch.float64)
    assert head.last_scale is not None
    with torch.no_grad():
        head.last_scale.uniform_(0.5, 2)
    first, second, third = (layer for layer in head.mlp if isinstance(layer, torch.nn.Linear))
    y = third(F.gelu(second(F.gelu(first(x)))))
    y = y / y.norm(dim=1, keepdim=True)
    weight = head.last_scale * head.last_direction / head.last_direction.norm(dim=1, keepdim=True)
    assert torch.allclose(head(x), y @ weight.T, atol=1e-10)


def test_logits_are_cosines_at_first() -> None:
    torch.manual_seed(0)
    logits = Head(8, CONFIG)(torch.randn(100, 8))
    assert logits.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("scale", "names"),
    [("trainable", {"last_direction", "last_scale"}), ("frozen", {"last_direction"}), ("none", {"last_direction"})],
)
def test_the_last_layer_has_what_its_scale_needs(scale: str, names: set[str]) -> None:
    torch.manual_seed(0)
    head = Head(8, replace(CONFIG, scale=scale))
    assert {name for name, _ in head.named_parameters() if name.startswith("last")} == names
    with torch.no_grad():
        before = head(torch.ones(1, 8))
        head.last_direction *= 3
        assert torch.allclose(head(torch.ones(1, 8)), before, atol=1e-6) == (scale != "none")


def test_first_weights() -> None:
    """Truncated normal of 0.02 with biases at zero, and prototypes of length 1 (facebookresearch/dinov2)."""
    torch.manual_seed(0)
    head = Head(64, HeadConfig(prototypes=500, hidden=256, bottleneck=128, scale="trainable", batch_norm=False))
    for layer in head.mlp:
        if isinstance(layer, torch.nn.Linear):
            assert abs(layer.weight.std().item() - 0.02) < 1e-3 and abs(layer.weight.mean().item()) < 1e-3
            assert layer.weight.abs().max() < 0.1 and not layer.bias.any()
    assert head.last_scale is not None and (head.last_scale == 1).all()
    assert abs(head.last_direction.std().item() - 0.02) < 1e-3


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 1e-6), (torch.bfloat16, 1e-12), (torch.float32, 1e-12)])
def test_the_norm_is_bounded_below_by_what_the_precision_can_bear(dtype: torch.dtype, least: float) -> None:
    """Tokens half as long as the bound come out half as long, and none divides by zero; the norm is taken in float32."""
    head = Head(6, replace(CONFIG, scale="none"))
    head.mlp = torch.nn.Sequential()
    x = torch.zeros(2, 6, dtype=dtype)
    x[0, 0] = least / 2
    with torch.no_grad():
        head.last_direction.copy_(torch.eye(12, 6))
        logits = head(x)
    short = x[0, 0].item() / least  # about a half: float16 has few numbers there
    assert logits.dtype == torch.float32 and abs(logits[0, 0].item() - short) < 1e-5 and not logits[1].any()


def test_batch_norm_uses_the_batch_and_keeps_no_state() -> None:
    torch.manual_seed(0)
    head, x = Head(8, replace(CONFIG, batch_norm=True)), torch.randn(6, 8)
    assert not list(head.buffers())
    assert not torch.allclose(head(x)[:3], head(x[:3]), atol=1e-3)


def test_unknown_scale() -> None:
    with pytest.raises(ValueError, match="scale='learned'"):
        Head(8, replace(CONFIG, scale="learned"))
