"""Which is better, and on what? Several runs of `histoscale probe`, or of `histoscale mil`, side by side, with differences.

    histoscale compare 'runs=[runs/crc,runs/phikon_crc]' out=runs/compare
    histoscale compare 'runs=[runs/crc,runs/phikon_crc,runs/own,runs/phikon_own]' 'paired=[balanced_accuracy,auroc]'
    histoscale compare 'runs=[runs/mil_plain,runs/mil_jitter,runs/mil_macenko]' out=runs/compare_mil

Reads the predictions.npz that each run left; embeds and fits nothing. Encoders stand against sets; two encoders on one set are
also subtracted on the same draws of patients. A mean is taken only over sets that all encoders have. Runs that scored one set
on different files are refused. Slide models of one task stand against the first: inside, outside and the gap between, with
DeLong's test and McNemar's. Leaves table.txt, table.md, report.html and summary.json.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from histoscale.data.fingerprint import content
from histoscale.data.journal import Journal, JournalConfig, write_text
from histoscale.eval.matrix import Overview, overviews
from histoscale.eval.mil.compare import SCORES, SUMMARY, compare_mil, is_mil_run, open_mil_runs
from histoscale.eval.mil.compare_page import markdown, show, write_comparison
from histoscale.eval.page import Cell, Chapter, Folded, Grid, Heading, Part, Prose, write_page
from histoscale.eval.patch_report import ReportConfig, few_shot_chapter, score_chapter
from histoscale.eval.predictions import FILE
from histoscale.eval.results import Score
from histoscale.eval.runs import RunsError, check_folders, gathered, mcnemar_tests, open_runs, paired_scores
from histoscale.eval.scores.interval import Interval, IntervalConfig
from histoscale.eval.table import Block, Footnotes, blocks, cell, general_notes, is_few_shot, number, summary
from histoscale.eval.table_text import markdown_overview, markdown_table, terminal_overview, terminal_table
from histoscale.launch.compare_settings import read_settings, told
from histoscale.launch.held import check_summary

RESULT = ("runs", "metrics", "paired", "mcnemar", "interval", "report")
INPUTS = ("runs",)
MADE = ("table.txt", "table.md", "report.html")


@dataclass(frozen=True)
class Config:
    """runs: folders that `histoscale probe` left, or `histoscale mil`. metrics: in order of preference; a set is shown by the
    first that it has. paired: metrics of the differences between two encoders; the task of slide models has its own.

    mcnemar: whether single decisions are tested too.
    """

    runs: list[str]
    metrics: list[str]
    paired: list[str]
    mcnemar: bool
    interval: IntervalConfig
    report: ReportConfig
    logging: JournalConfig
    out: str


def identity(config: Config) -> dict[str, Any]:
    """What each run had found, not only where it stands."""
    for path in check_folders(config.runs).values():
        check_summary(path / SUMMARY)
    of_mil = _of_mil(config)
    open_mil_runs(config.runs) if of_mil else open_runs(config.runs)  # what is no run is said as such
    names = (SCORES, SUMMARY) if of_mil else (FILE,)
    read = [content(path / name) for path in check_folders(config.runs).values() for name in names]
    return {"runs": list(check_folders(config.runs)), "read": read}


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Raises RunsError, PredictionsError."""
    if _of_mil(config):
        return _run_mil(config, journal)
    runs = open_runs(config.runs)
    scores, decisions = gathered(runs)
    pairs = paired_scores(decisions, config.paired, config.interval, scores)
    tests = mcnemar_tests(decisions) if config.mcnemar else []
    everything, level, table = [*scores, *pairs], config.interval.level, config.report.table
    found = sorted(overviews(scores, config.metrics), key=lambda one: not _of_all(one, scores))  # stable
    words = "\n\n".join([*(terminal_overview(one, table) for one in found), terminal_table(everything, level, table)])
    journal.say(words)
    write_text(journal.path("table.txt"), words + "\n")
    parts = [*(markdown_overview(one) for one in found), markdown_table(everything, level, table)]
    write_text(journal.path("table.md"), "\n".join(parts))
    _write_page(journal.path("report.html"), everything, pairs, tests, found, config)
    _say_next(config, journal)
    return {
        "compare": {
            "runs": {one.name: {"dataset": one.predictions.dataset, "data_hash": one.predictions.data_hash,
                                "encoders": one.predictions.encoders} for one in runs},
            "scores": summary(everything),
            "overview": [_overview_summary(one) for one in found],
            "mcnemar": tests,
        }
    }  # fmt: skip


