"""The published recipes as configurations: each composes, trains a step or two and reads; their sizes are the published ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mil_fixtures import TASK, cohort, features_of, parts, quiet

from histoscale.eval.mil.aggregators.abmil import AbmilConfig
from histoscale.eval.mil.bags import read_bags
from histoscale.eval.mil.ensemble import SlideModel, build_aggregator
from histoscale.eval.mil.fit import FitConfig, fit
from histoscale.launch.config import choices, load

SLOW = pytest.mark.slow


def recipe(name: str) -> FitConfig:
    found: FitConfig = load("mil", [f"mil={name}", "embeddings=x", "manifest=y"]).config.mil
    return found


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name == "transmil" else ()) for name in choices("mil")])
def test_every_recipe_trains_and_reads(name: str, tmp_path: Path) -> None:
    bags = read_bags(tmp_path, cohort(tmp_path, patients=16), TASK, "patient")
    trial, features = parts(bags), features_of(bags)
    config = replace(recipe(name), folds=2, repeats=1, epochs=1)
    fitted = fit(bags, trial.train, features, TASK, config, quiet())
    untrained = SlideModel(bags.width, config.aggregator, 1)
    assert fitted.ensemble.models[0].state_dict().keys() == untrained.state_dict().keys()
    reading = fitted.read(trial.external[0], features)
    assert 0 < reading.output[0] < 1 and reading.attention.sum() == pytest.approx(1) and np.isfinite(reading.contribution).all()


@pytest.mark.parametrize(
    ("name", "width", "outputs", "parameters"),
    [
        # Linear 384-512, 512-512, attention 384 twice, its weight, classifier
        ("gma", 384, 2, (385 * 512) + (513 * 512) + 2 * (513 * 384) + 385 + 513 * 2),
        ("eva_abmil", 384, 1, (385 * 128) + 2 * (129 * 128) + 129 + (129 * 128) + (129 * 64) + 65),
        ("clam_sb", 1024, 2, 790_791),
        ("transmil", 1024, 2, 2_672_146),
    ],
)
def test_sizes(name: str, width: int, outputs: int, parameters: int) -> None:
    model = build_aggregator(recipe(name).aggregator, width, outputs)
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_size_of_mil_labs_abmil() -> None:
    """mahmoodlab/MIL-Lab counts 592,515 parameters for 384 features, 512 embedded, 384 in the attention, two classes."""
    config = AbmilConfig("abmil", [512], "relu", 384, True, [], 0.25, 0.25, "torch")
    assert sum(weight.numel() for weight in build_aggregator(config, 384, 2).parameters()) == 592_515
