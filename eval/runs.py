"""Several runs of the suite side by side: the same images under several encoders, with paired differences on shared patients."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from histoscale.eval.predictions import FILE, Predictions, load_predictions
from histoscale.eval.results import Outcome, Score
from histoscale.eval.scores.classification import auroc_one_vs_rest, balanced_accuracy, macro_f1
from histoscale.eval.scores.interval import IntervalConfig, Statistic, paired_difference
from histoscale.eval.scores.mcnemar import holm, mcnemar
from histoscale.eval.table import FLOORS

PAIRED = ("balanced_accuracy", "macro_f1", "auroc")


class RunsError(ValueError):
    """Runs that cannot stand in one table; the message names them and says why."""


@dataclass(frozen=True)
class Run:
    """name: of its folder, as short as tells it from the others. predictions: of the one set that it scored."""

    name: str
    predictions: Predictions


@dataclass(frozen=True)
class Decisions:
    """What a pair is compared on: decisions of one encoder, under the name that the table gives it."""

    encoder: str
    resolution: str
    outcome: Outcome
    of: Predictions

    @property
    def place(self) -> tuple[str, str, str, str, str, str]:
        o = self.outcome
        return self.of.dataset, o.protocol, o.probe, o.role, o.embedding, self.resolution


def open_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in the given folders. Raises RunsError for fewer than two or one named twice, PredictionsError for a bad file."""
    return [Run(name, load_predictions(path / FILE)) for name, path in check_folders(folders).items()]


def check_folders(folders: Sequence[str]) -> dict[str, Path]:
    """Folders by a name, as short as tells them apart. Raises RunsError for fewer than two or one named twice."""
    paths = [Path(folder).expanduser() for folder in folders]
    if len(paths) < 2:
        raise RunsError(f"runs= names {len(paths)} run: a comparison needs at least two folders of finished runs")
    resolved = [path.resolve() for path in paths]
    twice = next((str(path) for place, path in enumerate(paths) if resolved[place] in resolved[:place]), None)
    if twice is not None:
        raise RunsError(f"runs= names {twice} twice: expected different runs")
    return dict(zip(_short_names(resolved), paths, strict=True))


def _short_names(paths: Sequence[Path]) -> list[str]:
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def check_same_data(runs: Sequence[Run]) -> None:
    """Raises RunsError when two runs of one set were made on other images, labels or patients."""
    first: dict[str, Run] = {}
    for run in runs:
        a, b = first.setdefault(run.predictions.dataset, run).predictions, run.predictions
        if a.data_hash != b.data_hash:
            other = first[b.dataset].name
            raise RunsError(
                f"{other} and {run.name} scored {b.dataset} on different data (hash {a.data_hash} and {b.data_hash}): "
                "run both probes on the same files and labels"
            )
        same = np.array_equal(a.labels, b.labels) and np.array_equal(a.patients, b.patients) and a.classes == b.classes
        if not same:
            pair = f"{first[b.dataset].name} and {run.name}"
            raise RunsError(f"{pair} share the hash of {b.dataset} but not its labels or patients: a file was changed")


def gathered(runs: Sequence[Run]) -> tuple[list[Score], list[Decisions]]:
    """All scores and decisions under names that tell every encoder from every other.

    An encoder that two runs scored on one set is told apart by its run. `random` belongs to the encoder beside it and says so; a
    floor with the same numbers in several runs stands once.
    """
    check_same_data(runs)
    scores: list[Score] = []
    decisions: list[Decisions] = []
    taken: set[tuple[str, ...]] = set()
    for run in runs:
        names = _names(run, runs)
        for score in run.predictions.scores:
            renamed = replace(score, encoder=names[score.encoder], minus=names.get(score.minus, score.minus))
            if _place(renamed) not in taken:  # only an equal floor of another run can be there already
                taken.add(_place(renamed))
                scores.append(renamed)
        decisions += [
            Decisions(names[outcome.encoder], resolution, outcome, run.predictions)
            for resolution, found in run.predictions.outcomes.items() for outcome in found
            if outcome.encoder not in FLOORS
        ]  # fmt: skip
    return scores, decisions


def _names(run: Run, runs: Sequence[Run]) -> dict[str, str]:
    """Encoder -> its name in the table. The random floor is that of the run's first encoder."""
    own = _encoders(run)
    others = [other for other in runs if other is not run and other.predictions.dataset == run.predictions.dataset]
    names = {name: f"{name} ({run.name})" if any(name in _encoders(o) for o in others) else name for name in own}
    first = next((names[name] for name in own if name not in FLOORS), "")
    if "random" in names:
        names["random"] = f"random, as {first}" if first else f"random ({run.name})"
    if "colour" in names:
        equal = all(_equal_numbers(_values(run, "colour"), _values(other, "colour")) for other in others)
        names["colour"] = "colour" if equal else f"colour ({run.name})"
    return names


