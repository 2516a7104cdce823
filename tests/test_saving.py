"""Writing beside the training: what is written is the state at the call, errors are told, half-written folders go."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from histoscale.data.ranks import Ranks
from histoscale.pretrain import saving
from histoscale.pretrain.checkpoint import CheckpointConfig, CheckpointError, read_checkpoint, read_tensors, write_checkpoint
from histoscale.pretrain.saving import Saver

ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)
CONFIG = CheckpointConfig(every=1, keep_last=2, keep_every=10, asynchronous=True)


def test_training_goes_on_and_the_state_at_the_call_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def late(*arguments: Any) -> Path:
        assert gate.wait(60)
        return write_checkpoint(*arguments)

    monkeypatch.setattr(saving, "write_checkpoint", late)
    x = torch.arange(6.0)
    with Saver(tmp_path, CONFIG, ALONE) as saver:
        saver.save(1, {"x": x}, {})
        assert not (tmp_path / "step-1").exists()  # the call returned before anything was written
        x.zero_()
        gate.set()
        saver.save(2, {"x": x}, {})
        assert (tmp_path / "step-1").exists()  # one at a time
    assert torch.equal(read_tensors(read_checkpoint(tmp_path / "step-1"), "x")[""], torch.arange(6.0))
    assert torch.equal(read_tensors(read_checkpoint(tmp_path / "step-2"), "x")[""], torch.zeros(6))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_kept_is_the_same_either_way(tmp_path: Path, asynchronous: bool) -> None:
    config = CheckpointConfig(every=5, keep_last=2, keep_every=10, asynchronous=asynchronous)
    with Saver(tmp_path, config, ALONE) as saver:
        for step in range(5, 40, 5):
            saver.save(step, {"x": torch.tensor(float(step))}, {})
    kept = sorted(read_checkpoint(path).step for path in tmp_path.iterdir())
    assert kept == [10, 20, 30, 35]
    assert all(float(read_tensors(read_checkpoint(tmp_path / f"step-{n}"), "x")[""]) == n for n in kept)


def test_an_error_of_the_thread_is_told_at_the_next_call(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, CONFIG, ALONE)
    folder.write_text("a file is in the way")
    saver.save(1, {"x": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="step-1 was not written .*earlier checkpoints are intact"):
        saver.save(2, {"x": torch.zeros(1)}, {})
    folder.unlink()
    saver.save(3, {"x": torch.zeros(1)}, {})
    saver.wait()
    assert read_checkpoint(folder).step == 3
    with pytest.raises(CheckpointError, match="step-4"), saver:
        (folder / "step-3").rename(tmp_path / "aside")
        folder.rmdir()
        folder.write_text("again")
        saver.save(4, {"x": torch.zeros(1)}, {})


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, {"x": torch.zeros(1)}, {}, ALONE)
    (tmp_path / "step-7.partial").mkdir()
    (tmp_path / "step-7.partial/shard.safetensors").write_bytes(b"half")
    Saver(tmp_path, CONFIG, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


def test_a_damaged_later_one_takes_nobodys_place(tmp_path: Path) -> None:
    for step in (4, 8):
        write_checkpoint(tmp_path, step, {"x": torch.zeros(1)}, {}, ALONE)
    (tmp_path / "step-8/state.json").unlink()  # the run goes on from 4
    config = CheckpointConfig(every=1, keep_last=1, keep_every=None, asynchronous=True)
    with Saver(tmp_path, config, ALONE) as saver:
        saver.save(6, {"x": torch.ones(1)}, {})
    assert read_checkpoint(tmp_path).step == 6
