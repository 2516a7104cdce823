"""Nuclei: where they lie, how each one looks, and their optical density on a pixel grid."""

from dataclasses import dataclass, fields

import numpy as np
from scipy.spatial import cKDTree

from histoscale.data.cohort.morphology import Morphology

Array = np.ndarray
_HARMONICS = (2, 3, 4, 5)  # of the contour r(t) = 1 + sum_k rho/k n_k cos(k t + phi_k)
_SOFT_EDGE_UM = 0.45
_CHUNK = 96  # nuclei drawn at once: their arrays stay in cache


@dataclass
class Nuclei:
    """n nuclei: centre (um), class code, semi-axes a >= b (um), angle of a (radians, x right, y down), nucleolus (0/1), optical
    density,
    and the free values of the contour [n, 4, 2], the nucleolus' place [n, 2] and the chromatin's place in its texture [n, 2]."""

    x: Array
    y: Array
    kind: Array
    a: Array
    b: Array
    theta: Array
    nucleolus: Array
    density: Array
    contour: Array
    eccentric: Array
    chromatin: Array

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Array) -> "Nuclei":
        return Nuclei(*(getattr(self, f.name)[rows] for f in fields(self)))


def hard_core(x: Array, y: Array, radius: Array) -> tuple[Array, Array]:
    """Greedy thinning in order: a point stays unless an earlier one that stays is nearer than the sum of their radii.

    Returns kept bool [n] and all pairs [p, 2] (earlier, later) that may touch. The result is that of a loop over the points,
    found in a few vector rounds.
    """
    pairs = cKDTree(np.stack([x, y], 1)).query_pairs(2 * float(radius.max()), output_type="ndarray")
    pairs.sort(axis=1)
    distance = np.hypot(x[pairs[:, 0]] - x[pairs[:, 1]], y[pairs[:, 0]] - y[pairs[:, 1]])
    clash = pairs[distance < radius[pairs[:, 0]] + radius[pairs[:, 1]]]
    kept, open_ = np.zeros(len(x), bool), np.ones(len(x), bool)
    while open_.any():
        waiting = np.zeros(len(x), bool)
        waiting[clash[:, 1]] = True
        won = open_ & ~waiting
        kept |= won
        open_ &= ~won
        open_[clash[won[clash[:, 0]], 1]] = False
        clash = clash[open_[clash[:, 0]] & open_[clash[:, 1]]]
    return kept, pairs


def covered(x: Array, y: Array, radius: Array, pairs: Array) -> Array:
    """Area that each disc adds to the union of the earlier ones, um^2 [n]: its own less its lenses with them (exact to
    second order)."""
    added = np.pi * radius**2
    first, second = pairs[:, 0], pairs[:, 1]
    r, s = radius[first], radius[second]
    d = np.clip(np.hypot(x[first] - x[second], y[first] - y[second]), np.abs(r - s) + 1e-6, r + s)
    alpha = np.arccos(np.clip((d * d + r * r - s * s) / (2 * d * r), -1, 1))
    beta = np.arccos(np.clip((d * d + s * s - r * r) / (2 * d * s), -1, 1))
    lens = r * r * (alpha - np.sin(2 * alpha) / 2) + s * s * (beta - np.sin(2 * beta) / 2)
    return added - np.bincount(second, lens, len(x))


