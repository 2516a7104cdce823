"""Bags without stores, plans and outputs for tests of the study of slide models."""

from pathlib import Path

import numpy as np

from histoscale.eval.mil.bags import Bag, Bags
from histoscale.eval.mil.split import FixedSplit, FoldSplit, Plan, SiteSplit, make_plan
from histoscale.eval.mil.study import StudyConfig
from histoscale.eval.mil.task import BinaryTask, ClassesTask, RegressionTask, SurvivalTask, Task
from histoscale.eval.scores.interval import IntervalConfig
from histoscale.eval.scores.recalibration import RecalibrationConfig

BINARY = BinaryTask("binary", "tumour", "label", ["1"], ["0"], [0.95, 0.8], [], "conformal", 0.1, "slide")
GRADES = ClassesTask("classes", "grade", "label", {"low": ["0"], "mid": ["1"], "high": ["2"]}, True, "slide")
KINDS = ClassesTask("classes", "kind", "label", {"a": ["0"], "b": ["1"], "c": ["2"]}, False, "slide")
NUMBER = RegressionTask("regression", "score", "label", "slide")
SURVIVAL = SurvivalTask("survival", "death", "label", "event", "slide")
TASKS: tuple[Task, ...] = (BINARY, GRADES, KINDS, NUMBER, SURVIVAL)
INTERVAL = IntervalConfig(200, 0.95, 0)
CONFIG = StudyConfig(15, RecalibrationConfig([10, 20], ["intercept", "platt"], 10, 0))
FIXED = FixedSplit("fixed", "patient", None, [], [], [], ["far"], 0.4, 0)
FOLDS = FoldSplit("folds", "patient", None, 3, ["far"], 0)
SITES = SiteSplit("sites", "patient", None, 3, 0)


def made_bags(task: Task, patients: int = 120, slides: int = 1, seed: int = 0) -> Bags:
    """Patients of the sites near, by and far, with a target that the task can read."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        target = float(rng.integers(0, 3)) if isinstance(task, ClassesTask) else float(rng.integers(0, 2))
        target = float(rng.normal(10, 3)) if isinstance(task, RegressionTask) else target
        target = float(rng.exponential(5) + 0.1) if isinstance(task, SurvivalTask) else target
        event = bool(rng.random() < 0.7) if isinstance(task, SurvivalTask) else True
        site = ("near", "by", "far")[patient % 3]
        for number in range(slides):
            tiles = int(rng.integers(20, 200))
            name = f"s{patient:03d}-{number}"
            rows.append(
                Bag(name, f"p{patient:03d}", site, target, event, Path(f"{name}.h5"), tiles, 64, tiles * 256.0, {})
            )  # fmt: skip
    return Bags(tuple(rows), 8, "abc", 0.5, "patient", {})


def made_outputs(bags: Bags, plan: Plan, task: Task, noise: float = 1.0, seed: int = 1) -> np.ndarray:
    """[T, n, K]: the target through noise, on another scale each trial for two classes and risks; NaN where nothing is read."""
    rng = np.random.default_rng(seed)
    n, target = len(bags.rows), np.array([bag.target for bag in bags.rows])
    found = np.full((len(plan.trials), n, task.outputs), np.nan)
    for t, trial in enumerate(plan.trials):
        seen = target + noise * rng.normal(size=n) * (3 if isinstance(task, RegressionTask) else 1)
        match task:
            case BinaryTask():
                values = (1 / (1 + np.exp(-2 * (seen - 0.5) - t)))[:, None]
            case ClassesTask():
                z = -((seen[:, None] - np.arange(3)) ** 2)
                values = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            case RegressionTask():
                values = seen[:, None]
            case SurvivalTask():
                values = (t - 0.3 * seen)[:, None]
        read = [*trial.train, *trial.internal, *trial.external]
        found[t, read] = values[read]
    return found


def made_plan(bags: Bags, split: FixedSplit | FoldSplit | SiteSplit) -> Plan:
    return make_plan(bags, split)
