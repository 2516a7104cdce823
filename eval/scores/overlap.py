"""Scores of predicted against true classes of pixels, each defined once, from counts of pixels by image and class."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MASKED_BY = ("label", "prediction")


@dataclass(frozen=True)
class Overlap:
    """Pixels of n images and K classes, background first: int64 [n, K] each. both: predicted and true, predicted, true."""

    both: np.ndarray
    predicted: np.ndarray
    true: np.ndarray

    def only(self, rows: np.ndarray) -> "Overlap":
        return Overlap(self.both[rows], self.predicted[rows], self.true[rows])


def confusions(labels: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """int64 [n, H, W] twice, on one device -> counts int64 [n, classes, classes]: row = true class, column = predicted class.

    Raises ValueError for shapes that differ and for values outside range(classes).
    """
    if labels.shape != predicted.shape:
        raise ValueError(f"labels are {list(labels.shape)} and predictions {list(predicted.shape)}: expected one shape")
    for name, values in (("labels", labels), ("predictions", predicted)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < classes:
            raise ValueError(f"{name} hold {int(values.min())} to {int(values.max())}: expected 0 to {classes - 1}")
    n = len(labels)
    codes = (labels.long() * classes + predicted.long()).reshape(n, -1)
    codes = codes + torch.arange(n, device=codes.device)[:, None] * classes**2
    return torch.bincount(codes.ravel(), minlength=n * classes**2).reshape(n, classes, classes).cpu().numpy()


def overlap(confusion: np.ndarray, ignore: int | None = None, masked_by: str = "label") -> Overlap:
    """Counts [n, C, C] of `confusions` -> the overlap of the classes without `ignore`.

    masked_by: `label` drops every pixel whose label is ignored. `prediction` is the defect of eva 0.4.5, for comparison with its
    numbers: a pixel loses its label where the *prediction* is the ignored class, and a prediction over an ignored label counts
    as wrong (kaiko-ai/eva:src/eva/vision/metrics/segmentation/_utils.py). Raises ValueError for another word.
    """
    if masked_by not in MASKED_BY:
        raise ValueError(f"masked_by is {masked_by!r}: expected {' or '.join(MASKED_BY)}")
    kept = [c for c in range(confusion.shape[1]) if c != ignore]
    inner = confusion[:, kept][:, :, kept]
    if masked_by == "label" or ignore is None:  # a prediction of the ignored class itself is no class at all: only a miss
        true = confusion[:, kept].sum(axis=2)
        predicted = inner.sum(axis=1)
    else:
        true = inner.sum(axis=2)
        predicted = confusion[:, :, kept].sum(axis=1)
    return Overlap(np.diagonal(inner, axis1=1, axis2=2).copy(), predicted, true)


def monai_dice(counts: Overlap, drop_empty: bool = True) -> float:
    """MONAI's mean Dice without background, as eva reports it (MonaiDiceScore).

    By image, 2|P∩G| / (|P| + |G|) of each foreground class that its truth holds; the mean over those; the mean over the images
    that hold any. An image without foreground is left out, whatever is predicted on it. With `drop_empty` False a class that the
    truth lacks counts as 1 where nothing is predicted of it and as 0 elsewhere. NaN where no image counts.
    """
    both, predicted, true = counts.both[:, 1:], counts.predicted[:, 1:], counts.true[:, 1:]
    dice = 2 * both / np.maximum(predicted + true, 1)
    present = true > 0
    if not drop_empty:
        dice, present = np.where(present, dice, predicted == 0), np.ones_like(present)
    found = present.any(axis=1)
    if not found.any():
        return float("nan")
    return float(((dice * present).sum(axis=1)[found] / present.sum(axis=1)[found]).mean())


def pooled_dice(counts: Overlap) -> np.ndarray:
    """2ΣTP / (2ΣTP + ΣFP + ΣFN) over all images: float [K], NaN for a class that the truth lacks."""
    both, predicted, true = counts.both.sum(axis=0), counts.predicted.sum(axis=0), counts.true.sum(axis=0)
    return np.where(true > 0, 2 * both / np.maximum(predicted + true, 1), np.nan)


def pooled_iou(counts: Overlap) -> np.ndarray:
    """ΣTP / (ΣTP + ΣFP + ΣFN) over all images: float [K], NaN for a class that the truth lacks."""
    both, predicted, true = counts.both.sum(axis=0), counts.predicted.sum(axis=0), counts.true.sum(axis=0)
    return np.where(true > 0, both / np.maximum(predicted + true - both, 1), np.nan)


def foreground_mean(values: np.ndarray) -> float:
    """Mean of pooled values [K] over the foreground classes that the truth holds; NaN where it holds none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an empty mean, which is the NaN that is meant
        return float(np.nanmean(values[1:]))


def false_positive_area(counts: Overlap, pixel_area: np.ndarray) -> float:
    """Mean area that is predicted as foreground in the images whose truth holds none; NaN without such an image.

    pixel_area: [n], of a pixel of each image, as in µm². What Dice without background never sees.
    """
    empty = counts.true[:, 1:].sum(axis=1) == 0
    if not empty.any():
        return float("nan")
    return float((counts.predicted[empty, 1:].sum(axis=1) * pixel_area[empty]).mean())
