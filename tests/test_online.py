"""Online probes: what the probe command would say of the same weights, the same on any number of ranks, and without a trace."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import online_ranks
import pytest
import torch
import train_tiny
from PIL import Image

from histoscale.data.ranks import Ranks
from histoscale.eval.architecture import untrained
from histoscale.eval.datasets.patches import DatasetError
from histoscale.eval.encoder import encoder_of
from histoscale.eval.knn import knn_log_probabilities
from histoscale.eval.logistic import Standard
from histoscale.eval.online import Online, chosen_patches
from histoscale.eval.probe import fit_linear
from histoscale.launch.run import invoke
from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors
from histoscale.pretrain.preempted import Preempted
from histoscale.pretrain.trainer import train

ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)
PROGRAM = Path(__file__).with_name("online_ranks.py")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def online(out: Path, every: int = 4, steps: int = 8, **changed: Any) -> Online:
    return online_ranks.watcher(out, ALONE, every, steps, **changed)


def test_a_probe_says_what_the_probe_command_would(tmp_path: Path) -> None:
    watcher = online(tmp_path, initialisations=0)
    model = untrained(online_ranks.ARCHITECTURE, 7)
    row = watcher(model, 4)
    patches, config = watcher.patches, watcher.config.probe
    encoder = encoder_of(model, online_ranks.ARCHITECTURE, "x", torch.device("cpu"), "fp32")
    cls, mean = encoder.vectors(torch.from_numpy(patches.read(np.arange(len(patches)))))
    x = torch.cat([cls, mean], 1).numpy()
    train_rows, report = patches.rows("train"), patches.rows("report")
    labels = patches.labels
    linear = fit_linear(x[train_rows], labels[train_rows], 3, patches.patients[train_rows], config)
    standard = Standard.of(x[train_rows])
    near = knn_log_probabilities(
        standard(x[train_rows]), labels[train_rows], 3, standard(x[report]), config.neighbours, config.temperature
    )
    for name, logs in (("linear", linear.log_probabilities(x[report])), ("knn", near)):
        right = logs.argmax(1) == labels[report]
        expected = np.mean([right[labels[report] == c].mean() for c in range(3)])
        assert row[f"online/{name}"] == pytest.approx(expected, abs=1e-9)
    assert row["online/linear"] > 0.45  # a third is chance: these patches can be told apart


def test_it_looks_at_its_interval_at_the_start_and_at_the_end(tmp_path: Path) -> None:
    watcher = online(tmp_path, every=4, steps=10, initialisations=1)
    model = untrained(online_ranks.ARCHITECTURE, 7)
    found = [step for step in range(11) if watcher(model, step)]
    assert found == [0, 4, 8, 10]
    kept = sorted(file.name for file in (tmp_path / "online").iterdir())
    assert kept == ["random-0.npz", "step-0.npz", "step-10.npz", "step-4.npz", "step-8.npz"]


def test_the_summary_is_the_mean_of_the_last_three_beside_the_floor(tmp_path: Path) -> None:
    watcher = online(tmp_path, every=1, steps=4)
    models = [untrained(online_ranks.ARCHITECTURE, 10 + step) for step in range(5)]
    rows = [watcher(model, step) for step, model in enumerate(models)]
    found = watcher.summary()
    assert found["steps"] == [0, 1, 2, 3, 4] and found["linear"]["points"] == [row["online/linear"] for row in rows]
    last, random = found["linear"]["last"]["value"], found["linear"]["random"]
    assert last == pytest.approx(np.mean([row["online/linear"] for row in rows[2:]]))
    assert found["linear"]["last_minus_random"]["value"] == pytest.approx(last - random)
    assert rows[0]["online/linear"] - rows[0]["online/linear_above_random"] == pytest.approx(random)
    assert found["linear"]["last_minus_random"]["low"] < last - random < found["linear"]["last_minus_random"]["high"]
    again = online(tmp_path, every=1, steps=4)  # another process, which continues the run
    assert again.summary() == found
    other = online(tmp_path, every=1, steps=4, patches=60)
    assert other.summary()["steps"] == []


def test_a_floor_of_the_same_weights_is_not_beaten(tmp_path: Path) -> None:
    """The encoders of the floor, probed as if they had been trained, are as good as the floor to the last bit."""
    watcher = online(tmp_path, every=1, steps=2, initialisations=3)
    for step in range(3):
        watcher(untrained(online_ranks.ARCHITECTURE, step), step)
    found = watcher.summary()
    pools = {name: floor.how for name, floor in watcher.floor().items()}
    for name in ("linear", "knn"):
        difference = found[name]["last_minus_random"]
        assert difference["value"] <= 1e-12
        if pools[name] == "cls+mean":
            assert difference["low"] == difference["high"] == pytest.approx(0, abs=1e-12)
    assert "cls+mean" in pools.values()


def test_patches_are_dealt_out_evenly() -> None:
    patches = online_ranks.labelled()
    few = chosen_patches(patches, 120, 0)
    for role in ("train", "report"):
        rows = few.rows(role)
        cells = [f"{patient} {label}" for patient, label in zip(few.patients[rows], few.labels[rows], strict=True)]
        _, counts = np.unique(cells, return_counts=True)
        assert len(rows) == 60 and len(counts) == 36 and max(counts) - min(counts) == 1
    assert chosen_patches(patches, 120, 0).hash == few.hash != chosen_patches(patches, 120, 1).hash
    assert len(chosen_patches(patches, 10**6, 0)) == len(patches)
    with pytest.raises(DatasetError, match="online.patches is 1"):
        chosen_patches(patches, 1, 0)


@pytest.mark.parametrize("every", [0, -4])
def test_an_interval_that_never_comes_is_refused(tmp_path: Path, every: int) -> None:
    with pytest.raises(ValueError, match="labelled_every"):
        online(tmp_path, every=every)


def test_looking_leaves_no_trace_in_training(tmp_path: Path) -> None:
    config = train_tiny.with_keys(train_tiny.CONFIG, **{"schedule.steps": 6, "checkpoint.every": 3, "monitor.every": 2})
    source = train_tiny.synthetic(0, config, ALONE)
    runs = []
    for name in ("blind", "seeing"):
        out = tmp_path / name
        watchers = [online(out, every=2, steps=6, initialisations=2)] if name == "seeing" else []
        train(config, source, watchers, train_tiny.journal_in(out, ALONE), ALONE, {})
        runs.append(read_tensors(read_checkpoint(out / "checkpoints/step-6"), ""))
    assert [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])] == []
    rows = [json.loads(line) for line in (tmp_path / "seeing/metrics.jsonl").read_text().splitlines()]
    probed = [row["step"] for row in rows if "online/knn" in row]
    assert probed == [0, 2, 4, 6] and "loss" not in rows[0]


def test_a_stopped_run_has_every_point(tmp_path: Path) -> None:
    config = train_tiny.with_keys(train_tiny.CONFIG, **{"schedule.steps": 6, "checkpoint.every": 3, "monitor.every": 2})
    points = []
    for name in ("whole", "stopped"):
        out, source = tmp_path / name, train_tiny.synthetic(0, config, ALONE)
        if name == "stopped":
            with pytest.raises(Preempted):
                watcher = online(out, every=2, steps=6, initialisations=2)
                stopping = train_tiny.kill_at(3, source, 15)
                train(config, stopping, [watcher], train_tiny.journal_in(out, ALONE), ALONE, {})
        watcher = online(out, every=2, steps=6, initialisations=2)
        train(config, source, [watcher], train_tiny.journal_in(out, ALONE), ALONE, {})
        points.append(watcher.summary())
    assert points[0] == points[1] and points[0]["steps"] == [0, 2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_says_the_same(tmp_path: Path, world: int) -> None:
    """Features are embedded in shares and penalties tried in shares: the sums of products may round otherwise, no more."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(PROGRAM)]
    paths = [str(PROGRAM.parent), os.environ.get("PYTHONPATH")]  # PYTHONSAFEPATH hides the folder of a program
    siblings = os.pathsep.join(path for path in paths if path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": siblings}
    subprocess.run([*command, str(tmp_path / "many")], env=environment, check=True, timeout=300)
    alone = online_ranks.run(tmp_path / "one", ALONE)
    assert alone.pop("read") == 180
    for rank in range(world):
        row = json.loads((tmp_path / "many" / f"rank-{rank}.json").read_text())
        assert row.pop("read") == -(-180 // world)  # a share each, however often it looks
        assert row.keys() == alone.keys()
        assert {name: value for name, value in row.items() if "seconds" not in name} == pytest.approx(
            {name: value for name, value in alone.items() if "seconds" not in name}, abs=0.02
        )
    ours, theirs = (np.load(tmp_path / name / "online/step-0.npz") for name in ("one", "many"))
    for cell in ("linear cls+mean", "knn cls+mean"):
        assert np.abs(np.exp(ours[cell]) - np.exp(theirs[cell])).max() < 1e-3


SMALL = [
    "recipe=demo", "sampler.patch_px=32", "views.global_px=32", "views.local_px=16", "views.local_count=2", "model.img_size=32",
    "model.width=48", "model.depth=2", "method.head.prototypes=32", "method.head.hidden=64", "method.group=4",
    "method.koleo_pool=4", "method.kde_pool=4", "optim.global_batch=8", "schedule.steps=4", "schedule.warmup_steps=1",
    "monitor.every=1", "stream.workers=0", "stream.threads=1", "hardware.device=cpu", "hardware.threads=1",
    "precision=bf16", "logging.progress=lines",
]  # fmt: skip


def images(folder: Path, splits: tuple[str, ...]) -> Path:
    """`<folder>/<split>/<class>/<image>`: the textures, and slides of ready tiles where there is one split."""
    patches = online_ranks.labelled()
    pixels = patches.read(np.arange(96)).transpose(0, 2, 3, 1)
    for i, patch in enumerate(pixels):
        place = folder / splits[i // 3 % len(splits)] / "abc"[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(patch).save(place / f"{i}.png")
    return folder


def test_pretrain_probes_a_labelled_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiles, labelled = images(tmp_path / "tiles", ("x",)), images(tmp_path / "labelled", ("train", "test"))
    keys = [f"monitor.labelled={labelled}", "monitor.labelled_every=2", "dataset@online.dataset=folder",
            "online.dataset.report=test", "online.initialisations=1", "online.probe.folds=3"]  # fmt: skip
    found = invoke("pretrain", [*SMALL, f"tiles={tiles}", f"out={tmp_path / 'run'}", *keys])["pretrain"]["online"]
    assert found["steps"] == [0, 2, 4] and len(found["linear"]["points"]) == 3 and found["groups"] == "none"
    assert found["linear"]["last_minus_random"]["low"] < found["linear"]["last_minus_random"]["high"]
    assert "step 0: kNN" in (said := capfd.readouterr().err) and "labelled, linear probe: mean of the last 3" in said
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "online/linear_above_random" in row] == [0, 2, 4]
    with pytest.raises(ValueError, match="labelled_every=3 is not a multiple of monitor.every=2"):
        invoke(
            "pretrain", [*SMALL, f"tiles={tiles}", f"out={tmp_path / 'b'}", *keys, "monitor.every=2", "monitor.labelled_every=3"]
        )


def test_without_a_labelled_set_the_run_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiles = images(tmp_path / "tiles", ("x",))
    found = invoke("pretrain", [*SMALL, f"tiles={tiles}", f"out={tmp_path / 'run'}", "schedule.steps=2"])["pretrain"]
    assert "online" not in found and "monitor.labelled= names no labelled set" in capfd.readouterr().err
