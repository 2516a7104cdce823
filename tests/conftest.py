"""Fixtures that every test file may use."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from histoscale.data.journal import Journal, JournalConfig

pytest_plugins = ["slide_fixtures", "loopback_fixtures", "child_fixtures"]
ROOT = Path(__file__).resolve().parents[1]
hypothesis.settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's business
hypothesis.settings.load_profile("untimed")
torch.set_num_threads(1)  # tests compare bits: one thread, whatever the machine
# What shares a GPU, or is timed against servers that fail, runs on one worker; every other file is a group of its own.
GROUPS = {
    **dict.fromkeys(("cuda", "blocks", "methods_step", "monitor", "plain_step", "ranks"), "gpu"),
    **dict.fromkeys(("stream_faults", "fetch", "storage", "remote_runs"), "clock"),
}


def group_of(file: str) -> str:
    """What a test file shares a worker with."""
    name = Path(file).stem.removeprefix("test_")
    return GROUPS.get(name, name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups with most slow tests begin first, since what begins last must be short."""
    slow = Counter(group_of(item.path.name) for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[group_of(item.path.name)])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws does not hang on which tests ran before it, nor on the time of day."""
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A group stays on one worker, and the fixtures of a file are made once (marks of groups do not reach pytest-xdist 3.8 under
    pytest 9.2)."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return ByGroup(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides and tiles; skips where it is absent."""
    folder = Path(os.environ.get("HISTOSCALE_SHARED", ROOT.parent / "shared")) / "data"
    if not (folder / "slides").is_dir():
        pytest.skip(f"no real slides at {folder}: set HISTOSCALE_SHARED to the folder that holds data/slides")
    return folder


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    config = JournalConfig(progress="off", interval_s=10, wandb="off", wandb_project="test", tensorboard=False)
    return Journal(tmp_path / "out", config)
