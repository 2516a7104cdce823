"""A tissue mask that somebody drew: GeoJSON polygons in level-0 pixels, or a PNG over the whole slide, onto the mask's grid."""

import io
import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from histoscale.data.pictures import BROKEN, MOST_PX
from histoscale.data.storage import Store

SLACK = 0.02  # of the slide's side: how far a polygon may reach over the edge, and the aspect of a PNG may be off
_MOST_BYTES = 1 << 27  # of a file: its numbers take ten times that as objects
_MOST_WORK = 1 << 31  # pixels painted, and 16 for every row that an edge crosses: some seconds
_AT_ONCE = 1 << 20  # crossings of rows that are held at a time
_PNG = b"\x89PNG\r\n\x1a\n"

Ring = np.ndarray  # float64 [n, 2]: x, y of the corners; the last is joined to the first
Polygon = list[Ring]  # the outline, then its holes


class MaskError(ValueError):
    """The file is no mask of this slide; the message says why."""


def drawn_mask(uri: str, store: Store, slide: tuple[int, int], shape: tuple[int, int], pitch: float) -> np.ndarray:
    """bool [shape]: the pixels whose centre lies in the drawn tissue.

    slide: width and height, level-0 px. pitch: level-0 px a mask pixel. Raises MaskError, Missing or StorageError.
    """
    if store.size(uri) > _MOST_BYTES:
        raise MaskError(f"it has more than {_MOST_BYTES >> 20} MB")
    data = store.read(uri)
    mask = _of_png(data, slide, shape, pitch) if data.startswith(_PNG) else _of_geojson(data, slide, shape, pitch)
    if not mask.any():
        raise MaskError("it holds no tissue")
    return mask


def _of_geojson(data: bytes, slide: tuple[int, int], shape: tuple[int, int], pitch: float) -> np.ndarray:
    mask = np.zeros(shape, bool)
    work = 0
    for polygon in polygons(data):
        corners = np.concatenate(polygon)
        low, high = corners.min(0), corners.max(0)
        edge = np.array(slide)
        if (low < -SLACK * edge).any() or (high > (1 + SLACK) * edge).any():
            reach = f"x {low[0]:g} to {high[0]:g}, y {low[1]:g} to {high[1]:g}"
            raise MaskError(f"a polygon ({reach}) leaves the slide of {slide[0]}x{slide[1]}: expected level-0 pixels")
        work += filled(mask, [ring / pitch for ring in polygon])
        if work > max(_MOST_WORK, 64 * mask.size):
            raise MaskError("its polygons cover the slide hundreds of times: a mask is an outline of tissue")
    return mask


def polygons(data: bytes) -> list[Polygon]:
    """All polygons of a GeoJSON text (RFC 7946), or of a list of features as QuPath writes it. Raises MaskError."""
    try:
        found = list(_polygons(json.loads(data)))
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, MaskError):
            raise
        raise MaskError(f"neither a PNG nor GeoJSON ({error})") from error
    if not all(found):
        raise MaskError("a polygon of its GeoJSON has no outline")
    if not found:
        raise MaskError("its GeoJSON holds no polygon")
    return found


def _polygons(value: Any) -> list[Polygon]:
    if isinstance(value, list):
        return [polygon for one in value for polygon in _polygons(one)]
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "FeatureCollection":
        return _polygons(_list(value, "features"))
    if kind == "Feature":
        return _polygons(value.get("geometry"))
    if kind == "GeometryCollection":
        return _polygons(_list(value, "geometries"))
    if kind == "Polygon":
        return [[_ring(ring) for ring in _list(value, "coordinates")]]
    if kind == "MultiPolygon":
        return [[_ring(ring) for ring in part] for part in _list(value, "coordinates")]
    raise MaskError(f"its GeoJSON holds {str(kind or type(value).__name__)[:40]}: expected polygons")


def _list(value: dict[str, Any], name: str) -> list[Any]:
    held = value.get(name)
    if not isinstance(held, list) or not held:
        raise MaskError(f"a {value['type']} of its GeoJSON has no {name}")
    return held


