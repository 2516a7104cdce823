"""All trials of a plan: what trains on each, and what every slide is then given by models that never saw its patient."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histoscale.data.journal import Progress
from histoscale.eval.mil.bags import Bags
from histoscale.eval.mil.ensemble import Reading
from histoscale.eval.mil.features import Features
from histoscale.eval.mil.fit import FitConfig, Fitted, fit
from histoscale.eval.mil.task import Task
from histoscale.eval.mil.trials import Plan

READ = ("internal", "external")


@dataclass(frozen=True)
class Arm:
    """A way to a score: bags, their features, and what trains on them."""

    bags: Bags
    features: Features
    config: FitConfig

    def epochs(self, plan: Plan) -> int:
        """How often `progress` advances."""
        return self.config.folds * self.config.repeats * self.config.epochs * len(plan.trials)


@dataclass(frozen=True)
class Trained:
    """fitted: one a trial. outputs: float64 [T, n, K] by trial and row, out of fold for rows that trained, NaN for rows that are
    not in the trial. seeds: float64 [R, T, n, K], the same by the models of each seed alone."""

    arm: Arm
    fitted: tuple[Fitted, ...]
    outputs: np.ndarray
    seeds: np.ndarray

    def read(self, trial: int, row: int) -> Reading:
        """Read a slide once more, for its attention."""
        return self.fitted[trial].read(row, self.arm.features)


def train(arm: Arm, plan: Plan, task: Task, progress: Progress, folder: Path | None = None) -> Trained:
    """Fit every trial of the plan and read its rows. folder: of models that are trained already, as in `fit`. Raises what `fit`
    raises."""
    shape = (len(plan.trials), len(arm.bags.rows), task.outputs)
    outputs, seeds = np.full(shape, np.nan), np.full((arm.config.repeats, *shape), np.nan)
    fitted = []
    for t, trial in enumerate(plan.trials):
        own = None if folder is None else folder / str(t)
        found = fit(arm.bags, trial.train, arm.features, task, arm.config, progress, own)
        for row in (*trial.train, *trial.internal, *trial.external):
            reading = found.read(row, arm.features)
            outputs[t, row], seeds[:, t, row] = reading.output, found.by_seed(row, reading)
        fitted.append(found)
    return Trained(arm, tuple(fitted), outputs, seeds)


def reader_of(plan: Plan, row: int) -> tuple[int, str]:
    """The trial that reads a row, and as what; a row of two trials is external where it is external in one (it is shown by the
    model that never saw its site). The deployed trial, `train`, for rows that only train."""
    for part in reversed(READ):
        for t, trial in enumerate(plan.trials):
            if row in getattr(trial, part):
                return t, part
    return plan.deployed, "train"


def read_rows(plan: Plan) -> list[int]:
    """Rows that some trial reads without having trained on them."""
    return sorted({row for trial in plan.trials for part in READ for row in getattr(trial, part)})
