"""Scores in the order in which they are read: by data set, protocol, probe, role; an encoder, its differences, then floors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from histoscale.eval.published import METRICS, Published, nearest_column, other_definition, published_beside
from histoscale.eval.results import Score

SELECTED = "selected on report"
RESERVED = ("minus", "also")  # keys of `summary` beside the metrics
METRIC_WORDS = {
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "macro_f1": "macro F1",
    "f1": "F1",
    "quadratic_kappa": "quadratic kappa",
    "log_loss": "log-loss",
    "ece": "ECE",
    "brier": "Brier",
    "monai_dice": "MonaiDice, no background",
    "dice": "pooled Dice",
    "iou": "pooled IoU",
    "pearson": "Pearson r",
}
PROBE_WORDS = {"linear": "linear probe", "knn": "kNN probe", "prototype": "prototypes"}
ROLE_WORDS = {
    "select": "the part for selection",
    "report": "the reported part",
    "outer": "outer folds, each row by the fold that held it out",
    "external": "the external site",
}
FLOORS = ("random", "colour")


@dataclass(frozen=True)
class TableConfig:
    """width: most characters a line of the terminal. published: rows of others beside ours, floors and equal weights aside."""

    width: int
    published: int


@dataclass(frozen=True)
class Line:
    """One row of a block: an encoder (minus ""), or its paired difference to `minus`. cells: by metric."""

    encoder: str
    embedding: str
    resolution: str
    minus: str
    floor: bool
    cells: dict[str, Score]

    @property
    def seen(self) -> str:
        """`0.5 µm/px, field 112 µm` of what the encoder really sees; `unknown µm/px`; "" for a difference."""
        if self.minus:
            return ""
        score = next(iter(self.cells.values()))
        return seen(score.effective_mpp, score.field_um)


@dataclass(frozen=True)
class Block:
    """Everything that may be compared line by line: one data set, protocol, probe and role.

    metrics: the columns, in the order in which they came. published: what others reported on the task, one protocol a metric.
    """

    dataset: str
    protocol: str
    probe: str
    role: str
    metrics: tuple[str, ...]
    lines: tuple[Line, ...]
    published: tuple[Published, ...]

    @property
    def title(self) -> str:
        selected = f", {SELECTED}" if self.selected else ""
        return f"protocol {self.protocol}, {probe_words(self.probe)}, {ROLE_WORDS.get(self.role, self.role)}{selected}"

    @property
    def selected(self) -> bool:
        return any(SELECTED in score.note for line in self.lines for score in line.cells.values())

    @property
    def size(self) -> str:
        """`7,180 images of 50 patients`, `132 images; groups: none, …`: what was scored and what the intervals resample."""
        words = []
        for score in (score for line in self.lines for score in line.cells.values()):
            if sized(score) not in words:
                words.append(sized(score))
        return " · ".join(words)

    @property
    def seen(self) -> str:
        """What every line sees, where all see the same; "" otherwise: then each line says its own."""
        found = {(line.resolution, line.seen) for line in self.lines if not line.minus and line.encoder != "colour"}
        if len(found) != 1:
            return ""
        resolution, words = found.pop()
        return f"{resolution}: {words}" if resolution else words


def blocks(scores: Sequence[Score], published: int, rows: Sequence[Published] | None = None) -> list[Block]:
    """The blocks of all scores, in the order in which they came; inside one, encoders first and floors last.

    published: as TableConfig's, 0 for none; rows: published rows other than the shipped ones.
    Raises ValueError when two scores claim one place.
    """
    check_places(scores)
    places = dict.fromkeys((score.dataset, score.protocol, score.probe, score.role) for score in scores)
    datasets = dict.fromkeys(place[0] for place in places)
    ordered = [place for dataset in datasets for place in places if place[0] == dataset]
    return [_block(place, scores, published, rows) for place in ordered]


def check_places(scores: Sequence[Score]) -> None:
    """Raises ValueError unless every score has a place of its own."""
    taken: set[tuple[str, ...]] = set()
    for score in scores:
        place = (score.dataset, score.protocol, score.probe, score.role, score.encoder, score.embedding, score.resolution,
                 score.metric, score.minus)  # fmt: skip
        if place in taken:
            where = " / ".join(filter(None, place))
            raise ValueError(f"two scores stand at {where}: expected one a place, so drop one or rename it")
        taken.add(place)


def _block(place: tuple[str, str, str, str], scores: Sequence[Score], published: int, rows: Sequence[Published] | None) -> Block:
    dataset, protocol, probe, role = place
    inside = [score for score in scores if (score.dataset, score.protocol, score.probe, score.role) == place]
    gathered: dict[tuple[str, str, str, str], dict[str, Score]] = {}
    for score in inside:
        gathered.setdefault((score.encoder, score.embedding, score.resolution, score.minus), {})[score.metric] = score
    lines = [Line(*key, _is_floor(cells), cells) for key, cells in gathered.items()]
    own = [line for line in lines if not line.minus]
    ordered: list[Line] = []
    for line in [*(line for line in own if not line.floor), *(line for line in own if line.floor)]:
        key = (line.encoder, line.embedding, line.resolution)
        ordered += [line, *(d for d in lines if d.minus and (d.encoder, d.embedding, d.resolution) == key)]
    ordered += [line for line in lines if line not in ordered]  # differences whose encoder has no line of its own here
    metrics = tuple(dict.fromkeys(score.metric for score in inside))
    encoders = [line.encoder for line in own if not line.floor]
    embedding = next((line.embedding for line in own if not line.floor), "cls")
    beside: list[Published] = []
    for metric in metrics if published else ():
        found = published_beside(dataset, probe, role, metric, embedding, rows)
        beside += nearest_column(found, published, encoders) if found else []
    return Block(dataset, protocol, probe, role, metrics, tuple(ordered), tuple(beside))


def _is_floor(cells: Mapping[str, Score]) -> bool:
    return any(score.floor for score in cells.values() if not score.minus)


def seen(effective_mpp: float | None, field_um: float | None) -> str:
    mpp = "unknown µm/px" if effective_mpp is None else f"{effective_mpp:.3g} µm/px"
    return mpp if field_um is None else f"{mpp}, field {field_um:.4g} µm"


def sized(score: Score) -> str:
    """`7,180 images of 50 patients`, or with `groups: none` in words."""
    interval = score.interval
    if score.groups == "none":
        return f"{interval.units:,} images; groups: none, so each image is taken as independent and intervals are too narrow"
    return f"{interval.units:,} images of {interval.patients:,} {score.groups}{'' if interval.patients == 1 else 's'}"


def probe_words(probe: str) -> str:
    if probe.startswith("few_shot/"):
        shots = probe.removeprefix("few_shot/")
        return f"{shots} image{'' if shots == '1' else 's'} a class"
    return PROBE_WORDS.get(probe, probe.replace("_", " "))


def metric_words(metric: str) -> str:
    return METRIC_WORDS.get(metric, metric.replace("_", " "))


def number(score: Score | None, digits: int = 3) -> str:
    """`0.812 [0.774, 0.850] ±0.004`, `+0.211 [−0.010, +0.432]` for a difference, `0.812 [withheld]`, or `–`."""
    if score is None or math.isnan(score.interval.value):
        return "–"
    sign = "+" if score.minus else ""
    value, low, high = score.interval.value, score.interval.low, score.interval.high
    interval = "withheld" if low is None or high is None else f"{low:{sign}.{digits}f}, {high:{sign}.{digits}f}"
    spread = f" ±{score.spread:.{digits}f}" if score.spread is not None and not score.minus else ""
    return f"{value:{sign}.{digits}f} [{interval}]{spread}".replace("-", "−")


def notes_of(score: Score) -> list[str]:
    """What the reader must know about one number: its own note, then the interval's (a reason where it is withheld)."""
    return [note for note in dict.fromkeys((score.note, score.interval.note)) if note]


