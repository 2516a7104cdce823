"""Tiles as QuPath reads them: a detection a tile with its measurements, an annotation a connected region of the top tiles.

The GeoJSON dialect is that of qupath/qupath, QuPathTypeAdapters: `objectType`, `classification` {name, color} and `measurements`
(name -> number) under `properties`; coordinates are level-0 pixels.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import label

from histoscale.data.journal import write_atomic
from histoscale.eval.evidence.display import Shown

REGION = "attended region"
_GREY = [128, 128, 128]


def write_geojson(
    path: Path, coords: np.ndarray, size_px: int, measurements: Mapping[str, np.ndarray], shown: Shown, top: np.ndarray
) -> None:
    """One feature a tile and one a region of the tiles `top` (their rows). measurements: name -> [n]; NaN is left out."""
    colours = shown.rgb(shown.values).tolist()
    features = [
        _feature([_square(x, y, size_px)], "detection", "tile", colour,
                 {name: float(values[i]) for name, values in measurements.items() if np.isfinite(values[i])})
        for i, ((x, y), colour) in enumerate(zip(coords.tolist(), colours, strict=True))
    ]  # fmt: skip
    attention = measurements["attention"]
    for number, (rings, rows) in enumerate(regions(coords, size_px, top, attention), 1):
        share = {"tiles": float(len(rows)), "attention": float(attention[rows].sum())}
        features.append(_feature(rings, "annotation", REGION, [200, 40, 40], share, f"{REGION} {number}"))
    # Numbers and fixed words alone: there is nothing to scrub or to read back in what may be a hundred thousand tiles.
    text = json.dumps({"type": "FeatureCollection", "features": features}, allow_nan=False, separators=(",", ":"))
    write_atomic(path, text + "\n")


def regions(coords: np.ndarray, size_px: int, top: np.ndarray, weight: np.ndarray) -> list[tuple[list[list], np.ndarray]]:
    """Connected regions of the tiles `top`: their rings (the outer one first) and their tiles, by falling weight.

    Tiles touch when they share an edge or overlap. Their borders cut the plane into a grid of cells, so outlines are exact.
    """
    if len(top) == 0:
        return []
    corners = coords[top]
    xs, ys = (np.unique(np.concatenate([corners[:, axis], corners[:, axis] + size_px])) for axis in (0, 1))
    cells = np.zeros((len(ys) - 1, len(xs) - 1), bool)
    for x, y in corners.tolist():
        cells[slice(*np.searchsorted(ys, [y, y + size_px])), slice(*np.searchsorted(xs, [x, x + size_px]))] = True
    parts, count = label(cells)
    owner = parts[np.searchsorted(ys, corners[:, 1]), np.searchsorted(xs, corners[:, 0])]
    found = []
    for number in range(1, count + 1):
        rings = [[[int(xs[x]), int(ys[y])] for x, y in ring] for ring in _trace(parts == number)]
        found.append((rings, top[owner == number]))
    return sorted(found, key=lambda each: -float(weight[each[1]].sum()))


def _trace(cells: np.ndarray) -> list[list[tuple[int, int]]]:
    """Closed outlines of one edge-connected region of cells: corners (x, y), the outer ring first, then its holes.

    Edges run with the region on their right (y down). Where two cells meet at a corner only, the outline turns left, so that each
    part of the outside keeps a ring of its own: rings touch in a point but none touches itself, as simple features ask.
    """
    padded = np.pad(cells, 1)
    onward: dict[tuple[int, int], list[tuple[int, int]]] = {}
    height, width = cells.shape
    for (dy, dx), (start, stop) in {
        (-1, 0): ((0, 0), (1, 0)), (0, 1): ((1, 0), (1, 1)), (1, 0): ((1, 1), (0, 1)), (0, -1): ((0, 1), (0, 0)),
    }.items():  # fmt: skip
        open_edge = cells & ~padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        for y, x in np.argwhere(open_edge).tolist():
            onward.setdefault((x + start[0], y + start[1]), []).append((x + stop[0], y + stop[1]))
    rings = []
    while onward:
        first = min(onward)  # on the outer ring the first time: the leftmost corner
        ring, here, before = [first], first, (0, 1)
        while True:
            choices = onward[here]
            after = min(choices, key=lambda to: _turn(before, (to[0] - here[0], to[1] - here[1])))
            choices.remove(after)
            if not choices:
                del onward[here]
            step = (after[0] - here[0], after[1] - here[1])
            if step == before and len(ring) > 1:
                ring[-1] = after
            else:
                ring.append(after)
            here, before = after, step
            if here == first:
                break
        rings.append(ring)
    return rings


def _turn(before: tuple[int, int], after: tuple[int, int]) -> int:
    """1 for a right turn (y down), 0 straight on, -1 left."""
    return before[0] * after[1] - before[1] * after[0]


def _square(x: int, y: int, side: int) -> list[list[int]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def _feature(
    rings: list[list], kind: str, classification: str, colour: list[int], measurements: dict[str, float], name: str = ""
) -> dict[str, Any]:
    # A class has one colour in QuPath, a tile its own.
    properties: dict[str, Any] = {"objectType": kind, "color": colour, "classification": {"name": classification, "color": _GREY}}
    if name:
        properties["name"] = name
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {**properties, "measurements": measurements},
    }
