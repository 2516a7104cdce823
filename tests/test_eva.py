"""protocol=eva: patience of every set, the trajectory of a plain torch loop, first best kept, torchmetrics' monitor."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from histoscale.eval import eva as module
from histoscale.eval.datasets.patches import LabelledPatches, Usage
from histoscale.eval.eva import EvaConfig, eva, patience, train_heads

ROOT = Path(__file__).resolve().parents[1]
VALUES = yaml.safe_load((ROOT / "configs/eva/default.yaml").read_text())
CONFIG = EvaConfig(**{**VALUES, "betas": tuple(VALUES["betas"])})
SMALL = replace(CONFIG, steps=60, batch=64, runs=3, patience_share=1)
SHOTS = {**yaml.safe_load((ROOT / "configs/eva/ten_shot.yaml").read_text())}
SHOTS.pop("defaults")


def data(seed: int, classes: int, n: int = 150, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return (rng.normal(size=(n, width)) + centres[labels]).astype(np.float32), labels


@pytest.mark.parametrize(
    ("rows", "checks"),
    [(268, 1250), (2175, 278), (100_000, 7), (262_144, 3), (3657, 167), (1132, 500), (15_303, 42)],
    ids=["bach", "mhist", "crc", "pcam", "bracs", "breakhis", "gleason"],
)
def test_patience_is_evas(rows: int, checks: int) -> None:
    assert patience(CONFIG, rows) == checks


def test_patience_of_ten_shots_is_evas() -> None:
    assert patience(replace(CONFIG, **SHOTS), 20) == 125


@pytest.mark.parametrize("classes", [2, 4])
def test_every_run_is_that_of_torchs_own_modules(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear, AdamW, ConstantLR and the loss of torch from the same start through the same batches, the last one shorter."""
    (x, y), (v, t) = data(0, classes), data(1, classes)
    values: list[torch.Tensor] = []
    monitor = module._monitor

    def keep(*arguments: torch.Tensor) -> torch.Tensor:
        values.append(arguments[2].clone())
        return monitor(*arguments)

    monkeypatch.setattr(module, "_monitor", keep)
    train_heads(x, y, v, t, classes, SMALL, "cpu")
    assert len(values) == 20  # epochs of 3 steps
    outputs = 1 if classes == 2 else classes
    start = module._first(SMALL, outputs, 8, "cpu")
    for run in range(SMALL.runs):
        head = torch.nn.Linear(8, outputs)
        with torch.no_grad():
            head.weight.copy_(start[run, :, :-1])
            head.bias.copy_(start[run, :, -1])
        optimiser = torch.optim.AdamW(head.parameters(), lr=3e-4)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimiser)
        for epoch in range(20):
            for batch in module._order(None, 150, torch.tensor([run]), epoch, SMALL):
                logits, wanted = head(torch.from_numpy(x[batch[0]])), torch.from_numpy(y[batch[0]])
                loss = (
                    torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], wanted.float())
                    if classes == 2
                    else torch.nn.functional.cross_entropy(logits, wanted)
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            schedule.step()
            assert torch.allclose(values[epoch][run, :, :-1], head.weight, atol=1e-6)
            assert torch.allclose(values[epoch][run, :, -1], head.bias, atol=1e-6)


def test_the_first_best_is_kept_and_patience_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of two runs by epoch, as scripted: ties do not replace the first, and each run stops by itself."""
    script = {0: [0.5, 0.7, 0.7, 0.6, 0.6, 0.6, 0.9], 1: [0.1, 0.2, 0.1, 0.1, 0.1, 0.3, 0.1]}
    seen: list[torch.Tensor] = []

    def scripted(x: torch.Tensor, truth: torch.Tensor, state: torch.Tensor, classes: int) -> torch.Tensor:
        epoch = len(seen)
        seen.append(state.clone())
        runs = [0, 1] if len(state) == 2 else [1]
        return torch.tensor([script[run][epoch] for run in runs], dtype=torch.float64)

    monkeypatch.setattr(module, "_monitor", scripted)
    (x, y), (v, t) = data(0, 3), data(1, 3)
    config = replace(SMALL, runs=2, steps=21, patience_share=4 / 7)
    assert patience(config, 150) == 4
    heads = train_heads(x, y, v, t, 3, config, "cpu")
    assert heads.epoch.tolist() == [1, 5] and heads.best.tolist() == [0.7, 0.3]
    assert [len(state) for state in seen] == [2, 2, 2, 2, 2, 2, 1]  # run 0: no new best after epoch 1, so 4 checks later it ends
    assert torch.equal(heads.weights[0], seen[1][0, :, :-1]) and torch.equal(heads.weights[1], seen[5][1, :, :-1])
    assert heads.looks == 13


def test_the_monitor_is_torchmetrics() -> None:
    """benchmarks' example, where an absent class is predicted: .541667 there, .722222 as balanced accuracy."""
    called, truth = [0, 0, 2, 1, 0, 3], torch.tensor([0, 0, 0, 1, 1, 3])
    x, state = torch.eye(6), torch.zeros(1, 4, 7)
    for row, c in enumerate(called):
        state[0, c, row] = 1
    assert module._monitor(x, truth, state, 4).item() == pytest.approx(0.541667, abs=1e-6)
    binary = torch.zeros(1, 1, 7)
    binary[0, 0, :6] = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0, -3.0])  # p = .5 twice, which is not above it
    found = module._monitor(x, torch.tensor([1, 1, 0, 0, 0, 1]), binary, 2).item()
    assert found == pytest.approx((1 / 3 + 2 / 3) / 2)


def patches_of(labels: np.ndarray, roles: np.ndarray, usage: Usage) -> LabelledPatches:
    names = np.arange(len(labels)).astype(str)
    return LabelledPatches("x", tuple("abc"[: labels.max() + 1]), labels, roles, names, names, "none", 0.5, 8, "h",
                           lambda rows: np.empty(0), names, names, usage)  # fmt: skip


def test_outcomes_say_when_the_report_was_selected_on() -> None:
    x, y = data(0, 2, 400)
    roles = np.repeat(["train", "select", "report"], [200, 100, 100])
    both = Usage("folds", "select", ("select", "report"), None)
    chosen, tested = eva(x, "e", "cls", patches_of(y, roles, both), replace(SMALL, lr=0.03), "cpu")
    assert (chosen.role, tested.role, tested.note) == ("select", "report", "") and chosen.note.startswith("selected on select")
    assert tested.logs.shape == (3, 100, 2) and np.allclose(np.exp(tested.logs).sum(2), 1)
    assert (tested.predicted == y[tested.rows]).mean() > 0.8
    (only,) = eva(x, "e", "cls", patches_of(y, roles, Usage("folds", "report", ("report",), None)), SMALL, "cpu")
    assert only.note.startswith("selected on report: ") and only.protocol == "eva"
    with pytest.raises(ValueError, match="selects its checkpoint"):
        eva(x, "e", "cls", patches_of(y, np.repeat(["train", "report"], 200), both), SMALL, "cpu")


def test_ten_shots_are_drawn_anew_for_every_run() -> None:
    _, y = data(0, 2)
    config = replace(SMALL, shots=10, runs=4, check_epochs=10)
    drawn = module._shots(y, 2, config)
    assert drawn.shape == (4, 20) and all((y[rows] == 1).sum() == 10 and len(set(rows.tolist())) == 20 for rows in drawn)
    assert len({tuple(rows.tolist()) for rows in drawn}) == 4
    with pytest.raises(ValueError, match="draws 100 of each"):
        module._shots(y, 2, replace(config, shots=100))
