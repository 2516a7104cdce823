"""Slides to embedding stores: one HDF5 file a slide, `features [n, D]` and `coords [n, 2]` in level-0 pixels.

    histoscale embed encoder=runs/release catalog=runs/catalog out=runs/embeddings
    histoscale embed encoder=colour catalog=runs/catalog grid.mpp=0.5 grid.patch_px=256 out=runs/colour
    histoscale embed encoder=runs/release catalog=runs/catalog normalise=macenko out=runs/macenko

Finished slides are kept when it runs again. Slides that cannot be read are rows in failures.jsonl. Under torchrun the ranks
share the slides.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoscale.data.catalog import open_catalog
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.normalise.slide import NormaliseConfig
from histoscale.data.ranks import open_ranks
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.embed import EmbedError, GridConfig, PipeConfig, embed_slides
from histoscale.eval.encoder import open_encoder

RESULT = ("encoder", "precision", "catalog", "pool", "grid", "normalise")


@dataclass(frozen=True)
class Config:
    """encoder: a release, a checkpoint, timm:<name>, random:<folder or timm name> or colour. precision: fp32, bf16, fp16.

    pool: cls, mean or cls+mean. normalise: brings slides to one stain before the encoder sees them. device: auto, cpu, cuda.
    """

    encoder: str
    precision: str
    catalog: str
    pool: str
    grid: GridConfig
    normalise: NormaliseConfig
    pipe: PipeConfig
    device: str
    storage: StorageConfig
    logging: JournalConfig
    out: str


def identity(config: Config) -> dict[str, Any]:
    """The bytes behind the names: weights and slides."""
    store = Store(config.storage)
    encoder = open_encoder(config.encoder, store, "cpu", config.precision)
    return {"encoder_hash": encoder.hash, "catalog_hash": open_catalog(config.catalog, store).hash}


def run(config: Config, journal: Journal) -> dict[str, Any]:
    store, ranks = Store(config.storage), open_ranks(config.device)
    catalog = open_catalog(config.catalog, store)
    if not catalog.slides:
        raise EmbedError(f"the catalog {config.catalog} holds no slide")
    encoder = open_encoder(config.encoder, store, ranks.device, config.precision)
    share = range(ranks.rank, len(catalog.slides), ranks.world)
    out = Path(config.out)
    found = embed_slides(encoder, catalog, share, config.pool, config.grid, config.normalise, config.pipe, store, out, journal)
    parts = ranks.objects(found)
    failed = {slide_id: reason for part in parts for slide_id, reason in part["failed"].items()}
    unnormalised = {slide_id: reason for part in parts for slide_id, reason in part["unnormalised"].items()}
    total = {name: sum(part[name] for part in parts) for name in ("slides", "kept", "patches")}
    journal.say(f"{total['slides']} of {len(catalog.slides)} slides have a store in {out}, {total['kept']} of them from before")
    for slide_id, reason in failed.items():
        journal.say(f"  without: {slide_id} ({reason})")
    for slide_id, reason in unnormalised.items():
        journal.say(f"  as it was scanned, not normalised: {slide_id} ({reason})")
    facts = {name: found[name] for name in ("mpp", "patch_px", "effective_mpp")}
    return {"embed": {**total, **facts, "failed": failed, "unnormalised": unnormalised, "encoder_hash": encoder.hash}}


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("embed", sys.argv[1:]))
