"""One way to run every command: compose, check, continue or refuse, record, and turn errors into one line."""

import os
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import yaml

from histoscale.data import fingerprint
from histoscale.data.journal import Journal, names_file, plain, write_atomic, write_text
from histoscale.data.processes import stop_with_parent
from histoscale.data.secrets import scrub, scrub_streams, scrubbed
from histoscale.launch import held, lease
from histoscale.launch.config import COMMANDS, Composed, flatten, load, shown, under_torchrun
from histoscale.launch.explain import help_text
from histoscale.launch.held import record_of
from histoscale.launch.lease import Refused
from histoscale.launch.overrides import ConfigError
from histoscale.launch.precision import settled
from histoscale.pretrain.preempted import Preempted, stoppable, was_asked

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: batch systems requeue on it
EXIT_UNREAD = 141  # as a shell says of a program that SIGPIPE ends


class RankFailed(RuntimeError):
    """What a rank failed with, as text without credentials."""


def execute(command: str, argv: list[str]) -> int:
    """Run a command as a program; the return value is its exit code."""
    scrub_streams()
    try:
        if command in COMMANDS and {"--help", "-h"} & set(argv):
            return answer(help_text(command, everything="all" in argv))
        if "--cfg" in argv:
            values = shown(command, [word for word in argv if word != "--cfg"])
            return answer(yaml.safe_dump(scrubbed(values), sort_keys=False, allow_unicode=True).rstrip())
        if under_torchrun():
            from torch.distributed.elastic.multiprocessing.errors import record

            stop_with_parent()
            record(_on_rank)(command, argv)  # torchrun then shows the traceback of what nobody expected
        else:
            with stoppable():
                invoke(command, argv, True)
    except Preempted as stop:
        _tell(str(stop))
        return 0 if under_torchrun() else EXIT_PREEMPTED  # torchrun restarts on any other code
    except KeyboardInterrupt:
        _tell("interrupted; the same command goes on")
        return 130
    except BrokenPipeError:  # whoever read the output, `head` say, has gone; what was under way is not done
        _discard(sys.stdout, sys.stderr)
        return EXIT_UNREAD
    except (ValueError, OSError) as error:
        return _said(command, error)
    return 0


def _said(command: str, error: Exception) -> int:
    """Print what ends a command, in a sentence; the exit code."""
    if os.environ.get("HISTOSCALE_TRACEBACK"):
        traceback.print_exc()
    name = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    _tell(f"histoscale {command}: {name}{str(error).removeprefix(f'{command}: ')}")
    return EXIT_USER_ERROR


def _tell(line: str) -> None:
    """Written at once: under torchrun all ranks share one stream, and under PYTHONUNBUFFERED `print` writes a line in two."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _on_rank(command: str, argv: list[str]) -> None:
    """Raises SystemExit after what ends a plain process in a sentence too: no traceback of it goes into torchrun's report. Raises
    RankFailed for what nobody expected: torchrun writes it, and what it came from, into its own file."""
    try:
        with stoppable():
            invoke(command, argv, True)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        raise SystemExit(_said(command, error)) from None
    except Exception as error:
        raise RankFailed(scrub(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")) from None


def answer(text: str) -> int:
    """Print for a reader, who may stop reading (`| head`); the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)
    return 0


