"""Fixtures that every test file may use."""

import os
from pathlib import Path

import pytest
import torch

from histoscale.data.journal import Journal, JournalConfig

pytest_plugins = ["slide_fixtures", "loopback_fixtures"]
ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # tests compare bits: one thread, whatever the machine


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
