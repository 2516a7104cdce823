"""Phases: a run of several configurations in turn; what continues into a phase, what restarts, and how it is found again.

Steps count on through all phases, and with them the data and every random draw; schedules count from a phase's origin.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from histoscale.data.journal import Journal, plain
from histoscale.data.ranks import Ranks
from histoscale.pretrain.checkpoint import (
    CheckpointState,
    fill_tensors,
    load_tensors,
    newest_checkpoint,
    read_checkpoint,
    read_tensors,
    stored_tensors,
)
from histoscale.pretrain.methods import GramTeacher
from histoscale.pretrain.start import StartConfig, StartError, check_start, is_checkpoint, load_start, resize_positions


@dataclass(frozen=True)
class Phase:
    """Where a phase stands in its run. first: optimiser steps of all phases before; origin: the step its schedules count from."""

    index: int
    name: str
    first: int
    origin: int


ONLY = Phase(0, "base", 0, 0)


class Entry(NamedTuple):
    """Where training goes on: `step`, and what was said when its phase began (kept in every checkpoint of the phase)."""

    step: int
    began: list[str]


def find_state(folder: Path, journal: Journal, ranks: Ranks) -> CheckpointState | None:
    """The newest whole checkpoint of this run; says which others were passed over."""
    state, skipped = ranks.first(lambda: newest_checkpoint(folder))
    for why in skipped:
        journal.say(f"ignored a checkpoint that is not whole: {why}")
    if state is not None:
        journal.row(resumed=state.step, skipped=skipped)
    return state


def phase_reached(folder: Path, phases: list[tuple[Phase, int]], ranks: Ranks) -> int:
    """The index of the phase that a run goes on with; phases: each with its steps. 0 without a checkpoint."""
    state, _ = ranks.first(lambda: newest_checkpoint(folder))
    if state is None:
        return 0
    at = state.facts["phase"]
    over = state.step == at["first"] + at["steps"]
    return min(int(at["index"]) + over, len(phases) - 1)


def begin(student: nn.Module, teacher: nn.Module, start: StartConfig, seed: int) -> list[str]:
    """First weights of a run, before `prepare`: those of start.weights, and the teacher a copy of the student again; in words.

    Heads are fresh. A checkpoint of ours is for `enter`, which also takes heads and moments. Raises what load_start raises.
    """
    check_start(start)
    if is_checkpoint(start.weights):
        return []
    if start.weights is None:
        return [f"starts from fresh weights (seed {seed})"]
    backbone = student.get_submodule("backbone")
    loaded = load_start(backbone, start)
    said = [*loaded.said, "heads are fresh"]
    mask_token = dict(student.named_parameters()).get("mask_token")
    if mask_token is not None and loaded.mask_token is not None:
        mask_token.data.copy_(loaded.mask_token)
        said.append("the mask token is theirs")
    teacher.load_state_dict(student.state_dict())
    return said


def enter(
    state: CheckpointState | None,
    phase: Phase,
    identity: Mapping[str, Any],
    start: StartConfig,
    tensors: Mapping[str, Tensor],
    backbone: nn.Module,
    gram: GramTeacher | None,
    said: list[str],
    journal: Journal,
    ranks: Ranks,
) -> Entry:
    """Fill the tensors with what this phase goes on from: its own newest checkpoint, or the last one of the phase before.

    said: what `begin` said. Raises ValueError for a checkpoint of another run or phase, StartError and CheckpointError for
    tensors that do not fit.
    """
    prefix = 0 if backbone.no_embed_class else int(backbone.num_prefix_tokens)  # type: ignore[arg-type]
    if state is None:
        if phase.index:
            raise ValueError(f"phase {phase.name!r} continues the one before it, and there is no checkpoint of that")
        if is_checkpoint(start.weights):
            other = ranks.first(lambda: read_checkpoint(str(start.weights)))
            said = [f"starts from {start.weights}, step {other.step}", *carry(other, start, tensors, prefix, ranks)]
        return Entry(phase.first, said + begin_gram(gram, phase, None, start))
    at = state.facts["phase"]
    if at["index"] == phase.index:
        theirs = state.facts["identity"]
        differ = sorted(name for name in {*identity, *theirs} if plain(identity.get(name)) != theirs.get(name))
        if differ:
            raise ValueError(f"{state.path} is of a run with other values in {', '.join(differ)}; give another out=")
        load_tensors(state, tensors, ranks)
        journal.say(f"continuing from {state.path}")
        return Entry(state.step, at["began"])
    if at["index"] == phase.index - 1 and state.step == phase.first:
        said = [f"follows phase {at['name']} from step {state.step}", *carry(state, start, tensors, prefix, ranks)]
        said += _other_data(state.facts["identity"].get("facts", {}), identity.get("facts", {}))
        return Entry(phase.first, said + begin_gram(gram, phase, state, start))
    raise ValueError(
        f"{state.path} ends phase {at['name']!r} (number {at['index']}) after {state.step} steps: phase {phase.name!r} (number "
        f"{phase.index}) begins after {phase.first}; give another out="
    )


def _other_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words: a phase that reads other data than the one before it."""
    moved = [f"{name} {before.get(name)} -> {now.get(name)}" for name in ("catalog", "tiles")
             if before.get(name) != now.get(name)]  # fmt: skip
    return [f"its data are others: {', '.join(moved)}"] if moved else []


