"""Training of slide models: folds by patient, every kind of task, readings by models that never saw the patient, equal bits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_fixtures import ABMIL, AGGREGATORS, TASK, cohort, features_of, fit_config, parts, quiet, write_store

from histoscale.data.manifest import Slide
from histoscale.data.splits import SplitError
from histoscale.eval.mil.bags import BagError, Bags, read_bags
from histoscale.eval.mil.ensemble import Ensemble, SlideModel, load_ensemble, to_output
from histoscale.eval.mil.features import Features
from histoscale.eval.mil.fit import Fitted, fit, inner_folds
from histoscale.eval.mil.task import ClassesTask, RegressionTask, SurvivalTask, Task

GRADES = ClassesTask("classes", "grade", "grade", {"a": ["a"], "b": ["b"], "c": ["c"]}, True, "slide")
NUMBER = RegressionTask("regression", "amount", "number", "slide")
SURVIVAL = SurvivalTask("survival", "time", "time", "event", "slide")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Slide]]:
    folder = tmp_path_factory.mktemp("stores")
    return folder, cohort(folder)


@pytest.fixture(scope="module")
def studied(stored: tuple[Path, list[Slide]]) -> tuple[Bags, Features]:
    bags = read_bags(*stored, TASK, "patient")
    return bags, features_of(bags)


def outputs(fitted: Fitted, rows: Sequence[int], features: Features) -> np.ndarray:
    """float64 [n, K]."""
    return np.stack([fitted.read(i, features).output for i in rows])


# --- folds ---


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), folds=st.integers(2, 5))
def test_folds_hold_whole_patients_and_both_classes(studied: tuple[Bags, Features], seed: int, folds: int) -> None:
    bags = [studied[0].rows[i] for i in parts(studied[0]).train]
    dealt = inner_folds(bags, TASK, folds, seed)
    assert sorted(i for fold in dealt for i in fold) == list(range(len(bags)))
    groups = [{bags[i].group for i in fold} for fold in dealt]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert all({bags[i].label for i in fold} == {0, 1} for fold in dealt)


def test_folds_depend_on_the_seed_and_need_patients(studied: tuple[Bags, Features]) -> None:
    bags = [studied[0].rows[i] for i in parts(studied[0]).train]
    assert inner_folds(bags, TASK, 3, 1) == inner_folds(bags, TASK, 3, 1) != inner_folds(bags, TASK, 3, 2)
    positive = [b for b in bags if b.label == 1]
    with pytest.raises(BagError, match="1 training patients with a positive slide for mil.folds=3: give more slides"):
        inner_folds([b for b in bags if b.label == 0] + positive[:1], TASK, 3, 0)
    two = [next(b for b in positive if b.group == group) for group in sorted({b.group for b in positive})[:2]]
    with pytest.raises(BagError, match="set mil.folds=2, or give more slides"):
        inner_folds([b for b in bags if b.label == 0] + two, TASK, 3, 0)
    with pytest.raises(BagError, match="0 training patients with a slide of class c"):
        inner_folds(bags, GRADES, 3, 0)
    with pytest.raises(BagError, match="0 training patients with an event"):
        inner_folds([replace(b, event=False) for b in bags], SURVIVAL, 3, 0)
    with pytest.raises(SplitError, match="at least 2"):
        inner_folds(bags, TASK, 1, 0)


# --- training ---


def test_attention_finds_the_few_tiles_that_the_mean_drowns(studied: tuple[Bags, Features]) -> None:
    bags, features = studied
    trial = parts(bags)
    fitted = fit(bags, trial.train, features, TASK, fit_config(ABMIL), quiet())
    assert len(fitted.ensemble.models) == 6 and all(len(v) == 2 for v in fitted.held_out.values())
    for rows in (trial.internal, trial.external):
        assert (outputs(fitted, rows, features)[bags.labels(rows) == 1].min() > 0.5).all()
    positive = next(i for i in trial.external if bags.rows[i].label)
    reading = fitted.read(positive, features)
    marked = features.whole(positive)[:, 0] > 4
    assert reading.attention.sum() == pytest.approx(1) and marked[reading.attention.argmax()]
    assert reading.attention[marked].sum() > 2 * marked.mean()
    assert np.log(reading.output / (1 - reading.output)) == pytest.approx(reading.contribution.sum(0))


def test_several_classes(stored: tuple[Path, list[Slide]]) -> None:
    bags = read_bags(*stored, GRADES, "patient")
    trial, features = parts(bags), features_of(bags)
    fitted = fit(bags, trial.train, features, GRADES, fit_config(AGGREGATORS["mean"], epochs=40), quiet())
    found = outputs(fitted, trial.internal, features)
    assert found.sum(1) == pytest.approx(1) and (found.argmax(1) == bags.labels(trial.internal)).mean() > 0.8
    reading = fitted.read(trial.internal[0], features)
    np.testing.assert_allclose(reading.contribution.sum(0), reading.logits, rtol=1e-5, atol=1e-6)


def test_a_number_comes_out_in_its_unit(stored: tuple[Path, list[Slide]]) -> None:
    bags = read_bags(*stored, NUMBER, "patient")
    trial, features = parts(bags), features_of(bags)
    fitted = fit(bags, trial.train, features, NUMBER, fit_config(AGGREGATORS["mean"], epochs=40), quiet())
    for rows in (trial.internal, trial.train):
        off = outputs(fitted, rows, features)[:, 0] - bags.targets(rows)
        assert np.abs(off).mean() < 0.5 * bags.targets(rows).std()
    reading = fitted.read(trial.internal[0], features)
    np.testing.assert_allclose(reading.contribution.sum(0), reading.output, rtol=1e-5)
    shifted = replace(bags, rows=tuple(replace(bag, target=1000 + 3 * bag.target) for bag in bags.rows))
    again = fit(shifted, trial.train, features, NUMBER, fit_config(AGGREGATORS["mean"], epochs=40), quiet())
    rows = trial.internal
    np.testing.assert_allclose(outputs(again, rows, features), 1000 + 3 * outputs(fitted, rows, features), rtol=1e-3)


def test_who_dies_sooner_has_the_higher_risk(stored: tuple[Path, list[Slide]]) -> None:
    bags = read_bags(*stored, SURVIVAL, "patient")
    trial, features = parts(bags), features_of(bags)
    fitted = fit(bags, trial.train, features, SURVIVAL, fit_config(AGGREGATORS["mean"], batch=16), quiet())
    found, rows = outputs(fitted, range(len(bags.rows)), features)[:, 0], np.array(trial.internal)
    times, events = bags.targets(rows.tolist()), bags.events(rows.tolist())
    pairs = (times[:, None] < times[None]) & events[:, None]
    assert ((found[rows][:, None] > found[rows][None])[pairs]).mean() > 0.65
    for model in fitted.ensemble.models[:2]:  # each model's log-risk has its zero at the mean of its own training slides
        own = [i for i in trial.train if fitted.ensemble.models.index(model) not in fitted.held_out[i]]
        assert np.mean([model.logits(features.whole(i))[0].item() for i in own]) == pytest.approx(0, abs=1e-5)


def test_training_repeats_to_the_bit_and_another_seed_does_not(studied: tuple[Bags, Features]) -> None:
    bags, features = studied
    train, config = parts(bags).train, fit_config(ABMIL, epochs=2)
    torch.manual_seed(1)
    first = fit(bags, train, features, TASK, config, quiet())
    torch.manual_seed(2)  # the global generator must not matter, nor a cache that holds nothing
    again = fit(bags, train, features_of(bags, 0), TASK, config, quiet())
    other = fit(bags, train, features, TASK, replace(config, seed=1), quiet())
    rows = range(len(bags.rows))
    np.testing.assert_array_equal(outputs(first, rows, features), outputs(again, rows, features))
    assert np.abs(outputs(first, rows, features) - outputs(other, rows, features)).max() > 1e-3


def test_a_training_slide_is_scored_by_models_that_never_saw_its_patient(studied: tuple[Bags, Features], tmp_path: Path) -> None:
    """Other tiles of one patient change every model but those that hold the patient out: those keep every bit."""
    bags, features = studied
    train, config = parts(bags).train, fit_config(ABMIL, epochs=2)
    patient = bags.rows[train[0]].group
    mine = [i for i, bag in enumerate(bags.rows) if bag.group == patient]
    before = fit(bags, train, features, TASK, config, quiet())
    for i in mine:
        write_store(tmp_path, bags.rows[i].slide_id, features.whole(i) + 100)
    moved = {i: replace(bags.rows[i], path=tmp_path / f"{bags.rows[i].slide_id}.h5") for i in mine}
    changed = replace(bags, rows=tuple(moved.get(i, bag) for i, bag in enumerate(bags.rows)))
    after = fit(changed, train, features_of(changed), TASK, config, quiet())
    for model in range(6):
        one, two = (fitted.ensemble.models[model].state_dict() for fitted in (before, after))
        assert all(torch.equal(one[name], two[name]) for name in one) == (model in before.held_out[mine[0]])


def test_features_are_standardised_or_left_as_they_are(studied: tuple[Bags, Features]) -> None:
    bags, features = studied
    train, config = parts(bags).train, fit_config(AGGREGATORS["mean"], epochs=1, repeats=1)
    scaled = fit(bags, train, features, TASK, config, quiet())
    plain = fit(bags, train, features, TASK, replace(config, standardise=False), quiet()).ensemble.models[0]
    assert (plain.shift == 0).all() and (plain.scale == 1).all()
    for number, model in enumerate(scaled.ensemble.models):
        own = [features.whole(i) for i in train if number not in scaled.held_out[i]]
        mean = np.mean([each.mean(0, dtype=np.float64) for each in own], 0)  # every slide counts once
        spread = np.sqrt(np.mean([np.square(each, dtype=np.float64).mean(0) for each in own], 0) - mean**2)
        np.testing.assert_allclose(model.shift, mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(model.scale, spread, rtol=1e-4)


def test_outputs_by_seed(studied: tuple[Bags, Features]) -> None:
    """A training slide is read by one model of each seed, another slide by the models of each seed together."""
    bags, features = studied
    trial = parts(bags)
    fitted = fit(bags, trial.train, features, TASK, fit_config(ABMIL, epochs=1), quiet())
    for row in (trial.train[0], trial.external[0]):
        reading = fitted.read(row, features)
        for seed, found in enumerate(fitted.by_seed(row, reading)):
            asked = [i for i in fitted.repeats[seed] if row not in fitted.held_out or i in fitted.held_out[row]]
            assert len(asked) == (1 if row in fitted.held_out else 3)
            assert found == pytest.approx(fitted.ensemble.read(features.whole(row), asked).output)


def test_jittered_copies_train_and_are_not_read(studied: tuple[Bags, Features], tmp_path: Path) -> None:
    bags, features = studied
    trial, config = parts(bags), fit_config(AGGREGATORS["mean"], epochs=2)
    for row in trial.train:
        write_store(tmp_path, bags.rows[row].slide_id, features.whole(row) + 5)
    copies = [[bag.path, *([tmp_path / bag.path.name] if i in trial.train else [])] for i, bag in enumerate(bags.rows)]
    both = Features(copies, bags.width, 0, 1)
    plain = fit(bags, trial.train, features, TASK, config, quiet())
    jittered = fit(bags, trial.train, both, TASK, config, quiet())
    assert not torch.equal(
        plain.ensemble.models[0].aggregator.classify.weight, jittered.ensemble.models[0].aggregator.classify.weight
    )
    torch.testing.assert_close(plain.ensemble.models[0].shift, jittered.ensemble.models[0].shift)
    np.testing.assert_array_equal(both.whole(trial.train[0]), features.whole(trial.train[0]))


@pytest.mark.parametrize(("task", "balanced"), [(TASK, True), (GRADES, True), (TASK, False)])
def test_balanced_classes_weigh_the_same(stored: tuple[Path, list[Slide]], task: Task, balanced: bool) -> None:
    """With features that say nothing, the scores settle at the classes' shares, or at equal shares where balanced."""
    bags = read_bags(*stored, task, "patient")
    train = parts(bags).train
    common = np.bincount(bags.labels(train)).argmax()
    keep = [i for i in train if bags.rows[i].label == common or int(bags.rows[i].group[1:]) % 8 < 2]
    blind = Features([[bag.path] for bag in bags.rows], bags.width, 1 << 30, 1)
    blind.whole = lambda row: np.zeros((4, bags.width), np.float32)  # type: ignore[method-assign]
    blind.batches = lambda plan, tiles: (([blind.whole(0)] * len(draws)) for draws in plan)  # type: ignore[method-assign,assign,return-value]
    config = fit_config(AGGREGATORS["mean"], epochs=60, lr=0.05, imbalance="balanced" if balanced else "none")
    found = fit(bags, keep, blind, task, config, quiet()).ensemble.read(blind.whole(0)).output
    share = np.bincount(bags.labels(keep)) / len(keep)
    assert share.max() > 1 / len(share) + 0.1
    expected = np.full(len(share), 1 / len(share)) if balanced else share
    assert found == pytest.approx(expected[-len(found) :], abs=0.06)


