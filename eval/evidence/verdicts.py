"""What second readers answered: the files that the pages' forms save, read back and counted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from histoscale.data.jsonfiles import read_object

FORMAT = "histoscale-verdict-1"
VERDICTS = {
    "agree": "I agree with the model",
    "disagree": "I disagree with the model",
    "cannot_say": "I cannot say from this slide",
    "not_assessable": "The slide cannot be assessed",
}


class VerdictError(ValueError):
    """A file that is no verdict of a page; the message names it."""


@dataclass(frozen=True)
class Verdict:
    """One reader's answer. value, flagged: what the model had said. date: as the reader gave it, YYYY-MM-DD. file: its name."""

    slide_id: str
    task: str
    value: float
    flagged: bool | None
    verdict: str
    comment: str
    reader: str
    date: str
    file: str


def read_verdicts(folder: Path) -> list[Verdict]:
    """Every `*.json` of a folder, by slide and reader.

    Raises VerdictError: a file that is no verdict, an unknown answer, the same slide and task answered twice by one reader.
    """
    found = [_read(path) for path in sorted(folder.glob("*.json"))]
    seen: dict[tuple[str, str, str], str] = {}
    for each in found:
        before = seen.setdefault((each.slide_id, each.task, each.reader), each.file)
        if before != each.file:
            twice = f"{each.reader} answered for {each.slide_id} in {before} and in {each.file}"
            raise VerdictError(f"{twice}: keep the one that counts")
    return sorted(found, key=lambda each: (each.slide_id, each.reader))


def count_verdicts(verdicts: Sequence[Verdict]) -> dict[str, dict[str, int]]:
    """`flagged`, `not flagged` or `estimate` -> answer -> how many."""
    names = {True: "flagged", False: "not flagged", None: "estimate"}
    counts: dict[str, dict[str, int]] = {}
    for each in verdicts:
        row = counts.setdefault(names[each.flagged], dict.fromkeys(VERDICTS, 0))
        row[each.verdict] += 1
    return counts


def _read(path: Path) -> Verdict:
    try:
        values = read_object(path)
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}")
        texts = {name: values[name] for name in ("slide_id", "task", "verdict", "comment", "reader", "date")}
        wrong = [name for name, text in texts.items() if not isinstance(text, str)]
        if wrong:
            raise ValueError(f"{wrong[0]} is {texts[wrong[0]]!r}")
        if values["flagged"] not in (True, False, None):
            raise ValueError(f"flagged is {values['flagged']!r}")
        if texts["verdict"] not in VERDICTS:
            raise ValueError(f"its verdict is {texts['verdict']!r}")
        value = float(values["value"])
        if not math.isfinite(value):
            raise ValueError(f"value is {values['value']!r}")
        return Verdict(**texts, value=value, flagged=values["flagged"], file=path.name)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise VerdictError(
            f"{path} is no verdict that a page saved ({error}): expected {FORMAT} with {', '.join(VERDICTS)}"
        ) from error
