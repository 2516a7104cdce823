"""Is it learning or collapsing? Read-outs of features and targets as pure functions, and warnings in words.

At initialisation every ViT has CE = ln K and class tokens of cosine 0.99, so features are centred first and nothing is judged
before twice the warm-up.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from histoscale.data.ranks import Ranks


@dataclass(frozen=True)
class MonitorConfig:
    """labelled: a folder of labelled patches that online probes are taken on, null for none; labelled_every: steps between them.

    every: steps between rows of metrics. window: class tokens over which RankMe and correlations are taken (all ranks).

    Warn when CE/ln K > ce_above, when target entropy/ln K is outside entropy_below .. entropy_above, when the used share of the
    prototypes that could have been used is < used_below, when RankMe/D < rankme_below. stop_on_collapse: a warning ends the run.
    peak_tflops: of one device at precision=, dense; rows then have the MFU.
    """

    labelled: str | None
    labelled_every: int
    every: int
    window: int
    ce_above: float
    entropy_below: float
    entropy_above: float
    used_below: float
    rankme_below: float
    stop_on_collapse: bool
    peak_tflops: float | None


def rankme_cov(z: Tensor) -> Tensor:
    """exp of the entropy of the centred covariance's normalised eigenvalues: z [N, D] -> float64 scalar in [1, D].

    Eigenvalues clamped at 1e-12 (the convention of arXiv 2601.02198's code). It is not `rankme_sv`.
    """
    z = z.double() - z.double().mean(0)
    return _entropy_rank(torch.linalg.eigvalsh(z.T @ z / max(len(z) - 1, 1)).clamp_min(1e-12))


def rankme_sv(z: Tensor) -> Tensor:
    """exp of the entropy of the singular values of uncentred z [N, D], normalised, plus 1e-7 each: float64 scalar.

    arXiv 2210.02885. From the eigenvalues of z'z: a factorisation of all rows would cost N / D times as much.
    """
    z = z.double()
    values = torch.linalg.eigvalsh(z.T @ z).clamp_min(0).sqrt()[-min(z.shape) :]
    p = values / values.sum() + 1e-7
    return (-(p * p.log()).sum()).exp()


def _entropy_rank(weights: Tensor) -> Tensor:
    p = weights / weights.sum()
    return (-(p * p.log()).sum()).exp()


def mean_cosine(z: Tensor) -> Tensor:
    """Mean cosine over the pairs of different rows of z [N, D], uncentred: float64 scalar, at initialisation near 1."""
    z = torch.nn.functional.normalize(z.double(), dim=1)
    return (z.sum(0).square().sum() - z.square().sum()) / max(len(z) * (len(z) - 1), 1)


def odcorr(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean absolute and mean squared off-diagonal Pearson correlation of the features z [N, D], and how many of D were constant
    (left out).

    Our own definition (arXiv 2404.15217 names the measure but gives no formula); the floor of the first for N independent rows
    is sqrt(2 / (pi N)), that of the second 1 / N.
    """
    z = z.double() - z.double().mean(0)
    deviation = z.square().mean(0).sqrt()
    moving = deviation >= 1e-6
    z = z[:, moving] / deviation[moving]
    width = z.shape[1]
    if width < 2:
        return z.new_tensor(math.nan), z.new_tensor(math.nan), (~moving).sum()
    correlation = (z.T @ z / len(z)).fill_diagonal_(0)
    pairs = width * (width - 1)
    return correlation.abs().sum() / pairs, correlation.square().sum() / pairs, (~moving).sum()


class Window:
    """The last class tokens, and the prototypes chosen since the last reading, on the device; no state of the run."""

    def __init__(self, rows: int, ranks: Ranks) -> None:
        self.rows, self.ranks = max(rows // ranks.world, 1), ranks
        self.tokens: deque[Tensor] = deque()
        self.chosen: dict[str, Tensor] = {}

    def add(self, tokens: Tensor, chosen: Mapping[str, Tensor]) -> None:
        """tokens: [n, D] class tokens; chosen: head -> int64 [K], samples whose greatest target is this prototype."""
        self.tokens.append(tokens.detach().float())
        while sum(map(len, self.tokens)) - len(self.tokens[0]) >= self.rows:
            self.tokens.popleft()
        for head, counts in chosen.items():
            self.chosen[head] = self.chosen[head] + counts if head in self.chosen else counts

    def read(self) -> dict[str, float]:
        """Read-outs over all ranks; every rank must call it. The prototype counts start anew."""
        tokens = self.ranks.concat(torch.cat(list(self.tokens)))
        by_cov, by_sv, (absolute, squared, constant) = float(rankme_cov(tokens)), float(rankme_sv(tokens)), odcorr(tokens)
        found = {
            "rankme_cov": by_cov,
            "rankme_cov_of_width": by_cov / tokens.shape[1],
            "rankme_sv": by_sv,
            "rankme_sv_of_width": by_sv / tokens.shape[1],
            "rankme_n": len(tokens),
            "odcorr_abs": float(absolute),
            "odcorr_sq": float(squared),
            "constant_features": int(constant),
            "mean_cosine": float(mean_cosine(tokens)),
        }
        for head, counts in self.chosen.items():
            total = self.ranks.sum(counts)
            used = int((total > 0).sum())
            found[f"{head}/prototypes_used"] = used
            found[f"{head}/prototypes_used_of_reachable"] = used / max(min(len(total), int(total.sum())), 1)
        self.chosen = {}
        return found


def signs_of_collapse(row: Mapping[str, float], step: int, warmup_steps: int, config: MonitorConfig) -> dict[str, str]:
    """What looks like collapse in a row of metrics: {its name: in words}; nothing before twice the warm-up."""
    if step < 2 * warmup_steps:
        return {}
    signs = {}
    for head in [name.removesuffix("/ce_of_lnk") for name in row if name.endswith("/ce_of_lnk")]:
        ce, targets = row[f"{head}/ce_of_lnk"], row[f"{head}/target_entropy_of_lnk"]
        used, share = row[f"{head}/prototypes_used"], row[f"{head}/prototypes_used_of_reachable"]
        if ce > config.ce_above:
            same = f"the cross-entropy is {ce:.3f} ln K, that of a student which says the same of every patch"
            signs[f"{head}/ce"] = f"{head}: {same}"
        if targets > config.entropy_above:
            nothing = f"(entropy {targets:.3f} ln K), so nothing is taught"
            signs[f"{head}/uniform"] = f"{head}: the teacher's targets are nearly uniform {nothing}"
        if targets < config.entropy_below:
            signs[f"{head}/one-hot"] = f"{head}: the teacher's targets are nearly one-hot (entropy {targets:.3f} ln K)"
        if share < config.used_below:
            few = f"{used:.0f} prototypes are in use, {share:.1%} of those that the window could show"
            signs[f"{head}/prototypes"] = f"{head}: {few}"
    rank = row["rankme_cov_of_width"]
    if rank < config.rankme_below:
        signs["rankme"] = f"class tokens fill {row['rankme_cov']:.1f} dimensions, {rank:.1%} of the width (centred RankMe)"
    return signs
