"""Slides that are one slide under two names: the same file, the same tiles and features, or thumbnails that look alike."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from histoscale.data.catalog import Catalog
from histoscale.eval.mil.bags import Bag
from histoscale.eval.stores import read_coords, read_rows

_SAMPLED = 16  # tiles of two slides with equal grids that are compared
_EQUAL = 0.01  # relative distance of the features of one tile, embedded twice in other batches or types
_SIDE = 32  # px of a thumbnail's tissue when two are compared
# 570 slides of the synthetic cohort: 150 unrelated ones correlate up to .57, one compressed anew and brightened .99 and more.
_ALIKE = 0.9
_BLOCK = 1024  # rows of the matrix of correlations that are held at once


@dataclass(frozen=True)
class Pair:
    """Rows of two slides that may be one; first < second."""

    first: int
    second: int


def equal_tiles(rows: Sequence[Bag]) -> list[Pair]:
    """Slides with the same tiles whose features agree: one slide, embedded under two names. Raises StoreError."""
    grids: dict[str, list[int]] = {}
    for i, bag in enumerate(rows):
        grids.setdefault(hashlib.sha256(read_coords(bag.path).tobytes()).hexdigest(), []).append(i)
    found = []
    for same in (places for places in grids.values() if len(places) > 1):
        sampled = np.unique(np.linspace(0, rows[same[0]].tiles - 1, _SAMPLED).round().astype(np.int64))
        features = {i: read_rows(rows[i].path, sampled).astype(np.float64) for i in same}
        for place, i in enumerate(same):
            for j in same[place + 1 :]:
                distance = np.linalg.norm(features[i] - features[j], axis=1)
                if (distance <= _EQUAL * np.linalg.norm(features[i], axis=1)).all():
                    found.append(Pair(i, j))
    return found


def equal_files(rows: Sequence[Bag], catalog: Catalog) -> list[Pair]:
    """Slides of the catalog with the same number of bytes and the same etag (or time of the last change)."""
    places: dict[tuple[int, str], list[int]] = {}
    for i, row in _indexed(rows, catalog):
        mark = catalog.fingerprint(row)
        places.setdefault((mark.size, mark.tag), []).append(i)
    return [Pair(i, j) for same in places.values() for at, i in enumerate(same) for j in same[at + 1 :]]


def alike(rows: Sequence[Bag], catalog: Catalog) -> tuple[list[Pair], int]:
    """Pairs of slides whose thumbnails correlate over their tissue, turned and mirrored in all eight ways, and how many slides
    have a thumbnail. Sections of one block do not correlate so; a second scan of one section does, where its frame is much the
    same."""
    shown = [(i, look) for i, row in _indexed(rows, catalog) for look in [_look(catalog, row)] if look is not None]
    if len(shown) < 2:
        return [], len(shown)
    places = [i for i, _ in shown]
    looks = np.stack([look for _, look in shown])
    upright = looks.reshape(len(looks), -1)
    pairs: set[tuple[int, int]] = set()
    for turned in _turns(looks):
        flat = turned.reshape(len(looks), -1)
        for start in range(0, len(looks), _BLOCK):
            first, second = np.nonzero(upright[start : start + _BLOCK] @ flat.T >= _ALIKE)
            pairs |= {(min(a, b), max(a, b)) for a, b in zip((first + start).tolist(), second.tolist(), strict=True) if a != b}
    return [Pair(*sorted((places[a], places[b]))) for a, b in sorted(pairs)], len(shown)


def _indexed(rows: Sequence[Bag], catalog: Catalog) -> Iterable[tuple[int, int]]:
    """(row, row of the catalog) of the slides that the catalog holds."""
    for i, bag in enumerate(rows):
        try:
            yield i, catalog.row(bag.slide_id)
        except KeyError:
            continue


def _look(catalog: Catalog, row: int) -> np.ndarray | None:
    """The tissue's bounding box in grey, of mean 0 and length 1: float32 [side, side]; None without a thumbnail or contrast."""
    try:
        image = Image.open(io.BytesIO(catalog.thumbnail(row))).convert("L")
    except (UnidentifiedImageError, OSError):
        return None
    mask = catalog.mask(row)
    down, across = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(down):
        return None
    wide, high = image.width / mask.shape[1], image.height / mask.shape[0]
    box = (across[0] * wide, down[0] * high, (across[-1] + 1) * wide, (down[-1] + 1) * high)
    values = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX, box=box), np.float32)
    values = values - values.mean()
    length = float(np.linalg.norm(values))
    return values / length if length > 1 else None


def _turns(looks: np.ndarray) -> Iterable[np.ndarray]:
    for mirrored in (looks, looks[:, :, ::-1]):
        for quarter in range(4):
            yield np.ascontiguousarray(np.rot90(mirrored, quarter, axes=(1, 2)))
