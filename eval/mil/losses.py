"""What a slide model is trained to make small: pure functions of logits and targets."""

import torch
from torch import Tensor
from torch.nn import functional as F


def binary_loss(logits: Tensor, labels: Tensor, positive_weight: Tensor) -> Tensor:
    """Cross-entropy of logits [B, 1] and labels [B] in {0, 1}, positives weighing `positive_weight`: [B]."""
    return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), pos_weight=positive_weight, reduction="none")


def class_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of logits [B, K] and class indices [B], times the weight [K] of each one's class: [B]."""
    return weights[labels.long()] * F.cross_entropy(logits, labels.long(), reduction="none")


def cox_loss(risks: Tensor, times: Tensor, events: Tensor) -> Tensor:
    """Mean over the events of minus Cox's log partial likelihood, the slides of a batch as each other's risk sets.

    risks: log-risks [B]; times: [B]; events: bool [B]. Ties by Breslow (1974, doi 10.2307/2529620): every event at a time has the
    same risk set, all who were followed at least as long. Zero without an event (a scalar that still has a gradient).
    """
    at_risk = times[None] >= times[:, None]  # [i, j]: j is at risk when i's time comes
    total = risks[None].expand(len(risks), -1).masked_fill(~at_risk, float("-inf")).logsumexp(1)
    missed = torch.where(events, total - risks, torch.zeros_like(risks))
    return missed.sum() / events.sum().clamp(min=1)
