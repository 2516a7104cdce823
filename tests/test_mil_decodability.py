"""Site against biology: features that carry one, the other or neither, and what patients in folds must prevent."""

from dataclasses import replace

import numpy as np
import pytest
from study_fixtures import BINARY, GRADES, INTERVAL, NUMBER, SURVIVAL, TASKS, made_bags

from histoscale.eval.mil.decodability import Decodability, DecodabilityConfig, cramers_v, decodability

CONFIG = DecodabilityConfig(folds=4, penalty=0.1, tolerance=1e-4, max_iterations=200, seed=0)


def features(bags, site: float, label: float, width: int = 12) -> np.ndarray:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(3)
    values = rng.normal(size=(len(bags.rows), width))
    for i, bag in enumerate(bags.rows):
        values[i, ("near", "by", "far").index(bag.site)] += site
        values[i, 5] += label * bag.target
    return values


def test_each_is_found_where_it_is_and_only_there() -> None:
    bags = made_bags(BINARY, patients=150)
    for site, label in ((4, 0), (0, 3), (0, 0)):
        found = decodability(bags, features(bags, site, label), BINARY, INTERVAL, CONFIG)
        assert found.site is not None and found.label is not None and found.elsewhere is not None
        assert (found.site.chance, found.label.chance) == (1 / 3, 1 / 2)
        for decoded, there in ((found.site, site), (found.label, label), (found.elsewhere, label)):
            assert decoded.score.low is not None and decoded.score.high is not None
            assert (decoded.score.value > 0.85) if there else (decoded.score.low < decoded.chance < decoded.score.high)
            assert decoded.confusion.sum() == 150
        assert found.association is not None and found.association < 0.25 and found.withheld == {}


def test_no_error_is_no_certainty() -> None:
    bags = made_bags(BINARY, patients=60)
    found = decodability(bags, features(bags, 40, 0), BINARY, INTERVAL, CONFIG).site
    assert found is not None and found.score.value == found.score.high == 1
    assert found.score.low == pytest.approx(0.025 ** (1 / 20))  # 20 patients of each hospital, all right


def test_a_label_that_is_a_site_is_not_read_elsewhere() -> None:
    """Positives come from one site almost alone and features know only the site: biology seems read until a site is left out."""
    bags = made_bags(BINARY, patients=240)
    rows = tuple(replace(bag, target=float((bag.site == "near") != (i % 10 == 0))) for i, bag in enumerate(bags.rows))
    bags = replace(bags, rows=rows)
    found = decodability(bags, features(bags, 5, 0), BINARY, INTERVAL, CONFIG)
    assert found.label is not None and found.label.score.value > 0.8 and found.association is not None and found.association > 0.7
    assert found.elsewhere is not None and found.elsewhere.score.value < 0.6


def test_copies_of_a_patient_are_never_on_both_sides() -> None:
    """Features that only identify the patient, four slides each: random folds of slides would read every label."""
    bags = made_bags(BINARY, patients=60, slides=4)
    rng = np.random.default_rng(0)
    own = {bag.group: rng.normal(size=40) for bag in bags.rows}
    means = np.stack([own[bag.group] + 0.01 * rng.normal(size=40) for bag in bags.rows])
    found = decodability(bags, means, BINARY, INTERVAL, CONFIG).label
    assert found is not None and found.score.value < 0.7 and found.score.patients == 60 and found.score.units == 240


def test_rare_classes_do_not_vanish_behind_the_frequent() -> None:
    bags = made_bags(BINARY, patients=200)
    bags = replace(bags, rows=tuple(replace(bag, target=float(i % 10 == 0)) for i, bag in enumerate(bags.rows)))
    found = decodability(bags, features(bags, 0, 2), BINARY, INTERVAL, CONFIG).label
    assert found is not None
    recall = found.confusion.diagonal() / found.confusion.sum(1)
    assert recall[1] > 0.6


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_has_its_question(task) -> None:  # type: ignore[no-untyped-def]
    bags = made_bags(task, patients=90)
    strength = {NUMBER.name: 1.0, SURVIVAL.name: 0.5}.get(task.name, 2.0)
    found = decodability(bags, features(bags, 1, strength), task, INTERVAL, CONFIG)
    assert found.label is not None and found.label.score.value > found.label.chance + 0.1
    assert len(found.label.classes) == (3 if task.name in ("grade", "kind") else 2)
    assert found.as_dict()["label"]["classes"] == list(found.label.classes)


def test_what_cannot_be_asked_says_why() -> None:
    bags = made_bags(GRADES, patients=60)
    one = replace(bags, rows=tuple(replace(bag, site="near") for bag in bags.rows))
    found = decodability(one, features(one, 0, 2), GRADES, INTERVAL, CONFIG)
    assert found.site is None and found.elsewhere is None and found.association is None and found.label is not None
    assert "1 of 1 classes have 4 patients" in found.withheld["site"] and "one site" in found.withheld["elsewhere"]
    few = replace(bags, rows=tuple(replace(bag, site="rare" if i < 2 else bag.site) for i, bag in enumerate(bags.rows)))
    found = decodability(few, features(bags, 3, 2), GRADES, INTERVAL, CONFIG)
    assert found.site is not None and found.site.classes == ("by", "far", "near")
    assert found.withheld == {"site: rare": "fewer than 4 patients"}
    nothing = Decodability(None, None, None, None, {})
    assert nothing.as_dict()["site"] is None


def test_cramers_v_golden() -> None:
    assert cramers_v(["a"] * 10 + ["b"] * 10, ["x"] * 10 + ["y"] * 10) == pytest.approx(1)
    assert cramers_v(["a", "a", "b", "b"] * 5, ["x", "y"] * 10) == pytest.approx(0)
    a, b = ["a"] * 30 + ["b"] * 30, ["x"] * 20 + ["y"] * 10 + ["x"] * 10 + ["y"] * 20
    assert cramers_v(a, b) == pytest.approx(1 / 3)
