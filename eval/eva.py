"""protocol=eva: the linear head as eva 0.4.5 (kaiko-ai/eva, Apache-2.0) trains, stops, selects and reports it; all runs at once.

It selects a checkpoint on the split that it may also report, which `Outcome.note` then says. What is different on purpose:
metrics are of whole vectors, where eva decides for every batch anew whether its predictions are logits; and random numbers, so
that a run here is another draw of the same experiment.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from histoscale.data.keys import key
from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.results import Outcome

ROWS = 16384  # of an intermediate in validation


@dataclass(frozen=True)
class EvaConfig:
    """runs: fits that are meaned. steps, batch: of the optimiser, rows of a step. lr, weight_decay, betas, eps: AdamW's.

    slow_epochs, slow_factor: the first epochs, at lr · slow_factor (torch's ConstantLR, eva's silent default).
    check_epochs: epochs between validations. patience_share: validations without a new best that end a run, as a share of
    those that the budget would hold, rounded up. min_delta: what makes a new best for patience. shots: rows of each class
    that a run draws and learns from without shuffling, null for all of train, shuffled. pool: `cls` in eva.
    """

    pool: str
    runs: int
    steps: int
    batch: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    slow_epochs: int
    slow_factor: float
    check_epochs: int
    patience_share: float
    min_delta: float
    shots: int | None
    seed: int


@dataclass(frozen=True)
class Heads:
    """weights: float32 [R, K, D], bias: [R, K], K = 1 for two classes: each run's first best. best: [R], of the monitor; epoch:
    [R], where it was; looks: validations of all runs together."""

    weights: Tensor
    bias: Tensor
    best: Tensor
    epoch: Tensor
    looks: int

    def log_probabilities(self, features: np.ndarray) -> np.ndarray:
        """[n, D] -> float64 [R, n, C]."""
        logits = torch.cat([z.double() for z in _logits(features, self.weights, self.bias)], 1)
        if logits.shape[2] == 1:
            logits = torch.cat([-logits, logits], 2) / 2
        return logits.log_softmax(2).cpu().numpy()


def patience(config: EvaConfig, rows: int) -> int:
    """Validations without a new best before a run ends: eva's tables for its sets, from their size."""
    return math.ceil(config.patience_share * config.steps / (_batches(rows, config.batch) * config.check_epochs) - 1e-9)


def eva(
    features: np.ndarray, encoder: str, embedding: str, patches: LabelledPatches, config: EvaConfig, device: str | torch.device
) -> list[Outcome]:
    """Outcomes of the roles that eva reports for this set, R runs each. features: float32 [n, D] of all rows, not standardised.

    Raises ValueError when the role that eva selects on is empty.
    """
    usage, classes = patches.usage, len(patches.classes)
    train, select = patches.rows("train"), patches.rows(usage.eva_select)
    if not len(select):
        raise ValueError(f"{patches.name} has no {usage.eva_select} rows: protocol=eva selects its checkpoint on them")
    heads = train_heads(features[train], patches.labels[train], features[select], patches.labels[select], classes, config, device)
    found = []
    for role in usage.eva_report:
        rows = patches.rows(role)
        if len(rows):
            note = f"selected on {role}: {heads.looks} looks" if role == usage.eva_select else ""
            logs = heads.log_probabilities(features[rows])
            found.append(Outcome(encoder, embedding, "eva", _name(config), role, logs, rows, note))
    return found


def train_heads(
    train: np.ndarray,
    labels: np.ndarray,
    select: np.ndarray,
    select_labels: np.ndarray,
    classes: int,
    config: EvaConfig,
    device: str | torch.device,
) -> Heads:
    """R linear heads on the same rows, each with its own initial weights, order (or shots) and end.

    train: float32 [n, D], labels: [n]; select: [m, D], where the macro accuracy, or with two classes the balanced accuracy at
    p > .5, of every check_epochs-th epoch decides. Products are float32.
    """
    x = torch.from_numpy(np.ascontiguousarray(train, np.float32)).to(device)
    y = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
    watched = torch.from_numpy(np.ascontiguousarray(select, np.float32)).to(device)
    truth = torch.from_numpy(np.asarray(select_labels, np.int64)).to(device)
    outputs = classes if classes > 2 else 1
    draws = _shots(np.asarray(labels), classes, config) if config.shots else None
    rows = len(x) if draws is None else draws.shape[1]
    epochs, waiting = config.steps // _batches(rows, config.batch), patience(config, rows)

    state = _first(config, outputs, x.shape[1], device)
    best = state.clone()
    value = torch.full((config.runs,), -torch.inf, dtype=torch.float64)
    bar, wait, epoch_of = value.clone(), torch.zeros(config.runs), torch.zeros(config.runs, dtype=torch.int64)
    moments = torch.zeros(2, *state.shape, device=device)
    open_, looks, step = torch.arange(config.runs), 0, 0
    for epoch in range(epochs):  # what is left of the steps after the last whole epoch is never validated, so cannot be kept
        rate = config.lr * (config.slow_factor if epoch < config.slow_epochs else 1)
        for batch in _order(draws, rows, open_, epoch, config):
            step += 1
            index = batch.to(device)
            gradient = _gradient(state, x[index], y[index], outputs)
            _adamw(state, moments, gradient, rate, step, config)
        if (epoch + 1) % config.check_epochs:
            continue
        now = _monitor(watched, truth, state, classes).cpu()
        looks += len(open_)
        better = now > value[open_]
        value[open_[better]], epoch_of[open_[better]] = now[better], epoch
        best[open_[better].to(device)] = state[better.to(device)]
        fresh = now - config.min_delta > bar[open_]
        bar[open_[fresh]] = now[fresh]
        wait[open_] = torch.where(fresh, 0.0, wait[open_] + 1)
        kept = wait[open_] < waiting
        if not bool(kept.all()):
            open_, state, moments = open_[kept], state[kept.to(device)], moments[:, kept.to(device)]
            if not len(open_):
                break
    return Heads(best[..., :-1], best[..., -1], value, epoch_of, looks)


