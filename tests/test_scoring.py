"""Scores: scikit-learn's values, the row-wise bootstrap's intervals, shared draws, withheld intervals, labels opened once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn import metrics as sk

from histoscale.eval.datasets.patches import LabelledPatches, Usage
from histoscale.eval.results import Outcome, Score
from histoscale.eval.scores.auroc import areas, mean_areas
from histoscale.eval.scores.classification import balanced_accuracy, calibration_bins, calibration_error_of, macro_f1
from histoscale.eval.scores.interval import IntervalConfig, Resampling, paired_difference, patient_bootstrap
from histoscale.eval.scoring import ScoringConfig, Seen, Truth, score

ROOT = Path(__file__).resolve().parents[1]
VALUES = {k: v for k, v in yaml.safe_load((ROOT / "configs/scoring/default.yaml").read_text()).items() if k != "defaults"}
CONFIG = ScoringConfig(**{**VALUES, "ordered": ["x"]}, interval=IntervalConfig(200, 0.95, 0))
SEEN = {name: Seen("native", 0.5, 112.0) for name in ("e", "f", "random", "colour")}


def patches_of(classes: int, patients: int = 30, groups: str = "patient") -> LabelledPatches:
    rng = np.random.default_rng(3)
    owners = np.sort(rng.choice([f"P{i:03}" for i in range(patients)], 400))
    labels, roles = rng.integers(0, classes, 400), np.full(400, "report")
    names, usage = tuple("uvwz"[:classes]), Usage("folds", "report", ("report",), "v" if classes == 2 else None)
    return LabelledPatches("x", names, labels, roles, owners, owners, groups, 0.5, 8, "h", lambda r: np.empty(0), owners, owners,
                           usage)  # fmt: skip


def outcome(patches: LabelledPatches, signal: float, runs: int = 1, seed: int = 0, **changed: Any) -> Outcome:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(runs, 400, len(patches.classes))) + signal * np.eye(len(patches.classes))[patches.labels]
    logs = logits - np.logaddexp.reduce(logits, 2, keepdims=True)
    return replace(Outcome("e", "cls", "honest", "linear", "report", logs, np.arange(400), ""), **changed)


def by_metric(scores: list[Score], minus: str = "") -> dict[str, Score]:
    return {one.metric: one for one in scores if one.minus == minus and one.encoder == "e"}


@pytest.mark.parametrize("classes", [2, 4])
def test_values_are_scikit_learns(classes: int) -> None:
    patches = patches_of(classes)
    one = outcome(patches, 1.0, runs=3)
    found = by_metric(score([one], patches, Truth(patches), SEEN, CONFIG))
    y, p = patches.labels, np.exp(one.logs)
    expected = {
        "balanced_accuracy": [sk.balanced_accuracy_score(y, q.argmax(1)) for q in p],
        "macro_f1": [sk.f1_score(y, q.argmax(1), average="macro") for q in p],
        "accuracy": [sk.accuracy_score(y, q.argmax(1)) for q in p],
        "quadratic_kappa": [sk.cohen_kappa_score(y, q.argmax(1), weights="quadratic", labels=range(classes)) for q in p],
        "log_loss": [sk.log_loss(y, q) for q in p],
        "auroc": [sk.roc_auc_score(y, q[:, 1] if classes == 2 else q, multi_class="ovr") for q in p],
    }
    if classes == 2:
        expected["brier"] = [sk.brier_score_loss(y, q[:, 1]) for q in p]
    assert set(found) == set(expected) | ({"ece"} if classes == 2 else set())
    for metric, values in expected.items():
        assert found[metric].interval.value == pytest.approx(np.mean(values), abs=1e-6), metric
        assert found[metric].spread == pytest.approx(np.std(values, ddof=1), abs=1e-6), metric
        low, high = found[metric].interval.low, found[metric].interval.high
        assert low is not None and high is not None and low < found[metric].interval.value < high
    assert found["auroc"].runs == 3 and found["auroc"].effective_mpp == 0.5 and not found["auroc"].floor


def test_an_absent_class_does_not_enter() -> None:
    patches = patches_of(4)
    patches = replace(patches, labels=np.where(patches.labels == 3, 0, patches.labels))
    one = outcome(patches_of(4), 1.0)
    found = by_metric(score([one], patches, Truth(patches), SEEN, CONFIG))
    predicted = one.predicted[0]
    assert found["balanced_accuracy"].interval.value == pytest.approx(balanced_accuracy(patches.labels, predicted, 4))
    assert found["macro_f1"].interval.value == pytest.approx(macro_f1(patches.labels, predicted, 4))
    present = [sk.roc_auc_score(patches.labels == c, one.logs[0, :, c]) for c in range(3)]
    assert found["auroc"].interval.value == pytest.approx(np.mean(present))


@pytest.mark.parametrize("patients", [30, 15])
def test_intervals_and_differences_are_the_row_wise_bootstraps(patients: int) -> None:
    """The same draws, patient by patient, through a statistic of rows; for 15 patients the same t-interval."""
    patches = patches_of(4, patients)
    pair = [outcome(patches, 1.0), outcome(patches, 0.8, seed=1, encoder="f")]
    scores = score(pair, patches, Truth(patches), SEEN, CONFIG)

    def statistic(one: Outcome) -> Any:
        return lambda rows: balanced_accuracy(patches.labels[rows], one.predicted[0][rows], 4)

    plain = patient_bootstrap(statistic(pair[0]), patches.patients, CONFIG.interval)
    mine = by_metric(scores)["balanced_accuracy"].interval
    assert (mine.low, mine.high) == pytest.approx((plain.low, plain.high), abs=1e-12) and mine.note == plain.note
    plain = paired_difference(statistic(pair[0]), statistic(pair[1]), patches.patients, CONFIG.interval)
    mine = by_metric(scores, "f")["balanced_accuracy"].interval
    assert (mine.value, mine.low, mine.high) == pytest.approx((plain.value, plain.low, plain.high), abs=1e-12)


def test_undefined_replicates_are_drawn_again_and_counted() -> None:
    owners = np.array([f"P{i:02}" for i in range(40)])
    values = np.r_[np.ones(4), np.zeros(36)]  # a draw misses all four with probability .9 ** 40 = .015

    def plain(rows: np.ndarray) -> float:
        return float(rows.mean() / values[rows].sum()) if values[rows].sum() else float("nan")

    def totals(sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(sums[..., 1] > 0, sums[..., 0] / 40 / sums[..., 1], np.nan)

    config = IntervalConfig(2000, 0.95, 0)
    draws = Resampling.of(owners, config)
    found = draws.interval(draws.sums(np.stack([np.arange(40), values], 1)), totals)
    expected = patient_bootstrap(plain, owners, config)
    assert found.note == expected.note and "drawn again" in found.note
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_few_patients_get_no_interval_and_the_count_is_why() -> None:
    patches = patches_of(2, 9)
    for one in score([outcome(patches, 1.0)], patches, Truth(patches), SEEN, CONFIG):
        assert one.interval.low is None and "9 patients" in one.interval.note


def test_areas_of_one_run_and_class_are_obuchowskis() -> None:
    patches = patches_of(2, 60)
    runs = [np.exp(outcome(patches, signal, seed=seed).logs) for signal, seed in ((1.0, 0), (0.8, 1))]
    found = mean_areas(patches.labels, runs, [1], patches.patients)
    expected = areas(patches.labels, np.stack([one[0, :, 1] for one in runs]), patches.patients.tolist())
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=0.02)
    assert found.groups == expected.groups


def test_intervals_of_mean_areas_are_the_bootstraps() -> None:
    """Macro over classes and runs: an analytic interval where a bootstrap of whole patients has its own."""
    patches = patches_of(4, 60)
    one = outcome(patches, 0.8, runs=2)
    found = by_metric(score([one], patches, Truth(patches), SEEN, CONFIG))["auroc"].interval

    def statistic(rows: np.ndarray) -> float:
        return float(
            np.mean([sk.roc_auc_score(patches.labels[rows], np.exp(logs[rows]), multi_class="ovr") for logs in one.logs])
        )

    expected = patient_bootstrap(statistic, patches.patients, IntervalConfig(400, 0.95, 0))
    assert expected.low is not None and expected.high is not None and found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.15)
    assert found.low == pytest.approx(expected.low, abs=0.005)


def test_calibration_error_has_its_golden_value() -> None:
    p = np.array([0.9, 0.8, 0.8, 0.55, 0.3, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    hit = np.arange(12) < 5
    assert calibration_error_of(calibration_bins(p, hit, 15).sum(0)) == pytest.approx(0.279167, abs=1e-6)
    four = np.array([0.9, 0.9, 0.1, 0.1])
    assert calibration_error_of(calibration_bins(four, np.array([1, 0, 0, 0], bool), 15).sum(0)) == pytest.approx(0.25)


def test_floors_take_their_better_form_and_stand_beside() -> None:
    patches = patches_of(4)
    floors = [
        outcome(patches, 0.2, seed=2, encoder="random", embedding="cls"),
        outcome(patches, 0.6, seed=3, encoder="random", embedding="cls+mean"),
        outcome(patches, 0.5, seed=4, encoder="colour", embedding="forest"),
        outcome(patches, 0.1, seed=5, encoder="colour", embedding="logistic"),
    ]
    truth = Truth(patches)
    scores = score([outcome(patches, 1.5), *floors], patches, truth, SEEN, CONFIG)
    assert {(one.encoder, one.embedding) for one in scores if one.floor} == {("random", "cls+mean"), ("colour", "forest")}
    assert "log_loss" not in {one.metric for one in scores if one.embedding == "forest"}
    for floor in ("random", "colour"):
        gap = by_metric(scores, floor)["balanced_accuracy"]
        own = by_metric(scores)["balanced_accuracy"].interval.value
        its = next(one for one in scores if one.encoder == floor and one.metric == "balanced_accuracy").interval.value
        assert gap.interval.value == pytest.approx(own - its) and gap.interval.low is not None and gap.interval.low > 0
    assert str(truth) == "reads: report 1"


def test_what_cannot_be_compared_is_refused() -> None:
    patches = patches_of(4)
    other = outcome(patches, 1.0, encoder="f", rows=np.arange(400)[::-1])
    with pytest.raises(ValueError, match="different rows"):
        score([outcome(patches, 1.0), other], patches, Truth(patches), SEEN, CONFIG)
    with pytest.raises(ValueError, match="expected some of balanced_accuracy"):
        score([outcome(patches, 1.0)], patches, Truth(patches), SEEN, replace(CONFIG, metrics=["kappa"]))


def test_kappa_is_no_proportion_and_gets_no_exact_interval_of_one() -> None:
    """All called one class: kappa is 0 and balanced accuracy a half, whoever is drawn."""
    patches = patches_of(2, patients=10)
    logs = np.log(np.tile([0.9, 0.1], (1, 400, 1)))
    found = by_metric(score([outcome(patches, 1.0, logs=logs)], patches, Truth(patches), SEEN, CONFIG))
    kappa = found["quadratic_kappa"].interval
    assert kappa.value == 0 and kappa.high == 0 and "exact" not in kappa.note
    alone = replace(patches, labels=np.zeros(400, np.int64))
    alone = by_metric(score([outcome(patches, 1.0)], alone, Truth(alone), SEEN, CONFIG))
    assert "one class" in alone["quadratic_kappa"].interval.note
