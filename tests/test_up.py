"""up.py: how many workers the tests get, and that a command takes its place."""

import pytest

from histoscale.launch import up

GIB = 1 << 30


def on(monkeypatch: pytest.MonkeyPatch, cores: int, free: int) -> None:
    monkeypatch.setattr(up.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(up, "free_bytes", lambda: free)


@pytest.mark.parametrize("cores, free_gib, workers", [(1, 64, 0), (2, 64, 2), (2, 5, 0), (2, 6, 2), (8, 16, 5), (64, 1, 0)])
def test_a_worker_a_core_within_memory(monkeypatch: pytest.MonkeyPatch, cores: int, free_gib: int, workers: int) -> None:
    on(monkeypatch, cores, free_gib * GIB)
    found = up.spread(["tests/test_index.py", "-k", "name", "-x", "--no-header"])
    assert found == (["-n", str(workers), "--dist", "loadscope", "--no-loadscope-reorder"] if workers else [])


@pytest.mark.parametrize("said", [["-n", "0"], ["-n3"], ["--numprocesses=2"], ["--dist", "no"], ["--pdb"], ["-s"]])
def test_what_the_user_says_wins(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    on(monkeypatch, 8, 64 * GIB)
    assert up.spread([*said, "tests/test_index.py"]) == []


def test_memory_is_that_of_this_machine() -> None:
    assert 1 << 28 < up.free_bytes() < 1 << 45
