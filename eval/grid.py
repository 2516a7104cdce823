"""The patches of slides: a grid over the tissue, read region by region, slide after slide, ahead of whoever uses them."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.data.cells import Cells, Tissue
from histoscale.data.normalise.slide import SlideNormaliser
from histoscale.data.readers.pyramid import Damage, DecodeError, Reader
from histoscale.data.readers.scale import Scale, choose_scale, read_scaled
from histoscale.data.storage import Store


@dataclass(frozen=True)
class GridConfig:
    """Where the patches of a slide lie: a grid without overlap over the tissue.

    mpp: null takes the encoder's default. patch_px: null takes the tile that it was trained on, else its input.
    tissue_fraction: least share of tissue in a patch. A level within `mpp_tolerance` of the target is taken unscaled; nothing is
    enlarged more than `max_upsample`.
    """

    mpp: float | None
    patch_px: int | None
    tissue_fraction: float
    mpp_tolerance: float
    max_upsample: float


@dataclass(frozen=True)
class ReadingConfig:
    """How fast slides are read: threads = regions read at once; read_px = side of a region, level pixels."""

    threads: int
    read_px: int


@dataclass(frozen=True)
class PipeConfig:
    """How fast slides become features: batch = patches an encoder call; threads, read_px: as in ReadingConfig."""

    batch: int
    threads: int
    read_px: int


class Ineligible(ValueError):
    """A slide that cannot serve the patches that are asked for."""


@dataclass(frozen=True)
class Region:
    """A part of the grid that is read at once: its corner in level px, and which of its cells are wanted, bool [rows, columns].

    corners: int64 [cells wanted, 2], level-0 px.
    """

    x: int
    y: int
    wanted: np.ndarray
    corners: np.ndarray


@dataclass(frozen=True)
class Tiles:
    """The patches of one slide. size: side of a patch in level px. coords: int64 [n, 2], level-0 px of the top-left corners, in
    reading order."""

    scale: Scale
    size: float
    regions: list[Region]

    @property
    def coords(self) -> np.ndarray:
        return np.concatenate([region.corners for region in self.regions])

    def __len__(self) -> int:
        return sum(len(region.corners) for region in self.regions)


@dataclass(frozen=True)
class Part:
    """What could be decoded of a region: pixels uint8 [m, 3, S, S], corners int64 [m, 2] in level-0 px."""

    pixels: np.ndarray
    corners: np.ndarray


def tile_slide(catalog: Catalog, slide: int, mpp: float, patch_px: int, grid: GridConfig, read_px: int) -> Tiles:
    """The grid over the tissue of one slide. Raises Ineligible: no level can serve the mpp, no cell holds enough tissue."""
    mpps = catalog.level_mpps(slide)
    scale = choose_scale(mpps, mpp, grid.mpp_tolerance, grid.max_upsample)
    regions = [] if scale is None else _regions(catalog, slide, scale, patch_px * scale.factor, grid.tissue_fraction, read_px)
    if scale is None or not regions:
        served = ", ".join(f"{value:.3g}" for value in mpps)
        raise Ineligible(
            f"ineligible: no patch of {patch_px} px at {mpp:g} µm/px with enough tissue (its levels: {served} µm/px)"
        )
    return Tiles(scale, patch_px * scale.factor, regions)


def _regions(catalog: Catalog, slide: int, scale: Scale, size: float, fraction: float, read_px: int) -> list[Region]:
    level, mpp = catalog.layout(slide).levels[scale.level], catalog.level_mpps(slide)[scale.level]
    tissue = Tissue(catalog.bitmap(slide), catalog.mask_mpp(slide))
    cells = Cells(tissue, level.width, level.height, mpp, size, fraction)
    side = max(1, int(read_px // size))  # cells along a region
    regions = []
    for row in range(0, int(level.height // size), side):
        for column in range(0, int(level.width // size), side):
            x, y = round(column * size), round(row * size)
            wanted = cells.fits(np.array([x]), np.array([y]), side)[0]
            if not wanted.any():
                continue
            rows, columns = np.flatnonzero(wanted.any(axis=1)), np.flatnonzero(wanted.any(axis=0))
            x, y = round(x + columns[0] * size), round(y + rows[0] * size)
            wanted = wanted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            corners = (np.argwhere(wanted)[:, ::-1] * size + (x, y)) * level.downsample
            regions.append(Region(x, y, wanted, np.rint(corners).astype(np.int64)))
    return regions


@dataclass
class _Open:
    """A slide in the reader's hands. reader: None where it cannot be read, and `tiles` is then the reason."""

    slide: int
    tiles: Tiles | Exception
    reader: Reader | None
    left: deque[Region] = field(default_factory=deque)
    reading: deque[Future[Part]] = field(default_factory=deque)


