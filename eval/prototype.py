"""Nearest class mean: features centred by what is learnt from, scaled to length 1 (SimpleShot, arXiv 1911.04623)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 8192  # of an intermediate


@dataclass(frozen=True)
class Directions:
    """P classifiers of unit(x − centre): centre [P, D], weights [P, K, D], bias [P, K], float64."""

    centre: Tensor
    weights: Tensor
    bias: Tensor

    def log_probabilities(self, features: np.ndarray) -> np.ndarray:
        """[n, D] -> float64 [P, n, K]."""
        runs, classes, width = self.weights.shape
        columns = torch.cat([self.weights.reshape(-1, width), self.centre]).T
        across = (self.weights * self.centre[:, None]).sum(2)  # [P, K]
        length = (self.centre**2).sum(1)
        found = []
        for start in range(0, len(features), ROWS):
            x = torch.from_numpy(np.ascontiguousarray(features[start : start + ROWS])).to(columns)
            products = x @ columns
            along = products[:, : runs * classes].view(-1, runs, classes) - across
            squares = (x**2).sum(1, keepdim=True) - 2 * products[:, runs * classes :] + length
            logits = along / squares.clamp(min=1e-24).sqrt()[..., None] + self.bias
            found.append(logits.log_softmax(2).transpose(0, 1).cpu())
        return torch.cat(found, 1).numpy()


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [P, m, D] -> its mean [P, D], and unit(x − mean); a row at the mean stays 0."""
    centre = x.mean(1)
    moved = x - centre[:, None]
    return centre, moved / moved.norm(dim=2, keepdim=True).clamp(min=1e-12)


def prototypes(x: Tensor, labels: Tensor, classes: int, temperature: float) -> Directions:
    """x: float64 [P, m, D], labels: [P, m]. The nearest class mean m_k has the largest (z·m_k − ‖m_k‖²/2) / temperature.

    The temperature makes log-probabilities that AUROC can use and nobody calibrated. A class without a row is never called.
    """
    centre, z = centred(x)
    member = torch.nn.functional.one_hot(labels, classes).to(z)  # [P, m, K]
    count = member.sum(1)[..., None]
    means = member.transpose(1, 2) @ z / count.clamp(min=1)
    bias = torch.where(count[..., 0] > 0, -(means**2).sum(2) / 2, -1e6)
    return Directions(centre, means / temperature, bias / temperature)


def prototype_log_probabilities(
    train: np.ndarray, labels: np.ndarray, classes: int, queries: np.ndarray, temperature: float, device: str | torch.device
) -> np.ndarray:
    """By the class means of all of train, in bounded memory. train: [n, D], labels: [n] -> float64 [m, classes]."""
    n, width = train.shape
    y = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
    centre = torch.from_numpy(sum(_sums(train), np.zeros(width)) / n).to(device)
    means = torch.zeros(classes, width, dtype=torch.float64, device=device)
    for start in range(0, n, ROWS):
        moved = torch.from_numpy(train[start : start + ROWS].astype(np.float64)).to(device) - centre
        means.index_add_(0, y[start : start + ROWS], moved / moved.norm(dim=1, keepdim=True).clamp(min=1e-12))
    count = torch.bincount(y, minlength=classes)[:, None]
    means /= count.clamp(min=1)
    bias = torch.where(count[:, 0] > 0, -(means**2).sum(1) / 2, -1e6)
    return Directions(centre[None], means[None] / temperature, bias[None] / temperature).log_probabilities(queries)[0]


def _sums(features: np.ndarray) -> list[np.ndarray]:
    return [features[start : start + ROWS].sum(0, dtype=np.float64) for start in range(0, len(features), ROWS)]