def begin_gram(gram: GramTeacher | None, phase: Phase, state: CheckpointState | None, start: StartConfig) -> list[str]:
    """First weights of a Gram teacher that this run's checkpoint does not hold yet; in words.

    Raises ValueError when it should have been taken from the teacher before this phase, and what load_start raises.
    """
    if gram is None or (state is not None and "gram.backbone.cls_token" in stored_tensors(state)):
        return []
    config, at = gram.config, phase.first - phase.origin
    if config.source != "teacher":
        load_start(gram.get_submodule("backbone"), replace(start, weights=config.source, may_lack=[], may_ignore=[]))
        return [f"the Gram teacher is {config.source}"]
    if at > config.first_step:
        raise ValueError(
            f"method.gram.first_step={config.first_step} lies before step {at} of the schedule, where this phase begins: "
            f"set it to {at} or later, so that there is a teacher to take"
        )
    return []


def carry(state: CheckpointState, start: StartConfig, tensors: Mapping[str, Tensor], prefix: int, ranks: Ranks) -> list[str]:
    """Take over from a checkpoint what `start` says, in place; what it does not take keeps its first value. Says both, in words.

    Raises StartError for a tensor that is missing, left over or of another shape, unless start.may_lack or may_ignore names it.
    """
    check_start(start)
    if start.moments and start.branch == "teacher":
        raise StartError("start.moments=true with start.branch=teacher: moments are the student's; set start.moments=false")
    stored = stored_tensors(state)
    sources = {name: _source(name, start) for name in tensors}
    wanted = {name: source for name, source in sources.items() if source is not None}
    resized = {name for name, source in wanted.items() if _is_table(name) and source in stored
               and stored[source].shape != tensors[name].shape}  # fmt: skip
    reset = {name for name in wanted if name.startswith("optimizer.") and _table_of(name) in resized}
    missing = {name for name, source in wanted.items() if source not in stored}
    fresh = {name for name in missing if name.startswith(("optimizer.", "centres.", "gram.")) or _named(name, start.may_lack)}
    lacking = sorted(missing - fresh)
    left = [name for name in stored if name.startswith("student.") and name not in tensors and not _named(name, start.may_ignore)]
    taken = {name: source for name, source in wanted.items() if name not in resized | reset | missing}
    other = [name for name, source in taken.items() if stored[source].shape != tensors[name].shape]
    centres = {name for name in other if name.startswith("centres.")}  # other targets: centres begin anew
    wrong = sorted(set(other) - centres)
    if lacking or left or wrong:
        shapes = [f"{name} is {list(stored[taken[name]].shape)} there, {list(tensors[name].shape)} here" for name in wrong]
        raise StartError(
            f"{state.path} does not fit this phase: lacking {_few(lacking)}; beyond it {_few(sorted(left))}; "
            f"other shapes: {_few(shapes)}. New heads take start.heads=false; other parts must be named in start.may_lack or "
            "start.may_ignore"
        )
    taken = {name: source for name, source in taken.items() if name not in centres}
    # A source may fill two tensors (student and teacher from one of them): one pass for each.
    for branch in ("teacher.", ""):
        part = {taken[name]: tensors[name] for name in taken if name.startswith("teacher.") == (branch == "teacher.")}
        fill_tensors(state, part, ranks)
    registers = stored["student.backbone.reg_token"].shape[1] if "student.backbone.reg_token" in stored else 0
    theirs = 1 + registers if prefix else 0
    grids = [_resize(state, wanted[name], tensors[name], theirs, prefix, start.resize) for name in sorted(resized)]
    return _story(start, grids, sorted(fresh | reset | centres))


