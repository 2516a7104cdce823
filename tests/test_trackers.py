"""Rows reach TensorBoard and Weights & Biases as written, from rank 0 alone, and never need the network."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from histoscale.data import secrets
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.secrets import hide_options
from histoscale.launch.trackers import TrackerError, tracked, wandb_mode

CONFIG = JournalConfig("off", 10, "off", "test", False)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def tell(out: Path, config: JournalConfig, main: bool, *rows: dict[str, Any]) -> None:
    journal = tracked(Journal(out, config, main), {"lr": 1})
    for row in rows:
        journal.row(**row)


def test_tensorboard_has_the_rows_and_hides_those_that_a_continuation_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = replace(CONFIG, tensorboard=True)
    first = [{"step": step, "loss": 1.0 / step, "online/knn": 0.5} for step in (1, 2, 3)]
    tell(tmp_path, config, True, {"changed": {"a": 1}}, *first)
    tell(tmp_path, config, True, {"resumed": 2}, {"step": 3, "loss": 9.0}, {"step": 4, "loss": 8.0})
    found = scalars(tmp_path / "tensorboard")
    assert found["loss"] == [(1, 1.0), (2, 0.5), (3, 9.0), (4, 8.0)] and len(found["online/knn"]) == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7  # JSON lines have all of it, always


def test_rank_0_alone_tells(tmp_path: Path) -> None:
    tell(tmp_path, replace(CONFIG, tensorboard=True, wandb="offline"), False, {"step": 1, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_without_a_tracker_the_journal_is_itself(tmp_path: Path) -> None:
    journal = Journal(tmp_path, CONFIG)
    assert tracked(journal, {}) is journal


def test_auto_is_online_only_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_mode("auto") == "offline" and wandb_mode("online") == "online"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode("auto") == "online" and wandb_mode("offline") == "offline"


@pytest.mark.slow
def test_wandb_keeps_the_rows_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(secrets, "_known", ())
    hide_options({"s3": {"secret": "cAnArY0123456789"}})
    tell(tmp_path / "out", replace(CONFIG, wandb="auto"), True, {"step": 1, "loss": 0.25, "note": "words stay in the JSON lines"})
    print("a library prints cAnArY0123456789", file=sys.stderr)
    wandb.finish()
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert [path for path, data in kept.items() if b"cAnArY0123456789" in data] == []
    assert any(b"a library prints ***" in data for data in kept.values())
    (run,) = (tmp_path / "out/wandb").glob("offline-run-*/run-*.wandb")
    assert run.stat().st_size > 0
    assert json.loads((tmp_path / "out/metrics.jsonl").read_text())["loss"] == 0.25


def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrackerError, match="logging.wandb is 'yes': expected one of off, auto, offline, online"):
        tracked(Journal(tmp_path, replace(CONFIG, wandb="yes")), {})