def _encoders(run: Run) -> list[str]:
    outcomes = (outcome for found in run.predictions.outcomes.values() for outcome in found)
    return list(dict.fromkeys([*(s.encoder for s in run.predictions.scores), *(o.encoder for o in outcomes)]))


def _place(score: Score) -> tuple[str, ...]:
    form = (score.encoder, score.embedding, score.resolution, score.metric, score.minus)
    return score.dataset, score.protocol, score.probe, score.role, *form


def _values(run: Run, encoder: str) -> dict[tuple[str, ...], float]:
    return {_place(s): s.interval.value for s in run.predictions.scores if s.encoder == encoder and not s.minus}


def _equal_numbers(a: dict[tuple[str, ...], float], b: dict[tuple[str, ...], float]) -> bool:
    return all(np.isclose(value, b[place], rtol=0, atol=1e-9, equal_nan=True) for place, value in a.items() if place in b)


def paired_scores(
    decisions: Sequence[Decisions], metrics: Sequence[str], interval: IntervalConfig, scores: Sequence[Score]
) -> list[Score]:
    """first − second of every two encoders in one place (set, protocol, probe, role, embedding, resolution), on shared patients.

    scores: of `gathered`, from which µm/px and field are taken. Raises RunsError for a metric that decisions do not have.
    """
    unknown = [metric for metric in metrics if metric not in PAIRED]
    if unknown:
        raise RunsError(f"paired names {', '.join(unknown)}: expected some of {', '.join(PAIRED)}")
    found = []
    for first, second in _pairs(decisions):
        of, a = first.of, first.outcome
        rows, left, right = np.intersect1d(a.rows, second.outcome.rows, assume_unique=True, return_indices=True)
        if len(rows) == 0:
            continue
        dataset, protocol, probe, role, embedding, resolution = first.place
        place = (first.encoder, dataset, resolution)
        known = next((s for s in scores if (s.encoder, s.dataset, s.resolution) == place), None)
        for metric in metrics:
            statistics = (
                statistic(a.logs[:, left], of.labels[rows], metric),
                statistic(second.outcome.logs[:, right], of.labels[rows], metric),
            )
            found.append(Score(
                dataset=dataset, encoder=first.encoder, embedding=embedding, resolution=resolution, protocol=protocol,
                probe=probe, role=role, metric=metric, interval=paired_difference(*statistics, of.patients[rows], interval),
                groups=of.groups, runs=len(a.logs), spread=None, effective_mpp=known.effective_mpp if known else None,
                field_um=known.field_um if known else None, floor=False, minus=second.encoder, note=a.note,
            ))  # fmt: skip
    return found


def _pairs(decisions: Sequence[Decisions]) -> list[tuple[Decisions, Decisions]]:
    return [(a, b) for a, b in combinations(decisions, 2) if a.place == b.place and a.encoder != b.encoder]


def statistic(logs: np.ndarray, labels: np.ndarray, metric: str) -> Statistic:
    """A metric of drawn rows, meaned over the R runs. logs: [R, n, K]; labels: [n]. NaN where it is undefined."""
    classes, probabilities, predicted = logs.shape[2], np.exp(logs), logs.argmax(axis=2)

    def one(run: int, rows: np.ndarray) -> float:
        if metric == "balanced_accuracy":
            return balanced_accuracy(labels[rows], predicted[run][rows], classes)
        if metric == "macro_f1":
            return macro_f1(labels[rows], predicted[run][rows], classes)
        return auroc_one_vs_rest(probabilities[run][rows], labels[rows])

    return lambda rows: float(np.mean([one(run, rows) for run in range(len(logs))]))


def mcnemar_tests(decisions: Sequence[Decisions]) -> list[dict[str, Any]]:
    """Exact McNemar of every pair of single runs on independent units, with Holm's adjustment over all of them.

    Left out where several images come from one patient: those are not independent; with groups `none` every image is taken as so.
    """
    found: list[dict[str, Any]] = []
    for first, second in _pairs(decisions):
        of, a, b = first.of, first.outcome, second.outcome
        rows, left, right = np.intersect1d(a.rows, b.rows, assume_unique=True, return_indices=True)
        if len(a.logs) > 1 or len(b.logs) > 1 or len(rows) == 0 or len(set(of.patients[rows].tolist())) < len(rows):
            continue
        alone, other, p = mcnemar(a.predicted[0][left] == of.labels[rows], b.predicted[0][right] == of.labels[rows])
        names = ("dataset", "protocol", "probe", "role", "embedding", "resolution")
        place = dict(zip(names, first.place, strict=True))
        pair = {"first": first.encoder, "second": second.encoder, "first_alone": alone, "second_alone": other, "p": p}
        found.append({**place, **pair, "groups": of.groups})
    for row, adjusted in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = adjusted
    return found
