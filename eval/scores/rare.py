"""What a bootstrap of patients does not know of a rare class: that one, or none, of it was there."""

import math
from dataclasses import replace

import numpy as np

from histoscale.eval.scores.auroc import REPORTABLE_CLASS
from histoscale.eval.scores.binomial import clopper_pearson
from histoscale.eval.scores.interval import REPORTABLE_PATIENTS, Interval

PROPORTIONS = ("auroc", "auprc", "balanced_accuracy", "macro_f1", "accuracy", "c_index", "sensitivity", "specificity")
OF_EVERY_UNIT = ("brier", "mae", "rmse", "accuracy", "quadratic_kappa")  # which no rare class decides
ONE_CLASS = "withheld: all that is scored is of one class, and a mean over classes would be the recall of that one"


def of_classes(found: Interval, labels: np.ndarray, owners: np.ndarray, level: float | None) -> Interval:
    """A mean over classes (balanced accuracy, macro F1): undefined where one class is there, else as `cautious` has it.

    labels, owners: [n], the class and the patient of each row. level: None for a difference.
    """
    present = np.unique(labels)
    if len(present) < 2:
        return Interval(math.nan, None, None, found.patients, found.units, ONE_CLASS)
    return cautious(found, min(len(np.unique(owners[labels == c])) for c in present), level)


def cautious(found: Interval, rarer: int | None, level: float | None) -> Interval:
    """What a bootstrap of patients does not know. Under 3 groups of the rarest class (or with an event) no interval, under 10 a
    warning, as `report_area` does. Where draws all agree because nothing went wrong, or all: the ends are Clopper-Pearson's of
    those groups at `level`; of a difference, or of what is no proportion (level None), there are none. rarer: groups with a
    unit of the rarest class; None where no class decides."""
    if rarer is None or found.low is None:
        return found
    if rarer < REPORTABLE_CLASS:
        return replace(
            found, low=None, high=None, note=f"interval withheld: {rarer} patients of the rarer class or with an event"
        )
    if found.low == found.high and level is None:
        return replace(found, low=None, high=None, note="interval withheld: it does not vary between patients")
    if found.low == found.high == found.value and level is not None and found.value in (0.0, 1.0):
        low, high = clopper_pearson(round(found.value) * rarer, rarer, level)
        found = replace(found, low=low, high=high, note=f"the exact interval of {rarer} groups that all agree")
    if rarer >= REPORTABLE_PATIENTS:
        return found
    return replace(found, note="; ".join(filter(None, [f"warning: {rarer} of the rarer class or with an event", found.note])))
