"""What reading holds is what was said: patches are let go as they are taken, and the machine's own limits are found."""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from histoscale.data.memory import (
    Budget,
    MemoryTooSmall,
    StreamConfig,
    available_bytes,
    budget,
    fitted,
    memory_bytes,
    open_patches,
    steps_ahead,
)
from histoscale.data.pixelfilter import PixelFilterConfig
from histoscale.data.plan import Plan, SamplerConfig, SlideTable, Visit
from histoscale.data.stream import Stream
from histoscale.data.visit import Patches

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
READING = StreamConfig(**yaml.safe_load((CONFIGS / "stream/default.yaml").read_text()))
MACHINE = "MemTotal: 9000 kB\nMemAvailable:    2000000 kB\n"


def sampler(**keys: object) -> SamplerConfig:
    values = yaml.safe_load((CONFIGS / "sampler/default.yaml").read_text()) | {"mpps": [1.0], "weights": [1], "patch_px": 8}
    return SamplerConfig(**{**values, "pixel_filter": PixelFilterConfig(**values["pixel_filter"]), **keys})


def table(slides: int = 6) -> SlideTable:
    names = [f"s{i}" for i in range(slides)]
    return SlideTable(names, names, names, names, names, np.ones(slides), np.ones((slides, 1), bool))


