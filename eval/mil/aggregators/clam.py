"""CLAM with one attention branch (Lu et al. 2021, doi 10.1038/s41551-020-00682-w): gated attention whose strongest and weakest
tiles are themselves classified while it trains."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histoscale.eval.mil.aggregators.abmil import Abmil, AbmilConfig
from histoscale.eval.mil.aggregators.pooled import Pooled


@dataclass(frozen=True)
class ClamConfig:
    """hidden, attention, dropout, attention_dropout: as in abmil, with one layer before the attention. tiles: so many of the most
    and of the least attended tiles of a slide are labelled. subtyping: the most attended are also labelled as tiles of no other
    class, for classes that exclude each other. instance_weight: share of the tiles' loss."""

    kind: Literal["clam"]
    hidden: int
    attention: int
    dropout: float
    attention_dropout: float
    tiles: int
    subtyping: bool
    instance_weight: float

    def __post_init__(self) -> None:
        if self.tiles < 1 or not 0 <= self.instance_weight < 1:
            given = f"mil.aggregator.tiles is {self.tiles}, instance_weight {self.instance_weight}"
            raise ValueError(f"{given}: expected at least one tile and a share in [0, 1)")


class Clam(Abmil):
    """Reads as gated attention does. `mix` adds the loss of the tiles; one classifier of tiles a class, two for a binary task."""

    def __init__(self, width: int, outputs: int, config: ClamConfig) -> None:
        bag = AbmilConfig(
            kind="abmil",
            embed=[config.hidden],
            activation="relu",
            attention=config.attention,
            gated=True,
            classify=[],
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            init="torch",
        )
        super().__init__(width, outputs, bag)
        self.config = config
        self.instances = nn.ModuleList(nn.Linear(config.hidden, 2) for _ in range(max(outputs, 2)))

    def mix(self, bag_loss: Tensor, found: Pooled, mask: Tensor, labels: Tensor) -> Tensor:
        """The mean over bags of (1 - w) bag_loss [] + w instance loss. labels: class indices [B]."""
        assert found.hidden is not None
        losses = [
            instance_loss(found.hidden[i][mask[i]], found.attention[i][mask[i]], int(labels[i]), self.instances, self.config)
            for i in range(len(labels))
        ]
        return (1 - self.config.instance_weight) * bag_loss + self.config.instance_weight * torch.stack(losses).mean()


def instance_loss(hidden: Tensor, attention: Tensor, label: int, classifiers: nn.ModuleList, config: ClamConfig) -> Tensor:
    """Cross-entropy of the slide's own class telling its k most attended tiles (1) from its k least attended ones (0), k as
    configured; with subtyping the mean over all classes, for whose other classifiers the most attended tiles are 0.

    hidden: [n, H]; attention: [n]. A slide of fewer than 2k tiles has k = n / 2, so that no tile is labelled both ways; its only
    tile counts as attended. (The published code takes a tile both ways there, and fails below k tiles.)
    """
    order = attention.argsort(descending=True, stable=True)
    k = min(config.tiles, len(order) // 2)
    top, bottom = order[: max(k, 1)], order[len(order) - k :]
    targets = torch.cat([torch.ones(len(top)), torch.zeros(k)]).long().to(hidden.device)
    own = F.cross_entropy(classifiers[label](hidden[torch.cat([top, bottom])]), targets)
    if not config.subtyping:
        return own
    others = [
        F.cross_entropy(classifier(hidden[top]), torch.zeros_like(top)) for i, classifier in enumerate(classifiers) if i != label
    ]
    return torch.stack([own, *others]).mean()
