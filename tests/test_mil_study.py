"""The study: each row read once in its part, thresholds of their own trial, floors, gaps, and numbers of others' code."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)
from study_fixtures import (
    BINARY,
    CONFIG,
    FIXED,
    FOLDS,
    GRADES,
    INTERVAL,
    KINDS,
    NUMBER,
    SITES,
    SURVIVAL,
    TASKS,
    made_bags,
    made_outputs,
    made_plan,
)

from histoscale.eval.mil.bags import BagError
from histoscale.eval.mil.floors import plain_floors, site_prior
from histoscale.eval.mil.metrics import headline
from histoscale.eval.mil.score_table import score_rows
from histoscale.eval.mil.seeds import seed_values
from histoscale.eval.mil.split import FixedSplit, FoldSplit, SiteSplit
from histoscale.eval.mil.study import Study, study
from histoscale.eval.mil.task import Task
from histoscale.eval.mil.trials import Plan, Trial
from histoscale.eval.mil.units import places, units
from histoscale.eval.mil.words import show
from histoscale.eval.scores.classification import calibration_bins, calibration_error_of
from histoscale.eval.scores.operating import threshold


def done(task: Task, split: FixedSplit | FoldSplit | SiteSplit, slides: int = 1, noise: float = 1.0) -> Study:
    bags = made_bags(task, slides=slides)
    plan = made_plan(bags, split)
    outputs = made_outputs(bags, plan, task, noise)
    return study(bags, plan, outputs, plain_floors(bags, plan, task, {}), task, INTERVAL, CONFIG)


@pytest.mark.parametrize("split", [FIXED, FOLDS, SITES], ids=lambda split: split.kind)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_under_every_split(task: Task, split: FixedSplit | FoldSplit | SiteSplit) -> None:
    found = done(task, split)
    summary = json.loads(json.dumps(found.as_dict()))
    assert summary["headline"] == headline(task) and summary["split"] == split.kind
    for part in (found.train, *found.reported):
        assert part.headline is not None and part.headline.low is not None and part.headline.high is not None
        assert part.headline.low <= part.headline.value <= part.headline.high
        assert part.metrics[headline(task)] == part.headline
    assert found.internal is not None and found.external is not None
    assert set(found.internal.floors) == set(found.internal.minus) == {"site_prior", "tissue_area", "number_of_tiles"}
    assert found.train.floors == {}  # they learned from these rows
    assert set(found.sites) == {"near", "by", "far"}
    assert headline(task) in found.gap
    assert set(found.sites_inside) == ({"near", "by", "far"} if split.kind == "sites" else set())
    assert found.external.headline is not None
    gain = found.external.minus["number_of_tiles"]
    assert gain.value == pytest.approx(found.external.headline.value - found.external.floors["number_of_tiles"].value)


def test_numbers_are_those_of_scikit_learn() -> None:
    bags = made_bags(BINARY)
    plan = made_plan(bags, FIXED)
    outputs = made_outputs(bags, plan, BINARY)
    found = study(bags, plan, outputs, {}, BINARY, INTERVAL, CONFIG)
    rows = list(plan.trials[0].external)
    y, p = bags.labels(rows), outputs[0, rows, 0]
    assert found.external is not None
    values = {name: each.value for name, each in found.external.metrics.items()}
    assert values["auroc"] == pytest.approx(roc_auc_score(y, p))
    assert values["auprc"] == pytest.approx(average_precision_score(y, p))
    assert values["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, p > 0.5))
    assert values["brier"] == pytest.approx(brier_score_loss(y, p))
    assert values["ece"] == pytest.approx(calibration_error_of(calibration_bins(p, y == 1, 15).sum(0)))
    calibrated = found.external.metrics["ece_if_calibrated"]
    assert found.external.metrics["ece"].low is None and calibrated.low is not None and 0 < calibrated.low < calibrated.value
    grades, number = done(GRADES, FIXED), done(NUMBER, FIXED)
    for task, got in ((GRADES, grades), (NUMBER, number)):
        bags = made_bags(task)
        plan = made_plan(bags, FIXED)
        rows = list(plan.trials[0].internal)
        out, target = made_outputs(bags, plan, task)[0, rows], bags.targets(rows)
        assert got.internal is not None
        values = {name: each.value for name, each in got.internal.metrics.items()}
        if task is GRADES:
            named = out.argmax(1)
            assert values["quadratic_kappa"] == pytest.approx(
                cohen_kappa_score(target, named, labels=[0, 1, 2], weights="quadratic")
            )
            assert values["auroc"] == pytest.approx(roc_auc_score(target, out, multi_class="ovr"))
            assert got.internal.confusion is not None and got.internal.confusion.sum() == len(rows)
            assert got.internal.recalls["low"].hits == int(((named == 0) & (target == 0)).sum())
        else:
            assert values["r2"] == pytest.approx(r2_score(target, out[:, 0]))
            assert values["mae"] == pytest.approx(mean_absolute_error(target, out[:, 0]))
            assert values["pearson"] == pytest.approx(np.corrcoef(target, out[:, 0])[0, 1])


def test_thresholds_belong_to_the_trial_whose_scores_fixed_them() -> None:
    """Every fold model has its own scale here: a threshold taken from another trial would flag nearly all or nearly none."""
    bags = made_bags(BINARY, patients=240)
    plan = made_plan(bags, FOLDS)
    outputs = made_outputs(bags, plan, BINARY, noise=0.3)
    found = study(bags, plan, outputs, {}, BINARY, INTERVAL, CONFIG)
    assert found.internal is not None and found.external is not None
    flagged = []
    for t, trial in enumerate(plan.trials):
        train, read = list(trial.train), list(trial.internal)
        at = threshold(bags.labels(train), outputs[t, train, 0], 0.8, "conformal")
        flagged += (outputs[t, read, 0] >= at.value).tolist()
    rows = [row for _, row in places(plan, "internal")]
    hits = int((np.array(flagged) & (bags.labels(rows) == 1)).sum())
    assert found.internal.operating[1].found.sensitivity.hits == hits and found.internal.auc is not None
    assert found.internal.auc.value > 0.95  # pairs of two folds are never compared
    assert math.isnan(found.internal.operating[1].found.needed) and not math.isnan(found.external.operating[1].found.needed)
    deployed = plan.trials[plan.deployed]
    own = threshold(bags.labels(deployed.train), outputs[plan.deployed, list(deployed.train), 0], 0.8, "conformal")
    assert found.thresholds[1] == own
    assert set(found.of_trials) == {trial.name for trial in plan.trials}


def test_reported_rows_move_no_threshold() -> None:
    bags = made_bags(BINARY)
    plan = made_plan(bags, FIXED)
    outputs = made_outputs(bags, plan, BINARY)
    before = study(bags, plan, outputs, {}, BINARY, INTERVAL, CONFIG)
    moved = outputs.copy()
    moved[0, [*plan.trials[0].internal, *plan.trials[0].external]] **= 3
    after = study(bags, plan, moved, {}, BINARY, INTERVAL, CONFIG)
    assert after.thresholds == before.thresholds
    assert after.internal is not None and before.internal is not None and after.internal.auc == before.internal.auc


def test_a_patient_is_one_decision() -> None:
    bags = made_bags(BINARY, slides=3)
    plan = made_plan(bags, FIXED)
    outputs = made_outputs(bags, plan, BINARY)
    for task in (BINARY, replace(BINARY, decision="patient")):
        found = study(bags, plan, outputs, {}, task, INTERVAL, CONFIG).external
        assert found is not None and (found.slides, found.patients) == (120, 40)
        assert found.units == (40 if task.decision == "patient" else 120)
        assert bool(found.operating[0].clustered) == (task.decision == "slide")
    joined = units(bags, places(plan, "external"), outputs, replace(BINARY, decision="patient"))
    first = [row for row in plan.trials[0].external if bags.rows[row].group == joined.groups[0]]
    assert joined.outputs[0, 0] == outputs[0, first, 0].max()
    kinds = made_bags(KINDS, slides=2)
    odd = replace(kinds, rows=(replace(kinds.rows[0], target=(kinds.rows[0].target + 1) % 3), *kinds.rows[1:]))
    plan = made_plan(odd, SITES)
    with pytest.raises(BagError, match="p000 bear different values of label"):
        study(odd, plan, made_outputs(odd, plan, KINDS), {}, replace(KINDS, decision="patient"), INTERVAL, CONFIG)


def test_the_gap_of_shared_patients_is_paired_and_narrower() -> None:
    """Leave-one-site-out against random folds reads patients twice: without a true gap its interval is narrow, about 0."""
    bags = made_bags(BINARY, patients=300)
    plan = made_plan(bags, SITES)
    outputs = made_outputs(bags, plan, BINARY)
    outputs[:] = 1 / (
        1 + np.exp(-(np.log(outputs[-1] / (1 - outputs[-1])) + 0.1 * np.random.default_rng(0).normal(size=outputs.shape)))
    )
    found = study(bags, plan, outputs, {}, BINARY, INTERVAL, CONFIG)
    assert found.internal is not None and found.internal.auc is not None and found.external is not None
    gap = found.gap["auroc"]
    assert gap.low is not None and gap.high is not None and gap.low < 0 < gap.high
    assert found.internal.auc.low is not None and found.internal.auc.high is not None
    assert gap.high - gap.low < 0.7 * (found.internal.auc.high - found.internal.auc.low)
    apart = done(BINARY, FIXED)
    assert apart.internal is not None and apart.external is not None
    one, other = apart.internal.metrics["auroc"], apart.external.metrics["auroc"]
    gap = apart.gap["auroc"]
    assert gap.value == pytest.approx(one.value - other.value) and gap.patients == one.patients + other.patients
    assert {"sensitivity@0.95", "specificity@0.8", "brier"} <= set(apart.gap)


def test_floors_learn_from_training_rows_alone() -> None:
    for task in TASKS:
        bags = made_bags(task)
        plan = made_plan(bags, FOLDS)
        before = plain_floors(bags, plan, task, {})
        for t, trial in enumerate(plan.trials):
            read = [*trial.internal, *trial.external]
            changed = tuple(
                replace(bag, target=bag.target + 1 if task in (NUMBER, SURVIVAL) else float(i % 2)) if i in read else bag
                for i, bag in enumerate(bags.rows)
            )
            after = plain_floors(replace(bags, rows=changed), plan, task, {})
            for name, values in before.items():
                np.testing.assert_array_equal(values[t], after[name][t])
                assert np.isnan(values[t, list(trial.train)]).all() and not np.isnan(values[t, read]).any()


def test_the_site_prior_is_what_the_site_was_like() -> None:
    sites, target = np.array(["a", "a", "b", "b", "b", "c"]), np.array([1.0, 0, 1, 1, 1, 0])
    event = np.array([True, True, True, False, True, True])
    train = [0, 1, 2, 3]
    assert site_prior(sites, target, event, train, BINARY)[:, 0].tolist() == [0.5, 0.5, 1, 1, 1, 0.75]
    shares = site_prior(sites, target, event, train, GRADES)
    assert shares[0].tolist() == [0.5, 0.5, 0] and shares[5].tolist() == [0.25, 0.75, 0]
    times = np.array([1.0, 1, 10, 10, 3, 3])
    risk = site_prior(sites, times, event, train, SURVIVAL)[:, 0]
    assert risk[0] > risk[5] > risk[2]  # early events, unknown, late ones


def test_a_confounded_site_is_seen_by_its_prior() -> None:
    bags = made_bags(BINARY, patients=200)
    rows = tuple(replace(bag, target=float(bag.site == "near" or i % 10 == 0)) for i, bag in enumerate(bags.rows))
    bags = replace(bags, rows=rows)
    plan = made_plan(bags, FOLDS)
    outputs = made_outputs(bags, plan, BINARY)
    found = study(bags, plan, outputs, plain_floors(bags, plan, BINARY, {}), BINARY, INTERVAL, CONFIG)
    assert found.internal is not None and found.internal.floors["site_prior"].value > 0.9


def test_one_row_a_slide_and_place() -> None:
    for task in TASKS:
        bags = made_bags(task, patients=60)
        plan = made_plan(bags, FOLDS)
        outputs = made_outputs(bags, plan, task)
        rows = score_rows(bags, plan, outputs, task)
        assert len({tuple(row) for row in rows}) == 1  # one header
        keys = [(row["slide_id"], row["trial"], row["part"]) for row in rows]
        assert len(set(keys)) == len(keys) == sum(len(t.train) + len(t.internal) + len(t.external) for t in plan.trials)
        assert [row["slide_id"] for row in rows if row["part"] == "external"] == [
            b.slide_id for b in bags.rows if b.site == "far"
        ]


def test_recalibration_stands_at_external_sites() -> None:
    found = done(BINARY, FIXED)
    assert found.external is not None and found.internal is not None
    assert {(one.method, one.cases) for one in found.sites["far"].recalibration} == {
        (method, cases) for method in ("intercept", "platt") for cases in (10, 20)
    }
    assert found.sites["near"].recalibration == [] == found.internal.recalibration


def test_what_the_model_does_not_say_is_an_error() -> None:
    bags = made_bags(BINARY)
    plan = made_plan(bags, FIXED)
    outputs = made_outputs(bags, plan, BINARY)
    outputs[0, plan.trials[0].external[2]] = np.nan
    with pytest.raises(ValueError, match="says nothing about"):
        study(bags, plan, outputs, {}, BINARY, INTERVAL, CONFIG)


def test_a_part_of_one_class_still_counts_its_decisions() -> None:
    bags = made_bags(BINARY)
    bags = replace(bags, rows=tuple(replace(bag, target=1.0) if bag.site == "far" else bag for bag in bags.rows))
    plan = made_plan(bags, FIXED)
    found = study(bags, plan, made_outputs(bags, plan, BINARY), {}, BINARY, INTERVAL, CONFIG)
    part = found.external
    assert part is not None and part.auc is None and part.headline is None and part.roc is None
    assert part.operating[0].found.sensitivity.n == 40 and part.operating[0].found.specificity.n == 0
    assert "auroc" not in found.gap and "sensitivity@0.95" in found.gap and "specificity@0.95" not in found.gap


@pytest.mark.parametrize("task", [BINARY, KINDS, GRADES])
def test_one_class_tells_nothing_of_telling_classes_apart(task: Task) -> None:
    """Naming the only class is no balanced accuracy of 1: by part, by site and per seed it is withheld, and says why."""
    bags = made_bags(task)
    bags = replace(bags, rows=tuple(replace(bag, target=1.0) if bag.site == "far" else bag for bag in bags.rows))
    plan = made_plan(bags, FIXED)
    outputs = made_outputs(bags, plan, task, noise=0.01)
    found = study(bags, plan, outputs, {}, task, INTERVAL, CONFIG)
    for part in (found.external, found.sites["far"]):
        assert part is not None and not {"auroc", "balanced_accuracy", "macro_f1", "quadratic_kappa"} & set(part.metrics)
        assert part.withheld["balanced_accuracy"].startswith("one class: all are ") and "brier" in part.metrics
    assert found.internal is not None and found.internal.metrics["balanced_accuracy"].value > 0.9
    assert not any(why.startswith("one class") for why in found.internal.withheld.values())
    assert "balanced_accuracy" not in found.gap
    assert set(seed_values(bags, plan, outputs[None], task)) == {"train", "internal"}
    shown = show(found, [], None)
    assert "withheld (one class: all are " in shown and "nan" not in shown


@pytest.mark.parametrize(("positives", "said"), [(2, "withheld"), (6, "warning: 6 of the rarer class"), (40, "")])
def test_a_rare_class_withholds_what_it_decides(positives: int, said: str) -> None:
    """A bootstrap of 120 patients, two of them positive, would call its area known to a hair."""
    bags = made_bags(BINARY)
    bags = replace(bags, rows=tuple(replace(bag, target=float(i % (120 // positives) == 0)) for i, bag in enumerate(bags.rows)))
    halves = tuple(range(60)), tuple(range(60, 120))
    plan = Plan("folds", (Trial("fold 1", halves[1], halves[0], ()), Trial("fold 2", halves[0], halves[1], ())), 1, (), {})
    outputs = made_outputs(bags, plan, BINARY, 0.2)
    found = study(bags, plan, outputs, {}, BINARY, INTERVAL, CONFIG).internal
    assert found is not None and found.positives == positives
    for metric in ("auroc", "auprc", "balanced_accuracy"):
        one = found.metrics[metric]
        assert said in one.note and (one.low is None) == (said == "withheld"), metric
    assert found.metrics["brier"].low is not None


def test_without_an_error_an_interval_still_has_a_width() -> None:
    found = done(BINARY, FOLDS, noise=0.01).internal
    assert found is not None and found.auc is not None and found.auc.value == found.auc.high == 1
    fewest = min(found.counts.values())
    assert found.auc.low == pytest.approx(0.025 ** (1 / fewest)) and "all agree" in found.auc.note
    gap = done(BINARY, SITES, noise=0.01).gap["auroc"]
    assert gap.value == 0 and gap.low is None and "does not vary" in gap.note


def test_intervals_of_perfect_and_of_pooled_numbers_stay_inside_what_they_can_be() -> None:
    """Two slides a patient, all right: patients resampled all agree, and the exact interval of the patients stands in; few
    patients: Student's t knows no bound."""
    found = done(BINARY, FIXED, slides=2, noise=0.01)
    assert found.internal is not None
    for each in found.internal.operating:
        for name, interval in each.clustered.items():
            assert interval.low is not None and interval.high is not None, name
            assert 0 <= interval.low < interval.high <= 1, (name, interval)
    for split in (FIXED, FOLDS, SITES):
        for part in done(BINARY, split, slides=2).sites.values():
            for name in ("auroc", "auprc", "balanced_accuracy"):
                interval = part.metrics.get(name)
                if interval is not None and interval.low is not None and interval.high is not None:
                    assert 0 <= interval.low <= interval.high <= 1, (part.name, name, interval)


def test_only_proportions_get_the_exact_interval_of_units_that_all_agree() -> None:
    """A model without a fault: its accuracy of both classes is a proportion of patients, its Brier skill is none."""
    bags = made_bags(BINARY, 120)
    plan = made_plan(bags, FIXED)
    right = np.where(np.isnan(made_outputs(bags, plan, BINARY)), np.nan, np.array([[bag.target] for bag in bags.rows]))
    found = study(bags, plan, right, {}, BINARY, INTERVAL, CONFIG)
    assert found.internal is not None
    own = found.internal.intervals()
    assert own["balanced_accuracy"].low is not None and "exact" in own["balanced_accuracy"].note
    assert own["brier_skill"].value == 1 and own["brier_skill"].low is None
