"""A labelled set that is drawn when it is read, and a program that embeds it: `torchrun … features_ranks.py OUT SLEEP_S`.

OUT/rank-N.json: which rows this process has read.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.ranks import Ranks, close_ranks, open_ranks
from histoscale.eval.architecture import trained_architecture, untrained
from histoscale.eval.datasets.patches import USAGE_OF_OWN, LabelledPatches
from histoscale.eval.encoder import Encoder, encoder_of
from histoscale.eval.features import Vectors, embed_patches
from histoscale.eval.resolution import ResolutionConfig
from histoscale.pretrain.backbone import ModelConfig

ROWS, BATCH = 150, 4  # chunks of 16 rows, the last one of 6
MODEL = ModelConfig("vit_tiny_patch16_224", 32, 8, 24, 2, 2, None, 2, 0.1, 0.0)
ARCHITECTURE = trained_architecture(MODEL, [0.7, 0.5, 0.6], [0.2, 0.25, 0.3], [0.5], 32, None)
ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)
RESIZE = ResolutionConfig("resize", None)


def image(row: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (3, height, width), dtype=np.uint8)


def size_of(row: int) -> tuple[int, int]:
    """Of a set whose images differ: some are smaller than an input, some hold several."""
    return 20 + 13 * (row % 7), 24 + 11 * (row % 5)


def labelled(rows: int = ROWS, side: int | None = 40, draw: Callable[[int], np.ndarray] | None = None) -> LabelledPatches:
    """Images of `side` px, or of sizes that differ."""
    words, labels = np.array([f"p{i // 3}" for i in range(rows)]), np.arange(rows) % 2
    drawn = draw or (lambda row: image(row, *((side, side) if side is not None else size_of(row))))

    def read(part: np.ndarray) -> Sequence[np.ndarray] | np.ndarray:
        images = [drawn(int(row)) for row in part]
        return images if side is None else np.stack(images)

    return LabelledPatches(
        name="drawn", classes=("a", "b"), labels=labels, roles=np.full(rows, "train"), patients=words, sites=words,
        groups="patient", mpp=0.5, size_px=side, hash=f"h{rows}-{side}", read=read, blocks=words, slide_ids=np.full(rows, ""),
        usage=USAGE_OF_OWN,
    )  # fmt: skip


def counted(patches: LabelledPatches, rows: list[int], sleep_s: float = 0.0) -> LabelledPatches:
    """The same set, noting what is read."""

    def read(part: np.ndarray) -> Sequence[np.ndarray] | np.ndarray:
        time.sleep(sleep_s)
        rows.extend(part.tolist())
        return patches.read(part)

    return replace(patches, read=read)


def vit(seed: int = 0, precision: str = "fp32") -> Encoder:
    return encoder_of(untrained(ARCHITECTURE, seed), ARCHITECTURE, f"vit {seed}", torch.device("cpu"), precision)


def quiet_journal(out: Path, main: bool = True, progress: str = "off") -> Journal:
    return Journal(out, JournalConfig(progress, 10, "off", "test", False), main)


def embedded(
    out: Path, patches: LabelledPatches, encoders: Sequence[Encoder], resolution: ResolutionConfig = RESIZE, batch: int = BATCH,
    threads: int = 2, ranks: Ranks = ALONE, journal: Journal | None = None,
) -> list[Vectors]:  # fmt: skip
    journal = journal or quiet_journal(out, ranks.main)
    return embed_patches(encoders, patches, resolution, batch, threads, out / "features", journal, ranks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, here, seen = Path(sys.argv[1]), open_ranks("cpu", 120.0), list[int]()
    embedded(out, counted(labelled(), seen, float(sys.argv[2])), [vit(0), vit(1)], ranks=here)
    (out / f"rank-{here.rank}.json").write_text(json.dumps(sorted(seen)))
    here.barrier()
    close_ranks()