def _of_mil(config: Config) -> bool:
    """Raises RunsError where runs of both kinds are named."""
    kinds = [is_mil_run(folder) for folder in config.runs]
    if any(kinds) and not all(kinds):
        odd = config.runs[kinds.index(False)]
        raise RunsError(f"{odd} is no run of `histoscale mil`, and {config.runs[kinds.index(True)]} is one: compare one kind")
    return bool(kinds) and all(kinds)


def _run_mil(config: Config, journal: Journal) -> dict[str, Any]:
    found = compare_mil(open_mil_runs(config.runs), config.interval, config.mcnemar)
    words = show(found)
    journal.say(words)
    write_text(journal.path("table.txt"), words + "\n")
    write_text(journal.path("table.md"), markdown(found))
    settings = told(read_settings(check_folders(config.runs)))
    write_comparison(journal.path("report.html"), found, settings)
    _say_next(config, journal)
    return {
        "compare": {
            "task": found.runs[0].task.name,
            "runs": {run.name: {"encoder_hash": run.encoder, "split": run.split} for run in found.runs},
            "scores": {run.name: {part: _plain(values) for part, values in run.own.items()} for run in found.runs},
            "differences": [one.as_dict() for one in found.differences],
            "gaps": [one.as_dict() for one in found.gaps],
            "mcnemar": [asdict(one) for one in found.tests],
            "left_out": found.left_out,
            "notes": found.notes,
        }
    }


def _say_next(config: Config, journal: Journal) -> None:
    out = Path(config.out)
    journal.say(f"\nopen {out / 'report.html'}\n{out / 'table.md'} holds the same tables, for a model card")


def _of_all(found: Overview, scores: Sequence[Score]) -> bool:
    """Whether every encoder of the comparison was scored under that protocol and probe, on one set at least."""
    encoders = {score.encoder for score in scores if not score.floor and not score.minus}
    return bool(found.common) and encoders <= {row[0] for row in found.rows}


def _plain(values: Mapping[str, Interval]) -> dict[str, Any]:
    return {metric: one.as_dict() for metric, one in values.items()}


def _overview_summary(found: Overview) -> dict[str, Any]:
    return {
        "protocol": found.protocol,
        "probe": found.probe,
        "mean_over": [found.sets[place][0] for place in found.mean_over],
        "rows": [
            {"encoder": encoder, "embedding": embedding, "resolution": resolution, "mean": mean,
             "cells": {place[0]: None if score is None else {"metric": score.metric, **cell(score)}
                       for place, score in zip(found.sets, row, strict=True)}}
            for (encoder, embedding, resolution), row, mean in zip(found.rows, found.cells, found.means, strict=True)
        ],
    }  # fmt: skip


