"""What the nuclei table of a patch alone can tell: the oracle that shows that a task has an answer."""

from collections.abc import Mapping

import numpy as np
from scipy.spatial import cKDTree

Array = np.ndarray
Nuclei = Mapping[str, Array]  # columns x, y, a, b (um), theta (radians), nucleolus (bool)


def oracle_features(nuclei: Nuclei, x_um: Array, y_um: Array, side_um: float) -> Array:
    """Size, shape, nucleoli and arrangement of the nuclei of each square patch: float64 [n, 11], NaN-free.

    x_um, y_um: corners [n] of the patches. Neither the class column nor anything of colour is read; the number of nuclei stands
    for itself. """
    size, ratio = np.log(np.sqrt(nuclei["a"] * nuclei["b"])), np.log(nuclei["a"] / nuclei["b"])
    places = np.stack([nuclei["x"], nuclei["y"]], 1)
    features = np.zeros((len(x_um), 11))
    for i, (x, y) in enumerate(zip(x_um, y_um, strict=True)):
        offset = places - (x, y)
        inside = np.flatnonzero(((offset >= 0) & (offset < side_um)).all(1))
        if len(inside) < 2:
            features[i, 0] = len(inside)
            continue
        s, r, turn = size[inside], ratio[inside], 2j * nuclei["theta"][inside]
        nearest = cKDTree(places[inside]).query(places[inside], k=2)[0][:, 1]
        features[i] = (
            len(inside), s.mean(), s.std(), np.quantile(s, 0.9), r.mean(), r.std(), np.mean(nuclei["nucleolus"][inside]),
            abs(np.exp(turn).mean()), abs((r * np.exp(turn)).sum()) / max(r.sum(), 1e-6), nearest.mean(),
            nearest.std() / nearest.mean(),
        )  # fmt: skip
    return features
