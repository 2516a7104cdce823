"""Slides to embedding stores: one HDF5 file a slide, `features [n, D]` and `coords [n, 2]` in level-0 pixels.

    histoscale embed encoder=runs/release catalog=runs/catalog out=runs/embeddings
    histoscale embed encoder=colour catalog=runs/catalog grid.mpp=0.5 grid.patch_px=256 out=runs/colour
    histoscale embed encoder=runs/release catalog=runs/catalog normalise=macenko out=runs/macenko
    histoscale embed encoder=runs/release catalog=runs/catalog store.dtype=fp16 jitter.copies=2 out=runs/jittered

The files open in TRIDENT's and CLAM's loading code. Finished slides are kept when it runs again. Slides that cannot be read are
rows in failures.jsonl. Under torchrun the ranks share the slides. jitter.copies writes the same tiles with jittered stains into
jitter-1, jitter-2, … beside the plain stores.
"""

import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from histoscale.data.catalog import open_catalog
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.normalise.slide import NormaliseConfig
from histoscale.data.ranks import open_ranks
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.embed import (
    EmbedError,
    JitterConfig,
    Recipe,
    check_served,
    embed_slides,
    grid_words,
    prepare,
    settle,
    shares,
)
from histoscale.eval.encoder import open_encoder
from histoscale.eval.grid import GridConfig, PipeConfig, ReadingConfig
from histoscale.eval.hardware import EncodingConfig, torch_threads
from histoscale.eval.inputs import read_catalog, read_encoder
from histoscale.eval.stores import StoreConfig

_PATIENCE_S = 7 * 86400.0  # ranks wait for each other as long as slides take
RESULT = ("encoder", "precision", "catalog", "pool", "grid", "normalise", "jitter", "store")
REPEATS = True  # slides may have come, or have been replaced since
INPUTS = ("encoder", "catalog")
MADE = ("failures.jsonl",)
HOLDS = ("*.h5",)


@dataclass(frozen=True)
class Config:
    """encoder: a release, a checkpoint, timm:<name>, random:<folder or timm name> or colour. precision: fp32, bf16, fp16 or auto.

    pool: cls, mean or cls+mean. normalise: brings slides to one stain before the encoder sees them. jitter: copies of the stores
    with other stains. store: how features are written. hardware, stream: how fast.
    """

    encoder: str
    precision: str
    catalog: str
    pool: str
    grid: GridConfig
    normalise: NormaliseConfig
    jitter: JitterConfig
    store: StoreConfig
    hardware: EncodingConfig
    stream: ReadingConfig
    storage: StorageConfig
    logging: JournalConfig
    out: str


def identity(config: Config) -> dict[str, Any]:
    """The bytes behind the names: weights and slides."""
    store = Store(config.storage)
    encoder = open_encoder(config.encoder, store, "cpu", config.precision)
    read_encoder(config.encoder, store)
    return {"encoder_hash": encoder.hash, "catalog": read_catalog(config.catalog, store)}


def continues(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Another state of the catalog goes on in the same `out`: each store says what slide it was made of."""
    return old["result"] == new["result"] and {**old["facts"], "catalog": ""} == {**new["facts"], "catalog": ""}


def run(config: Config, journal: Journal) -> dict[str, Any]:
    with torch_threads(config.hardware.threads):
        return _run(config, journal)


def _run(config: Config, journal: Journal) -> dict[str, Any]:
    store, ranks = Store(config.storage), open_ranks(config.hardware.device, _PATIENCE_S)
    catalog = open_catalog(config.catalog, store)
    if not catalog.slides:
        raise EmbedError(f"the catalog {config.catalog} holds no slide")
    encoder = open_encoder(config.encoder, store, ranks.device, config.precision)
    check_served(catalog, encoder, config.grid)
    journal.say(grid_words(encoder, config.grid))
    recipe = Recipe(config.pool, config.grid, config.normalise, config.jitter, config.store)
    out = Path(config.out)

    def first() -> list[list[int]]:
        prepare(out, config.jitter)
        return shares(catalog, out, ranks.world)

    start = time.perf_counter()
    share = ranks.first(first)[ranks.rank]
    pipe = PipeConfig(config.hardware.batch, **asdict(config.stream))
    found = settle(ranks.objects(embed_slides(encoder, catalog, share, recipe, pipe, store, out, journal)))
    seconds = time.perf_counter() - start
    journal.say(f"{found.slides} of {len(catalog.slides)} slides have a store in {out}, {found.kept} of them from before")
    if found.patches:
        parts = (
            f"{found.model_s:.1f} s in the encoder, {found.waiting_s:.1f} s waiting for pixels, {found.writing_s:.1f} s writing"
        )
        journal.say(f"{found.patches} patches in {seconds:.1f} s: the slowest rank spent {parts}")
    for slide_id, reason in found.failed.items():
        journal.say(f"  without: {slide_id} ({reason})")
    if catalog.rejected:
        journal.say(f"  {len(catalog.rejected)} more slides of the manifest are not in the catalog: see its rejected slides")
    for slide_id, reason in found.unnormalised.items():
        journal.say(f"  as it was scanned, not normalised: {slide_id} ({reason})")
    typed = shlex.join([f"embeddings={out}", f"catalog={config.catalog}"])
    journal.say(f"next: histoscale mil {typed} manifest=MANIFEST.csv task=slide task.label=COLUMN split=patients out=MIL")
    facts = {name: value for name, value in asdict(found).items() if name != "refused"}
    seen = encoder.effective_mpp(found.mpp, found.patch_px)
    known = {"effective_mpp": seen, "encoder_hash": encoder.hash, "precision": encoder.precision}
    more = {"rejected": len(catalog.rejected), "seconds": seconds, **known}
    return {"embed": {**facts, **more}}


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("embed", sys.argv[1:]))
