"""The most tissue that a square window of a slide holds: what decides, nearly always without the mask, whether a patch fits."""

import numpy as np

_ROUNDING = 1e-6  # at least what cells.py allows for: a narrower decision asks the mask
SIDES = np.unique(np.rint(2.0 ** (np.arange(49) / 4))).astype(np.int64)  # mask px, 1 to 4096 in steps of about 2 ** .25


def tissue_windows(mask: np.ndarray) -> np.ndarray:
    """Most pixels of tissue in a square of each of SIDES, at whole pixels of the mask bool [h, w]: int32 [len(SIDES)]."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros(len(SIDES), np.int32)
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    integral = np.zeros((crop.shape[0] + 1, crop.shape[1] + 1), np.int32)
    np.cumsum(np.cumsum(crop, axis=0, dtype=np.int32), axis=1, out=integral[1:, 1:])
    most = np.full(len(SIDES), integral[-1, -1], np.int32)
    for place, side in enumerate(SIDES[: np.searchsorted(SIDES, max(crop.shape))].tolist()):
        high, wide = min(side, crop.shape[0]), min(side, crop.shape[1])
        strips = integral[high:] - integral[:-high]
        most[place] = (strips[:, wide:] - strips[:, :-wide]).max()
    return most


def decide(
    windows: np.ndarray, side: np.ndarray, fraction: float, step: np.ndarray, overhang: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """bool [n] each: a patch surely fits, and a patch surely does not; where neither holds, the mask must be asked.

    windows: [n, len(SIDES)]. side: of the patch. step: between the corners that a patch may have. overhang: by how much the mask
    is larger than the level, summed over both axes. [n] each, mask px, of any real value. fraction: least share of tissue.
    """
    rows = np.arange(len(windows))
    needed = fraction * side**2
    # A window that is a step smaller than the patch lies in a patch at an allowed corner; at the right and lower borders of the
    # level it may lie outside by the overhang and two steps an axis, which hold no more tissue than their area.
    place = np.searchsorted(SIDES, side - step, side="right") - 1
    inner = SIDES[np.maximum(place, 0)]
    held = windows[rows, np.maximum(place, 0)] - inner * (overhang + 4 * step)
    surely = (place >= 0) & (held >= needed * (1 + _ROUNDING))
    # A patch lies in a window of whole pixels that is one pixel larger, and holds such a window that is one pixel smaller.
    place = np.searchsorted(SIDES, np.ceil(side) + 1)
    outer = np.where(place < len(SIDES), windows[rows, np.minimum(place, len(SIDES) - 1)], side**2)
    place = np.searchsorted(SIDES, side - 1, side="right") - 1
    inner = np.where(place >= 0, SIDES[np.maximum(place, 0)], 0)
    within = np.where(place >= 0, windows[rows, np.maximum(place, 0)], 0) + side**2 - inner**2
    never = np.minimum(outer, within) < needed * (1 - 2 * _ROUNDING) - _ROUNDING
    return surely, never
