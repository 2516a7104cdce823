"""What a run decided, row by row, in one file that another run can be compared with: `predictions.npz`.

A zip of plain arrays and one JSON text; nothing is pickled. `about`: uint8, the JSON {format, dataset, data_hash, classes,
groups, positive, encoders, outcomes: [{resolution, encoder, embedding, protocol, probe, role, note}], scores}. `labels` int64
[n], `patients` and `roles` unicode [n]; `logs_<i>` float32 [R, m, K] and `rows_<i>` int64 [m] of outcome i.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from histoscale.data.journal import plain
from histoscale.data.jsonfiles import parse_object
from histoscale.data.secrets import scrubbed
from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.results import Outcome, Score
from histoscale.eval.scores.interval import Interval

FORMAT = "histoscale-predictions-1"
FILE = "predictions.npz"
# of a zip, its streams, its arrays (a shape beyond any memory among them) and its JSON
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, MemoryError, RuntimeError,
           zipfile.BadZipFile, zlib.error)  # fmt: skip
_OUTCOME = ("encoder", "embedding", "protocol", "probe", "role", "note")


class PredictionsError(ValueError):
    """A file of predictions that cannot be read or does not fit; the message names it."""


@dataclass(frozen=True)
class Predictions:
    """One run on one labelled set. labels: int64 [n] into `classes`. patients, roles: [n]. groups, positive: as LabelledPatches'.

    encoders: name -> hash of the weights. outcomes: resolution policy -> what was decided on features of it; empty where a set
    has scores only (segmentation, regression).
    """

    dataset: str
    data_hash: str
    classes: tuple[str, ...]
    groups: str
    positive: str | None
    encoders: dict[str, str]
    labels: np.ndarray
    patients: np.ndarray
    roles: np.ndarray
    outcomes: dict[str, list[Outcome]]
    scores: tuple[Score, ...]


def predictions_of(
    patches: LabelledPatches, outcomes: Mapping[str, Sequence[Outcome]], scores: Sequence[Score], encoders: Mapping[str, str]
) -> Predictions:
    """What `save_predictions` takes, of a set that was just scored."""
    return Predictions(
        dataset=patches.name, data_hash=patches.hash, classes=patches.classes, groups=patches.groups,
        positive=patches.usage.positive, encoders=dict(encoders), labels=patches.labels, patients=patches.patients,
        roles=patches.roles, outcomes={name: list(found) for name, found in outcomes.items()}, scores=tuple(scores),
    )  # fmt: skip


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Write the file whole or not at all. Log-probabilities are kept in float32; every decision stays what it was."""
    decided = [(resolution, outcome) for resolution, found in predictions.outcomes.items() for outcome in found]
    about = {
        "format": FORMAT,
        **{name: getattr(predictions, name) for name in ("dataset", "data_hash", "classes", "groups", "positive", "encoders")},
        "outcomes": [{"resolution": r, **{name: getattr(outcome, name) for name in _OUTCOME}} for r, outcome in decided],
        "scores": [asdict(score) for score in predictions.scores],
    }
    arrays: dict[str, np.ndarray] = {
        "about": np.frombuffer(json.dumps(scrubbed(plain(about)), allow_nan=False).encode(), np.uint8),
        "labels": predictions.labels.astype(np.int64),
        "patients": predictions.patients.astype(np.str_),
        "roles": predictions.roles.astype(np.str_),
    }
    for i, (_, outcome) in enumerate(decided):
        arrays |= {f"logs_{i}": _narrowed(outcome.logs), f"rows_{i}": outcome.rows.astype(np.int64)}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_predictions(path: Path) -> Predictions:
    """Read a file of `save_predictions`. Raises PredictionsError where it is missing, damaged, or of another format."""
    try:
        with np.load(path, allow_pickle=False) as held:
            about = parse_object(held["about"].tobytes())
            if about.get("format") != FORMAT:
                raise PredictionsError(f"{path} has the format {about.get('format')!r}: expected {FORMAT!r}; run the probe again")
            labels, patients, roles = held["labels"], held["patients"], held["roles"]
            outcomes: dict[str, list[Outcome]] = {}
            for i, row in enumerate(about["outcomes"]):
                logs, rows = held[f"logs_{i}"].astype(np.float64), held[f"rows_{i}"]
                said = {name: row[name] for name in _OUTCOME}
                outcomes.setdefault(row["resolution"], []).append(Outcome(**said, logs=logs, rows=rows))
        scores = tuple(_score(row) for row in about["scores"])
        predictions = Predictions(
            dataset=about["dataset"], data_hash=about["data_hash"], classes=tuple(about["classes"]), groups=about["groups"],
            positive=about["positive"], encoders=about["encoders"], labels=labels, patients=patients, roles=roles,
            outcomes=outcomes, scores=scores,
        )  # fmt: skip
        _check(path, predictions)
        return predictions
    except PredictionsError:
        raise
    except FileNotFoundError:
        raise PredictionsError(f"{path} is missing: expected the folder of a finished `histoscale probe` run") from None
    except _BROKEN as error:
        raise PredictionsError(f"{path} is not a whole file of predictions ({error}); run the probe again") from None


def _check(path: Path, held: Predictions) -> None:
    n, classes = len(held.labels), len(held.classes)
    rows_of = [outcome.rows for found in held.outcomes.values() for outcome in found]
    wrong = any(array.ndim != 1 or array.dtype.kind not in kinds for array, kinds in (
        (held.labels, "i"), (held.patients, "U"), (held.roles, "U"), *((rows, "i") for rows in rows_of)))  # fmt: skip
    wrong = wrong or len(held.patients) != n or len(held.roles) != n
    wrong = wrong or (n > 0 and not 0 <= held.labels.min() <= held.labels.max() < classes)
    for outcome in (outcome for found in held.outcomes.values() for outcome in found):
        rows = outcome.rows
        inside = len(rows) == 0 or 0 <= rows.min() <= rows.max() < n
        wrong = wrong or not inside or outcome.logs.shape[1:] != (len(rows), classes) or len(outcome.logs) == 0
    if wrong:
        raise PredictionsError(f"{path} does not fit itself: {n} labels of {classes} classes, and arrays of other lengths")


def _score(row: dict[str, Any]) -> Score:
    interval = dict(row["interval"])
    value = interval.pop("value")
    return Score(**{**row, "interval": Interval(value=float("nan") if value is None else value, **interval)})


def _narrowed(logs: np.ndarray) -> np.ndarray:
    """float32 whose largest entry of a row is the float64 one's: rounding may make equals, and the lowest index then wins."""
    narrow = logs.astype(np.float32)
    chosen = logs.argmax(axis=-1)[..., None]
    moved = narrow.argmax(axis=-1)[..., None] != chosen
    above = np.nextafter(narrow.max(axis=-1, keepdims=True), np.float32(np.inf))
    np.put_along_axis(narrow, chosen, np.where(moved, above, np.take_along_axis(narrow, chosen, axis=-1)), axis=-1)
    return narrow