class SlideParts:
    """Iterating gives every slide in turn, its tiles, and an iterator over the parts of them.

    Threads read ahead, two regions each, across the borders between slides, so that whoever uses them never waits for the first
    region of a slide. In place of the tiles of a slide that cannot be opened stands why (Ineligible, DecodeError, OSError); a
    part that cannot be read raises the like, and the next slide goes on.
    """

    def __init__(
        self,
        catalog: Catalog,
        slides: Iterable[int],
        mpp: float,
        patch_px: int,
        grid: GridConfig,
        pipe: PipeConfig,
        normaliser: SlideNormaliser | None,
        store: Store,
    ) -> None:
        self.catalog, self.mpp, self.patch_px, self.grid, self.pipe = catalog, mpp, patch_px, grid, pipe
        self.normaliser, self.store = normaliser, store
        self._slides = iter(slides)
        self._open: deque[_Open] = deque()

    def __iter__(self) -> Iterator[tuple[int, Tiles | Exception, Iterator[Part]]]:
        pool = ThreadPoolExecutor(self.pipe.threads, thread_name_prefix="regions")
        try:
            self._fill(pool)
            while self._open:
                current = self._open[0]
                yield current.slide, current.tiles, self._parts(current, pool)
                for each in current.reading:  # of a slide that was given up
                    each.cancel()
                self._open.popleft()
                self._fill(pool)
        finally:
            pool.shutdown(cancel_futures=True)

    def _parts(self, current: _Open, pool: ThreadPoolExecutor) -> Iterator[Part]:
        while current.reading or current.left:
            self._fill(pool)
            done = current.reading.popleft().result()
            self._fill(pool)
            yield done

    def _fill(self, pool: ThreadPoolExecutor) -> None:
        """Keep two regions a thread in flight: what is left of the open slides, then the next slides."""
        while sum(len(each.reading) for each in self._open) < 2 * self.pipe.threads:
            last = next((each for each in self._open if each.left), None)
            if last is None:
                slide = next(self._slides, None)
                if slide is None:
                    return
                self._open.append(self._opened(slide))
                if len(self._open) > 2 * self.pipe.threads:  # a row of slides without one region
                    return
            else:
                last.reading.append(pool.submit(self._read, last, last.left.popleft()))

    def _opened(self, slide: int) -> _Open:
        try:
            tiles = tile_slide(self.catalog, slide, self.mpp, self.patch_px, self.grid, self.pipe.read_px)
            reader = self.catalog.reader(slide, self.store)
        except (Ineligible, DecodeError, OSError) as error:
            return _Open(slide, error, None)
        return _Open(slide, tiles, reader, deque(tiles.regions))

    def _read(self, opened: _Open, region: Region) -> Part:
        assert isinstance(opened.tiles, Tiles) and opened.reader is not None  # regions are of slides that could be opened
        wanted, size = region.wanted, self.patch_px
        damage: list[Damage] = []
        whole = read_scaled(
            opened.reader, opened.tiles.scale, region.x, region.y, wanted.shape[1] * size, wanted.shape[0] * size, damage, wanted
        )
        patches = whole.reshape(wanted.shape[0], size, wanted.shape[1], size, 3).transpose(0, 2, 1, 3, 4)
        readable = wanted.copy()
        for part in damage:
            rows = slice(part.top // size, (part.bottom - 1) // size + 1)
            readable[rows, part.left // size : (part.right - 1) // size + 1] = False
        pixels = patches[readable]
        if self.normaliser is not None and len(pixels):
            pixels = self.normaliser.apply(pixels, opened.slide, opened.reader)
        return Part(pixels.transpose(0, 3, 1, 2), region.corners[readable[wanted]])
