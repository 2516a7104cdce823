"""A slide of any size is read in the memory of a chunk: measured on a real process that reads one far larger than that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TILES, WIDTH = 200_000, 32
READ = """
import json, resource, sys
import numpy as np
import torch
from mil_fixtures import ABMIL
from dataclasses import replace
from histoscale.eval.mil.aggregators.pooling import MaxConfig
from histoscale.eval.mil.ensemble import Ensemble, SlideModel

torch.set_num_threads(1)
tiles, width = int(sys.argv[1]), int(sys.argv[2])
configs = {"abmil": replace(ABMIL, embed=[128], attention=64), "max": MaxConfig("max")}
config = configs[sys.argv[3]]
ensemble = Ensemble([SlideModel(width, config, 1) for _ in range(2)], width, 1, config, "binary")
features = np.zeros((tiles, width), np.float16)
features[:] = np.random.default_rng(0).normal(size=width)
ensemble.read(features[:20_000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention = ensemble.read(features).attention
ensemble.logits(features), ensemble.occlusion(features)
print(json.dumps({"grown": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, "sum": float(attention.sum())}))
"""


@pytest.mark.parametrize("kind", ["abmil", "max"])
def test_reading_grows_by_a_few_numbers_a_tile(kind: str) -> None:
    """The hidden layers of all tiles at once would be over 1 kB a tile; attention, shares and what is left are some floats."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(TILES), str(WIDTH), kind],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sum"] == pytest.approx(1) and found["grown"] < 300 * TILES
