"""Checkpoints: `step-N/` of safetensors shards and a `state.json` that vouches for them; nothing is pickled.

A directory whose `state.json` is missing or does not match its shards does not exist for the reader. Writing beside the training
is for pretrain/saving.py.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from histoscale.data.journal import write_json
from histoscale.data.jsonfiles import JsonError, read_object
from histoscale.data.ranks import Ranks
from histoscale.pretrain.tensorfile import DTYPES, TensorFileError, Whole, read_wholes, weights_digest

FORMAT = 1
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class CheckpointConfig:
    """every: a checkpoint each so many steps, and one at the end. keep_last: how many of the newest stay.

    keep_every: those at multiples of so many steps stay for ever; null keeps none beyond keep_last. asynchronous: training goes
    on while a copy of the state in host memory is written; false waits for every write.
    """

    every: int
    keep_last: int
    keep_every: int | None
    asynchronous: bool


class CheckpointError(OSError):
    """A checkpoint that cannot be written or trusted; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class CheckpointState:
    """A checkpoint that was found whole. `facts`: whatever the writer recorded (configuration, identity). tensors: by name."""

    path: Path
    step: int
    facts: dict[str, Any]
    tensors: dict[str, Whole]

    @cached_property
    def hash(self) -> str:
        """Names the weights (weights_digest), 64 hex digits; all of their bytes are read. Raises CheckpointError."""
        with _as_checkpoint(self.path):
            return weights_digest(self.tensors)

    @property
    def identity(self) -> str:
        """Names all that it says, weights and facts: 64 hex digits."""
        said = json.dumps([self.step, self.facts], sort_keys=True)
        return hashlib.sha256(f"{self.hash} {said}".encode()).hexdigest()


