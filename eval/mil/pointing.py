"""Does the model look where the finding is? Tiles against outlined foci."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.path import Path as Outline

from histoscale.eval.scores.interval import Interval, IntervalConfig, patient_bootstrap

_ACROSS = 16  # points along a tile's side: a focus counts from about 1/256 of a tile


def read_foci(path: Path) -> list[np.ndarray]:
    """Rings of every polygon of a GeoJSON file, holes included: float64 [n, 2] in level-0 px.

    Raises ValueError when the file is no collection of polygons.
    """
    try:
        shapes = [feature["geometry"] for feature in json.loads(path.read_text())["features"]]
        polygons = [shape["coordinates"] if shape["type"] == "Polygon" else sum(shape["coordinates"], []) for shape in shapes]
        return [np.asarray(ring, np.float64).reshape(-1, 2) for rings in polygons for ring in rings]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no GeoJSON file of polygons: {error}") from error


def coverage(coords: np.ndarray, size_px: int, rings: Sequence[np.ndarray]) -> np.ndarray:
    """Share of each tile inside the foci: float64 [n], from a grid of points; holes are outside (even-odd rule).

    coords: [n, 2] corners and size_px: side, both in level-0 px.
    """
    steps = (np.arange(_ACROSS) + 0.5) / _ACROSS * size_px
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    points = (coords[:, None] + grid).reshape(-1, 2)
    inside = np.zeros(len(points), bool)
    for ring in rings:
        near = ((points >= ring.min(0)) & (points <= ring.max(0))).all(1)
        inside[near] ^= Outline(ring).contains_points(points[near])
    return inside.reshape(len(coords), -1).mean(1)


def area_auroc(values: np.ndarray, covered: np.ndarray) -> float:
    """P(a random point inside the outlines lies in a tile of higher value than a random point outside) + P(equal) / 2.

    values: [n] a tile; covered: [n], the share of each tile inside. NaN when no tile has a part inside, or none outside.
    """
    _, place = np.unique(values, return_inverse=True)
    inside, outside = np.bincount(place, covered), np.bincount(place, 1 - covered)
    if inside.sum() == 0 or outside.sum() == 0:
        return float("nan")
    below = outside.cumsum() - outside / 2
    return float((inside * below).sum() / (inside.sum() * outside.sum()))


@dataclass(frozen=True)
class Pointing:
    """hits: share of the slides whose most attended tile meets a focus. chance: mean share of tiles that do.
    gain: hits minus chance. unseen: slides without a tile on a focus; they count as misses."""

    hits: float
    chance: float
    gain: Interval
    unseen: int


def pointing(
    attention: Sequence[np.ndarray], covered: Sequence[np.ndarray], patients: Sequence[str], config: IntervalConfig
) -> Pointing | None:
    """Pointing accuracy over positive slides; attention and covered: [n_i] a slide. None without slides."""
    if not attention:
        return None
    hit = np.array([float(shares[weights.argmax()] > 0) for weights, shares in zip(attention, covered, strict=True)])
    chance = np.array([float((shares > 0).mean()) for shares in covered])
    gain = patient_bootstrap(lambda drawn: float((hit - chance)[drawn].mean()), patients, config)
    return Pointing(float(hit.mean()), float(chance.mean()), gain, int((chance == 0).sum()))
