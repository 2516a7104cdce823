"""A labelled set of textures, and a program that probes one untrained network on it: `torchrun … tests/online_ranks.py OUT`."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_tiny

from histoscale.data.keys import key
from histoscale.data.ranks import Ranks, close_ranks, open_ranks
from histoscale.eval.architecture import trained_architecture, untrained
from histoscale.eval.datasets.patches import USAGE_OF_OWN, DatasetConfig, LabelledPatches
from histoscale.eval.online import Online, OnlineConfig
from histoscale.eval.probe import ProbeConfig
from histoscale.eval.resolution import LevelConfig
from histoscale.eval.scores.interval import IntervalConfig

CONFIG = OnlineConfig(
    dataset=DatasetConfig("cohort", None, "train", "report", None, None),
    catalog=None,
    patches=180,
    batch=32,
    initialisations=2,
    grid=LevelConfig(0.05, 1.0),
    probe=ProbeConfig("cls+mean", [1.0, 0.1, 0.01], 0.1, 3, 1e-6, 2e-3, 500, 10, 0.07, 0),
    interval=IntervalConfig(200, 0.95, 0),
)
ARCHITECTURE = trained_architecture(train_tiny.CONFIG.model, [0.5] * 3, [0.5] * 3, [0.5], 32, None)


def labelled() -> LabelledPatches:
    """360 patches of 24 patients in 3 classes: stripes of one direction or the other, or a board of squares, in noise."""
    rng = np.random.default_rng(key(0, "textures"))
    n = 360
    labels = np.arange(n) % 3
    patients = np.array([f"p{i // 15:02}" for i in range(n)])
    roles = np.where(np.arange(n) // 15 % 2 == 0, "train", "report")
    y, x = np.mgrid[:32, :32]
    forms = np.stack([np.sin(x * 0.9), np.sin(y * 0.9), np.sin(x * 0.9) * np.sin(y * 0.9)])
    pixels = 128 + 12 * forms[labels][:, None] + rng.normal(0, 60, (n, 3, 32, 32))
    pixels = pixels.clip(0, 255).astype(np.uint8)
    sites = np.full(n, "a")
    return LabelledPatches(
        "textures", ("a", "b", "c"), labels, roles, patients, sites, "patient", 0.5, 32, "h", lambda rows: pixels[rows],
        patients, np.full(n, ""), USAGE_OF_OWN,
    )  # fmt: skip


def watcher(out: Path, ranks: Ranks, every: int, steps: int, **changed: Any) -> Online:
    config = replace(CONFIG, **changed)
    return Online(labelled(), ARCHITECTURE, "fp32", config, every, steps, train_tiny.journal_in(out, ranks), ranks)


def run(out: Path, ranks: Ranks) -> dict[str, float]:
    """The row of one probe, and how many patches this rank has read for it."""
    looking, rows = watcher(out, ranks, 4, 8), list[int]()
    read = looking.patches.read

    def counted(part: np.ndarray) -> np.ndarray:
        rows.extend(part.tolist())
        return read(part)

    looking.patches = replace(looking.patches, read=counted)
    return {**looking(untrained(ARCHITECTURE, 7), 0), "read": len(rows)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = open_ranks("cpu", 120.0)
    found = run(Path(sys.argv[1]), here)
    (Path(sys.argv[1]) / f"rank-{here.rank}.json").write_text(json.dumps(found))
    here.barrier()
    close_ranks()
