"""Does a map say what the model used? Tiles go in the map's order, and in random order, and the model is asked again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.data.keys import key, permutation
from histoscale.eval.scores.interval import Interval, IntervalConfig, patient_bootstrap

Logit = Callable[[np.ndarray], float]  # features [m, D] of some of the slide's tiles -> the logit that the maps explain


@dataclass(frozen=True)
class DeletionConfig:
    """steps: shares of tiles that are taken away, 0, 1 / steps, … (1 - 1 / steps). draws: random orders. seed: of them."""

    steps: int
    draws: int
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 2 or self.draws < 1:
            raise ValueError(f"deletion has {self.steps} steps and {self.draws} draws: expected at least 2 and 1")


@dataclass(frozen=True)
class Deletion:
    """removed: float64 [s], shares of tiles. curves: order -> float64 [s], the logit times the side that the model took.
    random: float64 [draws, s]."""

    removed: np.ndarray
    curves: dict[str, np.ndarray]
    random: np.ndarray

    def gain(self, order: str) -> float:
        """Area between the mean random curve and the order's, a mean over shares in units of the logit; above 0: what the map
        puts first carries more of the model's answer than tiles at random."""
        return _area(self.random.mean(0), self.removed) - _area(self.curves[order], self.removed)

    def share_of_draws(self, order: str) -> float:
        """Share of the random orders whose curve lies above the order's by area."""
        return float(np.mean([_area(curve, self.removed) > _area(self.curves[order], self.removed) for curve in self.random]))


def deletion(
    logit: Logit, features: np.ndarray, orders: Mapping[str, np.ndarray], side: float, name: str, config: DeletionConfig
) -> Deletion:
    """The model's logit as tiles go (Samek et al. 2017, doi 10.1109/TNNLS.2016.2599820, here with whole tiles of a bag).

    features: [n, D]. orders: name -> importance [n], the highest goes first. side: +1 or -1, what the model said: curves are the
    logit times it, so that a faithful order falls fast on either side. name: of the slide, a key of the random orders.
    Raises ValueError for an importance of another length or a side that is neither.
    """
    n = len(features)
    for order, values in orders.items():
        if len(values) != n:
            raise ValueError(f"the order {order} ranks {len(values)} tiles of {n}: expected one number a tile")
    if side not in (1.0, -1.0):
        raise ValueError(f"side is {side}: expected 1 for what raises the logit or -1 for what lowers it")
    removed = np.arange(config.steps) / config.steps
    counts = (removed * n).astype(int)
    whole = side * logit(features)

    def curve(order: np.ndarray) -> np.ndarray:
        # Kept tiles stay in the slide's order: a model that looks at places (TransMIL) sees the slide with holes.
        return np.array([side * logit(features[np.sort(order[count:])]) if count else whole for count in counts])

    draws = [permutation(key(config.seed, f"deletion/{name}", draw), n) for draw in range(config.draws)]
    curves = {order: curve((-values).argsort(kind="stable")) for order, values in orders.items()}
    return Deletion(removed, curves, np.stack([curve(order) for order in draws]))


def faithfulness(gains: Sequence[float], patients: Sequence[str], config: IntervalConfig) -> Interval:
    """Mean gain over slides with its interval over patients."""
    values = np.asarray(gains, np.float64)
    return patient_bootstrap(lambda drawn: float(values[drawn].mean()), patients, config)


def _area(curve: np.ndarray, removed: np.ndarray) -> float:
    steps = (curve[1:] + curve[:-1]) / 2 * np.diff(removed)
    return float(steps.sum() / (removed[-1] - removed[0]))
