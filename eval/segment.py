"""Segmentation probes: what are frozen patch tokens worth to a small decoder, beside untrained tokens and beside colour alone?

`honest` lets folds of train choose the number of steps and reads the reported images once; `eva` selects on what it reports, as
the published numbers do (kaiko-ai/eva:configs/vision/pathology/online/segmentation), and says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from histoscale.data.journal import Journal
from histoscale.data.keys import key, permutation
from histoscale.eval.datasets.masks import LabelledMasks
from histoscale.eval.encoder import Encoder, weights_hash
from histoscale.eval.results import Score
from histoscale.eval.scores.interval import Interval, IntervalConfig, paired_difference, patient_bootstrap
from histoscale.eval.scores.overlap import (
    Overlap,
    false_positive_area,
    foreground_mean,
    monai_dice,
    overlap,
    pooled_dice,
    pooled_iou,
)
from histoscale.eval.segment_feed import FeedConfig, Material, SegmentError, token_grid
from histoscale.eval.segment_fit import FitConfig, Fitted, HonestConfig, Problem, choose_steps, fit_eva, fit_honest, predict

PROTOCOLS = ("honest", "eva")
PROBE = "conv_decoder_with_image"


@dataclass(frozen=True)
class SegmentConfig:
    """protocols: of PROTOCOLS. eva_patience: epochs without a better one before eva's fit stops, by data set.

    examples: how many reported views are kept with what was predicted on them.
    """

    protocols: list[str]
    fit: FitConfig
    honest: HonestConfig
    eva_patience: dict[str, int]
    feed: FeedConfig
    examples: int


@dataclass(frozen=True)
class Example:
    """A reported view, its truth and the first decoder's classes. pixels: uint8 [3, S, S]; truth, predicted: uint8 [S, S]."""

    encoder: str
    protocol: str
    image: str
    box: tuple[int, int, int, int]
    pixels: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class FitRecord:
    """One decoder that was scored: how long it was fitted and the hash of its weights."""

    encoder: str
    protocol: str
    run: int
    steps: int
    hash: str


@dataclass(frozen=True)
class Segmentation:
    """scores: `monai_dice`; of the honest protocol also pooled `dice` and `iou`, meaned over foreground classes, and
    `false_positive_um2` where a reported view is empty; and differences to the floors and between encoders. per_class: pooled
    `dice/<class>`, background too."""

    scores: list[Score]
    per_class: list[Score]
    examples: list[Example]
    fits: list[FitRecord]


@dataclass(frozen=True)
class _Cell:
    """What R decoders of one name and protocol predicted on the n reported views. mpp: [n], overlaps: R of them."""

    encoder: str
    protocol: str
    mpp: np.ndarray
    side: int
    floor: bool
    note: str
    overlaps: tuple[Overlap, ...]


