"""Parts of one class, and of few positives, have no balanced accuracy of 1.000 to show; copies of a picture are one unit."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sets_folder import OWN

from histoscale.eval.datasets.folder import open_folder
from histoscale.eval.datasets.patches import USAGE_OF_OWN, DatasetError, LabelledPatches
from histoscale.eval.features import pixel_hash
from histoscale.eval.honest import outer_questions
from histoscale.eval.leakage import join_copies
from histoscale.eval.results import Outcome, Score
from histoscale.eval.scores.interval import IntervalConfig
from histoscale.eval.scores.rare import ONE_CLASS
from histoscale.eval.scoring import OF_CLASSES, ScoringConfig, Seen, Truth, score
from histoscale.eval.table import cell, number

METRICS = ["balanced_accuracy", "macro_f1", "accuracy", "auroc", "quadratic_kappa"]
SCORING = ScoringConfig(METRICS, ["balanced_accuracy"], [], 10, IntervalConfig(200, 0.95, 0))


def scored(labels: np.ndarray, hits: np.ndarray) -> dict[str, Score]:
    """Every row a patient of its own, each predicted right where hits is true."""
    n = len(labels)
    names = np.array([f"P{i}" for i in range(n)])
    patches = LabelledPatches(
        "set", ("a", "b"), labels, np.full(n, "report"), names, np.full(n, ""), "patient", None, 8, "", lambda rows: [], names,
        np.full(n, ""), USAGE_OF_OWN,
    )  # fmt: skip
    said = np.where(hits, labels, 1 - labels)
    logs = np.log(np.where(np.arange(2) == said[:, None], 0.9, 0.1))[None]
    outcome = Outcome("ours", "cls", "honest", "linear", "report", logs, np.arange(n), "")
    found = score([outcome], patches, Truth(patches), {"ours": Seen("resize", None, None)}, SCORING)
    return {one.metric: one for one in found}


def test_a_part_of_one_class_has_the_reason_instead_of_a_number() -> None:
    found = scored(np.ones(30, np.int64), np.full(30, True))
    for metric in (set(SCORING.metrics) & set(OF_CLASSES)) - {"quadratic_kappa"}:  # which is of grades alone
        one = found[metric]
        assert math.isnan(one.interval.value) and one.interval.note == ONE_CLASS and number(one) == "–"
        assert cell(one)["value"] is None and cell(one)["note"] == ONE_CLASS
    assert found["accuracy"].interval.value == 1 and "quadratic_kappa" not in found


@pytest.mark.parametrize("positives, note", [(1, "withheld: 1 pat"), (2, "withheld: 2 pat"), (5, "exact"), (15, "exact")])
def test_few_positives_that_are_all_right_prove_little(positives: int, note: str) -> None:
    labels = (np.arange(30) < positives).astype(np.int64)
    one = scored(labels, np.full(30, True))["balanced_accuracy"].interval
    assert one.value == 1 and note in one.note
    if note == "exact":
        assert one.high == 1 and one.low is not None and one.low == pytest.approx(0.025 ** (1 / positives), abs=1e-9)
    else:
        assert one.low is None and one.high is None


def pictures(root: Path, many: int, copies: int, plain: int = 0) -> LabelledPatches:
    rng = np.random.default_rng(0)
    for i in range(many):
        image = np.full((8, 8, 3), 255, np.uint8) if i < plain else rng.integers(0, 256, (8, 8, 3), np.uint8)
        for copy in range(copies):
            path = root / "ab"[(i + copy) % 2] / f"{i}_{copy}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
    return open_folder(root, OWN, 2)


def hashes(patches: LabelledPatches) -> np.ndarray:
    return np.array([pixel_hash(image) for image in patches.read(np.arange(len(patches)))], np.uint64)


def test_no_fold_has_copies_of_a_picture_on_two_sides(tmp_path: Path) -> None:
    patches = pictures(tmp_path, 20, 3)
    found = hashes(patches)
    joined, said = join_copies(patches, found)
    assert "20 pictures stand several times" in said[0] and "60 units became 20" in said[0] and "20 of them under" in said[0]
    assert joined.hash == patches.hash and len(np.unique(joined.patients)) == 20
    for one, apart in ((joined, False), (patches, True)):
        torn = [
            set(found[question.train].tolist()) & set(found[question.asked["outer"]].tolist())
            for question in outer_questions(one, 5, 0)
        ]
        assert any(torn) == apart
    assert join_copies(joined, found) == (joined, ())


def test_whole_patients_are_joined_with_the_copies_that_they_share(tmp_path: Path) -> None:
    patches = pictures(tmp_path, 6, 2)
    owners = np.array([f"P{i // 2}" for i in range(12)])
    found = hashes(patches)
    joined, _ = join_copies(replace(patches, patients=owners, blocks=owners, groups="patient"), found)
    for key in np.unique(found):
        assert len(np.unique(joined.blocks[found == key])) == 1
    for owner in np.unique(owners):
        assert len(np.unique(joined.blocks[owners == owner])) == 1


def test_pictures_of_one_colour_join_nobody(tmp_path: Path) -> None:
    patches = pictures(tmp_path, 6, 2, plain=3)
    joined, said = join_copies(patches, hashes(patches))
    assert "1 pictures of one colour alone" in said[0] and "3 pictures stand several times" in said[1]
    assert len(np.unique(joined.blocks)) == 6 + 3


def test_what_is_left_after_joining_must_still_make_folds(tmp_path: Path) -> None:
    patches = pictures(tmp_path, 1, 8)
    with pytest.raises(DatasetError, match="1 pictures stand several times, pixel for pixel, and tie all 8 units together"):
        join_copies(patches, hashes(patches))
