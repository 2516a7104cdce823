"""The supervised ceiling: a small convolutional network trained on the labels that the probes also get."""

from __future__ import annotations  # torch is imported where the network is trained: its configuration needs none

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from histoscale.data.keys import key

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = np.ndarray


@dataclass(frozen=True)
class CeilingConfig:
    """steps of `batch` crops; widths: channels of the six layers; jitter: SD of the log factor on each patch's and channel's
    density."""

    steps: int
    batch: int
    widths: list[int]
    lr: float
    weight_decay: float
    jitter: float
    seed: int


def ceiling_predictions(pixels: Array, train: Array, labels: Array, classes: int, config: CeilingConfig) -> Array:
    """Predicted class of every patch, int64 [n], by a network trained on the rows `train`.

    pixels: uint8 [n, 3, S, S]. labels: int64 [n], read at `train` only. Patches are seen as optical density with their own mean
    and SD taken out, so that a new stain is no excuse. Raises ValueError when `train` is empty.
    """
    import torch
    import torch.nn.functional as F

    if len(train) == 0:
        raise ValueError("the supervised ceiling needs at least one training patch, got none")
    generator = torch.Generator().manual_seed(key(config.seed, "ceiling") >> 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "ceiling/weights") >> 1)
        network = _network(config.widths, classes)
    optimiser = torch.optim.AdamW(network.parameters(), config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=config.steps, pct_start=0.2)
    images, targets, rows = torch.from_numpy(pixels), torch.from_numpy(labels).long(), torch.from_numpy(train)
    for _ in range(config.steps):
        chosen = rows[torch.randint(len(rows), (config.batch,), generator=generator)]
        density = _density(images[chosen])
        density = density * torch.exp(config.jitter * torch.randn(len(density), 3, 1, 1, generator=generator))
        turns, flip = (int(torch.randint(n, (1,), generator=generator)) for n in (4, 2))
        density = torch.rot90(density.flip(3) if flip else density, turns, (2, 3))
        loss = F.cross_entropy(network(_standardise(density)), targets[chosen], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        parts = [network(_standardise(_density(part))).argmax(1) for part in images.split(256)]
    return torch.cat(parts).numpy()


def _network(widths: list[int], classes: int) -> nn.Sequential:
    from torch import nn

    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip([3, *widths[:-1]], widths, strict=True)):
        stride = 2 if i % 2 == 0 else 1
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def _density(pixels: Tensor) -> Tensor:
    return -((pixels.float() + 1) / 256).log()


def _standardise(density: Tensor) -> Tensor:
    import torch

    deviation, mean = torch.std_mean(density, (1, 2, 3), keepdim=True)
    return ((density - mean) / (deviation + 0.05)).contiguous(memory_format=torch.channels_last)
