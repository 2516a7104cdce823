"""The deployed slide model: fold models with their standardisation, averaged; saved without pickles."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from histoscale.eval.mil.abmil import GatedAttention
from histoscale.eval.mil.pooling import MaxPool, MeanPool


@dataclass(frozen=True)
class AggregatorConfig:
    """kind: abmil, mean or max. hidden, attention, dropout: sizes of `abmil`; the poolings have none and ignore them."""

    kind: str
    hidden: int
    attention: int
    dropout: float


def build_aggregator(config: AggregatorConfig, width: int) -> nn.Module:
    """An untrained aggregator for features of `width`. Raises ValueError on an unknown kind."""
    match config.kind:
        case "abmil":
            return GatedAttention(width, config.hidden, config.attention, config.dropout)
        case "mean":
            return MeanPool(width)
        case "max":
            return MaxPool(width)
    raise ValueError(f"mil.aggregator.kind is {config.kind!r}: expected abmil, mean or max")


class SlideModel(nn.Module):
    """Standardisation by training tiles, then an aggregator."""

    shift: Tensor
    scale: Tensor

    def __init__(self, width: int, config: AggregatorConfig) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.aggregator = build_aggregator(config, width)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, N, D], mask: bool [B, N] -> logits [B], attention [B, N], tile logits [B, N]; logit = sum attention * tile."""
        attention, tiles = self.aggregator((x - self.shift) / self.scale, mask)
        return (attention * tiles).sum(1), attention, tiles


@dataclass(frozen=True)
class Reading:
    """What the model saw in one slide. score: in (0, 1). attention, contribution: float64 [n] a tile, means over the models;
    attention sums to 1, contribution to the score's logit."""

    score: float
    attention: np.ndarray
    contribution: np.ndarray


class Ensemble:
    """Fold models whose logits are averaged: one deployed object, one score a slide."""

    def __init__(self, models: list[SlideModel], width: int, config: AggregatorConfig) -> None:
        self.models = [model.eval() for model in models]
        self.width, self.config = width, config

    @torch.no_grad()
    def read(self, features: np.ndarray, members: list[int] | None = None) -> Reading:
        """features: float32 [n, D] of one slide; members: the models to ask, all by default.

        Raises ValueError when the slide has no tile or another width.
        """
        if features.ndim != 2 or features.shape[1] != self.width or len(features) == 0:
            raise ValueError(f"features of shape {features.shape}: expected [n > 0, {self.width}]")
        x = torch.from_numpy(np.ascontiguousarray(features, np.float32))[None]
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        seen = [self.models[i](x, mask) for i in (range(len(self.models)) if members is None else members)]
        attention = torch.stack([a[0].double() for _, a, _ in seen])
        tiles = torch.stack([t[0].double() for _, _, t in seen])
        contribution = (attention * tiles).mean(0)
        return Reading(float(contribution.sum().sigmoid()), attention.mean(0).numpy(), contribution.numpy())

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """model.safetensors and config.json; `facts` (encoder, task, threshold) stand in config.json under their own names."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{name}": tensor for i, model in enumerate(self.models) for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        values = {"models": len(self.models), "width": self.width, "aggregator": asdict(self.config), **facts}
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def load_ensemble(folder: Path) -> tuple[Ensemble, dict[str, Any]]:
    """The ensemble of `Ensemble.save` and the whole of its config.json. Raises ValueError when the two disagree."""
    facts = json.loads((folder / "config.json").read_text())
    config = AggregatorConfig(**facts["aggregator"])
    tensors = load_file(folder / "model.safetensors")
    models = []
    for i in range(facts["models"]):
        model = SlideModel(facts["width"], config)
        part = {name.removeprefix(f"{i}."): tensor for name, tensor in tensors.items() if name.startswith(f"{i}.")}
        try:
            model.load_state_dict(part)
        except RuntimeError as error:
            raise ValueError(f"{folder}: model.safetensors does not hold what config.json describes: {error}") from error
        models.append(model)
    return Ensemble(models, facts["width"], config), facts
