"""From a labelled image to what an encoder sees of it: three policies, and at how many µm per pixel each of them looks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

POLICIES = ("resize", "eva", "native")


@dataclass(frozen=True)
class LevelConfig:
    """How patches are cut from slides: a level within `mpp_tolerance` of the target is taken unscaled, and nothing is enlarged
    more than `max_upsample`."""

    mpp_tolerance: float
    max_upsample: float


@dataclass(frozen=True)
class TargetConfig(LevelConfig):
    """mpp: of the tiles of `resolution=native`, as in ResolutionConfig."""

    mpp: float | None


@dataclass(frozen=True)
class ResolutionConfig:
    """How images become inputs of an encoder of `size_px`.

    name: `resize`: the shorter side to the encoder's size by its own interpolation, antialiased, in float, then the centre.
    `eva`: the same geometry on uint8, bilinear and antialiased (kaiko-ai/eva: vision/data/transforms/common/resize_and_crop.py).
    `native`: tiles of the encoder's size without overlap, the grid in the centre of the image; the features of the tiles are
    meaned. An image smaller than a tile is enlarged until its shorter side fits one, as padding would show the encoder an edge
    that no tissue has; the effective µm/px of the set says so.
    mpp: µm per pixel of the tiles of `native`, null takes the set's own; null for the others.
    """

    name: str
    mpp: float | None


class ResolutionError(ValueError):
    """A policy that cannot be followed; the message says what was expected."""


@dataclass(frozen=True)
class View:
    """What encoders of one input see: equal views of an image have equal pixels.

    policy: one of POLICIES, or `whole` for encoders that take images of any size. size_px: the input's side, None for `whole`.
    interpolation: `bicubic` or `bilinear`. scale: pixels of `native` per pixel of the image, before small images are enlarged.
    """

    policy: str
    size_px: int | None
    interpolation: str
    scale: float

    @property
    def identity(self) -> str:
        """For names of files, beside the encoder's hash (which knows size and interpolation)."""
        return f"native-{self.scale!r}" if self.policy == "native" else self.policy

    def inputs(self, images: Sequence[np.ndarray] | np.ndarray, uniform: bool) -> tuple[Tensor, np.ndarray]:
        """b images uint8 [3, h, w] -> inputs [k, 3, S, S], uint8 or float32 in 0..1, and int64 [b]: how many are of each image.

        With `uniform` images (all of one size) `resize` and `whole` hand them over as they are: encoders resize on their device.
        """
        if uniform and self.policy in ("resize", "whole"):
            return torch.from_numpy(np.array(images, order="C")), np.ones(len(images), np.int64)
        made = [self._of_one(torch.from_numpy(np.array(image, order="C"))) for image in images]
        return torch.cat(made), np.array([len(x) for x in made])

    def _of_one(self, image: Tensor) -> Tensor:
        """uint8 [3, h, w] -> [k, 3, S, S]."""
        side = self.size_px
        if side is None:
            return image[None]
        if self.policy == "eva":
            whole = TF.resize(image, [side], interpolation=TF.InterpolationMode.BILINEAR, antialias=True)
            return TF.center_crop(whole, [side, side])[None]
        if self.policy == "resize":
            return fitted(image[None], side, self.interpolation)
        height, width = _native_size(image.shape[1], image.shape[2], side, self.scale)
        if (height, width) == tuple(image.shape[1:]):
            return tiles(image, side)
        return tiles(resized(image[None], (height, width), self.interpolation)[0], side)

    def sight(self, height: int, width: int) -> tuple[float, int, float]:
        """Of an image of this size: pixels that the encoder sees per pixel of the image, how many inputs, share of its area."""
        side = self.size_px
        if side is None:
            return 1.0, 1, 1.0
        if self.policy == "native":
            high, wide = _native_size(height, width, side, self.scale)
            count = (high // side) * (wide // side)
        else:
            (high, wide), count = _shorter_to(height, width, side), 1
        return min(high, wide) / min(height, width), count, count * side * side / (high * wide)


def check_resolution(config: ResolutionConfig) -> None:
    """Raises ResolutionError for another policy, and for a target that is none or not `native`'s."""
    if config.name not in POLICIES:
        raise ResolutionError(f"resolution is {config.name!r}: expected one of {', '.join(POLICIES)}")
    if config.mpp is not None and config.name != "native":
        raise ResolutionError(f"grid.mpp is {config.mpp:g}: only resolution=native has a target, set null for {config.name}")
    if config.mpp is not None and not config.mpp > 0:
        raise ResolutionError(f"grid.mpp is {config.mpp:g}: expected µm per pixel above 0")


def view_of(size_px: int | None, interpolation: str, config: ResolutionConfig, mpp: float | None) -> View:
    """The view of an encoder on images of `mpp` µm per pixel (None: unknown).

    Raises ResolutionError for another policy, for a target that is not `native`'s, and for one without a known mpp.
    """
    check_resolution(config)
    if config.mpp is not None and mpp is None:
        raise ResolutionError(
            f"grid.mpp is {config.mpp:g} but the µm per pixel of the images are unknown: set dataset.mpp=, or "
            "grid.mpp=null to tile the images as they are"
        )
    scale = 1.0 if config.mpp is None or mpp is None else mpp / config.mpp
    if size_px is None:
        return View("whole", None, interpolation, 1.0)
    return View(config.name, size_px, "bilinear" if config.name == "eva" else interpolation, scale)


# Pixels.


def fitted(pixels: Tensor, side: int, interpolation: str) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, side, side] in 0..1: the shorter side to `side`, antialiased, then the centre."""
    x = resized(pixels, _shorter_to(pixels.shape[-2], pixels.shape[-1], side), interpolation)
    top, left = (round((length - side) / 2) for length in x.shape[-2:])
    return x[..., top : top + side, left : left + side]


def resized(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, *size] in 0..1."""
    x = pixels.float() / 255
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size, mode=interpolation, antialias=True, align_corners=False).clamp(0, 1)


