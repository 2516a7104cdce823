"""Outlines in Aperio's XML, and the pixels inside them."""

from pathlib import Path
from xml.parsers import expat

import numpy as np

from histoscale.eval.datasets.patches import DatasetError

LARGEST_PX = 1e6  # a vertex beyond is damage, not tissue

Polygon = tuple[str, np.ndarray]  # the annotation's name, float64 [v, 2] vertices (X, Y)


def read_polygons(path: Path) -> list[Polygon]:
    """The regions of an Aperio annotation file in their order.

    Annotation/Attributes/Attribute@Name (the first one) names the class of all Annotation/Regions/Region/Vertices/Vertex@X,@Y.
    A document type is refused, and with it every entity, so that nothing can expand or reach another file.
    Raises DatasetError: not XML, a document type, an annotation without a name, a vertex without finite X and Y.
    """
    found: list[Polygon] = []
    state: dict[str, str | None] = {"name": None, "region": None}
    vertices: list[tuple[float, float]] = []

    def fail(problem: str) -> DatasetError:
        return DatasetError(
            f"{path}: {problem}, expected Annotation/Attributes/Attribute@Name and Regions/Region/Vertices/Vertex@X,@Y: "
            "fetch it again"
        )

    def refuse(*_: object) -> None:
        raise fail("it declares a document type, which an annotation has no use for")

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag == "Annotation":
            state["name"] = None
        elif tag == "Attribute" and state["name"] is None and state["region"] is None:  # a region may have attributes of its own
            state["name"] = attributes.get("Name")
        elif tag == "Region":
            state["region"] = tag
            vertices.clear()
        elif tag == "Vertex":
            vertices.append(vertex(attributes))

    def vertex(attributes: dict[str, str]) -> tuple[float, float]:
        try:
            x, y = float(attributes["X"]), float(attributes["Y"])
        except (KeyError, ValueError) as error:
            raise fail(f"a vertex of region {len(found) + 1} has no X and Y that are numbers") from error
        if not (abs(x) <= LARGEST_PX and abs(y) <= LARGEST_PX):
            raise fail(f"a vertex of region {len(found) + 1} lies at ({x}, {y})")
        return x, y

    def end(tag: str) -> None:
        if tag == "Region":
            state["region"] = None
            if state["name"] is None:
                raise fail(f"region {len(found) + 1} stands in an annotation without a name")
            found.append((state["name"], np.array(vertices, np.float64).reshape(-1, 2)))

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    try:
        parser.Parse(path.read_bytes(), True)
    except DatasetError:
        raise
    except (expat.ExpatError, LookupError, ValueError) as error:  # the last two of its encoding
        raise fail(f"it is not XML ({error})") from error
    return found


def paint(mask: np.ndarray, vertices: np.ndarray, value: int) -> None:
    """Set the pixels of a polygon in `mask` [h, w]: those whose centre lies inside by the even-odd rule, or on the outline.

    vertices: [v, 2] of (X = column, Y = row), pixel centres at whole numbers. Crossings to both sides as in O'Rourke,
    Computational Geometry in C, 7.4, which is what scikit-image's `draw.polygon` and so eva paint.
    """
    if len(vertices) == 0:
        return
    height, width = mask.shape
    (left, top), (right, bottom) = vertices.min(axis=0), vertices.max(axis=0)
    rows = np.arange(int(max(0, top)), min(height - 1, int(np.ceil(bottom))) + 1)
    for column in range(int(max(0, left)), min(width - 1, int(np.ceil(right))) + 1):
        inside = _on_line(vertices[:, 1], vertices[:, 0], rows, column)
        mask[rows[inside], column] = value


def _on_line(along: np.ndarray, across: np.ndarray, points: np.ndarray, line: int) -> np.ndarray:
    """bool [p]: which points of a line lie in the polygon. along, across: [v], the vertices' places along and across the line."""
    a0, c0 = along[None] - points[:, None], across - line  # [p, v], [v]
    a1, c1 = np.roll(a0, 1, axis=1), np.roll(c0, 1)
    over, under = (c0 > 0) != (c1 > 0), (c0 < 0) != (c1 < 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = (a0 * c1 - a1 * c0) / (c1 - c0)  # only read where the edge crosses, so where c1 != c0
    right = (over & (crossing > 0)).sum(axis=1) % 2
    left = (under & (crossing < 0)).sum(axis=1) % 2
    vertex = ((np.abs(a0) < 1e-12) & (np.abs(c0) < 1e-12)).any(axis=1)
    return vertex | (left != right) | (right == 1)
