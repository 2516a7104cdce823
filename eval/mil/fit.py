"""Training of slide models: repeated patient-grouped folds, out-of-fold scores, and the ensemble of all fold models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from histoscale.data.journal import Progress
from histoscale.data.keys import key, keys
from histoscale.data.splits import folds
from histoscale.eval.mil.bags import Bag, BagError, Bags, Features
from histoscale.eval.mil.ensemble import AggregatorConfig, Ensemble, Reading, SlideModel


@dataclass(frozen=True)
class FitConfig:
    """Everything that training of a slide model decides; none of it is chosen by a reported slide.

    epochs: a fixed number. tiles: at most so many of a slide in one training step, drawn anew each epoch. batch: slides a step.
    folds, repeats: the ensemble holds folds * repeats models, and each training slide is scored by the `repeats` models that
    never saw its patient. lr falls from its value to 0 by a cosine.
    """

    aggregator: AggregatorConfig
    folds: int
    repeats: int
    epochs: int
    batch: int
    tiles: int
    lr: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Fitted:
    """ensemble: the deployed object. held_out: row -> the models that never saw its patient."""

    ensemble: Ensemble
    held_out: dict[int, list[int]]

    def read(self, row: int, features: Features) -> Reading:
        """A training slide by the models that never saw its patient, any other slide by all models."""
        return self.ensemble.read(features[row], self.held_out.get(row))


def fit(bags: Bags, features: Features, config: FitConfig, progress: Progress) -> Fitted:
    """Train on the rows of the part `train`; `progress` advances once an epoch of a model.

    Deterministic: equal inputs and thread count give equal bits. Raises BagError when a fold would lack a class.
    """
    rows = bags.part("train")
    models: list[SlideModel] = []
    held_out: dict[int, list[int]] = {row: [] for row in rows}
    for repeat in range(config.repeats):
        for fold in grouped_folds([bags.rows[i] for i in rows], config.folds, key(config.seed, "mil/folds", repeat)):
            out = {rows[i] for i in fold}
            for row in out:
                held_out[row].append(len(models))
            models.append(_train([i for i in rows if i not in out], bags, features, config, len(models), progress))
    return Fitted(Ensemble(models, bags.width, config.aggregator), held_out)


def grouped_folds(bags: Sequence[Bag], count: int, seed: int) -> list[list[int]]:
    """Places of the bags of each fold; a group is never divided, and groups are dealt out class by class and site by site.

    A group may hold both classes. Raises BagError when a class has fewer groups than folds, SplitError for fewer than two folds.
    """
    classes: dict[str, str] = {}
    for bag in bags:
        classes[bag.group] = "".join(sorted({*classes.get(bag.group, ""), str(bag.label)}))
    for label, name in (("1", "positive"), ("0", "negative")):
        having = sum(label in each for each in classes.values())
        if having < count:
            raise BagError(f"{having} training patients with a {name} slide for mil.folds={count}: fewer folds, or more slides")
    # "0" < "01" < "1": the groups that hold a class are neighbours, so every fold gets some of both.
    places = folds([bag.group for bag in bags], count, seed, [f"{classes[bag.group]}/{bag.site}" for bag in bags])
    return [[i for i, place in enumerate(places) if place == fold] for fold in range(count)]


def pad(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags [n_i, D] -> x [B, N, D], zero on padding, and mask bool [B, N], true for real tiles."""
    x = torch.nn.utils.rnn.pad_sequence(list(bags), batch_first=True)
    counts = torch.tensor([len(bag) for bag in bags])
    return x, torch.arange(x.shape[1])[None] < counts[:, None]


def _train(rows: Sequence[int], bags: Bags, features: Features, config: FitConfig, number: int, progress: Progress) -> SlideModel:
    labels = torch.from_numpy(bags.labels(rows)).float()
    weight = (1 - labels).sum() / labels.sum()  # both classes weigh the same
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout belong to this model alone
        torch.manual_seed(key(config.seed, "mil/init", number) >> 1)
        model = SlideModel(bags.width, config.aggregator).train()
        _standardise(model, rows, features)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        steps = config.epochs * math.ceil(len(rows) / config.batch)
        step = 0
        for epoch in range(config.epochs):
            drawn = key(config.seed, "mil/epoch", number, epoch)
            order = keys(drawn, "order", 0, torch.arange(len(rows))).argsort()
            total = 0.0
            for chosen in order.split(config.batch):
                tiles = [_draw(features[rows[i]], config.tiles, key(drawn, "tiles", rows[i])) for i in chosen.tolist()]
                logits, _, _ = model(*pad(tiles))
                loss = F.binary_cross_entropy_with_logits(logits, labels[chosen], pos_weight=weight)
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step, total = step + 1, total + loss.item() * len(chosen)
            progress.advance(loss=total / len(rows))
    return model.eval()


def _draw(features: np.ndarray, tiles: int, drawn: int) -> Tensor:
    """All tiles, or `tiles` of them without replacement."""
    if len(features) <= tiles:
        return torch.from_numpy(features)
    return torch.from_numpy(features)[keys(drawn, "tile", 0, torch.arange(len(features))).argsort()[:tiles]]


def _standardise(model: SlideModel, rows: Sequence[int], features: Features) -> None:
    """Mean and standard deviation of the training tiles, each slide counting once."""
    means = np.stack([features[i].mean(0, dtype=np.float64) for i in rows])
    squares = np.stack([np.square(features[i], dtype=np.float64).mean(0) for i in rows])
    shift = means.mean(0)
    spread = np.sqrt(np.maximum(squares.mean(0) - shift**2, 0))
    model.shift.copy_(torch.from_numpy(shift))
    model.scale.copy_(torch.from_numpy(np.where(spread > 1e-6, spread, 1.0)))  # a constant number stays what it is
