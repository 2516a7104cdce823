"""How well are artefacts found? On slides of the synthetic cohort, tile by tile against the masks that they were made from.

    python tests/validate_artefacts.py COHORT

COHORT: what `histoscale cohort` wrote. The table stands in tests/records/artefacts.md, its shares in eval/artefacts.py.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from evidence_cases import evidence_config, open_slide
from PIL import Image

from histoscale.data.cohort.artefacts import KINDS as MADE
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.artefacts import KINDS, judge, read_optics, white_point
from histoscale.eval.evidence.geometry import read_picture, whole_slide

TILE_UM, MAP_UM, LEAST_TISSUE = 64.0, 2.0, 0.4
PAIRS = (("pen", "pen"), ("fold", "fold"), ("blur", "defocus"), ("blur", "bubble"))  # ours, the cohort's


def tiles_of(cohort: Path, slide_id: str, store: Store) -> tuple[np.ndarray, np.ndarray]:
    """bool [n, our kinds] and the share of each made artefact, float64 [n, made kinds], of the tiles with tissue."""
    reader = open_slide(cohort / "slides" / f"{slide_id}.svs", store)
    made, classes = (np.asarray(Image.open(cohort / "truth" / slide_id / f"{name}.png")) for name in ("artefacts", "classes"))
    mpp, level = reader.layout.mpp or 0.5, reader.layout.levels[0]
    size = round(TILE_UM / mpp)
    coords = np.stack(np.meshgrid(np.arange(level.width // size), np.arange(level.height // size)), -1).reshape(-1, 2) * size
    side = int(size * mpp / MAP_UM)
    corners = (coords * mpp / MAP_UM).astype(int)
    part = [np.s_[y : y + side, x : x + side] for x, y in corners.tolist()]
    keep = np.array([(classes[at] > 0).mean() >= LEAST_TISSUE for at in part])
    shares = np.array([[(made[at] >> bit & 1).mean() for bit in range(len(MADE))] for at in part])[keep]
    white = white_point(read_picture(reader, whole_slide(reader, mpp, 1000)))
    config = evidence_config().artefacts
    optics = read_optics(reader, coords[keep], size, mpp, white, config, 1)
    found = judge(optics, np.arange(int(keep.sum())), config)
    return np.stack([found[kind] for kind in KINDS], 1), shares


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cohort", type=Path)
    asked = parser.parse_args()
    names = sorted(path.name for path in (asked.cohort / "truth").iterdir())
    with tempfile.TemporaryDirectory() as cache:
        store = Store(StorageConfig({}, "fsspec", cache, 1 << 24, 5.0, 5.0, 60.0))
        parts = [tiles_of(asked.cohort, name, store) for name in names]
    found, shares = (np.concatenate(each) for each in zip(*parts, strict=True))
    clean = shares[:, [MADE.index(kind) for kind in MADE if kind != "stitching"]].sum(1) == 0
    print(f"{len(parts)} slides, {len(found)} tiles of {TILE_UM:g} µm, {clean.sum()} without any artefact")
    for ours, made in PAIRS:
        held = shares[:, MADE.index(made)] >= 0.5
        flags = found[:, KINDS.index(ours)]
        print(f"{ours} for {made}: {flags[held].mean():.3f} of {held.sum()} found, {flags[clean].mean():.4f} false")


if __name__ == "__main__":
    main()
