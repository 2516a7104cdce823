"""A study in words: its table for a terminal, and the paragraph about what it cannot say."""

import math
from collections.abc import Mapping, Sequence

from histoscale.eval.mil.study import Operating, Part, Study
from histoscale.eval.scores.binomial import needed_without_miss
from histoscale.eval.scores.operating import Rate


def show(found: Study) -> str:
    """Areas by part and site with the floors, a table of decisions for each required sensitivity, and the limits."""
    parts = [found.train, *found.reported, *found.sites.values()]
    counts = [(part.name, str(part.slides), str(part.patients), str(part.positives)) for part in parts]
    areas = [("part", "slides", "patients", "positive", "AUC")]
    areas += [(*count, str(part.auc) if part.auc else "one class only") for count, part in zip(counts, parts, strict=True)]
    lines = [f"{found.task.name}: scores by {found.task.decision}, intervals by {found.groups}", "", *columns(areas)]
    for i, at in enumerate(found.thresholds):
        carried = f"flagged from {at.value:.3f}; " if math.isfinite(at.value) else ""
        lines += ["", f"required sensitivity {at.required:g}: {carried}{at.note}"]
        prevalence = f"PPV / NPV at {found.task.prevalence:g}"
        table = [("part", "sensitivity", "specificity", "FNR", "flagged", prevalence)]
        lines += columns([*table, *[(part.name, *_decisions(part.operating[i])) for part in parts]])
    with_floors = [part for part in found.reported if part.auc]
    if with_floors:
        names = ("floor", *[text for part in with_floors for text in (f"AUC, {part.name}", "model minus floor")])
        rows = [
            (plainly(floor), *[str(each[floor]) for part in with_floors for each in (part.floors, part.minus)])
            for floor in with_floors[0].floors
        ]
        lines += ["", *columns([names, *rows])]
    return "\n".join([*lines, "", "What this study cannot say", *[f"- {sentence}" for sentence in cannot_say(found)]])


def cannot_say(found: Study) -> list[str]:
    """The limits of a study in sentences, from its own numbers."""
    task, units = found.task, f"{found.task.decision}s"
    said = []
    if found.external is None:
        said.append("No external site was studied, so nothing is known about slides from elsewhere.")
    elif len(found.external_sites) == 1:
        here = f"{found.external_sites[0]}, {found.external.patients} patients"
        said.append(f"One external site ({here}) stands for all others: another could differ by more than the interval.")
    for at in found.thresholds:
        if math.isinf(at.value):
            said.append(f"At {at.required:g}, {at.note}; sensitivity 1 and specificity 0 are that rule and no finding.")
    for part in found.reported:
        said += _limits(part, max(task.sensitivities), units)
    if found.groups == "slide":
        said.append("Patients are unknown (split.unit=slide): slides of one patient may stand on both sides of the split.")
    if found.left_out:
        said.append(f"{len(found.left_out)} slides of the manifest are not in the study: {_reasons(found.left_out)}.")
    said.append(
        f"PPV and NPV at a prevalence of {task.prevalence:g} are computed from sensitivity and specificity, not observed. "
        "A flag asks a pathologist to look; it is no diagnosis, and an unflagged slide is not cleared."
    )
    return said


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as aligned lines."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def plainly(name: str) -> str:
    return name.replace("_", " ")


def _limits(part: Part, required: float, units: str) -> list[str]:
    said, name = [], part.name.capitalize()
    proof = needed_without_miss(required)
    if part.positives < proof:
        few = f"{part.positives} positive {units} cannot prove a sensitivity of {required:g}"
        said.append(f"{name}: {few}; {proof} without a miss would.")
    if part.auc is not None and part.auc.low is None:
        said.append(f"{name}: the AUC has no interval ({part.auc.note.removeprefix('interval withheld: ')}).")
    elif part.auc is not None and part.auc.low is not None and part.auc.low <= 0.5:
        said.append(f"{name}: the interval of the AUC holds .5, so chance is not excluded.")
    even = [plainly(floor) for floor, gain in part.minus.items() if gain.low is None or gain.low <= 0]
    if even:
        said.append(f"{name}: no gain is shown over {', '.join(even)}.")
    if part.patients < part.units:
        said.append(
            f"{name}: {part.units} slides of {part.patients} patients are not independent; Wilson and Clopper-Pearson take them "
            "as such, the clustered intervals of summary.json do not."
        )
    return said


def _decisions(operating: Operating) -> tuple[str, ...]:
    found = operating.found
    rates = [_short(rate) for rate in (found.sensitivity, found.specificity, found.fnr, found.flagged)]
    return (*rates, " / ".join("-" if math.isnan(value) else f"{value:.3f}" for value in found.at_prevalence))


def _short(rate: Rate) -> str:
    """Hits, units and the wider picture: Wilson's interval; Clopper-Pearson's stands in summary.json."""
    return "-" if rate.n == 0 else f"{rate.hits}/{rate.n} [{rate.wilson[0]:.2f}, {rate.wilson[1]:.2f}]"


def _reasons(left_out: Mapping[str, str]) -> str:
    reasons = list(left_out.values())
    return "; ".join(f"{reason} ({reasons.count(reason)})" for reason in dict.fromkeys(reasons))
