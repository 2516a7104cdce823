"""Build a catalog: read the header of every slide in a manifest, find its tissue, and say why a slide is refused.

Example:
    histoscale index manifest=slides.csv out=catalog
    histoscale index manifest=az://container/slides.csv out=catalog storage.options.az.account_name=name workers=8 threads=4
    histoscale index manifest=more_slides.csv out=catalog        (brings it up to date: reads only what is new or changed)
    torchrun --nproc-per-node 4 -m histoscale.launch.index manifest=slides.csv out=catalog

The manifest is CSV or Parquet with `slide_id` and `uri`, and as many of `patient_id`, `site`, `cohort`, `organ`, `stain`, `mpp`
(µm per pixel, overrides the header) and label columns as there are. Every other command takes the result as catalog=. Look at
`out`/catalog.html before you train. Stopped, the same command goes on; an old catalog stays until the new one takes its place.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoscale.data.catalog import Catalog, CatalogError, open_catalog
from histoscale.data.contact import write_sheet
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.manifest import read_manifest
from histoscale.data.ranks import close_ranks, open_ranks
from histoscale.data.storage import StorageConfig, Store
from histoscale.data.tissue import TissueConfig

RESULT = ("tissue",)
REPEATS = True  # the manifest and the slides may have changed since
_PATIENCE_S = 7 * 86400.0  # ranks wait for the slowest share; one that dies ends all of them


@dataclass(frozen=True)
class Config:
    """manifest: the table of slides. previous: another catalog whose unchanged slides are taken over; null: `out` itself.
    workers: processes a rank; 0: none. threads: slides examined at a time in each. sheet_slides: shown in catalog.html."""

    manifest: str
    tissue: TissueConfig
    previous: str | None
    storage: StorageConfig
    workers: int
    threads: int
    sheet_slides: int
    out: str
    logging: JournalConfig


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Write the catalog into `out`. Raises ManifestError, StorageError, and ValueError when not one slide is accepted."""
    ranks = open_ranks("cpu", _PATIENCE_S)
    try:
        store = Store(config.storage)
        slides = read_manifest(config.manifest, store)
        out = Path(config.out)
        previous = open_catalog(config.previous, store) if config.previous else _own(config.out, store, journal)
        many = ranks if ranks.world > 1 else None
        catalog = build_catalog(slides, store, config.tissue, out, config.workers, previous, journal, config.threads, many)
        if ranks.main:
            write_sheet(out / "catalog.html", catalog, config.sheet_slides)
    finally:
        close_ranks()
    journal.say(table(catalog))
    if not len(catalog):
        raise ValueError(f"none of the {len(slides)} slides was accepted: see above or {config.out}/rejected.parquet")
    return {
        "index": {
            "accepted": len(catalog),
            "rejected": len(catalog.rejected),
            "rejected_by_reason": dict(by_reason(catalog)),
            "catalog_hash": catalog.hash,
        }
    }


def _own(out: str, store: Store, journal: Journal) -> Catalog | None:
    """The catalog that is in `out` already."""
    if not (Path(out) / "catalog.json").exists():
        return None
    try:
        return open_catalog(out, store)
    except CatalogError as error:
        journal.say(f"every slide is read again: {error}")
        return None


def by_reason(catalog: Catalog) -> Counter[str]:
    """Rejected slides by the kind of their reason."""
    return Counter(found.reason.split(":")[0] for found in catalog.rejected)


def table(catalog: Catalog) -> str:
    """What was accepted, and what was not and why."""
    lines = [f"accepted {len(catalog)} slides, rejected {len(catalog.rejected)} (catalog {catalog.hash})"]
    for kind, count in by_reason(catalog).most_common():
        lines.append(f"  {count} x {kind}")
        found = [rejected for rejected in catalog.rejected if rejected.reason.split(":")[0] == kind]
        lines += [f"      {rejected.slide_id}: {rejected.reason}" for rejected in found[:5]]
        lines += [f"      and {count - 5} more in rejected.parquet"] if count > 5 else []
    return "\n".join(lines)


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("index", sys.argv[1:]))
