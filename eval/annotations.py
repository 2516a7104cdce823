"""Outlines that people drew: ASAP's XML and GeoJSON (QuPath's among it), with holes and with areas to leave out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from histoscale.data.jsonfiles import parse

FARTHEST_PX = 1e9  # level-0 px: what lies beyond is no place on a slide
_ACROSS = 16  # points along a tile's side: an outline counts from about 1/256 of a tile
_AREAS = ("Polygon", "Spline", "Rectangle")  # ASAP's kinds that have one; a spline is taken by its knots
_MOST_BYTES = 1 << 30
_DEEPEST = 32  # elements of an XML file inside one another
_CROSSINGS = 1 << 20  # of edges with rows of points, held at once
_TILES = 1 << 12  # whose points are held at once


class AnnotationError(ValueError):
    """A file that holds no outlines as they were expected; the message names it."""


@dataclass(frozen=True)
class Polygon:
    """group: ASAP's group or the classification. rings: at least one, float64 [n > 2, 2] level-0 px, the last point joined to the
    first; inside by the even-odd rule over all of them."""

    group: str
    rings: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Annotations:
    """A point belongs to the finding when it lies in one of `inside` and in none of `outside`."""

    inside: tuple[Polygon, ...]
    outside: tuple[Polygon, ...]


def read_annotations(path: Path, exclude: Sequence[str]) -> Annotations:
    """`.xml` is ASAP's, anything else GeoJSON. exclude: groups whose areas are cut out of the others.

    Points and lines have no area and are passed over. Raises AnnotationError, and OSError when there is no such file.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise AnnotationError(f"{path} has more than {_MOST_BYTES >> 20} MiB: export the outlines without detections")
    polygons = _read_asap(path) if path.suffix.lower() == ".xml" else _read_geojson(path)
    left_out = set(exclude)
    inside = tuple(each for each in polygons if each.group not in left_out)
    return Annotations(inside, tuple(each for each in polygons if each.group in left_out))


def contains(polygons: Sequence[Polygon], points: np.ndarray) -> np.ndarray:
    """bool [p]: which points [p, 2] lie in any of the polygons.

    Row by row: an edge that crosses a row of points turns all of them right of it, and pairs of crossings of one polygon enclose
    those between. The cost grows with points and crossings, not with their product.
    """
    if not polygons or not len(points):
        return np.zeros(len(points), bool)
    rows, row = np.unique(points[:, 1], return_inverse=True)
    order = np.lexsort((points[:, 0], row))
    places = row[order] + 1j * points[order, 0]  # complex numbers are sorted by row, then by x
    within = np.zeros(len(points) + 1, np.int64)
    for at, x, polygon in _crossings(polygons, rows):
        left = np.lexsort((x, at, polygon))
        place = np.searchsorted(places, at[left] + 1j * x[left])
        np.add.at(within, place[0::2], 1)  # a closed ring crosses a row an even number of times
        np.add.at(within, place[1::2], -1)
    found = np.empty(len(points), bool)
    found[order] = np.cumsum(within[:-1]) > 0
    return found


