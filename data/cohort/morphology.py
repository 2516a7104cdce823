"""What tells the tissues apart (nuclei and fibres) and what may not: the law that all matched tissues share."""

from dataclasses import dataclass

import numpy as np

from histoscale.data.cohort.fields import generator
from histoscale.data.keys import key

# Codes of the class map; the nuclei table uses the same.
CLASSES = ("background", "benign", "tumour", "lymphoid", "stroma", "adipose", "necrosis", "mimic")
BACKGROUND, BENIGN, TUMOUR, LYMPHOID, STROMA, ADIPOSE, NECROSIS, MIMIC = range(8)
MATCHED = (BENIGN, TUMOUR, LYMPHOID, STROMA)


@dataclass(frozen=True)
class Morphology:
    """Nuclei of one tissue: semi-axis (um, of the circle of equal area) and its coefficient of variation, axis ratio, contour
    roughness,
    share with a nucleolus; `fibre`: middle of the weight of the drawn-out texture; `spacing`: least distance in sums of
    semi-axes."""

    semi_axis_um: float
    variation: float
    elongation: float
    contour: float
    nucleolus: float
    fibre: float
    spacing: float


_NEUTRAL = {
    BENIGN: Morphology(3.0, 0.12, 1.35, 0.04, 0.15, 0.25, 0.72),
    TUMOUR: Morphology(3.9, 0.30, 1.30, 0.12, 0.60, 0.25, 0.72),
    LYMPHOID: Morphology(2.5, 0.12, 1.08, 0.03, 0.00, 0.25, 0.95),
    STROMA: Morphology(3.2, 0.20, 3.40, 0.05, 0.00, 0.75, 0.72),
    MIMIC: Morphology(3.4, 0.15, 1.35, 0.05, 0.40, 0.25, 0.72),
    ADIPOSE: Morphology(2.6, 0.15, 2.40, 0.04, 0.00, 0.25, 0.90),
    NECROSIS: Morphology(1.4, 0.45, 1.30, 0.20, 0.00, 0.10, 0.80),
}


def morphologies(gap: float) -> dict[int, Morphology]:
    """The tissues with every parameter moved away from (gap > 1) or towards (gap < 1) the mean over the matched classes.

    Raises ValueError for a negative gap.
    """
    if gap < 0:
        raise ValueError(f"cohort.gap is {gap}: expected 0 (no difference between classes) or more")
    values = {c: np.array([*vars(m).values()]) for c, m in _NEUTRAL.items()}
    centre = np.mean([values[c] for c in MATCHED], 0)
    low, high = np.array([1.2, 0.05, 1.0, 0.0, 0.0, 0.0, 0.6]), np.array([9.0, 0.5, 6.0, 0.3, 1.0, 1.0, 1.0])
    moved = {c: v for c, v in values.items() if c in (*MATCHED, MIMIC)}
    moved = {c: np.clip(centre + gap * (v - centre), low, high) for c, v in moved.items()}
    moved = {c: np.append(v[:-1], values[c][-1]) for c, v in moved.items()}  # packing is no class parameter
    return {c: Morphology(*map(float, moved.get(c, v))) for c, v in values.items()}


@dataclass(frozen=True)
class Law:
    """One patient's draw of what a histogram sees, a value a class: nuclear area fraction, nuclear and eosin optical
    density, size factor."""

    nuclear_fraction: np.ndarray
    nuclear_density: np.ndarray
    eosin_density: np.ndarray
    size: np.ndarray


def draw_law(seed: int, patient: int) -> Law:
    """A patient's law; the class effects on it are drawn for each patient and class alike (else a tile-random split would
    leak nothing)."""
    rng = generator(key(seed, "cohort/law", patient))
    fraction, nuclear, eosin, size = rng.uniform(0.15, 0.26), 0.75 * _lognormal(rng, 0.18), 0.42 * _lognormal(rng, 0.20), 1.0
    n = len(CLASSES)
    return Law(
        fraction * _lognormal(rng, 0.20, n),
        nuclear * _lognormal(rng, 0.15, n),
        eosin * _lognormal(rng, 0.15, n),
        size * _lognormal(rng, 0.06, n),
    )


def _lognormal(rng: np.random.Generator, sigma: float, n: int = 1) -> np.ndarray:
    return np.exp(rng.normal(0, sigma, n))


def white_fraction(rng: np.random.Generator, tissue: np.ndarray) -> np.ndarray:
    """Share of lumen, cleft or fat of each region, by its class code [n]."""
    n = len(tissue)
    return np.where(tissue == ADIPOSE, rng.uniform(0.80, 0.90, n), rng.beta(1.2, 8, n)).clip(0.002, 0.92)


# `natural6` lets density and eosin differ as they do in real tissue: factors on the matched law.
NATURAL_FRACTION = {LYMPHOID: 1.8, STROMA: 0.5, ADIPOSE: 0.5, NECROSIS: 0.5}
NATURAL_EOSIN = {NECROSIS: 1.3}
