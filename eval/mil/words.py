"""A study in words: its table for a terminal, and the paragraph about what it cannot say."""

import math
from collections.abc import Mapping, Sequence

from histoscale.eval.mil.absent import Absent
from histoscale.eval.mil.bags import reasons
from histoscale.eval.mil.decodability import Decodability
from histoscale.eval.mil.metrics import NAMES, headline
from histoscale.eval.mil.part import Operating, Part
from histoscale.eval.mil.split import Check
from histoscale.eval.mil.study import Study
from histoscale.eval.mil.task import BinaryTask, SurvivalTask
from histoscale.eval.scores.binomial import needed_without_miss
from histoscale.eval.scores.interval import Interval
from histoscale.eval.scores.operating import Rate, score_words, sweeping

FEW_SITES = 10  # fewer cannot be resampled, so no interval over sites exists


def show(found: Study, checks: Sequence[Check], decoded: Decodability | None, absent: Absent | None = None) -> str:
    """What the study lacks, the headline by part and site with the floors, a table of decisions for each rule, and the limits."""
    parts = [found.train, *found.reported, *found.sites.values()]
    task, name = found.task, NAMES[headline(found.task)]
    table = [("part", "slides", "patients", counted(found), name)]
    table += [(p.name, str(p.slides), str(p.patients), count_words(p), headline_words(p)) for p in parts]
    lines = [f"{task.name}: scores by {task.decision}, intervals by {found.groups}", ""]
    lines += [absent.sentence, ""] if absent is not None and absent.sentence else []
    lines += columns(table)
    if isinstance(task, BinaryTask):
        for i, at in enumerate(found.thresholds):
            lines += ["", f"required {at.keeps} {at.required:g}: {threshold_words(found, i)}"]
            prevalence = f"PPV / NPV at {task.prevalence:g}"
            rows = [("part", "sensitivity", "specificity", "FNR", "flagged", prevalence)]
            lines += columns([*rows, *[(part.name, *decision_words(part.operating[i])) for part in parts]])
    others = {metric for part in found.reported for metric in (*part.metrics, *part.withheld)} - {headline(task)}
    if found.reported and others:
        head = ["", *(part.name for part in found.reported), *(["internal minus external"] if found.gap else [])]
        order = [headline(task), *(metric for metric in NAMES if metric in others)]
        lines += ["", *columns([head, *(_metric_row(metric, found) for metric in order)])]
    with_floors = [part for part in found.reported if part.floors]
    if with_floors:
        names = ("floor", *[text for part in with_floors for text in (f"{name}, {part.name}", "model minus floor")])
        rows_ = [
            (plainly(floor), *[_or_dash(each, floor) for part in with_floors for each in (part.floors, part.minus)])
            for floor in dict.fromkeys(floor for part in with_floors for floor in part.floors)
        ]
        lines += ["", *columns([names, *rows_])]
    if decoded is not None:
        lines += ["", *decoded_words(decoded)]
    limits = [f"- {sentence}" for sentence in cannot_say(found, checks, decoded)]
    return "\n".join([*lines, "", "What this study cannot say", *limits])


def cannot_say(found: Study, checks: Sequence[Check], decoded: Decodability | None) -> list[str]:
    """The limits of a study in sentences, from its own numbers: sites, patients, positives, overlap, floors, calibration."""
    task, units = found.task, f"{found.task.decision}s"
    said = [*_site_limits(found)]
    said += _rule_limits(found)
    for part in found.reported:
        said += _limits(part, found, units)
    said += _gap_limits(found)
    if found.external is not None and found.kind != "sites" and isinstance(task, BinaryTask):
        said += _calibration_limits(found.external)
    if decoded is not None:
        said += _decoded_limits(decoded)
    if found.groups == "slide":
        said.append("Patients are unknown (split.unit=slide): slides of one patient may stand on both sides of the split.")
    said += [f"Not clean: {check.name}, {check.compared}: {check.found}." for check in checks if not check.holds]
    if found.kind != "fixed":
        inside = "its folds" if found.kind == "folds" else "its sites and folds"
        said.append(
            f"The kept model was trained on all slides inside; {'these' if found.kind == 'sites' else 'internal'} "
            f"numbers are those of the models that held {inside} out, each with its own threshold."
        )
    if found.left_out:
        said.append(f"{len(found.left_out)} slides of the manifest are not in the study: {'; '.join(reasons(found.left_out))}.")
    if isinstance(task, BinaryTask):
        said.append(
            f"PPV and NPV at a prevalence of {task.prevalence:g} are computed from sensitivity and specificity, not observed. "
            "A flag asks a pathologist to look; it is no diagnosis, and an unflagged slide is not cleared."
        )
    else:
        said.append("A predicted value asks a pathologist to look; it is no diagnosis and replaces no reading of the slide.")
    return said