def write_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], ranks: Ranks) -> Path:
    """Write `folder/step-N`; every rank calls it with its (possibly sharded) tensors and all return when it is there.

    Shards go to `step-N.partial`; when all are synced, rank 0 adds `state.json` and renames, so a reader sees all or nothing.
    Raises CheckpointError on every rank when any rank cannot write; the earlier checkpoints are then untouched.
    """
    final = folder / f"step-{step}"
    partial = folder / f"step-{step}.partial"
    try:
        ranks.first(lambda: _empty(partial))
    except OSError as error:
        raise CheckpointError(f"checkpoint {final} was not written ({error}); earlier checkpoints are intact") from None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                dict(tensors),
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                process_group=ranks.group,
                no_dist=ranks.world == 1,
            )
    except CheckpointException as error:
        ranks.first(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise CheckpointError(f"checkpoint {final} was not written ({_causes(error)}); earlier checkpoints are intact") from None

    mine = sorted(partial.glob("*.safetensors"))[ranks.rank :: ranks.world]  # reading back is shared as writing was
    found: list[dict[str, Any] | str] = ranks.objects(_fingerprints(mine))
    failed = [why for why in found if isinstance(why, str)]
    if failed:
        ranks.first(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise CheckpointError(f"checkpoint {final} was not written ({failed[0]}); earlier checkpoints are intact")

    def publish() -> None:
        shards = {name: value for part in found if isinstance(part, dict) for name, value in sorted(part.items())}
        state = {"format": FORMAT, "step": step, "shards": shards, "facts": facts}
        try:
            write_json(partial / "state.json", state)
            _sync_folder(partial)
            if final.exists():  # only ever a directory that the reader refused
                shutil.rmtree(final)
            partial.rename(final)
            _sync_folder(folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"checkpoint {final} was not written ({error}); earlier checkpoints are intact") from None

    ranks.first(publish)
    return final


def read_checkpoint(path: Path | str) -> CheckpointState:
    """The checkpoint at `step-N`, or the newest whole one in a run's folder; every shard's size and sha256 are compared.

    Raises CheckpointError: no state.json, another format, a shard missing, cut short or changed.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint: no such folder")
    folder = path / "checkpoints"
    if folder.is_dir() or _steps(path):
        found, skipped = newest_checkpoint(folder if folder.is_dir() else path)
        if found is None:
            raise CheckpointError(f"{path} holds no whole checkpoint{''.join(f'; {why}' for why in skipped)}")
        return found
    try:
        state = read_object(path / "state.json")
        if other := _other_result(state):
            raise CheckpointError(f"{path} {other}")
        step, shards, facts = int(state["step"]), dict(state["shards"]), dict(state["facts"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no state.json: it was never finished") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        why = error if isinstance(error, JsonError) else repr(error)
        raise CheckpointError(f"{path / 'state.json'} cannot be read ({why})") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')!r}; this version reads format {FORMAT}")
    present = {file.name for file in path.glob("*.safetensors")}
    if present != shards.keys():
        raise CheckpointError(
            f"{path}: state.json lists the shards {sorted(shards)}, the folder holds {sorted(present)}"
        )
    for name, expected in shards.items():
        if not isinstance(expected, dict) or not expected.keys() >= {"size", "sha256"}:
            raise CheckpointError(f"{path / 'state.json'} says no size and sha256 of {name}: it is damaged")
        size = (path / name).stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{path / name} has {size} bytes, not {expected['size']} as state.json says: cut or changed")
        if _sha256(path / name) != expected["sha256"]:
            raise CheckpointError(f"{path / name} does not have the sha256 that state.json says: its bytes changed")
    with _as_checkpoint(path):
        return CheckpointState(path, step, facts, read_wholes(path / name for name in sorted(shards)))


def _other_result(state: dict[str, Any]) -> str:
    """What a folder is whose state.json is a command's, not a checkpoint's; empty for a checkpoint."""
    if "command" not in state or "shards" in state:
        return ""
    if state["command"] == "pretrain":
        return f"is a run of `histoscale pretrain` without a checkpoint yet (status: {state.get('status')}); let it go on"
    return f"is a result of `histoscale {state['command']}`, not a checkpoint; give the out= of `histoscale pretrain`"


def newest_checkpoint(folder: Path) -> tuple[CheckpointState | None, list[str]]:
    """The newest whole checkpoint under `folder`, or None; and why each newer directory was passed over."""
    skipped: list[str] = []
    if not folder.is_dir():
        return None, skipped
    skipped += [f"{path.name}: its writing never finished" for path in sorted(folder.glob("step-*.partial"))]
    for _, path in _steps(folder)[::-1]:
        try:
            return read_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(f"{path.name}: {error}")
    return None, skipped


def prune_checkpoints(folder: Path, written: int, config: CheckpointConfig) -> list[Path]:
    """Remove all up to step `written` but the newest `keep_last` of them and multiples of `keep_every`; returns what was removed.

    Later ones, which the reader refused before the run came here, do not count: they would take the place of whole ones.
    """
    older = [(step, path) for step, path in _steps(folder) if step <= written][: -config.keep_last]
    gone = [path for step, path in older if not config.keep_every or step % config.keep_every]
    for path in gone:
        (path / "state.json").unlink(missing_ok=True)  # first, so that a kill in between leaves no half checkpoint
        shutil.rmtree(path)
    return gone


def load_tensors(state: CheckpointState, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill the tensors (sharded ones too, from any number of writers) in place with the checkpoint's values.

    Raises CheckpointError unless names, shapes and dtypes are exactly the checkpoint's: nothing is loaded in part.
    """
    stored = stored_tensors(state)
    missing, extra = sorted(tensors.keys() - stored.keys()), sorted(stored.keys() - tensors.keys())
    if missing or extra:
        raise CheckpointError(
            f"{state.path} does not fit this model: it lacks {_few(missing)} and holds, beyond it, {_few(extra)}"
        )
    wrong = [
        f"{name} is {list(stored[name].shape)} {stored[name].dtype} there, {list(x.shape)} {x.dtype} here"
        for name, x in tensors.items()
        if stored[name].shape != x.shape or stored[name].dtype != x.dtype
    ]
    if wrong:
        raise CheckpointError(f"{state.path} does not fit this model: {_few(wrong)}")
    _load(state.path, dict(tensors), no_dist=ranks.world == 1)


def stored_tensors(state: CheckpointState) -> dict[str, Tensor]:
    """Name -> an empty tensor of its whole shape and dtype, without memory."""
    return {name: torch.empty(one.shape, dtype=DTYPES[one.dtype], device="meta") for name, one in state.tensors.items()}


def fill_tensors(state: CheckpointState, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill these tensors, sharded ones too, with those of the same names; what else the checkpoint holds is left aside.

    Raises CheckpointError for a name that is not there; shapes are the caller's to compare.
    """
    _load(state.path, dict(tensors), no_dist=ranks.world == 1)


def read_tensors(state: CheckpointState, prefix: str) -> dict[str, Tensor]:
    """Whole tensors on the CPU whose names begin with `prefix`, under the rest of their names; in one process.

    Raises CheckpointError when there are none.
    """
    wanted = {name: torch.empty_like(x, device="cpu") for name, x in stored_tensors(state).items() if name.startswith(prefix)}
    if not wanted:
        raise CheckpointError(f"{state.path} holds no tensor whose name begins with {prefix!r}")
    _load(state.path, wanted, no_dist=True)
    return {name.removeprefix(prefix): x for name, x in wanted.items()}


def _load(path: Path, tensors: dict[str, Tensor], no_dist: bool) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=no_dist)
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be read ({_causes(error)})") from None


@contextmanager
def _as_checkpoint(path: Path) -> Iterator[None]:
    try:
        yield
    except TensorFileError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be trusted: {error}") from None


def _causes(error: CheckpointException) -> str:
    causes = (cause for cause, _ in error.failures.values())
    return "; ".join(sorted({f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}" for cause in causes}))


def _few(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _steps(folder: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)  # no more: a run whose folder was deleted must not go on in a new one
    folder.mkdir()


def _fingerprints(paths: list[Path]) -> dict[str, Any] | str:
    """Size and sha256 of each file by name, or why one cannot be read."""
    try:
        return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
    except OSError as error:
        return str(error)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
