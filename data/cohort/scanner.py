"""A site's staining and scanner: optical densities of two dyes become the pixels of a JPEG."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import simplejpeg

from histoscale.data.cohort.fields import generator, periodic_texture, wrapped
from histoscale.data.keys import key

Array = np.ndarray
HALO = 6  # pixels that blur and sharpening look beyond a window
_HAEMATOXYLIN, _EOSIN = np.array([0.64, 0.71, 0.28]), np.array([0.09, 0.95, 0.25])


@dataclass(frozen=True)
class Scanner:
    """How one slide comes out: unit stain vectors [3] (RGB optical density), gains, gamma, white balance [3], lens blur (um),
    sharpening, sensor noise (grey levels), white point, JPEG quality and chroma subsampling."""

    haematoxylin: Array
    eosin: Array
    gain_haematoxylin: float
    gain_eosin: float
    gamma: float
    balance: Array
    blur_um: float
    sharpening: float
    noise: float
    white: float
    quality: int
    subsampling: str


def site_scanner(seed: int, site: int, shift: float) -> Scanner:
    """The stain and scanner of a site. shift: 0 is the common centre, 1 a usual distance from it, more a stranger."""
    rng = generator(key(seed, "cohort/site", site))
    haematoxylin, eosin = _HAEMATOXYLIN + shift * rng.normal(0, 0.06, 3), _EOSIN + shift * rng.normal(0, 0.06, 3)
    return Scanner(
        haematoxylin=_unit(haematoxylin),
        eosin=_unit(eosin),
        gain_haematoxylin=float(np.exp(shift * rng.normal(0, 0.22))),
        gain_eosin=float(np.exp(shift * rng.normal(0, 0.22))),
        gamma=float(np.exp(shift * rng.normal(0, 0.07))),
        balance=1 + shift * rng.normal(0, 0.015, 3),
        blur_um=float(abs(0.12 + shift * rng.normal(0, 0.12))),
        sharpening=float(np.clip(0.15 + shift * rng.uniform(-0.15, 0.15), 0, 0.4)),
        noise=float(np.clip(1.5 + shift * rng.uniform(-0.7, 0.7), 0.4, 3)),
        white=float(243 + np.clip(shift, 0, 1) * rng.uniform(-7, 7)),
        quality=int(np.clip(76 + shift * rng.integers(-16, 17), 50, 95)),
        subsampling="444" if rng.random() < 0.5 else "420",
    )


def slide_scanner(site: Scanner, k: int) -> Scanner:
    """The site's scanner on one day: vectors and gains move a little from slide to slide."""
    rng = generator(key(k, "cohort/slide-stain"))
    return replace(
        site,
        haematoxylin=site.haematoxylin + rng.normal(0, 0.02, 3),
        eosin=site.eosin + rng.normal(0, 0.02, 3),
        gain_haematoxylin=site.gain_haematoxylin * float(np.exp(rng.normal(0, 0.08))),
        gain_eosin=site.gain_eosin * float(np.exp(rng.normal(0, 0.08))),
    )


def expose(
    haematoxylin: Array, eosin: Array, scanner: Scanner, mpp: float, origin: tuple[int, int], light: Array | None = None
) -> Array:
    """Optical densities float32 [h + 2 HALO, w + 2 HALO] to pixels uint8 [h, w, 3].

    origin: the (row, column) of the first output pixel in its slide, which places the sensor noise. light: float32 [3, h + 2
    HALO, w + 2 HALO] or None, factors on the transmitted light (ink, dust). Blur and sharpening act on light, gamma after them.
    """
    h, w = haematoxylin.shape[0] - 2 * HALO, haematoxylin.shape[1] - 2 * HALO
    pixels = np.empty((h, w, 3), np.uint8)
    sigma = scanner.blur_um / mpp
    for c in range(3):
        dye = haematoxylin * np.float32(-1.7 * scanner.gain_haematoxylin * scanner.haematoxylin[c])
        dye += eosin * np.float32(-scanner.gain_eosin * scanner.eosin[c])
        plane = np.exp(dye, out=dye)
        if light is not None:
            plane *= light[c]
        if sigma > 0.25:
            plane = _blur(plane, sigma)
        if scanner.sharpening > 0.01:
            plane = plane + np.float32(scanner.sharpening) * (plane - _blur(plane, 1.0))
        plane = plane[HALO:-HALO, HALO:-HALO]
        plane = np.exp(np.log(np.clip(plane, 1e-3, 1.2)) * np.float32(scanner.gamma))
        plane *= np.float32(scanner.balance[c] * scanner.white)
        plane += np.float32(scanner.noise) * wrapped(_noise(), origin[0] + 211 * c, origin[1] + 97 * c, h, w)
        pixels[..., c] = np.clip(plane + np.float32(0.5), 0, 255)
    return pixels


def encode(pixels: Array, scanner: Scanner) -> bytes:
    """One JPEG of uint8 [h, w, 3]."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), scanner.quality, "RGB", scanner.subsampling, fastdct=False)


def decode(jpeg: bytes) -> Array:
    """uint8 [h, w, 3]."""
    return simplejpeg.decode_jpeg(jpeg, "RGB")


@lru_cache(maxsize=1)
def _noise() -> Array:
    return periodic_texture(generator(key(0, "cohort/sensor")), 2048, (0.3, 0.3))


def _blur(plane: Array, sigma: float) -> Array:
    """A separable Gaussian of at most HALO / 2 taps a side, edges repeated."""
    reach = min(HALO // 2, max(1, round(2.5 * sigma)))
    taps = np.exp(-0.5 * (np.arange(reach + 1) / sigma) ** 2).astype(np.float32)
    taps /= taps[0] + 2 * taps[1:].sum()
    for axis in (0, 1):
        padded = np.pad(plane, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        n = plane.shape[axis]

        def part(start: int, padded: Array = padded, axis: int = axis, n: int = n) -> Array:
            return padded[start : start + n] if axis == 0 else padded[:, start : start + n]

        plane = taps[0] * part(reach)
        for i in range(1, reach + 1):
            plane += taps[i] * (part(reach - i) + part(reach + i))
    return plane


def _unit(v: Array) -> Array:
    return v / np.linalg.norm(v)