# --- the deployed object ---


def test_saved_ensemble_scores_alike(studied: tuple[Bags, Features], tmp_path: Path) -> None:
    bags, features = studied
    trial = parts(bags)
    fitted = fit(bags, trial.train, features, TASK, fit_config(ABMIL, epochs=1), quiet())
    fitted.ensemble.save(tmp_path / "model", {"task": "t", "threshold": 0.4})
    loaded, facts = load_ensemble(tmp_path / "model")
    assert facts["threshold"] == 0.4 and facts["width"] == bags.width
    for i in trial.external:
        assert loaded.read(features.whole(i)).output == fitted.read(i, features).output
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json"}
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"width": 12', '"width": 9'))
    with pytest.raises(ValueError, match="does not hold what config.json describes"):
        load_ensemble(tmp_path / "model")


@pytest.mark.parametrize("kind", AGGREGATORS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_reading_leaving_out_and_logits_agree(kind: str, dtype: type[np.floating]) -> None:
    torch.manual_seed(0)
    models = [SlideModel(6, AGGREGATORS[kind], 3) for _ in range(2)]
    for model in models:
        model.origin.fill_(4.0)
        model.unit.fill_(2.0)
        model.shift.normal_()
    ensemble = Ensemble(models, 6, 3, AGGREGATORS[kind], "classes")
    tiles = np.random.default_rng(0).normal(size=(7, 6)).astype(dtype)
    reading = ensemble.read(tiles)
    np.testing.assert_allclose(reading.logits, ensemble.logits(tiles), rtol=1e-6)
    np.testing.assert_allclose(reading.models.mean(0), reading.logits)
    change = ensemble.occlusion(tiles)
    assert change is not None
    for i in range(7):
        np.testing.assert_allclose(change[i], reading.logits - ensemble.logits(np.delete(tiles, i, 0)), atol=2e-5)
    only = ensemble.occlusion(tiles[:1])
    assert only is not None
    np.testing.assert_allclose(only[0], ensemble.logits(tiles[:1]))
    if kind != "mlp_abmil":
        np.testing.assert_allclose(reading.contribution.sum(0), reading.logits, rtol=1e-5)


def test_outputs_of_logits() -> None:
    assert to_output(np.array([0.0]), "binary") == 0.5
    np.testing.assert_allclose(to_output(np.log(np.array([[1.0, 3.0]])), "classes"), [[0.25, 0.75]])
    assert to_output(np.array([-3.0]), "survival") == -3.0


def test_a_slide_of_another_width_is_refused() -> None:
    ensemble = Ensemble([SlideModel(6, AGGREGATORS["mean"], 1)], 6, 1, AGGREGATORS["mean"], "binary")
    for shape in ((3, 5), (0, 6)):
        with pytest.raises(ValueError, match="expected"):
            ensemble.read(np.zeros(shape, np.float32))