class Footnotes:
    """Notes numbered in the order in which they are met; equal words share a number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, notes: Sequence[str]) -> list[int]:
        return [self.numbers.setdefault(note, len(self.numbers) + 1) for note in notes]

    def of_line(self, line: Line) -> list[int]:
        """Of notes that all cells of a line share; the others stand at their cells."""
        return self.of(shared_notes(line))

    def of_cell(self, line: Line, metric: str) -> list[int]:
        if metric not in line.cells:
            return []
        common = shared_notes(line)
        return self.of([note for note in notes_of(line.cells[metric]) if note not in common])


def shared_notes(line: Line) -> list[str]:
    first, *others = [notes_of(score) for score in line.cells.values()]
    return [note for note in first if all(note in notes for notes in others)]


def general_notes(found: Sequence[Block], level: float) -> list[str]:
    """What every table ends with: how to read its intervals, its floors and the rows of others."""
    scores = [score for block in found for line in block.lines for score in line.cells.values()]
    notes = [
        f"Brackets: the {level * 100:g} % interval, over patients or what stands in their place. ±: SD over equal runs."
    ]
    if any(score.minus for score in scores):
        notes.append("Differences are paired: both encoders are scored on the same draws of patients.")
    if any(score.floor for score in scores):
        notes.append("Floors: random is the same architecture untrained, colour is 42 numbers a picture.")
    if any(block.selected for block in found):
        notes.append("Selected on report: the probe was stopped on the very rows that it reports, as the published numbers were.")
    notes += [words for dataset in dict.fromkeys(block.dataset for block in found) if (words := other_definition(dataset))]
    return notes


def published_words(row: Published) -> str:
    """`eva-2025-03, CLS, split test`: what made a published number."""
    split = f"split {row.split}" if row.split else "split not stated"
    return f"{row.protocol}, {row.embedding or 'embedding not stated'}, {split}"


def published_columns(block: Block) -> list[tuple[str, list[Published]]]:
    """(our metric, its published rows) of a block; the rows of one metric have one protocol and one embedding."""
    pairs = [(metric, [row for row in block.published if METRICS.get(metric) == row.metric]) for metric in block.metrics]
    return [(metric, rows) for metric, rows in pairs if rows]


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """data set → protocol → probe → role → encoder → metric → {value, low, high, …}: plain, and no NaN.

    An encoder's first embedding and resolution stand at its name, so the primary ones must come first; others stand under
    `also` → `<embedding> <resolution>` → metric. Paired differences stand under `minus` → the other encoder → metric.
    Raises ValueError when two scores claim one place.
    """
    check_places(scores)
    found: dict[str, Any] = {}
    primary: dict[tuple[str, ...], tuple[str, str]] = {}
    for score in scores:
        path = (score.dataset, score.protocol, score.probe, score.role, score.encoder)
        place = found
        for name in path:
            place = place.setdefault(name, {})
        if score.metric in RESERVED:
            raise ValueError(f"a metric is called {score.metric!r}, which the summary keeps for itself: rename it")
        form = (score.embedding, score.resolution)
        if primary.setdefault(path, form) != form:
            place = place.setdefault("also", {}).setdefault(" ".join(filter(None, form)), {})
        if score.minus:
            place = place.setdefault("minus", {}).setdefault(score.minus, {})
        place[score.metric] = cell(score)
    return found


def cell(score: Score) -> dict[str, Any]:
    """One score as plain values; None where a number is undefined or an interval withheld."""
    interval = {name: _finite(value) for name, value in score.interval.as_dict().items()}
    return {
        **interval,
        "note": "; ".join(notes_of(score)),
        "embedding": score.embedding,
        "resolution": score.resolution,
        "groups": score.groups,
        "runs": score.runs,
        "spread": _finite(score.spread),
        "effective_mpp": _finite(score.effective_mpp),
        "field_um": _finite(score.field_um),
        "floor": score.floor,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