def _crossings(polygons: Sequence[Polygon], rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(place of the row, x, polygon) of every edge that crosses one of the rows, ascending y; whole rows at a time."""
    starts = np.concatenate([ring for polygon in polygons for ring in polygon.rings])
    stops = np.concatenate([np.roll(ring, -1, axis=0) for polygon in polygons for ring in polygon.rings])
    owner = np.repeat(np.arange(len(polygons)), [sum(map(len, polygon.rings)) for polygon in polygons])
    (x0, y0), (x1, y1) = starts.T, stops.T
    first, last = (np.searchsorted(rows, y) for y in (np.minimum(y0, y1), np.maximum(y0, y1)))
    counts = np.cumsum(np.bincount(first, minlength=len(rows) + 1) - np.bincount(last, minlength=len(rows) + 1))
    blocks = np.cumsum(counts[:-1]) // _CROSSINGS
    for start, stop in zip(*_spans(blocks), strict=True):
        low, high = np.maximum(first, start), np.minimum(last, stop)
        crossing = np.flatnonzero(low < high)
        edge = np.repeat(crossing, (high - low)[crossing])
        before = np.cumsum((high - low)[crossing]) - (high - low)[crossing]
        at = np.arange(len(edge)) - np.repeat(before - low[crossing], (high - low)[crossing])
        yield at, x0[edge] + (rows[at] - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge], owner[edge]


def _spans(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last of every run of equal numbers."""
    cuts = np.flatnonzero(np.diff(blocks)) + 1
    return np.concatenate([[0], cuts]), np.concatenate([cuts, [len(blocks)]])


def coverage(coords: np.ndarray, size_px: int, annotations: Annotations) -> np.ndarray:
    """Share of each tile inside the finding: float64 [n], from a grid of 16 x 16 points a tile.

    coords: [n, 2] corners and size_px: side, both in level-0 px.
    """
    steps = (np.arange(_ACROSS) + 0.5) / _ACROSS * size_px
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    shares = np.zeros(len(coords))
    near = np.flatnonzero(_near(coords, size_px, annotations.inside))
    near = near[np.argsort(coords[near, 1], kind="stable")]
    for some in (near[start : start + _TILES] for start in range(0, len(near), _TILES)):
        points = (coords[some][:, None] + grid).reshape(-1, 2)
        inside = contains(annotations.inside, points) & ~contains(annotations.outside, points)
        shares[some] = inside.reshape(-1, len(grid)).mean(1)
    return shares


def _near(coords: np.ndarray, size_px: int, polygons: Sequence[Polygon]) -> np.ndarray:
    """bool [n]: tiles that meet the bounding box of a polygon; only they are worth their 256 points."""
    near = np.zeros(len(coords), bool)
    if not polygons:
        return near
    firsts = np.cumsum([0, *(sum(map(len, polygon.rings)) for polygon in polygons[:-1])])
    corners = np.concatenate([ring for polygon in polygons for ring in polygon.rings])
    low, high = np.minimum.reduceat(corners, firsts), np.maximum.reduceat(corners, firsts)
    order = np.argsort(coords[:, 1], kind="stable")
    top, left = coords[order].T[::-1]
    starts, stops = np.searchsorted(top, low[:, 1] - size_px), np.searchsorted(top, high[:, 1], side="right")
    for start, stop, west, east in zip(starts.tolist(), stops.tolist(), low[:, 0].tolist(), high[:, 0].tolist(), strict=True):
        across = left[start:stop]
        near[order[start:stop][(across + size_px >= west) & (across <= east)]] = True
    return near


def _read_geojson(path: Path) -> list[Polygon]:
    """A feature collection, one feature or a list of features."""
    try:
        found = parse(path.read_bytes())
        features = found.get("features", [found]) if isinstance(found, dict) else found
        return [polygon for feature in features for polygon in _of_feature(feature)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise AnnotationError(f"{path} is no GeoJSON of outlines ({why}): expected features with a Polygon each") from error


def _of_feature(feature: dict[str, Any]) -> list[Polygon]:
    shape, properties = feature["geometry"], feature.get("properties") or {}
    name = (properties.get("classification") or {}).get("name")
    group = str(name) if isinstance(name, str | int | float) else ""
    match shape["type"]:
        case "Polygon":
            parts = [shape["coordinates"]]
        case "MultiPolygon":
            parts = shape["coordinates"]
        case "Point" | "MultiPoint" | "LineString" | "MultiLineString":
            return []
        case kind:
            raise ValueError(f"a geometry is a {kind}")
    if not parts or not all(parts):
        raise ValueError(f"a {shape['type']} has no ring")
    return [Polygon(group, tuple(_ring(ring) for ring in rings)) for rings in parts]


def _ring(points: Sequence[Sequence[float]]) -> np.ndarray:
    """float64 [n, 2]. Raises ValueError for points that are not three places on a slide, TypeError for what is no list."""
    ring = np.array([point[:2] for point in points])
    if ring.ndim != 2 or ring.shape[1] != 2 or ring.dtype.kind not in "iuf":
        raise ValueError(f"a ring of {len(ring)} points, of which not all are x and y")
    if len(ring) < 3:
        raise ValueError(f"a ring of {len(ring)} points")
    ring = ring.astype(np.float64)
    if not (np.abs(ring) <= FARTHEST_PX).all():
        raise ValueError(f"a ring reaches to {np.abs(ring).max():g}, which is no place on a slide")
    return ring


def _read_asap(path: Path) -> list[Polygon]:
    """Annotations/Annotation@Type,@PartOfGroup with Coordinates/Coordinate@Order,@X,@Y. A document type is refused, and with it
    every entity, so that nothing can expand or reach another file."""
    found: list[Polygon] = []
    within: list[str] = []
    current: dict[str, str] = {}
    points: list[tuple[int, float, float]] = []

    def refuse(*_: object) -> None:
        raise AnnotationError(f"{path} declares a document type, which an annotation has no use for: export it again")

    def start(tag: str, attributes: dict[str, str]) -> None:
        if not within and tag != "ASAP_Annotations":
            raise AnnotationError(f"{path} begins with {tag[:40]}: expected ASAP_Annotations")
        within.append(tag)
        if len(within) > _DEEPEST:
            raise AnnotationError(f"{path} nests elements {len(within)} deep, as no annotation does: export it again")
        if tag == "Annotation":
            current.clear()
            current.update(attributes)
            points.clear()
        elif tag == "Coordinate":
            points.append((int(float(attributes["Order"])), float(attributes["X"]), float(attributes["Y"])))

    def end(tag: str) -> None:
        within.pop()
        if tag == "Annotation" and current.get("Type") in _AREAS and len(points) > 2:  # a stray click leaves one or two
            group = current.get("PartOfGroup", "")
            found.append(Polygon("" if group == "None" else group, (_ring([xy[1:] for xy in sorted(points)]),)))

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler, parser.StartElementHandler, parser.EndElementHandler = refuse, start, end
    try:
        parser.Parse(path.read_bytes(), True)
    except AnnotationError:
        raise
    except (expat.ExpatError, LookupError, ValueError, OverflowError) as error:  # LookupError: of an encoding, too
        expected = "expected ASAP_Annotations/Annotations/Annotation/Coordinates/Coordinate@Order,@X,@Y"
        raise AnnotationError(f"{path} is no ASAP annotation ({error}): {expected}") from error
    return found