def _first(config: EvaConfig, outputs: int, width: int, device: str | torch.device) -> Tensor:
    """Weights and, last, the bias of each run: [R, K, D + 1], uniform within 1 / √D as torch's Linear starts."""
    drawn = []
    for run in range(config.runs):
        generator = torch.Generator().manual_seed(key(config.seed, "eva/head", run) >> 1)
        drawn.append(torch.rand(outputs, width + 1, generator=generator) * 2 - 1)
    return torch.stack(drawn).to(device) / math.sqrt(width)


def _order(draws: Tensor | None, rows: int, runs: Tensor, epoch: int, config: EvaConfig) -> Iterator[Tensor]:
    """Batches of an epoch, int64 [runs, b]: an own shuffle a run, or its shots as they were drawn; the last is shorter."""
    if draws is not None:
        yield from draws[runs].split(config.batch, 1)
        return
    shuffled = []
    for run in runs.tolist():
        generator = torch.Generator().manual_seed(key(config.seed, "eva/order", run, epoch) >> 1)
        shuffled.append(torch.randperm(rows, generator=generator))
    yield from torch.stack(shuffled).split(config.batch, 1)


def _shots(labels: np.ndarray, classes: int, config: EvaConfig) -> Tensor:
    """int64 [R, shots · classes]: a run's rows, as many of each class, in random order. Raises ValueError for a rarer class."""
    assert config.shots is not None
    generator = np.random.default_rng(config.seed)  # runs on from run to run, as eva's
    members = [np.flatnonzero(labels == c) for c in range(classes)]
    if min(map(len, members)) < config.shots:
        raise ValueError(f"a class has {min(map(len, members))} rows in train: protocol=eva draws {config.shots} of each")
    drawn = []
    for _ in range(config.runs):
        rows = np.concatenate([generator.choice(part, config.shots, replace=False) for part in members])
        generator.shuffle(rows)
        drawn.append(rows)
    return torch.from_numpy(np.stack(drawn))


def _gradient(state: Tensor, x: Tensor, y: Tensor, outputs: int) -> Tensor:
    """Of the mean cross-entropy, with one output of the mean BCE. state: [R, K, D + 1], x: [R, b, D], y: [R, b]."""
    logits = torch.baddbmm(state[:, None, :, -1], x, state[..., :-1].transpose(1, 2))
    if outputs == 1:
        residual = logits.sigmoid_().sub_(y[..., None])
    else:
        residual = logits.softmax(2)
        residual.scatter_add_(2, y[..., None], residual.new_full((*y.shape, 1), -1.0))
    residual /= x.shape[1]
    return torch.cat([residual.transpose(1, 2) @ x, residual.sum(1)[..., None]], 2)


def _adamw(state: Tensor, moments: Tensor, gradient: Tensor, rate: float, step: int, config: EvaConfig) -> None:
    """In place (arXiv 1711.05101, as torch.optim.AdamW, the bias decayed too)."""
    first, second = config.betas
    state.mul_(1 - rate * config.weight_decay)
    moments[0].lerp_(gradient, 1 - first)
    moments[1].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    spread = (moments[1].sqrt() / math.sqrt(1 - second**step)).add_(config.eps)
    state.addcdiv_(moments[0], spread, value=-rate / (1 - first**step))


def _monitor(x: Tensor, truth: Tensor, state: Tensor, classes: int) -> Tensor:
    """[R] float64. Three classes and more: mean recall over the classes with a row *or a prediction*, as torchmetrics has it.
    Two: the mean of sensitivity and specificity at p > .5, a missing class counting 0."""
    counts = torch.zeros(len(state), classes * classes, dtype=torch.float64, device=x.device)
    start = 0
    for logits in _logits(x, state[..., :-1], state[..., -1]):
        called = (logits[..., 0].sigmoid() > 0.5).long() if classes == 2 else logits.argmax(2)
        cell = truth[start : start + called.shape[1]] * classes + called
        counts.scatter_add_(1, cell, torch.ones_like(cell, dtype=torch.float64))
        start += called.shape[1]
    table = counts.view(-1, classes, classes)
    right, total = table.diagonal(dim1=1, dim2=2), table.sum(2)
    recall = right / total.clamp(min=1)
    seen = torch.ones_like(recall) if classes == 2 else ((total + table.sum(1)) > 0).double()
    return (recall * seen).sum(1) / seen.sum(1)


def _logits(features: np.ndarray | Tensor, weights: Tensor, bias: Tensor) -> Iterator[Tensor]:
    """[R, b, K] of parts of the rows: R heads as one matrix of R · K rows."""
    runs, outputs, width = weights.shape
    matrix = weights.reshape(runs * outputs, width)
    for start in range(0, len(features), ROWS):
        part = features[start : start + ROWS]
        x = part if isinstance(part, Tensor) else torch.from_numpy(np.ascontiguousarray(part, np.float32)).to(weights.device)
        yield torch.addmm(bias.reshape(-1), x, matrix.T).view(len(x), runs, outputs).transpose(0, 1)


def _batches(rows: int, batch: int) -> int:
    return -(-rows // batch)


def _name(config: EvaConfig) -> str:
    return "linear" if config.shots is None else f"few_shot/{config.shots}"
