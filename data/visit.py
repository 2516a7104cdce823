"""One visit: a slide and a key in, exactly grid^2 patches out. It depends on its own key and its own pixels only."""

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.data.cells import NoPlace, Tissue
from histoscale.data.eligible import slide_table
from histoscale.data.journal import scrub
from histoscale.data.keys import key
from histoscale.data.normalise.slide import SlideNormaliser
from histoscale.data.pixelfilter import passes
from histoscale.data.plan import SamplerConfig, SlideTable, Visit
from histoscale.data.readers.pyramid import Damage, DecodeError, LayoutError, Reader
from histoscale.data.readers.scale import read_scaled
from histoscale.data.readers.vendor import FREE, Gate
from histoscale.data.serving import Serving, serve, tissue_of
from histoscale.data.storage import Changed, Missing, Store, is_remote
from histoscale.data.tables import Levels

HELD = 1.3  # memory of a visit in its patches: regions that they are views of may hold so much more
_GUESS = 4  # patches that the expected share of the pixel filter counts for, until the visit's own say more
REGIONS = 8  # after so many regions the patches that passed are repeated
_KEPT_BYTES = 16 << 20  # tile tables and integral images of open slides that a process keeps


class VisitFailed(Exception):
    """The bytes of the slide do not give a single patch; the message says why. tested: patches that the pixel filter refused."""

    def __init__(self, reason: str, tested: int = 0) -> None:
        super().__init__(reason)
        self.tested = tested


@dataclass(frozen=True)
class Patches:
    """A visit as it was read.

    pixels: n of uint8 [S, S, 3], views of the regions they were cut from. x, y: int64 [n], level px. level: stored level.
    mpp: true um/px.
    tested, passed: patches that the pixel filter saw and let pass. repeated: how many of the n are repeats.
    """

    pixels: Sequence[np.ndarray]
    x: np.ndarray
    y: np.ndarray
    level: int
    mpp: float
    tested: int
    passed: int
    repeated: int


class Source(Protocol):
    """Where visits are read from: slides here, ready tiles in tiles.py. Pickled into every worker."""

    @property
    def slide_ids(self) -> Sequence[str]:
        """Names of the slides, by row."""

    def decode_threads(self, count: int) -> None:
        """At most `count` threads of this process decode at a time; the others may wait for bytes."""

    def table(self) -> SlideTable:
        """What the plan must know of the slides."""

    def describe(self, slide: int) -> tuple[str, str, str]:
        """Site, scanner and organ of a slide, empty where unknown."""

    def traffic(self) -> tuple[int, int, int]:
        """Requests, bytes and repeated requests of this process so far."""

    def read(self, visit: Visit) -> Patches:
        """The patches of a visit. Raises VisitFailed for what the bytes say, StorageError for what time might heal."""


class Opened:
    """An open slide: its reader, its tissue, and how it serves each magnification that was asked for."""

    def __init__(self, reader: Reader, mpps: Sequence[float], tissue: Tissue, sampler: SamplerConfig) -> None:
        self.reader, self.mpps, self.tissue, self.sampler = reader, mpps, tissue, sampler
        self._served: dict[float, Serving] = {}

    def at(self, mpp: float) -> Serving:
        """How it serves `mpp` (um/px). Raises VisitFailed where it does not."""
        found = self._served.get(mpp)
        if found is None:
            found = serve(self.reader.layout.levels, self.mpps, self.tissue, self.sampler, mpp)
            if found is None:
                raise VisitFailed(f"no level serves {mpp:g} um/px; the slide has {', '.join(f'{m:.3g}' for m in self.mpps)}")
            if self.sampler.magnification == "discrete":  # magnifications of ranges never come back
                self._served[mpp] = found
        return found


