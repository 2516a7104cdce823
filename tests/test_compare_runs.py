"""Runs side by side: the file that they leave, what may be compared, and the command."""

import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from patch_results import EVIL, made_outcome, made_patches, made_run, made_score
from scipy.stats import binom
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.predictions import FILE, PredictionsError, load_predictions, predictions_of, save_predictions
from histoscale.eval.runs import PAIRED, RunsError, gathered, mcnemar_tests, open_runs, paired_scores, statistic
from histoscale.eval.scores.interval import IntervalConfig
from histoscale.eval.scores.mcnemar import holm, mcnemar
from histoscale.launch.run import execute, invoke

INTERVAL = IntervalConfig(draws=200, level=0.95, seed=0)


def leave(folder: Path, patches: LabelledPatches, encoder: str, right: float, seed: int = 1) -> Path:
    """What a run of `histoscale probe` leaves for comparisons."""
    outcomes, scores = made_run(patches, encoder, right, seed)
    folder.mkdir(parents=True)
    save_predictions(folder / FILE, predictions_of(patches, {"resize": outcomes}, scores, {encoder: f"hash of {encoder}"}))
    return folder


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    patches = made_patches(EVIL)
    outcomes, scores = made_run(patches, "ours")
    ties = made_outcome(patches, "ties", 0.9)
    ties.logs[:, :, 1] = ties.logs.max(axis=2) + 1e-12  # larger than its rival in float64 alone
    forest = made_outcome(patches, "colour", 0.9, probe="knn")
    forest.logs[0, 0, :2] = -np.inf
    undefined = replace(scores[0], metric="auroc", interval=replace(scores[0].interval, value=float("nan")))
    held = predictions_of(patches, {"resize": [*outcomes, ties], "native": [forest]}, [*scores, undefined], {"ours": "h"})
    save_predictions(tmp_path / FILE, held)
    again = load_predictions(tmp_path / FILE)
    assert again.scores[:-1] == held.scores[:-1] and np.isnan(again.scores[-1].interval.value)
    for name in ("dataset", "data_hash", "classes", "groups", "positive", "encoders"):
        assert getattr(again, name) == getattr(held, name)
    assert all(np.array_equal(getattr(again, name), getattr(held, name)) for name in ("labels", "patients", "roles"))
    assert {r: len(found) for r, found in again.outcomes.items()} == {"resize": len(outcomes) + 1, "native": 1}
    for resolution, found in held.outcomes.items():
        for a, b in zip(found, again.outcomes[resolution], strict=True):
            assert np.array_equal(a.rows, b.rows) and np.array_equal(a.predicted, b.predicted)
            assert np.allclose(np.exp(a.logs), np.exp(b.logs), atol=1e-6) and (a.encoder, a.note) == (b.encoder, b.note)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    with zipfile.ZipFile(tmp_path / FILE) as archive:
        assert all(b"descr" in archive.read(name)[:64] and b"'|O'" not in archive.read(name)[:128] for name in archive.namelist())


def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PredictionsError, match="is missing"):
        load_predictions(tmp_path / FILE)
    (tmp_path / FILE).write_bytes(b"no zip")
    with pytest.raises(PredictionsError, match="not a whole file"):
        load_predictions(tmp_path / FILE)
    whole = (leave(tmp_path / "a", made_patches(), "ours", 0.8) / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PredictionsError, match="not a whole file"):
        load_predictions(tmp_path / FILE)
    np.savez(tmp_path / FILE, about=np.array([{"format": "x"}], dtype=object), allow_pickle=True)
    with pytest.raises(PredictionsError, match="not a whole file"):
        load_predictions(tmp_path / FILE)
    np.savez(tmp_path / FILE, about=np.frombuffer(b'{"format": "other"}', np.uint8))
    with pytest.raises(PredictionsError, match="format 'other'"):
        load_predictions(tmp_path / FILE)
    patches = made_patches()
    held = predictions_of(patches, {"resize": [replace(made_outcome(patches, "e", 0.9), rows=np.arange(60) + 100)]}, [], {})
    save_predictions(tmp_path / FILE, held)
    with pytest.raises(PredictionsError, match="does not fit itself"):
        load_predictions(tmp_path / FILE)


def test_other_data_of_one_set_is_refused_with_both_hashes(tmp_path: Path) -> None:
    a, b = made_patches("crc"), made_patches("crc", seed=5)
    runs = [leave(tmp_path / "a", a, "one", 0.8), leave(tmp_path / "b", b, "two", 0.8)]
    with pytest.raises(RunsError, match=f"a and b scored crc on different data .hash {a.hash} and {b.hash}"):
        gathered(open_runs([str(run) for run in runs]))
    out = tmp_path / "out"
    assert execute("compare", [f"runs=[{runs[0]},{runs[1]}]", f"out={out}", "logging.progress=off"]) == 2
    lied = leave(tmp_path / "c", replace(b, hash=a.hash), "three", 0.8)
    with pytest.raises(RunsError, match="share the hash of crc but not its labels"):
        gathered(open_runs([str(runs[0]), str(lied)]))


