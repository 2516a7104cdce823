"""The linear probe on frozen features. The penalty is chosen inside train, by patients; report labels choose nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import log_softmax

from histoscale.data.names import codes
from histoscale.eval.logistic import Fits, Rows, Standard, fit

Tried = tuple[float, float, float]  # penalty, mean held-out log-loss, its standard error


@dataclass(frozen=True)
class ProbeConfig:
    """pool: the embedding of the primary number (`cls`, `mean`, `cls+mean`).

    penalties: weights of ½‖W‖² beside the mean log-loss, which compare over data sizes; scikit-learn's C = 1 / (penalty · n).
    penalty_alone: where train is one patient, inside which nothing can be chosen. folds: of the inner selection, and of the outer
    ones where a set has no test part. tolerance: of the final fit, choosing_tolerance: of those that only choose
    (`logistic.fit`). neighbours, temperature: of kNN.
    """

    pool: str
    penalties: list[float]
    penalty_alone: float
    folds: int
    tolerance: float
    choosing_tolerance: float
    max_iterations: int
    neighbours: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class LinearProbe:
    """weights: [D, K]; bias: [K]; penalty: the chosen one; inner: mean held-out log-loss and its standard error at each penalty
    that was tried, strongest first; note: what the reader should know about the choice. evaluations: passes over the rows."""

    standard: Standard
    weights: np.ndarray
    bias: np.ndarray
    penalty: float
    inner: list[Tried]
    note: str
    evaluations: int

    def log_probabilities(self, features: np.ndarray) -> np.ndarray:
        """[n, D] -> float64 [n, K]."""
        parts = [self.standard(features[start : start + 8192]) @ self.weights for start in range(0, len(features), 8192)]
        return log_softmax(np.concatenate(parts) + self.bias, axis=1)


def fit_linear(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    groups: np.ndarray,
    config: ProbeConfig,
    select: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> LinearProbe:
    """L2 multinomial logistic regression on standardised training features, its penalty chosen by inner folds.

    features: [n, D]; labels: [n] in range(classes); groups: [n], what no fold may split. select: bool [n], an official part for
    choosing: then it alone judges penalties, its standard error being one over groups, and neither the statistics nor
    any fit learn from it. Products are float32 on the device; the final fit ends in float64.
    """
    if select is None and len(np.unique(groups)) == 1:
        return _fit_alone(features, labels, classes, config, device)
    learnt = np.ones(len(features), bool) if select is None else ~select
    standard = Standard.of(features[learnt] if select is not None else features)
    if select is None:
        outside = inner_folds(labels, groups, config.folds, config.seed)
        rows = Rows.of(features, standard, device)
        inner, evaluations = try_penalties(rows, labels, classes, outside, None, config.penalties, config)
        final, y = rows, labels
    else:
        rows = Rows.of(features, standard, device)
        inner, evaluations = try_penalties(rows, labels, classes, select[None], groups[select], config.penalties, config)
        part = torch.from_numpy(np.flatnonzero(learnt)).to(rows.x.device)
        final, y = Rows(rows.x[part], rows.axes, rows.values, standard), labels[learnt]
    penalty, note = choose_penalty(inner, config.penalties)
    found, short = fit_final(final, y, classes, penalty, config)
    weights, bias = found.weights(final)
    note = "; ".join(filter(None, (note, short)))
    return LinearProbe(standard, weights[0], bias[0], penalty, inner, note, evaluations + found.evaluations)


def _fit_alone(
    features: np.ndarray, labels: np.ndarray, classes: int, config: ProbeConfig, device: str | torch.device
) -> LinearProbe:
    rows = Rows.of(features, Standard.of(features), device)
    found, short = fit_final(rows, labels, classes, config.penalty_alone, config)
    weights, bias = found.weights(rows)
    alone = f"trained on one patient, inside which no penalty can be chosen: it is probe.penalty_alone, {config.penalty_alone:g}"
    note = "; ".join(filter(None, (alone, short)))
    return LinearProbe(rows.standard, weights[0], bias[0], config.penalty_alone, [], note, found.evaluations)


def fit_final(rows: Rows, labels: np.ndarray, classes: int, penalty: float, config: ProbeConfig) -> tuple[Fits, str]:
    """One fit on all rows at the final tolerance, and a note when it fell short of it."""
    everywhere = np.ones((1, len(rows.x)), bool)
    found = fit(rows, labels, classes, penalty, everywhere, config.tolerance, config.max_iterations, None)
    short = f"the fit stopped {found.left:.1g} from its optimum, after {found.evaluations} passes; tolerance {config.tolerance:g}"
    return found, short if found.left > 10 * config.tolerance else ""


def inner_folds(
    labels: np.ndarray, groups: np.ndarray, folds: int, seed: int, option: str = "probe.folds"
) -> np.ndarray:
    """bool [folds, n]: which rows each fold holds out. Stratified by label, groups whole; with fewer groups, one fold a group.
    option: the key that asked for `folds`, as an error names it.

    Raises ValueError with a single group, inside which nothing can be chosen, and where every class has fewer rows than folds.
    """
    # Here, because 50 MiB of it would stand in every worker of a command that merely knows this file's configuration.
    from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold, StratifiedKFold

    groups = codes(groups)
    count = len(np.unique(groups))
    if count < 2:
        raise ValueError(f"train has {count} patient: choosing a penalty needs at least two")
    most = int(np.unique(labels, return_counts=True)[1].max())
    if folds <= count and most < folds:
        advice = f"set {option}={most}" if most > 1 else "every class needs at least 2 images, one a fold: add some"
        raise ValueError(f"no class has over {most} images to share among folds, and {option}={folds}: {advice}")
    rows = np.zeros(len(labels))
    if count < folds:
        splits = LeaveOneGroupOut().split(rows, labels, groups)
    elif count == len(groups):
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(rows, labels)
    else:
        splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(rows, labels, groups)
    outside = np.zeros((min(count, folds), len(labels)), dtype=bool)
    for fold, (_, held) in enumerate(splits):
        outside[fold, held] = True
    return outside


def try_penalties(
    rows: Rows,
    labels: np.ndarray,
    classes: int,
    outside: np.ndarray,
    units: np.ndarray | None,
    penalties: Sequence[float],
    config: ProbeConfig,
) -> tuple[list[Tried], int]:
    """Each penalty that was tried, strongest first, and the passes over the rows that it took.

    From strong to weak with warm starts, until the mean loss is two standard errors above the best: held-out loss falls and then
    rises along the path, and the weak end is the slow one. outside: bool [F, n], the held-out rows of each fold, every row in one
    at most. units: the groups of the held-out rows of a single fold, over whose mean losses the standard error is then taken.
    """
    fits: Fits | None = None
    tried: list[Tried] = []
    evaluations = 0
    for penalty in sorted(penalties, reverse=True):
        fits = fit(rows, labels, classes, penalty, ~outside, config.choosing_tolerance, config.max_iterations, fits)
        evaluations += fits.evaluations
        if units is None:
            losses = np.array([fits.outside[held].mean() for held in outside])
            mean, error = losses.mean(), losses.std(ddof=1) / np.sqrt(len(losses))
        else:
            mean, error = _clustered(fits.outside[outside[0]], units)
        tried.append((penalty, float(mean), float(error)))
        _, best, error = min(tried, key=lambda row: row[1])
        if tried[-1][1] > best + 2 * error:
            break
    return tried, evaluations


def choose_penalty(tried: Sequence[Tried], penalties: Sequence[float]) -> tuple[float, str]:
    """The strongest penalty whose mean inner log-loss is within one standard error of the best, and a note for the reader."""
    lowest, best, error = min(tried, key=lambda row: row[1])
    chosen = max(penalty for penalty, loss, _ in tried if loss <= best + error)
    note = ""
    if lowest == min(penalties):
        note = f"the best inner loss is at the weakest penalty of the list, {lowest:g}; add weaker ones"
    elif lowest == max(penalties):
        note = f"the best inner loss is at the strongest penalty of the list, {lowest:g}; add stronger ones"
    return chosen, note


def _clustered(losses: np.ndarray, units: np.ndarray) -> tuple[float, float]:
    """Mean of all losses and its standard error over units of unequal size (a ratio estimator, linearised)."""
    _, codes = np.unique(units, return_inverse=True)
    mean, count = losses.mean(), codes.max() + 1
    sums = np.bincount(codes, weights=losses - mean)
    return float(mean), float(np.sqrt(count / max(count - 1, 1) * (sums**2).sum()) / len(losses))
