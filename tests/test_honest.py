"""protocol=honest: what is asked is not known, outer folds ask each row once; few-shot draws go by slides."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from histoscale.data.names import codes
from histoscale.eval import few_shot
from histoscale.eval import honest as module
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches, Usage
from histoscale.eval.few_shot import FewShotConfig, draw, fit_few
from histoscale.eval.floors import FloorsConfig
from histoscale.eval.honest import SEALED, HonestConfig, colour_floor, honest, outer_questions, question_of, random_floor
from histoscale.eval.probe import ProbeConfig
from histoscale.eval.prototype import centred, prototype_log_probabilities, prototypes
from histoscale.eval.robustness.curves import questions_of

PROBE = ProbeConfig("cls", [1.0, 0.1, 0.01], 0.1, 3, 1e-6, 2e-3, 500, 5, 0.07, 0)
FEW = FewShotConfig(shots=[1, 4], draws=6, penalty=0.01, tolerance=1e-6, max_iterations=500, seed=0)
CONFIG = HonestConfig(["cls"], ["linear", "knn", "prototype", "few_shot"], FEW, 4, [])
FLOORS = FloorsConfig(initialisations=2, trees=20, leaf=2, rows=20000, seed=0)


def patches_of(choose: str = "folds", **changed: Any) -> LabelledPatches:
    """Ten patches a patient of 36, three classes; roles train, select, report, external."""
    rng = np.random.default_rng(0)
    roles = np.repeat(["train"] * 15 + ["select"] * 6 + ["report"] * 9 + ["external"] * 6, 10)
    patients = np.repeat([f"P{i:02}" for i in range(36)], 10)
    usage = Usage(choose, "report", ("report",), None)
    patches = LabelledPatches("x", ("u", "v", "w"), rng.integers(0, 3, 360), roles, patients, roles, "patient", 0.5, 8, "h",
                              lambda rows: np.empty(0), patients, patients, usage)  # fmt: skip
    return replace(patches, **changed)


def vectors(labels: np.ndarray, signal: float, seed: int = 1, width: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(len(labels), width)) + signal * np.eye(3, width)[labels]).astype(np.float32)


def test_every_probe_answers_for_report_and_external() -> None:
    patches = patches_of()
    found = honest([vectors(patches.labels, 3.0)], "e", "cls", patches, CONFIG, PROBE, "cpu")
    names = {"linear", "knn", "prototype", "few_shot/1", "few_shot/4", "few_shot_prototype/1", "few_shot_prototype/4"}
    assert {(one.probe, one.role) for one in found} == {(name, role) for name in names for role in ("report", "external")}
    accuracy = {one.probe: (one.predicted == patches.labels[one.rows]).mean() for one in found if one.role == "report"}
    assert min(accuracy[name] for name in ("linear", "knn", "prototype")) > 0.85
    assert accuracy["few_shot/1"] < accuracy["few_shot/4"] < accuracy["linear"]
    for one in found:
        assert one.protocol == "honest" and len(one.logs) == (6 if "few_shot" in one.probe else 1)
        np.testing.assert_array_equal(one.rows, patches.rows(one.role))
    assert next(one for one in found if one.probe == "linear").note.startswith("penalty ")


@pytest.mark.parametrize("choose", ["folds", "select"])
def test_labels_that_are_asked_change_nothing(choose: str) -> None:
    patches = patches_of(choose)
    x = vectors(patches.labels, 1.0)
    hidden = np.isin(patches.roles, ("report", "external"))
    other = replace(patches, labels=np.where(hidden, (patches.labels + 1) % 3, patches.labels))
    pairs = [honest([x], "e", "cls", one, CONFIG, PROBE, "cpu") for one in (patches, other)]
    for first, second in zip(*pairs, strict=True):
        np.testing.assert_array_equal(first.logs, second.logs)
    question = question_of(patches)
    assert (question.labels[hidden] == SEALED).all() and (question.labels[~hidden] >= 0).all()
    assert len(question.select) == (60 if choose == "select" else 0)


def test_outer_folds_ask_every_row_once_and_know_no_block_of_it() -> None:
    patches = patches_of("outer")
    inside = np.flatnonzero(patches.roles != "external")
    questions = outer_questions(patches, 4, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([q.asked["outer"] for q in questions])), inside)
    for question in questions:
        assert not set(patches.blocks[question.asked["outer"]]) & set(patches.blocks[question.train])
        assert (question.labels[question.asked["outer"]] == SEALED).all()
    x = vectors(patches.labels, 3.0)
    found = honest([x], "e", "cls", patches, replace(CONFIG, probes=["linear"]), PROBE, "cpu")
    assert [one.role for one in found] == ["outer"] and found[0].logs.shape == (1, 300, 3)
    np.testing.assert_array_equal(found[0].rows, inside)
    assert (found[0].predicted[0] == patches.labels[inside]).mean() > 0.9
    # a fold's answer does not hang on the labels that it is asked about
    held = questions[0].asked["outer"]
    moved = patches.labels.copy()
    moved[held] = (moved[held] + 1) % 3
    same = replace(questions[0], labels=module._sealed(replace(patches, labels=moved), questions[0].train, held[:0], {}).labels)
    first, second = (module.answer(x, q, CONFIG, PROBE, [0], "cpu")[0]["linear", "outer"] for q in (questions[0], same))
    np.testing.assert_array_equal(first, second)
    beside = honest([x], "e", "cls", patches_of(), replace(CONFIG, probes=["knn"], outer_beside=["x"]), PROBE, "cpu")
    assert [one.role for one in beside] == ["report", "external", "outer"]
    assert len(outer_questions(patches_of(blocks=np.repeat(["a", "b"], 180)), 4, 0)) == 2
    with pytest.raises(DatasetError, match="has one patient: outer folds need at least two"):
        outer_questions(patches_of(blocks=np.full(360, "a")), 4, 0)
    lonely = np.where(patches.blocks == "P00", 2, patches.labels % 2)
    with pytest.raises(DatasetError, match="all of the class 'w' is in one fold"):
        outer_questions(replace(patches, labels=lonely), 4, 0)


def test_too_many_outer_folds_name_the_key_that_asked_for_them() -> None:
    rows = np.arange(360)
    few = patches_of("outer", labels=rows % 3, blocks=rows.astype(str), roles=np.where(rows < 12, "train", ""))
    with pytest.raises(ValueError, match="no class has over 4 images .*, and honest.outer_folds=5: set honest.outer_folds=4"):
        outer_questions(few, 5, 0)
    with pytest.raises(ValueError, match="and curves.folds=5: set curves.folds=4"):
        questions_of(few, 5, 0)


def test_floors_go_the_same_way() -> None:
    patches = patches_of()
    colour = colour_floor(np.abs(vectors(patches.labels, 1.0, 5)), patches, CONFIG, PROBE, FLOORS, "cpu")
    assert {one.embedding for one in colour if one.probe == "linear"} == {"logistic", "logistic, C = 1", "forest"}
    features = {pool: [vectors(patches.labels, 0.5, seed) for seed in (7, 8)] for pool in ("cls", "cls+mean")}
    random = random_floor(features, patches, CONFIG, PROBE, "cpu")
    assert {one.embedding for one in random} == {"cls", "cls+mean"}
    runs = {one.probe: len(one.logs) for one in random}
    assert runs["linear"] == 2 and runs["few_shot/4"] == 6  # draws are shared out among the initialisations
    with pytest.raises(ValueError, match="expected some of linear"):
        honest(features["cls"], "e", "cls", patches, replace(CONFIG, probes=["svm"]), PROBE, "cpu")


def test_draws_take_slides_before_patches_and_more_shots_hold_the_fewer() -> None:
    rng = np.random.default_rng(0)
    labels, slides = rng.integers(0, 2, 200), np.repeat(np.arange(10), 20)
    for run in range(5):
        for c, rows in enumerate(draw(labels, 2, slides, 16, run, 0)):
            assert (labels[rows] == c).all() and len(set(rows.tolist())) == 16
            assert len(set(slides[rows[:10]])) == 10 and len(set(slides[rows[10:]])) == 6
            np.testing.assert_array_equal(rows[:4], draw(labels, 2, slides, 4, run, 0)[c])
    draws = [draw(labels, 2, slides, 4, run, 0) for run in range(30)]
    assert len({tuple(rows[0]) for rows in draws}) == 30
    firsts = [slides[rows[c][0]] for rows in draws for c in (0, 1)]
    assert len(set(firsts)) == 10  # every slide comes first in some draw
    with pytest.raises(ValueError, match="asks for 150"):
        draw(labels, 2, slides, 150, 0, 0)


def test_units_are_counted_once_and_not_in_every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    patches, counted = patches_of(), []
    monkeypatch.setattr(few_shot, "codes", lambda units: counted.append(len(units)) or codes(units))
    honest([vectors(patches.labels, 1.0)], "e", "cls", patches, replace(CONFIG, probes=["few_shot"]), PROBE, "cpu")
    assert CONFIG.few_shot.draws > 2 == len(counted)  # report and external


def test_few_shot_regressions_are_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(3, 12, 30)) + 2 * np.eye(3, 30)[np.tile(np.repeat(range(3), 4), (3, 1))])
    y = torch.from_numpy(np.tile(np.repeat(range(3), 4), (3, 1)))
    queries = rng.normal(size=(20, 30))
    found = fit_few(x, y, 3, replace(FEW, tolerance=1e-8)).log_probabilities(queries)
    centre, z = centred(x)
    for run in range(3):
        model = LogisticRegression(C=1 / (FEW.penalty * 12), tol=1e-10, max_iter=5000).fit(z[run].numpy(), y[run].numpy())
        moved = queries - centre[run].numpy()
        expected = model.predict_proba(moved / np.linalg.norm(moved, axis=1, keepdims=True))
        np.testing.assert_allclose(np.exp(found[run]), expected, atol=1e-4)


def test_prototypes_are_the_nearest_mean_and_both_ways_agree() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 90)
    x, queries = rng.normal(size=(90, 6)) + 5 + 2 * np.eye(3, 6)[labels], rng.normal(size=(40, 6)) + 5
    found = prototype_log_probabilities(x.astype(np.float32), labels, 4, queries.astype(np.float32), 0.07, "cpu")
    z, asked = (v - x.mean(0) for v in (x, queries))
    z, asked = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (z, asked))
    means = np.stack([z[labels == c].mean(0) for c in range(3)])
    nearest = ((asked[:, None] - means) ** 2).sum(2).argmin(1)
    np.testing.assert_array_equal(found.argmax(1), nearest)  # and the class without a row is never called
    batched = prototypes(torch.from_numpy(x)[None], torch.from_numpy(labels)[None], 4, 0.07).log_probabilities(queries)
    np.testing.assert_allclose(batched[0, :, :3], found[:, :3], atol=1e-4)
