"""precision=auto becomes one word before the identity is made, is recorded, and stays what it was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from histoscale.launch import precision
from histoscale.launch.config import Composed, load
from histoscale.launch.held import begun
from histoscale.launch.precision import on_cpu, on_cuda, settled
from histoscale.launch.run import invoke

PRETRAIN = ["catalog=none", "recipe=demo", "out=none", "hardware.device=cpu"]


def given(word: str, *keys: str) -> Composed:
    return load("pretrain", [*PRETRAIN, f"precision={word}", *keys])


def one(word: str) -> Any:
    return lambda *_: (word, "for this test")


@pytest.mark.parametrize("trains", [True, False])
def test_a_cpu_is_measured(trains: bool) -> None:
    threads, seed = torch.get_num_threads(), torch.random.get_rng_state()
    word, why = on_cpu(trains)
    assert word in ("bf16", "fp32") and " ms in bf16 and " in why
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), seed)


@pytest.mark.parametrize(
    ("bf16", "fp16", "expected"), [(True, True, "bf16"), (False, True, "fp16"), (False, False, "fp32"), (True, False, "bf16")]
)
def test_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch, bf16: bool, fp16: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert on_cuda(fp16)[0] == expected


def test_a_word_that_was_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "on_cpu", one("bf16"))
    composed, said = settled(given("fp32"), {"result": {"precision": "bf16"}})
    assert composed.config.precision == "fp32" and said is None


def test_what_is_recorded_stays_without_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(precision, "on_cpu")
    for word in ("bf16", "fp16", "fp32"):
        composed, said = settled(given("auto"), {"result": {"precision": word}})
        assert (composed.config.precision, composed.values["precision"]) == (word, word) and said and "as this run began" in said


def test_phases_that_say_auto_become_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "on_cpu", one("bf16"))
    composed, _ = settled(given("auto", "phases.a.precision=auto", "phases.b.precision=fp32", "phases.c.seed=1"), None)
    assert composed.config.phases == composed.values["phases"]
    assert [composed.config.phases[name].get("precision") for name in "abc"] == ["bf16", "fp32", None]


def test_a_phase_alone_may_say_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "on_cpu", one("bf16"))
    asked = given("fp32", "phases.a.precision=auto", "phases.b.seed=1")
    composed, said = settled(asked, None)
    assert composed.config.precision == "fp32" and said and said.startswith("phases.a.precision=auto: bf16")
    assert composed.config.phases == composed.values["phases"] == {"a": {"precision": "bf16"}, "b": {"seed": 1}}
    monkeypatch.delattr(precision, "on_cpu")
    again, _ = settled(asked, {"result": {"precision": "fp32", "phases": {"a": {"precision": "fp16"}}}})
    assert again.config.phases["a"] == {"precision": "fp16"}


def test_more_steps_go_on_in_what_the_run_began_with(tmp_path: Path) -> None:
    result = {"seed": 0, "precision": "bf16", "longer": [], "phases": {}}
    state = {"command": "pretrain", "identity": "", "status": "done", "result": result, "facts": {}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    module = given("auto").module
    for asked in ({"longer": [7]}, {"phases": {"a": {}}}):
        assert begun("pretrain", module, {**result, "precision": "auto", **asked}, tmp_path, True) == state


def test_colour_and_files_have_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(precision, "on_cpu")
    composed, _ = settled(load("embed", ["encoder=colour", "catalog=none", "out=none"]), None)
    assert composed.config.precision == "fp32"
    release, said = settled(load("release", ["checkpoint=none", "out=none", "precision=auto"]), None)
    assert release.config.precision == "auto" and said is None  # which its command refuses


def test_a_run_records_what_it_became_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a labelled folder and an untrained encoder, through the whole command."""
    for role in ("train", "test"):
        for label, colour in (("a", "red"), ("b", "blue")):
            folder = tmp_path / "tiles" / role / label
            folder.mkdir(parents=True)
            for i in range(6):
                Image.effect_noise((32, 32), 40 + i).convert("RGB").save(folder / f"{i}-{role}-{colour}.png")
    keys = ["encoder=random:test_vit", "dataset=folder", f"data_root={tmp_path / 'tiles'}", "hardware.device=cpu",
            "logging.progress=off", "floors.initialisations=1", "floors.trees=5", "scoring.interval.draws=50",
            f"out={tmp_path / 'out'}"]  # fmt: skip
    monkeypatch.setattr(precision, "on_cpu", one("bf16"))
    found = invoke("probe", keys)
    assert found["probe"]["precision"] == "bf16"
    assert json.loads((tmp_path / "out/state.json").read_text())["result"]["precision"] == "bf16"
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["precision"] == "bf16"
    state = json.loads((tmp_path / "out/state.json").read_text())
    (tmp_path / "out/state.json").write_text(json.dumps({**state, "status": "running"}))  # as if it had been killed
    monkeypatch.setattr(precision, "on_cpu", one("fp32"))  # on another machine
    again = invoke("probe", keys)["probe"]
    assert again["precision"] == "bf16" and again["encoder_hash"] == found["probe"]["encoder_hash"]


RANKS = """
import os, sys
from pathlib import Path
from histoscale.data.ranks import close_ranks
from histoscale.launch import precision
from histoscale.launch.config import load
rank = int(os.environ["RANK"])
precision.on_cpu = lambda trains: (["bf16", "fp32"][rank], f"rank {rank} says so")
state = {"result": {"precision": "fp16"}} if rank else None    # as if rank 0 had written it in between
composed, said = precision.settled(load("pretrain", ["catalog=none", "recipe=demo", "out=none", "hardware.device=cpu"]), state)
Path(sys.argv[1], f"rank-{rank}").write_text(f"{composed.config.precision} {said}")
close_ranks()
"""


def test_rank_0_decides_for_all(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text() == "bf16 precision=auto: bf16, rank 0 says so"
