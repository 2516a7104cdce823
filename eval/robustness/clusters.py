"""Do clusters follow biology or the site? PathoROB's clustering score (arXiv 2507.17845, bifold-pathomics/PathoROB).

For every pair of classes at every pair of sites: k-means on rows of length 1, K by the silhouette, then trials; the score is the
mean of ARI(biology) - ARI(site), from -1 (only the site) to 1 (only biology).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from histoscale.data.keys import key, permutation
from histoscale.eval.robustness.findings import RobustnessError
from histoscale.eval.robustness.neighbours import Where
from histoscale.eval.scores.interval import Interval, IntervalConfig, Resampling

_COLUMNS = 1 << 22  # numbers of drawn tables held at once


@dataclass(frozen=True)
class ClustersConfig:
    """least, most: clusters that are tried. choosing_starts: of k-means while K is chosen; starts: in each of the trials.
    cell: at most so many rows of a class at a site are drawn by key; null: all."""

    least: int
    most: int
    choosing_starts: int
    trials: int
    starts: int
    seed: int
    cell: int | None


@dataclass(frozen=True)
class Clustered:
    """biology, site, score: float64 [combinations, trials], the two indices and their difference. clusters: K of each."""

    names: tuple[tuple[int, int, int, int], ...]
    clusters: tuple[int, ...]
    biology: np.ndarray
    site: np.ndarray
    interval: Interval

    @property
    def spread(self) -> float:
        """SD over trials, meaned over combinations."""
        return float((self.biology - self.site).std(axis=1, ddof=1).mean()) if self.biology.shape[1] > 1 else 0.0


def cluster(
    features: np.ndarray,
    where: Where,
    config: ClustersConfig,
    interval: IntervalConfig,
    advance: Callable[[], None] = lambda: None,
) -> Clustered:
    """features: float [n, D]. advance: called after every combination.

    The interval draws owners and keeps the clusters as they are. Raises RobustnessError without two classes at two sites.
    """
    parts = combinations_of(where)
    if not parts:
        raise RobustnessError("the clustering score needs two classes that two sites both have: give dataset a site column")
    tables, chosen = [], []
    draws = Resampling.of(where.owners, interval)
    for names, cells in parts:
        rows = np.concatenate([_drawn(cell, config, names) for cell in cells])
        x = features[rows] / np.maximum(np.sqrt((features[rows] ** 2).sum(axis=1, keepdims=True)), 1e-12)
        clusters = choose_clusters(x, config)
        chosen.append(clusters)
        kind = 2 * (where.biology[rows] == names[1]) + (where.sites[rows] == names[3])
        # rows of each owner by cluster, class and site, for every trial: what a draw of owners sums up
        counts = np.zeros((int(draws.codes.max()) + 1, config.trials, clusters, 4), np.uint32)
        for trial in range(config.trials):
            labels = _fit(x, clusters, config.seed + trial, config.starts)
            places = (draws.codes[rows] * clusters + labels) * 4 + kind
            counts[:, trial] = np.bincount(places, minlength=len(counts) * clusters * 4).reshape(-1, clusters, 4)
        tables.append(counts)
        advance()

    def scores(weights: np.ndarray) -> np.ndarray:
        """Weights of owners [B, P] -> [B]."""
        return np.mean([np.subtract(*_indices(weights, table)).mean(1) for table in tables], 0)

    everyone = np.ones((1, int(draws.codes.max()) + 1))
    each = [_indices(everyone, table) for table in tables]
    found = draws.interval(np.eye(everyone.shape[1]), scores)
    return Clustered(
        tuple(names for names, _ in parts), tuple(chosen), np.stack([pair[0][0] for pair in each]),
        np.stack([pair[1][0] for pair in each]), found,
    )  # fmt: skip


def combinations_of(where: Where) -> list[tuple[tuple[int, int, int, int], list[np.ndarray]]]:
    """((class, class, site, site), rows of the four cells) wherever all four have rows."""
    found = []
    for first, second in product(combinations(np.unique(where.biology), 2), combinations(np.unique(where.sites), 2)):
        cells = [np.flatnonzero((where.biology == b) & (where.sites == s)) for b in first for s in second]
        if all(map(len, cells)):
            found.append(((int(first[0]), int(first[1]), int(second[0]), int(second[1])), cells))
    return found


def choose_clusters(x: np.ndarray, config: ClustersConfig) -> int:
    """K with the highest silhouette by cosine, the lowest among equals; K below the number of rows."""
    from sklearn.metrics import silhouette_score

    tried = range(config.least, min(config.most, len(x) - 1) + 1)
    if not tried:
        raise RobustnessError(
            f"{len(x)} rows cannot be put into {config.least} clusters: give more patches, or lower clusters.least"
        )
    quality = []
    for clusters in tried:
        labels = _fit(x, clusters, config.seed, config.choosing_starts)
        quality.append(silhouette_score(x, labels, metric="cosine") if len(np.unique(labels)) > 1 else -1.0)
    return tried[int(np.argmax(quality))]


def adjusted_rand(table: np.ndarray) -> np.ndarray:
    """Adjusted Rand index (Hubert and Arabie 1985, doi 10.1007/BF01908075) of contingency tables [..., K, C] -> [...]."""

    def pairs(n: np.ndarray) -> np.ndarray:
        return n * (n - 1) / 2

    both, rows, columns = pairs(table).sum((-2, -1)), pairs(table.sum(-1)).sum(-1), pairs(table.sum(-2)).sum(-1)
    expected = rows * columns / np.maximum(pairs(table.sum((-2, -1))), 1e-12)
    most = (rows + columns) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(most == expected, 1.0, (both - expected) / (most - expected))


def _indices(weights: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [B, P], tables [P, T, K, 4] -> ARI of biology and of site, each [B, T]."""
    flat = table.reshape(len(table), -1).astype(np.float64)
    biology, site = [], []
    for part in np.array_split(weights, -(-weights.shape[0] * flat.shape[1] // _COLUMNS)):
        drawn = (part @ flat).reshape(len(part), *table.shape[1:3], 2, 2)  # …, class, site
        biology.append(adjusted_rand(drawn.sum(4)))
        site.append(adjusted_rand(drawn.sum(3)))
    return np.concatenate(biology), np.concatenate(site)


def _fit(x: np.ndarray, clusters: int, seed: int, starts: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    return KMeans(clusters, init="random", n_init=starts, random_state=seed).fit(x).labels_


def _drawn(cell: np.ndarray, config: ClustersConfig, names: tuple[int, int, int, int]) -> np.ndarray:
    if config.cell is None or len(cell) <= config.cell:
        return cell
    return np.sort(cell[permutation(key(config.seed, "robustness/clusters", *names, int(cell[0])), len(cell))[: config.cell]])
