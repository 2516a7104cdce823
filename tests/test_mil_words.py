"""What a study says of itself: the table a person reads, and limits that come from its numbers and go with them."""

from dataclasses import replace

import numpy as np
import pytest
from study_fixtures import BINARY, CONFIG, FIXED, FOLDS, INTERVAL, SITES, TASKS, made_bags, made_outputs, made_plan

from histoscale.eval.mil.decodability import DecodabilityConfig, decodability
from histoscale.eval.mil.floors import plain_floors
from histoscale.eval.mil.metrics import NAMES, headline
from histoscale.eval.mil.split import Check, FixedSplit, FoldSplit, SiteSplit
from histoscale.eval.mil.study import Study, study
from histoscale.eval.mil.task import Task
from histoscale.eval.mil.words import cannot_say, show


def done(
    task: Task, split: FixedSplit | FoldSplit | SiteSplit, patients: int = 120, noise: float = 1.0, slides: int = 1
) -> Study:
    bags = made_bags(task, patients, slides)
    plan = made_plan(bags, split)
    outputs = made_outputs(bags, plan, task, noise)
    return study(bags, plan, outputs, plain_floors(bags, plan, task, {}), task, INTERVAL, CONFIG)


@pytest.mark.parametrize("split", [FIXED, SITES], ids=lambda split: split.kind)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_is_said(task: Task, split: FixedSplit | SiteSplit) -> None:
    said = show(done(task, split), [], None)
    for words in (NAMES[headline(task)], "external", "near", "site prior", "model minus floor", "What this study cannot say"):
        assert words in said, words
    assert "nan" not in said and "diagnosis" in said


def test_limits_come_from_the_numbers_and_go_with_them() -> None:
    few, many = done(BINARY, FIXED, 60, 4.0), done(BINARY, FIXED, 900, 0.4)
    said = " ".join(cannot_say(few, [], None))
    for words in ("One external site (far, 20 patients)", "cannot prove a sensitivity of 0.95", "no gain is shown over"):
        assert words in said, words
    fewer = " ".join(cannot_say(many, [], None))
    for words in ("cannot prove", "no gain is shown", "chance is not excluded"):
        assert words not in fewer, words
    assert "chance is not excluded" in " ".join(cannot_say(done(BINARY, FIXED, 60, 50.0), [], None))


def test_sites_few_or_none() -> None:
    inside = replace(FOLDS, external_sites=[])
    assert "No external site was studied" in cannot_say(done(BINARY, inside), [], None)[0]
    said = " ".join(cannot_say(done(BINARY, SITES), [], None))
    assert "3 external sites (AUROC from" in said and "too few to say how a further one would differ" in said
    assert "each with its own threshold" in said


def test_a_check_that_does_not_hold_is_said() -> None:
    checks = [
        Check("slides", "a against b", "none of 4 on two sides", True),
        Check("pretraining", "a against c", "7 shared", False),
    ]
    said = [sentence for sentence in cannot_say(done(BINARY, FIXED), checks, None) if sentence.startswith("Not clean")]
    assert said == ["Not clean: pretraining, a against c: 7 shared."]


def test_probabilities_that_are_too_sure_are_said() -> None:
    bags = made_bags(BINARY, 600)
    plan = made_plan(bags, FIXED)
    outputs = made_outputs(bags, plan, BINARY)
    z = np.log(outputs / (1 - outputs))
    sure = study(bags, plan, 1 / (1 + np.exp(-4 * z - 2)), {}, BINARY, INTERVAL, CONFIG)
    said = " ".join(cannot_say(sure, [], None))
    assert "probabilities are not to be read as such (calibration slope 0." in said
    shifted = study(bags, plan, 1 / (1 + np.exp(-0.5 * z - 2)), {}, BINARY, INTERVAL, CONFIG)
    assert "intercept at slope 1 -" in " ".join(cannot_say(shifted, [], None))


def test_a_readable_hospital_is_said() -> None:
    bags = made_bags(BINARY, 150)
    rng = np.random.default_rng(0)
    means = rng.normal(size=(150, 6))
    means[:, 0] += 4 * np.array([("near", "by", "far").index(bag.site) for bag in bags.rows])
    decoded = decodability(bags, means, BINARY, INTERVAL, DecodabilityConfig(4, 0.1, 1e-4, 200, 0))
    found = done(BINARY, FIXED)
    assert "The hospital can be read from the mean tile" in " ".join(cannot_say(found, [], decoded))
    assert "hospital (3 classes)" in show(found, [], decoded)


def test_patients_and_slides_that_are_not_independent() -> None:
    assert "80 slides of 40 patients are not independent" in " ".join(cannot_say(done(BINARY, FIXED, slides=2), [], None))
