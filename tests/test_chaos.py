"""A few kills of tests/chaos.py; HISTOSCALE_CHAOS=50 asks for more, HISTOSCALE_CHAOS_SEED for others."""

import os
from pathlib import Path

import chaos
import pytest

KILLS, SEED = (
    int(os.environ.get(name, default)) for name, default in (("HISTOSCALE_CHAOS", "3"), ("HISTOSCALE_CHAOS_SEED", "1"))
)


@pytest.mark.slow
@pytest.mark.timeout(600 + 60 * KILLS)
def test_whatever_is_killed_the_results_are_those_of_a_calm_run(tmp_path: Path) -> None:
    killed = chaos.main(KILLS, SEED, tmp_path)
    assert killed.total() == KILLS and killed["rank"] > 0


def test_what_others_leave_is_not_ours(tmp_path: Path) -> None:
    """A live stream beside it has names in /dev/shm too."""
    partial, name = tmp_path / "a.partial", Path(f"/dev/shm/sem.hs{'0' * 12}-{os.getpid()}-0-x")  # of a host that nobody is
    partial.touch()
    name.touch()
    try:
        assert chaos.leftovers(set(), tmp_path) == [str(partial)]
        assert chaos.leftovers({os.getpid()}, tmp_path) == [str(partial), str(name)]
    finally:
        name.unlink()


def test_a_difference_is_found() -> None:
    """The comparison itself: one changed, one missing, one new."""
    assert chaos.differences({"a": b"1", "b": b"2", "c": 3}, {"a": b"1", "b": b"3", "d": 4}) == ["b", "c", "d"]
