"""Decoders fitted on frozen tokens: one fit that can be driven step by step, and the two protocols that decide when it ends."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from histoscale.data.keys import key, permutation
from histoscale.eval.decoder import ConvDecoderWithImage, dice_loss, new_decoder
from histoscale.eval.scores.overlap import confusions, monai_dice, overlap
from histoscale.eval.segment_feed import Feed, SegmentError


@dataclass(frozen=True)
class FitConfig:
    """AdamW with `weight_decay`; the learning rate is divided by `warm_divisor` in the first `warm_epochs` epochs.

    batch: views a step, the last of an epoch as many as are left. steps: the most. runs: decoders of an encoder, floor_runs: of
    each initialisation of a floor. seed: of weights, order and folds.
    """

    learning_rate: float
    weight_decay: float
    warm_epochs: int
    warm_divisor: float
    batch: int
    steps: int
    runs: int
    floor_runs: int
    seed: int


@dataclass(frozen=True)
class HonestConfig:
    """folds: of train, no block in two. every: steps between two looks at what the folds hold out. patience: looks without a
    better one before the folds stop."""

    folds: int
    every: int
    patience: int


@dataclass(frozen=True)
class Fitted:
    """decoder: on the CPU. steps: it took. note: what the reader must know of the choice."""

    decoder: ConvDecoderWithImage
    steps: int
    note: str


@dataclass(frozen=True)
class Problem:
    """What there is to learn. train: items -> batches, score: rows of the scored views -> batches. items: int64, of train.

    width: of the tokens. classes: to tell apart. ignore: a label that is neither learnt nor scored, or None.
    """

    train: Feed
    score: Feed
    items: np.ndarray
    width: int
    classes: int
    ignore: int | None
    device: torch.device


class DecoderFit:
    """One decoder under way. Its weights and its order of items are drawn by (seed, stream, run) alone."""

    def __init__(self, problem: Problem, items: np.ndarray, config: FitConfig, stream: str, run: int, masked_by: str) -> None:
        self.problem, self.items, self.config = problem, items, config
        self.stream, self.run, self.masked_by = stream, run, masked_by
        self.decoder = new_decoder(problem.width, problem.classes, config.seed, stream, run).to(problem.device)
        self.optimiser = torch.optim.AdamW(self.decoder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.per_epoch = math.ceil(len(items) / config.batch)
        self.steps = 0
        self._order = items

    def advance(self, steps: int) -> None:
        """So many more steps. Raises SegmentError when the loss is not finite."""
        config = self.config
        self.decoder.train()
        loss = torch.zeros(())
        for _ in range(steps):
            epoch, place = divmod(self.steps, self.per_epoch)
            if place == 0:
                order = permutation(key(config.seed, f"segment/{self.stream}/order", self.run, epoch), len(self.items))
                self._order = self.items[order]
            rate = config.learning_rate / (config.warm_divisor if epoch < config.warm_epochs else 1.0)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            batch = self.problem.train(self._order[place * config.batch : (place + 1) * config.batch], epoch)
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
                loss = dice_loss(self.decoder(batch.tokens, batch.rgb), batch.labels, self.problem.ignore, self.masked_by)
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
            self.optimiser.step()
            self.steps += 1
        last = float(loss.detach())
        if not math.isfinite(last):
            raise SegmentError(
                f"the loss of {self.stream} {self.run} is {last} at step {self.steps}: lower segment.fit.learning_rate"
            )

    def fitted(self, note: str) -> Fitted:
        copy = ConvDecoderWithImage(self.problem.width, self.problem.classes)
        copy.load_state_dict({name: value.detach().cpu().clone() for name, value in self.decoder.state_dict().items()})
        return Fitted(copy, self.steps, note)


@torch.inference_mode()
def predict(
    decoder: ConvDecoderWithImage, problem: Problem, rows: np.ndarray, batch: int, keep: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels of rows of the scored views: confusions int64 [n, C, C], C with the ignored label; and the classes uint8 [n, S, S]
    where they are kept. Of equal logits the lowest class."""
    decoder = decoder.to(problem.device).eval()
    size = problem.classes if problem.ignore is None else problem.ignore + 1
    counts, kept = [], []
    for start in range(0, len(rows), batch):
        found = problem.score(rows[start : start + batch], 0)
        classes: Tensor = decoder(found.tokens, found.rgb).argmax(dim=1)
        counts.append(confusions(found.labels, classes, size))
        if keep:
            kept.append(classes.to(torch.uint8).cpu().numpy())
    return np.concatenate(counts), np.concatenate(kept) if keep else None


