"""Joining stores and manifest: what is left out by name, what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mil_fixtures import TASK, cohort, slide, write_store

from histoscale.data.splits import SplitError
from histoscale.eval.mil.bags import BagError, read_bags
from histoscale.eval.mil.task import ClassesTask, RegressionTask, SurvivalTask, TaskError
from histoscale.eval.stores import StoreError


def test_rows_and_what_is_left_out(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=8)
    slides += [slide("nolabel", "q1", "site0", role="train"), slide("nostore", "q2", "site0", tumour="1")]
    (tmp_path / "s1-0.h5").write_bytes((tmp_path / "s1-0.h5").read_bytes()[:500])
    bags = read_bags(tmp_path, slides, TASK, "patient")
    assert bags.left_out == {
        "nolabel": "no value in tumour",
        "nostore": "no embedding store",
        "s1-0": "its store is no whole HDF5 file (cut short)",
    }
    assert len(bags.rows) == 15 and bags.encoder == "abc" and bags.width == 12 and bags.groups == "patient"
    bag = bags.rows[0]
    assert (bag.slide_id, bag.group, bag.site, bag.label, bag.event) == ("s0-0", "p0", "site0", 0, True)
    assert bag.tiles_um2 == pytest.approx(bag.tiles * 16**2) and bag.columns["role"] == "train"


def test_one_patient_has_one_group_however_it_is_spelt(tmp_path: Path) -> None:
    """Else inner folds would train on a patient and score the same one as never seen."""
    slides = [replace(one, patient_id=str(one.patient_id).upper() if i % 2 else one.patient_id)
              for i, one in enumerate(cohort(tmp_path, patients=4))]  # fmt: skip
    assert len({one.patient_id for one in slides}) == 8
    assert {bag.group for bag in read_bags(tmp_path, slides, TASK, "patient").rows} == {"p0", "p1", "p2", "p3"}


def test_targets_and_events_by_row(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=4)
    bags = read_bags(tmp_path, slides, SurvivalTask("survival", "t", "time", "event", "slide"), "patient")
    assert bags.targets([0, 3]).tolist() == [float(slides[i].labels["time"]) for i in (0, 3)]
    assert bags.events(range(8)).tolist() == [s.labels["event"] == "1" for s in slides]


def test_patients_are_needed_or_their_absence_is_said(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=4)
    slides[0] = replace(slides[0], patient_id=None)
    with pytest.raises(SplitError, match="set split.unit=slide"):
        read_bags(tmp_path, slides, TASK, "patient")
    alone = read_bags(tmp_path, slides, TASK, "slide")
    assert alone.groups == "slide" and alone.rows[0].group == "s0-0"


def test_bad_labels_and_stores_are_named(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=4)
    with pytest.raises(TaskError, match="no label column 'stage'; it has event, grade"):
        read_bags(tmp_path, slides, replace(TASK, label="stage"), "patient")
    with pytest.raises(BagError, match="holds no store"):
        read_bags(tmp_path / "nothing", slides, TASK, "patient")
    write_store(tmp_path, "s1-0", np.zeros((3, 12)), encoder="other")
    with pytest.raises(BagError, match="embed all slides with one encoder"):
        read_bags(tmp_path, slides, TASK, "patient")
    write_store(tmp_path, "s1-0", np.zeros((3, 12)), mpp=0.25)
    with pytest.raises(BagError, match="s1-0 was embedded at 0.25 um/px"):
        read_bags(tmp_path, slides, TASK, "patient")
    with pytest.raises(StoreError, match="leaves|file name"):
        read_bags(tmp_path, [replace(slides[0], slide_id="../s0-0")], TASK, "patient")


def test_one_decision_needs_one_target(tmp_path: Path) -> None:
    """Highest grades and mean numbers make sense; the mean of two times or of two kinds does not, and that is said at once."""
    slides = cohort(tmp_path, patients=4)
    kinds = ClassesTask("classes", "t", "grade", {"a": ["a"], "b": ["b"], "c": ["c"]}, False, "patient")
    for task in (kinds, SurvivalTask("survival", "t", "time", "event", "patient")):
        with pytest.raises(BagError, match="s0-0 and s0-1 of p0 bear different values"):
            read_bags(tmp_path, slides, task, "patient")
        read_bags(tmp_path, slides, replace(task, decision="slide"), "patient")
    read_bags(tmp_path, slides, replace(kinds, ordered=True), "patient")
    read_bags(tmp_path, slides, RegressionTask("regression", "t", "number", "patient"), "patient")


def test_none_but_corrupt_stores_is_an_error(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=1)
    for each in slides:
        (tmp_path / f"{each.slide_id}.h5").write_bytes(b"cut short")
    with pytest.raises(BagError, match=r"signature is missing\): 2 \(s0-0, s0-1\)"):
        read_bags(tmp_path, slides, TASK, "patient")
