"""How much of a score is the seed's: the headline of each seed's models alone."""

import numpy as np

from histoscale.eval.mil.bags import Bags
from histoscale.eval.mil.metrics import headline, metrics
from histoscale.eval.mil.split import Plan
from histoscale.eval.mil.task import Task
from histoscale.eval.mil.units import places, units


def seed_values(bags: Bags, plan: Plan, outputs: np.ndarray, task: Task) -> dict[str, list[float]]:
    """The headline of each seed, by part (train, internal, external); parts that a plan does not read, or where the headline is
    undefined, are absent.

    outputs: float64 [R, T, n, K], of seed, trial and row. Their spread is no interval: patients stay the same.
    """
    found = {}
    for part in ("train", "internal", "external"):
        where = places(plan, part)
        if where:
            each = [units(bags, where, one, task) for one in outputs]
            values = [metrics(one, task)[headline(task)](np.ones((1, len(one.groups))))[0] for one in each]
            if not np.isnan(values).any():
                found[part] = [float(value) for value in values]
    return found
