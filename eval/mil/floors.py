"""What a slide model must beat: scores that never look at a tile's content, learned on each trial's training rows."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from histoscale.eval.mil.bags import Bags
from histoscale.eval.mil.split import Plan
from histoscale.eval.mil.task import BinaryTask, ClassesTask, RegressionTask, Task
from histoscale.eval.scores.auroc import auroc
from histoscale.eval.scores.concordance import Concordance

_Learned = Callable[[np.ndarray, np.ndarray], np.ndarray]  # a number [n] and the training rows -> outputs [n, K]


def plain_floors(bags: Bags, plan: Plan, task: Task, tissue_um2: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Outputs float64 [T, n, K] by name, NaN for a trial's training rows: a floor that learned from a slide says nothing on it.

    site_prior: what the training slides of the slide's site were like, of all training slides for an unknown site: the share of
    positives or of each class, the mean, the events by time at risk. tissue_area (µm², by slide id; where absent, the area of the
    tiles) and number_of_tiles: of two classes and of a risk the number itself, its direction chosen on the training slides; of
    several classes its share of neighbours in rank; of a number a line through the logarithm. A number that some slide lacks is
    left out.
    """
    numbers = {
        "tissue_area": np.array([tissue_um2.get(bag.slide_id, bag.tiles_um2) for bag in bags.rows]),
        "number_of_tiles": np.array([float(bag.tiles) for bag in bags.rows]),
    }
    target, event = bags.targets(range(len(bags.rows))), bags.events(range(len(bags.rows)))
    sites = np.array([bag.site for bag in bags.rows])
    shape = (len(plan.trials), len(bags.rows), task.outputs)
    found = {"site_prior": np.full(shape, np.nan)}
    found |= {name: np.full(shape, np.nan) for name, values in numbers.items() if np.isfinite(values).all()}
    for t, trial in enumerate(plan.trials):
        train, read = np.array(trial.train, np.int64), np.array([*trial.internal, *trial.external], np.int64)
        found["site_prior"][t, read] = site_prior(sites, target, event, train, task)[read]
        for name in (name for name in numbers if name in found):
            found[name][t, read] = _by_number(numbers[name], target, event, train, task)[read]
    return found


def site_prior(
    sites: np.ndarray, target: np.ndarray, event: np.ndarray, train: Sequence[int] | np.ndarray, task: Task
) -> np.ndarray:
    """What is known of a slide from its site: float64 [n, K], learned on the rows `train`."""
    rows = np.asarray(train)
    overall = _summary(target[rows], event[rows], None, task)
    found = np.tile(overall, (len(sites), 1))
    for site in np.unique(sites[rows]):
        own = rows[sites[rows] == site]
        found[sites == site] = _summary(target[own], event[own], overall, task)
    return found


def _summary(target: np.ndarray, event: np.ndarray, overall: np.ndarray | None, task: Task) -> np.ndarray:
    """[K]. Of a risk the logarithm of events by time, to which a site adds one event at the overall rate."""
    if isinstance(task, BinaryTask | RegressionTask):
        return np.array([target.mean()])
    if isinstance(task, ClassesTask):
        return np.bincount(target.astype(np.int64), minlength=task.outputs) / len(target)
    time = max(float(target.sum()), 1e-12)
    if overall is None:
        return np.array([math.log(max(int(event.sum()), 1) / time)])
    return np.array([math.log((event.sum() + 1) / (time + math.exp(-overall[0])))])


def _by_number(values: np.ndarray, target: np.ndarray, event: np.ndarray, train: np.ndarray, task: Task) -> np.ndarray:
    """Outputs [n, K] from one number a slide."""
    if isinstance(task, BinaryTask):
        rises = auroc(target[train].astype(np.int64), values[train]) >= 0.5
        return (values if rises else -values)[:, None]
    if isinstance(task, ClassesTask):
        return _neighbours(values, target[train].astype(np.int64), values[train], task.outputs)
    if isinstance(task, RegressionTask):
        x = np.log(np.maximum(values, 1e-12))
        centred = x[train] - x[train].mean()
        spread = float(centred @ centred)
        slope = float(centred @ target[train]) / spread if spread > 0 else 0.0
        return (target[train].mean() + slope * (x - x[train].mean()))[:, None]
    index = Concordance.of(target[train], event[train], values[train]).index(np.ones((1, len(train))))[0]
    return (-values if index < 0.5 else values)[:, None]


def _neighbours(values: np.ndarray, labels: np.ndarray, known: np.ndarray, classes: int) -> np.ndarray:
    """Shares of the classes among the √n training slides whose number is nearest in rank: [n, K]."""
    order = np.argsort(known, kind="stable")
    width = max(round(math.sqrt(len(known))), 1)
    counts = np.concatenate([np.zeros((1, classes)), np.eye(classes)[labels[order]].cumsum(0)])
    start = np.clip(np.searchsorted(known[order], values) - width // 2, 0, len(known) - width)
    return (counts[start + width] - counts[start]) / width
