"""Attention pooling, gated or plain (Ilse et al. 2018, arXiv 1802.04712), with an explicit mask."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from histoscale.eval.mil.aggregators.pooled import Weighing


@dataclass(frozen=True)
class AbmilConfig:
    """embed: widths of the layers before the attention, each followed by `activation` (relu, none) and dropout; may be empty.
    attention: width of the attention; gated: tanh * sigmoid instead of tanh alone. classify: widths of the classifier's hidden
    layers (ReLU), empty for a linear one, whose logit then splits over the tiles. dropout: of the embedding; attention_dropout:
    of the attention's hidden layer. init: `torch`, or `xavier` (weights Xavier normal, biases zero)."""

    kind: Literal["abmil"]
    embed: list[int]
    activation: str
    attention: int
    gated: bool
    classify: list[int]
    dropout: float
    attention_dropout: float
    init: str

    def __post_init__(self) -> None:
        if self.activation not in ("relu", "none"):
            raise ValueError(f"mil.aggregator.activation is {self.activation!r}: expected relu or none")
        if self.init not in ("torch", "xavier"):
            raise ValueError(f"mil.aggregator.init is {self.init!r}: expected torch or xavier")


class GatedAttention(nn.Module):
    """[..., H] -> raw scores [...]: w . [tanh(V h) * sigmoid(U h)], or w . tanh(V h) without a gate."""

    def __init__(self, hidden: int, attention: int, gated: bool, dropout: float) -> None:
        super().__init__()
        self.content = nn.Linear(hidden, attention)
        self.gate = nn.Linear(hidden, attention) if gated else None
        self.dropout = nn.Dropout(dropout)
        self.weigh = nn.Linear(attention, 1)

    def forward(self, h: Tensor) -> Tensor:
        inner = self.dropout(torch.tanh(self.content(h)))
        if self.gate is not None:
            inner = inner * self.dropout(torch.sigmoid(self.gate(h)))
        return self.weigh(inner)[..., 0]


class Abmil(Weighing):
    """h_k = embed(x_k); a = softmax_k(score(h_k)); logits = classify(sum_k a_k h_k)."""

    def __init__(self, width: int, outputs: int, config: AbmilConfig) -> None:
        super().__init__()
        self.splits = not config.classify
        embed: list[nn.Module] = []
        for before, after in zip([width, *config.embed], config.embed, strict=False):
            embed += [nn.Linear(before, after), *([nn.ReLU()] if config.activation == "relu" else []), nn.Dropout(config.dropout)]
        self.embed = nn.Sequential(*embed)
        hidden = config.embed[-1] if config.embed else width
        self.attend = GatedAttention(hidden, config.attention, config.gated, config.attention_dropout)
        layers: list[nn.Module] = []
        for before, after in zip([hidden, *config.classify], config.classify, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.classify = nn.Sequential(*layers, nn.Linear(config.classify[-1] if config.classify else hidden, outputs))
        if config.init == "xavier":
            xavier(self)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x)
        return self.attend(h), h

    def head(self, z: Tensor) -> Tensor:
        return self.classify(z)


def xavier(model: nn.Module) -> None:
    """Xavier normal weights and zero biases in every linear layer, as CLAM and OPAL start."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
