"""Made-up results of the suite: patches with pictures, decisions that are right about as often as asked, and their scores."""

from collections.abc import Sequence

import numpy as np

from histoscale.eval.datasets.patches import LabelledPatches, Usage, hash_of
from histoscale.eval.results import Outcome, Score
from histoscale.eval.scores.classification import balanced_accuracy, macro_f1
from histoscale.eval.scores.interval import Interval

EVIL = '<script>document.title = "owned"</script>'


def made_patches(
    name: str = "made", classes: Sequence[str] = ("ADI", "LYM", "TUM"), n: int = 120, patients: int = 24, seed: int = 0
) -> LabelledPatches:
    """n pictures of 24 px whose brightness is their class; a patient is all train or all report; one report picture is wide."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(classes), n)
    labels[: 2 * len(classes)] = np.tile(np.arange(len(classes)), 2)
    owner = np.arange(n) % patients
    roles = np.where(owner % 2 == 0, "train", "report")

    def read(rows: np.ndarray) -> list[np.ndarray]:
        noise = [np.random.default_rng([seed, int(row)]) for row in rows]
        sizes = [(24, 48) if row == 1 else (24, 24) for row in rows]
        return [
            np.clip(60 + 50 * labels[row] + own.normal(0, 12, (3, *size)), 0, 255).astype(np.uint8)
            for row, own, size in zip(rows, noise, sizes, strict=True)
        ]

    return LabelledPatches(
        name=name, classes=tuple(classes), labels=labels, roles=roles, patients=np.array([f"P{i:02d}" for i in owner]),
        sites=np.full(n, ""), groups="patient", mpp=0.5, size_px=None, hash=hash_of(name, n, seed), read=read,
        blocks=np.array([f"P{i:02d}" for i in owner]), slide_ids=np.full(n, ""),
        usage=Usage("folds", "report", ("report",), classes[-1] if len(classes) == 2 else None),
    )  # fmt: skip


def made_outcome(
    patches: LabelledPatches, encoder: str, right: float, protocol: str = "honest", probe: str = "linear", role: str = "report",
    embedding: str = "cls", runs: int = 1, note: str = "", seed: int = 1,
) -> Outcome:  # fmt: skip
    """Log-probabilities whose largest is the true class in about a share `right` of the rows."""
    random = np.random.default_rng(seed)
    rows = patches.rows("report" if role == "outer" else role)
    labels, classes = patches.labels[rows], len(patches.classes)
    logits = random.normal(0, 1, (runs, len(rows), classes))
    told = np.where(random.random((runs, len(rows))) < right, labels, random.integers(0, classes, (runs, len(rows))))
    logits[np.arange(runs)[:, None], np.arange(len(rows)), told] += 3
    logs = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    return Outcome(encoder, embedding, protocol, probe, role, logs, rows, note)


def made_score(outcome: Outcome, patches: LabelledPatches, metric: str, floor: bool = False, half: float | None = 0.04) -> Score:
    """The outcome's own balanced accuracy or macro F1 with an interval of ± half (None: withheld)."""
    labels, classes = patches.labels[outcome.rows], len(patches.classes)
    measure = macro_f1 if metric == "macro_f1" else balanced_accuracy
    values = [measure(labels, predicted, classes) for predicted in outcome.predicted]
    value, patients = float(np.mean(values)), len(set(patches.patients[outcome.rows]))
    note = "" if half is not None else f"interval withheld: {patients} patients, and fewer than 10 cannot carry one"
    low, high = (None, None) if half is None else (value - half, value + half)
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Score(
        dataset=patches.name, encoder=outcome.encoder, embedding=outcome.embedding, resolution="resize",
        protocol=outcome.protocol, probe=outcome.probe, role=outcome.role, metric=metric,
        interval=Interval(value, low, high, patients, len(labels), note), groups=patches.groups, runs=len(outcome.logs),
        spread=spread, effective_mpp=0.5, field_um=112.0, floor=floor, minus="", note=outcome.note,
    )  # fmt: skip


def made_difference(first: Score, second: Score, half: float = 0.05) -> Score:
    """first − second, paired."""
    value = first.interval.value - second.interval.value
    interval = Interval(value, value - half, value + half, first.interval.patients, first.interval.units, "")
    return Score(**{**vars(first), "interval": interval, "minus": second.encoder, "spread": None, "note": ""})


def made_run(
    patches: LabelledPatches, encoder: str = "release", right: float = 0.9, seed: int = 1
) -> tuple[list[Outcome], list[Score]]:
    """An encoder beside its floors under both protocols, with paired differences."""
    outcomes, scores = [], []
    for protocol, runs, note in (("honest", 1, ""), ("eva", 3, "selected on report")):
        names = ((encoder, right, runs), ("random", right - 0.4, 5), ("colour", right - 0.3, 1))
        found = [
            made_outcome(patches, name, share, protocol, runs=n, note=note, seed=seed + place)
            for place, (name, share, n) in enumerate(names)
        ]
        outcomes += found
        for metric in ("balanced_accuracy", "macro_f1"):
            cells = [made_score(outcome, patches, metric, outcome.encoder in ("random", "colour")) for outcome in found]
            scores += [*cells, *(made_difference(cells[0], floor) for floor in cells[1:])]
    return outcomes, scores
