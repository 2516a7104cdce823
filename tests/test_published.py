"""Published scores: every row is read as it stands, and what stands beside ours is of one task, one metric and one protocol."""

import csv
import math
from importlib import resources

import pytest

from histoscale.eval.published import (
    COLUMNS,
    FILE,
    NEAREST,
    PROTOCOLS,
    SAME_WEIGHTS,
    PublishedError,
    nearest_column,
    published_beside,
    published_scores,
    read_published,
    same_weights,
    task_of,
)

HEAD = ",".join(COLUMNS) + "\n"


def test_every_row_of_the_file_is_read_as_it_stands() -> None:
    text = resources.files("histoscale.eval").joinpath(FILE).read_text(encoding="utf-8")
    lines = list(csv.DictReader(text.splitlines()))
    rows = published_scores()
    assert len(rows) == len(lines) > 2500
    for row, line in zip(rows, lines, strict=True):
        assert (row.source, row.model, row.task, row.protocol) == (
            line["source"], line["model"], line["task"], line["protocol_version"],
        )  # fmt: skip
        assert row.value == float(line["value"]) and row.sd == (float(line["sd"]) if line["sd"] else None)
    protocols = {row.protocol for row in rows}
    assert set(PROTOCOLS) <= protocols and {name for block in NEAREST.values() for name in block} <= set(PROTOCOLS)


# Parity targets of the present leaderboard: (set, model) -> value.
@pytest.mark.parametrize(
    ("dataset", "role", "model", "value"),
    [
        ("bach", "report", "kaiko ViT-S/16", 0.812),
        ("gleason", "report", "Midnight-12k", 0.800),
        ("pcam", "report", "kaiko ViT-S/16", 0.902),
        ("pcam", "select", "kaiko ViT-S/16", 0.905),
        ("mhist", "report", "Phikon", 0.803),
    ],
)
def test_the_nearest_protocol_comes_first(dataset: str, role: str, model: str, value: float) -> None:
    rows = published_beside(dataset, "linear", role, "balanced_accuracy", "cls")
    first = [row for row in rows if row.protocol == rows[0].protocol]
    assert rows[0].protocol == "eva-2025-03" and {row.embedding for row in first} == {"CLS"}
    assert [row.value for row in first if row.model == model] == [value]
    assert published_beside(dataset, "linear", role, "balanced_accuracy", "cls+mean")[0].protocol in (
        "midnight-fork-2025",
        "eva-2025-03",  # only eva reports the part that it selects on, where there is a test besides
    )


def test_a_split_and_a_metric_are_never_mixed() -> None:
    pcam = published_beside("pcam", "linear", "report", "balanced_accuracy", "cls")
    assert {row.split for row in pcam} == {"test"} and {row.metric for row in pcam} == {"balanced_accuracy"}
    assert {row.split for row in published_beside("pcam", "linear", "select", "balanced_accuracy", "cls")} == {"val_selected"}
    assert all(
        "selected on the reported split" in row.marks
        for row in published_beside("bach", "linear", "report", "balanced_accuracy", "cls")[:5]
    )
    assert published_beside("consep", "decoder", "report", "dice", "patch") == []  # pooled Dice is another number
    assert published_beside("consep", "decoder", "report", "monai_dice", "patch")[0].metric == "monai_dice_no_bg"
    for nothing in (
        ("bach", "knn", "report"),
        ("bach", "linear", "external"),
        ("own", "linear", "report"),
        ("tp53_v1", "linear", "report"),
    ):
        assert published_beside(*nothing, "balanced_accuracy", "cls") == []


def test_our_names_become_theirs() -> None:
    assert task_of("pcam", "few_shot/10") == "pcam_10shot" == task_of("pcam_10shot", "few_shot/10")
    assert (
        task_of("hest/LUNG") == "hest_luad" and task_of("hest/LYMPH_IDC") == "hest_lymph_idc" and task_of("hest") == "hest_avg9"
    )
    assert same_weights("hf:owkin/phikon") == "Phikon" and same_weights("hf:owkin/phikon-v2") == "Phikon-v2"
    assert same_weights("hf:MahmoodLab/UNI2-h") == "UNI2-h" and same_weights("runs/release") is None
    models = {row.model for row in published_scores()}
    assert set(SAME_WEIGHTS.values()) <= models


def test_a_column_shows_the_best_the_floors_and_the_same_weights() -> None:
    rows = published_beside("bach", "linear", "report", "balanced_accuracy", "cls")
    shown = nearest_column(rows, 2, ["hf:owkin/phikon", "runs/release"])
    assert [row.model for row in shown][:2] == [row.model for row in rows[:2]] and shown[-1].model == "Phikon" and len(shown) == 3
    midnight = nearest_column(published_beside("bach", "linear", "report", "balanced_accuracy", "cls+mean"), 1, [])
    assert [row.floor for row in midnight] == [False, True] and midnight[1].model == "ViT-g/14 random"


def test_marks_and_missing_numbers() -> None:
    line = "a note (via a third-party note; unverified),M,,CLS,bach,,balanced_accuracy,nan,,p\n"
    (row,) = read_published(HEAD + line)
    assert row.value is None and row.sd is None
    assert {"no value", "unverified", "secondary source", "split not stated"} == set(row.marks)
    assert published_beside("bach", "linear", "report", "balanced_accuracy", "cls", [row]) == []
    marked = [row for row in published_scores() if "unverified" in row.marks]
    assert len(marked) == sum("unverified" in row.source + row.metric for row in published_scores()) > 10
    assert all(row.value is not None and math.isfinite(row.value) for row in published_scores())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model,value\n", "columns model, value"),
        (HEAD + "s,m,,CLS,bach,test,balanced_accuracy,high,,p\n", "line 2: value is 'high'"),
        (HEAD + ",m,,CLS,bach,test,balanced_accuracy,0.5,,p\n", "line 2: source is empty"),
        (HEAD + "s,m,,CLS\n", "line 2: expected 10 fields"),
    ],
)
def test_a_damaged_file_names_the_line(text: str, words: str) -> None:
    with pytest.raises(PublishedError, match=words):
        read_published(text)
