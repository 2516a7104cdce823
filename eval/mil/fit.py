"""Training of slide models: repeated patient-grouped folds, out-of-fold readings, and the ensemble of all fold models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from histoscale.data.journal import Progress
from histoscale.data.keys import key, keys
from histoscale.data.splits import SplitError
from histoscale.eval.mil.aggregators.clam import Clam, ClamConfig
from histoscale.eval.mil.bags import Bag, BagError, Bags
from histoscale.eval.mil.ensemble import AggregatorConfig, Ensemble, Reading, SlideModel, to_output
from histoscale.eval.mil.features import Draw, Features
from histoscale.eval.mil.kept import Kept
from histoscale.eval.mil.losses import binary_loss, class_loss, cox_loss
from histoscale.eval.mil.optimizer import Optimizer, OptimizerConfig, ScheduleConfig
from histoscale.eval.mil.split import grouped_folds
from histoscale.eval.mil.task import BinaryTask, ClassesTask, RegressionTask, SurvivalTask, Task

_COMPARED = 8  # slides of a batch at least, among which risks are compared: alone a slide teaches nothing
IMBALANCE = ("balanced", "none")


@dataclass(frozen=True)
class FitConfig:
    """Everything that training of a slide model decides; none of it is chosen by a reported slide.

    epochs: a fixed number. tiles: at most so many of a slide in one training step, drawn anew each epoch; null: all of them.
    batch: slides a step. folds, repeats: the ensemble holds folds * repeats models, and each training slide is scored by the
    `repeats` models that never saw its patient. standardise: each feature by its mean and standard deviation over the training
    tiles. imbalance: `balanced` (every class weighs the same) or `none`, for tasks with classes.
    """

    aggregator: AggregatorConfig
    folds: int
    repeats: int
    epochs: int
    batch: int
    tiles: int | None
    standardise: bool
    imbalance: str
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    seed: int

    def __post_init__(self) -> None:
        if self.imbalance not in IMBALANCE:
            raise ValueError(f"mil.imbalance is {self.imbalance!r}: expected {' or '.join(IMBALANCE)}")


@dataclass(frozen=True)
class Fitted:
    """ensemble: the deployed object. held_out: row -> the models that never saw its patient. repeats: the models of each seed."""

    ensemble: Ensemble
    held_out: dict[int, list[int]]
    repeats: list[list[int]]

    def read(self, row: int, features: Features) -> Reading:
        """A training slide by the models that never saw its patient, any other slide by all models."""
        return self.ensemble.read(features.whole(row), self.held_out.get(row))

    def by_seed(self, row: int, reading: Reading) -> np.ndarray:
        """The output of the models of each seed alone, from `read` of that row: float64 [repeats, K]."""
        asked = self.held_out.get(row, list(range(len(self.ensemble.models))))
        places = [[asked.index(i) for i in members if i in asked] for members in self.repeats]
        return to_output(np.stack([reading.models[each].mean(0) for each in places]), self.ensemble.kind)


def fit(
    bags: Bags,
    rows: Sequence[int],
    features: Features,
    task: Task,
    config: FitConfig,
    progress: Progress,
    folder: Path | None = None,
) -> Fitted:
    """Train on some rows; `progress` advances once an epoch of a model. folder: where each model is kept as soon as it is
    trained, and taken from when this is called again with the same slides, targets, stores and configuration; None keeps none.

    Of a slide with stain-jittered copies one store is drawn each epoch. Deterministic: equal inputs and thread count give equal
    bits. Raises BagError when a fold would lack a class, StoreError when a store fails.
    """
    if isinstance(config.aggregator, ClamConfig) and not isinstance(task, BinaryTask | ClassesTask):
        raise ValueError(f"mil.aggregator.kind=clam labels tiles by their slide's class; the task is {task.kind}: take mil=abmil")
    if isinstance(task, SurvivalTask) and config.batch < _COMPARED:
        raise ValueError(
            f"mil.batch is {config.batch} for a task of times: a slide is compared with those of its batch, set mil.batch=32"
        )
    rows = list(rows)
    models: list[SlideModel] = []
    held_out: dict[int, list[int]] = {row: [] for row in rows}
    repeats: list[list[int]] = []
    kept = None if folder is None else Kept.of(folder, _made_of(bags, rows, features, task, config))
    for repeat in range(config.repeats):
        repeats.append([])
        for fold in inner_folds([bags.rows[i] for i in rows], task, config.folds, key(config.seed, "mil/folds", repeat)):
            out = {rows[i] for i in fold}
            for row in out:
                held_out[row].append(len(models))
            repeats[-1].append(len(models))
            trains = [i for i in rows if i not in out]
            state = None if kept is None else kept.load(len(models))
            if state is not None:
                with torch.random.fork_rng(devices=[]):  # its initial weights are drawn, and replaced
                    models.append(SlideModel(bags.width, config.aggregator, task.outputs).eval())
                models[-1].load_state_dict(state)
                progress.advance(config.epochs)
                continue
            models.append(_train(trains, bags, features, task, config, len(models), progress))
            if kept is not None:
                kept.save(len(models) - 1, models[-1].state_dict())
    return Fitted(Ensemble(models, bags.width, task.outputs, config.aggregator, task.kind), held_out, repeats)


def inner_folds(bags: Sequence[Bag], task: Task, count: int, seed: int) -> list[list[int]]:
    """Places of the bags of each fold; groups whole, level in targets and sites (split.grouped_folds).

    Raises BagError when too few groups have a class (or an event) for every model to see one, and, of two classes, for every fold
    to hold one; SplitError for fewer than two folds.
    """
    if count < 2:
        raise SplitError(f"mil.folds is {count}: expected at least 2")
    for level, name, least in _needed(task, count):
        having = len({bag.group for bag in bags if level == (bag.event if isinstance(task, SurvivalTask) else bag.label)})
        if having < least:
            advice = f"set mil.folds={having}, or give more slides" if 2 <= having and least == count else "give more slides"
            raise BagError(f"{having} training patients with {name} for mil.folds={count}: {advice}")
    places = grouped_folds(bags, count, seed)
    return [[i for i, place in enumerate(places) if place == fold] for fold in range(count)]


def _needed(task: Task, count: int) -> list[tuple[int, str, int]]:
    """A class (or 1 for an event), its name, and the groups that must have it."""
    match task:
        case BinaryTask():
            return [(1, "a positive slide", count), (0, "a negative slide", count)]
        case ClassesTask():
            return [(i, f"a slide of class {name}", 2) for i, name in enumerate(task.classes)]
        case SurvivalTask():
            return [(1, "an event", count)]
    return []


def _made_of(bags: Bags, rows: Sequence[int], features: Features, task: Task, config: FitConfig) -> list[Any]:
    """Everything that the models of a fit are made of; of stores their sizes and times of change."""
    bag = bags.rows
    slides = [(i, bag[i].slide_id, bag[i].group, bag[i].site, bag[i].target, bag[i].event) for i in rows]
    stores = [(path, path.stat().st_size, path.stat().st_mtime_ns) for i in rows for path in features.stores[i]]
    return [config, task, bags.width, slides, stores]


def pad(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags [n_i, D] -> x [B, N, D], zero on padding, in float32 (of float64 in float64), and mask bool [B, N], true for tiles."""
    counts = torch.tensor([len(bag) for bag in bags])
    kind = torch.promote_types(bags[0].dtype, torch.float32)
    x = torch.zeros(len(bags), int(counts.max()), bags[0].shape[1], dtype=kind)
    for row, bag in zip(x, bags, strict=True):
        row[: len(bag)] = bag
    return x, torch.arange(x.shape[1])[None] < counts[:, None]


