"""Tables of scores: every number once, both protocols and their floors together, notes said, nothing unescaped, no NaN."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from patch_results import EVIL, made_difference, made_outcome, made_patches, made_run, made_score

from histoscale.eval.matrix import overviews
from histoscale.eval.results import Score
from histoscale.eval.scores.interval import Interval
from histoscale.eval.table import TableConfig, blocks, summary
from histoscale.eval.table_text import markdown_overview, markdown_table, terminal_overview, terminal_table
from histoscale.pretrain.release import _scores as card_rows

CONFIG = TableConfig(width=110, published=5)


@pytest.fixture
def scores() -> list[Score]:
    """Two sets with unlike numbers, so that each can be found in a text."""
    found = [*made_run(made_patches("crc"), "release")[1], *made_run(made_patches("own", seed=4), "release", seed=30)[1]]
    return [replace(s, interval=replace(s.interval, value=0.1 + 0.003 * i, low=0.05, high=0.95)) for i, s in enumerate(found)]


def shown(score: Score) -> str:
    sign = "+" if score.minus else ""
    return f"{score.interval.value:{sign}.3f} [{sign}0.050"


@pytest.mark.parametrize("render", [terminal_table, markdown_table])
def test_every_score_stands_once(scores: list[Score], render) -> None:  # type: ignore[no-untyped-def]
    text = render(scores, 0.95, CONFIG, [])
    for score in scores:
        assert len(re.findall(rf"(?<![+\d]){re.escape(shown(score))}", text)) == 1, shown(score)


@pytest.mark.parametrize("width", [60, 90, 110])
def test_the_terminal_keeps_its_width(scores: list[Score], width: int) -> None:
    more = [replace(s, metric=name) for s in scores for name in ("auroc", "accuracy", "f1") if s.metric == "macro_f1"]
    text = terminal_table([*scores, *more], 0.95, TableConfig(width, 5))
    assert max(map(len, text.splitlines())) <= max(width, 72)  # one column and its label are the least that can stand
    assert width < 72 or max(map(len, text.splitlines())) <= width


def test_what_must_be_said_is_said(scores: list[Score]) -> None:
    reason = "interval withheld: 2 patients, and fewer than 10 cannot carry one"
    withheld = replace(
        scores[0], interval=Interval(0.5, None, None, 2, 40, reason), groups="none", resolution="native", effective_mpp=None
    )
    for text in (terminal_table([withheld, *scores[1:]], 0.95, CONFIG), markdown_table([withheld, *scores[1:]], 0.95, CONFIG)):
        flat = " ".join(text.replace("\\", "").split())
        said = ["[withheld]", reason, "groups: none", "selected on report", "0.5 µm/px, field 112 µm", "unknown µm/px", "honest"]
        said += ["eva-2025-03", "CLS", "Virchow2", "random", "colour", "floor", "− random", "95 %", "±"]
        assert [words for words in said if words not in flat] == []


def test_floors_end_a_block_and_differences_follow_their_encoder(scores: list[Score]) -> None:
    block = blocks(list(reversed(scores)), 0)[0]
    assert [line.floor for line in block.lines] == [False, False, False, True, True]
    assert [bool(line.minus) for line in block.lines] == [False, True, True, False, False]


def test_two_scores_in_one_place_are_refused(scores: list[Score]) -> None:
    for render in (lambda: summary([*scores, scores[0]]), lambda: terminal_table([*scores, scores[0]], 0.95, CONFIG)):
        with pytest.raises(ValueError, match="two scores stand at crc / honest / linear / report / release / cls"):
            render()


def test_markdown_is_a_table_that_no_name_breaks(scores: list[Score]) -> None:
    evil = f"a|b\n{EVIL}[x](javascript:y)`*_"
    text = markdown_table(
        [replace(s, encoder=evil, dataset=evil, note=evil) for s in scores if s.encoder == "release"][:1], 0.95, CONFIG
    )
    assert "<script" not in text and "[x]" not in text.replace("\\[", "")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1 and len(table) == 3
    assert "`" not in text.replace("\\`", "")


def test_the_summary_has_stable_keys_and_no_nan(scores: list[Score]) -> None:
    undefined = replace(
        scores[0], metric="auroc", interval=Interval(float("nan"), None, None, 12, 60, "undefined"), spread=float("nan")
    )
    native = replace(scores[0], resolution="native", embedding="cls+mean")
    found = summary([*scores, undefined, native])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    place = found["crc"]["honest"]["linear"]["report"]
    assert list(place) == ["release", "random", "colour"]
    assert place["release"]["balanced_accuracy"]["value"] == scores[0].interval.value
    assert place["release"]["auroc"]["value"] is None and place["release"]["auroc"]["note"] == "undefined"
    assert place["release"]["also"]["cls+mean native"]["balanced_accuracy"]["resolution"] == "native"
    assert set(place["release"]["minus"]) == {"random", "colour"} and place["random"]["balanced_accuracy"]["floor"] is True
    assert {"value", "low", "high", "patients", "units", "note", "groups", "effective_mpp"} <= place["release"]["macro_f1"].keys()

    def cells(values: dict) -> int:  # type: ignore[type-arg]
        return 1 if "value" in values else sum(map(cells, values.values()))

    assert cells(found) == len(scores) + 2


def test_a_model_card_lists_every_cell_of_the_summary(scores: list[Score]) -> None:
    rows = card_rows({"probe": summary(scores)})
    assert len(rows) == len(scores)
    value = scores[0].interval.value
    assert ("probe.crc.honest.linear.report.release.balanced_accuracy", f"{value:.3f} [0.050, 0.950]") in rows


def test_a_mean_is_taken_only_over_sets_that_all_encoders_have() -> None:
    sets = {name: made_patches(name, seed=i) for i, name in enumerate(("a", "b", "c"))}
    held = [("one", "a"), ("one", "b"), ("one", "c"), ("two", "a"), ("two", "b"), ("random", "a")]
    found = [
        made_score(made_outcome(sets[name], encoder, 0.8, seed=i), sets[name], "balanced_accuracy", encoder == "random")
        for i, (encoder, name) in enumerate(held)
    ]
    (overview,) = overviews(found, ["auroc", "balanced_accuracy"])
    assert [row[0] for row in overview.rows] == ["one", "two", "random"] and [place[0] for place in overview.sets] == [
        "a",
        "b",
        "c",
    ]
    assert overview.mean_over == (0, 1) and overview.means[2] is None
    assert overview.means[0] == pytest.approx(np.mean([found[0].interval.value, found[1].interval.value]))
    assert "a, b" in overview.mean_words and overview.cells[1][2] is None
    for text in (terminal_overview(overview, CONFIG), markdown_overview(overview)):
        assert f"{overview.means[1]:.3f}" in text and "a, b" in text
    (alone,) = overviews([found[0], found[4]], ["balanced_accuracy"])
    assert alone.mean_over == () and alone.means == (None, None) and "No mean" in alone.mean_words


def test_a_difference_names_both(tmp_path: Path) -> None:
    patches = made_patches()
    a, b = (made_score(made_outcome(patches, name, 0.9), patches, "balanced_accuracy") for name in ("first", "second"))
    text = terminal_table([a, b, made_difference(a, b)], 0.95, CONFIG)
    lines = [line.strip() for line in text.splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith("first"))
    assert lines[at + 1].startswith("− second") and lines[at + 2].startswith("second")