class SlideSource:
    """The slides of a catalog. Threads share it; `decode_threads` bounds how many of them decode at a time.

    normaliser: brings what the pixel filter let pass to one stain.
    """

    def __init__(self, catalog: Catalog, store: Store, sampler: SamplerConfig, normaliser: SlideNormaliser | None = None) -> None:
        self.catalog, self.store, self.sampler, self.normaliser = catalog, store, sampler, normaliser
        self.ineligible: list[tuple[str, str]] = []  # slide id and why, after table()
        self._table: SlideTable | None = None
        self._opened: OrderedDict[int, Opened] = OrderedDict()
        self._lock = threading.Lock()
        self._decoding: Gate = FREE

    def __getstate__(self) -> dict[str, object]:
        kept = ("catalog", "store", "sampler", "normaliser")  # the rest is this process's own
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @cached_property
    def slide_ids(self) -> Sequence[str]:
        return self.catalog.slide_ids

    def decode_threads(self, count: int) -> None:
        """At most `count` threads of this process decode at a time; the others may wait for bytes."""
        self._decoding = threading.BoundedSemaphore(count)

    def traffic(self) -> tuple[int, int, int]:
        return self.store.requests, self.store.bytes, self.store.retried

    def describe(self, slide: int) -> tuple[str, str, str]:
        site, scanner, organ = (self.catalog.text(name, slide) or "" for name in ("site", "scanner", "organ"))
        return site, scanner, organ

    def table(self) -> SlideTable:
        """Slides, tissue areas, and which slide can serve which mpp: a level is near or fine enough, and one cell fits."""
        if self._table is None:
            self._table, self.ineligible = slide_table(self.catalog, self.sampler)
        return self._table

    def read(self, visit: Visit) -> Patches:
        """Regions placed by key until grid^2 patches have passed, then repeats. Raises VisitFailed, StorageError."""
        try:
            opened = self.open_slide(visit.slide)
            found = self._patches(visit.key, visit.slide, opened.reader, opened.at(visit.mpp))
            if self.normaliser is None:
                return found
            return replace(found, pixels=list(self.normaliser.apply(np.stack(found.pixels), visit.slide, opened.reader)))
        except (Missing, Changed, LayoutError, DecodeError, NoPlace) as error:
            raise VisitFailed(str(error)) from error

    def _patches(self, k: int, slide: int, reader: Reader, serving: Serving) -> Patches:
        scale, reduce, cells = serving.scale, serving.reduce, serving.cells
        grid = self.sampler.grid
        missing, holds = grid**2, int(min(cells.width, cells.height) / cells.size + 1e-6)
        pixels: list[np.ndarray] = []
        corners: list[tuple[int, int]] = []
        tested = passed = 0
        expected = 1.0 if self.sampler.pixel_filter.kind == "none" else self.sampler.pixel_filter.expected
        for region in range(REGIONS):
            if not missing:
                break
            place = key(k, "region", region)
            # So many that, as far as this visit knows, enough will pass.
            count = math.ceil(missing * (tested + _GUESS) / (passed + _GUESS * expected))
            x, y, fits = cells.region(place, max(1, min(grid + grid // 2, holds)), count)
            rows, columns = first_cells(fits, count, key(place, "order"))
            read, found = self._cut(reader, serving, x, y, rows, columns)
            if not found.all():
                self._same_file(slide)
            spanned = int((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
            rows, columns, read = rows[found], columns[found], [read[i] for i in np.flatnonzero(found)]
            good = np.flatnonzero(passes(read, self.sampler.pixel_filter))
            tested, passed = tested + len(read), passed + len(good)
            lean = len(good) * HELD >= spanned  # views keep their whole region alive
            for i in good[:missing]:
                pixels.append(read[i] if lean else read[i].copy())
                corners.append((x + round(columns[i] * cells.size), y + round(rows[i] * cells.size)))
            missing = grid**2 - len(pixels)
        if not pixels:
            raise VisitFailed(f"no patch from {REGIONS} regions could be decoded and passed the pixel filter", tested)
        again = [i % len(pixels) for i in range(grid**2)]
        level = np.array(corners, np.int64)[again] * reduce
        return Patches([pixels[i] for i in again], level[:, 0], level[:, 1], scale.level, scale.mpp, tested, passed, missing)

    def _cut(
        self, reader: Reader, serving: Serving, x: int, y: int, rows: np.ndarray, columns: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The cells (row, column) of the region at x, y (reduced px) as uint8 [S, S, 3] each, and bool: which of them could be
        decoded.

        One read spans them all. OpenSlide does not say which tile is damaged: then each cell is read by itself.
        """
        side, scale, reduce = self.sampler.patch_px, serving.scale, serving.reduce
        step = side * scale.factor
        top, left = (_whole(int(n.min()), step, reduce) for n in (rows, columns))
        wanted = np.zeros((int(rows.max()) + 1 - top, int(columns.max()) + 1 - left), bool)
        wanted[rows - top, columns - left] = True
        corner = x * reduce + round(left * step), y * reduce + round(top * step)
        damage: list[Damage] = []
        high, wide = wanted.shape
        every = None if wanted.all() else wanted
        image = read_scaled(reader, scale, *corner, wide * side, high * side, damage, every)
        tops, lefts = (rows - top) * side, (columns - left) * side
        cells = [image[i : i + side, j : j + side] for i, j in zip(tops.tolist(), lefts.tolist(), strict=True)]
        found = np.ones(len(cells), bool)
        if damage and reader.layout.kind == "openslide":
            for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
                hurt: list[Damage] = []
                corner = x * reduce + round(column * step), y * reduce + round(row * step)
                cells[i] = read_scaled(reader, scale, *corner, side, side, hurt)
                found[i] = not hurt
            return cells, found
        for part in damage:
            found &= (tops >= part.bottom) | (tops + side <= part.top) | (lefts >= part.right) | (lefts + side <= part.left)
        return cells, found

    def _same_file(self, slide: int) -> None:
        """Raises Changed for a file that is not the one that was indexed: damaged tiles may be another slide's bytes.

        The time of change of a file on a disk is no sign: copies and restored backups have another.
        """
        uri = self.catalog.text("uri", slide) or ""
        indexed, now = self.catalog.fingerprint(slide), self.store.fingerprint(uri)
        if indexed.size != now.size or (is_remote(uri) and indexed.tag != now.tag):
            raise Changed(f"{scrub(uri)} is not the file that was indexed: {now.size} bytes, tag {now.tag}")

    def open_slide(self, slide: int) -> Opened:
        """The slide's reader and tissue; the last few are kept, for all threads."""
        with self._lock:
            if slide in self._opened:
                self._opened.move_to_end(slide)
                return self._opened[slide]
        reader = self.catalog.reader(slide, self.store, self._decoding)
        opened = Opened(reader, self.catalog.level_mpps(slide), tissue_of(self.catalog, slide), self.sampler)
        with self._lock:
            self._opened[slide] = opened
            while len(self._opened) > 1 and sum(map(_held_bytes, self._opened.values())) > _KEPT_BYTES:
                self._opened.popitem(last=False)
        return opened


def _whole(first: int, step: float, reduce: int) -> int:
    """The first row or column to read from: at a pixel that decodes at reduced scale, else at the region's corner."""
    return first if (first * step / reduce).is_integer() else 0


def first_cells(fits: np.ndarray, count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the first `count` cells that fit, row by row from a keyed corner: cells side by side share tiles."""
    down, right = 1 - 2 * (k & 1), 1 - 2 * (k >> 1 & 1)
    rows, columns = np.nonzero(fits[::down, ::right])
    rows, columns = rows[:count], columns[:count]
    height, width = fits.shape
    return rows if down > 0 else height - 1 - rows, columns if right > 0 else width - 1 - columns


def _held_bytes(opened: Opened) -> int:
    levels = opened.reader.layout.levels
    return opened.tissue.nbytes + (levels.nbytes if isinstance(levels, Levels) else 0)
