"""The phases of a pretraining run: each says what it changes of the one before, and nothing restarts unsaid.

A phase takes over every value that it does not state, but `start.weights`, `start.freeze_backbone_steps` and `schedule.horizon`,
which belong to one phase alone. `longer` adds phases that state all of it by themselves: more of the same.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from histoscale.launch.config import ConfigError, flatten, nearest
from histoscale.pretrain.phase import Phase

C = TypeVar("C")

FIRST = "base"
CHANGEABLE = (
    "catalog", "tiles", "tiles_pattern", "roles", "sampler", "normalise", "views", "model", "method", "precision", "optim",
    "schedule", "start",
)  # fmt: skip
ALWAYS = ("schedule.steps", "schedule.restart", "start.branch", "start.heads", "start.moments")
SCHEDULED = (
    "schedule.warmup_steps", "optim.lr", "optim.weight_decay", "method.teacher_temp", "method.teacher_temp_warmup_steps",
    "method.momentum", "method.freeze_last_layer_steps",
)  # fmt: skip


def phases_of(config: C) -> list[tuple[Phase, C]]:
    """The phases of `config.phases` behind the first, which the other keys describe; each with its whole configuration.

    Behind them come those of `config.longer`.

    Raises ConfigError for a key that is unknown or has no place in a phase, a value of the wrong type, and a schedule that would
    restart, or a state that would continue, without the phase saying so.
    """
    values: dict[str, Any] = {**asdict(config), "phases": {}, "longer": []}  # type: ignore[call-overload]
    found = [(Phase(0, FIRST, 0, 0), config)]
    longer = {f"longer_{i}": steps for i, steps in enumerate(config.longer, 1)}  # type: ignore[attr-defined]
    if taken := config.phases.keys() & longer.keys():  # type: ignore[attr-defined]
        raise ConfigError(f"phases.{min(taken)}: that is the name of a phase of longer=; give it another")
    for name, change in {**config.phases, **longer}.items():  # type: ignore[attr-defined]
        before, earlier = found[-1]
        change = more_of_the_same(values, change) if name in longer else change
        if name == FIRST or not re.fullmatch(r"\w+", str(name)):
            raise ConfigError(f"phases.{name}: a name of letters, digits and _ was expected, and not the first phase's, {FIRST}")
        stated = _stated(name, change, values)
        values = _merged(values, change, f"phases.{name}")
        values["start"] |= (
            {"weights": None} if "start.freeze_backbone_steps" in stated else {"weights": None, "freeze_backbone_steps": 0}
        )
        if values["schedule"]["restart"] and "schedule.horizon" not in stated:
            values["schedule"]["horizon"] = None
        typed = _typed(type(config), values, name)
        first = before.first + earlier.schedule.steps  # type: ignore[attr-defined]
        origin = first if typed.schedule.restart else before.origin  # type: ignore[attr-defined]
        found.append((Phase(before.index + 1, name, first, origin), typed))
    return found


def more_of_the_same(before: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What a phase of `longer` states: everything continues.

    The learning rate warms up, in the same share of its steps, and falls once more, and the teacher's momentum rises once more;
    weight decay and the teacher's temperature stay where they ended.
    """
    schedule, optim, method = before["schedule"], before["optim"], before["method"]
    warmup = round(schedule["warmup_steps"] * steps / (schedule["horizon"] or schedule["steps"]))
    return {
        "schedule": {"steps": steps, "warmup_steps": warmup, "restart": True},
        "optim": {"lr": optim["lr"], "weight_decay": [optim["weight_decay"][1]] * 2},
        "method": {
            "teacher_temp": [method["teacher_temp"][1]] * 2,
            "teacher_temp_warmup_steps": 0,
            "momentum": method["momentum"],
            "freeze_last_layer_steps": 0,
        },
        "start": {"branch": "both", "heads": True, "moments": True},
    }


def only_adds(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the second of two recorded runs is the first with phases added behind its last.

    Both: {"result": the result keys, "facts": with the data of each phase in order}, the old one with its "status". A run that
    is done has read its data: what is added may have other data (a catalog that has grown).
    """
    (before, facts), (after, more_facts) = (_in_order(run, with_data=old["status"] != "done") for run in (old, new))
    same = {**old["result"], "phases": None, "longer": None} == {**new["result"], "phases": None, "longer": None}
    return same and len(after) > len(before) and after[: len(before)] == before and more_facts[: len(facts)] == facts


def _in_order(run: Mapping[str, Any], with_data: bool) -> tuple[list[Any], list[Any]]:
    """The phases behind the first as they were given, and the facts of all phases; both without `data` that has been read."""
    result, facts = run["result"], run["facts"]
    given = [*result["phases"].items(), *(("longer", steps) for steps in result["longer"])]
    each = [{**facts, "phases": None}, *facts["phases"]]
    return given, each if with_data else [{k: v for k, v in one.items() if k not in ("catalog", "tiles")} for one in each]


def _stated(name: str, change: Any, values: Mapping[str, Any]) -> set[str]:
    """The dotted keys that a phase states; refuses one that leaves open what continues."""
    if not isinstance(change, Mapping):
        raise ConfigError(f"phases.{name} is {change!r}: expected the keys that this phase changes")
    stated = set(flatten(dict(change)))
    if "start.weights" in stated:
        raise ConfigError(
            f"phases.{name}.start.weights: a later phase continues the one before it; other weights are another run"
        )
    restarts = (change.get("schedule") or {}).get("restart", True)
    open_ = [key for key in (*ALWAYS, *(SCHEDULED if restarts else ())) if key not in stated]
    if open_:
        flat = flatten(dict(values))
        now = ", ".join(f"{key} ({flat.get(key)!r} in the phase before)" for key in open_)
        raise ConfigError(f"phases.{name} must say what continues and what restarts: it lacks {now}")
    if not restarts and change["schedule"].get("horizon", values["schedule"]["horizon"]) is None:
        raise ConfigError(f"phases.{name}.schedule.restart=false goes on from the phase before, whose schedules have ended: give "
                          "schedule.horizon, from the first phase on")  # fmt: skip
    return stated


def _merged(before: Mapping[str, Any], change: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The values before with the change on top; a group of another kind is replaced whole."""
    top = place.count(".") == 1
    known = CHANGEABLE if top else tuple(before)
    for key in change:
        if key not in known:
            raise ConfigError(f"{place}.{key} is no key of a phase{nearest(str(key), list(known))}")
    merged = dict(before)
    for key, value in change.items():
        old = before[key]
        nested = isinstance(value, Mapping) and isinstance(old, Mapping) and value.get("kind", old.get("kind")) == old.get("kind")
        merged[key] = _merged(old, value, f"{place}.{key}") if nested else value
    return merged


def _typed(schema: type[C], values: dict[str, Any], name: str) -> C:
    try:
        config = TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))} = {e.get('input')!r}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"phases.{name}: {problems}") from error
    unknown = sorted(set(flatten(values)) - set(flatten(asdict(config))))  # type: ignore[call-overload]
    if unknown:
        raise ConfigError(f"phases.{name} holds {', '.join(unknown)}, which nothing reads")
    return config
