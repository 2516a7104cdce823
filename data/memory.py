"""What reading holds in memory, what this machine has for it, and how much of the speed that was asked for fits."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from histoscale.data.keys import key
from histoscale.data.plan import SamplerConfig

IN_FLIGHT = 4.0  # of a visit that is being read: the pixels of its regions and their encoded bytes
HANDED_OVER = 2  # batches beside those that are ready: the one that is used, and the one that is put together
_LIMITS = (("memory.max", "memory.current", "inactive_file"),
           ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # fmt: skip


@dataclass(frozen=True)
class StreamConfig:
    """How patches are read; nothing here changes which.

    workers: processes a rank (0: none). In each of them: prefetch, batches that are ready ahead; in_flight, visits that are read
    at a time, most of them waiting for bytes; threads, how many of those decode at a time. memory_gb: what a rank may hold; null:
    its part of memory_share of what the machine has left. max_lost: the run stops when failed visits pass this share of all.
    """

    workers: int
    prefetch: int
    in_flight: int
    threads: int
    memory_gb: float | None
    memory_share: float
    max_lost: float


class MemoryTooSmall(ValueError):
    """The plan itself holds more than reading may; the message says which keys change that, and what they become."""


def steps_ahead(sampler: SamplerConfig, slots: int, config: StreamConfig) -> int:
    """How many steps ahead an owner of so many slots opens visits: `prefetch` are ready while `in_flight` visits are read."""
    return config.prefetch + math.ceil(config.in_flight * sampler.grid**2 / slots)


def open_patches(seed: int, sampler: SamplerConfig, slots: range) -> int:
    """The most patches that the open visits of these slots hold at any step: each is let go when it is taken, and lanes are at
    different ages, so that it is about half of slots x lanes x grid^2."""
    return _open_patches(seed, sampler.lanes_per_slot, sampler.grid**2, slots)


@lru_cache(maxsize=64)
def _open_patches(seed: int, lanes: int, per_visit: int, slots: range) -> int:
    ages = np.array([key(seed, "phase", slot, lane) % per_visit for slot in slots for lane in range(lanes)])
    lanes_of_age = np.bincount(ages, minlength=per_visit)
    left = np.arange(per_visit, 0, -1)  # of a visit by its age
    return max(int(np.roll(lanes_of_age, turn) @ left) for turn in range(per_visit))


def memory_bytes(seed: int, sampler: SamplerConfig, slots: range, config: StreamConfig) -> int:
    """What a rank's reading holds at most: patches of open visits, visits read ahead, regions and bytes of those that are being
    read, and batches that are handed over."""
    owners = max(1, min(config.workers, len(slots)))
    share = math.ceil(len(slots) / owners)
    early = steps_ahead(sampler, share, config) * len(slots)  # a step takes a patch of each slot: so many are read anew for it
    flying = IN_FLIGHT * config.in_flight * owners * sampler.grid**2
    batches = (config.prefetch + 2 + HANDED_OVER) * len(slots)
    return int(3 * sampler.patch_px**2 * (open_patches(seed, sampler, slots) + early + flying + batches))


@dataclass(frozen=True)
class Budget:
    """bytes: what a rank's reading may hold. words: where that comes from."""

    bytes: int
    words: str


def budget(config: StreamConfig) -> Budget:
    """Of stream.memory_gb, or what this machine has left for one of its ranks. Raises ValueError for a share outside 0 to 1."""
    if not 0 < config.memory_share <= 1:
        raise ValueError(f"stream.memory_share is {config.memory_share:g}: expected more than 0 and at most 1")
    if config.memory_gb is not None:
        return Budget(int(config.memory_gb * 1e9), f"stream.memory_gb={config.memory_gb:g}")
    ranks, left = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), available_bytes()
    among = f" for {ranks} processes" if ranks > 1 else ""
    words = f"stream.memory_share={config.memory_share:g} of the {left / 1e9:.1f} GB that this machine has left{among}"
    return Budget(int(left * config.memory_share / ranks), words)


