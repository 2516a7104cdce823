"""Devices and ranks from outside: copies, clipping, the moving average, and training on two and three processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from histoscale.data.ranks import Ranks
from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors
from histoscale.pretrain.methods import build
from histoscale.pretrain.parallel import HardwareConfig, Parallel, prepare
from histoscale.pretrain.trainer import train

ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)
HARDWARE = HardwareConfig(
    device="cpu", threads=1, deterministic=True, timeout_s=60.0, attention="auto", compile=False, activation_checkpointing=False,
    shard_over="none", reshard_after_forward=True,
)  # fmt: skip
PROGRAM = Path(__file__).with_name("train_tiny.py")
TWENTY = ["checkpoint.every=20", "schedule.steps=20"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def module() -> ModuleType:
    """train_tiny, by its path."""
    spec = spec_from_file_location("train_tiny", PROGRAM)
    assert spec is not None and spec.loader is not None
    tiny = module_from_spec(spec)
    spec.loader.exec_module(tiny)
    return tiny


def branches() -> tuple[nn.Module, nn.Module]:
    """Two sub-modules with gradients of very different size."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(nn.ModuleDict({"backbone": nn.Linear(6, 5), "head": nn.Linear(5, 4)}))
    return made[0], made[1]


def with_gradients() -> Parallel:
    parallel = prepare(*branches(), HARDWARE, "fp32", ALONE)
    for i, parameter in enumerate(parallel.bare_student.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 10.0**i
    return parallel


def test_prepare_refuses_a_teacher_that_is_no_copy() -> None:
    student, teacher = branches()
    nn.init.zeros_(teacher["head"].weight)  # type: ignore[index]
    with pytest.raises(ValueError, match="not a copy"):
        prepare(student, teacher, HARDWARE, "fp32", ALONE)


def test_the_method_builds_a_teacher_that_is_a_copy() -> None:
    tiny = module()
    parallel = prepare(*build(tiny.CONFIG.model, tiny.CONFIG.method, 0), HARDWARE, "fp32", ALONE)
    assert not any(p.requires_grad for p in parallel.bare_teacher.parameters()) and not parallel.bare_teacher.training
    named = parallel.tensors()
    assert all(torch.equal(x, named["teacher." + name.removeprefix("student.")]) for name, x in named.items() if name[0] == "s")


@pytest.mark.parametrize("scope", ["none", "param", "module", "global"])
def test_clipping_is_torchs_own_by_scope(scope: str) -> None:
    ours, theirs = with_gradients(), with_gradients()
    ours.clip(scope, 3.0, ours.norms())
    groups: dict[str, list[list[nn.Parameter]]] = {
        "none": [],
        "param": [[p] for p in theirs.bare_student.parameters()],
        "module": [list(child.parameters()) for child in theirs.bare_student.children()],
        "global": [list(theirs.bare_student.parameters())],
    }
    for group in groups[scope]:
        nn.utils.clip_grad_norm_(group, 3.0)
    for one, other in zip(ours.bare_student.parameters(), theirs.bare_student.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)


def test_an_unknown_clip_scope_is_named() -> None:
    parallel = with_gradients()
    with pytest.raises(ValueError, match="'layer'.*param, module, global"):
        parallel.clip("layer", 3.0, parallel.norms())


def test_the_teacher_moves_by_the_formula_and_stands_at_zero() -> None:
    parallel = prepare(*branches(), HARDWARE, "fp32", ALONE)
    with torch.no_grad():
        for parameter in parallel.bare_student.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in parallel.bare_teacher.parameters()]
    parallel.update_teacher(torch.tensor(0.0))
    assert all(torch.equal(p, old) for p, old in zip(parallel.bare_teacher.parameters(), before, strict=True))
    parallel.update_teacher(torch.tensor(0.25))
    for kept, old in zip(parallel.bare_teacher.parameters(), before, strict=True):
        torch.testing.assert_close(kept, 0.75 * old + 0.25 * (old + 1))


