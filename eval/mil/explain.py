"""What a slide model says of a slide and on what it rests: the case that the second reader's page is written from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.data.storage import Store
from histoscale.eval.annotations import Annotations, read_annotations
from histoscale.eval.evidence.case import Case, Finding
from histoscale.eval.mil.arms import Trained, reader_of
from histoscale.eval.mil.bags import Bag
from histoscale.eval.mil.study import Study
from histoscale.eval.mil.task import BinaryTask, ClassesTask, RegressionTask, SurvivalTask, Task
from histoscale.eval.mil.trials import Plan
from histoscale.eval.scores.operating import Rate, Threshold, answer_of, score_words, sweeping

OUTLINES = ("{id}.xml", "{id}.geojson", "{id}/foci.geojson")  # where a folder of annotations may hold a slide's
COLUMN = "annotations"  # of the manifest


@dataclass(frozen=True)
class Outlines:
    """Where annotations stand. folder: files named by slide id, or None; manifest: relative paths of its column start there;
    exclude: groups that are no finding."""

    folder: Path | None
    manifest: Path
    exclude: Sequence[str]

    def of(self, bag: Bag) -> Annotations | None:
        """None where nobody drew any. Raises AnnotationError for a file that is none, OSError for one that the manifest names
        and that is not there."""
        path = self.path(bag)
        return None if path is None else read_annotations(path, self.exclude)

    def path(self, bag: Bag) -> Path | None:
        """The file of a slide; one that the manifest names need not be there."""
        named = bag.columns.get(COLUMN)
        if named:
            return self.manifest.parent / named
        if self.folder is None:
            return None
        known = (self.folder / name.format(id=bag.slide_id) for name in OUTLINES)
        return next((path for path in known if path.is_file()), None)


def case_of(
    trained: Trained, plan: Plan, row: int, task: Task, found: Study, outlines: Outlines, catalog: Catalog | None, store: Store
) -> Case:
    """The case of one row, read by the trial that never saw its patient (or by the models that did not, of a training row).

    Raises what reading the store and the annotations raises.
    """
    bag, (t, part) = trained.arm.bags.rows[row], reader_of(plan, row)
    rules = found.of_trials.get(plan.trials[t].name, found.thresholds)
    flagged = [found.flagged(k) for k in range(len(rules))]  # over all trials: one that reads a single slide sweeps it always
    fitted, features = trained.fitted[t], trained.arm.features
    reading, members = trained.read(t, row), fitted.held_out.get(row)
    explained = int(np.argmax(reading.output)) if isinstance(task, ClassesTask) else 0
    dropped = fitted.ensemble.occlusion(features.whole(row), members)
    facts = {"patient": bag.group, "site": bag.site or "unknown", "part": part}
    place = None if catalog is None else place_of(catalog, bag.slide_id)
    return Case(
        slide_id=bag.slide_id,
        patient=bag.group,
        facts=facts,
        hidden={"label of the manifest": label_words(bag, task)},
        finding=finding(reading.output, explained, task, rules, flagged),
        explained=_names(task)[explained],
        coords=features.coords(row),
        size_px=bag.size_px,
        attention=reading.attention,
        contribution=reading.contribution[:, explained],
        occlusion=None if dropped is None else dropped[:, explained],
        features=lambda: features.whole(row),
        logit=lambda tiles: float(fitted.ensemble.logits(tiles, members)[explained]),
        reader=None if catalog is None or place is None else catalog.reader(place, store),
        mpp=float("nan") if catalog is None or place is None else float(catalog.level_mpps(place)[0]),
        annotations=outlines.of(bag),
    )


def place_of(catalog: Catalog, slide_id: str) -> int | None:
    """Its row; None where the catalog does not hold the slide: a store may come from elsewhere."""
    try:
        return catalog.row(slide_id)
    except KeyError:
        return None


def finding(output: np.ndarray, explained: int, task: Task, thresholds: Sequence[Threshold], flagged: Sequence[Rate]) -> Finding:
    """output: float64 [K], as a Reading has it. thresholds: of the trial that read the slide, the first of which rules; flagged:
    what the rule of each flags of all that the study reads, each unit by the threshold of its trial."""
    value = float(output[explained])
    match task:
        case BinaryTask():
            pairs = list(zip(thresholds, flagged, strict=True))
            rules = [rule_words(value >= at.value, at, of, task.decision) for at, of in pairs]
            at, of = pairs[0]
            side = 1.0 if value > 0.5 else -1.0  # what the maps are asked to explain: the side that the model took
            words = " ".join([*rules, "Thresholds were fixed on training patients."])
            return Finding(
                value, f"score {score_words(value)} for {_names(task)[0]}", words, value >= at.value, side, answer_of(at, of)
            )
        case ClassesTask():
            return Finding(value, f"{_names(task)[explained]}, probability {value:.3f}", "", None, 1.0)
        case RegressionTask():
            return Finding(value, f"{task.label} {value:.4g}", "", None, 1.0)
        case SurvivalTask():
            return Finding(value, f"log-risk {value:+.3f}, 0 is the mean of the training slides", "", None, 1.0)


def rule_words(flagged: bool, at: Threshold, of: Rate, unit: str) -> str:
    """A slide under a rule, and whether the rule says the same of all. of: what it flags of all that it reads."""
    answer = f"{'Flagged' if flagged else 'Not flagged'} for a required {at.keeps} of {at.required:g}"
    if math.isinf(at.value):
        return f"{answer}, as every {unit} is under this threshold: {at.note}."
    all_of = f"of the {of.n} {unit}s that it read is"
    same = {"every": f", as every one {all_of}", "no": f", as none {all_of}"}
    return f"{answer}, from a score of {score_words(at.value)} on{same.get(sweeping(of), '')}."


def label_words(bag: Bag, task: Task) -> str:
    """The target as people would write it."""
    match task:
        case BinaryTask():
            return f"{'positive' if bag.label else 'negative'} ({task.label} {bag.columns[task.label]})"
        case ClassesTask():
            return list(task.classes)[bag.label]
        case RegressionTask():
            return f"{task.label} {bag.target:g}"
        case SurvivalTask():
            return f"{task.label} {bag.target:g}, {'the event happened' if bag.event else 'censored'}"


def _names(task: Task) -> tuple[str, ...]:
    """Of the outputs."""
    if isinstance(task, ClassesTask):
        return tuple(task.classes)
    return (task.name,) if isinstance(task, BinaryTask) else (task.label,)