def tiles(image: Tensor, side: int) -> Tensor:
    """[3, h, w], neither side under `side` -> [k, 3, side, side], row by row; what is over is left on all four borders alike."""
    rows, columns = image.shape[1] // side, image.shape[2] // side
    top, left = (image.shape[1] - rows * side) // 2, (image.shape[2] - columns * side) // 2
    grid = image[:, top : top + rows * side, left : left + columns * side].reshape(3, rows, side, columns, side)
    return grid.permute(1, 3, 0, 2, 4).reshape(rows * columns, 3, side, side)


def _shorter_to(height: int, width: int, side: int) -> tuple[int, int]:
    """As torchvision rounds: the longer side down."""
    long = int(side * max(height, width) / min(height, width))
    return (side, long) if height <= width else (long, side)


def _native_size(height: int, width: int, side: int, scale: float) -> tuple[int, int]:
    size = round(height * scale), round(width * scale)
    return size if min(size) >= side else _shorter_to(height, width, side)


# What is printed.


@dataclass(frozen=True)
class Range:
    """Over the images of a set."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Range":
        return cls(float(values.min()), float(np.median(values)), float(values.max()))

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.4g}"
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Sight:
    """What an encoder sees of a set's images.

    zoom: pixels of its input per pixel of the image. effective_mpp: µm per pixel of its input. field_um: the side of what one
    input shows (of a whole image: its shorter side). tiles: inputs an image. share: of the image's area that is seen at all.
    effective_mpp and field_um are None where the set's µm per pixel are unknown.
    """

    zoom: Range
    effective_mpp: Range | None
    field_um: Range | None
    tiles: Range
    share: Range

    def __str__(self) -> str:
        """Median (lowest to highest) where images differ."""
        if self.effective_mpp is None or self.field_um is None:
            words = f"unknown µm/px (images zoomed × {self.zoom})"
        else:
            words = f"{self.effective_mpp} µm/px, a field of {self.field_um} µm"
        words += f", {self.tiles} tiles an image" if self.tiles.high > 1 else ""
        return words + (f", {self._percent()} % of the image" if self.share.low < 0.9995 else "")

    def _percent(self) -> str:
        return str(Range(*(round(100 * value, 1) for value in (self.share.low, self.share.median, self.share.high))))


def sight_of(sizes: np.ndarray, view: View, mpp: float | None) -> Sight:
    """sizes: int [n, 2], height and width of the images; mpp: µm per pixel of them, None where unknown."""
    distinct, index = np.unique(sizes, axis=0, return_inverse=True)
    seen = np.array([view.sight(int(height), int(width)) for height, width in distinct])[index.reshape(-1)]
    zoom = seen[:, 0]
    sides = sizes.min(axis=1) if view.size_px is None else np.full(len(sizes), view.size_px)
    return Sight(
        zoom=Range.of(zoom),
        effective_mpp=None if mpp is None else Range.of(mpp / zoom),
        field_um=None if mpp is None else Range.of(mpp / zoom * sides),
        tiles=Range.of(seen[:, 1]),
        share=Range.of(seen[:, 2]),
    )
