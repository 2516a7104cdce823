"""Whose neighbours are nearer: those of the same biology elsewhere, or those of the same site?

PathoROB's robustness index counts them (arXiv 2507.17845, bifold-pathomics/PathoROB); CRoMa's margin measures how much nearer the
ones are than the others, also in the worst tenth (arXiv 2607.25497, clemsgrs/croma).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import torch
from torch import Tensor

from histoscale.eval.knn import unit
from histoscale.eval.robustness.findings import RobustnessError
from histoscale.eval.scores.classification import balanced_accuracy
from histoscale.eval.scores.interval import Interval, IntervalConfig, Resampling, patient_bootstrap

SIMILARITIES = 1 << 24  # of a block of queries, float64, held at once
CANDIDATES = (1, 3, 5, 7, 9)  # then 11, 21, 31, … as in PathoROB


@dataclass(frozen=True)
class NeighboursConfig:
    """k: neighbours that are counted; null: of 1, 3, 5, 7, 9, 11, 21, … up to most_k the one whose vote names the biology best.
    pairs: count inside every pair of classes at every pair of sites, and pool the counts (as published on TCGA); false: in the
    whole set. margin: neighbours of each kind whose distance is meaned; tail: the share of rows that is called the worst."""

    k: int | None
    most_k: int
    pairs: bool
    margin: int
    tail: float


@dataclass(frozen=True)
class Where:
    """What is known of n rows. biology, sites: int64 [n]. units: [n], slides, of which a row's own is no neighbour.
    owners: [n], patients or what the interval resamples."""

    biology: np.ndarray
    sites: np.ndarray
    units: np.ndarray
    owners: np.ndarray

    def only(self, rows: np.ndarray) -> "Where":
        return Where(self.biology[rows], self.sites[rows], self.units[rows], self.owners[rows])


@dataclass(frozen=True)
class Counted:
    """same: int64 [n, 4]: of each query's first k neighbours, those of the same biology at the same site (SS) and elsewhere (SO),
    of another biology at the same site (OS) and elsewhere (OO). by_k: the index at other k. subsets: pairs that were pooled."""

    k: int
    same: np.ndarray
    owners: np.ndarray
    by_k: dict[int, float]
    subsets: int

    @property
    def index(self) -> float:
        return float(index_of(self.same.sum(0)[[1, 2]]))


def index_of(totals: np.ndarray) -> np.ndarray:
    """SO / (SO + OS) of totals [..., 2]; NaN where there is neither."""
    with np.errstate(invalid="ignore"):
        return totals[..., 0] / totals.sum(-1)


def nearest(features: np.ndarray, units: np.ndarray, k: int, device: str | torch.device = "cpu") -> np.ndarray:
    """The rows nearest to each by cosine, of other units: int64 [n, k'], nearest first.

    k' is k, or as many as the query with the fewest has. Products are float64: equal to a search by Euclidean distance on rows
    of length 1. Raises RobustnessError when one unit holds every row.
    """
    _, codes = np.unique(units, return_inverse=True)
    fewest = len(units) - int(np.bincount(codes).max())
    if fewest < 1:
        raise RobustnessError(f"all {len(units)} rows are of one slide: neighbours of other slides are needed; fill in slide_id")
    kept = min(k, fewest)
    found = [similarity.topk(kept, dim=1).indices.cpu() for _, similarity in _similarities(features, codes, device)]
    return torch.cat(found).numpy()


def _similarities(features: np.ndarray, units: np.ndarray, device: str | torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(queries int64 [b], cosine float64 [b, n] with -inf for rows of the same unit) of all rows by blocks."""
    x = unit(torch.from_numpy(np.ascontiguousarray(features)).to(device, torch.float64))
    own = torch.from_numpy(units).to(device)
    for rows in torch.arange(len(x), device=device).split(max(SIMILARITIES // len(x), 1)):
        yield rows, (x[rows] @ x.T).masked_fill_(own[rows, None] == own, -torch.inf)


def count(features: np.ndarray, where: Where, config: NeighboursConfig, device: str | torch.device = "cpu") -> Counted:
    """features: float [n, D]. Raises RobustnessError for one class or one site, and for a k that no slide can fill."""
    parts = _pairs(where) if config.pairs else [np.arange(len(where.biology))]
    if len(np.unique(where.biology)) < 2 or len(np.unique(where.sites)) < 2 or not parts:
        raise RobustnessError(
            f"the robustness index compares biology with sites, and there are {len(np.unique(where.biology))} classes at "
            f"{len(np.unique(where.sites))} sites (without the external ones), no two of which share two classes: fill in site"
        )
    wanted = config.most_k if config.k is None else config.k
    near = [nearest(features[rows], where.units[rows], wanted, device) for rows in parts]
    held = min(one.shape[1] for one in near)
    if config.k is not None and held < config.k:
        raise RobustnessError(
            f"neighbours.k is {config.k}, and a query has {held} neighbours of other slides: set it lower, or null"
        )
    near = [one[:, :held] for one in near]
    wheres = [where.only(rows) for rows in parts]
    tried = [k for k in (*CANDIDATES, *range(11, held + 1, 10)) if k <= held]
    k = config.k or _best_k(near, wheres, tried)
    kinds = [_kinds(one, each) for one, each in zip(near, wheres, strict=True)]
    by_k = {each: float(index_of(sum(one[:, :each].sum((0, 1)) for one in kinds)[[1, 2]])) for each in tried}
    same, owners = (np.concatenate(x) for x in ([one[:, :k].sum(1) for one in kinds], [each.owners for each in wheres]))
    return Counted(k, same, owners, by_k, len(parts))


def _kinds(near: np.ndarray, where: Where) -> np.ndarray:
    """bool [n, k, 4]: whether each neighbour is SS, SO, OS, OO."""
    biology = where.biology[near] == where.biology[:, None]
    sites = where.sites[near] == where.sites[:, None]
    return np.stack([biology & sites, biology & ~sites, ~biology & sites, ~biology & ~sites], 2)


def _pairs(where: Where) -> list[np.ndarray]:
    """Rows of every pair of classes at every pair of sites that all four cells have."""
    found = []
    for classes, sites in product(combinations(np.unique(where.biology), 2), combinations(np.unique(where.sites), 2)):
        rows = np.flatnonzero(np.isin(where.biology, classes) & np.isin(where.sites, sites))
        if len(np.unique(np.stack([where.biology[rows], where.sites[rows]]), axis=1).T) == 4:
            found.append(rows)
    return found


def _best_k(near: Sequence[np.ndarray], wheres: Sequence[Where], tried: Sequence[int]) -> int:
    """The k whose majority (the lowest class among equals) has the highest balanced accuracy, meaned over the parts."""
    accuracy = []
    for k in tried:
        parts = []
        for one, where in zip(near, wheres, strict=True):
            votes = np.zeros((len(one), int(where.biology.max()) + 1), np.int64)
            np.add.at(votes, (np.arange(len(one))[:, None], where.biology[one[:, :k]]), 1)
            parts.append(balanced_accuracy(where.biology, votes.argmax(1), votes.shape[1]))
        accuracy.append(np.mean(parts))
    return tried[int(np.argmax(accuracy))]


def chance(where: Where, pairs: bool) -> float:
    """The index of features that say nothing: of all rows of other units that share either class or site, the share of class."""
    totals = np.zeros(2)
    for rows in _pairs(where) if pairs else [np.arange(len(where.biology))]:
        units = np.unique(where.units[rows], return_inverse=True)[1]
        cells = np.stack([units, where.biology[rows], where.sites[rows]], 1)
        kinds, n = np.unique(cells, axis=0, return_counts=True)
        own, same, here = (column[:, None] == column for column in kinds.T)
        weight = n[:, None] * n * ~own
        totals += (weight * (same & ~here)).sum(), (weight * (~same & here)).sum()
    return float(index_of(totals))


def index_interval(counted: Sequence[Counted], interval: IntervalConfig) -> Interval:
    """The index, meaned over equal encoders, with the interval of queries drawn by owner; whose neighbours stay who they are."""
    draws = Resampling.of(counted[0].owners, interval)
    sums = draws.sums(np.concatenate([one.same[:, [1, 2]] for one in counted], 1).astype(np.float64))
    return draws.interval(sums, lambda totals: index_of(totals.reshape(*totals.shape[:-1], -1, 2)).mean(-1))


# Margins.


def margins(features: np.ndarray, where: Where, m: int, device: str | torch.device = "cpu") -> np.ndarray:
    """float64 [n] in -1 to 1: (d_OS - d_SO) / (d_OS + d_SO), d the mean cosine distance to the m nearest of a kind.

    Above 0 the same biology elsewhere is nearer. NaN for a row that has not m of both kinds, or both at distance 0.
    """
    _, codes = np.unique(where.units, return_inverse=True)
    biology, sites = (torch.from_numpy(np.asarray(x)).to(device) for x in (where.biology, where.sites))
    found = []
    for rows, similarity in _similarities(features, codes, device):
        same, here = biology[rows, None] == biology, sites[rows, None] == sites
        away = 1 - similarity  # infinite inside the unit
        elsewhere, impostor = (
            away.masked_fill(~kind, torch.inf).topk(min(m, len(biology)), dim=1, largest=False).values.mean(1)
            for kind in (same & ~here, ~same & here)
        )
        found.append(((impostor - elsewhere) / (impostor + elsewhere)).cpu())
    values = torch.cat(found).numpy()
    return np.where(np.isfinite(values), values, np.nan)


def tail_mean(values: np.ndarray, tail: float) -> float:
    """Mean of the values at or below their quantile `tail`."""
    return float(values[values <= np.percentile(values, 100 * tail)].mean())


def margin_intervals(values: np.ndarray, owners: np.ndarray, tail: float, interval: IntervalConfig) -> tuple[Interval, Interval]:
    """(median, mean of the tail) of the margins [n] that are defined, each with its interval over owners."""
    good = np.isfinite(values)
    values, owners = values[good], owners[good]
    if not len(values):
        none = Interval(float("nan"), None, None, 0, 0, "no row has enough neighbours of both kinds")
        return none, none
    return (
        patient_bootstrap(lambda rows: float(np.median(values[rows])), owners.tolist(), interval),
        patient_bootstrap(lambda rows: tail_mean(values[rows], tail), owners.tolist(), interval),
    )
