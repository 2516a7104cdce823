"""What a slide model is asked: two classes, several classes, a number, or a time until an event; targets from a manifest."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from histoscale.data.manifest import Slide
from histoscale.data.names import same_value, truth
from histoscale.eval.scores.operating import RULES

DECISIONS = ("slide", "patient")
_SHOWN = 5


# A value of a column, or the name of a class: text, though YAML reads 1 as a number.
Value = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


class TaskError(ValueError):
    """A task that makes no sense, or a manifest that does not hold its labels."""


@dataclass(frozen=True)
class BinaryTask:
    """label: a manifest column; positive, negative: its values. sensitivities: what a threshold each must keep, by `rule`
    (conformal or empirical). specificities: the same of the other side, for what a threshold finds that passes so many negatives.
    prevalence: the stated one for PPV and NPV. decision: `slide`, or `patient` (highest slide)."""

    kind: Literal["binary"]
    name: str
    label: str
    positive: list[Value]
    negative: list[Value]
    sensitivities: list[float]
    specificities: list[float]
    rule: str
    prevalence: float
    decision: str

    def __post_init__(self) -> None:
        _check_decision(self.decision)
        if self.rule not in RULES:
            raise TaskError(f"task.rule is {self.rule!r}: expected {' or '.join(RULES)}")
        shares = (*self.sensitivities, *self.specificities, self.prevalence)
        if not self.sensitivities or not all(0 < value < 1 for value in shares):
            given = f"task.sensitivities is {self.sensitivities}, task.specificities {self.specificities}, "
            raise TaskError(f"{given}task.prevalence {self.prevalence}: expected numbers between 0 and 1")
        if not self.positive or not self.negative or _share([self.positive, self.negative]):
            given = f"task.positive is {self.positive}, task.negative {self.negative}"
            raise TaskError(f"{given}: expected a value or more in each, and none in both (they share a value or one is empty)")

    @property
    def outputs(self) -> int:
        return 1

    @property
    def requirements(self) -> list[tuple[str, float]]:
        """What the thresholds keep, in the order of every table: (`sensitivity` or `specificity`, share)."""
        named = (("sensitivity", self.sensitivities), ("specificity", self.specificities))
        return [(keeps, value) for keeps, values in named for value in values]


@dataclass(frozen=True)
class ClassesTask:
    """classes: class name -> the values of the column `label` that mean it. ordered: the order of the classes counts (grades).
    decision: `slide`, or `patient` (mean probabilities of the slides)."""

    kind: Literal["classes"]
    name: str
    label: str
    classes: dict[Value, list[Value]]
    ordered: bool
    decision: str

    def __post_init__(self) -> None:
        _check_decision(self.decision)
        values = [value for each in self.classes.values() for value in each]
        twice = len(set(values)) < len(values) or _share(self.classes.values())
        if len(self.classes) < 2 or not all(self.classes.values()) or twice:
            raise TaskError(
                f"task.classes is {self.classes}: expected two classes or more, a value or more in each, and no value in two"
            )

    @property
    def outputs(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class RegressionTask:
    """label: a column of numbers. decision: `slide`, or `patient` (mean of the slides)."""

    kind: Literal["regression"]
    name: str
    label: str
    decision: str

    def __post_init__(self) -> None:
        _check_decision(self.decision)

    @property
    def outputs(self) -> int:
        return 1


@dataclass(frozen=True)
class SurvivalTask:
    """label: a column with the time that a patient was followed, in any one unit; event: a column with 1 where the event happened
    then and 0 where it had not (censored). decision: `slide`, or `patient` (mean log-risk of the slides)."""

    kind: Literal["survival"]
    name: str
    label: str
    event: str
    decision: str

    def __post_init__(self) -> None:
        _check_decision(self.decision)

    @property
    def outputs(self) -> int:
        return 1


Task = BinaryTask | ClassesTask | RegressionTask | SurvivalTask
TaskConfig = Annotated[Task, Field(discriminator="kind")]


@dataclass(frozen=True)
class Target:
    """value: 0 or 1, the index of the class, the number, or the time. event: false for a time that is censored, else true."""

    value: float
    event: bool


def read_targets(slides: Sequence[Slide], task: Task) -> tuple[dict[str, Target], dict[str, str]]:
    """Targets by slide id, and the slides without one: slide id -> why.

    Raises TaskError for a column that no slide has, and for values that the task does not name; the message lists slides.
    """
    named = (task.label, task.event) if isinstance(task, SurvivalTask) else (task.label,)
    for column in named:
        if not any(column in slide.labels for slide in slides):
            known = sorted({name for slide in slides for name in slide.labels})
            raise TaskError(f"the manifest has no label column {column!r}; it has {', '.join(known) or 'none'}")
    targets: dict[str, Target] = {}
    left_out: dict[str, str] = {}
    strange: dict[str, str] = {}
    for slide in slides:
        absent = [column for column in named if not slide.labels.get(column)]
        if absent:
            left_out[slide.slide_id] = f"no value in {' and '.join(absent)}"
            continue
        found = _target(slide, task)
        if found is None:
            strange[slide.slide_id] = ", ".join(repr(slide.labels[column]) for column in named)
        else:
            targets[slide.slide_id] = found
    if strange:
        listed = ", ".join(f"{name}: {value}" for name, value in list(strange.items())[:_SHOWN])
        more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        raise TaskError(f"{len(strange)} slides have a {' and '.join(named)} that is not {_expected(task)} ({listed}{more})")
    return targets, left_out


def _target(slide: Slide, task: Task) -> Target | None:
    text = slide.labels[task.label]
    match task:
        case BinaryTask():
            positive, negative = _among(text, task.positive), _among(text, task.negative)
            return Target(float(positive), True) if positive != negative else None
        case ClassesTask():
            places = [i for i, values in enumerate(task.classes.values()) if _among(text, values)]
            return Target(float(places[0]), True) if len(places) == 1 else None
        case RegressionTask():
            number = _number(text)
            return None if number is None else Target(number, True)
        case SurvivalTask():
            time, event = _number(text), truth(slide.labels[task.event])
            return None if time is None or time < 0 or event is None else Target(time, event)


def _expected(task: Task) -> str:
    match task:
        case BinaryTask():
            return f"among task.positive {task.positive} and task.negative {task.negative}"
        case ClassesTask():
            return f"among task.classes {task.classes}"
        case RegressionTask():
            return "a finite number"
        case SurvivalTask():
            return "a time of 0 or more with 1 (it happened) or 0 (censored)"


def _among(text: str, values: Sequence[str]) -> bool:
    return any(same_value(text, value) for value in values)


def _share(sides: Iterable[Sequence[str]]) -> bool:
    """Whether a value stands on two sides, however it is written."""
    return any(_among(value, other) for one, other in combinations(sides, 2) for value in one)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _check_decision(decision: str) -> None:
    if decision not in DECISIONS:
        raise TaskError(f"task.decision is {decision!r}: expected {' or '.join(DECISIONS)}")
