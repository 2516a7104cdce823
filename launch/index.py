"""Build a catalog: read the header of every slide in a manifest, find its tissue, and say why a slide is refused.

Example:
    histoscale index manifest=slides.csv out=catalog
    histoscale index manifest=az://container/slides.csv out=catalog storage.options.az.account_name=name workers=8
    histoscale index manifest=more_slides.csv out=catalog2 previous=catalog      (reads only what is new or changed)

The manifest is CSV or Parquet with `slide_id` and `uri`, and as many of `patient_id`, `site`, `cohort`, `organ`, `stain`, `mpp`
(µm per pixel, overrides the header) and label columns as there are. Every other command takes the result as catalog=.
"""

import hashlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoscale.data.catalog import Catalog, open_catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.manifest import read_manifest
from histoscale.data.storage import StorageConfig, Store
from histoscale.data.tissue import TissueConfig

RESULT = ("manifest", "tissue")


@dataclass(frozen=True)
class Config:
    """manifest: the table of slides. previous: a catalog whose unchanged slides are taken over. workers: processes; 0: none."""

    manifest: str
    tissue: TissueConfig
    previous: str | None
    storage: StorageConfig
    workers: int
    out: str
    logging: JournalConfig


def identity(config: Config) -> dict[str, Any]:
    """The manifest's content: a catalog is not changed in place; a grown manifest makes another one."""
    return {"manifest_sha256": hashlib.sha256(Store(config.storage).read(config.manifest)).hexdigest()[:16]}


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Write the catalog into `out`. Raises ManifestError, StorageError, and ValueError when not one slide is accepted."""
    store = Store(config.storage)
    slides = read_manifest(config.manifest, store)
    previous = open_catalog(config.previous, store) if config.previous else None
    catalog = build_catalog(slides, store, config.tissue, Path(config.out), config.workers, previous, journal)
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
