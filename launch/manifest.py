"""The manifest of a public cohort from the files that its authors publish, with patients, sites, labels and splits.

    histoscale manifest collection=camelyon16 root=~/data/CAMELYON16 out=runs/c16
    histoscale manifest collection=panda root=~/data/panda collection.noisy=train_with_noisy_labels.csv out=runs/panda
    histoscale manifest collection=tcga root=~/data/tcga labels.path=lung.csv labels.key=patient labels.by=patient_id \\
        labels.columns.subtype=subtype out=runs/tcga

`index manifest=<out>/manifest.csv` and `mil manifest=<out>/manifest.csv` take the result. Nothing is fetched: the slides lie
where you put them, and counts are held against those that were published.
"""

import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.manifest import read_manifest
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.cohorts.camelyon16 import Camelyon16Config, read_camelyon16
from histoscale.eval.cohorts.camelyon17 import Camelyon17Config, read_camelyon17
from histoscale.eval.cohorts.cohort import Cohort, LabelTable, check_rows, digest, with_labels, write_manifest
from histoscale.eval.cohorts.panda import PandaConfig, read_panda
from histoscale.eval.cohorts.tcga import TcgaConfig, check_sites, one_name, read_tcga

RESULT = ("collection", "root", "labels")
REPEATS = True  # slides may have come or gone since
MADE = ("manifest.csv",)
_SHOWN = 8  # values of a column, sites of a table

Collections = Camelyon16Config | Camelyon17Config | PandaConfig | TcgaConfig
CollectionConfig = Annotated[Collections, Field(discriminator="kind")]


@dataclass(frozen=True)
class Config:
    """root: the folder with the cohort as it was published. labels: columns of another table, joined by slide or patient."""

    collection: CollectionConfig
    root: str
    labels: LabelTable
    storage: StorageConfig
    logging: JournalConfig
    out: str


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Write manifest.csv. Raises CohortError."""
    store = Store(config.storage)
    cohort = with_labels(read(config.collection, Path(config.root).expanduser(), store), config.labels)
    check_rows(cohort)
    if isinstance(config.collection, TcgaConfig):
        cohort = one_name(cohort)
        check_sites(cohort)
    path = journal.path("manifest.csv")
    write_manifest(path, cohort)
    slides = read_manifest(str(path), store, journal.say)  # what `index` will do
    patients = {slide.patient_id for slide in slides} - {None}
    sites = Counter(slide.site or "unknown" for slide in slides)
    journal.say(table(cohort))
    typed = shlex.join([f"manifest={path}", f"out={config.out}_catalog"])
    journal.say(f"open {path}; next: histoscale index {typed}")
    return {
        "manifest": {
            "cohort": cohort.name,
            "slides": len(slides),
            "patients": len(patients) or None,
            "sites": dict(sorted(sites.items())),
            "splits": {name: parts(cohort, name) for name in cohort.splits},
            "counts": cohort.counts,
            "left_out": cohort.left_out,
            "notes": list(cohort.notes),
        }
    }


def read(config: Collections, root: Path, store: Store) -> Cohort:
    if isinstance(config, Camelyon16Config):
        return read_camelyon16(root, config, store)
    if isinstance(config, Camelyon17Config):
        return read_camelyon17(root, config)
    return read_panda(root, config) if isinstance(config, PandaConfig) else read_tcga(root, config)


def parts(cohort: Cohort, column: str) -> dict[str, Any]:
    """Of a column of parts: how many slides each has, and the sum of their ids."""
    counts = Counter(row[column] for row in cohort.rows if row[column])
    return {part: {"slides": count, "sha256": digest(cohort, column, part)} for part, count in counts.items()}


def table(cohort: Cohort) -> str:
    """Counts, sites against the columns of few values, and what must be known."""
    lines = [f"{cohort.name}: {len(cohort.rows)} slides", *[f"  {count:6d} {name}" for name, count in cohort.counts.items()]]
    for name in cohort.rows[0]:
        values = Counter(row[name] for row in cohort.rows)
        if name in ("slide_id", "uri", "patient_id", "site", "annotations") or not 1 < len(values) <= _SHOWN:
            continue
        lines.append(f"{name} by site: {', '.join(value or 'none' for value in sorted(values))}")
        of_site = Counter((row["site"], row[name]) for row in cohort.rows)
        largest = Counter(row["site"] for row in cohort.rows).most_common()
        for site, total in largest[:_SHOWN]:
            lines.append(f"  {total:6d} {site or 'unknown'}: {', '.join(str(of_site[site, value]) for value in sorted(values))}")
        if len(largest) > _SHOWN:
            lines.append(f"         and {len(largest) - _SHOWN} more sites")
    for why, count in Counter(cohort.left_out.values()).most_common():
        first = next(name for name, reason in cohort.left_out.items() if reason == why)
        lines.append(f"left out, {count}: {why} ({first}{', …' if count > 1 else ''})")
    return "\n".join([*lines, *[f"! {note}" for note in cohort.notes]])


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("manifest", sys.argv[1:]))
