"""Projection heads: tokens -> logits over prototypes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadConfig:
    prototypes: int  # K
    hidden: int
    bottleneck: int
    scale: str  # weight norm of the prototypes: "trainable" or "frozen" at 1, or "none" (a plain linear layer)
    batch_norm: bool  # batch statistics in the MLP (DINO's use_bn_in_head): depends on the batch, so for one process only


class Head(nn.Module):
    """Three linear layers, L2 norm, prototypes (arXiv 2104.14294): [n, D] -> logits [n, K], in [-1, 1] where the scale is 1.

    Weight norm is the explicit pair `last_scale` [K, 1], `last_direction` [K, b]. Raises ValueError for an unknown scale.
    """

    def __init__(self, width: int, config: HeadConfig):
        super().__init__()
        if config.scale not in ("trainable", "frozen", "none"):
            raise ValueError(f"head scale={config.scale!r}: expected trainable, frozen or none")
        widths = [width, config.hidden, config.hidden, config.bottleneck]
        layers: list[nn.Module] = []
        for i in range(3):
            layers.append(nn.Linear(widths[i], widths[i + 1]))
            if i < 2:
                if config.batch_norm:
                    layers.append(nn.BatchNorm1d(config.hidden, track_running_stats=False))
                layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers)
        self.last_direction = nn.Parameter(torch.empty(config.prototypes, config.bottleneck))
        self.normalised = config.scale != "none"
        self.last_scale = nn.Parameter(torch.ones(config.prototypes, 1)) if config.scale == "trainable" else None
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.last_direction, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12  # as facebookresearch/dinov2: 1e12 overflows float16
        x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=eps)
        weight = F.normalize(self.last_direction, dim=-1, eps=1e-12) if self.normalised else self.last_direction
        if self.last_scale is not None:
            weight = weight * self.last_scale
        return F.linear(x, weight)
