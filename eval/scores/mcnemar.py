"""Two deciders on the same independent units: the exact test of the units that only one of them gets right."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> tuple[int, int, float]:
    """(right by the first alone, by the second alone, exact two-sided p) (McNemar 1947, doi 10.1007/BF02295996).

    first_right, second_right: bool [n], one independent unit each. p is 1 where the two never differ.
    """
    first, second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    return first, second, float(binomtest(first, first + second).pvalue) if first + second else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """p-values of one family, adjusted by Holm's step-down method (1979): compare each with the level itself."""
    order = np.argsort(values, kind="stable")
    adjusted, largest = np.empty(len(values)), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return [float(value) for value in adjusted]
