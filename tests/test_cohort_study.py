"""From the files of a public cohort to a study: `histoscale manifest`, stores, `histoscale mil`."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from slide_layouts import write_camelyon16

from histoscale.launch.run import execute

SIDE = 8  # level-0 px of a tile: a slide of 32 px has 16


def write_stores(manifest: Path, folder: Path) -> None:
    """A tile inside the lesion that the annotations outline tells tumour."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    coords = np.stack([np.arange(16) % 4 * SIDE, np.arange(16) // 4 * SIDE], 1)
    inside = int(np.flatnonzero((coords == (2 * SIDE, SIDE)).all(axis=1))[0])
    for row in csv.DictReader(manifest.open()):
        features = rng.normal(size=(16, 8)).astype(np.float32)
        features[inside, 0] += 6 * (row["label"] == "tumor")
        with h5py.File(folder / f"{row['slide_id']}.h5", "w") as file:
            file["features"], file["coords"] = features, coords
            file.attrs.update(
                encoder_hash="abc",
                encoder="phikon-v2",
                mpp=0.25,
                patch_size=SIDE,
                patch_size_level0=SIDE,
                slide_id=row["slide_id"],
            )


@pytest.mark.slow
def test_camelyon16_from_one_hospital_to_the_other(tmp_path: Path) -> None:
    root, quiet = write_camelyon16(tmp_path / "CAMELYON16"), "logging.progress=off"
    assert execute("manifest", ["collection=camelyon16", f"root={root}", f"out={tmp_path / 'cohort'}", quiet]) == 0
    manifest = tmp_path / "cohort/manifest.csv"
    write_stores(manifest, tmp_path / "stores")
    arguments = [
        f"embeddings={tmp_path / 'stores'}", f"manifest={manifest}", "task=camelyon16", "split=patients",
        "split.external_sites=[UMCU]", "mil.epochs=6", "mil.repeats=1", "mil.folds=2", "interval.draws=50", quiet,
    ]  # fmt: skip
    assert execute("mil", [*arguments, f"out={tmp_path / 'mil'}"]) == 0
    found = json.loads((tmp_path / "mil/summary.json").read_text())["mil"]
    assert set(found["sites"]) == {"RUMC", "UMCU"} and found["external"]["auc"]["value"] > 0.9
    checks = {check["name"]: check for check in found["checks"]}
    assert all(check["holds"] for check in checks.values())
    assert "CAMELYON16" in checks["public collections"]["compared"] and "TCGA" in checks["public collections"]["found"]
    pointed = found["pointing"]["external"]  # the manifest's column `annotations` leads to the lesions
    assert pointed["slides"] == found["external"]["positives"] and pointed["gain"]["low"] > 0
