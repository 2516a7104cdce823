"""From the magnification that is wanted to the level that is read and one exact resampling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from histoscale.data.readers.pyramid import Damage, Reader

_SUPPORT = 2  # pixels on each side that the cubic kernel reaches, times the factor when shrinking


@dataclass(frozen=True)
class Scale:
    """level: the one to read. mpp: true µm per pixel of the output. factor: level pixels per output pixel, 1.0 = unscaled."""

    level: int
    mpp: float
    factor: float


def choose_scale(level_mpps: Sequence[float], target_mpp: float, tolerance: float, max_upsample: float) -> Scale | None:
    """The stored level within `tolerance` of the target (relative) as it is, else the coarsest finer one, shrunk; else level 0
    enlarged by at most `max_upsample`; else None.

    Near-1 resampling is a fingerprint of the scanner (DESIGN: 5 %), hence the tolerance.
    """
    if target_mpp <= 0 or not level_mpps:
        raise ValueError(f"target_mpp is {target_mpp} with {len(level_mpps)} levels: expected a positive mpp and a level")
    near = min(range(len(level_mpps)), key=lambda i: abs(math.log(level_mpps[i] / target_mpp)))
    if abs(level_mpps[near] / target_mpp - 1) <= tolerance:
        return Scale(near, level_mpps[near], 1.0)
    finer = [i for i, mpp in enumerate(level_mpps) if mpp < target_mpp]
    level = max(finer, key=lambda i: level_mpps[i]) if finer else min(range(len(level_mpps)), key=lambda i: level_mpps[i])
    factor = target_mpp / level_mpps[level]
    return Scale(level, target_mpp, factor) if factor * max_upsample >= 1 else None


def read_scaled(
    reader: Reader, scale: Scale, x: int, y: int, width: int, height: int, damage: list[Damage] | None = None
) -> np.ndarray:
    """uint8 [height, width, 3]; x, y: integer level coordinates of the corner; width, height: output pixels.

    One antialiased cubic resampling (a = -0.5) of the whole region, its corner at exactly (x, y), with real pixels around it
    under the kernel: no seam where two regions meet. `damage` as in `Reader.region`, in output pixels, widened by the kernel.
    """
    if scale.factor == 1.0:
        return reader.region(scale.level, x, y, width, height, damage)
    margin = math.ceil(_SUPPORT * max(scale.factor, 1.0)) + 1
    across, down = width * scale.factor, height * scale.factor
    found: list[Damage] | None = None if damage is None else []
    source = reader.region(
        scale.level, x - margin, y - margin, math.ceil(across) + 2 * margin, math.ceil(down) + 2 * margin, found
    )
    box = (margin, margin, margin + across, margin + down)
    image = Image.fromarray(source).resize((width, height), Image.Resampling.BICUBIC, box)
    if damage is not None:
        for part in found or ():
            left, top = ((part.left - 2 * margin) / scale.factor, (part.top - 2 * margin) / scale.factor)
            right, bottom = part.right / scale.factor, part.bottom / scale.factor
            mapped = Damage(
                max(math.floor(left), 0), max(math.floor(top), 0), min(math.ceil(right), width), min(math.ceil(bottom), height)
            )
            if mapped.left < mapped.right and mapped.top < mapped.bottom:
                damage.append(mapped)
    return np.asarray(image)
