"""Linear and kNN probes on frozen features. The penalty is chosen inside train, by patients; report labels choose nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold, StratifiedKFold


@dataclass(frozen=True)
class ProbeConfig:
    """pool: the embedding of the primary number (`cls`, `mean`, `cls+mean`).

    penalties: weights of ½‖W‖² beside the mean log-loss, which compare over data sizes; scikit-learn's C = 1 / (penalty · n).
    folds: of the inner selection. tolerance: of the largest gradient entry. neighbours, temperature: of kNN.
    """

    pool: str
    penalties: list[float]
    folds: int
    tolerance: float
    max_iterations: int
    neighbours: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Standard:
    """Mean and deviation of the training features; a constant feature keeps the deviation 1."""

    mean: np.ndarray
    deviation: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> "Standard":
        features = features.astype(np.float64)
        mean, deviation = features.mean(axis=0), features.std(axis=0)
        constant = deviation <= 1e-10 * np.maximum(np.abs(mean), 1e-10)
        return Standard(mean, np.where(constant, 1.0, deviation))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features.astype(np.float64) - self.mean) / self.deviation


@dataclass(frozen=True)
class LinearProbe:
    """weights: [D, K]; bias: [K]; penalty: the chosen one; inner: mean inner log-loss and its standard error at each penalty
    that was tried, strongest first; note: what the reader should know about the choice."""

    standard: Standard
    weights: np.ndarray
    bias: np.ndarray
    penalty: float
    inner: list[tuple[float, float, float]]
    note: str

    def log_probabilities(self, features: np.ndarray) -> np.ndarray:
        """[n, D] -> float64 [n, K]."""
        return log_softmax(self.standard(features) @ self.weights + self.bias, axis=1)


def fit_linear(features: np.ndarray, labels: np.ndarray, classes: int, groups: np.ndarray, config: ProbeConfig) -> LinearProbe:
    """L2 multinomial logistic regression on standardised training features, its penalty chosen by inner folds.

    features: [n, D] of train only; labels: [n] in range(classes); groups: [n], the patients that no fold may split.
    """
    standard = Standard.of(features)
    x = standard(features)
    outside = inner_folds(labels, groups, config.folds, config.seed)
    inner = try_penalties(x, labels, classes, outside, config.penalties, config)
    penalty, note = choose_penalty(inner, config.penalties)
    everywhere = np.ones((1, len(x)))
    weights, bias = fit_logistic(x, labels, classes, penalty, everywhere, config.tolerance, config.max_iterations)
    return LinearProbe(standard, weights[:, 0], bias[0], penalty, inner, note)


def inner_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """bool [folds, n]: which rows each fold holds out. Stratified by label, groups whole; with fewer groups, one fold a group.

    Raises ValueError with a single group, inside which nothing can be chosen.
    """
    count = len(np.unique(groups))
    if count < 2:
        raise ValueError(f"train has {count} patient: choosing a penalty needs at least two")
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
    x: np.ndarray, labels: np.ndarray, classes: int, outside: np.ndarray, penalties: Sequence[float], config: ProbeConfig
) -> list[tuple[float, float, float]]:
    """(penalty, mean inner log-loss, its standard error) of each penalty that was tried, strongest first.

    From strong to weak with warm starts, until the mean loss is two standard errors above the best: held-out loss falls and then
    rises along the path, and the weak end is the slow one. x: standardised; outside: from `inner_folds`.
    """
    weights: np.ndarray | None = None
    bias: np.ndarray | None = None
    tried: list[tuple[float, float, float]] = []
    for penalty in sorted(penalties, reverse=True):
        weights, bias = fit_logistic(
            x, labels, classes, penalty, ~outside, config.tolerance, config.max_iterations, weights, bias
        )
        losses = np.array([
            -log_softmax(x[held] @ weights[:, fold] + bias[fold], axis=1)[np.arange(held.sum()), labels[held]].mean()
            for fold, held in enumerate(outside)
        ])  # fmt: skip
        tried.append((penalty, float(losses.mean()), float(losses.std(ddof=1) / np.sqrt(len(losses)))))
        _, best, error = min(tried, key=lambda row: row[1])
        if tried[-1][1] > best + 2 * error:
            break
    return tried


def choose_penalty(tried: Sequence[tuple[float, float, float]], penalties: Sequence[float]) -> tuple[float, str]:
    """The strongest penalty whose mean inner log-loss is within one standard error of the best, and a note for the reader."""
    lowest, best, error = min(tried, key=lambda row: row[1])
    chosen = max(penalty for penalty, loss, _ in tried if loss <= best + error)
    note = ""
    if lowest == min(penalties):
        note = f"the best inner loss is at the weakest penalty of the list, {lowest:g}; add weaker ones"
    elif lowest == max(penalties):
        note = f"the best inner loss is at the strongest penalty of the list, {lowest:g}; add stronger ones"
    return chosen, note


def fit_logistic(
    x: np.ndarray,
    labels: np.ndarray,
    classes: int,
    penalty: float,
    inside: np.ndarray,
    tolerance: float,
    max_iterations: int,
    weights: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """F multinomial logistic regressions at once: mean log-loss over the rows of each fold + penalty / 2 ‖W‖² (bias free).

    x: [n, D] float64; inside: [F, n], the rows of each fold's training part. -> weights [D, F, K], bias [F, K].
    All folds share one matrix product a step and one L-BFGS path, in coordinates that whiten x: the log-loss is bounded by a
    quadratic of the covariance (Boehning 1992, doi 10.1007/BF00048682), so there the problem is nearly round.
    Starts at `weights`, `bias`.
    """
    n, width = x.shape
    folds = len(inside)
    share = (inside / inside.sum(axis=1, keepdims=True)).T[:, :, None]  # [n, F, 1]: each row's part of the mean
    target = np.zeros((n, 1, classes))
    target[np.arange(n), 0, labels] = 1

    values, vectors = np.linalg.eigh(x.T @ x / n)
    scale = 1 / np.sqrt(np.maximum(values, 0) / 2 + penalty)
    whitener, back = vectors * scale, (vectors / scale).T  # W = whitener U
    z = x @ whitener
    ridge = penalty * scale**2

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        u, b = flat[: width * folds * classes].reshape(width, folds * classes), flat[width * folds * classes :]
        logits = (z @ u + b).reshape(n, folds, classes)
        logits -= logits.max(axis=2, keepdims=True)
        powers = np.exp(logits)
        total = powers.sum(axis=2, keepdims=True)
        picked = (logits * target).sum(axis=2, keepdims=True)
        loss = float((share * (np.log(total) - picked)).sum()) + 0.5 * float((ridge[:, None] * u**2).sum())
        residual = (share * (powers / total - target)).reshape(n, folds * classes)
        gradient = np.concatenate([(z.T @ residual + ridge[:, None] * u).ravel(), residual.sum(axis=0)])
        return loss, gradient

    start = np.zeros(folds * classes * (width + 1))
    if weights is not None and bias is not None:
        start = np.concatenate([(back @ weights.reshape(width, -1)).ravel(), bias.ravel()])
    found = minimize(
        objective, start, jac=True, method="L-BFGS-B",
        options={"maxiter": max_iterations, "maxfun": 2 * max_iterations, "gtol": tolerance, "ftol": 0.0, "maxcor": 20},
    )  # fmt: skip
    u, b = found.x[: width * folds * classes].reshape(width, folds * classes), found.x[width * folds * classes :]
    return (whitener @ u).reshape(width, folds, classes), b.reshape(folds, classes)


def knn_log_probabilities(
    train: np.ndarray, labels: np.ndarray, classes: int, queries: np.ndarray, neighbours: int, temperature: float
) -> np.ndarray:
    """Votes of the nearest training rows by cosine, weighted by exp(similarity / temperature) (DINO's kNN, arXiv 2104.14294).

    train: [n, D], queries: [m, D], both standardised by the training statistics; -> log of the vote shares, [m, classes].
    """
    k = min(neighbours, len(train))
    reference, asked = _unit(train), _unit(queries)
    votes = np.zeros((len(queries), classes))
    for start in range(0, len(queries), 1024):
        similarity = asked[start : start + 1024] @ reference.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1) / temperature)
        for c in range(classes):
            votes[start : start + 1024, c] = (weights * (labels[nearest] == c)).sum(axis=1)
    with np.errstate(divide="ignore"):
        return np.log(votes / votes.sum(axis=1, keepdims=True))


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
