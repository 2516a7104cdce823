"""Files of JSON lines: a torn tail goes, rows that are computed again replace the old ones, and a full disk is named."""

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from histoscale.data.journal import Journal, append_rows, keep_rows, write_atomic
from histoscale.data.stream import forget_lost


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the same errors as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_torn_tail_is_dropped_when_the_file_is_opened_again(journal: Journal) -> None:
    path = journal.path("metrics.jsonl")
    journal.row(step=1, loss=0.5)
    whole = path.read_text()
    for torn in ('{"step": 2, "lo', '{"step": 2}', "{", '{"step": 2, "loss": 0.25, "name": "\u00e9'):
        path.write_bytes((whole + torn).encode()[:-1] if torn.endswith("\u00e9") else (whole + torn).encode())
        Journal(journal.out, journal.config).row(step=2, loss=0.4)
        assert rows(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]


def test_a_torn_line_in_the_middle_goes_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n')
    keep_rows(tmp_path / "a.jsonl", lambda row: True)
    assert rows(tmp_path / "a.jsonl") == [{"step": 1}, {"step": 4}]


def test_a_whole_file_is_left_alone_and_none_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    keep_rows(path, lambda row: False)
    assert not path.exists()
    append_rows(path, [{"step": 1}])
    before = path.stat()
    keep_rows(path, lambda row: True)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_lost_visits_of_steps_that_are_read_again_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "lost.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)) + '{"step"')
    forget_lost(path, 3)
    assert rows(path) == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_a_full_disk_names_the_file_and_loses_no_row_that_was_whole(journal: Journal) -> None:
    path = journal.path("metrics.jsonl")
    with full_at(4096), pytest.raises(OSError, match="metrics.jsonl") as full:
        for step in range(1000):
            journal.row(step=step, loss=0.5)
    assert full.value.errno == errno.EFBIG and path.stat().st_size == 4096
    Journal(journal.out, journal.config).row(step=-1)
    found = rows(path)
    assert [row["step"] for row in found] == [*range(len(found) - 1), -1] and len(found) > 100


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    with full_at(4096), pytest.raises(OSError, match="summary.json"):
        write_atomic(path, "n" * 5000)
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["summary.json"]