def _source(name: str, start: StartConfig) -> str | None:
    """The checkpoint's tensor that this one takes, None where it begins anew."""
    branch, _, rest = name.partition(".")
    if branch in ("student", "teacher"):
        if rest.split(".")[0] in ("head", "patch_head") and not start.heads:
            return None
        return name if start.branch == "both" else f"{start.branch}.{rest}"
    if branch == "optimizer":
        return name if start.moments and (start.heads or rest.split(".")[0] not in ("head", "patch_head")) else None
    if branch == "centres":
        return name if start.heads else None
    return name if branch == "gram" else None  # a loss scale belongs to its phase alone


def _story(start: StartConfig, grids: list[str], fresh: list[str]) -> list[str]:
    shared = f"student and teacher, both from the {start.branch}"
    both = "student and teacher, each from its own weights" if start.branch == "both" else shared
    continues = [both, *(["heads and centres"] if start.heads else []), *(["AdamW's moments"] if start.moments else [])]
    restarts = [*([] if start.heads else ["heads and centres"]), *([] if start.moments else ["AdamW's moments"])]
    said = [f"continue: {', '.join(continues)}", f"restart: {', '.join(restarts) or 'nothing of the state'}"]
    if grids:
        said.append(f"positions resized from {grids[0]} ({start.resize}'s convention)")
    parts = sorted({name for name in fresh if not name.startswith("optimizer.") or name.endswith(".exp_avg")})
    return [*said, f"begin anew: {', '.join(parts)}"] if parts else said


@torch.no_grad()
def _resize(state: CheckpointState, source: str, target: Tensor, theirs: int, ours: int, convention: str) -> str:
    """The stored position table on the target's grid, written into the target; says the grids.

    theirs, ours: rows of the table that are no patch; rows of new registers are zeros.
    """
    (table,) = read_tensors(state, source).values()
    side = round((target.shape[1] - ours) ** 0.5)
    patches = resize_positions(table[:, theirs:], (side, side), convention)
    kept = table[:, : min(theirs, ours)]
    fresh = table.new_zeros(1, ours - kept.shape[1], table.shape[2])
    whole = torch.cat([kept, fresh, patches], 1).to(target.device)
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements)
    target.copy_(whole)
    old = round((table.shape[1] - theirs) ** 0.5)
    return f"{old}x{old} to {side}x{side}"


def _is_table(name: str) -> bool:
    return name.endswith("backbone.pos_embed")


def _table_of(moment: str) -> str:
    """`optimizer.backbone.pos_embed.exp_avg` -> `student.backbone.pos_embed`."""
    return f"student.{moment.removeprefix('optimizer.').rpartition('.')[0]}"


def _named(name: str, patterns: list[str]) -> bool:
    """Whether a pattern names the parameter, with or without its branch."""
    bare = name.partition(".")[2]
    return any(fnmatchcase(name, pattern) or fnmatchcase(bare, pattern) for pattern in patterns)


def _few(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
