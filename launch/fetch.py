"""Public labelled sets into data_root: open licences only, resumable, with the published checksums.

    histoscale fetch dataset=pcam data_root=~/data/pcam
    histoscale fetch dataset=crc data_root=~/data/crc mirror=https://example.org/nct-crc-he

Cut off or stopped, the same command goes on from the last byte. Of sets that their authors do not give away freely it says where
they are and under which licence. `histoscale probe dataset=… data_root=…` then checks counts and layout when it opens them.
"""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from histoscale.data.journal import Journal, JournalConfig
from histoscale.eval.datasets.fetch import FetchConfig, fetch_set, origin_of
from histoscale.eval.datasets.opening import AnyDataset

RESULT = ("dataset", "data_root")
REPEATS = True  # what was fetched may have been moved away since


@dataclass(frozen=True)
class Config:
    """dataset: which one; its other keys do not matter here. mirror: a URL that the same files stand below; null: the
    publisher's."""

    dataset: AnyDataset
    data_root: str
    mirror: str | None
    fetch: FetchConfig
    logging: JournalConfig
    out: str


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Raises FetchError."""
    name = config.dataset.name
    origin = origin_of(name)
    journal.say(f"{name} is given under {origin.licence}; by fetching it you accept that")
    root = Path(config.data_root).expanduser()
    made = fetch_set(origin, root, config.mirror or origin.base, config.fetch, journal)
    more = ["honest.few_shot.shots=[10]", "eva=ten_shot"] if name == "pcam_10shot" else []
    typed = shlex.join(["encoder=ENCODER", f"dataset={name}", f"data_root={config.data_root}", *more])
    journal.say(f"{root} holds {name}; next: histoscale probe {typed}")
    return {"fetch": {"dataset": name, "licence": origin.licence, "files": {part: asdict(row) for part, row in made.items()}}}


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("fetch", sys.argv[1:]))
