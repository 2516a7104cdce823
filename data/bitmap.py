"""A tissue mask as it is kept: a bit a pixel, within the box around the tissue, of which any window is unpacked by itself."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Bitmap:
    """height, width: of the whole mask, px. left, top, rows, columns: the box around its tissue (all 0 where there is none).

    bits: uint8 [rows, ceil(columns / 8)].
    """

    height: int
    width: int
    left: int
    top: int
    rows: int
    columns: int
    bits: np.ndarray

    @staticmethod
    def of(mask: np.ndarray) -> "Bitmap":
        """A mask bool [height, width]."""
        down, across = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(down):
            return Bitmap(mask.shape[0], mask.shape[1], 0, 0, 0, 0, np.zeros((0, 0), np.uint8))
        top, left = int(down[0]), int(across[0])
        box = mask[top : down[-1] + 1, left : across[-1] + 1]
        return Bitmap(mask.shape[0], mask.shape[1], left, top, box.shape[0], box.shape[1], np.packbits(box, axis=1))

    def window(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """bool [bottom - top, right - left] of the box, in pixels of the box; within it."""
        first = left // 8
        packed = self.bits[top:bottom, first : -(-right // 8)]
        return np.unpackbits(packed, axis=1)[:, left - first * 8 : right - first * 8].view(bool)

    def mask(self) -> np.ndarray:
        """The whole mask, bool [height, width]."""
        whole = np.zeros((self.height, self.width), bool)
        if self.rows:
            box = self.window(0, 0, self.columns, self.rows)
            whole[self.top : self.top + self.rows, self.left : self.left + self.columns] = box
        return whole
