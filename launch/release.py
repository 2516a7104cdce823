"""Turn a checkpoint into a directory that others load without a word of code.

Examples:
    histoscale release checkpoint=runs/pretrain out=runs/release                # the newest checkpoint of a run
    histoscale release checkpoint=runs/pretrain/checkpoints/step-2 summary=runs/crc/summary.json release.name=colon-s \\
        out=runs/colon_s

    timm.create_model("local-dir:runs/release", pretrained=True)
    transformers.AutoModel.from_pretrained("runs/release")
    torch.hub.load(".", "histoscale", "runs/release", source="local")    # "." is a clone of this repository

`out` holds what a consumer needs and nothing else; config.yaml, summary.json and the like stand beside it in .release.run (of
`release`). `summary` puts measured scores on the card; without it the card says that nothing was measured.
"""

import hashlib
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoscale.data.fingerprint import content, told
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.jsonfiles import JsonError, read_object
from histoscale.launch.held import check_summary
from histoscale.pretrain.checkpoint import read_checkpoint
from histoscale.pretrain.release import FILES, ReleaseConfig, write_release

RESULT = ("precision", "release")
RECORD_BESIDE = True  # `out` is handed to others
REPEATS = True  # the folder may have been changed or moved away since
INPUTS = ("checkpoint", "summary")


@dataclass(frozen=True)
class Config:
    """checkpoint: a step-N directory, or a run whose newest is taken. summary: a summary.json with measured scores, or null.
    precision: of the file, fp32 or bf16."""

    checkpoint: str
    summary: str | None
    precision: str
    release: ReleaseConfig
    out: str
    logging: JournalConfig


def identity(config: Config) -> dict[str, Any]:
    """The weights by their hash, and what the card reports."""
    state = read_checkpoint(config.checkpoint)
    told(state.path / "state.json", state.identity)  # its bytes hold checksums of files, which differ between equal checkpoints
    return {"checkpoint": state.hash, "measured": _measured(config)}


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Write the release, whole or not at all. Raises CheckpointError, and ValueError for an `out` that holds other things or
    cannot be replaced whole."""
    out = Path(config.out)
    place = out.resolve()  # a link stays, and what it names is replaced
    partial, old = place.with_name(f".{place.name}.partial"), place.with_name(f".{place.name}.old")
    if old.exists() and not place.exists():  # a kill between the two renames
        os.rename(old, place)
    before = _recorded(journal.path("summary.json"))
    if before is not None and before["files"] == _digests(out):
        journal.say(f"release: {out} already holds this result; nothing to do")
        return {"release": before}
    _check_free(out, before is not None)
    if os.path.ismount(place):
        raise ValueError(f"out={out} is a mount point, which no rename replaces: give a folder in it, out={out / 'release'} say")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        facts = write_release(read_checkpoint(config.checkpoint), partial, config.precision, config.release, _measured(config))
        files = _digests(partial)
        _swap(partial, place, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    typed = shlex.quote(f"encoder={out}")
    journal.say(
        f"{out} is a release: open its card {out / 'README.md'}; the record of this run is in {journal.out}\n"
        f"  timm.create_model('local-dir:{out}', pretrained=True)\n"
        f"next: histoscale embed {typed} catalog=CATALOG out=EMBEDDINGS\n"
        f"  or: histoscale probe {typed} dataset=folder data_root=TILES out=PROBE"
    )
    shown = ("name", "branch", "steps", "width", "parameters", "sha256", "transductive", "mpp")
    return {"release": {**{name: facts[name] for name in shown}, "files": files}}


def _swap(new: Path, place: Path, old: Path) -> None:
    """One folder in the place of another, which is there until the new one stands; a disk exchanges no two folders at once."""
    if place.exists():
        os.rename(place, old)
    try:
        os.rename(new, place)
    except OSError:
        if old.exists():
            os.rename(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of each file."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with path.open("rb") if path.is_file() else open(os.devnull, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _recorded(summary: Path) -> dict[str, Any] | None:
    """What an earlier run of this command said, if one came to its end."""
    try:
        found = read_object(summary).get("release") if summary.exists() else None
        if found is not None and not isinstance(found.get("files") if isinstance(found, dict) else None, dict):
            raise JsonError("its `release` lists no files")
        return found
    except JsonError as error:
        raise ValueError(f"{summary} is damaged ({error}): delete it, and the release is made anew") from None


def _check_free(out: Path, ours: bool) -> None:
    """Raises ValueError where a release would stand among other files, or replace one that is not known here."""
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    other = sorted(there - set(FILES)) if ours else sorted(there)
    if other:
        named = ", ".join(other[:3]) + (", …" if len(other) > 3 else "")
        raise ValueError(f"out={out} holds other things ({named}), and a release stands alone: give an empty or a new folder")


def _measured(config: Config) -> dict[str, Any] | None:
    if config.summary is None:
        return None
    try:
        check_summary(Path(config.summary))
        content(config.summary)
        return read_object(Path(config.summary))
    except (FileNotFoundError, JsonError) as error:
        raise ValueError(f"summary={config.summary} cannot be read: {error}") from None


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("release", sys.argv[1:]))