def threshold_words(found: Study, which: int) -> str:
    """The threshold of a requirement, what fixed it, and whether it sweeps."""
    at = found.thresholds[which]
    carried = f"flagged from {score_words(at.value)}; " if math.isfinite(at.value) else ""
    return carried + "; ".join(filter(None, [at.note, sweep_words(found, which)]))


def sweep_words(found: Study, which: int) -> str:
    """What is to be known of a rule that gives all slides one answer; "" of one that sorts."""
    answer, read = found.flags(which), found.flagged(which)
    if not answer:
        return ""
    count = f" ({read.hits} of {read.n} read)" if read.n else ""
    return f"it flags {answer} {found.task.decision}{count} and sorts nothing"


def decoded_words(found: Decodability) -> list[str]:
    """The table of site against biology."""
    rows = [("read from the mean tile", "folds", "balanced accuracy", "chance")]
    for one in (found.site, found.label, found.elsewhere):
        if one is not None:
            rows.append((f"{one.asked} ({len(one.classes)} classes)", one.how, str(one.score), f"{one.chance:.3f}"))
    lines = columns(rows) if len(rows) > 1 else []
    return [*lines, *(f"{question} not asked: {why}" for question, why in found.withheld.items())]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as aligned lines."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def plainly(name: str) -> str:
    return name.replace("_", " ")


def counted(found: Study) -> str:
    """What `count_words` counts."""
    return "positive" if isinstance(found.task, BinaryTask) else "events" if isinstance(found.task, SurvivalTask) else "units"


def count_words(part: Part) -> str:
    if {"positive", "event"} & set(part.counts):
        return str(part.positives)
    return " / ".join(str(n) for n in part.counts.values()) or str(part.units)


def headline_words(part: Part) -> str:
    return str(part.headline) if part.headline else f"withheld ({next(iter(part.withheld.values()), 'undefined')})"


def value_words(part: Part, metric: str) -> str:
    """A metric of a part, or why it has none; `–` where the task knows no such metric."""
    if metric in part.metrics:
        return str(part.metrics[metric])
    return f"withheld ({part.withheld[metric]})" if metric in part.withheld else "–"


def metric_words(name: str) -> str:
    """`sensitivity@0.95` and metrics, as people say them."""
    metric, _, rule = name.partition("@")
    return NAMES.get(name, f"{metric} where {plainly(rule)} is required" if rule else plainly(name))


def decision_words(operating: Operating) -> tuple[str, ...]:
    """Sensitivity, specificity, FNR, flagged, and PPV / NPV at the stated prevalence."""
    found = operating.found
    rates = [rate_words(rate) for rate in (found.sensitivity, found.specificity, found.fnr, found.flagged)]
    return (*rates, " / ".join("-" if math.isnan(value) else f"{value:.3f}" for value in found.at_prevalence))


def rate_words(rate: Rate) -> str:
    """Hits, units and the wider picture: Wilson's interval; Clopper-Pearson's stands in summary.json."""
    return "-" if rate.n == 0 else f"{rate.hits}/{rate.n} [{rate.wilson[0]:.2f}, {rate.wilson[1]:.2f}]"


def _metric_row(metric: str, found: Study) -> list[str]:
    values = [value_words(part, metric) for part in found.reported]
    gap = [str(found.gap[metric]) if metric in found.gap else "-"] if found.gap else []
    return [NAMES[metric], *values, *gap]


def _or_dash(values: Mapping[str, Interval], name: str) -> str:
    return str(values[name]) if name in values else "-"


def _site_limits(found: Study) -> list[str]:
    if found.external is None:
        return ["No external site was studied, so nothing is known about slides from elsewhere."]
    count = len(found.external_sites)
    if count == 1:
        here = f"{found.external_sites[0]}, {found.external.patients} patients"
        return [f"One external site ({here}) stands for all others: another could differ by more than the interval."]
    known = [part for site, part in found.sites.items() if site in found.external_sites and part.headline]
    values = sorted(part.headline.value for part in known if part.headline)
    said = []
    if count < FEW_SITES:
        spread = f" ({NAMES[headline(found.task)]} from {values[0]:.3f} to {values[-1]:.3f})" if len(values) > 1 else ""
        said.append(f"{count} external sites{spread} are too few to say how a further one would differ.")
    mute = [site for site in found.external_sites if found.sites[site].headline is None]
    if mute:
        named = [f"{site} ({found.sites[site].withheld[headline(found.task)]})" for site in mute]
        said.append(f"{NAMES[headline(found.task)]} is withheld at {_some(named)}.")
    return said


