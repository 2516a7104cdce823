"""Targets of slides: what each kind of task reads from a manifest, leaves out and refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mil_fixtures import TASK, slide
from pydantic import TypeAdapter, ValidationError

from histoscale.eval.mil.task import (
    BinaryTask,
    ClassesTask,
    RegressionTask,
    SurvivalTask,
    Target,
    Task,
    TaskConfig,
    TaskError,
    read_targets,
)

GRADES = ClassesTask("classes", "grade", "isup", {"benign": ["0"], "low": ["1", "2"], "high": ["3"]}, True, "slide")
SURVIVAL = SurvivalTask("survival", "death", "days", "dead", "patient")


def test_kinds_are_told_apart_by_their_name() -> None:
    found = TypeAdapter(TaskConfig).validate_python({"kind": "regression", "name": "n", "label": "x", "decision": "slide"})
    assert found == RegressionTask("regression", "n", "x", "slide")
    assert [task.outputs for task in (TASK, GRADES, found, SURVIVAL)] == [1, 3, 1, 1]


def test_values_that_yaml_reads_as_numbers_are_text() -> None:
    values = {"kind": "classes", "name": "n", "label": "x", "ordered": True, "decision": "slide"}
    task = TypeAdapter(TaskConfig).validate_python({**values, "classes": {0: [0, "1"], "high": [2]}})
    assert task == ClassesTask("classes", "n", "x", {"0": ["0", "1"], "high": ["2"]}, True, "slide")
    with pytest.raises(ValidationError, match="valid string"):
        TypeAdapter(TaskConfig).validate_python({**values, "classes": {"low": [0.5], "high": [2]}})


def test_targets_of_every_kind() -> None:
    slides = [
        slide("a", "p", "s", tumour="1", isup="2", days="12.5", dead="1"),
        slide("b", "p", "s", tumour="0", isup="3", days="9", dead="0"),
    ]
    slides += [slide("c", "p", "s", days="3")]
    assert read_targets(slides, TASK) == ({"a": Target(1.0, True), "b": Target(0.0, True)}, {"c": "no value in tumour"})
    assert read_targets(slides, GRADES)[0] == {"a": Target(1.0, True), "b": Target(2.0, True)}
    number = RegressionTask("regression", "n", "days", "slide")
    assert read_targets(slides, number) == ({"a": Target(12.5, True), "b": Target(9.0, True), "c": Target(3.0, True)}, {})
    assert read_targets(slides, SURVIVAL) == ({"a": Target(12.5, True), "b": Target(9.0, False)}, {"c": "no value in dead"})


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        (TASK, {"tumour": "maybe"}, "1 slides have a tumour that is not among task.positive .*x: 'maybe'"),
        (GRADES, {"isup": "4"}, "not among task.classes .*x: '4'"),
        (RegressionTask("regression", "n", "days", "slide"), {"days": "long"}, "not a finite number .*x: 'long'"),
        (RegressionTask("regression", "n", "days", "slide"), {"days": "nan"}, "not a finite number"),
        (SURVIVAL, {"days": "-1", "dead": "1"}, "days and dead that is not a time of 0 or more .*x: '-1', '1'"),
        (SURVIVAL, {"days": "1", "dead": "maybe"}, "a time of 0 or more with 1 .*'1', 'maybe'"),
        (SURVIVAL, {"days": "1"}, "no label column 'dead'; it has days"),
    ],
)
def test_what_a_task_does_not_name_is_an_error(task: Task, columns: dict[str, str], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        read_targets([slide("x", "p", "s", **columns)], task)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BinaryTask("binary", "t", "l", ["1"], ["0", "1"], [0.9], [], "conformal", 0.1, "slide"), "share a value"),
        (lambda: BinaryTask("binary", "t", "l", ["M"], ["m "], [0.9], [], "conformal", 0.1, "slide"), "share a value"),
        (lambda: BinaryTask("binary", "t", "l", ["1"], ["yes"], [0.9], [], "conformal", 0.1, "slide"), "share a value"),
        (lambda: ClassesTask("classes", "t", "l", {"a": ["1"], "b": ["1.0"]}, False, "slide"), "no value in two"),
        (lambda: BinaryTask("binary", "t", "l", ["1"], ["0"], [1.0], [], "conformal", 0.1, "slide"), "numbers between 0 and 1"),
        (lambda: BinaryTask("binary", "t", "l", ["1"], ["0"], [0.9], [], "guess", 0.1, "slide"), "conformal or empirical"),
        (lambda: ClassesTask("classes", "t", "l", {"a": ["1"], "b": ["1"]}, False, "slide"), "no value in two"),
        (lambda: ClassesTask("classes", "t", "l", {"a": ["1"]}, False, "slide"), "two classes or more"),
        (lambda: RegressionTask("regression", "t", "l", "nurse"), "expected slide or patient"),
    ],
)
def test_tasks_without_sense(make: Callable[[], Task], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make()


def test_one_class_may_list_a_value_in_several_spellings() -> None:
    task = ClassesTask("classes", "t", "l", {"a": ["1", "1.0", "yes"], "b": ["0", "no"]}, False, "slide")
    assert read_targets([slide("x", "p", "s", l="True")], task)[0]["x"].value == 0.0


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("slide", {"label": "her2"}),
        ("classes", {"label": "grade", "classes": {"low": ["1", "2"], "high": ["3"]}}),
        ("regression", {"label": "score"}),
        ("survival", {"label": "days", "event": "dead"}),
    ],
)
def test_configurations_for_a_label_of_ones_own(name: str, given: dict[str, object]) -> None:
    """What `???` leaves open is exactly what must be given."""
    values = yaml.safe_load((Path(__file__).resolve().parents[1] / f"configs/task/{name}.yaml").read_text())
    assert {key for key, value in values.items() if value == "???"} == set(given)
    task: Task = TypeAdapter(TaskConfig).validate_python({**values, **given})
    assert task.label == given["label"]
