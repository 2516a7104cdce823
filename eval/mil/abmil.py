"""Gated attention pooling (arXiv 1802.04712), small and with an explicit mask."""

import torch
from torch import Tensor, nn


class GatedAttention(nn.Module):
    """h_k = dropout(ReLU(W x_k)); a = softmax_k(w . [tanh(V h_k) * sigmoid(U h_k)]); logit = sum_k a_k (c . h_k + b).

    The classifier is linear and the weights sum to one, so the bag's logit is the attention-weighted mean of tile logits:
    `attention * tile_logits` splits the score over the tiles exactly.
    """

    def __init__(self, width: int, hidden: int, attention: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.content = nn.Linear(hidden, attention)
        self.gate = nn.Linear(hidden, attention)
        self.weigh = nn.Linear(attention, 1)
        self.classify = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, N, D], mask: bool [B, N], true for real tiles -> attention [B, N], 0 on padding, and tile logits [B, N]."""
        h = self.embed(x)
        raw = self.weigh(torch.tanh(self.content(h)) * torch.sigmoid(self.gate(h)))[..., 0]
        attention = raw.masked_fill(~mask, float("-inf")).softmax(1)
        return attention, self.classify(h)[..., 0]
