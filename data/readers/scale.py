"""From the magnification that is wanted to the level that is read and how it is shrunk."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from histoscale.data.readers.pyramid import REDUCTIONS, Canvas, Damage, Level, Reader

_GAP = 2.0  # a level averaged over squares keeps so many pixels per output pixel before a fractional resampling


@dataclass(frozen=True)
class Scale:
    """level: the one to read. mpp: true um per pixel of the output. factor: level pixels per output pixel, 1.0 = unscaled."""

    level: int
    mpp: float
    factor: float


def choose_scale(level_mpps: Sequence[float], target_mpp: float, tolerance: float, max_upsample: float) -> Scale | None:
    """The stored level within `tolerance` of the target (relative) as it is; else the coarsest level that is within it once
    averaged over squares of 2, 4 or 8; else the coarsest finer one, shrunk; else level 0 enlarged by at most `max_upsample`; else
    None.

    Near-1 resampling is a fingerprint of the scanner (DESIGN: 5 %), hence the tolerance; its true mpp is recorded.
    """
    if target_mpp <= 0 or not level_mpps:
        raise ValueError(f"target_mpp is {target_mpp} with {len(level_mpps)} levels: expected a positive mpp and a level")
    for whole in (1, *reversed(REDUCTIONS)):
        near = min(range(len(level_mpps)), key=lambda i: abs(math.log(level_mpps[i] * whole / target_mpp)))
        if abs(level_mpps[near] * whole / target_mpp - 1) <= tolerance:
            return Scale(near, level_mpps[near] * whole, float(whole))
    finer = [i for i, mpp in enumerate(level_mpps) if mpp < target_mpp]
    level = max(finer, key=lambda i: level_mpps[i]) if finer else min(range(len(level_mpps)), key=lambda i: level_mpps[i])
    factor = target_mpp / level_mpps[level]
    return Scale(level, target_mpp, factor) if factor * max_upsample >= 1 else None


def reduction(scale: Scale, level: Level) -> int:
    """The reduced scale (1, 2, 4, 8) that `level` decodes at: all of the factor, or as much as leaves pixels to resample from."""
    for reduce in REDUCTIONS:
        if level.reducible(reduce) and (scale.factor == reduce or scale.factor >= _GAP * reduce):
            return reduce
    return 1


def read_scaled(
    reader: Reader,
    scale: Scale,
    x: int,
    y: int,
    width: int,
    height: int,
    damage: list[Damage] | None = None,
    wanted: np.ndarray | None = None,
    canvas: Canvas | None = None,
) -> np.ndarray:
    """uint8 [height, width, 3]; x, y: integer level coordinates of the corner; width, height: output pixels.

    Whole factors average squares of pixels: while decoding, where x and y are multiples of the reduced scale, else after it.
    Other factors go through one antialiased resampling of the whole region, its corner at exactly (x, y), with real pixels around
    it under the kernel: no seam where two regions meet. Hamming's window comes nearest to averaging (its response at the output's
    Nyquist frequency is .60, averaging has .64, a cubic .49), so that factors do not tell scanners apart; enlarging is cubic
    (a = -0.5). damage and wanted as in `Reader.region`, in output pixels; canvas for factors that are a reduced scale alone.
    """
    reduce = reduction(scale, reader.layout.levels[scale.level])
    if x % reduce or y % reduce:
        reduce = 1
    factor = scale.factor / reduce
    if factor == 1.0:
        return reader.region(scale.level, x // reduce, y // reduce, width, height, damage, reduce, wanted, canvas)
    found: list[Damage] | None = None if damage is None else []
    if factor in REDUCTIONS:
        whole = int(factor)
        source = reader.region(scale.level, x // reduce, y // reduce, width * whole, height * whole, found, reduce, wanted)
        pixels, margin = np.asarray(Image.fromarray(source).reduce(whole)), 0
    else:
        kernel, support = (Image.Resampling.HAMMING, factor) if factor > 1 else (Image.Resampling.BICUBIC, 2.0)
        margin = math.ceil(support) + 1
        across, down = width * factor, height * factor
        sides = math.ceil(across) + 2 * margin, math.ceil(down) + 2 * margin
        source = reader.region(scale.level, x // reduce - margin, y // reduce - margin, *sides, found, reduce)
        box = (margin, margin, margin + across, margin + down)
        pixels = np.asarray(Image.fromarray(source).resize((width, height), kernel, box))
    if damage is not None:
        damage += (part for hole in found or () for part in _seen(hole, factor, margin, width, height))
    return pixels


def _seen(hole: Damage, factor: float, margin: int, width: int, height: int) -> list[Damage]:
    """A damaged part of the source in output pixels, widened by the kernel; nothing where it is outside."""
    left, top = (max(math.floor((edge - 2 * margin) / factor), 0) for edge in (hole.left, hole.top))
    right, bottom = (min(math.ceil(edge / factor), side) for edge, side in ((hole.right, width), (hole.bottom, height)))
    return [Damage(left, top, right, bottom)] if left < right and top < bottom else []