def run_segmentation(
    encoders: Sequence[Encoder],
    untrained: Sequence[Encoder],
    masks: LabelledMasks,
    config: SegmentConfig,
    interval: IntervalConfig,
    batch: int,
    folder: Path,
    journal: Journal,
) -> Segmentation:
    """Decoders on the tokens of every encoder, of the `untrained` ones (together the floor `random`), and on colour alone.

    batch: views encoded at a time. folder: keeps views and tokens under the hashes of data and encoder. Colour is the first
    encoder's decoder and normalisation with every token at zero. Fits run on the first encoder's device.
    Raises SegmentError for a configuration or encoder that cannot be, DatasetError from the set.
    """
    _check(encoders, masks, config)
    device = encoders[0].device
    materials = {
        side: Material(masks, side, config.fit.seed, config.feed, batch, folder, journal)
        for side in dict.fromkeys(_side(encoder) for encoder in (*encoders, *untrained))
    }
    cells: list[_Cell] = []
    examples: list[Example] = []
    fits: list[FitRecord] = []

    def run(name: str, members: Sequence[Encoder], zeroed: bool, floor: bool) -> None:
        material = materials[_side(members[0])]
        for protocol in config.protocols:
            runs = config.fit.floor_runs if floor else config.fit.runs
            found: list[np.ndarray] = []
            notes: list[str] = []
            for member in members:
                journal.say(f"{name}: decoders of {masks.name}, protocol {protocol}")
                problem = _problem(material, member, zeroed, device)
                for fitted in _fit(problem, material, protocol, runs, config, journal):
                    shown = _shown(material, config) if not found and not floor else np.empty(0, np.int64)
                    rows = material.score_rows("report")
                    counts, _ = predict(fitted.decoder, problem, rows, config.fit.batch)
                    examples.extend(_examples(fitted, problem, material, shown, name, protocol))
                    digest = weights_hash(fitted.decoder.cpu().state_dict(), {})
                    fits.append(FitRecord(name, protocol, len(found), fitted.steps, digest))
                    found.append(counts)
                    notes.append(fitted.note)
            cells.append(_cell(name, protocol, np.stack(found), material, floor, zeroed, notes))

    for encoder in encoders:
        run(encoder.name, [encoder], zeroed=False, floor=False)
    if untrained:
        run("random", untrained, zeroed=False, floor=True)
    run("colour", encoders[:1], zeroed=True, floor=True)

    scores: list[Score] = []
    per_class: list[Score] = []
    for protocol in config.protocols:
        own = [cell for cell in cells if cell.protocol == protocol]
        material = materials[_side(encoders[0])]
        for metric, of in _metrics(protocol, own[0]).items():
            scores += _scores(own, metric, of, masks, material, interval)
        for number, label in enumerate(masks.classes):
            per_class += _scores(own, f"dice/{label}", _class_dice(number), masks, material, interval, differences=False)
    return Segmentation(scores, per_class, examples, fits)


def _check(encoders: Sequence[Encoder], masks: LabelledMasks, config: SegmentConfig) -> None:
    if not encoders:
        raise SegmentError("segmentation was given no encoder: expected at least one")
    unknown = sorted(set(config.protocols) - set(PROTOCOLS))
    if unknown or not config.protocols:
        raise SegmentError(f"segment.protocols is {config.protocols}: expected some of {', '.join(PROTOCOLS)}")
    if "eva" in config.protocols and masks.name not in config.eva_patience:
        raise SegmentError(
            f"segment.eva_patience names {', '.join(config.eva_patience) or 'no set'}: expected epochs for {masks.name} too; "
            f"set segment.eva_patience.{masks.name}="
        )


def _side(encoder: Encoder) -> int:
    if encoder.size_px is None:
        raise SegmentError(
            f"the encoder {encoder.name} has no input size and so no patch tokens: colour is a floor beside any other"
        )
    return encoder.size_px


def _problem(material: Material, encoder: Encoder, zeroed: bool, device: torch.device) -> Problem:
    train, score = material.feeds(encoder, device, zeroed)
    _, width = token_grid(encoder, material.side)
    masks = material.masks
    return Problem(train, score, np.arange(len(material.item_images)), width, len(masks.classes), masks.ignore, device)


def _fit(problem: Problem, material: Material, protocol: str, runs: int, config: SegmentConfig, journal: Journal) -> list[Fitted]:
    masks = material.masks
    if protocol == "eva":
        patience = config.eva_patience[masks.name]
        with journal.progress(runs * config.fit.steps, "decoders, selected on report", "steps") as progress:
            return fit_eva(problem, material.score_rows("report"), patience, runs, config.fit, progress.advance)
    rows = material.score_rows("train")
    steps, note = choose_steps(
        problem, masks.blocks[material.item_images], rows, masks.blocks[material.score.images[rows]], config.fit, config.honest
    )
    return fit_honest(problem, steps, note, runs, config.fit)


def _shown(material: Material, config: SegmentConfig) -> np.ndarray:
    rows = material.score_rows("report")
    return rows[permutation(key(config.fit.seed, "segment/examples"), len(rows))[: config.examples]]


def _examples(fitted: Fitted, problem: Problem, material: Material, shown: np.ndarray, name: str, protocol: str) -> list[Example]:
    if len(shown) == 0:
        return []
    _, predicted = predict(fitted.decoder, problem, shown, len(shown), keep=True)
    assert predicted is not None
    pixels, truth = material.pixels(shown)
    images = material.masks.names[material.score.images[shown]]
    boxes = [(int(x), int(y), int(w), int(h)) for x, y, w, h in material.score.boxes[shown]]
    return [Example(name, protocol, str(images[i]), boxes[i], pixels[i], truth[i], predicted[i]) for i in range(len(shown))]


