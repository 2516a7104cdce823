"""CLAM's loss of the tiles: written out, for slides of any size, with and without exclusive classes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mil_fixtures import AGGREGATORS, TASK, cohort, features_of, fit_config, parts, quiet
from torch import nn

from histoscale.eval.mil.aggregators.clam import Clam, ClamConfig, instance_loss
from histoscale.eval.mil.bags import read_bags
from histoscale.eval.mil.fit import fit, pad
from histoscale.eval.mil.task import RegressionTask

CONFIG = ClamConfig(
    "clam", hidden=16, attention=8, dropout=0.0, attention_dropout=0.0, tiles=4, subtyping=False, instance_weight=0.3
)


def scene(tiles: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, nn.ModuleList]:
    torch.manual_seed(tiles)
    return torch.randn(tiles, 5), torch.randn(tiles).softmax(0), nn.ModuleList(nn.Linear(5, 2) for _ in range(classes))


@pytest.mark.parametrize("tiles", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("subtyping", [False, True])
def test_the_most_attended_tiles_against_the_least(tiles: int, subtyping: bool) -> None:
    hidden, attention, classifiers = scene(tiles)
    order = np.argsort(-attention.numpy())
    k = min(4, tiles // 2)
    losses = []
    for number, classifier in enumerate(classifiers):
        lse = torch.log_softmax(classifier(hidden), 1).detach().numpy()
        top = lse[order[: max(k, 1)]]
        if number == 1:
            losses.append(-np.concatenate([top[:, 1], lse[order[tiles - k :], 0]]).mean())
        elif subtyping:
            losses.append(-top[:, 0].mean())
    found = instance_loss(hidden, attention, 1, classifiers, replace(CONFIG, subtyping=subtyping))
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_padding_takes_no_part_and_the_two_losses_are_weighed() -> None:
    torch.manual_seed(0)
    model = Clam(6, 3, CONFIG)
    bags, labels = [torch.randn(n, 6) for n in (3, 20)], torch.tensor([2, 0])
    x, mask = pad(bags)
    x[0, 3:] = 100.0
    together = model.mix(torch.tensor(5.0), model(x, mask), mask, labels)
    alone = []
    for bag, label in zip(bags, labels, strict=True):
        real = torch.ones(1, len(bag), dtype=torch.bool)
        found = model(bag[None], real)
        assert found.hidden is not None
        alone.append(instance_loss(found.hidden[0], found.attention[0], int(label), model.instances, CONFIG))
    assert together.item() == pytest.approx(0.7 * 5 + 0.3 * torch.stack(alone).mean().item(), rel=1e-5)


def test_it_learns_and_refuses_numbers(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("stores")
    slides = cohort(folder)
    bags = read_bags(folder, slides, TASK, "patient")
    trial, features = parts(bags), features_of(bags)
    fitted = fit(bags, trial.train, features, TASK, fit_config(AGGREGATORS["clam"], repeats=1), quiet())
    found = np.array([fitted.read(i, features).output[0] for i in trial.internal])
    labels = bags.labels(trial.internal)
    assert (found[labels == 1][:, None] > found[labels == 0][None]).mean() > 0.9
    weight = fitted.ensemble.models[0].aggregator.state_dict()["instances.1.weight"]
    assert weight.abs().max() > 0.25 + 1e-3  # beyond where they start: the tiles' classifiers are trained too
    with pytest.raises(ValueError, match="the task is regression: take mil=abmil"):
        fit(bags, trial.train, features, RegressionTask("regression", "n", "number", "slide"), fit_config(CONFIG), quiet())


@pytest.mark.parametrize("changed", [{"tiles": 0}, {"instance_weight": 1.0}])
def test_configurations_without_sense(changed: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least one tile"):
        replace(CONFIG, **changed)  # type: ignore[arg-type]
