"""The k nearest training rows by cosine, weighted (DINO's kNN, arXiv 2104.14294)."""

import numpy as np
import torch
from torch import Tensor

from histoscale.eval.logistic import Standard

SIMILARITIES = 1 << 25  # of a block of queries, held at once


def knn_log_probabilities(
    train: np.ndarray,
    labels: np.ndarray,
    classes: int,
    queries: np.ndarray,
    neighbours: int,
    temperature: float,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Votes of the nearest training rows by cosine, weighted by exp(similarity / temperature).

    train: [n, D], queries: [m, D], both standardised by the training statistics; -> log of the vote shares, float64 [m, classes].
    Products are float32.
    """
    k = min(neighbours, len(train))
    reference = unit(torch.from_numpy(np.ascontiguousarray(train)).to(device, torch.float32))
    known = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
    found = []
    for asked in torch.from_numpy(np.ascontiguousarray(queries)).split(max(SIMILARITIES // len(train), 1)):
        similarity, nearest = (unit(asked.to(device, torch.float32)) @ reference.T).topk(k, dim=1)
        weights = ((similarity.double() - 1) / temperature).exp()
        votes = torch.zeros(len(asked), classes, dtype=torch.float64, device=device)
        votes.scatter_add_(1, known[nearest], weights)
        found.append((votes / votes.sum(1, keepdim=True)).log().cpu())
    return torch.cat(found).numpy()


def knn_on_features(
    train: np.ndarray,
    labels: np.ndarray,
    classes: int,
    queries: np.ndarray,
    neighbours: int,
    temperature: float,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """`knn_log_probabilities` of features as the encoder made them, standardised here by those of train."""
    standard = Standard.of(train)
    near, asked = (standard(x).astype(np.float32) for x in (train, queries))
    return knn_log_probabilities(near, labels, classes, asked, neighbours, temperature, device)


def unit(x: Tensor) -> Tensor:
    """Rows [n, D] of length 1; a row of zeros stays one."""
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
