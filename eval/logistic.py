"""L2 multinomial logistic regression on features: rows in their principal axes, and many fits that share every matrix product."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from histoscale.eval.lbfgs import minimise

CHUNK = 8192  # rows of an intermediate
MEMORY = 10
ROUGH = 1e-4  # where a fit that must be exact goes over from float32 to float64


@dataclass(frozen=True)
class Standard:
    """Mean and deviation of the training features; a constant feature keeps the deviation 1."""

    mean: np.ndarray
    deviation: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> "Standard":
        """features: [n, D] of any real type; sums are float64, in bounded memory."""
        n = len(features)
        mean = sum((part.sum(0, dtype=np.float64) for part in _parts(features)), np.zeros(features.shape[1])) / n
        squares = sum((((part - mean) ** 2).sum(0) for part in _parts(features)), np.zeros(features.shape[1]))
        deviation = np.sqrt(squares / n)
        constant = deviation <= 1e-10 * np.maximum(np.abs(mean), 1e-10)
        return Standard(mean, np.where(constant, 1.0, deviation))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features.astype(np.float64) - self.mean) / self.deviation


@dataclass(frozen=True)
class Rows:
    """Standardised features in their principal axes: x float32 [n, A]; axes float64 [D, A], a column an axis; values float64
    [A], their variances, largest first. A = D, or fewer where the rows span fewer. The penalty does not see a rotation, and
    here the problem's curvature is diagonal."""

    x: Tensor
    axes: Tensor
    values: Tensor
    standard: Standard

    @staticmethod
    def of(features: np.ndarray, standard: Standard, device: str | torch.device) -> "Rows":
        """features: [n, D] of everything that fits learn from or are tried on. One float32 copy of it is held on the device."""
        n, width = features.shape
        if n < width:
            return Rows._few(torch.from_numpy(standard(features)).to(device), standard)
        x = torch.empty(n, width, device=device)
        second = torch.zeros(width, width, dtype=torch.float64, device=device)
        for start in range(0, n, CHUNK):
            part = torch.from_numpy(standard(features[start : start + CHUNK])).to(device, torch.float32)
            second += (part.T @ part).double()
            x[start : start + CHUNK] = part
        values, axes = torch.linalg.eigh(second / n)
        values, axes = values.flip(0).clamp(min=0), axes.flip(1)
        turn = axes.float()
        for part in x.split(CHUNK):
            part.copy_(part @ turn)
        return Rows(x, axes, values, standard)

    @staticmethod
    def _few(x: Tensor, standard: Standard) -> "Rows":
        """x: float64 [n, D] with n < D, whose axes are cheaper to find among the rows."""
        values, vectors = torch.linalg.eigh(x @ x.T / len(x))
        kept = values > 1e-12 * values[-1].clamp(min=1e-300)
        values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
        axes = x.T @ vectors / (len(x) * values).sqrt()
        return Rows((x @ axes).float(), axes, values, standard)


