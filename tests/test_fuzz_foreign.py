"""What others made, under mutated inputs: outlines, stores, checkpoints, archives, and what earlier runs left."""

from pathlib import Path

import pytest
from test_fuzz_parsers import asked_s, lasting, run


def test_foreign_files(tmp_path: Path) -> None:
    run("fuzz.foreign", 4.0, tmp_path, 0)


@lasting
@pytest.mark.slow
def test_foreign_files_for_longer(tmp_path: Path) -> None:
    run("fuzz.foreign", asked_s(25.0), tmp_path, 1)


@lasting
@pytest.mark.slow
def test_trained_weights_for_longer(tmp_path: Path) -> None:
    run("fuzz.trained", asked_s(6.0), tmp_path, 1)
