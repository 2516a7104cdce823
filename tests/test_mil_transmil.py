"""TransMIL: bags that keep to themselves, attention that sums to one, gradients that mean what they say, and its order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_fixtures import TASK, TRANSMIL, cohort, features_of, fit_config, parts, quiet

from histoscale.eval.mil.aggregators.pooled import Tiles
from histoscale.eval.mil.aggregators.transmil import NystromAttention, Transmil, pseudo_inverse
from histoscale.eval.mil.bags import read_bags
from histoscale.eval.mil.ensemble import Ensemble, SlideModel
from histoscale.eval.mil.fit import fit, pad


def tiles_of(bag: torch.Tensor, chunk: int = 100) -> Tiles:
    return Tiles(bag.numpy(), torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64), chunk)


def built(outputs: int = 2, seed: int = 0) -> Transmil:
    torch.manual_seed(seed)
    return Transmil(6, outputs, TRANSMIL).double().eval()


@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_padding_and_company_change_nothing(sizes: list[int], seed: int) -> None:
    model = built(seed=seed)
    bags = [torch.randn(n, 6, dtype=torch.float64) for n in sizes]
    x, mask = pad(bags)
    x = torch.cat([x, torch.full((len(sizes), 3, 6), 1e3, dtype=torch.float64)], 1)
    mask = torch.cat([mask, torch.zeros(len(sizes), 3, dtype=torch.bool)], 1)
    found = model(x, mask)
    torch.testing.assert_close(found.attention.sum(1), torch.ones(len(sizes), dtype=torch.float64))
    assert (found.attention[~mask] == 0).all() and found.tiles is None
    for i, bag in enumerate(bags):
        single = model.whole(tiles_of(bag, 7))
        torch.testing.assert_close(single.attention, found.attention[i, : len(bag)])
        torch.testing.assert_close(single.logits, found.logits[i])
        torch.testing.assert_close(model.logits(tiles_of(bag, 7)), found.logits[i])
        assert single.without is None


def test_the_order_of_the_tiles_counts() -> None:
    """Said on the label: whoever makes it order-free changes the model."""
    model, bag = built(), torch.randn(20, 6, dtype=torch.float64)
    assert (model.logits(tiles_of(bag)) - model.logits(tiles_of(bag.flip(0)))).abs().max() > 1e-6


def test_with_a_landmark_a_token_it_is_plain_attention() -> None:
    """As many landmarks as tokens: the approximation is exact once the pseudo-inverse has converged."""
    torch.manual_seed(0)
    layer = NystromAttention(replace(TRANSMIL, landmarks=12, iterations=30)).double().eval()
    x = torch.randn(12, 16, dtype=torch.float64)
    q, k, v = layer.to_qkv(x).view(12, 3, 2, 8).permute(1, 2, 0, 3)
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    mixed = weights @ v + layer._convolved(v)
    found, first = layer(x)
    torch.testing.assert_close(found, layer.to_out(mixed.transpose(0, 1).flatten(1)), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(first, weights[:, 0], rtol=1e-5, atol=1e-7)


def test_pseudo_inverse() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 9, 9, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(x, 40), torch.linalg.pinv(x), rtol=1e-6, atol=1e-6)


def test_contribution_is_the_gradient_times_the_tile() -> None:
    """Against central differences: scaling one tile a little changes each logit by its contribution."""
    model, bag = built(), torch.randn(11, 6, dtype=torch.float64)
    found = model.whole(tiles_of(bag))
    for i in (0, 10):
        scaled = [bag.clone(), bag.clone()]
        scaled[0][i] *= 1 + 1e-6
        scaled[1][i] *= 1 - 1e-6
        slope = (model.logits(tiles_of(scaled[0])) - model.logits(tiles_of(scaled[1]))) / 2e-6
        torch.testing.assert_close(found.contribution[i], slope, rtol=1e-4, atol=1e-7)


def test_in_an_ensemble_there_is_no_closed_form_without_a_tile() -> None:
    torch.manual_seed(0)
    ensemble = Ensemble([SlideModel(6, TRANSMIL, 1) for _ in range(2)], 6, 1, TRANSMIL, "binary")
    tiles = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float16)
    reading = ensemble.read(tiles)
    assert ensemble.occlusion(tiles) is None and reading.attention.sum() == pytest.approx(1)
    np.testing.assert_allclose(reading.logits, ensemble.logits(tiles), rtol=1e-5)


def test_it_learns(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("stores")
    task = replace(TASK, label="grade", positive=["c"], negative=["a", "b"])
    bags = read_bags(folder, cohort(folder, patients=32), task, "patient")
    trial, features = parts(bags), features_of(bags)
    fitted = fit(bags, trial.train, features, task, fit_config(TRANSMIL, folds=2, repeats=1, epochs=12), quiet())
    found = np.array([fitted.read(i, features).output[0] for i in trial.internal])
    labels = bags.labels(trial.internal)
    assert (found[labels == 1][:, None] > found[labels == 0][None]).mean() > 0.8
