"""The phases of a pretraining run: each says what it changes of the one before, and nothing restarts unsaid.

A phase takes over every value that it does not state, but `start.weights`, `start.freeze_backbone_steps` and `schedule.horizon`,
which belong to one phase alone.
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
    "catalog", "tiles", "tiles_pattern", "roles", "sampler", "normalise", "views", "model", "method", "optim", "schedule",
    "start",
)  # fmt: skip
ALWAYS = ("schedule.steps", "schedule.restart", "start.branch", "start.heads", "start.moments")
SCHEDULED = (
    "schedule.warmup_steps", "optim.lr", "optim.weight_decay", "method.teacher_temp", "method.teacher_temp_warmup_steps",
    "method.momentum", "method.freeze_last_layer_steps",
)  # fmt: skip


def phases_of(config: C) -> list[tuple[Phase, C]]:
    """The phases of `config.phases` behind the first, which the other keys describe; each with its whole configuration.

    Raises ConfigError for a key that is unknown or has no place in a phase, a value of the wrong type, and a schedule that would
    restart, or a state that would continue, without the phase saying so.
    """
    values: dict[str, Any] = {**asdict(config), "phases": {}}  # type: ignore[call-overload]
    found = [(Phase(0, FIRST, 0, 0), config)]
    for name, change in config.phases.items():  # type: ignore[attr-defined]
        before, earlier = found[-1]
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


def only_adds(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the second of two recorded runs is the first with phases added behind its last.

    Both: {"result": the result keys, "facts": with the data of each phase in order}.
    """
    listed = [(list(run["result"]["phases"].items()), run["facts"]["phases"]) for run in (old, new)]
    (phases, facts), (more, more_facts) = listed
    same = all({**old[part], "phases": None} == {**new[part], "phases": None} for part in ("result", "facts"))
    return same and len(more) > len(phases) and more[: len(phases)] == phases and more_facts[: len(facts)] == facts


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
