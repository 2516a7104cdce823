"""Turn a checkpoint into a directory that others load without a word of code.

Examples:
    histoscale release checkpoint=run out=release                         (the newest checkpoint of a run)
    histoscale release checkpoint=run/checkpoints/step-240 summary=probe/summary.json release.name=colon-s out=release

    timm.create_model("local-dir:release", pretrained=True)

`summary` puts measured scores on the card; without it the card says that nothing was measured.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoscale.data.journal import Journal, JournalConfig
from histoscale.pretrain.checkpoint import read_checkpoint
from histoscale.pretrain.release import ReleaseConfig, write_release

RESULT = ("release",)


@dataclass(frozen=True)
class Config:
    """checkpoint: a step-N directory, or a run whose newest is taken. summary: a summary.json with measured scores, or null."""

    checkpoint: str
    summary: str | None
    release: ReleaseConfig
    out: str
    logging: JournalConfig


def identity(config: Config) -> dict[str, Any]:
    """The weights by their hash, and what the card reports."""
    return {"checkpoint": read_checkpoint(config.checkpoint).hash, "measured": _measured(config)}


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Write the release. Raises CheckpointError, ValueError."""
    facts = write_release(read_checkpoint(config.checkpoint), Path(config.out), config.release, _measured(config))
    journal.say(f"{config.out} is a release: timm.create_model('local-dir:{config.out}', pretrained=True)")
    shown = ("name", "branch", "steps", "width", "parameters", "sha256", "transductive")
    return {"release": {name: facts[name] for name in shown}}


def _measured(config: Config) -> dict[str, Any] | None:
    if config.summary is None:
        return None
    try:
        return json.loads(Path(config.summary).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"summary={config.summary} cannot be read: {error}") from None


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("release", sys.argv[1:]))
