"""What a study counts: slides, or patients, each read once in its part by the model of one trial."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.eval.mil.bags import BagError, Bags
from histoscale.eval.mil.split import Plan
from histoscale.eval.mil.task import BinaryTask, ClassesTask, RegressionTask, SurvivalTask, Task

Place = tuple[int, int]  # trial, row of the bags


@dataclass(frozen=True)
class Units:
    """U decisions. groups: their patients (or slides). target: float64 [U]; event: bool [U]; outputs: float64 [U, K]; trial:
    int64 [U], whose model it was: outputs of two trials share no scale. slides: how many were joined."""

    groups: list[str]
    target: np.ndarray
    event: np.ndarray
    outputs: np.ndarray
    trial: np.ndarray
    slides: int

    @property
    def labels(self) -> np.ndarray:
        """Classes: int64 [U]."""
        return self.target.astype(np.int64)

    def rarer(self, task: Task) -> int | None:
        """Groups with a unit of the rarest class present (of two classes: of either), or with an event; None for numbers."""
        if isinstance(task, BinaryTask):
            return min(
                len({group for group, own in zip(self.groups, self.labels == side, strict=True) if own}) for side in (0, 1)
            )
        if isinstance(task, ClassesTask):
            labels = self.labels.tolist()
            return min(len({group for group, own in zip(self.groups, labels, strict=True) if own == c}) for c in set(labels))
        if isinstance(task, SurvivalTask):
            return len({group for group, own in zip(self.groups, self.event, strict=True) if own})
        return None

    @property
    def pooled(self) -> bool:
        """Whether models of several trials stand together."""
        return len(np.unique(self.trial)) > 1


def places(plan: Plan, part: str) -> list[Place]:
    """Where a part was read. train: the rows of the deployed trial, whose outputs are out of fold; internal and external: of
    every trial, each row once."""
    chosen = [plan.deployed] if part == "train" else range(len(plan.trials))
    return [(t, row) for t in chosen for row in getattr(plan.trials[t], part)]


def units(bags: Bags, where: Sequence[Place], outputs: np.ndarray, task: Task) -> Units:
    """The decisions at some places. outputs: float64 [T, n, K].

    With task.decision `patient` the slides of a patient become one: binary, positive when any slide is, by its highest score;
    classes, by mean probabilities, its label the highest grade where classes are ordered; regression by means; survival by the
    mean log-risk. Raises BagError when slides of a patient bear unordered classes or times that differ.
    """
    trial = np.array([t for t, _ in where], np.int64)
    rows = [row for _, row in where]
    found = Units(
        groups=[bags.rows[i].group for i in rows],
        target=bags.targets(rows),
        event=bags.events(rows),
        outputs=np.asarray(outputs, np.float64)[trial, rows] if rows else np.empty((0, outputs.shape[2])),
        trial=trial,
        slides=len(rows),
    )
    return found if task.decision == "slide" else joined(found, task)


def joined(found: Units, task: Task) -> Units:
    """Slides to decisions of patients, as `units` says."""
    members: dict[tuple[int, str], list[int]] = {}
    for i, pair in enumerate(zip(found.trial.tolist(), found.groups, strict=True)):
        members.setdefault(pair, []).append(i)
    places_ = list(members.values())
    return Units(
        groups=[group for _, group in members],
        target=np.array([_target(found, own, task) for own in places_], np.float64),
        event=np.array([found.event[own[0]] for own in places_], bool),
        outputs=np.array([_output(found.outputs[own], task) for own in places_], np.float64).reshape(-1, found.outputs.shape[1]),
        trial=np.array([t for t, _ in members], np.int64),
        slides=found.slides,
    )


def _target(found: Units, own: Sequence[int], task: Task) -> float:
    values = found.target[own]
    if isinstance(task, BinaryTask) or (isinstance(task, ClassesTask) and task.ordered):
        return float(values.max())
    if isinstance(task, RegressionTask):
        return float(values.mean())
    if len(set(values.tolist())) > 1 or len(set(found.event[own].tolist())) > 1:
        raise BagError(
            f"the slides of {found.groups[own[0]]} bear different values of {task.label} ({sorted(set(values.tolist()))}): "
            "give a patient one, or set task.decision=slide"
        )
    return float(values[0])


def _output(outputs: np.ndarray, task: Task) -> np.ndarray:
    return outputs.max(0) if isinstance(task, BinaryTask) else outputs.mean(0)
