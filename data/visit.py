"""One visit: a slide and a key in, exactly grid^2 patches out. It depends on its own key and its own pixels only."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.data.cells import NoPlace, Tissue
from histoscale.data.eligible import slide_table
from histoscale.data.keys import key
from histoscale.data.normalise.slide import SlideNormaliser
from histoscale.data.pixelfilter import passes
from histoscale.data.plan import SamplerConfig, SlideTable, Visit
from histoscale.data.readers.mosaic import Mosaic
from histoscale.data.readers.pyramid import DecodeError, LayoutError, Reader
from histoscale.data.readers.vendor import FREE, Gate
from histoscale.data.secrets import scrub
from histoscale.data.serving import Serving, serve, tissue_of
from histoscale.data.storage import Changed, Missing, Store, is_remote
from histoscale.data.tables import Levels

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

    pixels: n of uint8 [S, S, 3], each with memory of its own but repeats. x, y: int64 [n], level px. level: stored level.
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
            same = self.normaliser.apply(np.stack(found.pixels), visit.slide, opened.reader)
            return replace(found, pixels=[patch.copy() for patch in same])
        except (Missing, Changed, LayoutError, DecodeError, NoPlace) as error:
            raise VisitFailed(str(error)) from error

    def _patches(self, k: int, slide: int, reader: Reader, serving: Serving) -> Patches:
        scale, reduce, cells = serving.scale, serving.reduce, serving.cells
        rule, grid, side = self.sampler.pixel_filter, self.sampler.grid, self.sampler.patch_px
        holds = int(min(cells.width, cells.height) / cells.size + 1e-6)
        pixels: list[np.ndarray] = []
        corners: list[tuple[int, int]] = []
        missing, tested, passed, begun = grid**2, 0, 0, time.thread_time()
        for region in range(REGIONS):
            if not missing:
                break
            place = key(k, "region", region)
            count = math.ceil(missing * (tested + 1) / (passed + 1))  # so many that, as far as is known, enough will pass
            x, y, fits = cells.region(place, max(1, min(grid + grid // 2, holds)), count)
            mosaic = Mosaic(reader, scale, x * reduce, y * reduce, fits, side)
            order = in_rows(fits, key(place, "order"))
            while order and missing:
                if time.thread_time() - begun > self.store.config.decode_s:  # of CPU time: bytes may take their time
                    limit = f"storage.decode_s={self.store.config.decode_s:g}"
                    raise VisitFailed(f"decoding took more than {limit} and has not enough patches yet", tested)
                asked, order = order[:missing], order[missing:]
                wanted = np.zeros_like(fits)
                for row, column in asked:
                    wanted[row, column] = True
                found = mosaic.read(wanted)
                if not found[wanted].all():
                    self._same_file(slide)
                read = [at for at in asked if found[at]]
                good = passes([mosaic.cell(*at) for at in read], rule)
                tested, passed = tested + len(read), passed + int(good.sum())
                for (row, column), well in zip(read, good.tolist(), strict=True):
                    if well:
                        pixels.append(mosaic.cell(row, column).copy())  # each is let go by itself, and no region is kept
                        corners.append((x + round(column * cells.size), y + round(row * cells.size)))
                missing = grid**2 - len(corners)
        if not pixels:
            raise VisitFailed(f"no patch from {REGIONS} regions could be decoded and passed the pixel filter", tested)
        again = [i % len(pixels) for i in range(grid**2)]
        level = np.array(corners, np.int64)[again] * reduce
        return Patches([pixels[i] for i in again], level[:, 0], level[:, 1], scale.level, scale.mpp, tested, passed, missing)

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


def in_rows(fits: np.ndarray, k: int) -> list[tuple[int, int]]:
    """The cells that fit (row, column), row by row from a keyed corner: cells beside one another share tiles."""
    rows, columns = fits.shape
    down, right = range(rows)[:: 1 - 2 * (k & 1)], range(columns)[:: 1 - 2 * (k >> 1 & 1)]
    held = fits.tolist()
    return [(row, column) for row in down for column in right if held[row][column]]


def _held_bytes(opened: Opened) -> int:
    levels = opened.reader.layout.levels
    return opened.tissue.nbytes + (levels.nbytes if isinstance(levels, Levels) else 0)