def _discard(*streams: TextIO) -> None:
    """What is still buffered for a reader who is gone would be a traceback at exit."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def invoke(command: str, overrides: list[str], typed: bool = False) -> dict[str, Any]:
    """Run a command in this process and return its summary; raises what the command raises.

    typed: by a user, who is told at the end what to open and what to type next (the command's `what_next`).

    With the same result in `out` it continues, or returns the finished summary (a command that says REPEATS looks again at what
    it was made from); where another result stands it raises Refused, or takes a folder of its own if nobody gave `out`.
    """
    composed = load(command, overrides)
    from histoscale.data.ranks import survivors  # torch, and clients of stores, which no refusal of a key waits for
    from histoscale.launch.doctor import quick_check

    out = Path(composed.config.out)
    world, main = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")) == 0
    quick_check(out)
    given = any(text.lstrip("+").startswith("out=") for text in overrides)
    composed, decided = settled(composed, held.begun(command, composed.module, result_of(composed), out, given))
    asked = asked_of(command, composed, out)
    out, why = (out, "") if given else held.choose(asked, out, world == 1)
    composed = replace(composed, config=replace(composed.config, out=str(out)), values={**composed.values, "out": str(out)})
    out = record_of(composed.module, out)
    journal = Journal(out, composed.config.logging, main)
    for line in filter(None, (decided, why)):
        journal.say(line)
    with lease.alone(out, journal.say) if main else nullcontext() as holding:
        state = held.read_state(out)
        grown = state is not None and held.grows(state, asked)
        bound = state is not None and held.is_bound(out, state, asked)
        if state is not None and bound and state["identity"] != asked.identity and not grown:
            raise Refused(held.refusal(Path(composed.config.out), asked, state))
        if state is not None and not grown and state["status"] == "done" and not getattr(composed.module, "REPEATS", False):
            summary = held.finished(out, state)
            journal.say(f"{command}: {out} already holds this result; nothing to do")
            return _told_next(composed, summary, journal, typed)
        found: list[str] = []
        before: held.Standing | None = None
        if main:
            if state is not None and state["status"] != "done":
                held.sweep(out)
            if state is not None and (grown or state["status"] == "done"):
                before = held.Standing.of(out, asked, grown)
            found = held.begin(out, asked, state)
            if bound:
                _note_changes(out, composed, journal)
            held.write_state(out, asked, "running", found, bound)  # first: without it the others are nobody's
            write_atomic(out / "config.yaml", yaml.safe_dump(scrubbed(composed.values), sort_keys=False))
            fingerprint.save(out / fingerprint.LIST, asked.files, asked.noted)
        start = time.monotonic()
        try:
            with names_file(out), survivors():
                summary = composed.module.run(composed.config, journal)
            if holding is not None:
                holding.check()  # what was deleted or taken over meanwhile is no result
        except Preempted as stop:
            if holding is not None and holding.kept() and not (before is not None and before.restore(out)):
                held.write_state(out, asked, "preempted", found, bound, preempted=True, step=stop.step)
            raise
        except (Exception, KeyboardInterrupt):
            if holding is not None:
                holding.check()  # why everything else failed; and nothing more is written there
                with suppress(OSError):  # a disk that is full must not hide what happened
                    if before is not None and before.restore(out):
                        pass  # what had a result stands as it did
                    elif was_asked():
                        held.write_state(out, asked, "preempted", found, bound, preempted=True, step=None)
                    else:
                        write_text(out / "error.log", scrub(traceback.format_exc()))
                        held.write_state(out, asked, "failed", found, bound)
            raise
        if main:
            (out / held.SUMMARY).unlink(missing_ok=True)  # what an earlier look found is none of this one's
        run = {"command": command, "identity": asked.identity, "seconds": time.monotonic() - start}
        journal.summary({**summary, "run": run})
        if main:
            (out / "error.log").unlink(missing_ok=True)
            held.write_state(out, asked, "done", found, True)
    return _told_next(composed, summary, journal, typed)


def _told_next(composed: Composed, summary: dict[str, Any], journal: Journal, typed: bool) -> dict[str, Any]:
    if typed and hasattr(composed.module, "what_next"):
        journal.say(composed.module.what_next(composed.config, summary))
    return summary


def result_of(composed: Composed) -> dict[str, Any]:
    """The result keys, as they are kept; what is read goes by its last name, as its content stands beside."""
    inputs = getattr(composed.module, "INPUTS", ())
    values = composed.values
    return scrubbed({key: held.input_name(values[key]) if key in inputs else values[key] for key in composed.result_keys})


def asked_of(command: str, composed: Composed, out: Path) -> held.Asked:
    """What the command would make, from its result keys and from everything that it reads."""
    module, values = composed.module, composed.values
    result = result_of(composed)
    roots: dict[str, str] = {}
    for key in getattr(module, "INPUTS", ()):
        rows = values[key] if isinstance(values[key], list) else [values[key]]
        roots |= {f"{key}.{i}" if len(rows) > 1 else key: str(row) for i, row in enumerate(rows) if row is not None}
    own = next((key for key, root in roots.items() if os.path.abspath(os.path.expanduser(root)) == os.path.abspath(out)), None)
    if own is not None:
        raise ConfigError(f"out={out} is what {own}= names, which is read: give another folder, such as out={out / command}")
    for place in held.places(out):
        fingerprint.load(record_of(module, place) / fingerprint.LIST)  # what rests is not read again
    with fingerprint.noting() as noted:
        try:
            facts = scrubbed(plain(module.identity(composed.config))) if hasattr(module, "identity") else {}
        except (ValueError, OSError) as error:
            state = held.read_state(record_of(module, out))
            if state is not None and state["status"] == "done" and state["result"] == plain(result):
                kept = f"{out} holds a finished result of these keys, which stays, but its inputs cannot be looked at any more"
                raise ConfigError(f"{kept}: {error}") from error
            raise
    return held.Asked(command, module, result, facts, scrubbed(fingerprint.by_key(noted.files, roots)), noted)


def _note_changes(out: Path, composed: Composed, journal: Journal) -> None:
    """Speed keys may change between continuations; each change is a row in metrics.jsonl."""
    path = out / "config.yaml"
    if not path.exists():
        return
    try:
        old, new = flatten(yaml.safe_load(path.read_bytes())), flatten(scrubbed(composed.values))
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is damaged ({why}): delete it, and the same command goes on and writes it anew") from None
    changed = {key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}
    if changed:
        journal.row(changed=changed)
