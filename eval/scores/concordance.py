"""Harrell's C: does a higher risk go with an earlier event? Also for many weightings of the units at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Concordance:
    """Pairs of units of one trial. won: float32 [n, n], 1 where the unit of the row had its event first and the higher risk, a
    half where the risks are equal. comparable: float32 [n, n], 1 where the row's unit is known to have had its event first."""

    won: np.ndarray
    comparable: np.ndarray

    @staticmethod
    def of(
        times: np.ndarray, events: np.ndarray, risks: np.ndarray, trials: Sequence[int] | np.ndarray | None = None
    ) -> "Concordance":
        """Harrell 1982 (doi 10.1001/jama.1982.03320430047030): a pair counts when the unit with the shorter time had its event;
        at equal times, when only one of the two had. Equal risks count a half.

        times: [n] > 0; events: bool [n], False where censored; risks: [n], higher is worse; trials: a number a unit, whose risks
        are never compared with those of another trial. Raises ValueError for shapes that differ and values that are no numbers.
        """
        times, risks, events = np.asarray(times, np.float64), np.asarray(risks, np.float64), np.asarray(events, bool)
        if not times.shape == risks.shape == events.shape or not (np.isfinite(times).all() and np.isfinite(risks).all()):
            raise ValueError(
                f"{times.shape} times, {events.shape} events, {risks.shape} risks: expected one number each, all finite"
            )
        trial = np.zeros(len(times), np.int64) if trials is None else np.asarray(trials)
        first = (times[:, None] < times) | ((times[:, None] == times) & ~events)
        comparable = (first & events[:, None] & (trial[:, None] == trial)).astype(np.float32)
        right = (risks[:, None] > risks) + np.float32(0.5) * (risks[:, None] == risks)
        return Concordance((comparable * right).astype(np.float32), comparable)

    def index(self, weights: np.ndarray) -> np.ndarray:
        """weights: [b, n], how often each unit counts -> float64 [b], NaN where no pair is comparable."""
        w = np.asarray(weights, np.float32)
        won, pairs = ((w @ table * w).sum(-1, dtype=np.float64) for table in (self.won, self.comparable))
        with np.errstate(invalid="ignore", divide="ignore"):
            return won / pairs
