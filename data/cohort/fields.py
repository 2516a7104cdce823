"""Smooth random fields on grids in um, and their exact reading through any window."""

import numpy as np

Array = np.ndarray


def generator(k: int) -> np.random.Generator:
    """The stream of random numbers that a key of `data.keys` names."""
    return np.random.Generator(np.random.SFC64(k))


class Linear:
    """Where increasing positions (in steps, node i at i) lie between the `size` nodes of a grid; constant beyond its ends."""

    def __init__(self, positions: Array, size: int) -> None:
        clipped = np.clip(positions, 0, size - 1)
        left = np.minimum(clipped.astype(np.int64), max(size - 2, 0))
        self.used = slice(int(left[0]), min(int(left[-1]) + 2, size))  # the nodes that are read at all
        self.left = left - self.used.start
        self.right = np.minimum(left + 1, size - 1) - self.used.start
        self.share = (clipped - left).astype(np.float32)

    def along(self, grid: Array, axis: int) -> Array:
        """float32: `grid`, of the used nodes, read at the positions along one axis, -1 or -2."""
        share = self.share if axis == -1 else self.share[:, None]
        low, high = grid.take(self.left, axis), grid.take(self.right, axis)
        low *= 1 - share
        high *= share
        low += high
        return low


def between(grid: Array, rows: Linear, columns: Linear) -> Array:
    """float32 [..., h, w] grids read at all pairs of a row and a column."""
    return rows.along(columns.along(grid[..., rows.used, columns.used], -1), -2)


def _spline_weights(positions: Array, size: int) -> Array:
    """float32 [len(positions), size]: cubic B-spline rows of unit length, so that white noise keeps unit variance everywhere."""
    base = np.floor(positions).astype(np.int64)
    t = positions - base
    taps = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1)
    taps /= np.linalg.norm(taps, axis=1, keepdims=True)
    weights = np.zeros((len(positions), size), np.float32)
    weights[np.arange(len(positions))[:, None], base[:, None] + np.arange(4)] = taps
    return weights


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], step_um: float, scale_um: float) -> Array:
    """A standard normal field, float32 of `shape` (rows, columns), sampled every step_um.

    scale_um: the spacing of its free values; features are about twice as wide.
    """
    rows, columns = (np.arange(n) * step_um / scale_um + rng.random() for n in shape)
    size_y, size_x = int(rows[-1]) + 5, int(columns[-1]) + 5
    noise = rng.standard_normal((size_y, size_x), dtype=np.float32)
    return (_spline_weights(rows, size_y) @ noise) @ _spline_weights(columns, size_x).T


def periodic_texture(rng: np.random.Generator, size: int, sigmas_px: tuple[float, float]) -> Array:
    """A standard normal texture that tiles the plane, float32 [size, size]: white noise under a Gaussian of these sigmas
    (rows, columns)."""
    frequency = np.fft.fftfreq(size), np.fft.rfftfreq(size)
    transfer = [np.exp(-2 * (np.pi * s * f) ** 2) for s, f in zip(sigmas_px, frequency, strict=True)]
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * transfer[0][:, None] * transfer[1][None, :]
    texture = np.fft.irfft2(spectrum, s=(size, size))
    return ((texture - texture.mean()) / texture.std()).astype(np.float32)


def wrapped(texture: Array, y: int, x: int, height: int, width: int) -> Array:
    """The window [height, width] at (y, x) of a texture that tiles the plane."""
    rows, columns = np.arange(y, y + height) % texture.shape[0], np.arange(x, x + width) % texture.shape[1]
    return texture[rows].take(columns, 1)