def _write_page(
    path: Path, scores: Sequence[Score], pairs: Sequence[Score], tests: Sequence[dict[str, Any]], found: Sequence[Overview],
    config: Config,
) -> None:  # fmt: skip
    table = blocks(scores, config.report.table.published)
    few, notes = [block for block in table if is_few_shot(block.probe)], Footnotes()
    shared = {(one.sets[k][0], one.protocol, one.probe) for one in found if _of_all(one, scores) for k in one.common}
    few = [each for part in _split(few, shared) for each in part]
    both, rest = _split([block for block in table if block not in few], shared)
    chapters = [Chapter("Encoders against sets", _overview_parts(found, scores))]
    chapters.append(score_chapter(both or rest, notes, []))
    if both and rest:
        folded = score_chapter(rest, Footnotes(), [])
        title = f"{len(rest)} tables of sets, protocols and probes that not every encoder has"
        chapters.append(Chapter("What not all share", [Folded(title, folded.parts)]))
    chapters += few_shot_chapter(scores, few, notes, [])
    if tests:
        chapters.append(Chapter("Who is right where the other is wrong", [_tests_grid(tests)]))
    chapters += told(read_settings(check_folders(config.runs)))
    chapters.append(Chapter("How to read this page", [Prose("\n\n".join(general_notes(table, config.interval.level)))]))
    encoders = dict.fromkeys(score.encoder for score in scores if not score.floor and not score.minus)
    datasets = dict.fromkeys(score.dataset for score in scores)
    lead = f"{', '.join(encoders)} on {', '.join(datasets)}: the same images, patients and probes, nothing fitted anew."
    facts = {f"{p.encoder} above {p.minus} on {p.dataset}, protocol {p.protocol} (paired)": number(p) for p in pairs[:4]}
    write_page(path, "Encoders side by side", lead, facts, chapters)


def _split(found: Sequence[Block], shared: set[tuple[str, str, str]]) -> tuple[list[Block], list[Block]]:
    """Blocks that every encoder has, and the others."""
    both = [block for block in found if (block.dataset, block.protocol, block.probe) in shared]
    return both, [block for block in found if block not in both]


def _overview_parts(found: Sequence[Overview], scores: Sequence[Score]) -> list[Part]:
    """The sets that all encoders have first; those of some alone, and protocols and probes of some alone, folded below."""
    parts: list[Part] = []
    rest: list[Part] = []
    for one in found:
        everywhere = _of_all(one, scores)
        alone = [k for k in range(len(one.sets)) if k not in one.common] if everywhere else list(range(len(one.sets)))
        if everywhere:
            parts += [Heading(one.title, ""), _overview_grid(one, one.common)]
        if alone:
            rest += [Heading(one.title, ""), _overview_grid(one, alone)]
    if not parts:
        return rest  # nothing is shared: nothing is more important than the rest
    return [*parts, Folded("Sets, protocols and probes that not every encoder has", rest)] if rest else parts


def _overview_grid(found: Overview, places: Sequence[int]) -> Grid:
    """The columns of some sets, and the mean where it is over sets among them."""
    averaged = len(found.mean_over) > 1 and set(found.mean_over) <= set(places)
    rows: list[Sequence[Cell | str]] = []
    for (encoder, embedding, resolution), row, mean in zip(found.rows, found.cells, found.means, strict=True):
        scores = [row[place] for place in places]
        if not any(scores):
            continue
        floor = any(score is not None and score.floor for score in scores)
        look = "quiet" if floor else "strong"
        cells = [Cell(number(score), look=look) for score in scores]
        means = [Cell("–" if mean is None else f"{mean:.3f}", look=look)] if averaged else []
        form = Cell(" ".join(filter(None, (embedding, resolution))), look="quiet")
        rows.append([Cell(encoder + (" (floor)" if floor else ""), look=look), form, *cells, *means])
    head = ["encoder", "embedding", *(f"{found.sets[place][0]}, {found.sets[place][2].replace('_', ' ')}" for place in places)]
    words = found.mean_words if averaged or set(places) == set(range(len(found.sets))) else ""
    return Grid([*head, *(["mean"] if averaged else [])], rows, 2, words)


def _tests_grid(tests: Sequence[dict[str, Any]]) -> Grid:
    rows = [
        (f"{t['dataset']}, {t['protocol']}, {t['probe']}, {t['role']}", t["first"], t["second"], f"{t['first_alone']:,}",
         f"{t['second_alone']:,}", f"{t['p']:.2g}", f"{t['p_holm']:.2g}")
        for t in tests
    ]  # fmt: skip
    head = ["place", "first", "second", "right by the first alone", "by the second alone", "exact p", "p after Holm"]
    return Grid(head, rows, 3, "McNemar's exact test; every image is its own patient here, or none is known.")


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("compare", sys.argv[1:]))
