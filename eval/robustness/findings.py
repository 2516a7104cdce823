"""What a measure found: a number with its interval, and exactly what it is of; as lines of text and as plain values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from histoscale.eval.scores.interval import Interval

WORDS = {
    "robustness_index": "robustness index",
    "margin_median": "margin, median",
    "margin_tail": "margin, mean of the tail",
    "clustering_score": "clustering score",
    "drop_inside": "average performance drop, inside",
    "drop_external": "average performance drop, external",
    "balanced_accuracy": "balanced accuracy",
    "cosine_to_clean": "cosine to the clean embedding",
    "cosine": "cosine of registered tiles",
    "leaderboard": "mean of PLISM's four medians",
}


class RobustnessError(ValueError):
    """A set on which a measure has no meaning; the message says what is missing."""


@dataclass(frozen=True)
class Finding:
    """One number. measure: `robustness_index`, …; encoder: its name, `random` or `colour`; normalise: a method or `none`.

    condition: what else it is of (`report, blur_px 1`), "" for nothing. floor: whether it is one. groups: what the interval
    resamples. spread: SD over resamplings or trials, None without. minus: what was subtracted, "" for a value. about: facts.
    """

    measure: str
    encoder: str
    normalise: str
    condition: str
    interval: Interval
    groups: str
    floor: bool
    spread: float | None = None
    minus: str = ""
    note: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        return [note for note in dict.fromkeys((self.note, self.interval.note)) if note]

    @property
    def label(self) -> str:
        return self.encoder + (" (floor)" if self.floor else "")


def measure_words(measure: str) -> str:
    return WORDS.get(measure, measure.replace("_", " "))


def number(found: Finding | None, digits: int = 3) -> str:
    """`0.812 [0.774, 0.850]`, signed for a difference or a drop; `0.812 [withheld]`; `–` where it is undefined."""
    if found is None or math.isnan(found.interval.value):
        return "–"
    sign = "+" if found.minus or found.measure.startswith(("drop", "margin", "clustering")) else ""
    value, low, high = found.interval.value, found.interval.low, found.interval.high
    ends = "withheld" if low is None or high is None else f"{low:{sign}.{digits}f}, {high:{sign}.{digits}f}"
    return f"{value:{sign}.{digits}f} [{ends}]".replace("-", "−")


def text_table(found: Sequence[Finding]) -> str:
    """A block a measure; its rows: encoder, normalisation, condition, number. Notes stand once, below."""
    lines: list[str] = []
    notes: dict[str, int] = {}
    for measure in dict.fromkeys(one.measure for one in found):
        here = [one for one in found if one.measure == measure]
        lines += ["", measure_words(measure), "─" * len(measure_words(measure))]
        rows = [[one.label, one.normalise, " ".join(filter(None, (one.condition, f"less {one.minus}" if one.minus else ""))),
                 number(one) + "".join(f" ({notes.setdefault(note, len(notes) + 1)})" for note in one.notes)]
                for one in here]  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *(f"({place}) {note}" for note, place in notes.items())]).strip("\n")


def summary(found: Sequence[Finding]) -> dict[str, Any]:
    """measure → encoder → normalisation → condition (left out where there is none) → {value, low, high, …}; no NaN.

    Paired differences stand under `minus` → what was subtracted. Raises ValueError when two findings claim one place.
    """
    values: dict[str, Any] = {}
    for one in found:
        place = values
        for name in filter(None, (one.measure, one.encoder, one.normalise, one.condition)):
            place = place.setdefault(name, {})
        if one.minus:
            place = place.setdefault("minus", {}).setdefault(one.minus, {})
        if "value" in place:
            raise ValueError(f"two findings stand at {one.measure} / {one.encoder} / {one.normalise} / {one.condition}")
        place |= {key: _finite(value) for key, value in one.interval.as_dict().items()}
        place |= {"note": "; ".join(one.notes), "groups": one.groups, "floor": one.floor, "spread": _finite(one.spread)}
        place |= {key: _finite(value) for key, value in one.about.items()}
    return values


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