@pytest.mark.parametrize(
    ("shard_over", "precision", "words"),
    [("half", "fp32", "'half'.*none, node, all"), (2, "fp32", "2 ranks a copy, .*divide 1"), (0, "fp32", "does not divide")],
)
def test_a_sharding_that_cannot_be_is_named(shard_over: str | int, precision: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prepare(*branches(), replace(HARDWARE, shard_over=shard_over), precision, ALONE)


def test_alone_nothing_is_sharded() -> None:
    for shard_over in ("all", "node", "none", 1):
        assert prepare(*branches(), replace(HARDWARE, shard_over=shard_over), "fp32", ALONE).mesh is None


def program(out: Path, processes: int, *keys: str) -> int:
    command = [sys.executable] if processes == 1 else [*TORCHRUN, "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, str(PROGRAM), str(out), *keys], env=environment, check=False).returncode


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def students(out: Path, step: int) -> torch.Tensor:
    tensors = read_tensors(read_checkpoint(out / f"checkpoints/step-{step}"), "student.")
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def apart(one: Path, other: Path) -> float:
    """The greatest relative difference of any loss term at any step.

    KoLeo is minus a mean logarithm of distances and goes through zero: its difference already is relative, to the distances.
    """
    pairs = list(zip(rows(one), rows(other), strict=True))
    assert len(pairs) == 20
    entropies = [abs(a[name] - b[name]) / abs(a[name]) for a, b in pairs for name in ("loss/dino", "loss/ibot")]
    return max(*entropies, *(abs(a["loss/koleo"] - b["loss/koleo"]) for a, b in pairs))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """20 steps of one process without any speed key, of two seeds of the data."""
    outs = {name: tmp_path_factory.mktemp(name) for name in ("one", "other")}
    assert program(outs["one"], 1, *TWENTY) == program(outs["other"], 1, *TWENTY, "data_seed=1") == 0
    return outs


ALL = "hardware.shard_over=all"
PACKED = ["hardware.attention=packed", "hardware.activation_checkpointing=true"]
COMPILED = ["hardware.compile=true", "hardware.activation_checkpointing=true"]
SPEED = {
    "ddp 2": (2, []),
    "ddp 3": (3, []),
    "sharded 2": (2, [ALL]),
    "sharded 2, gathered once, packed, recomputed": (2, [ALL, "hardware.reshard_after_forward=false", *PACKED]),
    "compiled": (1, ["hardware.compile=true"]),
    "compiled, recomputed, sharded 2": (2, [ALL, *COMPILED]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "keys"), SPEED.values(), ids=SPEED.keys())
def test_speed_keys_and_processes_change_only_rounding(
    undisturbed: dict[str, Path], tmp_path: Path, processes: int, keys: list[str]
) -> None:
    assert program(tmp_path, processes, *TWENTY, *keys) == 0
    one, other = undisturbed["one"], undisturbed["other"]
    assert apart(one, tmp_path) < 1e-4 and apart(one, other) > 100 * max(1e-4, apart(one, tmp_path))
    tiny = module()
    student, _ = build(tiny.CONFIG.model, tiny.CONFIG.method, 0)
    start = torch.cat([x.flatten().double() for _, x in sorted(student.state_dict().items())])
    moved = [students(out, 20) - start for out in (one, tmp_path, other)]
    rounding, seed = ((moved[0] - moved[i]).norm() / moved[0].norm() for i in (1, 2))
    assert rounding < 0.05 and seed > 100 * rounding


@pytest.mark.parametrize(
    "keys",
    [{"hardware.attention": "packed"}, {"hardware.attention": "math"}, {"hardware.activation_checkpointing": True},
     {"checkpoint.asynchronous": False, "hardware.reshard_after_forward": False, "hardware.deterministic": False}],
    ids=["packed", "math", "recomputed", "others"],
)  # fmt: skip
def test_speed_keys_of_one_process_leave_the_trace(undisturbed_short: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    short(tmp_path, keys)
    pairs = list(zip(rows(undisturbed_short), rows(tmp_path), strict=True))
    assert len(pairs) == 8
    for name in ("loss/dino", "loss/ibot", "grad_norm/backbone"):
        assert max(abs(a[name] - b[name]) / abs(a[name]) for a, b in pairs) < 1e-4, name
    assert pairs[-1][0]["loss/dino"] < 0.99 * pairs[0][0]["loss/dino"]  # it learns: the trace does not stand at ln K


@pytest.fixture(scope="module")
def undisturbed_short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("short")
    short(out, {})
    return out


def short(out: Path, keys: dict[str, Any]) -> None:
    """Eight steps in this process."""
    tiny = module()
    config = tiny.with_keys(tiny.CONFIG, **{"schedule.steps": 8, "checkpoint.every": 4, **keys})
    train(config, tiny.synthetic(0, config, ALONE), [], tiny.journal_in(out, ALONE), ALONE, {"data_seed": 0})


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_sharded_micro_batches_equal_whole_copies(tmp_path: Path, precision: str, tolerance: float) -> None:
    """bf16: the first step is equal to 1e-6; then the last bit of a gradient norm, eight bits wide in the products, tells."""
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    keys = ["optim.micro_batches=3", f"precision={precision}", *TWENTY]
    assert program(whole, 2, *keys) == program(sharded, 2, *keys, ALL) == 0
    assert apart(whole, sharded) < tolerance
    for name in ("loss/dino", "loss/ibot", "loss/koleo"):
        assert abs(rows(whole)[0][name] - rows(sharded)[0][name]) < 1e-6


@pytest.mark.slow
def test_ranks_agree_to_stop_and_another_number_of_them_goes_on(tmp_path: Path) -> None:
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    assert program(whole, 1) == 0
    assert program(halted, 2, "stop_at=9", "stop_rank=1") == 0  # torchrun restarts on any other code
    assert read_checkpoint(halted).step == 10
    assert program(halted, 3) == 0
    assert apart(whole, halted) < 1e-4
