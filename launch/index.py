"""Build a catalog: read the header of every slide in a manifest, find its tissue, and say why a slide is refused.

Examples:
    histoscale index manifest=slides.csv out=runs/slides
    histoscale index manifest=more_slides.csv out=runs/slides    # brings it up to date: reads only what is new or changed
    histoscale index manifest=az://container/slides.csv out=runs/far storage.options.az.account_name=name workers=8 threads=4
    torchrun --nproc-per-node 4 -m histoscale.launch.index manifest=slides.csv out=runs/shared

The manifest is CSV or Parquet with `slide_id` and `uri`, and as many of `patient_id`, `site`, `cohort`, `organ`, `stain`, `mpp`
(µm per pixel, overrides the header) and label columns as there are. Every other command takes the result as catalog=. Look at
`out`/catalog.html before you train. Stopped, the same command goes on; an old catalog stays until the new one takes its place.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoscale.data.catalog import Catalog, CatalogError, open_catalog
from histoscale.data.contact import write_sheet
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.manifest import parse_manifest
from histoscale.data.merge import NoneAccepted
from histoscale.data.parts import Known, Rejected
from histoscale.data.ranks import close_ranks, open_ranks
from histoscale.data.storage import StorageConfig, Store
from histoscale.data.tissue import TissueConfig

RESULT = ("tissue",)
REPEATS = True  # the manifest and the slides may have changed since
MADE = ("catalog.json", "catalog.html", "slides.parquet", "rejected.parquet", "data-*", "parts", "writing.partial")
CACHES = {"parts": None}
_UNSEEN = Known("", None, None, None)  # of rows that name no file that could be looked at
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
        slides, damaged = parse_manifest(config.manifest, store, journal.say)
        refused = [Rejected(one.slide_id, f"bad row: row {one.row}: {one.reason}", _UNSEEN) for one in damaged]
        out = Path(config.out)
        previous = open_catalog(config.previous, store) if config.previous else _own(config.out, store, journal)
        many = ranks if ranks.world > 1 else None
        catalog = build_catalog(
            slides, store, config.tissue, out, config.workers, previous, journal, config.threads, many, refused
        )
        if ranks.main:
            write_sheet(out / "catalog.html", catalog, config.sheet_slides)
    except NoneAccepted as error:
        journal.say("\n".join(reasons(error.rejected, "")))
        raise ValueError(f"{error}: see above; the catalog that is in {config.out} stays as it was") from error
    finally:
        close_ranks()
    journal.say(table(catalog))
    if not len(catalog):
        raise ValueError(f"{NoneAccepted(catalog.rejected)}: see above or {config.out}/rejected.parquet")
    return {
        "index": {
            "accepted": len(catalog),
            "rejected": len(catalog.rejected),
            "rejected_by_reason": dict(by_reason(catalog.rejected)),
            "catalog_hash": catalog.hash,
        }
    }


def what_next(config: Config, summary: dict[str, Any]) -> str:
    """What to open and what to type when the catalog is there."""
    out = Path(config.out)
    catalog, run = (shlex.quote(str(path)) for path in (out, out.parent / "pretrain"))
    return (
        f"to look at: {out / 'catalog.html'}: every slide with the outline of its tissue, and why others were refused\n"
        f"next:       histoscale pretrain catalog={catalog} recipe=dinov2_vits14 out={run}"
    )


def _own(out: str, store: Store, journal: Journal) -> Catalog | None:
    """The catalog that is in `out` already."""
    if not (Path(out) / "catalog.json").exists():
        return None
    try:
        return open_catalog(out, store)
    except CatalogError as error:
        journal.say(f"every slide is read again: {error}")
        return None


def by_reason(rejected: Sequence[Rejected]) -> Counter[str]:
    """Rejected slides by the kind of their reason."""
    return Counter(found.reason.split(":")[0] for found in rejected)


def table(catalog: Catalog) -> str:
    """What was accepted, and what was not and why."""
    first = f"accepted {len(catalog)} slides, rejected {len(catalog.rejected)} (catalog {catalog.hash})"
    return "\n".join([first, *reasons(catalog.rejected, " in rejected.parquet")])


def reasons(rejected: Sequence[Rejected], where: str) -> list[str]:
    """By the kind of their reason, the first few of each. where: the others are."""
    lines = []
    for kind, count in by_reason(rejected).most_common():
        lines.append(f"  {count} x {kind}")
        found = [one for one in rejected if one.reason.split(":")[0] == kind]
        lines += [f"      {one.slide_id}: {one.reason}" for one in found[:5]]
        lines += [f"      and {count - 5} more{where}"] if count > 5 else []
    return lines


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("index", sys.argv[1:]))
