"""Every parser under mutated inputs: a named error or a right result, in 5 s and 512 MB. HISTOSCALE_FUZZ_S: of a slow test."""

import os
import random
from pathlib import Path

import pytest
from fuzz.engine import MOST_MB, MOST_S, fuzzed, mutated


def asked_s(default: float) -> float:
    return float(os.environ.get("HISTOSCALE_FUZZ_S", default))


lasting = pytest.mark.timeout(600 + asked_s(0.0))


def run(module: str, seconds: float, folder: Path, seed: int) -> None:
    outcomes = fuzzed(module, seconds, folder, seed)
    for one in outcomes:
        print(f"{one.target}: {one.executions} inputs, {one.outcomes} outcomes, slowest {one.slowest_s} s, peak {one.peak_mb} MB")
    assert not any(one.findings for one in outcomes), "\n\n".join(text for one in outcomes for text in one.findings)
    assert all(one.executions > 0 and one.slowest_s < MOST_S and one.peak_mb < MOST_MB for one in outcomes)


def test_parsers(tmp_path: Path) -> None:
    run("fuzz.parsers", 4.0, tmp_path, 0)


@lasting
@pytest.mark.slow
def test_parsers_for_longer(tmp_path: Path) -> None:
    run("fuzz.parsers", asked_s(25.0), tmp_path, 1)


def test_planted_faults_are_found(tmp_path: Path) -> None:
    """An error of another kind, a wrong result, memory, and an input without an end."""
    found = {one.target: "".join(one.findings) for one in fuzzed("fuzz.planted", 2.0, tmp_path)}
    for target, words in {
        "other": "KeyError",
        "wrong": "a wrong result",
        "large": "MemoryError",
        "endless": "in _endless",
    }.items():
        assert words in found[target], found


def test_mutations_reach_far_and_repeat_by_their_seed() -> None:
    seeds = [b"<a x='1'>", b"{}"]
    made = [[mutated(seeds[i % 2], seeds, [b"<b "], random.Random(i)) for i in range(2000)] for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 1000
    assert any(text.count(b"<b ") > 1000 for text in made[0]) and any(b"\xff\xff\xff\xff" in text for text in made[0])