def test_one_run_and_one_run_twice_are_refused(tmp_path: Path) -> None:
    run = str(leave(tmp_path / "a", made_patches(), "one", 0.8))
    with pytest.raises(RunsError, match="at least two"):
        open_runs([run])
    with pytest.raises(RunsError, match="twice"):
        open_runs([run, f"{run}/../a"])


def test_a_run_that_is_none_is_named(tmp_path: Path) -> None:
    a = leave(tmp_path / "a", made_patches(), "a", 0.6)
    with pytest.raises(PredictionsError, match="aa/predictions.npz is missing: expected the folder of a finished"):
        invoke("compare", [f"runs=[{a},{a}a]", "logging.progress=off", f"out={tmp_path / 'compare'}"])


def test_statistics_agree_with_scikit_learn() -> None:
    patches = made_patches()
    outcome = made_outcome(patches, "e", 0.7, runs=2)
    labels, rows = patches.labels[outcome.rows], np.random.default_rng(0).integers(0, len(outcome.rows), 80)
    expected = {
        "balanced_accuracy": [balanced_accuracy_score(labels[rows], p[rows]) for p in outcome.predicted],
        "macro_f1": [f1_score(labels[rows], p[rows], average="macro") for p in outcome.predicted],
        "auroc": [roc_auc_score(labels[rows], np.exp(logs)[rows], multi_class="ovr") for logs in outcome.logs],
    }
    assert set(expected) == set(PAIRED)
    for metric, values in expected.items():
        assert statistic(outcome.logs, labels, metric)(rows) == pytest.approx(np.mean(values))


def test_differences_are_paired_on_shared_patients(tmp_path: Path) -> None:
    patches = made_patches("crc", n=400, patients=80)
    runs = open_runs([str(leave(tmp_path / name, patches, name, right)) for name, right in (("good", 0.9), ("bad", 0.6))])
    scores, decisions = gathered(runs)
    pairs = paired_scores(decisions, ["balanced_accuracy", "macro_f1"], INTERVAL, scores)
    assert {(p.encoder, p.minus, p.protocol, p.metric) for p in pairs} == {
        ("good", "bad", protocol, metric) for protocol in ("honest", "eva") for metric in ("balanced_accuracy", "macro_f1")
    }
    value = {(s.encoder, s.protocol): s.interval.value for s in scores if s.metric == "balanced_accuracy" and not s.minus}
    for pair in (p for p in pairs if p.metric == "balanced_accuracy"):
        assert pair.interval.value == pytest.approx(value["good", pair.protocol] - value["bad", pair.protocol], abs=1e-9)
        assert pair.interval.low is not None and pair.interval.low > 0 and pair.interval.patients == 40
    with pytest.raises(RunsError, match="expected some of"):
        paired_scores(decisions, ["dice"], INTERVAL, scores)


def test_names_tell_encoders_and_floors_apart(tmp_path: Path) -> None:
    patches, other = made_patches("crc"), made_patches("pcam", ("no", "yes"), seed=2)
    places = [("x/one", patches, 0.8, 1), ("y/one", patches, 0.9, 1), ("x/two", other, 0.8, 1)]
    runs = open_runs([str(leave(tmp_path / name, p, "ours", right, seed)) for name, p, right, seed in places])
    assert [run.name for run in runs] == ["x/one", "y/one", "x/two"]
    scores, decisions = gathered(runs)
    names = {score.encoder for score in scores}
    assert {"ours (x/one)", "ours (y/one)", "ours", "random, as ours (x/one)", "random, as ours"} <= names
    assert {"colour (x/one)", "colour (y/one)", "colour"} <= names  # the made floors differ, so both stand
    assert {score.minus for score in scores if score.encoder == "ours (x/one)"} == {
        "",
        "random, as ours (x/one)",
        "colour (x/one)",
    }
    same = [leave(tmp_path / name, patches, name, 0.8) for name in ("p", "q")]
    scores, _ = gathered(open_runs([str(run) for run in same]))
    assert sum(s.encoder == "colour" and s.protocol == "eva" and s.metric == "macro_f1" for s in scores) == 1


