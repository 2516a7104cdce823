"""A checkpoint is there whole or not at all: cut, changed, unfinished, on a full disk, killed in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from histoscale.data.ranks import Ranks
from histoscale.pretrain.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    load_tensors,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    read_tensors,
    write_checkpoint,
)

ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)
# In a child: checkpoint 1 is written; then a limit, or an end, strikes inside the writing of checkpoint 2.
CHILD = """
import os, resource, signal, sys
from pathlib import Path
import torch
from histoscale.data.ranks import Ranks
from histoscale.pretrain.checkpoint import CheckpointError, write_checkpoint
folder, fault = Path(sys.argv[1]), sys.argv[2]
ranks = Ranks(0, 1, 0, torch.device("cpu"), False)
tensors = {"a": torch.arange(50_000.0), "b": torch.ones(3)}
write_checkpoint(folder, 1, tensors, {}, ranks)
def die(event, arguments):
    if event == fault and "step-2" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)
if fault == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
else:
    sys.addaudithook(die)
try:
    write_checkpoint(folder, 2, tensors, {}, ranks)
except CheckpointError as error:
    print(error)
"""


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "student.backbone.w": torch.randn(5, 7, generator=generator),
        "teacher.backbone.w": torch.randn(5, 7, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0),
        "count": torch.arange(4),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, tensors(), {"identity": {"seed": 0}}, ALONE)
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    state = read_checkpoint(folder)
    assert state.step == 3 and state.facts == {"identity": {"seed": 0}} and len(state.hash) == 64
    into = {name: torch.empty_like(x) for name, x in tensors().items()}
    load_tensors(state, into, ALONE)
    assert all(torch.equal(into[name], x) for name, x in tensors().items())
    only = read_tensors(state, "teacher.backbone.")
    assert only.keys() == {"w"} and torch.equal(only["w"], tensors()["teacher.backbone.w"])


def test_nothing_in_it_is_a_pickle(folder: Path) -> None:
    assert {path.suffix for path in (folder / "step-3").iterdir()} == {".safetensors", ".json"}


def shard(folder: Path) -> Path:
    return next((folder / "step-3").glob("*.safetensors"))


def cut(folder: Path) -> None:
    os.truncate(shard(folder), shard(folder).stat().st_size // 2)


def flip(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[-1] ^= 1
    shard(folder).write_bytes(data)


def drop_shard(folder: Path) -> None:
    shard(folder).unlink()


def foreign_shard(folder: Path) -> None:
    shutil.copy(shard(folder), folder / "step-3" / "shard-00009-model-00001-of-00001.safetensors")


def drop_state(folder: Path) -> None:
    (folder / "step-3/state.json").unlink()


def cut_state(folder: Path) -> None:
    os.truncate(folder / "step-3/state.json", 40)


def other_format(folder: Path) -> None:
    state = json.loads((folder / "step-3/state.json").read_text())
    (folder / "step-3/state.json").write_text(json.dumps({**state, "format": 99}))


def unfinished(folder: Path) -> None:
    (folder / "step-3").rename(folder / "step-3.partial")


def path_escape(folder: Path) -> None:
    state = json.loads((folder / "step-3/state.json").read_text())
    listed = {"../step-2/" + shard(folder).name: state["shards"][shard(folder).name]}
    (folder / "step-3/state.json").write_text(json.dumps({**state, "shards": listed}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [(cut, "bytes"), (flip, "sha256"), (drop_shard, "shards"), (foreign_shard, "shards"), (drop_state, "no state.json"),
     (cut_state, "cannot be read"), (other_format, "format 99"), (unfinished, "never finished"), (path_escape, "shards")],
)  # fmt: skip
def test_a_damaged_one_does_not_exist_and_the_reason_is_told(folder: Path, damage: object, words: str) -> None:
    damage(folder)  # type: ignore[operator]
    state, skipped = newest_checkpoint(folder)
    assert state is not None and state.step == 2
    assert len(skipped) == 1 and "step-3" in skipped[0] and words in skipped[0]


def test_names_shapes_and_types_must_fit_exactly(folder: Path) -> None:
    state = read_checkpoint(folder)
    for change, words in (
        ({"more": torch.zeros(1)}, "lacks more"),
        ({"student.backbone.w": torch.zeros(5, 8)}, r"\[5, 7\].*\[5, 8\]"),
        ({"count": torch.zeros(4)}, "int64"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_tensors(state, {**tensors(), **change}, ALONE)
    with pytest.raises(CheckpointError, match="beyond it, scalar"):
        load_tensors(state, {name: x for name, x in tensors().items() if name != "scalar"}, ALONE)
    with pytest.raises(CheckpointError, match="nobody"):
        read_tensors(state, "nobody.")


def test_pruning_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    for step in (10, 20, 25, 30, 35):
        write_checkpoint(tmp_path, step, {"x": torch.zeros(1)}, {}, ALONE)
    prune_checkpoints(tmp_path, 35, CheckpointConfig(every=5, keep_last=2, keep_every=20, asynchronous=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-20", "step-30", "step-35"]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"command": "pretrain", "status": "preempted"}, "a run of `histoscale pretrain` without a checkpoint yet .*preempted"),
        ({"command": "index", "status": "done"}, "is a result of `histoscale index`, not a checkpoint"),
        ({"step": 4}, "state.json cannot be read"),
        ([], "state.json cannot be read"),
    ],
)
def test_results_of_commands_are_no_checkpoints(tmp_path: Path, state: object, words: str) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("path", "words"), [("nowhere", "no such folder"), ("", "no state.json")], ids=["absent", "empty"]
)
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, path: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path / path)


@pytest.mark.parametrize("fault", ["full", "os.rename"])
def test_a_full_disk_or_a_kill_leaves_the_previous_one(tmp_path: Path, fault: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path, fault], env=environment, capture_output=True, text=True, check=False
    )
    state, skipped = newest_checkpoint(tmp_path)
    assert state is not None and state.step == 1
    if fault == "full":
        assert child.returncode == 0, child.stderr
        assert "step-2 was not written" in child.stdout and "earlier checkpoints are intact" in child.stdout
        assert skipped == []
    else:
        assert child.returncode == -signal.SIGKILL
        assert skipped == ["step-2.partial: its writing never finished"]
    assert torch.equal(read_tensors(state, "a")[""], torch.arange(50_000.0))
    write_checkpoint(tmp_path, 2, {"a": torch.zeros(1)}, {}, ALONE)  # what was left does not stand in the way
    assert read_checkpoint(tmp_path).step == 2
