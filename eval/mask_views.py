"""Which squares of the images a decoder sees: eva's tiles, eva's random crops, or whole images, brought to the encoder's side."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from histoscale.data.keys import keys, uniform
from histoscale.eval.datasets.masks import LabelledMasks
from histoscale.eval.datasets.patches import DatasetError

# RandomResizedCrop of torchvision as eva calls it: share of the area, width / height, attempts.
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class Views:
    """v views. images: int64 [v], rows of the set. boxes: int64 [v, 4] of left, top, width, height, px of the image.

    stretch: a box is resized to the square as it is; else its shorter side is, and the middle is taken.
    """

    images: np.ndarray
    boxes: np.ndarray
    stretch: bool

    def __len__(self) -> int:
        return len(self.images)

    def effective_mpp(self, mpp: float, side: int) -> np.ndarray:
        """[v] µm per pixel of the views at `side` px; of a stretched box, by its shorter side."""
        return mpp * self.boxes[:, 2:].min(axis=1) / side


def score_views(masks: LabelledMasks) -> Views:
    """What is scored, image by image: the tiles of a grid without overlap, column by column, or the whole image."""
    images, boxes = [], []
    for row, (height, width) in enumerate(masks.shapes.tolist()):
        tile = masks.tile_px
        found = [(0, 0, width, height)]
        if tile is not None:
            found = [(x, y, tile, tile) for x in range(0, width - tile + 1, tile) for y in range(0, height - tile + 1, tile)]
        images += [row] * len(found)
        boxes += found
    return Views(np.array(images, np.int64), np.array(boxes, np.int64).reshape(-1, 4), stretch=False)


def random_crops(shapes: np.ndarray, images: np.ndarray, epoch: int, seed: int) -> Views:
    """One crop of each of the images (rows of `shapes` [n, 2]), a function of (seed, epoch, image) alone.

    torchvision's RandomResizedCrop: up to ten draws of an area and a ratio, else the largest middle crop of an allowed ratio.
    """
    draws = uniform(keys(seed, "segment/crop", epoch, torch.from_numpy(images)), 4 * CROP_ATTEMPTS).double().numpy()
    boxes = [_crop(int(h), int(w), draw) for (h, w), draw in zip(shapes[images], draws, strict=True)]
    return Views(images, np.array(boxes, np.int64).reshape(-1, 4), stretch=True)


def _crop(height: int, width: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """left, top, width, height."""
    for area, ratio, x, y in draws.reshape(-1, 4):
        target = height * width * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
        aspect = math.exp(math.log(CROP_RATIO[0]) + ratio * (math.log(CROP_RATIO[1]) - math.log(CROP_RATIO[0])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    w, h = width, height
    if width / height < CROP_RATIO[0]:
        h = round(width / CROP_RATIO[0])
    elif width / height > CROP_RATIO[1]:
        w = round(height * CROP_RATIO[1])
    return (width - w) // 2, (height - h) // 2, w, h


class Cutter:
    """Cuts views out of a set; the last `keep` decoded images are held."""

    def __init__(self, masks: LabelledMasks, keep: int) -> None:
        self.masks = masks
        self._image = lru_cache(maxsize=keep)(self._read)

    def _read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Raises DatasetError for labels outside of the set's classes."""
        pixels, mask = self.masks.read(row)
        known = [*range(len(self.masks.classes)), *([] if self.masks.ignore is None else [self.masks.ignore])]
        strange = sorted(set(np.unique(mask).tolist()) - set(known))
        if strange or mask.shape != pixels.shape[1:]:
            raise DatasetError(
                f"{self.masks.name}, image {self.masks.names[row]}: a mask {mask.shape} with the labels {strange} on pixels "
                f"{pixels.shape}, expected labels of {known} in one shape: the reader of the set is wrong"
            )
        return pixels, mask.astype(np.uint8)

    def cut(self, views: Views, rows: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [b, 3, side, side] by antialiased bilinear interpolation of uint8, and labels uint8 [b, side, side] by the
        nearest pixel, both after the box was cut: eva's ResizeAndCrop and torchvision's RandomResizedCrop."""
        pixels, labels = np.empty((len(rows), 3, side, side), np.uint8), np.empty((len(rows), side, side), np.uint8)
        size = [side, side] if views.stretch else [side]
        for place, view in enumerate(rows.tolist()):
            image, mask = self._image(int(views.images[view]))
            left, top, width, height = views.boxes[view].tolist()
            box = np.ascontiguousarray(image[:, top : top + height, left : left + width])
            truth = np.ascontiguousarray(mask[None, top : top + height, left : left + width])
            resized = tv.resize(torch.from_numpy(box), size, InterpolationMode.BILINEAR, antialias=True)
            nearest = tv.resize(torch.from_numpy(truth), size, InterpolationMode.NEAREST)
            pixels[place] = tv.center_crop(resized, [side, side]).numpy()
            labels[place] = tv.center_crop(nearest, [side, side])[0].numpy()
        return pixels, labels
