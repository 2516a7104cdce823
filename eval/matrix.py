"""Encoders against sets: one number a cell, and a mean only over the sets that all of them have."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.eval.results import Score
from histoscale.eval.table import SELECTED

_ROLES = ("report", "outer", "select")  # of the number that stands for a set: the first that it has


@dataclass(frozen=True)
class Overview:
    """One protocol and probe. rows: (encoder, embedding, resolution), floors last. sets: (data set, role, metric).

    cells: [rows][sets], None where it was not scored. common: places of the sets that every encoder has, mean_over: of those
    among them that enter `means`; fewer than two: no mean.
    """

    protocol: str
    probe: str
    rows: tuple[tuple[str, str, str], ...]
    sets: tuple[tuple[str, str, str], ...]
    cells: tuple[tuple[Score | None, ...], ...]
    common: tuple[int, ...]
    mean_over: tuple[int, ...]
    means: tuple[float | None, ...]

    @property
    def title(self) -> str:
        selected = any(score is not None and SELECTED in score.note for row in self.cells for score in row)
        return f"protocol {self.protocol}, {self.probe} probe" + (f", {SELECTED}" if selected else "")

    @property
    def mean_words(self) -> str:
        """What the mean is over, or why there is none."""
        if len(self.mean_over) < 2:
            return "No mean over sets: it needs two sets of one metric that every encoder has."
        names = [self.sets[place][0] for place in self.mean_over]
        metric = self.sets[self.mean_over[0]][2].replace("_", " ")
        return f"Mean of {', '.join(names)} ({metric}): the sets that every encoder has. No interval: sets are not a sample."


def overviews(scores: Sequence[Score], metrics: Sequence[str]) -> list[Overview]:
    """One for every protocol and probe. metrics: a set is shown by the first of these that it has; without one it is left out."""
    own = [score for score in scores if not score.minus]
    found = []
    for protocol, probe in dict.fromkeys((score.protocol, score.probe) for score in own):
        inside = [score for score in own if (score.protocol, score.probe) == (protocol, probe)]
        sets = [place for dataset in dict.fromkeys(s.dataset for s in inside) if (place := _shown(dataset, inside, metrics))]
        if sets:
            found.append(_overview(protocol, probe, inside, sets))
    return found


def _shown(dataset: str, inside: Sequence[Score], metrics: Sequence[str]) -> tuple[str, str, str] | None:
    held = [score for score in inside if score.dataset == dataset]
    role = next((role for role in _ROLES if any(score.role == role for score in held)), None)
    metric = next((metric for metric in metrics if any(score.metric == metric and score.role == role for score in held)), None)
    return (dataset, role, metric) if role is not None and metric is not None else None


def _overview(protocol: str, probe: str, inside: Sequence[Score], sets: Sequence[tuple[str, str, str]]) -> Overview:
    table: dict[tuple[str, str, str], dict[tuple[str, str, str], Score]] = {}
    floors: set[tuple[str, str, str]] = set()
    for score in inside:
        if (score.dataset, score.role, score.metric) in sets:
            # A floor may take another embedding on every set: it is one line.
            form = (score.encoder, "", "") if score.floor else (score.encoder, score.embedding, score.resolution)
            table.setdefault(form, {}).setdefault((score.dataset, score.role, score.metric), score)
            floors |= {form} if score.floor else set()
    rows = [*(form for form in table if form not in floors), *(form for form in table if form in floors)]
    cells = tuple(tuple(table[form].get(place) for place in sets) for form in rows)
    encoders = [row for form, row in zip(rows, cells, strict=True) if form not in floors]
    common = [place for place in range(len(sets)) if all(_known(row[place]) for row in encoders)]
    metric = sets[common[0]][2] if common else ""
    mean_over = tuple(place for place in common if sets[place][2] == metric)
    means = tuple(_mean([row[place] for place in mean_over]) if len(mean_over) > 1 else None for row in cells)
    return Overview(protocol, probe, tuple(rows), tuple(sets), cells, tuple(common), mean_over, means)


def _known(score: Score | None) -> bool:
    return score is not None and bool(np.isfinite(score.interval.value))


def _mean(scores: Sequence[Score | None]) -> float | None:
    values = [score.interval.value for score in scores if score is not None and np.isfinite(score.interval.value)]
    return float(np.mean(values)) if len(values) == len(scores) else None