@dataclass(frozen=True)
class Fits:
    """F fits. point: float64 [F, K, A + 1], weights in the axes of the rows and, last, the bias. spread: [F], mean p (1 − p)
    of the training rows over the classes. outside: float64 [n], log-loss of a row by the fit that left it out, 0 where none did.
    left: the worst `Minimum.left`. evaluations: passes over the rows."""

    point: Tensor
    spread: Tensor
    outside: np.ndarray
    left: float
    evaluations: int

    def weights(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """In standardised features: weights [F, D, K] and bias [F, K]; each sums to 0 over the classes."""
        weights = (rows.axes @ self.point[..., :-1].transpose(1, 2)).cpu().numpy()
        bias = self.point[..., -1].cpu().numpy()
        return weights - weights.mean(2, keepdims=True), bias - bias.mean(1, keepdims=True)


def fit(
    rows: Rows,
    labels: np.ndarray,
    classes: int,
    penalty: float,
    inside: np.ndarray,
    tolerance: float,
    max_iterations: int,
    start: Fits | None,
) -> Fits:
    """F regressions at once: mean log-loss over the rows of each + penalty / 2 ‖W‖², one row of W a class, the bias free.

    labels: [n] in range(classes). inside: bool [F, n], the rows that each learns from. tolerance: of the distance to the optimum
    in the Hessian's metric (`Minimum.left`): weights are then within tolerance / √penalty, and the loss within tolerance² / 2.
    Products are float32; below ROUGH the fit goes on in float64. start: warm.
    With two classes both rows of W are penalised, so scikit-learn's binary C, which has one vector w = W₁ − W₀, is
    1 / (n · penalty / 2): half the penalty on the same n (with three classes and more, C = 1 / (n · penalty)).
    """
    device = rows.x.device
    count, width = rows.x.shape
    y = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
    within = torch.from_numpy(np.asarray(inside, bool)).to(device)
    size = within.sum(1).double()
    folds = len(within)
    seen: dict[str, Tensor] = {}

    def objective(dtype: torch.dtype, flat: Tensor) -> tuple[Tensor, Tensor]:
        point = flat.view(folds, classes, width + 1)
        weights, bias = point[..., :-1].reshape(folds * classes, width).to(dtype), point[..., -1].reshape(-1, 1).to(dtype)
        gradient = torch.zeros(folds, classes, width + 1, dtype=torch.float64, device=device)
        spread = torch.zeros(folds, dtype=torch.float64, device=device)
        loss, outside = torch.zeros(folds, dtype=torch.float64, device=device), torch.zeros(count, device=device)
        for begin in range(0, count, CHUNK):
            place = slice(begin, begin + CHUNK)
            x, part = rows.x[place].to(dtype), within[:, place]
            logits = torch.addmm(bias, weights, x.T).view(folds, classes, -1)
            index = y[place].expand(folds, 1, -1)
            picked = logits.gather(1, index)
            top = logits.amax(1, keepdim=True)
            powers = logits.sub_(top).exp_()
            total = powers.sum(1, keepdim=True)
            losses = (total.log() + top - picked)[:, 0]
            loss += (losses * part).sum(1, dtype=torch.float64)
            outside[place] = (losses * ~part).sum(0)
            shares = powers.mul_((part / total[:, 0])[:, None])
            spread += (shares * (1 - shares)).sum((1, 2), dtype=torch.float64)
            residual = shares.scatter_add_(1, index, -part[:, None].to(dtype)).view(folds * classes, -1)
            gradient[..., :-1] += (residual @ x).view(folds, classes, width)
            gradient[..., -1] += residual.sum(1, dtype=torch.float64).view(folds, classes)
        gradient /= size[:, None, None]
        gradient[..., :-1] += penalty * point[..., :-1]
        seen.update(outside=outside, spread=spread / size / classes)
        value = loss / size + 0.5 * penalty * (point[..., :-1] ** 2).sum((1, 2))
        return value, gradient.view(folds, -1)

    if start is None:
        point = torch.zeros(folds, classes * (width + 1), dtype=torch.float64, device=device)
        curvature = torch.full((folds, 1, 1), (1 - 1 / classes) / classes, dtype=torch.float64, device=device)
    else:
        point, curvature = start.point.reshape(folds, -1), start.spread[:, None, None].clamp(min=1e-6)
    # The Hessian's blocks are covariances weighted by p (1 − p): diagonal with its mean in place of the weights. One mean for all
    # classes, else steps would leave the plane where weights sum to 0 over them, and across it the problem is badly scaled.
    scale = torch.cat([1 / (curvature * rows.values + penalty), 1 / curvature], 2).expand(-1, classes, -1).reshape(folds, -1)
    found = minimise(
        lambda flat: objective(torch.float32, flat), point, scale, max(tolerance, ROUGH), max_iterations, MEMORY, 1e-7
    )
    evaluations = found.evaluations
    if tolerance < ROUGH:
        found = minimise(
            lambda flat: objective(torch.float64, flat), found.point, scale, tolerance, max_iterations, MEMORY, 1e-12
        )
        evaluations += found.evaluations
    objective(torch.float32, found.point)  # the last one that was tried may not be the one that was taken
    return Fits(
        found.point.view(folds, classes, width + 1), seen["spread"], seen["outside"].double().cpu().numpy(),
        float(found.left.max()), evaluations + 1,
    )  # fmt: skip


def _parts(features: np.ndarray) -> list[np.ndarray]:
    return [features[start : start + CHUNK] for start in range(0, len(features), CHUNK)]
