"""One visit: a slide and a key in, exactly grid^2 patches out. It depends on its own key and its own pixels only."""

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.data.cells import Cells, Tissue
from histoscale.data.eligible import slide_table
from histoscale.data.keys import key, permutation
from histoscale.data.pixelfilter import passes
from histoscale.data.plan import SamplerConfig, SlideTable, Visit
from histoscale.data.readers.pyramid import Damage, DecodeError, LayoutError, Reader
from histoscale.data.readers.scale import Scale, read_scaled
from histoscale.data.serving import serve, tissue_of
from histoscale.data.storage import Changed, Missing, Store

REGIONS = 8  # after so many regions the patches that passed are repeated
_KEPT_BYTES = 64 << 20  # integral images that a process keeps, with their slides open


class VisitFailed(Exception):
    """The bytes of the slide do not give a single patch; the message says why. tested: patches that the pixel filter refused."""

    def __init__(self, reason: str, tested: int = 0) -> None:
        super().__init__(reason)
        self.tested = tested


@dataclass(frozen=True)
class Patches:
    """A visit as it was read.

    pixels: uint8 [n, S, S, 3]. x, y: int64 [n], level px. level: stored level. mpp: true um/px.
    tested, passed: patches that the pixel filter saw and let pass. repeated: how many of the n are repeats.
    """

    pixels: np.ndarray
    x: np.ndarray
    y: np.ndarray
    level: int
    mpp: float
    tested: int
    passed: int
    repeated: int


class Source(Protocol):
    """Where visits are read from: slides here, ready tiles in tiles.py. Pickled into every worker."""

    slide_ids: list[str]

    def table(self) -> SlideTable:
        """What the plan must know of the slides."""

    def describe(self, slide: int) -> tuple[str, str, str]:
        """Site, scanner and organ of a slide, empty where unknown."""

    def read(self, visit: Visit) -> Patches:
        """The patches of a visit. Raises VisitFailed for what the bytes say, StorageError for what time might heal."""


@dataclass
class Opened:
    """reader, and by target mpp the scale and the cells, which share the slide's tissue."""

    reader: Reader
    tissue: Tissue
    targets: dict[int, tuple[Scale, Cells]]


class SlideSource:
    """The slides of a catalog."""

    def __init__(self, catalog: Catalog, store: Store, sampler: SamplerConfig) -> None:
        self.catalog, self.store, self.sampler = catalog, store, sampler
        self.slide_ids = [slide.slide_id for slide in catalog.slides]
        self.ineligible: list[tuple[str, str]] = []  # slide id and why, after table()
        self._table: SlideTable | None = None
        self._opened: OrderedDict[int, Opened] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"catalog": self.catalog, "store": self.store, "sampler": self.sampler}  # the rest is this process's own

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def describe(self, slide: int) -> tuple[str, str, str]:
        row = self.catalog.slides[slide]
        return row.site or "", row.scanner or "", row.organ or ""

    def table(self) -> SlideTable:
        """Slides, tissue areas, and which slide can serve which mpp: a level is near or fine enough, and one cell fits."""
        if self._table is None:
            self._table, self.ineligible = slide_table(self.catalog, self.sampler)
        return self._table

    def read(self, visit: Visit) -> Patches:
        """Regions placed by key until grid^2 patches have passed, then repeats. Raises VisitFailed, StorageError."""
        try:
            opened = self.open_slide(visit.slide)
            return self._patches(visit.key, opened.reader, *opened.targets[visit.target])
        except (Missing, Changed, LayoutError, DecodeError) as error:
            raise VisitFailed(str(error)) from error

    def _patches(self, k: int, reader: Reader, scale: Scale, cells: Cells) -> Patches:
        side, grid = self.sampler.patch_px, self.sampler.grid
        wanted, holds = grid**2, int(min(cells.width, cells.height) / cells.size + 1e-6)
        pixels = np.empty((wanted, side, side, 3), np.uint8)
        corners = np.empty((wanted, 2), np.int64)
        have = tested = passed = 0
        for region in range(REGIONS):
            if have == wanted:
                break
            place = key(k, "region", region)
            cut = min(grid if region == 0 else math.ceil(math.sqrt(wanted - have)), holds)
            x, y, fits = cells.region(place, cut)
            rows, columns = np.nonzero(fits)
            order = permutation(key(place, "cells"), len(rows))
            rows, columns = rows[order], columns[order]
            read, found = self._cut(reader, scale, x, y, rows, columns)
            whole = np.flatnonzero(found)
            good = whole[passes([read[i] for i in whole], self.sampler.pixel_filter)]
            tested, passed = tested + len(whole), passed + len(good)
            for i in good[: wanted - have]:
                pixels[have] = read[i]
                corners[have] = x + round(columns[i] * cells.size), y + round(rows[i] * cells.size)
                have += 1
        if not have:
            raise VisitFailed(f"no patch from {REGIONS} regions could be decoded and passed the pixel filter", tested)
        again = np.arange(wanted - have) % have
        pixels[have:], corners[have:] = pixels[again], corners[again]
        return Patches(pixels, corners[:, 0], corners[:, 1], scale.level, scale.mpp, tested, passed, wanted - have)

    def _cut(
        self, reader: Reader, scale: Scale, x: int, y: int, rows: np.ndarray, columns: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The cells (row, column) of the region at x, y as uint8 [S, S, 3] each, and bool: which of them could be decoded.

        One read spans the cells that are wanted. OpenSlide does not say which tile is damaged: then each cell is read by itself.
        """
        side, step = self.sampler.patch_px, self.sampler.patch_px * scale.factor
        first_row, first_column = (_whole(int(n.min()), step) for n in (rows, columns))
        height, width = (int(rows.max()) + 1 - first_row) * side, (int(columns.max()) + 1 - first_column) * side
        damage: list[Damage] = []
        image = read_scaled(reader, scale, x + round(first_column * step), y + round(first_row * step), width, height, damage)
        tops, lefts = (rows - first_row) * side, (columns - first_column) * side
        cells = [image[top : top + side, left : left + side] for top, left in zip(tops, lefts, strict=True)]
        if damage and reader.layout.kind == "openslide":
            found = np.zeros(len(cells), bool)
            for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
                damage = []
                cells[i] = read_scaled(reader, scale, x + round(column * step), y + round(row * step), side, side, damage)
                found[i] = not damage
            return cells, found
        found = np.ones(len(cells), bool)
        for part in damage:
            found &= (tops >= part.bottom) | (tops + side <= part.top) | (lefts >= part.right) | (lefts + side <= part.left)
        return cells, found

    def open_slide(self, slide: int) -> Opened:
        """The slide's reader and cells; the last few are kept, for all threads."""
        with self._lock:
            if slide in self._opened:
                self._opened.move_to_end(slide)
                return self._opened[slide]
        tissue = tissue_of(self.catalog, slide)
        every = {target: serve(self.catalog, slide, tissue, self.sampler, mpp) for target, mpp in enumerate(self.sampler.mpps)}
        targets = {target: found for target, found in every.items() if found is not None}
        opened = Opened(self.catalog.reader(slide, self.store), tissue, targets)
        with self._lock:
            self._opened[slide] = opened
            while len(self._opened) > 1 and sum(one.tissue.integral.nbytes for one in self._opened.values()) > _KEPT_BYTES:
                self._opened.popitem(last=False)
        return opened


def _whole(first: int, step: float) -> int:
    """The first row or column to read from: a read starts at a whole level pixel, else at the region's corner."""
    return first if float(first * step).is_integer() else 0
