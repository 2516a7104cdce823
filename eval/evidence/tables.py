"""The raw numbers of a slide's tiles, for whoever draws them another way."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet


def write_tiles(path: Path, coords: np.ndarray, size_px: int, columns: Mapping[str, np.ndarray]) -> None:
    """x, y, width, height (level-0 px), then the columns, [n] each."""
    side = np.full(len(coords), size_px)
    place = {"x": coords[:, 0], "y": coords[:, 1], "width": side, "height": side}
    partial = path.with_suffix(".partial")
    pyarrow.parquet.write_table(pyarrow.table({**place, **columns}), partial)
    partial.replace(path)
