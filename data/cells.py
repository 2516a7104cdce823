"""Where patches may lie on one level of one slide: the tissue rule on an integral image, and regions placed uniformly."""

import math

import numpy as np

from histoscale.data.bitmap import Bitmap
from histoscale.data.keys import key_array

_SELDOM = 4  # times that places of a slide are sought before its whole integral image is worth making
_EDGE = 1e-6  # level px and shares: rounding of coordinates that are not whole numbers
_TRIES = (16, 128, 1024, 4096)  # places tried at random before the slide is searched for blocks that can hold a cell


class NoPlace(ValueError):
    """Not one cell fits."""


class Integral:
    """The integral image of a part of a mask, bool [h, w] whose corner is at (left, top) of the mask."""

    def __init__(self, part: np.ndarray, left: int, top: int) -> None:
        self.left, self.top = left, top
        self.sums = np.zeros((part.shape[0] + 1, part.shape[1] + 1), np.int32)
        np.cumsum(np.cumsum(part, axis=0, dtype=np.int32), axis=1, out=self.sums[1:, 1:])

    def area(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Mask px of tissue above and left of the points u, v (mask px, broadcast together): interpolated between its points."""
        rows, columns = self.sums.shape
        u, v = np.minimum(np.maximum(u - self.left, 0), columns - 1), np.minimum(np.maximum(v - self.top, 0), rows - 1)
        i, j = np.minimum(u.astype(np.int64), columns - 2), np.minimum(v.astype(np.int64), rows - 2)
        du, dv, flat, at = u - i, v - j, self.sums.reshape(-1), j * columns + i
        upper_left, lower_left = flat.take(at), flat.take(at + columns)
        upper = upper_left + (flat.take(at + 1) - upper_left) * du
        lower = lower_left + (flat.take(at + (columns + 1)) - lower_left) * du
        return upper + (lower - upper) * dv


class Tissue:
    """A slide's mask, bool [h, w] or packed. left, top, columns, rows: the box around the tissue. mpp: um per mask px."""

    def __init__(self, mask: np.ndarray | Bitmap, mpp: float) -> None:
        self.mpp = mpp
        self.bitmap = mask if isinstance(mask, Bitmap) else Bitmap.of(mask)
        self.left, self.top = self.bitmap.left, self.bitmap.top
        self.columns, self.rows = max(1, self.bitmap.columns), max(1, self.bitmap.rows)
        self._whole: Integral | None = None
        self._asked = 0

    @property
    def nbytes(self) -> int:
        return self.bitmap.bits.nbytes + (self._whole.sums.nbytes if self._whole is not None else 0)

    def whole(self) -> Integral:
        """Of the box: milliseconds on a large slide, so it is made when it is first asked for."""
        if self._whole is None:
            box = self.bitmap.window(0, 0, self.columns, self.rows) if self.bitmap.rows else np.zeros((1, 1), bool)
            self._whole = Integral(box, self.left, self.top)
        return self._whole

    def seldom(self) -> bool:
        """Whether places were asked for only a few times: then parts of the mask are cheaper than its integral image."""
        self._asked += 1
        return self._whole is None and self._asked <= _SELDOM

    def within(self, left: float, top: float, right: float, bottom: float) -> Integral | None:
        """Of the part of the box between two corners (mask px); None where that holds no tissue."""
        first, last = max(math.floor(left) - self.left, 0), min(math.ceil(right) - self.left, self.bitmap.columns)
        upper, lower = max(math.floor(top) - self.top, 0), min(math.ceil(bottom) - self.top, self.bitmap.rows)
        if first >= last or upper >= lower:
            return None
        part = self.bitmap.window(first, upper, last, lower)
        return Integral(part, self.left + first, self.top + upper) if part.any() else None


class Cells:
    """The square cells of `size` px that lie inside a level and hold enough tissue.

    width, height, mpp: the level, px and um/px. fraction: least share of tissue in a cell.
    """

    def __init__(self, tissue: Tissue, width: int, height: int, mpp: float, size: float, fraction: float) -> None:
        self.tissue, self.width, self.height, self.size = tissue, width, height, size
        self.pitch = mpp / tissue.mpp  # mask px a level px
        self.needed = fraction * (size * self.pitch) ** 2 * (1 - _EDGE)  # mask px of tissue in a cell
        self._reached: dict[int, tuple[list[int], list[int]]] = {}
        self.what = f"a cell of {size:g} px with {fraction:.0%} tissue on a level of {width} x {height} px"

    def any(self) -> bool:
        """Is there one cell at whole level coordinates? Exact: tissue is bilinear in the corner between the lines of the mask."""
        if self.size > min(self.width, self.height) + _EDGE:
            return False
        for stride in (8, 2, 0.5):  # cheap looks first
            coarse = [np.arange(0, side - self.size + 1, max(1, int(self.size * stride))) for side in (self.width, self.height)]
            across, down = np.meshgrid(*coarse)
            if (self._held(across, down, self.size) >= self.needed).any():
                return True
        across, down = (self._breakpoints(axis) for axis in (0, 1))
        return any((self._held(across, np.full(len(across), y), self.size) >= self.needed).any() for y in down)

    def fits(self, x: np.ndarray, y: np.ndarray, grid: int, part: Integral | None = None) -> np.ndarray:
        """bool [B, grid, grid] (rows, columns): which cells of the regions with corners x, y [B] fit; part holds their tissue."""
        steps = np.arange(grid + 1) * self.size
        xs, ys = x[:, None] + steps, y[:, None] + steps
        area = (part or self.tissue.whole()).area(xs[:, None, :] * self.pitch, ys[:, :, None] * self.pitch)
        held = area[:, 1:, 1:] - area[:, :-1, 1:] - area[:, 1:, :-1] + area[:, :-1, :-1]
        inside_x = (xs[:, :-1] >= -_EDGE) & (xs[:, 1:] <= self.width + _EDGE)
        inside_y = (ys[:, :-1] >= -_EDGE) & (ys[:, 1:] <= self.height + _EDGE)
        return (held >= self.needed) & inside_y[:, :, None] & inside_x[:, None, :]

    def region(self, k: int, grid: int, count: int) -> tuple[int, int, np.ndarray]:
        """A region of grid x grid cells of which at most `count` are taken: corner x, y and bool [grid, grid], those that fit.

        Drawn over all whole corners (overhang allowed) whose region holds E >= 1 cells that fit, with weight E / min(E, count):
        each of its cells is then taken with a chance of min(E, count) / E, so that every position of a cell is equally likely,
        beside the edge of tissue and inside. Tried at random within reach of the tissue, first accepted; where tissue is rare,
        only in blocks that can hold a cell. Raises NoPlace when no cell fits anywhere.
        """
        low, span = self._reach(grid)
        start = 0
        for tries in _TRIES:
            drawn = key_array(k, "corner", 0, np.arange(3 * start, 3 * (start + tries))).reshape(3, tries)
            x, y = (low[a] + (drawn[a] % np.uint64(span[a])).astype(np.int64) for a in (0, 1))
            look = self._nearby if start == 0 and self.tissue.seldom() else self._first
            found = look(x, y, grid, count, drawn[2])
            if found is not None:
                return found
            start += tries
        block, corners = self._blocks(grid, low, span)
        if not len(corners):
            raise NoPlace(f"there is no place for {self.what}")
        for start in range(0, 1 << 24, _TRIES[-1]):
            drawn = key_array(k, "block", 0, np.arange(4 * start, 4 * (start + _TRIES[-1]))).reshape(4, _TRIES[-1])
            chosen = corners[(drawn[0] % np.uint64(len(corners))).astype(np.int64)]
            x, y = (chosen[:, a] + (drawn[1 + a] % np.uint64(block)).astype(np.int64) for a in (0, 1))
            within = (x >= low[0]) & (x < low[0] + span[0]) & (y >= low[1]) & (y < low[1] + span[1])
            found = self._first(x[within], y[within], grid, count, drawn[3][within])
            if found is not None:
                return found
        raise NoPlace(f"no place found in {1 << 24} tries for {self.what}")

    def _nearby(
        self, x: np.ndarray, y: np.ndarray, grid: int, count: int, chances: np.ndarray
    ) -> tuple[int, int, np.ndarray] | None:
        """As `_first`, one after another, each with the mask around it: most slides need no more than two, and not their whole
        mask."""
        reach = grid * self.size
        for i in range(len(x)):
            corners = (float(edge) * self.pitch for edge in (x[i], y[i], x[i] + reach, y[i] + reach))
            part = self.tissue.within(*corners)
            if part is not None or self.needed == 0:
                found = self._first(x[i : i + 1], y[i : i + 1], grid, count, chances[i : i + 1], part)
                if found is not None:
                    return found
        return None

    def _first(
        self, x: np.ndarray, y: np.ndarray, grid: int, count: int, chances: np.ndarray, part: Integral | None = None
    ) -> tuple[int, int, np.ndarray] | None:
        """The first corner that is accepted. chances: a key for each; part: as in `fits`."""
        fits = self.fits(x, y, grid, part)
        held = fits.sum(axis=(1, 2))
        most = grid**2 / min(grid**2, count)
        weight = held / np.maximum(np.minimum(held, count), 1) / most
        accepted = np.flatnonzero((chances >> np.uint64(11)) * 2.0**-53 < weight)
        return (int(x[accepted[0]]), int(y[accepted[0]]), fits[accepted[0]]) if len(accepted) else None

    def _held(self, x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
        """Mask px of tissue in the squares of `size` level px with corners x, y."""
        left, right, top, below = x * self.pitch, (x + size) * self.pitch, y * self.pitch, (y + size) * self.pitch
        area = self.tissue.whole().area
        return area(right, below) - area(left, below) - area(right, top) + area(left, top)

    def _breakpoints(self, axis: int) -> np.ndarray:
        """Whole corners around the places where an edge of a cell crosses a line of the mask: tissue peaks at one of them."""
        side, first = ((self.width, self.tissue.left), (self.height, self.tissue.top))[axis]
        lines = (first + np.arange((self.tissue.columns, self.tissue.rows)[axis] + 1)) / self.pitch
        edges = np.concatenate([lines, lines - self.size])
        return np.unique(np.clip(np.concatenate([np.floor(edges), np.ceil(edges)]), 0, math.floor(side - self.size)))

    def _reach(self, grid: int) -> tuple[list[int], list[int]]:
        """Lowest corner and number of corners per axis with which some cell is inside the level and near the tissue."""
        if grid in self._reached:
            return self._reached[grid]
        low, span = [], []
        box = (self.width, self.tissue.left, self.tissue.columns), (self.height, self.tissue.top, self.tissue.rows)
        for side, first, count in box:
            start, stop = first / self.pitch, (first + count) / self.pitch
            lowest = max(math.ceil(-(grid - 1) * self.size - _EDGE), math.floor(start - grid * self.size))
            highest = min(math.floor(side - self.size + _EDGE), math.ceil(stop))
            low.append(lowest)
            span.append(max(1, highest - lowest + 1))
        self._reached[grid] = low, span
        return low, span

    def _blocks(self, grid: int, low: list[int], span: list[int]) -> tuple[int, np.ndarray]:
        """Side and corners [M, 2] of blocks of corners whose region might hold a cell that fits: all that do are among them."""
        block = math.ceil(self.size)
        origin = [math.floor(low[a] / block) for a in (0, 1)]
        counts = [(low[a] + span[a]) // block + grid + 2 - origin[a] for a in (0, 1)]
        x, y = np.meshgrid(*((origin[a] + np.arange(counts[a])) * block for a in (0, 1)))
        possible = self._held(x, y, block + self.size) >= self.needed  # cells with their corner in the block lie in here
        held = np.zeros_like(possible)
        shifts = {d for i in range(grid) for d in (math.floor(i * self.size / block), math.floor(i * self.size / block) + 1)}
        for down in shifts:
            for right in shifts:
                held[: counts[1] - down, : counts[0] - right] |= possible[down:, right:]
        return block, np.stack([x[held], y[held]], axis=1)
