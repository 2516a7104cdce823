"""Compared slide-level runs in words, for a terminal and as a page."""

from collections.abc import Sequence
from pathlib import Path

from histoscale.eval.drawings import Mark, interval_plot
from histoscale.eval.mil.compare import PARTS, Comparison, Difference, best_known
from histoscale.eval.mil.metrics import NAMES, chance, headline
from histoscale.eval.mil.words import columns
from histoscale.eval.page import Chapter, Drawing, Folded, Grid, Heading, Prose, write_page
from histoscale.eval.page import Part as Piece

_WHERE = {"internal": "inside", "external": "outside", "gap": "gap"}


def show(found: Comparison) -> str:
    """Each run's numbers, then every run less the first, then the tests of single decisions."""
    task, names = found.runs[0].task, best_known(found.runs[0].task)
    lines = [f"{task.name}: {len(found.runs)} runs on the same slides, intervals by {found.runs[0].groups}"]
    lines += [f"  {name}: {value}" for name, value in shared_facts(found)]
    lines += [f"- {note}" for note in found.notes]
    for metric in names:
        lines += ["", f"{NAMES[metric]}", *columns([["run", *_head(found)], *_own(found, metric)])]
    if found.differences:
        first = found.runs[0].name
        lines += ["", f"less {first}, on the same patients"]
        lines += columns([["run", "where", "number", "difference", "p", "p after Holm"], *_less_rows(found, names)])
    if found.tests:
        lines += ["", "who is right where the other is wrong (McNemar, exact)"]
        lines += columns([["run", "part", "among", "by it alone", "by the first alone", "p", "p after Holm"], *_test_rows(found)])
    return "\n".join([*lines, *found.left_out])


def markdown(found: Comparison) -> str:
    """The same as tables of Markdown."""
    task, names = found.runs[0].task, best_known(found.runs[0].task)
    parts = [f"# {_escaped(task.name)}"]
    for metric in names:
        parts += [f"## {NAMES[metric]}", _table(["run", *_head(found)], _own(found, metric))]
    if found.differences:
        head = ["run", "where", "number", "difference", "p", "p after Holm"]
        parts += [f"## Less {_escaped(found.runs[0].name)}", _table(head, _less_rows(found, names))]
    if found.tests:
        head = ["run", "part", "among", "by it alone", "by the first alone", "p", "p after Holm"]
        parts += ["## Single decisions", _table(head, _test_rows(found))]
    return "\n\n".join([*parts, *(_escaped(note) for note in found.notes), *found.left_out]) + "\n"


def shared_facts(found: Comparison) -> list[tuple[str, str]]:
    """What is the same in all runs, in words."""
    first = found.runs[0]
    splits = {run.split for run in found.runs}
    facts = [("task", first.task.name), ("decision", f"by {first.task.decision}, intervals by {first.groups}")]
    facts += [("split", first.split)] if len(splits) == 1 else []
    if len({run.encoder for run in found.runs}) == 1:
        facts.append(("encoder", first.encoder or "not named by the stores"))
    for part in PARTS:
        if first.rows[part]:
            patients = len({row["patient_id"] for row in first.rows[part]})
            facts.append((part, f"{len(first.rows[part])} slides of {patients} patients"))
    return facts


def write_comparison(path: Path, found: Comparison, settings: Sequence[Chapter] = ()) -> None:
    """Write report.html: what all runs share, the headline, and folded the rest. settings: chapters of what was set."""
    task, first = found.runs[0].task, found.runs[0].name
    name, names = NAMES[headline(task)], best_known(task)
    shared: list[Piece] = [Grid(["the same in all runs", ""], [list(pair) for pair in shared_facts(found)], 2, "")]
    shared += [Prose(note) for note in found.notes]
    marks = []
    for run in found.runs:
        for part in PARTS:
            one = run.own.get(part, {}).get(headline(task))
            if one is not None:
                look = "ours" if part == "internal" else "outside"
                marks.append(Mark(f"{run.name}, {_WHERE[part]}", one.value, one.low, one.high, look, str(one)))
    parts: list[Piece] = []
    if marks:
        caption = "Violet: slides of sites that the model knew. Orange: of sites that it never saw."
        parts.append(Drawing(interval_plot(marks, name, chance(task)), caption))
    parts.append(Grid(["run", *_head(found)], _own(found, names[0]), 1, name))
    others: list[Piece] = []
    for metric in names[1:]:
        others += [Heading(NAMES[metric], ""), Grid(["run", *_head(found)], _own(found, metric), 1, "")]
    if others:
        parts.append(Folded(f"Other numbers: {', '.join(NAMES[metric] for metric in names[1:])}", others))
    chapters = [Chapter("What all runs share", shared), *settings, Chapter("Inside, outside, and the gap", parts)]
    if found.differences:
        note = (
            "Differences of areas of single models by DeLong's test, others by shared draws of patients. A gap that is smaller "
            "than the first's has an interval below 0 (above, where less is better)."
        )
        head = ["run", "where", "number", "difference", "p", "p after Holm"]
        main, more = (_less_rows(found, each) for each in ([names[0]], [metric for metric in NAMES if metric != names[0]]))
        less: list[Piece] = [Grid(head, main, 3, note)]
        less += [Folded(f"The other numbers: {len(more)} differences", [Grid(head, more, 3, "")])] if more else []
        chapters.append(Chapter(f"Less {first}, on the same patients", less))
    if found.tests or found.left_out:
        pieces: list[Piece] = [Prose(words) for words in found.left_out]
        if found.tests:
            head = ["run", "part", "among", "right by it alone", "by the first alone", "exact p", "p after Holm"]
            grid = Grid(head, _test_rows(found), 3, "McNemar's exact test at each run's own thresholds, fixed in training.")
            pieces.append(Folded(f"{len(found.tests)} tests of single decisions", [grid]))
        chapters.append(Chapter("Who is right where the other is wrong", pieces))
    kept = [one for one in found.differences if one.metric == headline(task)][:4]
    facts = {f"{name}, {one.part}: {one.run} above {first}": str(one.interval) for one in kept}
    models = ", ".join(f"{run.name} ({run.encoder})" for run in found.runs)
    lead = f"The same slides and patients under {len(found.runs)} models: {models}."
    write_page(path, f"{task.name}: models side by side", lead, facts, chapters)


def _head(found: Comparison) -> list[str]:
    return [part for part in (*PARTS, "internal minus external") if part not in PARTS or found.runs[0].rows[part]]


def _own(found: Comparison, metric: str) -> list[list[str]]:
    rows = []
    for run in found.runs:
        values = [run.own.get("gap" if part not in PARTS else part, {}).get(metric) for part in _head(found)]
        rows.append([run.name, *("–" if one is None else str(one) for one in values)])
    return rows


def _less_rows(found: Comparison, names: Sequence[str]) -> list[list[str]]:
    kept = [one for metric in names for one in (*found.differences, *found.gaps) if one.metric == metric]
    return [[one.run, one.part, NAMES[one.metric], str(one.interval), _p(one.p), _p(one.holm)] for one in _in_order(found, kept)]


def _in_order(found: Comparison, kept: Sequence[Difference]) -> list[Difference]:
    order = [run.name for run in found.runs]
    return sorted(kept, key=lambda one: order.index(one.run))  # stable: metrics, then parts


def _test_rows(found: Comparison) -> list[list[str]]:
    return [
        [one.run, one.part, one.among, f"{one.alone} of {one.n}", f"{one.first_alone} of {one.n}", _p(one.p), _p(one.holm)]
        for one in found.tests
    ]


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