def test_mcnemar_is_the_exact_binomial_and_needs_independent_images(tmp_path: Path) -> None:
    first, second = np.array([1, 1, 1, 1, 1, 0, 0, 1], bool), np.array([0, 0, 0, 0, 0, 1, 0, 1], bool)
    assert mcnemar(first, second) == (5, 1, pytest.approx(2 * binom.cdf(1, 6, 0.5)))
    assert mcnemar(first, first) == (0, 0, 1.0)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
    grouped = made_patches("crc")
    alone = replace(made_patches("own"), patients=np.arange(120).astype(str), groups="none")
    runs = [leave(tmp_path / f"{p.name}{i}", p, f"e{i}", 0.6 + 0.3 * i, seed=i) for p in (grouped, alone) for i in (0, 1)]
    tests = mcnemar_tests(gathered(open_runs([str(run) for run in runs]))[1])
    assert [(t["dataset"], t["protocol"]) for t in tests] == [
        ("own", "honest")
    ]  # eva has several runs, crc several images a patient
    assert tests[0]["second_alone"] > tests[0]["first_alone"] and 0 < tests[0]["p"] <= tests[0]["p_holm"] <= 1


def test_the_command(tmp_path: Path) -> None:
    crc, pcam = made_patches("crc", n=240, patients=60), made_patches("pcam", ("no", EVIL), n=240, patients=60, seed=2)
    runs = [
        leave(tmp_path / f"{name}_{p.name}", p, name, right) for p in (crc, pcam) for name, right in (("ours", 0.9), (EVIL, 0.7))
    ]
    out = tmp_path / "out"
    arguments = [f"runs=['{runs[0]}','{runs[2]}']", "interval.draws=100", "logging.progress=off", f"out={out}"]
    quick = [leave(tmp_path / f"q{i}", p, name, right) for i, (p, name, right) in enumerate(
        [(crc, "ours", 0.9), (crc, EVIL, 0.7), (pcam, "ours", 0.9), (pcam, EVIL, 0.7)]
    )]  # fmt: skip
    arguments[0] = f"runs=[{','.join(map(str, quick))}]"
    found = invoke("compare", arguments)["compare"]
    written = json.loads((out / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))[
        "compare"
    ]
    assert set(written["scores"]) == {"crc", "pcam"} and written["overview"][0]["mean_over"] == ["crc", "pcam"]
    gap = found["scores"]["crc"]["honest"]["linear"]["report"]["ours"]["minus"][EVIL]["balanced_accuracy"]
    assert gap["low"] > 0
    page, table, text = ((out / name).read_text() for name in ("report.html", "table.md", "table.txt"))
    assert "<script" not in page and "<script" not in table and "&lt;script" in page
    assert "Mean of crc, pcam (balanced accuracy)" in text and "− ours" not in text and max(map(len, text.splitlines())) <= 110
    links = re.findall(r"(?:src|href)=\"([^\"]*)", page)
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert invoke("compare", arguments)["compare"] == written  # nothing left to do


def test_what_all_encoders_have_stands_first_and_the_rest_is_folded(tmp_path: Path) -> None:
    crc, pcam = made_patches("crc", n=240, patients=60), made_patches("pcam", ("no", "yes"), n=240, patients=60, seed=2)
    runs = [
        leave(tmp_path / "a", pcam, "ours", 0.9),  # alone, and first
        leave(tmp_path / "b", crc, "ours", 0.9),
        leave(tmp_path / "c", crc, "theirs", 0.7),
    ]
    out = tmp_path / "out"
    invoke("compare", [f"runs=[{','.join(map(str, runs))}]", "interval.draws=100", "logging.progress=off", f"out={out}"])
    overview, scores, rest = (out / "report.html").read_text().split("<main>")[1].split("<h2>")[1:4]
    shown, folded = overview.split("<details>")
    assert "crc, balanced accuracy" in shown and "pcam" not in shown and "pcam, balanced accuracy" in folded
    assert "crc: protocol" in scores and "pcam: protocol" not in scores
    assert rest.startswith("What not all share") and "pcam: protocol" in rest.split("<details>")[1]


def test_a_run_of_scores_alone_stands_in_the_table(tmp_path: Path) -> None:
    """Segmentation and regression leave scores without decisions."""
    patches = made_patches("consep")
    for name in ("a", "b"):
        score = replace(
            made_score(made_outcome(patches, name, 0.8), patches, "balanced_accuracy"), metric="monai_dice", probe="decoder"
        )
        (tmp_path / name).mkdir()
        save_predictions(tmp_path / name / FILE, predictions_of(patches, {}, [score], {name: name}))
    out = tmp_path / "out"
    found = invoke("compare", [f"runs=[{tmp_path / 'a'},{tmp_path / 'b'}]", "logging.progress=off", f"out={out}"])["compare"]
    assert {row["encoder"] for row in found["overview"][0]["rows"]} == {"a", "b"} and found["mcnemar"] == []
    assert "Virchow2" in (out / "table.txt").read_text()
