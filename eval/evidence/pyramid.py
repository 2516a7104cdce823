"""Pyramidal OME-TIFF that lies on the slide: QuPath opens it with the slide's size in µm, every level painted from the tiles."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from histoscale.eval.evidence.display import Shown
from histoscale.eval.evidence.geometry import Canvas, Plan, paint, shrink

_TILE = 256
_SMALLEST = 256  # a level whose longer side fits is the last

Rows = Callable[[Canvas, int, int, int], np.ndarray]  # canvas, plane, top, rows -> [rows, width] or [rows, width, 3]


def write_values(path: Path, coords: np.ndarray, size_px: float, channels: dict[str, np.ndarray], plan: Plan) -> None:
    """The raw numbers as float32 channels, NaN where no tile lies. channels: name -> float64 [n]."""

    planes = list(channels.values())

    def rows(canvas: Canvas, plane: int, top: int, count: int) -> np.ndarray:
        return paint(coords, size_px, planes[plane], canvas, top, count).astype(np.float32)

    about = {"axes": "CYX", "Channel": {"Name": list(channels)}, **_physical(path, plan)}
    _write(path, plan.canvas, len(channels), np.dtype(np.float32), rows, {"photometric": "minisblack", "compression": "deflate",
           "predictor": True}, about)  # fmt: skip


def write_overlay(
    path: Path, coords: np.ndarray, size_px: float, shown: Shown, picture: np.ndarray, plan: Plan, opacity: float, quality: int
) -> None:
    """The map over the slide's own pixels, RGB in JPEG of `quality`. Where no tile lies the slide stays as it is.

    picture: uint8 [h, w, 3], the slide as planned.
    """

    def rows(canvas: Canvas, _: int, top: int, count: int) -> np.ndarray:
        field = paint(coords, size_px, shown.values, canvas, top, count)
        return blend(shrink(picture, canvas, top, count), field, shown, opacity)

    options = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": quality}, "subsampling": (1, 1)}
    _write(path, plan.canvas, 3, np.dtype(np.uint8), rows, options, {"axes": "YXS", **_physical(path, plan)})


def blend(tissue: np.ndarray, field: np.ndarray, shown: Shown, opacity: float) -> np.ndarray:
    """uint8 [h, w, 3]: colours of field [h, w] over the tissue in grey; untouched where the field is NaN."""
    grey = tissue.mean(2, keepdims=True)
    mixed = grey * (1 - opacity) + shown.rgb(field) * opacity
    return np.where(np.isnan(field)[..., None], tissue, (mixed + 0.5).astype(np.uint8))


def _physical(path: Path, plan: Plan) -> dict[str, Any]:
    # The UUID is of the slide and the file, so that the same map is the same bytes.
    same = uuid.uuid5(uuid.NAMESPACE_OID, "/".join(path.parts[-2:]))
    return {
        "UUID": str(same),
        "PhysicalSizeX": plan.mpp,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": plan.mpp,
        "PhysicalSizeYUnit": "µm",
    }


def _write(
    path: Path, base: Canvas, channels: int, dtype: np.dtype, rows: Rows, options: dict[str, Any], about: dict[str, Any]
) -> None:
    """Whole or not at all; one band of TIFF tiles in memory at a time."""
    canvases = [base]
    while max(canvases[-1].width, canvases[-1].height) > _SMALLEST:
        canvases.append(base.level(len(canvases)))
    partial = path.with_suffix(".partial")
    with tifffile.TiffWriter(partial, bigtiff=True, ome=True) as file:
        for level, canvas in enumerate(canvases):
            planes = 1 if about["axes"] == "YXS" else channels
            size = (canvas.height, canvas.width)
            shape = (*size, channels) if about["axes"] == "YXS" else (channels, *size)
            file.write(
                _tiles(canvas, rows, planes), shape=shape, dtype=dtype, tile=(_TILE, _TILE), software="", datetime=None,
                metadata=about if level == 0 else None, subifds=len(canvases) - 1 if level == 0 else None,
                subfiletype=1 if level else 0, **options,
            )  # fmt: skip
    partial.replace(path)


def _tiles(canvas: Canvas, rows: Rows, planes: int) -> Iterator[np.ndarray]:
    """The file's tiles in its order: plane after plane, row by row."""
    for plane in range(planes):
        for top in range(0, canvas.height, _TILE):
            band = rows(canvas, plane, top, min(_TILE, canvas.height - top))
            for left in range(0, canvas.width, _TILE):
                yield np.ascontiguousarray(band[:, left : left + _TILE])
