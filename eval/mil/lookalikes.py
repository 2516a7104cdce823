"""Slides that are one slide under two names: the same file, the same tiles and features, or thumbnails that look alike."""

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from histoscale.data.catalog import Catalog
from histoscale.eval.mil.bags import Bag
from histoscale.eval.stores import read_coords, read_features, read_rows

_SAMPLED = 16  # tiles of two slides that are compared
_EQUAL = 0.01  # relative distance of the features of one tile, embedded twice in other batches or types
_SAME_MEAN = 0.005  # difference of two slides' mean tiles, in standard deviations of the tiles, under which tiles are compared
_SIDE = 32  # px of a thumbnail's tissue when two are compared
# Where both have tissue, 80 unrelated slides of the synthetic cohort correlate up to .32, as do 40 drawn biopsies of one outline;
# one slide compressed anew and brightened .93 and more. Whole frames of unrelated thin biopsies correlate up to .97.
_ALIKE = 0.7
_OVERLAP = 0.6  # least share of tissue that is common to two slides
_BLOCK = 512  # rows of the matrix of correlations that are held at once
Moments = Callable[[int], tuple[np.ndarray, np.ndarray]]  # of a row: mean and mean of squares over its tiles, [D] each


@dataclass(frozen=True)
class Pair:
    """Rows of two slides that may be one; first < second."""

    first: int
    second: int


def equal_tiles(rows: Sequence[Bag], moments: Moments | None = None) -> list[Pair]:
    """Slides whose features are equal: one slide, embedded under two names, whatever the order of its tiles, their type and
    their corners. moments: as `Features.moments`, where they are known already. Raises StoreError.

    Two ways: the same grid of tiles whose features agree in some of them; and as many tiles of the same mean and variance, some
    of which have their like in the other slide.
    """
    found = {*_of_one_grid(rows), *_of_one_set(rows, moments or _moments(rows))}
    return sorted(found, key=lambda pair: (pair.first, pair.second))


def _of_one_grid(rows: Sequence[Bag]) -> list[Pair]:
    grids: dict[str, list[tuple[int, np.ndarray]]] = {}
    for i, bag in enumerate(rows):
        coords = read_coords(bag.path)
        order = np.lexsort((coords[:, 0], coords[:, 1]))
        grids.setdefault(hashlib.sha256(coords[order].tobytes()).hexdigest(), []).append((i, order))
    found = []
    for same in (places for places in grids.values() if len(places) > 1):
        sampled = np.unique(np.linspace(0, rows[same[0][0]].tiles - 1, _SAMPLED).round().astype(np.int64))
        features = {i: _some(rows[i], order[sampled]) for i, order in same}
        for place, (i, _) in enumerate(same):
            for j, _ in same[place + 1 :]:
                distance = np.linalg.norm(features[i] - features[j], axis=1)
                if (distance <= _EQUAL * np.linalg.norm(features[i], axis=1)).all():
                    found.append(Pair(i, j))
    return found


def _of_one_set(rows: Sequence[Bag], moments: Moments) -> list[Pair]:
    """Sums do not know the order of what is summed, so they name the candidates; each sampled tile is then looked for among all
    of the other slide, at a distance that is measured in the spread of that slide's tiles."""
    numbers: dict[int, list[int]] = {}
    for i, bag in enumerate(rows):
        numbers.setdefault(bag.tiles, []).append(i)
    found = []
    for same in (places for places in numbers.values() if len(places) > 1):
        means, squares = (np.stack(each) for each in zip(*(moments(i) for i in same), strict=True))
        spread = np.sqrt(np.maximum(squares - means**2, 0))
        apart = int((means.std(0) / (spread.mean(0) + 1e-12)).argmax())  # the number that tells slides apart best
        order = means[:, apart].argsort(kind="stable")
        for place, a in enumerate(order.tolist()):
            near = _SAME_MEAN * spread[a] + 1e-3 * np.abs(means[a]) + 1e-12
            end = int(np.searchsorted(means[order, apart], means[a, apart] + near[apart], "right"))
            later = order[place + 1 : end]
            close = (np.abs(means[later] - means[a]) <= near).all(1) & (np.abs(spread[later] - spread[a]) <= near).all(1)
            pairs = [Pair(min(same[a], same[b]), max(same[a], same[b])) for b in later[close].tolist()]
            found += [pair for pair in pairs if _alike_sets(rows[pair.first], rows[pair.second])]
    return found


def _alike_sets(one: Bag, other: Bag) -> bool:
    sampled = np.unique(np.linspace(0, one.tiles - 1, _SAMPLED).round().astype(np.int64))
    wanted, among = _some(one, sampled).astype(np.float32), read_features(other.path).astype(np.float32)
    scale = np.linalg.norm(among - among.mean(0), axis=1).mean() if len(among) > 1 else np.linalg.norm(among)
    nearest = np.array([np.linalg.norm(among - tile, axis=1).min() for tile in wanted])
    return bool((nearest <= 10 * _EQUAL * scale).all())


