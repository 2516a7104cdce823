"""Which process on which machine: told apart from all others, and whether it still lives."""

import hashlib
import os
import re
import socket
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_SIGNED = re.compile(r"hs([0-9a-f]{4})([0-9a-f]{4})([0-9a-f]{4})-(\d+)-([0-9a-f]+)")
_SILENT_S = 3600.0  # who has not written for so long is taken for gone where nobody can tell


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
    """For names of files that only this process writes: whoever finds one can ask whether it was `orphaned` or `abandoned`."""
    me = this_process()
    return f"hs{''.join(map(_short, _place()))}-{me.pid}-{me.started:x}"


def orphaned(name: str) -> bool:
    """Whether a name bears the signature of a process of this host that is gone: it died, or the host has booted since. Of names
    in a place that no other machine writes to."""
    signed, (host, boot, _) = _SIGNED.search(name), map(_short, _place())
    booted = signed is not None and signed[1] == host and signed[2] != boot
    return booted or _ended(name) is True


def abandoned(name: str, written: float) -> bool:
    """Whether nobody writes any more to what bears a name and was last written to at `written` (seconds since 1970), in a place
    that other machines may write to: they see no process of this one, and may have its host's name, as containers and clones do.
    """
    ended = _ended(name)
    return time.time() - written > _SILENT_S if ended is None else ended


def _ended(name: str) -> bool | None:
    """Whether the process is gone whose signature a name bears. None: it bears none, or one of another host, boot or space of
    process ids, and nobody can tell from here."""
    signed = _SIGNED.search(name)
    if signed is None or list(signed.groups()[:3]) != [_short(part) for part in _place()]:
        return None
    return lives(Process(machine(), int(signed[4]), int(signed[5], 16))) is False


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
