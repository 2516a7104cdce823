"""A `mil` that is killed goes on behind the models that it had trained, to the same bits."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mil_fixtures import ABMIL, SPLIT, TASK, cohort, features_of, fit_config

from histoscale.data.journal import Progress
from histoscale.eval.mil.arms import Arm, train
from histoscale.eval.mil.bags import Bags, read_bags
from histoscale.eval.mil.kept import Kept
from histoscale.eval.mil.split import make_plan
from histoscale.launch.run import execute

CONFIG = fit_config(ABMIL, epochs=2, repeats=1)


class Counted(Progress):
    """How often models really trained an epoch: loaded ones advance at once."""

    def __init__(self) -> None:
        super().__init__(1, "fit", "epochs", "off", 10)
        self.trained = 0

    def advance(self, n: int = 1, **shown: float | str) -> None:
        self.trained += bool(shown)


def _outputs(bags: Bags, folder: Path | None) -> tuple[np.ndarray, int]:
    progress = Counted()
    found = train(Arm(bags, features_of(bags), CONFIG), make_plan(bags, SPLIT), TASK, progress, folder)
    return found.outputs, progress.trained


def test_a_kept_model_is_taken_only_by_what_it_was_made_of(tmp_path: Path) -> None:
    slides = cohort(tmp_path / "stores")
    bags = read_bags(tmp_path / "stores", slides, TASK, "patient")
    fresh, epochs = _outputs(bags, None)
    assert epochs == CONFIG.folds * CONFIG.epochs
    for expected in (epochs, 0):  # written, then read
        found, trained = _outputs(bags, tmp_path / "kept")
        np.testing.assert_array_equal(found, fresh)
        assert trained == expected
    (tmp_path / "kept/0/1.safetensors").write_bytes((tmp_path / "kept/0/0.safetensors").read_bytes()[:-40])  # cut short
    found, trained = _outputs(bags, tmp_path / "kept")
    np.testing.assert_array_equal(found, fresh)
    assert trained == CONFIG.epochs
    with h5py.File(tmp_path / "stores" / f"{slides[0].slide_id}.h5", "a") as file:  # it trains
        file["features"][0, 0] += 5
    changed, trained = _outputs(read_bags(tmp_path / "stores", slides, TASK, "patient"), tmp_path / "kept")
    assert trained == epochs and not np.array_equal(changed, fresh, equal_nan=True)


def test_a_model_of_other_things_is_none(tmp_path: Path) -> None:
    state = {"weight": torch.arange(6.0).reshape(2, 3).T}
    Kept.of(tmp_path, ["a", 1]).save(3, state)
    found = Kept.of(tmp_path, ["a", 1]).load(3)
    assert found is not None and torch.equal(found["weight"], state["weight"])
    assert Kept.of(tmp_path, ["a", 2]).load(3) is None and Kept.of(tmp_path, ["a", 1]).load(4) is None
    (tmp_path / "5.partial").mkdir()
    with pytest.raises(OSError, match=r"5\.partial cannot be written .* the same command goes on"):
        Kept.of(tmp_path, ["a", 1]).save(5, state)


def test_a_killed_study_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """SIGKILL while models train, in a real process; the same command then trains the rest alone, to the same bytes."""
    slides = cohort(tmp_path / "stores")
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "uri", "patient_id", "site", "tumour", "role"])
        writer.writerows([s.slide_id, s.uri, s.patient_id, s.site, s.labels["tumour"], s.labels["role"]] for s in slides)
    few = ("mil.epochs=6", "mil.repeats=5", "mil.folds=3", "interval.draws=100", "logging.progress=lines", "logging.interval_s=0")
    given = [f"embeddings={tmp_path / 'stores'}", f"manifest={tmp_path / 'manifest.csv'}", *few]
    command = [sys.executable, "-m", "histoscale.launch.cli", "mil", *given, f"out={tmp_path / 'killed'}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as run:
        assert run.stderr is not None
        next(line for line in run.stderr if line.startswith("slide models: 97/"))  # in the mean pooling's second model of 15
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    kept = [path.parent.parent.name for path in tmp_path.glob("killed/trained/*/*/*.safetensors")]
    assert kept.count("model") == 15 and 1 <= kept.count("mean_pooling") < 15
    again = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert again.returncode == 0, again.stderr
    assert f"{len(kept)} models are trained already" in again.stderr
    assert not (tmp_path / "killed/trained").exists()
    torch.set_num_threads(1)
    assert execute("mil", [*given, f"out={tmp_path / 'whole'}"]) == 0
    for name in ("scores.csv", "model/model.safetensors", "model/config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
