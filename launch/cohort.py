"""Write a synthetic cohort: pyramidal slides of several hospitals, with truth, of any size, the same from the same seed.

    histoscale cohort out=runs/cohort
    histoscale cohort cohort=full cohort.seed=3 out=runs/cohort

`out` holds slides/*.svs, manifest.csv, patches.parquet (labelled patches) and truth/<slide_id>/.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoscale.data.cohort.write import CohortConfig, slides_of, write_cohort
from histoscale.data.journal import Journal, JournalConfig

RESULT = ("cohort",)


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
    journal.say(f"cohort: {len(slides)} slides of {len(patients)} patients, {size / 2**20:.0f} MiB, in {out}")
    return {"cohort": {"slides": len(slides), "patients": len(patients), "bytes": size}}


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("cohort", sys.argv[1:]))
