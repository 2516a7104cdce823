"""Intervals of a proportion of independent units, and how many units a claim needs."""

import math

from scipy.stats import beta, norm


def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (doi 10.1080/01621459.1927.10502953) of hits / n. Raises ValueError unless 0 <= hits <= n > 0."""
    _check(hits, n, level)
    z = float(norm.ppf(0.5 + level / 2))
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The ends are exact at 0 and n; the formula only misses them by rounding.
    return 0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval (doi 10.1093/biomet/26.4.404) of hits / n. Raises ValueError unless 0 <= hits <= n > 0."""
    _check(hits, n, level)
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high


def needed_without_miss(required: float, level: float = 0.95) -> int:
    """The smallest n for which n hits of n put the two-sided Clopper-Pearson lower end at `required` or above."""
    if not 0 < required < 1:
        raise ValueError(f"a required proportion of {required} proves nothing: expected a number between 0 and 1")
    return math.ceil(math.log((1 - level) / 2) / math.log(required) - 1e-12)


def _check(hits: int, n: int, level: float) -> None:
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"a proportion of {hits} of {n} has no interval: expected 0 <= hits <= n and n > 0")
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval is {level}: expected a number between 0 and 1")
