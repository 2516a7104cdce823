"""The page of a slide-model run: inside beside outside, decisions at carried thresholds, floors, calibration, and the limits."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from histoscale.eval.drawings import (
    Line,
    Mark,
    interval_plot,
    kaplan_meier,
    reliability_plot,
    roc_plot,
    scatter_plot,
    survival_plot,
)
from histoscale.eval.mil.absent import Absent
from histoscale.eval.mil.decodability import Decodability, Decoded
from histoscale.eval.mil.metrics import NAMES, headline
from histoscale.eval.mil.part import Operating, Part
from histoscale.eval.mil.split import Check
from histoscale.eval.mil.study import Study
from histoscale.eval.mil.task import BinaryTask, ClassesTask, RegressionTask, SurvivalTask
from histoscale.eval.mil.words import (
    cannot_say,
    count_words,
    counted,
    headline_words,
    metric_words,
    plainly,
    rate_words,
    threshold_words,
    value_words,
)
from histoscale.eval.page import Cell, Chapter, Drawing, Folded, Grid, Heading, Matrix, Prose, write_page
from histoscale.eval.page import Part as Piece
from histoscale.eval.scores.interval import Interval
from histoscale.eval.scores.operating import Rate, score_words, sweeping
from histoscale.eval.scores.recalibration import LOSSES


def write_mil_page(
    path: Path,
    found: Study,
    checks: Sequence[Check],
    leakage: Chapter,
    decoded: Decodability | None,
    seeds: Mapping[str, Sequence[float]],
    pages: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    encoder: str,
    absent: Absent | None = None,
) -> None:
    """Write report.html. absent: labelled slides that the study lacks, which stand first.

    checks, leakage: what was compared between the parts, and its chapter. seeds: of `seed_values`. pages: slide_id -> relative
    address of its page, percent-encoded; rows: of `score_rows`, from which their line is taken. encoder: its name or hash.
    """
    chapters = [Chapter("Not in the study", _absent(absent))] if absent is not None and absent.why else []
    chapters.append(Chapter("Inside and outside", _sides(found, seeds)))
    if isinstance(found.task, BinaryTask):
        chapters.append(Chapter("Decisions at thresholds fixed in training", _decisions(found)))
        chapters.append(Chapter("Do the probabilities mean what they say?", _calibration(found)))
    else:
        chapters.append(Chapter("What was predicted", _predictions(found)))
    if any(part.floors for part in found.reported):
        chapters.append(Chapter("What it must beat", _floors(found)))
    if decoded is not None:
        chapters.append(Chapter("Hospital beside biology", _decoded(decoded)))
    chapters.append(leakage)
    if pages:
        chapters.append(Chapter("Slides for the second reader", [_slides(pages, rows)]))
    limits = cannot_say(found, checks, decoded)
    chapters.append(Chapter("What this study cannot say", [Prose("\n\n".join(limits))]))
    lacking = f" {absent.sentence}" if absent is not None and absent.sentence else ""
    write_page(path, found.task.name, _lead(found, encoder) + lacking, _facts(found), chapters)


def _lead(found: Study, encoder: str) -> str:
    split = {"fixed": "parts fixed beforehand", "folds": "folds of patients", "sites": "one site left out at a time"}[found.kind]
    return (
        f"A slide model on features of {encoder}, read on {split}; decisions by {found.task.decision}, intervals by "
        f"{found.groups}. A second reader that flags for review, never a diagnosis."
    )


def _facts(found: Study) -> dict[str, str]:
    """At most six."""
    name, facts = NAMES[headline(found.task)], {}
    for part in found.reported:
        if part.headline is not None:
            facts[f"{name}, {part.name}: {part.patients} patients"] = str(part.headline)
    if headline(found.task) in found.gap:
        facts[f"{name}, internal minus external"] = str(found.gap[headline(found.task)])
    outermost = found.external or found.internal
    if outermost is not None and outermost.operating:
        rules = list(enumerate(outermost.operating))
        swept = [(i, at) for i, at in rules if found.flags(i) or sweeping(at.found.flagged)]
        if swept and swept[0][0] == 0:
            at, flagged = swept[0][1], swept[0][1].found.flagged
            words = f"{found.flags(0) or sweeping(flagged)} {found.task.decision}: {flagged.hits} of {flagged.n}"
            facts[f"flagged by the rule for {at.keeps} {at.required:g}, {outermost.name}: it sorts nothing"] = words
        sorting = [at for i, at in rules if (i, at) not in swept]
        if sorting:
            at = sorting[0]
            rule = f"{outermost.name}, rule for {at.keeps} {at.required:g}"
            facts[f"missed of the positive, {rule}"] = rate_words(at.found.fnr)
            facts[f"flagged for review, {rule}"] = rate_words(at.found.flagged)
    return facts


def _look(part: Part) -> str:
    return {"train": "floor", "internal": "ours", "external": "outside"}[part.role]


def _all(found: Study) -> list[tuple[str, Part]]:
    """(label, part) of every set, sites last."""
    parts = [("training, out of fold", found.train), *((part.name, part) for part in found.reported)]
    parts += [(f"site {site}", part) for site, part in found.sites.items()]
    return parts + [(f"{site}, site known", part) for site, part in found.sites_inside.items()]


def _absent(absent: Absent) -> list[Piece]:
    rows: list[Sequence[Cell | str]] = [
        [kind, name, str(lack.absent), str(lack.of)]
        for kind, lacks in (("part", absent.parts), ("hospital", absent.sites))
        for name, lack in lacks.items()
    ]
    by_name: list[Sequence[Cell | str]] = [[name, Cell(why, look="small")] for name, why in absent.why.items()]
    return [
        Prose("\n\n".join(absent.words)),
        Grid(["", "", "absent", "labelled"], rows, 2, "What made them absent may be tied to the label."),
        Folded("Every absent slide, and why", [Grid(["slide", "why"], by_name, 2, "")]),
    ]


def _sides(found: Study, seeds: Mapping[str, Sequence[float]]) -> list[Piece]:
    name = NAMES[headline(found.task)]
    marks = [
        Mark(label, part.headline.value, part.headline.low, part.headline.high, _look(part), str(part.headline))
        for label, part in _all(found)
        if part.headline is not None
    ]
    caption = "Violet: sites that the model knew. Orange: sites that it never saw. Squares: training slides, out of fold."
    parts: list[Piece] = [Drawing(interval_plot(marks, name, found.chance), caption)] if marks else []
    table: list[Sequence[Cell | str]] = [
        [label, _role(part), str(part.slides), str(part.patients), count_words(part), headline_words(part)]
        for label, part in _all(found)
    ]
    kinds = f" ({' / '.join(found.train.counts)})" if isinstance(found.task, ClassesTask) else ""
    head = ["set", "read by", "slides", "patients", counted(found) + kinds, name]
    parts += [Heading("Every part and site", ""), Grid(head, table, 2, _interval_note(found))]
    order = [metric for metric in NAMES if any(metric in (*part.metrics, *part.withheld) for part in found.reported)]
    order += [metric for metric in found.gap if metric not in NAMES]
    own = [part.intervals() for part in found.reported]
    rows: list[Sequence[Cell | str]] = [
        [
            metric_words(metric),
            *(_number(each.get(metric)) if metric in each else value_words(part, metric)
              for part, each in zip(found.reported, own, strict=True)),
            *([_number(found.gap.get(metric))] if found.gap else []),
        ]
        for metric in order
    ]
    if rows:
        head = ["", *(part.name for part in found.reported), *(["internal minus external"] if found.gap else [])]
        parts += [Heading("Every number, and the gap", _gap_note(found)), Grid(head, rows, 1, "")]
    known = {part: values for part, values in seeds.items() if len(values) > 1}
    if known:
        lines: list[Sequence[Cell | str]] = [
            [part, str(len(values)), f"{min(values):.3f} to {max(values):.3f}", f"{np.std(values, ddof=1):.3f}"]
            for part, values in known.items()
        ]
        note = "Each seed's models alone; the model is the mean of all. The spread is no interval: patients stay the same."
        parts += [Heading("One seed and another", ""), Grid(["part", "seeds", name, "standard deviation"], lines, 1, note)]
    return parts


def _role(part: Part) -> str:
    return {"train": "models that left the patient out", "internal": "a model that knew the site",
            "external": "a model that never saw the site"}[part.role]  # fmt: skip


def _decisions(found: Study) -> list[Piece]:
    assert isinstance(found.task, BinaryTask)
    parts: list[Piece] = []
    drawn = [part for part in found.reported if part.roc is not None]
    if drawn:
        lines = []
        for part in drawn:
            assert part.roc is not None and part.auc is not None
            ends = [(1 - one.found.specificity.value, one.found.sensitivity.value) for one in part.operating]
            lines.append(Line(f"{part.name}, AUROC {part.auc}", part.roc, np.array(ends).reshape(-1, 2), _look(part)))
        parts.append(
            Drawing(roc_plot(lines), "Discs: where the thresholds fixed in training end up, never moved to these slides.")
        )
    for i, at in enumerate(found.thresholds):
        words = [threshold_words(found, i)]
        if len(found.of_trials) > 1:
            words.append("each trial's slides are flagged by that trial's own threshold")
        parts_ = [(label, part.operating[i]) for label, part in _all(found)]
        rows: list[Sequence[Cell | str]] = [[label, *_rates(one), _drift(one)] for label, one in parts_]
        exact: list[Sequence[Cell | str]] = [
            [label, *(_exact(rate) for rate in (one.found.sensitivity, one.found.specificity, one.found.fnr, one.found.flagged))]
            for label, one in parts_
        ]
        head = ["set", "sensitivity", "specificity", "missed (FNR)", "flagged", "PPV / NPV as observed",
                f"PPV / NPV at {found.task.prevalence:g}", "drift (threshold it would need)"]  # fmt: skip
        note = (
            f"Hits of units with Wilson's interval. Drift: achieved minus required {at.keeps}; the "
            "needed threshold is a diagnosis of the shift, and nothing uses it."
        )
        parts += [Heading(f"Required {at.keeps} {at.required:g}", "; ".join(words).capitalize()), Grid(head, rows, 1, note)]
        names = ["set", "sensitivity", "specificity", "missed (FNR)", "flagged"]
        parts.append(Folded("The same with Clopper-Pearson's exact intervals", [Grid(names, exact, 1, "")]))
    return parts


def _rates(at: Operating) -> list[str]:
    done = at.found
    wilson = [rate_words(rate) for rate in (done.sensitivity, done.specificity, done.fnr, done.flagged)]
    observed = " / ".join("–" if rate.n == 0 else f"{rate.value:.3f}" for rate in (done.ppv, done.npv))
    stated = " / ".join("–" if math.isnan(value) else f"{value:.3f}" for value in done.at_prevalence)
    return [*wilson, observed, stated]


def _exact(rate: Rate) -> str:
    return "–" if rate.n == 0 else f"{rate.hits}/{rate.n} [{rate.exact[0]:.2f}, {rate.exact[1]:.2f}]"


def _drift(at: Operating) -> str:
    if math.isnan(at.found.drift):
        return "–"
    return f"{at.found.drift:+.3f}" + ("" if math.isnan(at.found.needed) else f" ({score_words(at.found.needed)})")


def _calibration(found: Study) -> list[Piece]:
    parts: list[Piece] = []
    for part in found.reported:
        if part.bins is not None:
            parts.append(Drawing(reliability_plot(part.bins, "positive"), f"{part.name.capitalize()}. {_PERFECT}"))
    names = ("ece", "ece_if_calibrated", "brier", "brier_skill", "slope", "intercept", "intercept_in_the_large")
    rows: list[Sequence[Cell | str]] = [
        [label, *(value_words(part, name) for name in names)] for label, part in _all(found)
    ]
    note = (
        "Slope under 1: too sure. Intercept at slope 1 over 0: more positives than predicted. Skill: against always saying the "
        "share of positives. No slope exists where a threshold separates the classes. ECE: on few slides it is never 0; the next "
        "column is what a calibrated model would show."
    )
    parts += [Heading("By part and site", ""), Grid(["set", *(NAMES[name] for name in names)], rows, 1, note)]
    local = [(site, one) for site, part in found.sites.items() for one in part.recalibration]
    if local:
        table: list[Sequence[Cell | str]] = [
            [site, str(one.cases), one.method, *(_change(one.before[loss], one.after[loss]) for loss in LOSSES),
             f"{one.better:.0%} of {one.draws}"]
            for site, one in local
        ]  # fmt: skip
        words = (
            "A few cases of an external site move its probabilities (intercept, temperature, or both: Platt); its other cases "
            "are read. Means over draws of the local cases, and the middle 95 % of the draws after. Only the scale moves: AUROC "
            "and the decisions at the carried thresholds are taken from the scores as they are."
        )
        head = [
            "external site",
            "local cases",
            "moved",
            "ECE before → after",
            "Brier",
            "log-loss",
            "draws with a better Brier score",
        ]
        parts += [Heading("With a few local cases", words), Grid(head, table, 3, "")]
    return parts


_PERFECT = "Discs on the line: what is predicted happens; their area is their share of the slides, bars are Wilson intervals."


def _change(before: Any, after: Any) -> str:
    return f"{before.mean:.3f} → {after.mean:.3f} [{after.low:.3f}, {after.high:.3f}]"


def _predictions(found: Study) -> list[Piece]:
    parts: list[Piece] = []
    for part in found.reported:
        if part.confusion is not None:
            counts = part.confusion.astype(np.float64)
            parts.append(
                Matrix(list(part.recalls), counts, f"{part.name.capitalize()}: row, the true class.", found.task.decision + "s")
            )
        if part.points is not None and isinstance(found.task, RegressionTask):
            parts.append(
                Drawing(scatter_plot(part.points, found.task.name), f"{part.name.capitalize()}, a disc a {found.task.decision}.")
            )
        if part.points is not None and isinstance(found.task, SurvivalTask):
            parts.append(_survival(part, found.task))
    rows: list[Sequence[Cell | str]] = [
        [label, *(rate_words(rate) for rate in part.recalls.values())] for label, part in _all(found)
    ]
    if found.train.recalls:
        note = "Hits of units with Wilson's interval; Clopper-Pearson's stands in summary.json."
        parts += [Heading("Recall of every class", ""), Grid(["set", *found.train.recalls], rows, 1, note)]
    return parts


def _survival(part: Part, task: SurvivalTask) -> Drawing:
    assert part.points is not None
    lines = []
    for above, look in ((1, "outside"), (0, "ours")):
        own = part.points[part.points[:, 2] == above]
        if len(own):
            steps, censored = kaplan_meier(own[:, 0], own[:, 1] == 1)
            lines.append(
                Line(f"{'higher' if above else 'lower'} risk: {len(own)}, {int(own[:, 1].sum())} events", steps, censored, look)
            )
    caption = f"{part.name.capitalize()}: risks above and up to the median of the training slides; discs are censored."
    return Drawing(survival_plot(lines, task.label), caption)


def _floors(found: Study) -> list[Piece]:
    name, parts = NAMES[headline(found.task)], list[Piece]()
    for part in (part for part in found.reported if part.floors and part.headline is not None):
        assert part.headline is not None
        marks = [Mark("the model", part.headline.value, part.headline.low, part.headline.high, _look(part), str(part.headline))]
        marks += [Mark(plainly(floor), one.value, one.low, one.high, "floor", str(one)) for floor, one in part.floors.items()]
        rows: list[Sequence[Cell | str]] = [
            [plainly(floor), _number(one), _number(part.minus[floor])] for floor, one in part.floors.items()
        ]
        parts += [Heading(part.name.capitalize(), ""), Drawing(interval_plot(marks, name, found.chance), "Squares: floors.")]
        parts.append(Grid(["floor", name, "model minus floor"], rows, 1, "Differences on the same patients."))
    return parts


def _decoded(found: Decodability) -> list[Piece]:
    asked = [(label, one) for label, one in (("hospital", found.site), ("label", found.label),
                                             ("label, site left out", found.elsewhere)) if one is not None]  # fmt: skip
    marks = [Mark(label, one.score.value, one.score.low, one.score.high, _side(label), str(one.score)) for label, one in asked]
    rows: list[Sequence[Cell | str]] = [
        [label, one.how, ", ".join(one.classes[:6]) + (" …" if len(one.classes) > 6 else ""), str(one.score.units),
         str(one.score.patients), _number(one.score), f"{one.chance:.3f}", _above(one)]
        for label, one in asked
    ]  # fmt: skip
    words = (
        "A linear probe of each slide's mean tile, classes weighing the same. What is read of the hospital is there for a slide "
        "model to use; what is read of the label at a site that was left out does not rest on knowing that hospital. Above "
        "chance: the share of the way from chance to 1."
    )
    parts: list[Piece] = [Prose(words)]
    if marks:
        parts.append(Drawing(interval_plot(marks, "balanced accuracy", None), "Chance differs: it stands in the table."))
        head = ["read", "by", "classes", "slides", "patients", "balanced accuracy", "chance", "above chance"]
        tied = (
            ""
            if found.association is None
            else f"Site and label are associated by Cramér's V of {found.association:.2f} (0 to 1)."
        )
        parts.append(Grid(head, rows, 3, tied))
    if found.withheld:
        parts.append(Prose(" ".join(f"Not asked, {question}: {why}." for question, why in found.withheld.items())))
    return parts


def _side(label: str) -> str:
    return "outside" if label == "hospital" else "ours"


def _above(one: Decoded) -> str:
    return f"{(one.score.value - one.chance) / (1 - one.chance):.2f}"


def _slides(pages: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> Grid:
    read = [row for row in rows if row["part"] != "train" and row["slide_id"] in pages]
    columns = [name for name in read[0] if name not in ("slide_id", "patient_id", "trial")] if read else []
    table: list[Sequence[Cell | str]] = [
        [Cell(str(row["slide_id"]), link=pages[row["slide_id"]]), *(_plain(row[name]) for name in columns)] for row in read
    ]
    note = "A slide opens its page, with the map, the measures of it and a form for the reader's verdict."
    return Grid(["slide", *(plainly(name) for name in columns)], table, 1, note)


def _plain(value: Any) -> str:
    return score_words(value) if isinstance(value, float) else str(value)


def _number(interval: Interval | None) -> Cell | str:
    return "–" if interval is None else str(interval)


def _interval_note(found: Study) -> str:
    few = [part.name for _, part in _all(found) if part.headline is not None and part.headline.low is None]
    said = "Withheld: too few patients, or of one class, to carry an interval. " if few else ""
    return said + "Intervals resample or count whole patients; with one model of two classes they are DeLong's."


def _gap_note(found: Study) -> str:
    if not found.gap:
        return ""
    if found.kind == "sites":
        return "The same patients, once by a model that knew their site and once by one that did not, in shared draws."
    return "Two sets of patients: the gap's interval comes from the two intervals."