def _ring(corners: Any) -> Ring:
    try:
        ring = np.array([corner[:2] for corner in corners], np.float64)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise MaskError(f"a ring of its GeoJSON is no list of positions ({error})") from error
    if ring.ndim != 2 or ring.shape[1] != 2 or len(np.unique(ring, axis=0)) < 3 or not np.isfinite(ring).all():
        raise MaskError(f"a ring of its GeoJSON has {len(ring)} positions: expected at least three different finite x, y")
    return ring


def filled(mask: np.ndarray, polygon: Polygon) -> int:
    """Set the pixels of mask bool [h, w] whose centre is inside: an odd number of edges stands left of it; holes too.

    What it took, as _MOST_WORK counts. Raises MaskError for an outline that crosses more rows than any drawing does.
    """
    height, width = mask.shape
    corners = np.concatenate(polygon)
    (low_x, low_y), (high_x, high_y) = corners.min(0), corners.max(0)
    top, bottom = (min(max(math.ceil(y - 0.5), 0), height) for y in (low_y, high_y))
    left, right = (min(max(math.ceil(x - 0.5), 0), width) for x in (low_x, high_x))
    if top >= bottom or left >= right:
        return 0
    flips = np.zeros((bottom - top, right - left + 1), np.uint8)
    crossings = 0
    for ring in polygon:
        (x0, y0), (x1, y1) = ring.T, np.roll(ring, -1, axis=0).T
        first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), top, bottom).astype(np.int64)  # rows whose centre the edge passes
        count = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), top, bottom).astype(np.int64) - first
        before = np.concatenate([[0], np.cumsum(count)])
        crossings += int(before[-1])
        if 16 * crossings > _MOST_WORK:
            raise MaskError(f"the edges of a polygon cross {crossings} rows of the mask: expected at most {_MOST_WORK // 16}")
        cuts = np.searchsorted(before, range(_AT_ONCE, int(before[-1]), _AT_ONCE), side="right") - 1
        for start, stop in pairwise(np.unique([0, *cuts, len(ring)]).tolist()):
            edge = np.repeat(np.arange(start, stop), count[start:stop])
            row = np.arange(before[start], before[stop]) - before[edge] + first[edge]
            x = x0[edge] + (row + 0.5 - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
            np.bitwise_xor.at(flips, (row - top, np.clip(np.ceil(x - 0.5), left, right).astype(np.int64) - left), 1)
    mask[top:bottom, left:right] |= np.bitwise_xor.accumulate(flips[:, :-1], axis=1).astype(bool)
    return 16 * crossings + flips.size


def _of_png(data: bytes, slide: tuple[int, int], shape: tuple[int, int], pitch: float) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            size = image.size
            if not 0 < size[0] * size[1] <= MOST_PX:
                raise MaskError(f"a PNG of {size[0]}x{size[1]}: expected at most {MOST_PX} pixels; the mask is coarser anyway")
            if abs(size[0] * slide[1] / (size[1] * slide[0]) - 1) > SLACK:
                raise MaskError(f"a PNG of {size[0]}x{size[1]} has not the aspect of the slide of {slide[0]}x{slide[1]}")
            pixels = np.asarray(image.convert("RGBA") if image.mode not in ("1", "L", "I", "I;16") else image)
    except BROKEN as error:
        if isinstance(error, MaskError):
            raise
        raise MaskError(f"a PNG that cannot be read ({error})") from error
    held = pixels != 0 if pixels.ndim == 2 else (pixels[..., :3] != 0).any(-1) & (pixels[..., 3] != 0)
    centres = [(np.arange(count) + 0.5) * pitch / side for count, side in zip(shape, slide[::-1], strict=True)]
    rows, columns = (np.minimum((at * side).astype(int), side - 1) for at, side in zip(centres, size[::-1], strict=True))
    inside = (centres[0] < 1)[:, None] & (centres[1] < 1)
    return held[np.ix_(rows, columns)] & inside
