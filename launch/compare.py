"""Which is better, and on what? Several runs of `histoscale probe`, or of `histoscale mil`, side by side, with differences.

    histoscale compare runs=[runs/phikon_crc,runs/ours_crc] out=runs/compare
    histoscale compare runs=[runs/mil_plain,runs/mil_jitter,runs/mil_macenko] out=runs/compare
    histoscale compare 'runs=[runs/phikon_crc,runs/ours_crc,runs/phikon_bach,runs/ours_bach]' paired=[balanced_accuracy,auroc]

Reads the predictions.npz that each run left; embeds and fits nothing. Encoders stand against sets; two encoders on one set are
also subtracted on the same draws of patients. A mean is taken only over sets that all encoders have. Runs that scored one set
on different files are refused. Slide models of one task stand against the first: inside, outside and the gap between, with
DeLong's test and McNemar's. Leaves table.txt, table.md, report.html and summary.json.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from histoscale.data.journal import Journal, JournalConfig, write_atomic
from histoscale.eval.matrix import Overview, overviews
from histoscale.eval.mil.compare import SCORES, compare_mil, is_mil_run, open_mil_runs
from histoscale.eval.mil.compare_page import markdown, show, write_comparison
from histoscale.eval.page import Cell, Chapter, Grid, Heading, Part, Prose, write_page
from histoscale.eval.patch_report import ReportConfig, few_shot_chapter, score_chapter
from histoscale.eval.results import Score
from histoscale.eval.runs import RunsError, gathered, mcnemar_tests, open_runs, paired_scores
from histoscale.eval.scores.interval import Interval, IntervalConfig
from histoscale.eval.table import Footnotes, blocks, cell, general_notes, is_few_shot, number, summary
from histoscale.eval.table_text import markdown_overview, markdown_table, terminal_overview, terminal_table

RESULT = ("runs", "metrics", "paired", "mcnemar", "interval", "report")


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
    if _of_mil(config):
        found = [Path(folder).expanduser() for folder in config.runs]
        return {"scores": [hashlib.sha256((folder / SCORES).read_bytes()).hexdigest() for folder in found]}
    held = [run.predictions for run in open_runs(config.runs)]
    return {"predictions": [[p.dataset, p.data_hash, p.encoders, [asdict(score) for score in p.scores]] for p in held]}


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Raises RunsError, PredictionsError."""
    if _of_mil(config):
        return _run_mil(config, journal)
    runs = open_runs(config.runs)
    scores, decisions = gathered(runs)
    pairs = paired_scores(decisions, config.paired, config.interval, scores)
    tests = mcnemar_tests(decisions) if config.mcnemar else []
    everything, level, table = [*scores, *pairs], config.interval.level, config.report.table
    found = overviews(scores, config.metrics)
    words = "\n\n".join([*(terminal_overview(one, table) for one in found), terminal_table(everything, level, table)])
    journal.say(words)
    write_atomic(journal.path("table.txt"), words + "\n")
    parts = [*(markdown_overview(one) for one in found), markdown_table(everything, level, table)]
    write_atomic(journal.path("table.md"), "\n".join(parts))
    _write_page(journal.path("report.html"), everything, pairs, tests, found, config)
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
    write_atomic(journal.path("table.txt"), words + "\n")
    write_atomic(journal.path("table.md"), markdown(found))
    write_comparison(journal.path("report.html"), found)
    return {
        "compare": {
            "task": found.runs[0].task.name,
            "runs": {run.name: {"encoder_hash": run.encoder, "split": run.split} for run in found.runs},
            "scores": {run.name: {part: _plain(values) for part, values in run.own.items()} for run in found.runs},
            "differences": [one.as_dict() for one in found.differences],
            "gaps": [one.as_dict() for one in found.gaps],
            "mcnemar": [asdict(one) for one in found.tests],
            "left_out": found.left_out,
        }
    }


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
    parts: list[Part] = []
    for one in found:
        parts += [Heading(one.title, ""), _overview_grid(one)]
    chapters = [Chapter("Encoders against sets", parts)]
    chapters.append(score_chapter([block for block in table if block not in few], notes, []))
    chapters += few_shot_chapter(scores, few, notes, [])
    if tests:
        chapters.append(Chapter("Who is right where the other is wrong", [_tests_grid(tests)]))
    chapters.append(Chapter("How to read this page", [Prose("\n\n".join(general_notes(table, config.interval.level)))]))
    encoders = dict.fromkeys(score.encoder for score in scores if not score.floor and not score.minus)
    datasets = dict.fromkeys(score.dataset for score in scores)
    lead = f"{', '.join(encoders)} on {', '.join(datasets)}: the same images, patients and probes, nothing fitted anew."
    facts = {f"{p.encoder} above {p.minus} on {p.dataset}, protocol {p.protocol} (paired)": number(p) for p in pairs[:4]}
    write_page(path, "Encoders side by side", lead, facts, chapters)


def _overview_grid(found: Overview) -> Grid:
    averaged = len(found.mean_over) > 1
    rows: list[Sequence[Cell | str]] = []
    for (encoder, embedding, resolution), scores, mean in zip(found.rows, found.cells, found.means, strict=True):
        floor = any(score is not None and score.floor for score in scores)
        look = "quiet" if floor else "strong"
        cells = [Cell(number(score), look=look) for score in scores]
        means = [Cell("–" if mean is None else f"{mean:.3f}", look=look)] if averaged else []
        form = Cell(" ".join(filter(None, (embedding, resolution))), look="quiet")
        rows.append([Cell(encoder + (" (floor)" if floor else ""), look=look), form, *cells, *means])
    head = ["encoder", "embedding", *(f"{dataset}, {metric.replace('_', ' ')}" for dataset, _, metric in found.sets)]
    return Grid([*head, *(["mean"] if averaged else [])], rows, 2, found.mean_words)


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
