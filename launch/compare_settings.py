"""The keys of compared runs: which of them say the same in all, and which do not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from histoscale.eval.page import Chapter, Folded, Grid, Part, Prose
from histoscale.launch.config import flatten
from histoscale.launch.held import read_state


@dataclass(frozen=True)
class Settings:
    """Result keys of runs as text. shared: key -> the value of all; differing: key -> a value a run, "" where it has no such
    key. runs: their names."""

    runs: tuple[str, ...]
    shared: dict[str, str]
    differing: dict[str, tuple[str, ...]]

    def chapter(self) -> Chapter:
        """What differs, in the open; what is the same, folded."""
        parts: list[Part] = []
        if self.differing:
            rows = [[key, *values] for key, values in self.differing.items()]
            parts.append(Grid(["key", *self.runs], rows, 1 + len(self.runs), "Every key that makes a result and differs."))
        else:
            parts.append(Prose("No key that makes a result differs between these runs: they differ by what they read."))
        if self.shared:
            rows = [list(pair) for pair in self.shared.items()]
            parts.append(Folded(f"The same in all runs: {len(rows)} keys", [Grid(["key", "value"], rows, 2, "")]))
        return Chapter("What was set", parts)


def read_settings(folders: dict[str, Path]) -> Settings | None:
    """Of finished runs, by name, from the keys that each left in `state.json`; None where one left none."""
    found = [_result_keys(folder) for folder in folders.values()]
    if not all(found):
        return None
    keys = list(dict.fromkeys(key for each in found for key in each))
    values = {key: tuple(each.get(key, "") for each in found) for key in keys}
    shared = {key: own[0] for key, own in values.items() if len(set(own)) == 1}
    return Settings(tuple(folders), shared, {key: own for key, own in values.items() if key not in shared})


def _result_keys(folder: Path) -> dict[str, str]:
    state = read_state(folder)  # None of a run that was copied without its state: it still compares
    return {} if state is None else {key: _text(value) for key, value in flatten(state["result"]).items()}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def told(settings: Settings | None) -> Sequence[Chapter]:
    """Its chapter, where there is any."""
    return [] if settings is None else [settings.chapter()]