def _some(bag: Bag, tiles: np.ndarray) -> np.ndarray:
    """float64 [m, D] of some tiles in the order given."""
    ascending = np.sort(tiles)
    return read_rows(bag.path, ascending)[np.searchsorted(ascending, tiles)].astype(np.float64)


def _moments(rows: Sequence[Bag]) -> Moments:
    def of(i: int) -> tuple[np.ndarray, np.ndarray]:
        values = read_features(rows[i].path).astype(np.float64)
        return values.mean(0), (values**2).mean(0)

    return of


def equal_files(rows: Sequence[Bag], catalog: Catalog) -> list[Pair]:
    """Slides of the catalog with the same number of bytes and the same etag (or time of the last change)."""
    places: dict[tuple[int, str], list[int]] = {}
    for i, row in _indexed(rows, catalog):
        mark = catalog.fingerprint(row)
        places.setdefault((mark.size, mark.tag), []).append(i)
    return [Pair(i, j) for same in places.values() for at, i in enumerate(same) for j in same[at + 1 :]]


def alike(rows: Sequence[Bag], catalog: Catalog) -> tuple[list[Pair], int]:
    """Pairs of slides whose thumbnails correlate over the tissue that they share, turned and mirrored in all eight ways, and how
    many slides have a thumbnail. Sections of one block do not correlate so; a second scan of one section does, where its frame is
    much the same."""
    shown = [(i, look) for i, row in _indexed(rows, catalog) for look in [_look(catalog, row)] if look is not None]
    if len(shown) < 2:
        return [], len(shown)
    places = [i for i, _ in shown]
    grey, tissue = np.stack([look[0] for _, look in shown]), np.stack([look[1] for _, look in shown])
    pairs: set[Pair] = set()
    for turned, under in zip(_turns(grey), _turns(tissue), strict=True):
        flat, mask = turned.reshape(len(shown), -1), under.reshape(len(shown), -1)
        for start in range(0, len(shown), _BLOCK):
            part = slice(start, start + _BLOCK)
            close = _close(grey[part].reshape(-1, flat.shape[1]), tissue[part].reshape(-1, flat.shape[1]), flat, mask)
            found = ((places[a + start], places[b]) for a, b in np.argwhere(close).tolist())
            pairs |= {Pair(min(a, b), max(a, b)) for a, b in found if a != b}
    return sorted(pairs, key=lambda pair: (pair.first, pair.second)), len(shown)


def _close(x: np.ndarray, in_x: np.ndarray, y: np.ndarray, in_y: np.ndarray) -> np.ndarray:
    """bool [a, b]: which of a and b slides agree. x, y: float32 [., px], 0 outside the tissue; in_x, in_y: 1 in it."""
    common = in_x @ in_y.T
    union = in_x.sum(1)[:, None] + in_y.sum(1)[None] - common
    sum_x, sum_y, both = x @ in_y.T, in_x @ y.T, x @ y.T
    spread_x = common * (x**2 @ in_y.T) - sum_x**2
    spread_y = common * (in_x @ (y**2).T) - sum_y**2
    correlation = (common * both - sum_x * sum_y) / np.sqrt(np.maximum(spread_x * spread_y, 1e-6))
    return (correlation >= _ALIKE) & (common >= _OVERLAP * union)


def _indexed(rows: Sequence[Bag], catalog: Catalog) -> Iterable[tuple[int, int]]:
    """(row, row of the catalog) of the slides that the catalog holds."""
    for i, bag in enumerate(rows):
        try:
            yield i, catalog.row(bag.slide_id)
        except KeyError:
            continue


def _look(catalog: Catalog, row: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The tissue's bounding box in grey, of mean 0 and variance 1 in the tissue and 0 outside, and where the tissue is: float32
    [side, side] each. None without a thumbnail, tissue or contrast."""
    try:
        image = Image.open(io.BytesIO(catalog.thumbnail(row))).convert("L")
    except (UnidentifiedImageError, OSError):
        return None
    mask = catalog.mask(row)
    down, across = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(down):
        return None
    box = (int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1)  # mask px
    wide, high = image.width / mask.shape[1], image.height / mask.shape[0]
    frame = (box[0] * wide, box[1] * high, box[2] * wide, box[3] * high)
    grey = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX, box=frame), np.float32)
    drawn = Image.fromarray(mask.astype(np.uint8) * 255).resize((_SIDE, _SIDE), Image.Resampling.BOX, box=box)
    tissue = np.asarray(drawn) >= 128
    spread = float(grey[tissue].std()) if tissue.any() else 0.0
    if spread < 1:
        return None
    return (grey - grey[tissue].mean()) / spread * tissue, tissue.astype(np.float32)


def _turns(looks: np.ndarray) -> Iterable[np.ndarray]:
    """[n, side, side] in its eight positions."""
    for mirrored in (looks, looks[:, :, ::-1]):
        for quarter in range(4):
            yield np.ascontiguousarray(np.rot90(mirrored, quarter, axes=(1, 2)))
