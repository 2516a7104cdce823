"""Slides without a usable store: the true reason of each, counted by part and hospital, before anything trains."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from mil_fixtures import SPLIT, TASK, cohort, slide

from histoscale.eval import stores
from histoscale.eval.mil.absent import Lack, absent_slides
from histoscale.eval.mil.bags import BagError, read_bags
from histoscale.eval.mil.split import FoldSplit, SiteSplit, side_of
from histoscale.eval.stores import open_store, read_features

SPOILT = "s2-0"


def _edited(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            change(file)

    return apply


def _renamed(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file.move("features", "feats")


def _pickled(path: Path) -> None:
    path.unlink()
    path.with_suffix(".pt").write_bytes(b"PK")


def _suffixed(path: Path) -> None:
    path.rename(path.with_name(f"{path.stem.upper()}.svs.h5"))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("elsewhere.h5")


def _given_up(path: Path) -> None:
    path.unlink()
    (path.parent / "state.json").write_text(json.dumps({"command": "embed", "status": "done"}))
    (path.parent / "summary.json").write_text(json.dumps({"embed": {"failed": {path.stem: "tile 3 is damaged"}}}))


REASONS: list[tuple[Callable[[Path], None], str]] = [
    (_renamed, "its store has no dataset features (it holds coords, feats)"),
    (lambda path: path.write_bytes(path.read_bytes()[:-200]), "its store is no whole HDF5 file (cut short)"),
    (lambda path: path.write_bytes(b""), "its store is an empty file"),
    (lambda path: path.write_bytes(b"text"), "its store is no whole HDF5 file (its signature is missing)"),
    (_folder, "its store is a folder"),
    (_edited(lambda file: file.attrs.update(slide_id="x")), "its store holds the slide 'x' by its own account"),
    (_pickled, "no embedding store: a .pt file lies there, and pickles are not opened; write its tensors into an .h5"),
    (_suffixed, "no embedding store of its name: is it S2-0.svs.h5? Rename the one or the other"),
    (_dangling, "its store is a link to a file that is not there"),
    (_given_up, "no embedding store: embed gave the slide up (tile 3 is damaged)"),
    (Path.unlink, "no embedding store"),
]


@pytest.mark.parametrize(("harm", "why"), REASONS, ids=[why.split(":")[0][:40] for _, why in REASONS])
def test_the_reason_is_the_true_one(tmp_path: Path, harm: Callable[[Path], None], why: str) -> None:
    slides = cohort(tmp_path, patients=8)
    harm(tmp_path / f"{SPOILT}.h5")
    assert read_bags(tmp_path, slides, TASK, "patient").left_out == {SPOILT: why}


def test_a_store_that_another_process_writes_to_is_an_error_and_no_damage(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=8)
    hold = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / f"{SPOILT}.h5")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdin is not None
        assert writer.stdout.readline() == b"held\n"
        with pytest.raises(BagError, match=rf"{SPOILT}\.h5 is locked by another process, .* wait until it is done"):
            read_bags(tmp_path, slides, TASK, "patient")
        writer.stdin.close()
    assert len(read_bags(tmp_path, slides, TASK, "patient").rows) == 16


def test_a_store_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides, opened = cohort(tmp_path, patients=8), h5py.File

    def refusing(path: Path, mode: str) -> h5py.File:  # root, as whom tests may run, may read everything
        if Path(path).stem == SPOILT:
            raise PermissionError(errno.EACCES, "Unable to open file", str(path))
        return opened(path, mode)

    monkeypatch.setattr(h5py, "File", refusing)
    monkeypatch.setattr(stores._examiner, "ask", stores.answer)  # in this process
    assert read_bags(tmp_path, slides, TASK, "patient").left_out == {SPOILT: "its store may not be read (permission denied)"}


def test_one_tile_without_a_side_is_enough_to_train_on(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = np.ones((1, 6), np.float32), np.array([[64, 128]])
    assert (open_store(path).tiles, open_store(path).size_px) == (1, 0)
    assert read_features(path).shape == (1, 6)


def test_stores_of_an_unfinished_embed_are_refused_unless_allowed(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=8)
    for status in ("running", "preempted", "failed"):
        (tmp_path / "state.json").write_text(json.dumps({"command": "embed", "status": status}))
        with pytest.raises(BagError, match=rf"not finished \(it is {status}; 16 of the 16 .*allow_unfinished=true"):
            read_bags(tmp_path, slides, TASK, "patient")
        assert len(read_bags(tmp_path, slides, TASK, "patient", unfinished=True).rows) == 16
    for other in ('{"command": "embed", "status": "done"}', '{"status": "running"}', "no JSON", "[1]"):
        (tmp_path / "state.json").write_text(other)
        assert len(read_bags(tmp_path, slides, TASK, "patient").rows) == 16


def test_what_is_absent_is_counted_by_part_and_hospital(tmp_path: Path) -> None:
    slides = [*cohort(tmp_path, patients=8), slide("nolabel", "q", "site0", role="train"), slide("p", "q", "z", tumour="1")]
    for name in ("s3-0", "s3-1", "s7-0", "s2-1"):  # three external, one test
        (tmp_path / f"{name}.h5").unlink()
    bags = read_bags(tmp_path, slides, TASK, "patient")
    found = absent_slides(bags, slides, TASK, SPLIT, False)
    assert found.parts == {"train": Lack(0, 8), "internal test": Lack(1, 4), "external": Lack(3, 4)}
    assert found.sites["out"] == Lack(3, 4) and sum(lack.of for lack in found.sites.values()) == found.labelled == 16
    assert found.sentence.startswith("4 of the 16 labelled slides have no usable store")
    assert "external 3 of 4, internal test 1 of 4" in found.sentence and "out 3 of 4" in found.sentence
    assert found.words[1:] == ["  no embedding store: 4 (s2-1, s3-0, s3-1 and 1 more)"]
    there = [one for one in slides if (tmp_path / f"{one.slide_id}.h5").exists()]
    nothing = absent_slides(read_bags(tmp_path, there, TASK, "patient"), there, TASK, SPLIT, False)
    assert not nothing.why and nothing.sentence == "" and nothing.words == []
    halting = absent_slides(bags, slides, TASK, SPLIT, True).sentence
    assert halting == f"{found.sentence} The embed of these stores has not finished."


def test_every_split_knows_a_side_for_a_slide_that_it_never_saw() -> None:
    folds, sites = FoldSplit("folds", "patient", None, 3, ["far"], 0), SiteSplit("sites", "patient", None, None, 0)
    drawn = replace(SPLIT, role=None, external_sites=["far"])
    assert [side_of("far", {}, split) for split in (folds, sites, drawn)] == ["external", "every hospital in turn", "external"]
    assert [side_of("near", {}, split) for split in (folds, drawn)] == ["inside (train or test)"] * 2
    assert [side_of("near", {"role": role}, SPLIT) for role in ("train", " Test", "x")] == ["train", "internal test", ""]
    assert side_of(" FAR", {}, folds) == "external"  # as the split reads it
