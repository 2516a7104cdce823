"""The deployed slide model: fold models with their standardisation, averaged; saved without pickles."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from histoscale.data.journal import write_json
from histoscale.data.jsonfiles import read_object
from histoscale.eval.mil.aggregators.abmil import Abmil, AbmilConfig
from histoscale.eval.mil.aggregators.clam import Clam, ClamConfig
from histoscale.eval.mil.aggregators.pooled import Aggregator, Pooled, Tiles, Whole
from histoscale.eval.mil.aggregators.pooling import MaxConfig, MaxPool, MeanConfig, MeanPool
from histoscale.eval.mil.aggregators.transmil import Transmil, TransmilConfig
from histoscale.pretrain.tensorfile import read_header

Aggregators = AbmilConfig | ClamConfig | TransmilConfig | MeanConfig | MaxConfig
AggregatorConfig = Annotated[Aggregators, Field(discriminator="kind")]
_CHUNK = 8192  # tiles that are read at once


def build_aggregator(config: Aggregators, width: int, outputs: int) -> Aggregator:
    """An untrained aggregator from features of `width` to `outputs` logits."""
    match config:
        case AbmilConfig():
            return Abmil(width, outputs, config)
        case ClamConfig():
            return Clam(width, outputs, config)
        case TransmilConfig():
            return Transmil(width, outputs, config)
        case MeanConfig():
            return MeanPool(width, outputs)
        case MaxConfig():
            return MaxPool(width, outputs)


class SlideModel(nn.Module):
    """Standardisation by training tiles, an aggregator, and the unit of its logits: a number that is predicted comes out in the
    target's unit, a log-risk with a mean of zero over the training slides."""

    shift: Tensor
    scale: Tensor
    origin: Tensor
    unit: Tensor

    def __init__(self, width: int, config: Aggregators, outputs: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("origin", torch.zeros(()))
        self.register_buffer("unit", torch.ones(()))
        self.aggregator = build_aggregator(config, width, outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Pooled:
        """x: [B, N, D], mask: bool [B, N] -> logits [B, K], attention [B, N], tile logits [B, N, K] or None."""
        found = self.aggregator((x - self.shift).div_(self.scale), mask)
        tiles = None if found.tiles is None else self.in_unit(found.tiles)
        return found._replace(logits=self.in_unit(found.logits), tiles=tiles)

    def in_unit(self, logits: Tensor) -> Tensor:
        return logits * self.unit + self.origin

    def logits(self, features: np.ndarray) -> Tensor:
        """float64 [K] of one slide, [n, D] in any float type."""
        return self.in_unit(self.aggregator.logits(self._tiles(features)).double())

    def whole(self, features: np.ndarray) -> Whole:
        """One slide, [n, D] in any float type; a chunk of its tiles at a time where the aggregator allows it."""
        found = self.aggregator.whole(self._tiles(features))
        attention = found.attention.double()
        contribution = found.contribution.double() * self.unit
        if self.aggregator.splits:
            contribution = contribution + attention[:, None] * self.origin
        without = None if found.without is None else self.in_unit(found.without)
        return Whole(self.in_unit(found.logits.double()), attention, contribution, without)

    def _tiles(self, features: np.ndarray) -> Tiles:
        return Tiles(features, self.shift, self.scale, _CHUNK)


@dataclass(frozen=True)
class Reading:
    """What the models saw in one slide.

    output: float64 [K], the positive class's probability, the classes' probabilities, the number in its unit, or the log-risk.
    logits: float64 [K], means over the models. attention: float64 [n], sums to 1. contribution: float64 [n, K]: sums to the
    logits over the tiles where the model splits them, else the gradient times its input. models: float64 [M, K], the logits of
    each model that was asked.
    """

    output: np.ndarray
    logits: np.ndarray
    attention: np.ndarray
    contribution: np.ndarray
    models: np.ndarray


def to_output(logits: np.ndarray, kind: str) -> np.ndarray:
    """Logits [..., K] of a task of this kind -> what is reported: probabilities, or the logits themselves."""
    if kind == "binary":
        return torch.from_numpy(logits).sigmoid().numpy()
    return torch.from_numpy(logits).softmax(-1).numpy() if kind == "classes" else logits


class Ensemble:
    """Fold models whose logits are averaged: one deployed object. kind: of the task."""

    def __init__(self, models: Sequence[SlideModel], width: int, outputs: int, config: Aggregators, kind: str) -> None:
        self.models = [model.eval() for model in models]
        self.width, self.outputs, self.config, self.kind = width, outputs, config, kind

    def read(self, features: np.ndarray, members: Sequence[int] | None = None) -> Reading:
        """features: [n, D] of one slide; members: the models to ask, all by default.

        Raises ValueError when the slide has no tile or another width.
        """
        seen = [model.whole(features) for model in self._asked(features, members)]
        models = torch.stack([each.logits for each in seen]).numpy()
        logits = models.mean(0)
        attention = torch.stack([each.attention for each in seen]).mean(0).numpy()
        contribution = torch.stack([each.contribution for each in seen]).mean(0).numpy()
        return Reading(to_output(logits, self.kind), logits, attention, contribution, models)

    def logits(self, features: np.ndarray, members: Sequence[int] | None = None) -> np.ndarray:
        """float64 [K] alone, for curves that ask for many subsets of tiles. Raises ValueError as `read`."""
        return torch.stack([model.logits(features) for model in self._asked(features, members)]).mean(0).numpy()

    def occlusion(self, features: np.ndarray, members: Sequence[int] | None = None) -> np.ndarray | None:
        """Logits less the logits without a tile, for each tile: float64 [n, K]; exact, in closed form. None for models that have
        none (TransMIL). The only tile of a slide answers for the whole logits. Raises ValueError as `read`."""
        changes = []
        for model in self._asked(features, members):
            found = model.whole(features)
            if found.without is None:
                return None
            changes.append(found.logits - found.without if len(features) > 1 else found.logits[None])
        return torch.stack(changes).mean(0).numpy()

    def _asked(self, features: np.ndarray, members: Sequence[int] | None) -> list[SlideModel]:
        if features.ndim != 2 or features.shape[1] != self.width or len(features) == 0:
            raise ValueError(f"features of shape {features.shape}: expected [n > 0, {self.width}]")
        return self.models if members is None else [self.models[i] for i in members]

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """model.safetensors and config.json; `facts` (encoder, task, threshold) stand in config.json under their own names."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{name}": tensor for i, model in enumerate(self.models) for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        values = {"models": len(self.models), "width": self.width, "outputs": self.outputs, "kind": self.kind}
        values |= {"aggregator": asdict(self.config), **facts}
        write_json(folder / "config.json", values)


def load_ensemble(folder: Path) -> tuple[Ensemble, dict[str, Any]]:
    """The ensemble of `Ensemble.save` and the whole of its config.json. Raises ValueError for files that are damaged or disagree,
    OSError."""
    try:
        facts = read_object(folder / "config.json")
        config: Aggregators = TypeAdapter(AggregatorConfig).validate_python(facts["aggregator"])
        read_header(folder / "model.safetensors")
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            number, _, rest = name.partition(".")
            parts.setdefault(number, {})[rest] = tensor
        models = []
        if set(parts) != {str(i) for i in range(min(facts["models"], len(parts) + 1))}:
            raise ValueError(f"{len(parts)} models for {facts['models']}")
        for i in range(len(parts)):
            if list(parts[str(i)]["shift"].shape) != [facts["width"]]:  # before a network of that width is built
                raise ValueError(f"features of {list(parts[str(i)]['shift'].shape)} for a width of {facts['width']}")
            model = SlideModel(facts["width"], config, facts["outputs"])
            model.load_state_dict(parts[str(i)])
            models.append(model)
        return Ensemble(models, facts["width"], facts["outputs"], config, facts["kind"]), facts
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        why = " ".join(f"{error}".split())[:300]
        raise ValueError(f"{folder}: model.safetensors does not hold what config.json describes: {why}") from error