class Counted:
    """A source without slides that knows which of its patches are still somewhere."""

    def __init__(self, config: SamplerConfig) -> None:
        self.config, self.slide_ids = config, table().slide_ids
        self.given: list[weakref.ref[np.ndarray]] = []
        self.lock = threading.Lock()

    def decode_threads(self, count: int) -> None:
        pass

    def table(self) -> SlideTable:
        return table()

    def describe(self, slide: int) -> tuple[str, str, str]:
        return "", "", ""

    def traffic(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def read(self, visit: Visit) -> Patches:
        side, many = self.config.patch_px, self.config.grid**2
        pixels: Sequence[np.ndarray] = [np.full((side, side, 3), i, np.uint8) for i in range(many)]
        with self.lock:
            self.given += map(weakref.ref, pixels)
        zeros = np.zeros(many, np.int64)
        return Patches(pixels, zeros, zeros, 0, 1.0, many, many, 0)

    def alive(self) -> int:
        with self.lock:
            return sum(one() is not None for one in self.given)


@pytest.mark.parametrize(("batch", "lanes", "grid", "start"), [(8, 4, 4, 0), (8, 4, 4, 37), (5, 3, 2, 11), (6, 1, 3, 2)])
def test_open_visits_hold_what_is_still_to_be_taken(batch: int, lanes: int, grid: int, start: int) -> None:
    config = sampler(lanes_per_slot=lanes, grid=grid)
    plan, source = Plan(5, batch, config, table()), Counted(config)
    reading = replace(READING, workers=0, in_flight=1, prefetch=1, threads=1)
    most = open_patches(5, config, range(batch)) + (steps_ahead(config, batch, reading) + 1) * batch
    found = []
    with Stream(plan, source, reading, start=start) as stream:
        for _ in range(3 * lanes * grid**2):
            next(stream)
            found.append(source.alive())
    assert max(found) <= most < 0.8 * batch * lanes * grid**2 + (steps_ahead(config, batch, reading) + 1) * batch
    held = [0] * (lanes * grid**2)
    for step in range(len(held)):  # the bound is one that is reached: the patches of all lanes, at every step of a visit
        places = (plan.place(later, slot) for later in range(step, step + lanes) for slot in range(batch))
        held[step] = sum(len(plan.numbers_left(place)) for place in places)
    assert max(held[::lanes]) == open_patches(5, config, range(batch))


def test_speed_goes_before_anything_else_and_says_so() -> None:
    config, slots = sampler(), range(64)
    fast = replace(READING, in_flight=16, prefetch=4, workers=3)
    plain, line = fitted(0, config, slots, fast, Budget(10**9, "enough"))
    assert plain == fast and line == "reading holds at most 0.0 GB; it may hold 1.0 GB (enough)"
    seen = []
    for share in np.linspace(1.0, 0.3, 60):
        given = Budget(int(memory_bytes(0, config, slots, fast) * share), "little")
        try:
            slower, line = fitted(0, config, slots, fast, given)
        except MemoryTooSmall as error:
            assert "sampler.lanes_per_slot=3 (3 visits of a slot mix, not 4)" in str(error) and "sampler.grid=3" in str(error)
            assert "optim.global_batch=" in str(error)
            break
        assert memory_bytes(0, config, slots, slower) <= given.bytes
        assert (slower == fast) == ("to fit" not in line)
        seen.append((slower.in_flight, slower.prefetch, slower.workers))
    assert seen == sorted(seen, reverse=True) and seen[0] == (16, 4, 3) and (1, 4, 3) in seen
    assert all(flight == 1 for flight, ahead, _ in seen if ahead < 4) and all(ahead == 1 for _, ahead, n in seen if n < 3)


def test_what_a_refusal_offers_fits() -> None:
    config, slots = sampler(patch_px=64), range(48)
    given = Budget(memory_bytes(0, config, slots, replace(READING, in_flight=1, prefetch=1, workers=1)) * 2 // 3, "given")
    with pytest.raises(MemoryTooSmall, match="phases.b.sampler.lanes_per_slot=") as refused:
        fitted(0, config, slots, READING, given, "phases.b.", 12)
    offered = dict(part.split("=") for part in str(refused.value).replace("(", " ").split() if part.startswith("phases.b."))
    lanes, grid, batch = (int(value.strip(";")) for value in offered.values())
    assert list(offered) == ["phases.b.sampler.lanes_per_slot", "phases.b.sampler.grid", "phases.b.optim.global_batch"]
    fitted(0, replace(config, lanes_per_slot=lanes), slots, READING, given)
    fitted(0, replace(config, grid=grid), slots, READING, given)
    fitted(0, config, range(batch), READING, given)
    assert batch % 12 == 0
    with pytest.raises(MemoryTooSmall):
        fitted(0, replace(config, lanes_per_slot=lanes + 1), slots, READING, given)


def machine(root: Path, groups: str, **files: str) -> Path:
    for name, text in {"proc/meminfo": MACHINE, "proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_control_groups_of_both_versions_and_their_parents_limit(tmp_path: Path) -> None:
    assert available_bytes(machine(tmp_path / "none", "0::/\n")) == 2000000 << 10
    second = {
        "sys/fs/cgroup/job/memory.max": "900000000", "sys/fs/cgroup/job/memory.current": "300000000",
        "sys/fs/cgroup/job/memory.stat": "anon 5\ninactive_file 100000000\n", "sys/fs/cgroup/job/step/memory.max": "max",
        "sys/fs/cgroup/job/step/memory.current": "1", "sys/fs/cgroup/job/step/memory.stat": "inactive_file 0\n",
    }  # fmt: skip
    assert available_bytes(machine(tmp_path / "v2", "0::/job/step\n", **second)) == 700000000
    contained = {f"sys/fs/cgroup/{name.rpartition('/')[2]}": text for name, text in list(second.items())[:3]}
    assert available_bytes(machine(tmp_path / "docker", "0::/elsewhere/on/the/host\n", **contained)) == 700000000
    first = {
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "500000000", "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "600000000",
        "sys/fs/cgroup/memory/a/memory.stat": "total_inactive_file 0\n",
    }  # fmt: skip
    assert available_bytes(machine(tmp_path / "v1", "5:cpu:/a\n4:memory:/a\n", **first)) == 0
    named = {f"sys/fs/cgroup/my job \u2028 1/{name.rpartition('/')[2]}": text for name, text in list(second.items())[:3]}
    blanks = machine(tmp_path / "blanks", "1:name=a b:/x\n0::/my job \u2028 1\n", **named)
    assert available_bytes(blanks) == 700000000
    assert available_bytes() > 0


def test_ranks_of_a_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget(replace(READING, memory_gb=2.5)).bytes == 2_500_000_000
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = budget(READING)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = budget(READING)
    assert shared.bytes * 4 == pytest.approx(alone.bytes, rel=0.3) and shared.words.endswith("has left for 4 processes")
    with pytest.raises(ValueError, match="stream.memory_share is 0"):
        budget(replace(READING, memory_share=0.0))
