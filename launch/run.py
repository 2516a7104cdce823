"""One way to run every command: compose, check, continue or refuse, record, and turn errors into one line."""

import fcntl
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from histoscale.data.journal import Journal, plain, scrub, scrubbed, write_atomic
from histoscale.launch.config import COMMANDS, Composed, ConfigError, flatten, load, under_torchrun
from histoscale.launch.doctor import quick_check
from histoscale.launch.explain import help_text
from histoscale.pretrain.preempted import Preempted

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: batch systems requeue on it


class Refused(ConfigError):
    """`out` holds another result than the one that this command would make."""


def execute(command: str, argv: list[str]) -> int:
    """Run a command as a program; the return value is its exit code."""
    try:
        if command in COMMANDS and {"--help", "-h"} & set(argv):
            print(help_text(command), flush=True)
            return 0
        if "--cfg" in argv:
            values = load(command, [a for a in argv if a != "--cfg"]).values
            print(yaml.safe_dump(scrubbed(values), sort_keys=False), end="", flush=True)
            return 0
        if under_torchrun():
            from torch.distributed.elastic.multiprocessing.errors import record

            record(invoke)(command, argv)  # torchrun then shows this rank's own traceback
        else:
            invoke(command, argv)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return 0 if under_torchrun() else EXIT_PREEMPTED  # torchrun restarts on any other code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if under_torchrun():
            raise
        if os.environ.get("HISTOSCALE_TRACEBACK"):
            print(scrub(traceback.format_exc()), file=sys.stderr)
        name = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        print(scrub(f"histoscale {command}: {name}{error}"), file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def invoke(command: str, overrides: list[str]) -> dict[str, Any]:
    """Run a command in this process and return its summary; raises what the command raises.

    With the same result identity in `out` it continues, or returns the finished summary (a command that says REPEATS looks again
    at what it was made from); with another it raises Refused.
    """
    composed = load(command, overrides)
    out = Path(composed.config.out)
    main = int(os.environ.get("RANK", "0")) == 0
    quick_check(out)
    facts = plain(composed.module.identity(composed.config)) if hasattr(composed.module, "identity") else {}
    result = {key: composed.values[key] for key in composed.result_keys}
    identity = digest({"command": command, "result": result, "facts": facts})
    journal = Journal(out, composed.config.logging, main)
    with _alone(out, main):
        state = _read_state(out)
        grown = state is not None and state["identity"] != identity and _grows(composed, command, state, result, facts)
        if state is not None and state["identity"] != identity and not grown:
            hint = getattr(composed.module, "CONTINUES", "")
            raise Refused(_difference(command, out, state, result, facts, hint))
        if state is not None and not grown and state["status"] == "done" and not getattr(composed.module, "REPEATS", False):
            journal.say(f"{command}: {out} already holds this result; nothing to do")
            return json.loads((out / "summary.json").read_text())
        if main:
            _note_changes(out, composed, journal)
            write_atomic(out / "config.yaml", yaml.safe_dump(scrubbed(composed.values), sort_keys=False))
            _write_state(out, command, identity, result, facts, "running")
        start = time.monotonic()
        try:
            summary = composed.module.run(composed.config, journal)
        except Preempted as stop:
            if main:
                _write_state(out, command, identity, result, facts, "preempted", preempted=True, step=stop.step)
            raise
        except (Exception, KeyboardInterrupt):
            if main:
                write_atomic(out / "error.log", traceback.format_exc())
                if state is None:
                    _forget_empty(out)
            raise
        journal.summary({**summary, "run": {"command": command, "identity": identity, "seconds": time.monotonic() - start}})
        if main:
            (out / "error.log").unlink(missing_ok=True)
            _write_state(out, command, identity, result, facts, "done")
    return summary


def digest(values: Any) -> str:
    """sha256 of the canonical JSON of plain values, 16 hex digits."""
    return hashlib.sha256(json.dumps(plain(values), sort_keys=True).encode()).hexdigest()[:16]


def _read_state(out: Path) -> dict[str, Any] | None:
    path = out / "state.json"
    return json.loads(path.read_text()) if path.exists() else None


def _write_state(
    out: Path, command: str, identity: str, result: dict[str, Any], facts: dict[str, Any], status: str, **more: Any
) -> None:
    state = {"command": command, "identity": identity, "status": status, "result": plain(result), "facts": facts, **more}
    write_atomic(out / "state.json", json.dumps(state, indent=2) + "\n")


def _forget_empty(out: Path) -> None:
    """A first run that failed before it made anything does not hold the folder to its keys."""
    if {file.name for file in out.iterdir()} <= {".lock", "config.yaml", "state.json", "error.log"}:
        (out / "state.json").unlink()
        (out / "config.yaml").unlink()


def _difference(command: str, out: Path, state: dict[str, Any], result: dict[str, Any], facts: dict[str, Any], hint: str) -> str:
    if state["command"] != command:
        return f"{out} holds a result of `histoscale {state['command']}`; give another out="
    old = flatten({**state["result"], "facts": state["facts"]})
    new = flatten({**plain(result), "facts": facts})
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    listed = "; ".join(f"{key.removeprefix('facts.')}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys)
    return f"{out} holds a result of other keys ({listed}); give another out=, or the old values to continue{hint}"


def _grows(composed: Composed, command: str, state: dict[str, Any], result: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether a command that can be continued by more (`pretrain` by phases) finds its own beginning in `out`."""
    continues = getattr(composed.module, "continues", None)
    return continues is not None and state["command"] == command and continues(state, {"result": plain(result), "facts": facts})


def _note_changes(out: Path, composed: Composed, journal: Journal) -> None:
    """Speed keys may change between continuations; each change is a row in metrics.jsonl."""
    path = out / "config.yaml"
    if not path.exists():
        return
    old, new = flatten(yaml.safe_load(path.read_text())), flatten(scrubbed(composed.values))
    changed = {key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}
    if changed:
        journal.row(changed=changed)


@contextmanager
def _alone(out: Path, main: bool) -> Iterator[None]:
    """Hold `out` against a second run on this machine."""
    if not main:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"another run is writing to {out}; wait for it, stop it, or give another out=") from None
        yield