def draw_nuclei(
    nuclei: Nuclei, shapes: dict[int, Morphology], texture: Array, x_um: float, y_um: float, mpp: float, shape: tuple[int, int]
) -> tuple[Array, Array]:
    """Optical density and cover of the nuclei on a pixel grid: two float32 [h, w], composited by their maximum.

    x_um, y_um: the centre of pixel (0, 0). texture: the chromatin of `chromatin_texture(mpp)`. Every nucleus has a mean density
    of its own `density`, whatever its contour, chromatin and nucleolus.
    """
    h, w = shape
    density, cover = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    rough = np.array([shapes[k].contour if k in shapes else 0.0 for k in range(max(shapes) + 1)], np.float32)
    half = np.ceil((nuclei.a * (1 + 1.2 * rough[nuclei.kind]) + 1.2) / mpp).astype(np.int64)
    half = np.ceil(half * 0.25).astype(np.int64) * 4
    px, py = (nuclei.x - x_um) / mpp, (nuclei.y - y_um) / mpp
    cx, cy = np.rint(px).astype(np.int64), np.rint(py).astype(np.int64)
    seen = (cx + half >= 0) & (cx - half < w) & (cy + half >= 0) & (cy - half < h)
    for m in np.unique(half[seen]):
        rows = np.flatnonzero(seen & (half == m))
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            dx, dy = px[chunk] - cx[chunk], py[chunk] - cy[chunk]
            cover_stamps, density_stamps = _stamps(nuclei.take(chunk), rough, texture, dx, dy, mpp, int(m))
            left, top = cx[chunk] - m, cy[chunk] - m
            for i, (x0, y0) in enumerate(zip(left.tolist(), top.tolist(), strict=True)):
                ys, xs = slice(max(y0, 0), min(y0 + 2 * m + 1, h)), slice(max(x0, 0), min(x0 + 2 * m + 1, w))
                inside = slice(ys.start - y0, ys.stop - y0), slice(xs.start - x0, xs.stop - x0)
                np.maximum(cover[ys, xs], cover_stamps[i][inside], out=cover[ys, xs])
                np.maximum(density[ys, xs], density_stamps[i][inside], out=density[ys, xs])
    return density, cover


def _stamps(n: Nuclei, rough: Array, texture: Array, dx: Array, dy: Array, mpp: float, m: int) -> tuple[Array, Array]:
    """Cover and optical density of each nucleus in its own window: float32 [n, 2m+1, 2m+1] each."""
    def column(values: Array) -> Array:
        return values.astype(np.float32)[:, None, None]

    grid = np.arange(-m, m + 1, dtype=np.float32)
    xx, yy = (grid[None, None, :] - column(dx)) * np.float32(mpp), (grid[None, :, None] - column(dy)) * np.float32(mpp)
    cos, sin = column(np.cos(n.theta)), column(np.sin(n.theta))
    u, v = xx * cos + yy * sin, yy * cos - xx * sin
    us, vs = u / column(n.a), v / column(n.b)
    radius = np.sqrt(us * us + vs * vs)
    unit = (us + 1j * vs) / np.maximum(radius, 1e-6)
    wave, contour = unit.copy(), np.ones_like(radius)
    roughness = rough[n.kind]
    for i, k in enumerate(_HARMONICS):
        wave *= unit
        amplitude = roughness / k * n.contour[:, i, 0]
        c, s = column(amplitude * np.cos(n.contour[:, i, 1])), column(amplitude * np.sin(n.contour[:, i, 1]))
        contour += wave.real * c - wave.imag * s
    depth = (contour - radius) * column(n.b)  # um inside the contour, roughly
    cover = 1 / (1 + np.exp(np.clip(depth * np.float32(-1 / (_SOFT_EDGE_UM * 0.5)), -30, 30)))
    windows = np.lib.stride_tricks.sliding_window_view(texture, (2 * m + 1, 2 * m + 1))
    limit = np.array(windows.shape[:2]) - 1
    place = (n.chromatin * limit).astype(np.int64)
    body = 0.85 + 0.20 * windows[place[:, 0], place[:, 1]]
    body += 0.20 * np.exp(-np.square((depth - 0.35) * np.float32(1 / 0.45)))  # the nuclear rim
    spotted = np.flatnonzero(n.nucleolus)
    if len(spotted):
        ox, oy = column(n.eccentric[spotted, 0] * n.a[spotted]), column(n.eccentric[spotted, 1] * n.b[spotted])
        body[spotted] += 0.75 * np.exp(-(np.square(u[spotted] - ox) + np.square(v[spotted] - oy)) * np.float32(0.5 / 0.75**2))
    np.clip(body, 0.3, 2.0, out=body)
    mean = (body * cover).sum((1, 2), keepdims=True) / cover.sum((1, 2), keepdims=True)
    return cover, (cover * body * (column(n.density) / mean)).astype(np.float32)
