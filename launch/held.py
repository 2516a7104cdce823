"""What an output folder holds, whom that binds, and which folder a command takes.

`state.json` says what was asked for. It binds a folder from the first result on: from then on the same command continues or has
nothing to do, and another one is refused. Before that (refused, failed or killed without a result) the next command may be
another; what the earlier one left is cleared, but for caches that the next one can use and whatever was there before them all.

A command's module says what it leaves: MADE (globs), HOLDS (those whose existence is a first result; a finished run always is
one), CACHES (glob -> the result keys, besides the inputs, that make its content; None: all), INPUTS (keys that name what is read,
known by its content and its own name, not by the folder that it lies in).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from histoscale.data import fingerprint
from histoscale.data.journal import plain, write_atomic, write_json
from histoscale.data.jsonfiles import JsonError, read_object
from histoscale.launch.config import COMMANDS, flatten
from histoscale.launch.lease import Refused, busy, is_ours

STATE, SUMMARY = "state.json", "summary.json"
OWN = ("config.yaml", fingerprint.LIST, SUMMARY, "metrics.jsonl", "error.log")  # of every command
_KINDS = {"command": str, "identity": str, "status": str, "result": dict, "facts": dict}  # of a state
_SHOWN = 6  # files that a refusal names
_LONGEST = 60  # letters that a folder's name gets for what differs
_HALF = re.compile(r"\.\d+\.partial$")


@dataclass(frozen=True)
class Asked:
    """What a command would make. result: its result keys, facts: of its `identity`, files: name -> hash of what it reads."""

    command: str
    module: ModuleType
    result: dict[str, Any]
    facts: dict[str, Any]
    files: dict[str, str]
    noted: fingerprint.Noted

    @property
    def identity(self) -> str:
        return digest({"command": self.command, "result": self.result, "facts": self.facts, "files": self.files})


def digest(values: Any) -> str:
    """sha256 of the canonical JSON of plain values, 16 hex digits."""
    return hashlib.sha256(json.dumps(plain(values), sort_keys=True).encode()).hexdigest()[:16]


def input_name(value: Any) -> Any:
    """The last part of a path, also behind `hf:` and the like; URIs and what is no text as they are."""
    if isinstance(value, list):
        return [input_name(each) for each in value]
    if not isinstance(value, str) or "://" in value:
        return value
    prefix, colon, place = value.rpartition(":")
    return f"{prefix}{colon}{os.path.basename(os.path.abspath(os.path.expanduser(place)))}" if place else value


# What a folder holds.


def read_state(out: Path) -> dict[str, Any] | None:
    """None without one, and for an object that is of another kind (a checkpoint's). Raises Refused for a damaged one."""
    try:
        state = read_object(out / STATE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except JsonError as error:
        raise Refused(f"{out / STATE} is damaged ({error}): give another out=, or delete that folder") from None
    wrong = [name for name, kind in _KINDS.items() if not isinstance(state.get(name), kind)]
    if "command" in state and wrong:
        raise Refused(f"{out / STATE} is damaged (no usable {', '.join(wrong)}): give another out=, or delete that folder")
    return None if wrong else state


def _known_state(out: Path) -> dict[str, Any] | None:
    """The state of a folder that nobody named; None also for a damaged one, which is no command's own."""
    try:
        return read_state(out)
    except Refused:
        return None


def write_state(out: Path, asked: Asked, status: str, found: list[str], bound: bool, **more: Any) -> None:
    """found: names that were in `out` before any command."""
    state = {"command": asked.command, "identity": asked.identity, "status": status, "bound": bound, "found": found,
             "result": plain(asked.result), "facts": asked.facts, **more}  # fmt: skip
    if status == "done":
        state["summary"] = _sha256(out / SUMMARY)
    write_json(out / STATE, state)


def is_bound(out: Path, state: dict[str, Any], asked: Asked) -> bool:
    """Whether a first result stands."""
    holds = getattr(_maker(state, asked), "HOLDS", ())
    return bool(state.get("bound")) or state["status"] == "done" or any(next(out.glob(name), None) for name in holds)


def finished(out: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished run. Raises Refused where it is gone or not as the run wrote it."""
    path = out / SUMMARY
    what = "is gone" if not path.exists() else "is not as the run wrote it" if _sha256(path) != state.get("summary") else ""
    try:
        if not what:
            return read_object(path)
    except JsonError as error:
        what = f"is damaged ({error})"
    raise Refused(f"{path} {what}: put it back, or run that command again with another out=")


def check_summary(path: Path) -> None:
    """Raises Refused for a summary.json of a finished run that the run did not write so: edited numbers go no further."""
    state = read_state(path.parent) if path.name == SUMMARY else None
    if state is not None and state["status"] == "done":
        finished(path.parent, state)


def grows(state: dict[str, Any], asked: Asked) -> bool:
    """Whether a command that can be continued by more (`pretrain` by phases) finds its own beginning."""
    continues = getattr(asked.module, "continues", None)
    new = {"result": plain(asked.result), "facts": asked.facts}
    other = state["command"] == asked.command and state["identity"] != asked.identity
    return continues is not None and other and continues(state, new)


def begin(out: Path, asked: Asked, state: dict[str, Any] | None) -> list[str]:
    """Clears what tries without a result left; the names that were in `out` before any of them. Raises Refused where something
    else has files of the names that every command writes."""
    if state is None:
        foreign = [name for name in (STATE, *OWN) if (out / name).exists()]
        if foreign:
            raise Refused(
                f"{out} holds {', '.join(foreign)} of something that is no run, and a run writes files of these names: give a "
                f"folder of its own, such as out={out / asked.command}, or move them away"
            )
        return sorted({path.name for path in _made(out, asked.module)})
    found = list(state.get("found", []))
    if is_bound(out, state, asked):
        return found
    before = _maker(state, asked)
    caches = getattr(before, "CACHES", {})
    read = state["command"], state["facts"], fingerprint.load(out / fingerprint.LIST)
    same = read == (asked.command, asked.facts, asked.files)
    old, new = state["result"], plain(asked.result)
    kept = [name for name, keys in caches.items() if same and all(old.get(key) == new.get(key) for key in keys or {*old, *new})]
    spared = {*found, *(path.name for name in kept for path in out.glob(name))}
    for path in {*(out / name for name in OWN if (out / name).exists()), *_made(out, before)}:
        if path.name not in spared:
            _remove(path)
    return found


def _made(out: Path, module: ModuleType | None) -> set[Path]:
    """What a command leaves besides OWN."""
    return {path for name in getattr(module, "MADE", ()) for path in out.glob(name)}


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sweep(out: Path) -> None:
    """Remove what a killed run left half written anywhere below `out`, which must be held: files that end in .PID.partial."""
    for folder, _, names in os.walk(out):
        for name in filter(_HALF.search, names):
            (Path(folder) / name).unlink(missing_ok=True)


def _maker(state: dict[str, Any], asked: Asked) -> ModuleType | None:
    """The module of the command that wrote a state; None for one that this version does not have."""
    command = state["command"]
    if command == asked.command:
        return asked.module
    return import_module(f"histoscale.launch.{command}") if command in COMMANDS else None


@dataclass(frozen=True)
class Standing:
    """A folder with a result before its command looks again, or goes on with more.

    own: the text of each of OWN and STATE; made: names of what the command had left; results: path -> size and time, of all the
    rest of a folder that is looked at, of the first results of one that goes on.
    """

    asked: Asked
    grown: bool
    own: dict[str, bytes]
    made: set[str]
    results: dict[str, tuple[int, int]]

    @staticmethod
    def of(out: Path, asked: Asked, grown: bool) -> "Standing":
        own = {name: (out / name).read_bytes() for name in (*OWN, STATE) if (out / name).exists()}
        return Standing(asked, grown, own, {path.name for path in _made(out, asked.module)}, _results(out, asked, grown))

    def restore(self, out: Path) -> bool:
        """Take back what was left by a look that failed before it changed anything, or by more that failed before its first
        result; whether that was so. A command that makes nothing but a summary (`doctor`) has failed all the same."""
        if not self.results or _results(out, self.asked, self.grown) != self.results:
            return False
        for path in _made(out, self.asked.module):
            if path.name not in self.made:
                _remove(path)
        for name in (*OWN, STATE):
            if name in self.own:
                write_atomic(out / name, self.own[name].decode())
            else:
                (out / name).unlink(missing_ok=True)
        return True


def _results(out: Path, asked: Asked, grown: bool) -> dict[str, tuple[int, int]]:
    globs = getattr(asked.module, "HOLDS", ()) if grown else ("**/*",)
    names = ((path, str(path.relative_to(out))) for glob in globs for path in out.glob(glob) if path.is_file())
    files = (path for path, name in names if name not in (*OWN, STATE) and not is_ours(name))
    return {str(path): ((found := path.stat()).st_size, found.st_mtime_ns) for path in files}


# Which folder.


def record_of(module: Any, out: Path) -> Path:
    """Where a run keeps what is not its result (state.json, config.yaml, …): in `out`, or beside it as .NAME.run where the module
    says that `out` is handed to others (RECORD_BESIDE)."""
    return out.parent / f".{out.resolve().name}.run" if getattr(module, "RECORD_BESIDE", False) else out


def places(out: Path) -> list[Path]:
    """`out` and the folders beside it that were named for what differed."""
    return [out, *sorted(out.parent.glob(f"{_escaped(out.name)}-*"))]


def begun(command: str, module: Any, result: Mapping[str, Any], out: Path, given: bool) -> dict[str, Any] | None:
    """The state of a run of the same command that would go on, but for its precision and for phases that are added."""
    asked = {key: value for key, value in plain(result).items() if key not in ("precision", "phases", "longer")}
    for path in [out] if given else places(out):
        state = _known_state(record_of(module, path))
        if state is not None and state["command"] == command and asked.items() <= state["result"].items():
            return state
    return None


def choose(asked: Asked, out: Path, alone: bool) -> tuple[Path, str]:
    """Where a command goes whose `out` nobody gave, and in words why there: its own folder among `out` and `out`-…, else `out`
    itself, else a new one named by what differs. alone: one process; several would not see the same locks."""
    for path in places(out):
        state = _known_state(record_of(asked.module, path))
        if state is not None and (state["identity"] == asked.identity or grows(state, asked)):
            return path, "" if path == out else f"{asked.command}: {path} is its folder, as {out} holds another result"
    record = record_of(asked.module, out)
    state = read_state(record)
    if state is None or not (is_bound(record, state, asked) or (alone and busy(record))):
        return out, ""
    path = free_name(out, asked, state)
    return path, f"{asked.command}: {out} holds another result ({difference(out, asked, state)}); this one goes into {path}"


def free_name(out: Path, asked: Asked, state: dict[str, Any]) -> Path:
    """A folder beside `out`, named by what tells the result from the one in it."""
    words = asked.command if state["command"] != asked.command else "-".join(_words(state["result"], plain(asked.result)))
    short = re.sub(r"[^\w.+-]+", "-", words).strip("-.")[:_LONGEST].strip("-.")
    path = out.with_name(f"{out.name}-{short or asked.identity[:8]}")
    held = _known_state(record_of(asked.module, path))
    taken = path.exists() if held is None else held["identity"] != asked.identity
    return path.with_name(f"{path.name}-{asked.identity[:8]}") if taken and short else path


def refusal(out: Path, asked: Asked, state: dict[str, Any]) -> str:
    """Why `out` cannot take a result, and what to type."""
    there = free_name(out, asked, state)
    if state["command"] != asked.command:
        return f"{out} holds a result of `histoscale {state['command']}`; give another out=, such as out={there}"
    hint = getattr(asked.module, "CONTINUES", "")
    kind = "other inputs" if _changed_files(out, asked) else "other keys"
    rest = "or bring the old ones back" if kind == "other inputs" else "or the old values to continue"
    why = difference(out, asked, state)
    return f"{out} holds a result of {kind} ({why}); give another out=, such as out={there}, {rest}{hint}"


def difference(out: Path, asked: Asked, state: dict[str, Any]) -> str:
    """In words: files by name, keys with both values; facts only where nothing else says it."""
    if state["command"] != asked.command:
        return f"of `histoscale {state['command']}`"
    keys = _changed_keys(state["result"], plain(asked.result))
    said = [f"{key}: {old!r} there, {new!r} now" for key, (old, new) in keys.items()]
    files = _changed_files(out, asked)
    more = [f"and {len(files) - _SHOWN} more files"] if len(files) > _SHOWN else []
    if not files and not said:
        facts = _changed_keys(state["facts"], asked.facts)
        said = [f"{key}: {old!r} there, {new!r} now" for key, (old, new) in facts.items()]
    return "; ".join([*said, *files[:_SHOWN], *more])


def _changed_files(out: Path, asked: Asked) -> list[str]:
    return fingerprint.differences(fingerprint.load(record_of(asked.module, out) / fingerprint.LIST), asked.files)


def _changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    before, after = flatten(dict(old)), flatten(dict(new))
    both = {key: (before.get(key), after.get(key)) for key in sorted(before.keys() | after.keys())}
    return {key: (was, now) for key, (was, now) in both.items() if was != now}


def _words(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs, short: names and texts alone, other values with their key; nothing where that would be long."""
    found: list[str] = []
    for top in new:
        if old.get(top) == new[top]:
            continue
        before, now = (value if isinstance(value, Mapping) else {} for value in (old.get(top), new[top]))
        named = next((str(now[key]) for key in ("name", "kind") if now.get(key) != before.get(key)), None)
        if named:
            found.append(named)
            continue
        for key, (_, value) in _changed_keys({top: old.get(top)}, {top: new[top]}).items():
            text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append(text if isinstance(value, str) else f"{key.rpartition('.')[2]}-{text}")
    found = list(dict.fromkeys(found))
    return found if len("-".join(found)) <= _LONGEST else []


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
