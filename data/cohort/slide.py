"""One slide of the cohort as a pure function of its key: any window as pixels, and the whole as an Aperio pyramid."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from scipy.ndimage import gaussian_filter

from histoscale.data.cohort import scanner as sc
from histoscale.data.cohort.artefacts import Artefacts
from histoscale.data.cohort.fields import Linear, between
from histoscale.data.cohort.tissue import MAP_UM, Tissue

Array = np.ndarray
TILE = 256
BLOCK = 512  # rendered at once: its planes stay in cache; a multiple of TILE, so that every level is cut from whole blocks
FACTORS = (1, 4, 16)


@dataclass
class VirtualSlide:
    """Tissue under a scanner. width, height: level-0 pixels at mpp; multiples of 16, so that levels 4 and 16 are exact means."""

    width: int
    height: int
    mpp: float
    objective: int
    device: str
    tissue: Tissue
    artefacts: Artefacts
    scanner: sc.Scanner

    def pixels(self, x: int, y: int, width: int, height: int) -> Array:
        """uint8 [height, width, 3] of level 0 before compression; a window beyond the slide is empty glass."""
        halo, mpp = sc.HALO, self.mpp
        shape = height + 2 * halo, width + 2 * halo
        x_um, y_um = (x - halo) * mpp, (y - halo) * mpp
        haematoxylin, eosin = self.tissue.densities(x_um, y_um, mpp, *shape)
        light = None
        if not self.artefacts.plain:
            a = self.artefacts
            rows = Linear(((np.arange(shape[0]) + 0.5) * mpp + y_um) / MAP_UM - 0.5, a.mask.shape[0])
            columns = Linear(((np.arange(width + 2 * halo) + 0.5) * mpp + x_um) / MAP_UM - 0.5, a.mask.shape[1])
            here = np.s_[..., rows.used, columns.used]
            if (a.defocus[here] > 0.01).any():
                share = between(a.defocus, rows, columns)
                soft_h, soft_e = self._defocused(x_um, y_um, *shape)
                haematoxylin, eosin = haematoxylin + share * (soft_h - haematoxylin), eosin + share * (soft_e - eosin)
            if (a.thickness[here] != 1).any():
                thickness = between(a.thickness, rows, columns)
                haematoxylin, eosin = haematoxylin * thickness, eosin * thickness
            if (a.light[here] != 1).any():
                light = between(a.light, rows, columns)
        return sc.expose(haematoxylin, eosin, self.scanner, mpp, (y, x), light)

    def _defocused(self, x_um: float, y_um: float, height: int, width: int) -> tuple[Array, Array]:
        """Both densities of a window blurred by the defocus, drawn at 1 um."""
        margin = 16
        left, top = int(np.floor(x_um)) - margin, int(np.floor(y_um)) - margin
        size = int(np.ceil(height * self.mpp)) + 2 * margin + 2, int(np.ceil(width * self.mpp)) + 2 * margin + 2
        rows = Linear((np.arange(height) + 0.5) * self.mpp + y_um - top - 0.5, size[0])
        columns = Linear((np.arange(width) + 0.5) * self.mpp + x_um - left - 0.5, size[1])
        planes = self.tissue.densities(left, top, 1.0, *size)
        blurred = (gaussian_filter(p, self.artefacts.defocus_um, truncate=3.5) for p in planes)
        first, second = (between(p, rows, columns) for p in blurred)
        return first, second

    def description(self, factor: int) -> str:
        """The header that Aperio scanners write, for the level of this factor."""
        size = f"{self.width}x{self.height} [0,0 {self.width}x{self.height}] (256x256)"
        level = "" if factor == 1 else f" -> {self.width // factor}x{self.height // factor}"
        kind = f"JPEG/RGB Q={self.scanner.quality}"
        extra = f"|AppMag = {self.objective}|ScanScope ID = {self.device}|MPP = {self.mpp:.4f}" if factor == 1 else ""
        return f"Aperio Image Library v12.0.15\r\n{size}{level} {kind}{extra}"

    def write(self, path: Path, pool: ThreadPoolExecutor | None = None) -> None:
        """Write a tiled JPEG pyramid (levels 1, 4, 16) that OpenSlide reads as Aperio; blocks are drawn by `pool` where
        there is one."""
        corners = [(y, x) for y in range(0, self.height, BLOCK) for x in range(0, self.width, BLOCK)]
        small = [np.empty((self.height // f, self.width // f, 3), np.uint8) for f in FACTORS[1:]]
        tiles: dict[tuple[int, int], bytes] = {}

        def draw(corner: tuple[int, int]) -> None:
            y, x = corner
            block = self.pixels(x, y, min(BLOCK, self.width - x), min(BLOCK, self.height - y))
            tiles.update({(y + dy, x + dx): jpeg for (dy, dx), jpeg in self._tiles(block)})
            for level, factor in zip(small, FACTORS[1:], strict=True):
                part = _mean(block, factor)
                level[y // factor : y // factor + part.shape[0], x // factor : x // factor + part.shape[1]] = part

        list((pool.map if pool else map)(draw, corners))
        subsampling = (2, 2) if self.scanner.subsampling == "420" else (1, 1)
        with tifffile.TiffWriter(path, bigtiff=self.width * self.height > 4_000_000_000) as tiff:
            for factor, level in zip(FACTORS, [None, *small], strict=True):
                encoded = [tiles[c] for c in sorted(tiles)] if level is None else [jpeg for _, jpeg in self._tiles(level)]
                tiff.write(
                    iter(encoded), shape=(self.height // factor, self.width // factor, 3), dtype="uint8", tile=(TILE, TILE),
                    photometric="ycbcr", compression="jpeg", subsampling=subsampling, description=self.description(factor),
                    metadata=None, software=False,
                )

    def _tiles(self, pixels: Array) -> Iterator[tuple[tuple[int, int], bytes]]:
        """JPEG tiles by their corner, row by row; the last ones are filled up with white."""
        for y in range(0, pixels.shape[0], TILE):
            for x in range(0, pixels.shape[1], TILE):
                tile = pixels[y : y + TILE, x : x + TILE]
                if tile.shape[:2] != (TILE, TILE):
                    tile = np.pad(tile, ((0, TILE - tile.shape[0]), (0, TILE - tile.shape[1]), (0, 0)), constant_values=255)
                yield (y, x), sc.encode(tile, self.scanner)


def _mean(pixels: Array, factor: int) -> Array:
    """uint8 [h / factor, w / factor, 3]: means of squares, halves rounded up. Whole rows are added first: few long additions."""
    h, w = pixels.shape[0] // factor, pixels.shape[1] // factor
    rows = pixels[: h * factor, : w * factor].reshape(h, factor, w * factor * 3)
    total = rows[:, 0].astype(np.uint16)  # 16 * 16 * 255 fits
    for i in range(1, factor):
        total += rows[:, i]
    columns = total.reshape(h, w, factor, 3)
    total = columns[:, :, 0].copy()
    for i in range(1, factor):
        total += columns[:, :, i]
    return ((total + np.uint32(factor**2 // 2)) // factor**2).astype(np.uint8)
