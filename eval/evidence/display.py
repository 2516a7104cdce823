"""How numbers of tiles become colours, and the words that say which numbers they are."""

import math
from dataclasses import dataclass

import matplotlib
import numpy as np

DISPLAYS = ("relative", "rank", "global")
_SIGNED, _ATTENTION = "PuOr_r", "YlOrRd"  # pale at the least: what is little attended is not darkened


@dataclass(frozen=True)
class Shown:
    """values: float64 [n] as they are drawn, between low and high. colours: a matplotlib map. words: what they are."""

    values: np.ndarray
    low: float
    high: float
    colours: str
    words: str

    def rgb(self, values: np.ndarray) -> np.ndarray:
        """uint8 [..., 3] of values of any shape; NaN is white and is for the caller to leave out."""
        place = (np.nan_to_num(values, nan=self.low) - self.low) / ((self.high - self.low) or 1.0)
        colours = matplotlib.colormaps[self.colours](place.clip(0, 1), bytes=True)[..., :3]
        return np.where(np.isnan(values)[..., None], np.uint8(255), colours)

    def gradient(self, stops: int = 9) -> list[str]:
        """CSS colours from low to high."""
        return ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in self.rgb(np.linspace(self.low, self.high, stops)).tolist()]


def attention_shown(attention: np.ndarray, display: str, limit: float) -> Shown:
    """attention [n] as multiples of the mean tile (`relative`, up to the slide's own most; `global`, up to `limit`, the same for
    all slides) or as `rank` within the slide. Raises ValueError for another display."""
    times = attention * len(attention)
    match display:
        case "relative":
            return Shown(times, 0.0, float(times.max()), _ATTENTION, "attention, multiples of the slide's mean tile")
        case "global":
            words = f"attention, multiples of the slide's mean tile, one scale up to {limit:.3g} for all slides"
            return Shown(times, 0.0, limit, _ATTENTION, words)
        case "rank":
            places = attention.argsort(kind="stable").argsort(kind="stable")
            return Shown(places / max(len(attention) - 1, 1), 0.0, 1.0, _ATTENTION, "rank of attention in this slide")
    raise ValueError(f"display is {display!r}: expected {', '.join(DISPLAYS)}")


def signed_shown(values: np.ndarray, words: str) -> Shown:
    """values [n] around 0, for which both colours reach equally far. Orange raises the output, violet lowers it."""
    most = float(np.abs(values).max()) or 1.0
    return Shown(values, -most, most, _SIGNED, words)


def common_limit(attentions: list[np.ndarray]) -> float:
    """The 99.5th percentile of attention in multiples of the mean tile over all slides: the top of the `global` display."""
    return float(np.quantile(np.concatenate([each * len(each) for each in attentions]), 0.995))


def bar_um(width_um: float) -> float:
    """A round length of 1, 2 or 5 times a power of ten, at most a quarter of the width."""
    power = 10.0 ** math.floor(math.log10(width_um / 4))
    return max(step * power for step in (1, 2, 5) if step * power <= width_um / 4 * (1 + 1e-9))


def length_words(um: float) -> str:
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"
