"""From a model's output to what a second reader is told: the number, the threshold and what it means."""

import math

import numpy as np

from histoscale.eval.evidence.case import Finding
from histoscale.eval.mil.task import BinaryTask, ClassesTask, RegressionTask, SurvivalTask, Task
from histoscale.eval.scores.operating import Threshold


def describe(
    task: Task, output: np.ndarray, logits: np.ndarray, threshold: Threshold | None, centre: float
) -> tuple[Finding, str, int]:
    """The finding, the name of the output that maps explain, and its column.

    output, logits: float64 [K] of `Reading`. threshold: the carried-over operating point of a binary task. centre: what an
    average training slide gets: the mean target of a regression, the mean log-risk of a survival task; 0 for the others. Raises
    ValueError for a binary task without a threshold.
    """
    match task:
        case BinaryTask():
            if threshold is None:
                raise ValueError(f"the binary task {task.name} has no threshold: give the one that its training part fixed")
            positive, score = " or ".join(task.positive), float(output[0])
            words = f"probability of {positive} {score:.3f}"
            return Finding(score, words, _rule(threshold), score >= threshold.value, _side(logits[0], 0.0)), positive, 0
        case ClassesTask():
            k = int(output.argmax())
            name = list(task.classes)[k]
            others = " · ".join(f"{each} {p:.2f}" for each, p in zip(task.classes, output.tolist(), strict=True))
            return Finding(float(output[k]), f"most likely {name}", f"probabilities: {others}", None, 1.0), name, k
        case RegressionTask():
            rule = f"the training slides' mean is {centre:.3g}"
            value = float(output[0])
            return Finding(value, f"{task.label} about {value:.3g}", rule, None, _side(value, centre)), task.label, 0
        case SurvivalTask():
            value = float(output[0]) - centre
            words = f"log-risk {value:+.3f} against the mean training slide"
            return Finding(value, words, "above 0: the event is expected earlier", None, _side(value, 0.0)), "log-risk", 0


def _rule(at: Threshold) -> str:
    """How the threshold came about."""
    if not math.isfinite(at.value):
        few = f"{at.positives} positive training slides are too few to keep a sensitivity of {at.required:g}"
        return f"every slide is flagged: {few}"
    basis = f"fixed on {at.positives} positives of the training part, {at.rule} rule, and carried over unchanged"
    return f"flagged from {at.value:.3g} on, to keep a sensitivity of {at.required:g}: {basis}"


def _side(value: float, centre: float) -> float:
    return 1.0 if value > centre else -1.0
