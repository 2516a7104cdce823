"""One word for one thing: shared keys are spelt alike in every command, and an old spelling names the new one."""

from importlib import import_module
from typing import Any

import pytest

from histoscale.launch.config import COMMANDS, ConfigError, load, schema_keys
from histoscale.launch.renamed import RENAMED

COMPUTING = ("pretrain", "embed", "probe", "robustness", "mil", "release")
SPEED = ("hardware", "stream")


def keys_of(command: str) -> dict[str, Any]:
    return schema_keys(import_module(f"histoscale.launch.{command}").Config)


@pytest.mark.parametrize(("command", "old", "new"), [(c, *pair) for c, pairs in RENAMED.items() for pair in pairs.items()])
def test_an_old_spelling_names_the_new_one(command: str, old: str, new: str) -> None:
    assert new in keys_of(command) and old not in keys_of(command)
    with pytest.raises(ConfigError, match=f"^{command}: {old}= is called {new}= now$"):
        load(command, [f"{old}=1"])


@pytest.mark.parametrize("command", COMPUTING)
def test_device_threads_batch_and_precision_stand_in_one_place_each(command: str) -> None:
    keys = keys_of(command)
    ends = {"device": {"hardware.device"}, "precision": {"precision"}}
    for end, wanted in ends.items():
        assert {key for key in keys if key.split(".")[-1] == end} <= wanted
    at_top = {"batch", "threads", "workers", "readers", "device", "mpp", "patch_px"} & keys.keys()
    assert not at_top


@pytest.mark.parametrize("command", COMMANDS)
def test_speed_keys_make_no_result(command: str) -> None:
    module = import_module(f"histoscale.launch.{command}")
    assert not set(SPEED) & set(module.RESULT)
    if command in COMPUTING:
        inside = [key for key in keys_of(command) if key.split(".")[0] in module.RESULT]
        assert not [key for key in inside if key.split(".")[-1] in ("threads", "workers", "device", "readers", "prefetch")]
    assert "precision" in module.RESULT or "precision" not in keys_of(command)
