"""Aggregators: what padding, order, company and chunks must not change, and what a tile's share and absence mean."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_fixtures import ABMIL, AGGREGATORS
from torch import Tensor

from histoscale.eval.mil.aggregators.pooled import Aggregator, Tiles
from histoscale.eval.mil.ensemble import build_aggregator
from histoscale.eval.mil.fit import pad

KINDS = tuple(AGGREGATORS)


def built(kind: str, outputs: int = 2, seed: int = 0) -> Aggregator:
    torch.manual_seed(seed)
    return build_aggregator(AGGREGATORS[kind], 6, outputs).double().eval()


def alone(bag: Tensor) -> tuple[Tensor, Tensor]:
    return bag[None], torch.ones(1, len(bag), dtype=torch.bool)


def tiles_of(bag: Tensor, chunk: int = 100) -> Tiles:
    return Tiles(bag.numpy(), torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64), chunk)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_padding_order_and_company_change_nothing(kind: str, sizes: list[int], seed: int) -> None:
    model = built(kind, seed=seed)
    bags = [torch.randn(n, 6, dtype=torch.float64) for n in sizes]
    x, mask = pad(bags)
    x = torch.cat([x, torch.full((len(sizes), 3, 6), 1e3, dtype=torch.float64)], 1)  # what stands in the padding must not matter
    mask = torch.cat([mask, torch.zeros(len(sizes), 3, dtype=torch.bool)], 1)
    found = model(x, mask)
    torch.testing.assert_close(found.attention.sum(1), torch.ones(len(sizes), dtype=torch.float64))
    assert (found.attention[~mask] == 0).all()
    for i, bag in enumerate(bags):
        order = torch.randperm(len(bag))
        single = model(*alone(bag[order]))
        torch.testing.assert_close(single.attention[0], found.attention[i, : len(bag)][order])
        torch.testing.assert_close(single.logits[0], found.logits[i])


@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_twice_is_the_same_bag(kind: str) -> None:
    model = built(kind)
    bag = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(model(*alone(torch.cat([bag, bag]))).logits, model(*alone(bag)).logits)
    torch.testing.assert_close(model(*alone(bag[:1].repeat(7, 1))).logits, model(*alone(bag[:1])).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", [1, 2, 23])
def test_a_slide_in_chunks_reads_like_a_bag(kind: str, tiles: int) -> None:
    model = built(kind)
    bag = torch.randn(tiles, 6, dtype=torch.float64)
    expected = model(*alone(bag))
    for size in (5, 100):
        found = model.whole(tiles_of(bag, size))
        torch.testing.assert_close(found.logits, expected.logits[0])
        torch.testing.assert_close(found.attention, expected.attention[0])
        torch.testing.assert_close(model.logits(tiles_of(bag, size)), expected.logits[0])
    if expected.tiles is not None:
        torch.testing.assert_close(found.contribution.sum(0), found.logits)
        torch.testing.assert_close(found.contribution, (expected.attention[..., None] * expected.tiles)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peak", [1.0, 60.0])
def test_without_a_tile_is_the_bag_of_the_others(kind: str, peak: float) -> None:
    """peak 60: one tile holds all the attention but a rounding error, and dividing by what is left would give noise."""
    model = built(kind)
    bag = torch.randn(8, 6, dtype=torch.float64)
    bag[3] *= peak
    found = model.whole(tiles_of(bag))
    assert found.without is not None
    for i in range(8):
        rest = torch.arange(8) != i
        torch.testing.assert_close(found.without[i], model(*alone(bag[rest])).logits[0])


def test_contribution_under_a_deep_classifier_is_the_gradient_times_its_input() -> None:
    """Against central differences: a tile's part of the pooled vector is scaled, which is to first order its contribution."""
    model = built("mlp_abmil")
    bag = torch.randn(9, 6, dtype=torch.float64)
    found = model.whole(tiles_of(bag))
    raw, hidden = model.parts(bag)  # type: ignore[operator]
    for i in (0, 5):
        share = found.attention[i] * hidden[i]
        z = found.attention @ hidden
        slope = (model.head(z + 1e-6 * share) - model.head(z - 1e-6 * share)) / 2e-6  # type: ignore[operator]
        torch.testing.assert_close(found.contribution[i], slope, rtol=1e-5, atol=1e-8)


def test_gated_attention_is_the_published_formula() -> None:
    torch.manual_seed(1)
    model = build_aggregator(ABMIL, 6, 1).double().eval()
    x = torch.randn(11, 6, dtype=torch.float64)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    h = np.maximum(x.numpy() @ weights["embed.0.weight"].T + weights["embed.0.bias"], 0)
    v = np.tanh(h @ weights["attend.content.weight"].T + weights["attend.content.bias"])
    u = 1 / (1 + np.exp(-(h @ weights["attend.gate.weight"].T + weights["attend.gate.bias"])))
    e = np.exp((v * u) @ weights["attend.weigh.weight"][0] + weights["attend.weigh.bias"])
    pooled = (e / e.sum()) @ h
    expected = pooled @ weights["classify.0.weight"][0] + weights["classify.0.bias"][0]
    found = model(*alone(x))
    np.testing.assert_allclose(found.attention[0].detach().numpy(), e / e.sum())
    assert found.logits.item() == pytest.approx(expected)


def test_the_strongest_tile_gives_all_its_logits() -> None:
    model = built("max", outputs=3)
    bag = torch.randn(9, 6, dtype=torch.float64)
    found = model(*alone(bag))
    assert found.tiles is not None
    torch.testing.assert_close(found.logits[0], found.tiles[0, found.tiles[0].amax(1).argmax()])