def choose_steps(
    problem: Problem,
    item_blocks: np.ndarray,
    score_rows: np.ndarray,
    score_blocks: np.ndarray,
    fit: FitConfig,
    honest: HonestConfig,
) -> tuple[int, str]:
    """How many steps train itself prefers, and a note: the first best MONAI Dice of what the folds hold out, all folds together.

    item_blocks: [items], score_rows, score_blocks: [r], the training views that are scored and their blocks. The folds go on side
    by side, so that they stop together. Raises SegmentError for less than two blocks, or no foreground among them.
    """
    fold_of = assign_folds(item_blocks, honest.folds, fit.seed)
    folds = sorted(set(fold_of.values()))
    item_fold = np.array([fold_of[block] for block in item_blocks.tolist()])
    score_fold = np.array([fold_of[block] for block in score_blocks.tolist()])
    fits = [DecoderFit(problem, problem.items[item_fold != fold], fit, "fold", fold, "label") for fold in folds]
    best, chosen, since, done = -1.0, 0, 0, 0
    while done < fit.steps and since < honest.patience:
        stride = min(honest.every, fit.steps - done)
        counts = []
        for fold, one in zip(folds, fits, strict=True):
            one.advance(stride)
            counts.append(predict(one.decoder, problem, score_rows[score_fold == fold], fit.batch)[0])
        done += stride
        dice = monai_dice(overlap(np.concatenate(counts), problem.ignore))
        if math.isnan(dice):
            raise SegmentError("no training image holds a pixel of foreground: there is nothing to choose the steps by")
        since += 1
        if dice > best:
            best, chosen, since = dice, done, 0
    end = ", the most that are allowed" if chosen == fit.steps else ""
    return chosen, f"{chosen} steps{end}, chosen by {len(folds)} folds of train (Dice {best:.3f} there)"


def assign_folds(blocks: np.ndarray, folds: int, seed: int) -> dict[str, int]:
    """Each block in the fold that is smallest so far, large blocks first, equals by key; with fewer blocks, one fold a block.

    Raises SegmentError for less than two blocks.
    """
    names, counts = np.unique(blocks, return_counts=True)
    if len(names) < 2:
        raise SegmentError(f"train has {len(names)} image or patient: choosing the number of steps needs at least two")
    shuffled = permutation(key(seed, "segment/folds"), len(names))
    sizes, found = [0] * min(folds, len(names)), {}
    for place in sorted(shuffled.tolist(), key=lambda i: -counts[i]):
        smallest = sizes.index(min(sizes))
        found[str(names[place])] = smallest
        sizes[smallest] += int(counts[place])
    return found


def fit_honest(problem: Problem, steps: int, note: str, runs: int, config: FitConfig) -> list[Fitted]:
    """`runs` decoders, each on all of train for the chosen steps."""
    found = []
    for run in range(runs):
        one = DecoderFit(problem, problem.items, config, "run", run, "label")
        one.advance(steps)
        found.append(one.fitted(note))
    return found


def fit_eva(
    problem: Problem, report_rows: np.ndarray, patience: int, runs: int, config: FitConfig, progress: Callable[[int], None]
) -> list[Fitted]:
    """eva's fits: MONAI Dice of the *reported* views after every epoch, the first best kept, stopped after `patience` epochs
    without a better one. The steps of an unfinished last epoch are never looked at."""
    found = []
    for run in range(runs):
        one = DecoderFit(problem, problem.items, config, "run", run, "prediction")
        best, since, looks = -1.0, 0, 0
        kept: Fitted | None = None
        while one.steps + one.per_epoch <= config.steps and since < patience:
            one.advance(one.per_epoch)
            counts, _ = predict(one.decoder, problem, report_rows, config.batch)
            dice = monai_dice(overlap(counts, problem.ignore, "prediction"))
            since, looks = since + 1, looks + 1
            if dice > best:
                best, since, kept = dice, 0, one.fitted("")
            progress(one.per_epoch)
        if kept is None:
            raise SegmentError(
                f"{config.steps} steps are less than an epoch of {one.per_epoch}, or no reported image holds foreground: "
                "raise segment.fit.steps"
            )
        found.append(Fitted(kept.decoder, kept.steps, f"selected on report, as eva does ({looks} looks at it)"))
    return found
