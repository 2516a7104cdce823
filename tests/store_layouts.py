"""Embedding stores in the layouts of other tools, written from the keys, shapes and types that their code uses."""

from pathlib import Path

import h5py
import numpy as np


def grid(tiles: int, side: int, columns: int = 8) -> np.ndarray:
    """Corners int64 [tiles, 2] of a grid without gaps."""
    places = np.arange(tiles)
    return np.stack([places % columns * side, places // columns * side], 1).astype(np.int64)


def write_trident(path: Path, features: np.ndarray, side: int, encoder: str | None = "uni_v1", batched: bool = False) -> None:
    """mahmoodlab/TRIDENT trident/IO.py save_h5: chunks of one tile, attributes on datasets; batched: a leading axis of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coords = grid(len(features), side)
    about = {
        "patch_size": side // 2, "patch_size_level0": side, "level0_magnification": 40, "target_magnification": 20, "overlap": 0,
        "name": path.stem, "savetodir": "x", "level0_width": 9000, "level0_height": 9000,
    }  # fmt: skip
    with h5py.File(path, "w") as file:
        for name, values in (("features", features), ("coords", coords)):
            values = values[None] if batched else values
            file.create_dataset(name, data=values, maxshape=(None, *values.shape[1:]), chunks=(1, *values.shape[1:]))
        file["features"].attrs.update(name=path.stem, savetodir="x", encoder="None" if encoder is None else encoder)
        file["coords"].attrs.update(about)


def write_clam(path: Path, features: np.ndarray, side: int, batch: int = 256) -> None:
    """mahmoodlab/CLAM extract_features_fp.py: appended batch by batch in chunks of 32, coords int32, no attribute at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coords = grid(len(features), side).astype(np.int32)
    with h5py.File(path, "w") as file:
        for name, values in (("features", features.astype(np.float32)), ("coords", coords)):
            width = values.shape[1]
            dataset = file.create_dataset(name, (0, width), values.dtype, maxshape=(None, width), chunks=(32, width))
            for start in range(0, len(values), batch):
                dataset.resize(min(start + batch, len(values)), axis=0)
                dataset[start : start + batch] = values[start : start + batch]
