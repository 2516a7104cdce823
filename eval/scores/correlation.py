"""Pearson's correlation by columns, and its sums, which add up over patients."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of the columns of a and b: [n, G] or [n] -> float64 [G] or [].

    NaN where a column does not vary: the caller says what that means. Raises ValueError for other shapes or under two rows.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim not in (1, 2) or len(a) < 2:
        raise ValueError(
            f"pearson: arrays of {list(a.shape)} and {list(b.shape)}: expected equal [n, G] or [n] with at least two rows"
        )
    a, b = _centred(a), _centred(b)
    norms = np.sqrt((a**2).sum(axis=0)) * np.sqrt((b**2).sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((a * b).sum(axis=0) / norms, -1, 1)


@dataclass(frozen=True)
class Sums:
    """n and the sums of x, y, xx, yy, xy over rows, by group: n: [P], values: float64 [P, 5, G]."""

    n: np.ndarray
    values: np.ndarray

    @staticmethod
    def of(x: np.ndarray, y: np.ndarray, group: np.ndarray, groups: int) -> "Sums":
        """x, y: [n, G]; group: int64 [n] in range(groups). Both are centred first, so that the sums keep their digits."""
        x, y = _centred(np.asarray(x, np.float64)), _centred(np.asarray(y, np.float64))
        values = np.zeros((groups, 5, x.shape[1]))
        for place, part in enumerate((x, y, x * x, y * y, x * y)):
            np.add.at(values[:, place], group, part)
        return Sums(np.bincount(group, minlength=groups).astype(np.float64), values)

    def correlation(self, groups: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pearson over the rows of the groups, which may repeat: float64 [G], NaN where a column does not vary."""
        n = self.n[groups].sum()
        x, y, xx, yy, xy = self.values[groups].sum(axis=0)
        spread = np.stack([xx - x**2 / n, yy - y**2 / n])
        spread[spread <= 1e-12 * np.stack([xx, yy])] = np.nan  # no more than rounding
        return np.clip((xy - x * y / n) / np.sqrt(spread[0] * spread[1]), -1, 1)


def _centred(values: np.ndarray) -> np.ndarray:
    """Less the mean of the columns; exactly 0 where all values are equal."""
    return np.where((values == values[:1]).all(axis=0), 0.0, values - values.mean(axis=0))
