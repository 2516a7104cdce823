"""Slide-level runs side by side: the same slides, paired differences, gaps, single decisions, and what is refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mil_fixtures import cohort
from study_fixtures import BINARY, CONFIG, FIXED, FOLDS, INTERVAL, SITES, TASKS, made_bags, made_outputs, made_plan

from histoscale.eval.mil.compare import PARTS, compare_mil, open_mil_runs
from histoscale.eval.mil.compare_page import show
from histoscale.eval.mil.score_table import score_rows
from histoscale.eval.mil.split import FixedSplit, FoldSplit, SiteSplit
from histoscale.eval.mil.study import study
from histoscale.eval.mil.task import Task
from histoscale.eval.runs import RunsError
from histoscale.eval.scores.auroc import areas, difference
from histoscale.eval.scores.mcnemar import holm, mcnemar
from histoscale.launch.run import execute, invoke

EVIL = "<script>alert(1)</script>"


def leave(
    folder: Path,
    task: Task,
    split: FixedSplit | FoldSplit | SiteSplit,
    noise: float,
    seed: int,
    patients: int = 150,
    slides: int = 1,
) -> Path:
    """What a run of `histoscale mil` leaves for comparisons."""
    bags = made_bags(task, patients, slides)
    plan = made_plan(bags, split)
    outputs = made_outputs(bags, plan, task, noise, seed)
    found = study(bags, plan, outputs, {}, task, INTERVAL, CONFIG)
    folder.mkdir(parents=True)
    summary = {"mil": {**found.as_dict(), "encoder_hash": "abc" + EVIL}}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = score_rows(bags, plan, outputs, task)
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.mark.parametrize("split", [FIXED, FOLDS, SITES], ids=lambda split: split.kind)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_better_run_is_seen(tmp_path: Path, task: Task, split: FixedSplit | FoldSplit | SiteSplit) -> None:
    folders = [
        leave(tmp_path / name, task, split, noise, seed) for name, noise, seed in (("a", 3, 1), ("b", 3, 2), ("c", 0.2, 3))
    ]
    found = compare_mil(open_mil_runs([str(folder) for folder in folders]), INTERVAL, True)
    best = {(one.run, one.part): one for one in found.differences if one.metric == list(found.runs[0].own["internal"])[0]}
    for part in PARTS:
        gain, none = best["c", part].interval, best["b", part].interval
        assert gain.low is not None and none.low is not None and none.high is not None
        assert gain.low > 0 and none.low < gain.low
        own = [run.own[part][best["c", part].metric].value for run in found.runs]
        assert gain.value == pytest.approx(own[2] - own[0], abs=1e-9)
    assert {one.run for one in found.gaps} == {"b", "c"} and all(one.part == "gap" for one in found.gaps)
    gap = next(one for one in found.gaps if one.run == "c" and one.metric == best["c", "external"].metric)
    assert gap.interval.value == pytest.approx(best["c", "internal"].interval.value - best["c", "external"].interval.value)
    assert bool(found.tests) == (task.kind in ("binary", "classes"))
    assert "nan" not in show(found)


def test_areas_by_delong_and_decisions_by_mcnemar(tmp_path: Path) -> None:
    folders = [
        leave(tmp_path / name, BINARY, FIXED, noise, seed) for name, noise, seed in (("a", 2, 1), ("b", 1, 2), ("c", 2, 3))
    ]
    found = compare_mil(open_mil_runs([str(folder) for folder in folders]), INTERVAL, True)
    units = [run.units("external") for run in found.runs]
    area = areas(units[0][0].labels, np.stack([one.outputs[:, 0] for one, _ in units]))
    expected = [difference(area, i, 0)[3] for i in (1, 2)]
    own = [one for one in found.differences if one.part == "external" and one.metric == "auroc"]
    assert [one.p for one in own] == pytest.approx(expected) and [one.holm for one in own] == pytest.approx(holm(expected))
    positive = units[0][0].labels == 1
    test = next(one for one in found.tests if one.run == "b" and one.part == "external" and one.among.startswith("positive"))
    alone, first, p = mcnemar(units[1][1][positive, 0], units[0][1][positive, 0])
    assert (test.alone, test.first_alone, test.n, test.p) == (alone, first, positive.sum(), p)
    assert test.holm >= test.p and len(found.tests) == 2 * 2 * 2 * 2  # runs, parts, thresholds, sides


def test_patients_are_one_decision_and_several_units_are_not_tested(tmp_path: Path) -> None:
    task = replace(BINARY, decision="patient")
    by_patient = [leave(tmp_path / name, task, FOLDS, 1, seed, slides=2) for name, seed in (("a", 1), ("b", 2))]
    found = compare_mil(open_mil_runs([str(folder) for folder in by_patient]), INTERVAL, True)
    units, flags = found.runs[0].units("external")
    assert len(units.groups) == 50 and units.slides == 100 and found.tests
    rows = found.runs[0].rows["external"]
    for i, group in enumerate(units.groups):
        own = [row for row in rows if row["patient_id"] == group]
        assert flags[i, 0] == any(row["flagged_0.95"] == "1" for row in own)
        assert units.outputs[i, 0] == max(float(row["score"]) for row in own)
    by_slide = [leave(tmp_path / name, BINARY, FIXED, 1, seed, slides=2) for name, seed in (("c", 1), ("d", 2))]
    found = compare_mil(open_mil_runs([str(folder) for folder in by_slide]), INTERVAL, True)
    assert found.tests == [] and "internal: patients have several units" in found.left_out[0]


def test_runs_that_cannot_stand_together(tmp_path: Path) -> None:
    a, b = (leave(tmp_path / name, BINARY, FIXED, 1, 1) for name in "ab")
    with pytest.raises(RunsError, match="at least two folders"):
        open_mil_runs([str(a)])
    other = leave(tmp_path / "task", replace(BINARY, prevalence=0.2), FIXED, 1, 1)
    with pytest.raises(RunsError, match="a and task studied other tasks"):
        open_mil_runs([str(a), str(other)])
    fewer = leave(tmp_path / "fewer", BINARY, FIXED, 1, 1, patients=147)
    with pytest.raises(RunsError, match="in one alone, such as s"):
        open_mil_runs([str(a), str(fewer)])
    text = (b / "scores.csv").read_text()
    line = next(line for line in text.splitlines() if ",external," in line)
    label = line.split(",")[5]
    moved = line.replace(f",external,{label},", f",external,{1 - int(label)},")
    (b / "scores.csv").write_text(text.replace(line, moved))
    with pytest.raises(RunsError, match="other labels"):
        open_mil_runs([str(a), str(b)])
    (b / "scores.csv").write_text("slide_id,part\ns,internal\n")
    with pytest.raises(RunsError, match="has no column label, patient_id, score, trial"):
        open_mil_runs([str(a), str(b)])
    (b / "summary.json").write_text("{")
    with pytest.raises(RunsError, match="is no finished run of `histoscale mil`"):
        open_mil_runs([str(a), str(b)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        leave(tmp_path / name, replace(BINARY, name=EVIL), FIXED, noise, 1) for name, noise in (("plain", 2), ("jitter", 0.5))
    ]
    out = tmp_path / "out"
    arguments = [f"runs=[{folders[0]},{folders[1]}]", "interval.draws=100", "logging.progress=off", f"out={out}"]
    found = invoke("compare", arguments)["compare"]
    written = json.loads((out / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))[
        "compare"
    ]
    assert written["runs"].keys() == {"plain", "jitter"} and found["differences"][0]["metric"] == "auroc"
    page, table, text = ((out / name).read_text() for name in ("report.html", "table.md", "table.txt"))
    assert "<script" not in page and "<script" not in table and "&lt;script" in page
    for words in ("less plain", "internal minus external", "AUROC", "p after Holm"):
        assert words in text, words
    (tmp_path / "probe").mkdir()
    mixed = [f"runs=[{folders[0]},{tmp_path / 'probe'}]", "logging.progress=off", f"out={tmp_path / 'mixed'}"]
    assert execute("compare", mixed) == 2 and "compare one kind" in capsys.readouterr().err


def test_what_mil_leaves_is_what_compare_reads(tmp_path: Path) -> None:
    slides = cohort(tmp_path / "stores")
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "uri", "patient_id", "site", *slides[0].labels])
        writer.writerows([s.slide_id, s.uri, s.patient_id, s.site, *s.labels.values()] for s in slides)
    common = [f"embeddings={tmp_path / 'stores'}", f"manifest={tmp_path / 'manifest.csv'}", "logging.progress=off"]
    common += ["interval.draws=100", "mil.epochs=2", "mil.repeats=1"]
    for kind in ("mean", "max"):
        invoke("mil", [*common, f"mil={kind}", f"out={tmp_path / kind}"])
    arguments = [f"runs=[{tmp_path / 'mean'},{tmp_path / 'max'}]", f"out={tmp_path / 'out'}", "logging.progress=off"]
    found = invoke("compare", arguments)["compare"]
    mil = json.loads((tmp_path / "max" / "summary.json").read_text())["mil"]
    for part in PARTS:
        one = next(d for d in found["differences"] if (d["part"], d["metric"]) == (part, "auroc"))
        values = [found["scores"][run][part]["auroc"]["value"] for run in ("max", "mean")]
        assert one["value"] == pytest.approx(values[0] - values[1]) and values[0] == mil[part]["auc"]["value"]
    assert found["mcnemar"] == [] and "several units" in found["left_out"][0]  # two slides a patient
    assert "less mean" in (tmp_path / "out" / "table.txt").read_text()
    page = (tmp_path / "out" / "report.html").read_text().split("<main>")[1]
    shared, *rest = page.split("<h2>")[1:]
    assert "What all runs share" in shared and "internal</td>" in shared and "<td>split" in shared and "<td>encoder" in shared
    differing, same = rest[0].split("<details>")
    assert "What was set" in differing and "mil.aggregator.kind" in differing
    assert "mil.epochs" in same and "mil.epochs" not in differing  # the same in both, folded
    numbers = rest[1].split("<details>")
    assert "Inside, outside" in numbers[0] and "AUROC" in numbers[0] and "Brier" not in numbers[0] and "Brier" in numbers[1]


def test_a_rule_that_sweeps_is_said_of_its_run(tmp_path: Path) -> None:
    folders = [leave(tmp_path / name, BINARY, FIXED, noise, 1) for name, noise in (("a", 1), ("b", 1))]
    summary = json.loads((folders[1] / "summary.json").read_text())
    summary["mil"]["thresholds"]["0.95"]["flags"] = "every"
    summary["mil"]["absent"] = {"why": {"s": "no embedding store"}, "labelled": 151}
    (folders[1] / "summary.json").write_text(json.dumps(summary))
    found = compare_mil(open_mil_runs([str(folder) for folder in folders]), INTERVAL, True)
    assert found.notes == [
        "b: the rule for sensitivity 0.95 flags every slide and sorts nothing",
        "b: 1 of 151 labelled slides have no usable store and are in no number",
    ]
    assert "- b: the rule for sensitivity 0.95 flags every slide" in show(found)
