"""Step counts that follow the length of a run: `${steps:12500,125000}` in configs/ is 12500 of 125000 steps at any schedule."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf


def register() -> None:
    """Let OmegaConf resolve `${steps:COUNT,OF}` and `${steps:COUNT,OF,LEAST}`.

    A key that is given another value, by a recipe or on the command line, has it."""
    OmegaConf.register_new_resolver("steps", _share, replace=True)


def unusable(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the first length of a schedule, of a run or of one of its phases, that no step count can follow; None:
    nothing. values: flat, dotted keys."""
    for key, value in values.items():
        schedule, _, name = key.rpartition(".")
        if schedule.rpartition(".")[2] != "schedule" or name not in ("steps", "horizon"):
            continue
        if isinstance(value, str) and value.startswith("${"):
            continue
        optional = name == "horizon" or schedule != "schedule"  # a phase without steps is refused as such
        if isinstance(value, bool) or not (isinstance(value, int | float) or (value is None and optional)):
            return f"{key}={'null' if value is None else value}: expected a number of steps, such as {key}=1000"
    return None


def _share(count: int, of: int, least: int = 0, *, _parent_: DictConfig) -> int:
    """`count` where the nearest schedule above (a phase's own, or the run's) is `of` steps long, else in proportion, rounded."""
    node = _parent_
    while OmegaConf.select(node, "schedule.steps") is None:
        node = node._get_parent()  # type: ignore[assignment]
    length = OmegaConf.select(node, "schedule.horizon") or OmegaConf.select(node, "schedule.steps")
    return max(round(count * length / of), least)
