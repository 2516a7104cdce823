"""The cells of one region, read as they are asked for: a tile that several of them share is fetched and decoded once."""

import numpy as np

from histoscale.data.readers.pyramid import Canvas, Damage, Reader
from histoscale.data.readers.scale import Scale, read_scaled, reduction


class Mosaic:
    """rows x columns cells of side_px output pixels, the corner at x, y (level px).

    pixels: uint8 [rows * side_px, columns * side_px, 3], true where cells were read. Tiles that are read by range at a whole
    reduced scale come bit by bit; what OpenSlide reads or a kernel resamples comes at once, all that may be wanted.
    """

    def __init__(self, reader: Reader, scale: Scale, x: int, y: int, fits: np.ndarray, side_px: int) -> None:
        self.reader, self.scale, self.x, self.y, self.fits, self.side_px = reader, scale, x, y, fits, side_px
        self.height, self.width = fits.shape[0] * side_px, fits.shape[1] * side_px
        reduce = reduction(scale, reader.layout.levels[scale.level])
        self._piecewise = reader.layout.kind == "tiff" and scale.factor == reduce and x % reduce == 0 == y % reduce
        self._canvas = Canvas(np.empty((self.height, self.width, 3), np.uint8), set(), fits) if self._piecewise else None
        self._damage: list[Damage] = []  # of all that was painted: later cells may share a tile
        self._readable: np.ndarray | None = None
        self.pixels = self._canvas.pixels if self._canvas is not None else np.empty((0, 0, 3), np.uint8)

    def read(self, wanted: np.ndarray) -> np.ndarray:
        """Reads the wanted cells, bool [rows, columns], which are among those that fit; bool: which of them could be decoded."""
        if self._canvas is not None:
            every = None if wanted.all() else wanted
            read_scaled(self.reader, self.scale, self.x, self.y, self.width, self.height, self._damage, every, self._canvas)
            return wanted & self._whole(self._damage)
        if self._readable is None:
            damage: list[Damage] = []
            self.pixels = read_scaled(self.reader, self.scale, self.x, self.y, self.width, self.height, damage, self.fits)
            self._readable = self._whole(damage)
            if damage and self.reader.layout.kind == "openslide":
                self._readable = self._one_by_one()
        return wanted & self._readable

    def cell(self, row: int, column: int) -> np.ndarray:
        """uint8 [side_px, side_px, 3], a view."""
        top, left = row * self.side_px, column * self.side_px
        return self.pixels[top : top + self.side_px, left : left + self.side_px]

    def _whole(self, damage: list[Damage]) -> np.ndarray:
        """bool [rows, columns]: cells that no damage reaches into."""
        whole, side = np.ones(self.fits.shape, bool), self.side_px
        for part in damage:
            whole[part.top // side : (part.bottom - 1) // side + 1, part.left // side : (part.right - 1) // side + 1] = False
        return whole

    def _one_by_one(self) -> np.ndarray:
        """Which cells can be decoded, each read by itself: OpenSlide does not say which tile of a region is damaged."""
        readable, step = self.fits.copy(), self.side_px * self.scale.factor
        self.pixels = self.pixels.copy()
        for row, column in np.argwhere(self.fits):
            damage: list[Damage] = []
            corner = self.x + round(column * step), self.y + round(row * step)
            found = read_scaled(self.reader, self.scale, *corner, self.side_px, self.side_px, damage)
            self.cell(row, column)[:] = found
            readable[row, column] = not damage
        return readable
