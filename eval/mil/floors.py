"""What a slide score must beat: scores that never look at a tile's content."""

from collections.abc import Mapping, Sequence

import numpy as np

from histoscale.eval.mil.bags import Bag
from histoscale.eval.scores.auroc import auroc


def plain_floors(bags: Sequence[Bag], train: Sequence[int], tissue_um2: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Scores [n] of every bag by name. Everything is learned on the rows `train`.

    site prior: the share of positives among the training slides of the bag's site, of all training slides for an unknown site.
    tissue area (by slide id; where absent, the area of the tiles) and number of tiles: the number itself, its sign chosen on
    the training slides.
    """
    labels = np.array([bag.label for bag in bags])
    return {
        "site_prior": site_prior(bags, train),
        "tissue_area": _oriented(np.array([tissue_um2.get(bag.slide_id, bag.tiles_um2) for bag in bags]), labels, train),
        "number_of_tiles": _oriented(np.array([float(bag.tiles) for bag in bags]), labels, train),
    }


def site_prior(bags: Sequence[Bag], train: Sequence[int]) -> np.ndarray:
    """Share of positives [n] by site, from the rows `train`."""
    overall = np.mean([bags[i].label for i in train])
    sites = {bag.site for bag in bags}
    shares = {site: [bags[i].label for i in train if bags[i].site == site] for site in sites}
    return np.array([np.mean(shares[bag.site]) if shares[bag.site] else overall for bag in bags])


def _oriented(values: np.ndarray, labels: np.ndarray, train: Sequence[int]) -> np.ndarray:
    rows = list(train)
    return values if auroc(labels[rows], values[rows]) >= 0.5 else -values