def _cell(
    name: str, protocol: str, confusion: np.ndarray, material: Material, floor: bool, zeroed: bool, fits: Sequence[str]
) -> _Cell:
    masks = material.masks
    notes = list(dict.fromkeys(fits))
    if protocol == "honest":
        notes.append("reads of report: 1")
    if protocol == "eva" and masks.ignore is not None:
        notes.append("ambiguous pixels masked where the prediction is ambiguous, a defect of eva 0.4.5 kept for comparison")
    if zeroed:
        notes.append("the normalised pixels alone: every token is zero")
    notes += [note for note in (material.note, *masks.notes) if note]
    rows = material.score_rows("report")
    masked_by = "label" if protocol == "honest" else "prediction"
    overlaps = tuple(overlap(counts, masks.ignore, masked_by) for counts in confusion)
    mpp = material.score.effective_mpp(masks.mpp, material.side)[rows]
    return _Cell(name, protocol, mpp, material.side, floor, "; ".join(notes), overlaps)


# Scores.

Metric = Callable[[Overlap, np.ndarray], float]  # counts of drawn views, area of a pixel of each (µm²) -> a number


def _metrics(protocol: str, cell: _Cell) -> dict[str, Metric]:
    """Of a protocol; without false positives where no reported view is empty, which are then of nothing."""
    found: dict[str, Metric] = {"monai_dice": lambda counts, _: monai_dice(counts)}
    if protocol == "honest":
        found["dice"] = lambda counts, _: foreground_mean(pooled_dice(counts))
        found["iou"] = lambda counts, _: foreground_mean(pooled_iou(counts))
        if (cell.overlaps[0].true[:, 1:].sum(axis=1) == 0).any():
            found["false_positive_um2"] = false_positive_area
    return found


def _class_dice(number: int) -> Metric:
    return lambda counts, _: float(pooled_dice(counts)[number])


def _scores(
    cells: Sequence[_Cell],
    metric: str,
    of: Metric,
    masks: LabelledMasks,
    material: Material,
    config: IntervalConfig,
    differences: bool = True,
) -> list[Score]:
    """The metric of every cell, and its differences: each encoder to the floors, and the first encoder to the others."""
    patients = masks.patients[material.score.images[material.score_rows("report")]].tolist()

    def statistic(cell: _Cell) -> Callable[[np.ndarray], float]:
        return lambda rows: float(np.mean([of(counts.only(rows), cell.mpp[rows] ** 2) for counts in cell.overlaps]))

    def score(cell: _Cell, interval: Interval, minus: str) -> Score:
        each = [of(counts, cell.mpp**2) for counts in cell.overlaps]
        mpp = float(np.median(cell.mpp))
        return Score(
            dataset=masks.name,
            encoder=cell.encoder,
            embedding="pixels" if cell.encoder == "colour" else "patch tokens",
            resolution="eva",
            protocol=cell.protocol,
            probe=PROBE,
            role="report",
            metric=metric,
            interval=_worded(interval, masks.groups),
            groups=masks.groups,
            runs=len(each),
            spread=float(np.std(each, ddof=1)) if len(each) > 1 and not minus else None,
            effective_mpp=mpp,
            field_um=mpp * cell.side,
            floor=cell.floor,
            minus=minus,
            note=cell.note,
        )

    found = [score(cell, patient_bootstrap(statistic(cell), patients, config), "") for cell in cells]
    own, floors = [cell for cell in cells if not cell.floor], [cell for cell in cells if cell.floor]
    pairs = [(cell, floor) for cell in own for floor in floors] + [(own[0], other) for other in own[1:]]
    for first, second in pairs if differences else []:
        between = paired_difference(statistic(first), statistic(second), patients, config)
        found.append(score(first, between, second.encoder))
    return found


def _worded(interval: Interval, groups: str) -> Interval:
    """Where images are drawn and no patients, the interval's note speaks of images."""
    return interval if groups == "patient" else replace(interval, note=interval.note.replace("patient", groups))