def _train(
    rows: Sequence[int], bags: Bags, features: Features, task: Task, config: FitConfig, number: int, progress: Progress
) -> SlideModel:
    targets, events = torch.from_numpy(bags.targets(rows)).float(), torch.from_numpy(bags.events(rows))
    weights = _class_weights(targets, task, config.imbalance)
    most = config.tiles if config.tiles is not None else max(bags.rows[i].tiles for i in rows)
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout belong to this model alone
        torch.manual_seed(key(config.seed, "mil/init", number) >> 1)
        model = SlideModel(bags.width, config.aggregator, task.outputs).train()
        if config.standardise:
            _standardise(model, rows, features)
        if isinstance(task, RegressionTask):
            model.origin.copy_(targets.mean())
            model.unit.copy_(targets.std(correction=0) if targets.std(correction=0) > 0 else torch.ones(()))
        orders = [_order(rows, config, number, epoch) for epoch in range(config.epochs)]
        optimizer = Optimizer(model, sum(map(len, orders)), len(orders[0]), config.optimizer, config.schedule)
        batches = features.batches((draws for each in orders for draws in _draws(rows, each, features)), most)
        for order in orders:
            total = 0.0
            for chosen, _ in order:
                x, mask = pad([torch.from_numpy(tiles) for tiles in next(batches)])
                found = model(x, mask)
                loss = _loss(found.logits, targets[chosen], events[chosen], weights, model, task)
                if isinstance(model.aggregator, Clam):
                    loss = model.aggregator.mix(loss, found, mask, targets[chosen])
                optimizer.step(loss)
                total += loss.item() * len(chosen)
            progress.advance(loss=total / len(rows))
    model.eval()
    if isinstance(task, SurvivalTask):  # a log-risk has no zero of its own; models of other folds are compared and averaged
        model.origin.copy_(-torch.stack([model.logits(features.whole(row))[0] for row in rows]).mean())
    return model


