"""Cells that a spreadsheet would run are written so that it does not, and every text comes back as it was."""

import csv
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from histoscale.data.delimited import read_delimited
from histoscale.data.manifest import read_manifest
from histoscale.data.names import tidy
from histoscale.data.spreadsheet import meant, read_table, shown, write_table
from histoscale.data.storage import Store
from histoscale.eval.cohorts.cohort import Cohort, write_manifest

RUN = [
    "=1+1",
    "=cmd|' /C calc'!A0",
    "+1+cmd",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "＝1+1",
    "'=1",
    "''@x",
    "-x",
    "+",
]
SAFE = ["-0.5", "+3", "-1e-05", "-.5", "1", "a=b", "P-1", "'quoted'", "", "nan", "x@y"]
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(texts | st.sampled_from(RUN + SAFE))
@example("'=")
def test_every_text_comes_back(text: str) -> None:
    cell = shown(text)
    assert meant(cell) == text
    first = cell.lstrip(" ")[:1]
    assert first not in ("=", "@", "\t", "\r", "\n", "＝", "＠") and (first not in ("+", "-") or abs(float(cell)) >= 0)


@pytest.mark.parametrize("text", RUN)
def test_what_would_be_run_is_a_text(text: str) -> None:
    assert shown(text) == f"'{text}" and meant(shown(text)) == text


@pytest.mark.parametrize("text", SAFE)
def test_numbers_and_other_texts_stay(text: str) -> None:
    assert shown(text) == text and meant(text) == text


def test_numbers_are_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_table(path, ["=a", "b", "c"], [{"=a": -0.5, "b": float("-inf"), "c": None}, {"=a": -3, "b": "-inf", "c": "@"}])
    assert path.read_bytes() == b"'=a,b,c\r\n-0.5,-inf,\r\n-3,'-inf,'@\r\n"
    assert read_table(path) == [{"=a": "-0.5", "b": "-inf", "c": ""}, {"=a": "-3", "b": "-inf", "c": "@"}]
    path.write_text("a,b\r\n1\r\n")
    with pytest.raises(ValueError, match="t.csv is no whole table"):
        read_table(path)
    path.write_text("")
    assert read_table(path) == []
    with pytest.raises(ValueError, match="dict contains fields not in fieldnames"):
        write_table(path, ["a"], [{"b": 1}])
    assert [each.name for each in tmp_path.iterdir()] == ["t.csv"]


def test_manifests_carry_them_to_the_slides(tmp_path: Path, store: Store) -> None:
    """As a published table may name a patient or a label."""
    told = [text.strip() for text in RUN if text.strip() not in ("", "+")]
    rows = [{"slide_id": f"s{i}", "uri": f"s{i}.tif", "patient_id": text, "site": "a", "=label": text, "score": "-0.5"}
            for i, text in enumerate(told)]  # fmt: skip
    write_manifest(tmp_path / "m.csv", Cohort("c", tuple(rows), (), {}, {}, ()))
    with (tmp_path / "m.csv").open(newline="") as file:
        assert not [cell for row in csv.reader(file) for cell in row if cell.strip()[:1] in "=+-@＝" and cell != "-0.5"]
    slides = read_manifest(str(tmp_path / "m.csv"), store)
    assert [slide.patient_id for slide in slides] == [tidy(row["patient_id"]) for row in rows]  # in one form of Unicode
    assert {slide.labels["score"] for slide in slides} == {"-0.5"}
    assert [slide.labels["=label"] for slide in slides] == [row["=label"] for row in rows]


def test_tables_that_people_type_are_read_as_before() -> None:
    found = read_delimited(b"slide_id;note\n'a';it's\nb;-0.5\n", "t.csv", ["slide_id"]).rows
    assert [row for _, row in found] == [{"slide_id": "'a'", "note": "it's"}, {"slide_id": "b", "note": "-0.5"}]
