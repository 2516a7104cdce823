"""Overlap scores: values by hand, plain restatements of the definitions, and the ignored label on both readings."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from histoscale.eval.scores.overlap import (
    Overlap,
    confusions,
    false_positive_area,
    foreground_mean,
    monai_dice,
    overlap,
    pooled_dice,
    pooled_iou,
)


def counts(
    labels: list[np.ndarray], predicted: list[np.ndarray], classes: int, ignore: int | None = None, by: str = "label"
) -> Overlap:
    size = classes if ignore is None else ignore + 1
    return overlap(confusions(torch.from_numpy(np.stack(labels)), torch.from_numpy(np.stack(predicted)), size), ignore, by)


def line(text: str) -> np.ndarray:
    return np.array([[int(c) for c in text]])


def test_dice_is_meaned_by_image_and_not_over_images_and_classes() -> None:
    # Image 1: class 1 right (1), class 2 half found (2 * 1 / (1 + 2)). Image 2: class 1 alone, 2 * 1 / (1 + 3).
    found = counts([line("1022"), line("1000")], [line("1020"), line("1110")], 3)
    by_image = (np.mean([1, 2 / 3]) + 1 / 2) / 2
    flat = np.mean([1, 2 / 3, 1 / 2])
    assert monai_dice(found) == pytest.approx(by_image) and abs(by_image - flat) > 0.05


def test_an_empty_image_is_dropped_whatever_is_predicted_on_it() -> None:
    """The reference's 1.0 against 0.875: seven images right, one empty with false positives."""
    labels, predicted = [line("0110")] * 7 + [line("0000")], [line("0110")] * 7 + [line("0110")]
    found = counts(labels, predicted, 2)
    assert monai_dice(found) == 1
    assert monai_dice(found, drop_empty=False) == 0.875
    assert false_positive_area(found, np.full(8, 0.25)) == 2 * 0.25


def test_class_one_over_an_ambiguous_zone() -> None:
    """The reference's 0.333 against 1.0: right elsewhere, class 1 predicted over four ambiguous pixels."""
    labels, predicted = [line("0015555")], [line("0011111")]
    assert monai_dice(counts(labels, predicted, 5, 5, "prediction")) == pytest.approx(1 / 3)
    assert monai_dice(counts(labels, predicted, 5, 5, "label")) == 1
    assert pooled_dice(counts(labels, predicted, 5, 5))[1] == 1 and pooled_iou(counts(labels, predicted, 5, 5))[1] == 1


def test_a_prediction_of_the_ignored_class_is_a_miss_by_label_and_a_mask_in_evas_reading() -> None:
    labels, predicted = [line("0011")], [line("0015")]
    assert monai_dice(counts(labels, predicted, 2, 5, "prediction")) == 1
    assert monai_dice(counts(labels, predicted, 2, 5, "label")) == pytest.approx(2 / 3)


def test_pooled_dice_and_iou_by_hand() -> None:
    found = counts([line("0112"), line("0000")], [line("0122"), line("1000")], 4)
    np.testing.assert_allclose(pooled_dice(found), [2 * 4 / 9, 2 * 1 / 4, 2 * 1 / 3, np.nan])
    np.testing.assert_allclose(pooled_iou(found), [4 / 5, 1 / 3, 1 / 2, np.nan])
    assert foreground_mean(pooled_dice(found)) == pytest.approx(np.mean([1 / 2, 2 / 3]))  # class 3 is absent, background is none
    assert math.isnan(foreground_mean(np.array([1.0, np.nan])))


def test_nothing_to_score_is_undefined_and_never_zero_or_one() -> None:
    found = counts([line("0000")], [line("0110")], 3)
    assert math.isnan(monai_dice(found))
    assert math.isnan(false_positive_area(counts([line("0110")], [line("1111")], 2), np.ones(1)))


@given(st.integers(0, 10_000), st.sampled_from([None, 4]))
def test_every_score_is_its_definition(seed: int, ignore: int | None) -> None:
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 4 if ignore is None else 5, (5, 3, 4)), rng.integers(0, 4, (5, 3, 4))
    labels[0] = 0
    found = counts(list(labels), list(predicted), 4, ignore)
    keep = labels != 4
    dice = []
    for truth, call, kept in zip(labels, predicted, keep, strict=True):
        each = []
        for c in (1, 2, 3):
            g, p = (truth == c) & kept, (call == c) & kept
            if g.any():
                each.append(2 * (g & p).sum() / (g.sum() + p.sum()))
        if each:
            dice.append(np.mean(each))
    assert monai_dice(found) == pytest.approx(np.mean(dice), abs=1e-12)
    for c in range(4):
        g, p = (labels == c) & keep, (predicted == c) & keep
        if g.any():
            assert pooled_dice(found)[c] == pytest.approx(2 * (g & p).sum() / (g.sum() + p.sum()))
            assert pooled_iou(found)[c] == pytest.approx((g & p).sum() / (g | p).sum())
    empty = ~(((labels > 0) & keep).any(axis=(1, 2)))
    wrong = [((call > 0) & kept).sum() for call, kept in zip(predicted[empty], keep[empty], strict=True)]
    assert false_positive_area(found, np.ones(5)) == pytest.approx(np.mean(wrong))


def test_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match="predictions hold 0 to 7: expected 0 to 2"):
        counts([line("0000")], [line("0007")], 3)
    with pytest.raises(ValueError, match="expected one shape"):
        confusions(torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 2, 3, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="masked_by is 'both': expected label or prediction"):
        counts([line("00")], [line("00")], 2, None, "both")
