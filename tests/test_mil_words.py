"""What a study says of itself: the table a person reads, and limits that come from its numbers and go with them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from study_fixtures import BINARY, CONFIG, FIXED, FOLDS, INTERVAL, SITES, TASKS, made_bags, made_outputs, made_plan

from histoscale.eval.evidence.case import Case
from histoscale.eval.evidence.page import sentence
from histoscale.eval.mil.decodability import DecodabilityConfig, decodability
from histoscale.eval.mil.explain import Outlines, case_of, finding
from histoscale.eval.mil.floors import plain_floors
from histoscale.eval.mil.metrics import NAMES, headline
from histoscale.eval.mil.report import write_mil_page
from histoscale.eval.mil.split import Check, FixedSplit, FoldSplit, SiteSplit
from histoscale.eval.mil.study import Study, study
from histoscale.eval.mil.task import BinaryTask, Task
from histoscale.eval.mil.words import cannot_say, show
from histoscale.eval.page import Chapter


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


RULED = replace(BINARY, specificities=[0.5])


def swept(lowest: float) -> Study:
    """Positives of whom one in training scores as low as anything: what keeps .95 of them keeps all slides."""
    bags = made_bags(RULED, 120)
    plan = made_plan(bags, FIXED)
    outputs = made_outputs(bags, plan, RULED)
    low = [row for row in plan.trials[0].train if bags.rows[row].label == 1][:2]
    outputs[0, low] = lowest
    return study(bags, plan, outputs, {}, RULED, INTERVAL, CONFIG)


def test_a_rule_that_flags_every_slide_is_called_that_everywhere(tmp_path: Path) -> None:
    """On the card, in the limits, in the text, in the summary and in the words of a slide; beside it stands a rule that sorts."""
    found = swept(3e-7)
    assert [found.flags(k) for k in range(3)] == ["every", "", ""]
    at, flagged = found.thresholds[0], found.flagged(0)
    assert at.value == 3e-7 and flagged.hits == flagged.n == 72
    assert "flagged from 0.000000300; " in show(found, [], None) and "0.000;" not in show(found, [], None)
    limits = " ".join(cannot_say(found, [], None))
    assert "The rule for sensitivity 0.95 flags every slide (72 of 72 read) and sorts nothing; sensitivity 1 and spec" in limits
    thresholds = found.as_dict()["thresholds"]
    assert thresholds["0.95"]["flags"] == "every" and thresholds["specificity_0.5"]["flags"] == ""
    passed = found.internal.operating[2].found.specificity if found.internal else None
    assert passed is not None and 0 < passed.hits < passed.n
    write_mil_page(tmp_path / "report.html", found, [], Chapter("Leakage", []), None, {}, {}, [], "random")
    card = (tmp_path / "report.html").read_text().split("<nav>")[0]
    assert "flagged by the rule for sensitivity 0.95, external: it sorts nothing" in card and "every slide: 40 of 40" in card
    own = finding(np.array([0.2]), 0, RULED, found.of_trials["fixed"], found.flagged_by["fixed"])
    assert own.flagged and own.sweeping == "every" and "flags every slide, this one too" in sentence(own)
    assert "from a score of 0.000000300 on, as every one of the 72 slides that it read is" in own.rule


def test_a_rule_that_flags_none_is_called_that_too() -> None:
    found = above_all(RULED, 0.9999)
    assert found.flags(0) == "no" and "flags no slide (0 of 72 read)" in " ".join(cannot_say(found, [], None))
    own = finding(np.array([0.2]), 0, RULED, found.of_trials["fixed"], found.flagged_by["fixed"])
    assert not own.flagged and "flags no slide, nor this one" in sentence(own) and "as none of the 72 slides" in own.rule


def test_a_rule_that_sweeps_one_trial_alone_is_not_said_to_sweep(tmp_path: Path) -> None:
    """A trial that reads a single slide gives all that it reads one answer; the study does not."""
    bags = made_bags(RULED, 120)
    bags = replace(bags, rows=tuple(replace(bag, columns={"label": str(bag.label)}) for bag in bags.rows))
    plan = made_plan(bags, SITES)
    outputs = made_outputs(bags, plan, RULED)
    first = plan.trials[0]
    outputs[0, list(first.external)] = 0.9999
    found = study(bags, plan, outputs, {}, RULED, INTERVAL, CONFIG)
    assert [rate.hits == rate.n for rate in found.flagged_by[first.name]] == [True] * 3 and found.flags(0) == ""

    def shown(row: int) -> Case:
        reading = SimpleNamespace(output=outputs[0, row], attention=np.ones(1), contribution=np.ones((1, 1)))
        fitted: Any = SimpleNamespace(held_out={}, ensemble=SimpleNamespace(occlusion=lambda *_: None))
        features: Any = SimpleNamespace(whole=lambda row: None, coords=lambda row: np.zeros((1, 2)))
        trained: Any = SimpleNamespace(
            arm=SimpleNamespace(bags=bags, features=features), fitted=[fitted] * len(plan.trials), read=lambda *_: reading
        )
        store: Any = None
        return case_of(trained, plan, row, RULED, found, Outlines(None, tmp_path, []), None, store)

    own = shown(first.external[0]).finding
    assert own.flagged and not own.sweeping and "every" not in own.rule
    assert sentence(own) == "The model flags this slide for review."


def above_all(task: BinaryTask, high: float) -> Study:
    """Training positives all score above whatever is read later."""
    bags = made_bags(task, 120)
    plan = made_plan(bags, FIXED)
    outputs = made_outputs(bags, plan, task)
    outputs[0, [row for row in plan.trials[0].train if bags.rows[row].label == 1]] = high
    return study(bags, plan, outputs, {}, task, INTERVAL, CONFIG)


def test_one_part_that_is_swept_is_named() -> None:
    bags = made_bags(BINARY, 120)
    plan = made_plan(bags, FIXED)
    outputs = made_outputs(bags, plan, BINARY)
    outputs[0, list(plan.trials[0].external)] = 0.9999
    found = study(bags, plan, outputs, {}, BINARY, INTERVAL, CONFIG)
    assert found.flags(0) == ""
    said = "The rule for sensitivity 0.95 flags every slide of external (40 of 40): it sorts nothing there."
    assert said in cannot_say(found, [], None)
