"""Write a synthetic cohort: pyramidal slides of several hospitals, with truth, of any size, the same from the same seed.

    histoscale cohort out=runs/cohort
    histoscale cohort cohort=full cohort.seed=3 out=runs/full_cohort
    histoscale index manifest=runs/cohort/manifest.csv out=runs/cohort/catalog

`out` holds slides/*.svs, manifest.csv, patches.parquet (labelled patches) and truth/<slide_id>/. A process a core draws.
"""

import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoscale.data.cohort.write import CohortConfig, slides_of, write_cohort
from histoscale.data.journal import Journal, JournalConfig

RESULT = ("cohort",)
MADE = ("slides", "truth", "patches.parquet", "manifest.csv")


@dataclass(frozen=True)
class Config:
    cohort: CohortConfig
    out: str
    logging: JournalConfig


def run(config: Config, journal: Journal) -> dict[str, Any]:
    out = Path(config.out)
    write_cohort(out, config.cohort, journal)
    slides = slides_of(config.cohort)
    size = sum(file.stat().st_size for file in (out / "slides").glob("*.svs"))
    patients = {slide.patient_id for slide in slides}
    roles = ", ".join(f"{n} {role}" for role, n in Counter(slide.role for slide in slides).items())
    journal.say(f"{len(slides)} slides of {len(patients)} patients ({roles}), {size / 2**20:.0f} MiB, in {out}")
    journal.say(f"open: {(out / 'slides').resolve().as_uri()} (in QuPath; truth/ has masks, nuclei and outlines)")
    typed = shlex.join(["histoscale", "index", f"manifest={out / 'manifest.csv'}", f"out={out / 'catalog'}"])
    journal.say(f"next: {typed}")
    return {"cohort": {"slides": len(slides), "patients": len(patients), "bytes": size}}


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("cohort", sys.argv[1:]))