Step = tuple[Tensor, list[int]]  # places in `rows`: [b], and the keys of their draws


def _order(rows: Sequence[int], config: FitConfig, number: int, epoch: int) -> list[Step]:
    drawn = key(config.seed, "mil/epoch", number, epoch)
    order = keys(drawn, "order", 0, torch.arange(len(rows))).argsort()
    return [(chosen, [key(drawn, "tiles", rows[i]) for i in chosen.tolist()]) for chosen in order.split(config.batch)]


def _draws(rows: Sequence[int], order: Sequence[Step], features: Features) -> Iterator[list[Draw]]:
    for chosen, drawn in order:
        pairs = [(rows[i], k) for i, k in zip(chosen.tolist(), drawn, strict=True)]
        yield [Draw(row, key(k, "copy") % len(features.stores[row]), k) for row, k in pairs]


def _class_weights(targets: Tensor, task: Task, imbalance: str) -> Tensor:
    """[K] for several classes, the weight of positives [] for two; a share of 1 / classes each where balanced."""
    if isinstance(task, ClassesTask):
        counts = torch.bincount(targets.long(), minlength=task.outputs).float()
        return len(targets) / (task.outputs * counts) if imbalance == "balanced" else torch.ones(task.outputs)
    if isinstance(task, BinaryTask) and imbalance == "balanced":
        return (1 - targets).sum() / targets.sum()
    return torch.ones(())


def _loss(logits: Tensor, targets: Tensor, events: Tensor, weights: Tensor, model: SlideModel, task: Task) -> Tensor:
    """The mean over a batch. A number is compared in standard deviations, by squares: its expectation is what is wanted."""
    match task:
        case BinaryTask():
            return binary_loss(logits, targets, weights).mean()
        case ClassesTask():
            return class_loss(logits, targets, weights).mean()
        case RegressionTask():
            return F.mse_loss(logits[:, 0] / model.unit, targets / model.unit)
        case SurvivalTask():
            return cox_loss(logits[:, 0], targets, events)


def _standardise(model: SlideModel, rows: Sequence[int], features: Features) -> None:
    """Mean and standard deviation of the training tiles, each slide counting once."""
    means, squares = (np.stack(each) for each in zip(*(features.moments(i) for i in rows), strict=True))
    shift = means.mean(0)
    spread = np.sqrt(np.maximum(squares.mean(0) - shift**2, 0))
    model.shift.copy_(torch.from_numpy(shift))
    model.scale.copy_(torch.from_numpy(np.where(spread > 1e-6, spread, 1.0)))  # a constant number stays what it is
