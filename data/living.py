"""Which process on which machine: told apart from all others, and whether it still lives."""

import hashlib
import os
import re
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_SIGNED = re.compile(r"hs([0-9a-f]{4})([0-9a-f]{4})([0-9a-f]{4})-(\d+)-([0-9a-f]+)")


@dataclass(frozen=True)
class Process:
    """machine: host, boot and space of process ids, since containers of one host may share a disk and not see each other.

    started: clock ticks after the boot, as ids are given away again; 0 where the system does not tell.
    """

    machine: str
    pid: int
    started: int


@cache
def _place() -> tuple[str, str, str]:
    """This host, its boot and the space of process ids; empty where the system does not tell."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    there = boot.exists() and space.is_symlink()
    return socket.gethostname(), *((boot.read_text().strip(), os.readlink(space)) if there else ("", ""))


def machine() -> str:
    """Where the ids of processes mean what they mean here."""
    return " ".join(_place())


def this_process() -> Process:
    pid = os.getpid()
    return Process(machine(), pid, _seen(pid)[1])


def lives(process: Process, here: str | None = None) -> bool | None:
    """None: it is on another machine than `here` (null: this one), and nobody can tell from here."""
    if process.machine != (here or machine()):
        return None
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    state, started = _seen(process.pid)
    return state not in ("Z", "X") and (0 in (started, process.started) or started == process.started)


def signature() -> str:
    """For names of files that only this process writes: whoever finds one can ask whether it was `orphaned`."""
    me = this_process()
    return f"hs{''.join(map(_short, _place()))}-{me.pid}-{me.started:x}"


def orphaned(name: str) -> bool:
    """Whether a name bears the signature of a process of this host that is gone: it died, or the host has booted since."""
    signed = _SIGNED.search(name)
    if signed is None:
        return False
    host, boot, space, pid, started = signed.groups()
    here = [_short(part) for part in _place()]
    if host != here[0] or (boot == here[1] and space != here[2]):  # others, whom one cannot see from here
        return False
    return boot != here[1] or lives(Process(machine(), int(pid), int(started, 16))) is False


def _short(part: str) -> str:
    return hashlib.sha256(part.encode()).hexdigest()[:4]


def _seen(pid: int) -> tuple[str, int]:
    """State and start of a process by proc(5); '' and 0 where there is no such thing to read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", 0
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])
