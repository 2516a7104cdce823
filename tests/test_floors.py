"""Floors and comparison: the better of each, paired differences, reported labels that choose nothing, the command itself."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from histoscale.eval.compare import Comparison, compare
from histoscale.eval.datasets.patches import USAGE_OF_OWN, LabelledPatches
from histoscale.eval.features import Vectors
from histoscale.eval.floors import Calls, FloorsConfig, better, forest_log_probabilities
from histoscale.eval.probe import ProbeConfig
from histoscale.eval.scores.classification import balanced_accuracy
from histoscale.eval.scores.interval import IntervalConfig
from histoscale.launch.run import invoke

PROBE = ProbeConfig("cls+mean", [1.0, 0.1, 0.01], 0.1, 3, 1e-6, 2e-3, 500, 5, 0.07, 0)
FLOORS = FloorsConfig(initialisations=2, trees=20, leaf=2, seed=0)
INTERVAL = IntervalConfig(draws=100, level=0.95, seed=0)


def patches_of(seed: int = 0, train: int = 24, report: int = 24, external: int = 12) -> LabelledPatches:
    """Ten patches a patient, three classes."""
    rng = np.random.default_rng(seed)
    count = train + report + external
    roles = np.repeat(["train"] * train + ["report"] * report + ["external"] * external, 10)
    patients = np.repeat([f"P{i}" for i in range(count)], 10)
    labels = rng.integers(0, 3, 10 * count)
    return LabelledPatches("x", ("u", "v", "w"), labels, roles, patients, roles, "patient", 0.5, 8, "d", lambda rows: np.empty(0),
                           patients, roles, USAGE_OF_OWN)  # fmt: skip


def vectors(labels: np.ndarray, signal: float, seed: int, width: int = 6) -> Vectors:
    rng = np.random.default_rng(seed)
    centres = signal * np.eye(3, width)
    cls, mean = (rng.normal(size=(len(labels), width)) + centres[labels] for _ in range(2))
    return Vectors(cls.astype(np.float32), mean.astype(np.float32))


def comparison(patches: LabelledPatches, **changes: Any) -> Comparison:
    y = patches.labels
    found: dict[str, Any] = {"pretrained": vectors(y, 2.0, 1), "colour": vectors(y, 0.3, 4)}
    found["untrained"] = [vectors(y, 0.5, 2), vectors(y, 0.6, 3)]
    return compare(**{**found, **changes}, patches=patches, probe=PROBE, floors=FLOORS, interval=INTERVAL)


def test_the_summary_says_what_issue_and_report_rely_on() -> None:
    summary = comparison(patches_of()).summary()
    for name in ("pretrained", "random", "colour"):
        for place in (summary, summary["knn"], summary["external"], summary["knn"]["external"]):
            row = place[name]
            assert row["low"] < row["balanced_accuracy"] < row["high"]
    for name in ("random", "colour"):
        gap = summary[f"pretrained_minus_{name}"]
        assert gap["value"] == pytest.approx(summary["pretrained"]["balanced_accuracy"] - summary[name]["balanced_accuracy"])
        assert 0 < gap["low"] < gap["value"] < gap["high"]
    assert summary["pretrained"]["patients"] == 24 and summary["penalty"] in PROBE.penalties
    assert summary["external"]["pretrained"]["note"].startswith("warning: 12 patients")
    assert np.sum(summary["pretrained"]["confusion"]) == 240
    random = summary["random"]
    assert len(random["initialisations"]) == 2
    assert random["balanced_accuracy"] == pytest.approx(np.mean(random["initialisations"]))


def test_an_encoder_that_is_its_own_floor_differs_by_exactly_nothing() -> None:
    patches = patches_of()
    same = vectors(patches.labels, 1.0, 5)
    only_mean = Vectors(np.zeros_like(same.cls), same.mean)  # CLS is empty, so the better pooling is the pretrained's own
    found = comparison(patches, pretrained=only_mean, untrained=[only_mean, only_mean]).summary()
    assert found["random"]["how"] == "cls+mean"
    gap = found["pretrained_minus_random"]
    assert gap["low"] == gap["value"] == gap["high"] == 0


def test_the_random_floor_averages_and_takes_the_better_pooling() -> None:
    patches = patches_of()
    cls_only = vectors(patches.labels, 2.0, 6)
    noise = np.random.default_rng(0).normal(size=(len(patches), 200)).astype(np.float32)
    found = comparison(patches, untrained=[Vectors(cls_only.cls, noise)] * 2)
    assert found.calls["random"]["linear", "report"].how == "cls"


def test_reported_labels_decide_no_probe() -> None:
    patches = patches_of()
    rows = patches.rows("report")
    shuffled = patches.labels.copy()
    shuffled[rows] = np.random.default_rng(1).permutation(shuffled[rows])
    fixed = {"pretrained": vectors(patches.labels, 1.0, 1), "untrained": [], "colour": vectors(patches.labels, 0.3, 4)}
    first = comparison(patches, **fixed)
    second = comparison(replace(patches, labels=shuffled), **fixed)
    for cell, calls in first.calls["pretrained"].items():
        np.testing.assert_array_equal(calls.logs, second.calls["pretrained"][cell].logs)
    assert first.scores["pretrained", "linear", "report"].value > second.scores["pretrained", "linear", "report"].value
    assert "no random floor" in first.notes[0] and "random" not in first.summary()


def test_statistics_of_calls_are_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    calls, labels = Calls(rng.normal(size=(4, 50, 3)), "x"), rng.integers(0, 3, 50)
    for rows in (np.arange(50), rng.integers(0, 50, 50), np.flatnonzero(labels < 2)):
        expected = np.mean([balanced_accuracy(labels[rows], predicted[rows], 3) for predicted in calls.predicted])
        assert calls.statistic(labels)(rows) == pytest.approx(expected)
    right = Calls(np.eye(3)[labels][None], "right")
    assert better([calls, right], labels) is right and right.balanced_accuracy(labels) == 1


def test_the_forest_is_seeded_and_tolerates_an_absent_class() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 5)), rng.integers(0, 2, 60) * 2
    x[:, 0] += labels
    first, again = (forest_log_probabilities(x, labels, 3, [x], FLOORS)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (60, 3) and np.isneginf(first[:, 1]).all() and (first.argmax(1) == labels).mean() > 0.9


@pytest.fixture
def own_set(tmp_path: Path) -> Path:
    """Stripes across or along, 26 patients each in train and test, and a tiny release."""
    rng = np.random.default_rng(0)
    rows = []
    (tmp_path / "img").mkdir()
    for i in range(156):
        stripes = np.tile(np.where(np.arange(16) % 4 < 2, 90, 200), (16, 1))
        image = (stripes.T if i % 2 else stripes)[..., None] + rng.normal(0, 20, (16, 16, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / f"img/{i}.png")
        split = "train" if i < 78 else "test"
        rows.append({"path": f"img/{i}.png", "label": "across along".split()[i % 2], "split": split, "patient_id": f"P{i // 3}"})
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **args)
    (tmp_path / "release").mkdir()
    save_file(vit.state_dict(), tmp_path / "release/model.safetensors")
    data = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"architecture": "vit_tiny_patch16_224", "num_features": 24, "model_args": args, "pretrained_cfg": data}
    (tmp_path / "release/config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_command_says_the_same_twice(own_set: Path) -> None:
    summaries = []
    for number in range(2):
        out = own_set / f"out{number}"
        arguments = [f"encoder={own_set}/release", "dataset=folder", f"data_root={own_set}", "interval.draws=200",
                     "floors.trees=20", "dataset.mpp=0.5", "logging.progress=off", "device=cpu", f"out={out}"]  # fmt: skip
        invoke("probe", arguments)
        summaries.append(json.loads((out / "summary.json").read_text())["probe"])
    assert summaries[0] == summaries[1]
    first = summaries[0]
    assert first["pretrained"]["balanced_accuracy"] > first["colour"]["high"]  # colours cannot tell the direction of stripes
    assert len(first["random"]["initialisations"]) == 5 and first["effective_mpp"] == 0.5 and first["groups"] == "patient"
    assert (own_set / "out0/config.yaml").exists()