def _rule_limits(found: Study) -> list[str]:
    """Rules that give every slide one answer, in all that was read or in one part of it."""
    said = []
    for i, at in enumerate(found.thresholds):
        rule, one = f"The rule for {at.keeps} {at.required:g}", found.task.decision
        shares = {"every": "sensitivity 1 and specificity 0 are", "no": "sensitivity 0 and specificity 1 are"}
        if found.flags(i):
            words = sweep_words(found, i).removeprefix("it ") + (f": {at.note}" if math.isinf(at.value) else "")
            said.append(f"{rule} {words}; {shares[found.flags(i)]} that rule and no finding.")
            continue
        for part in found.reported:
            flagged = part.operating[i].found.flagged
            if answer := sweeping(flagged):
                count = f"{flagged.hits} of {flagged.n}"
                said.append(f"{rule} flags {answer} {one} of {part.name} ({count}): it sorts nothing there.")
    return said


def _limits(part: Part, found: Study, units: str) -> list[str]:
    said, name, task = [], part.name.capitalize(), found.task
    metric = NAMES[headline(task)]
    if isinstance(task, BinaryTask):
        required = max(task.sensitivities)
        proof = needed_without_miss(required)
        if part.positives < proof:
            few = f"{part.positives} positive {units} cannot prove a sensitivity of {required:g}"
            said.append(f"{name}: {few}; {proof} without a miss would.")
    if part.headline is None:
        said.append(f"{name}: {metric} is withheld ({part.withheld[headline(task)]}).")
    elif part.headline.low is None:
        said.append(f"{name}: {metric} has no interval ({part.headline.note.removeprefix('interval withheld: ')}).")
    elif part.headline.low <= found.chance:
        said.append(f"{name}: the interval of {metric} holds {found.chance:.3g}, so chance is not excluded.")
    even = [plainly(floor) for floor, gain in part.minus.items() if gain.low is None or gain.low <= 0]
    if even:
        said.append(f"{name}: no gain is shown over {', '.join(even)}.")
    if isinstance(task, BinaryTask) and part.patients < part.units:
        said.append(
            f"{name}: {part.units} slides of {part.patients} patients are not independent; Wilson and Clopper-Pearson take them "
            "as such, the clustered intervals of summary.json do not."
        )
    empty = [f"{count} {kind}" for kind, count in part.counts.items() if count < FEW_SITES]
    if empty and not isinstance(task, BinaryTask):
        said.append(f"{name}: {', '.join(empty)} {units} are too few to speak of that class.")
    return said


def _gap_limits(found: Study) -> list[str]:
    gap = found.gap.get(headline(found.task))
    if gap is None:
        return []
    if gap.low is None or gap.high is None:
        return ["The gap between internal and external slides has no interval."]
    if gap.low <= 0:
        name = NAMES[headline(found.task)]
        return [f"No loss of {name} outside is shown, but one of up to {max(gap.high, 0):.3f} is not excluded."]
    return []


def _calibration_limits(part: Part) -> list[str]:
    slope, large = part.metrics.get("slope"), part.metrics.get("intercept_in_the_large")
    if slope is None or slope.low is None or slope.high is None:
        return [f"{part.name.capitalize()}: too few cases say how its probabilities are to be read."]
    off = []
    if not slope.low <= 1 <= slope.high:
        off.append(f"calibration slope {slope}")
    if large is not None and large.low is not None and large.high is not None and not large.low <= 0 <= large.high:
        off.append(f"intercept at slope 1 {large}")
    return [f"{part.name.capitalize()}: probabilities are not to be read as such ({', '.join(off)})."] if off else []


def _decoded_limits(found: Decodability) -> list[str]:
    said = []
    site, label, elsewhere = found.site, found.label, found.elsewhere
    if site is not None and site.score.low is not None and site.score.low > site.chance:
        said.append(
            f"The hospital can be read from the mean tile (balanced accuracy {site.score}, chance {site.chance:.3f}): "
            "a model can use it, and these numbers do not show that it did not."
        )
    gone = elsewhere is not None and elsewhere.score.low is not None and elsewhere.score.low <= elsewhere.chance
    if label is not None and label.score.low is not None and label.score.low > label.chance and gone and elsewhere is not None:
        said.append(
            f"The label is read from the mean tile among known sites ({label.score}) and not shown to be at a site left out "
            f"({elsewhere.score}, chance {elsewhere.chance:.3f})."
        )
    return said


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
