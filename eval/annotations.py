"""Outlines that people drew: ASAP's XML and GeoJSON (QuPath's among it), with holes and with areas to leave out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
from matplotlib.path import Path as Outline

_ACROSS = 16  # points along a tile's side: an outline counts from about 1/256 of a tile
_AREAS = ("Polygon", "Spline", "Rectangle")  # ASAP's kinds that have one; a spline is taken by its knots


class AnnotationError(ValueError):
    """A file that holds no outlines as they were expected; the message names it."""


@dataclass(frozen=True)
class Polygon:
    """group: ASAP's group or the classification. rings: float64 [n, 2] level-0 px; inside by the even-odd rule over all of
    them."""

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
    polygons = _read_asap(path) if path.suffix.lower() == ".xml" else _read_geojson(path)
    left_out = set(exclude)
    inside = tuple(each for each in polygons if each.group not in left_out)
    return Annotations(inside, tuple(each for each in polygons if each.group in left_out))


def contains(polygons: Sequence[Polygon], points: np.ndarray) -> np.ndarray:
    """bool [p]: which points [p, 2] lie in any of the polygons."""
    found = np.zeros(len(points), bool)
    for polygon in polygons:
        inside = np.zeros(len(points), bool)
        for ring in polygon.rings:
            near = ((points >= ring.min(0)) & (points <= ring.max(0))).all(1)
            if near.any():
                inside[near] ^= Outline(ring).contains_points(points[near])
        found |= inside
    return found


def coverage(coords: np.ndarray, size_px: int, annotations: Annotations) -> np.ndarray:
    """Share of each tile inside the finding: float64 [n], from a grid of 16 x 16 points a tile.

    coords: [n, 2] corners and size_px: side, both in level-0 px.
    """
    steps = (np.arange(_ACROSS) + 0.5) / _ACROSS * size_px
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    shares = np.zeros(len(coords))
    near = _near(coords, size_px, annotations.inside)
    points = (coords[near][:, None] + grid).reshape(-1, 2)
    inside = contains(annotations.inside, points) & ~contains(annotations.outside, points)
    shares[near] = inside.reshape(-1, len(grid)).mean(1)
    return shares


def _near(coords: np.ndarray, size_px: int, polygons: Sequence[Polygon]) -> np.ndarray:
    """bool [n]: tiles that meet the bounding box of an outer ring; only they are worth their 256 points."""
    near = np.zeros(len(coords), bool)
    for polygon in polygons:
        corners = np.concatenate(polygon.rings)
        near |= ((coords + size_px >= corners.min(0)) & (coords <= corners.max(0))).all(1)
    return near


def _read_geojson(path: Path) -> list[Polygon]:
    """A feature collection, one feature or a list of features."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        features = found.get("features", [found]) if isinstance(found, dict) else found
        return [polygon for feature in features for polygon in _of_feature(feature)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AnnotationError(f"{path} is no GeoJSON of outlines ({error}): expected features with a Polygon each") from error


def _of_feature(feature: dict[str, Any]) -> list[Polygon]:
    shape, properties = feature["geometry"], feature.get("properties") or {}
    group = str((properties.get("classification") or {}).get("name") or "")
    match shape["type"]:
        case "Polygon":
            parts = [shape["coordinates"]]
        case "MultiPolygon":
            parts = shape["coordinates"]
        case "Point" | "MultiPoint" | "LineString" | "MultiLineString":
            parts = []
        case kind:
            raise ValueError(f"a geometry is a {kind}")
    return [Polygon(group, tuple(_ring(ring) for ring in rings)) for rings in parts]


def _ring(points: Sequence[Sequence[float]]) -> np.ndarray:
    ring = np.array([point[:2] for point in points], np.float64).reshape(-1, 2)
    if len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError(f"a ring of {len(ring)} points, of which not all are numbers" if len(ring) > 2 else "a ring of 2 points")
    return ring


def _read_asap(path: Path) -> list[Polygon]:
    """Annotations/Annotation@Type,@PartOfGroup with Coordinates/Coordinate@Order,@X,@Y. A document type is refused, and with it
    every entity, so that nothing can expand or reach another file."""
    found: list[Polygon] = []
    roots: list[str] = []
    current: dict[str, str] = {}
    points: list[tuple[int, float, float]] = []

    def refuse(*_: object) -> None:
        raise AnnotationError(f"{path} declares a document type, which an annotation has no use for: export it again")

    def start(tag: str, attributes: dict[str, str]) -> None:
        roots.append(tag)
        if tag == "Annotation":
            current.clear()
            current.update(attributes)
            points.clear()
        elif tag == "Coordinate":
            points.append((int(float(attributes["Order"])), float(attributes["X"]), float(attributes["Y"])))

    def end(tag: str) -> None:
        if tag == "Annotation" and current.get("Type") in _AREAS and len(points) > 2:  # a stray click leaves one or two
            group = current.get("PartOfGroup", "")
            found.append(Polygon("" if group == "None" else group, (_ring([xy[1:] for xy in sorted(points)]),)))

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler, parser.StartElementHandler, parser.EndElementHandler = refuse, start, end
    try:
        parser.Parse(path.read_bytes(), True)
    except (expat.ExpatError, KeyError, ValueError) as error:
        if isinstance(error, AnnotationError):
            raise
        expected = "expected ASAP_Annotations/Annotations/Annotation/Coordinates/Coordinate@Order,@X,@Y"
        raise AnnotationError(f"{path} is no ASAP annotation ({error}): {expected}") from error
    if roots[0] != "ASAP_Annotations":
        raise AnnotationError(f"{path} begins with {roots[0]}: expected ASAP_Annotations")
    return found
