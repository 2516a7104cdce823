from collections.abc import Sequence

import numpy as np

def paint(
    pixels: np.ndarray,
    tiles: Sequence[bytes | memoryview],
    places: np.ndarray,
    tables: bytes,
    ycbcr: bool,
    tile_width: int,
    tile_height: int,
    reduce: int,
    seconds: float = ...,
) -> dict[int, str]: ...
def read_twice() -> int: ...