def available_bytes(root: Path = Path("/")) -> int:
    """What this process may still take: of the machine, and of every control group (of either version) that it is in."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return min([free, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    try:
        groups = (root / "proc/self/cgroup").read_text(errors="surrogateescape").split("\n")  # names may hold blanks
    except FileNotFoundError:
        return
    for group in filter(None, groups):
        _, controllers, place = group.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        inside = mount / place.lstrip("/")  # in a container it may be another place than the one that is mounted
        for folder in (inside, *inside.parents):
            yield from _left_in(folder)
            if folder == mount:
                break


def _left_in(folder: Path) -> Iterator[int]:
    """Limit less use, what the system would give back not counted; nothing for a folder without a limit."""
    for limit, used, cache in _LIMITS:
        try:
            most = (folder / limit).read_text().strip()
            taken = int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:  # not there, or not for us to read
            continue
        if most != "max":
            yield max(0, int(most) - taken + int(stat.get(cache, 0)))


def fitted(
    seed: int, sampler: SamplerConfig, slots: range, config: StreamConfig, given: Budget, place: str = "", unit: int = 1
) -> tuple[StreamConfig, str]:
    """The configuration with as much of its speed as fits into the budget, and a line that says so.

    in_flight goes first, then prefetch, then workers; none of them changes a patch. place: what stands before the keys of a
    later phase. unit: a rank's slots are a multiple of it. Raises MemoryTooSmall when the plan is too large at any speed.
    """
    for slower in _slower(config):
        held = memory_bytes(seed, sampler, slots, slower)
        if held <= given.bytes:
            names = [name for name in ("in_flight", "prefetch", "workers") if getattr(slower, name) != getattr(config, name)]
            changed = ", ".join(f"stream.{name} {getattr(config, name)} -> {getattr(slower, name)}" for name in names)
            line = f"reading holds at most {held / 1e9:.1f} GB; it may hold {given.bytes / 1e9:.1f} GB ({given.words})"
            return slower, line + (f"; to fit, {changed}: slower, the same patches" if changed else "")
    raise MemoryTooSmall(_too_small(seed, sampler, slots, slower, given, place, unit))


def _slower(config: StreamConfig) -> Iterator[StreamConfig]:
    yield config
    for name, next_lower in (("in_flight", lambda n: n // 2), ("prefetch", lambda n: n - 1), ("workers", lambda n: n - 1)):
        while getattr(config, name) > 1:
            config = replace(config, **{name: next_lower(getattr(config, name))})
            yield config


def _too_small(
    seed: int, sampler: SamplerConfig, slots: range, config: StreamConfig, given: Budget, place: str, unit: int
) -> str:
    def fits(sampler: SamplerConfig, slots: range) -> bool:
        return memory_bytes(seed, sampler, slots, config) <= given.bytes

    needed = memory_bytes(seed, sampler, slots, config) / 1e9
    world = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    lanes = [n for n in range(sampler.lanes_per_slot - 1, 0, -1) if fits(replace(sampler, lanes_per_slot=n), slots)]
    grids = [n for n in range(sampler.grid - 1, 0, -1) if fits(replace(sampler, grid=n), slots)]
    batches = [n for n in range(len(slots) // unit * unit, 0, -unit) if n < len(slots) and fits(sampler, range(n))]
    mixed, fewer = f"visits of a slot mix, not {sampler.lanes_per_slot}", f"patches a visit, not {sampler.grid**2}"
    ways = [
        *[f"{place}sampler.lanes_per_slot={n} ({n} {mixed})" for n in lanes[:1]],
        *[f"{place}sampler.grid={n} ({n**2} {fewer}: more reading)" for n in grids[:1]],
        *[f"{place}optim.global_batch={n * world}" for n in batches[:1]],
    ]
    return (
        f"reading would hold {needed:.1f} GB and may hold {given.bytes / 1e9:.1f} GB ({given.words}): {len(slots)} slots x "
        f"{sampler.lanes_per_slot} lanes x {sampler.grid**2} patches of {sampler.patch_px} px. Where there is more memory, "
        f"stream.memory_gb={math.ceil(needed)}; or spread the batch over more machines; or choose one of these, which change "
        f"which patches are read: {'; '.join(ways) or 'a smaller batch, patch, grid'}"
    )
