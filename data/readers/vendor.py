"""Every other format, through OpenSlide on a local file."""

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from histoscale.data.readers.deadline import within
from histoscale.data.readers.described import number, square, word
from histoscale.data.readers.pyramid import WHITE, Canvas, Damage, DecodeError, Layout, LayoutError, Level, Stands, downsample
from histoscale.data.storage import Missing, Store

_SCANNERS = ("dicom.ManufacturerModelName", "hamamatsu.Product", "leica.device-model", "philips.DICOM_MANUFACTURERS_MODEL_NAME")

Gate = AbstractContextManager[object]
FREE: Gate = nullcontext()


def read_header(uri: str, store: Store) -> Layout:
    """A layout without tile tables. Raises LayoutError (also for a file that OpenSlide does not come back from), Missing or
    StorageError."""
    try:
        opened = within(store.config.decode_s, uri, partial(open_slide, store.local(uri)))
    except Stands as error:
        raise LayoutError(str(error)) from error
    with opened as slide:
        known = slide.properties
        mpp = square(*(number(known.get(f"openslide.mpp-{axis}")) or None for axis in "xy"))
        nothing = np.zeros(0, np.int64)
        levels = []
        for i, (width, height) in enumerate(slide.level_dimensions):
            wide, high = (int(number(known.get(f"openslide.level[{i}].tile-{side}")) or 256) for side in ("width", "height"))
            shrunk = downsample(slide.dimensions, (width, height))
            levels.append(Level(width, height, wide, high, shrunk, "openslide", "rgb", 1, b"", nothing, nothing))
        scanner = next((word(known[name]) for name in _SCANNERS if known.get(name) not in (None, "", "Unknown")), None)
        return Layout("openslide", tuple(levels), mpp, number(known.get("openslide.objective-power")), scanner)


def open_slide(path: Path) -> openslide.OpenSlide:
    """A handle; of a folder, the DICOM series in it. Raises LayoutError or Missing."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise Missing(f"{path}: the folder holds no files")
    problem = ""
    for file in files:  # OpenSlide takes any instance of a series and finds the others beside it
        try:
            return openslide.OpenSlide(file)
        except openslide.OpenSlideError as error:
            problem = problem or str(error)
        except FileNotFoundError as error:
            raise Missing(f"{file}: no such file") from error
    raise LayoutError(f"OpenSlide does not read it ({problem})")


class OpenSlideReader:
    """One handle a process. A handle that met an error stays in it, so it is dropped.

    Level coordinates become level-0 ones by the level's downsample; where OpenSlide gives that as a fraction the place is rounded
    to a level-0 pixel and OpenSlide interpolates within one level pixel.
    """

    def __init__(self, uri: str, layout: Layout, store: Store, decoding: Gate = FREE) -> None:
        self.uri, self.layout, self.store, self.decoding = uri, layout, store, decoding
        self._slide: openslide.OpenSlide | None = None
        self._pid = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["OpenSlideReader"], tuple[str, Layout, Store]]:
        return OpenSlideReader, (self.uri, self.layout, self.store)

    def region(
        self,
        level: int,
        x: int,
        y: int,
        width: int,
        height: int,
        damage: list[Damage] | None = None,
        reduce: int = 1,
        wanted: np.ndarray | None = None,
        canvas: Canvas | None = None,
    ) -> np.ndarray:
        inner = _bounds(wanted, width, height)
        if inner != (0, 0, width, height):  # OpenSlide decodes whole rectangles: read the smallest that holds what is wanted
            left, top, right, bottom = inner
            out = np.full((height, width, 3), WHITE, np.uint8)
            hurt: list[Damage] | None = None if damage is None else []
            out[top:bottom, left:right] = self.region(level, x + left, y + top, right - left, bottom - top, hurt, reduce)
            if damage is not None and hurt:
                damage.append(Damage(*inner))
            return out
        try:
            slide = self._open()
            step = slide.level_downsamples[level] * reduce
            with self.decoding:
                corner, size = (round(x * step), round(y * step)), (width * reduce, height * reduce)
                image = within(self.store.config.decode_s, self.uri, lambda: slide.read_region(corner, level, size))
        except (LayoutError, openslide.OpenSlideError) as error:
            self._drop()
            if damage is None:
                raise DecodeError(f"{self.uri}, level {level}, {width}x{height} at ({x}, {y}): {error}") from error
            damage.append(Damage(0, 0, width, height))
            return np.full((height, width, 3), WHITE, np.uint8)
        pixels = over_white(image)
        return pixels if reduce == 1 else np.asarray(Image.fromarray(pixels).reduce(reduce))

    def _open(self) -> openslide.OpenSlide:
        with self._lock:
            if self._slide is None or self._pid != os.getpid():
                opening = partial(open_slide, self.store.local(self.uri))
                self._slide, self._pid = within(self.store.config.decode_s, self.uri, opening), os.getpid()
            return self._slide

    def _drop(self) -> None:
        with self._lock:
            self._slide = None


def _bounds(wanted: np.ndarray | None, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the cells that are wanted, px of the region; all of it where nothing is said."""
    if wanted is None or wanted.all() or not wanted.any():
        return 0, 0, width, height
    rows, columns = np.flatnonzero(wanted.any(axis=1)), np.flatnonzero(wanted.any(axis=0))
    high, wide = height // wanted.shape[0], width // wanted.shape[1]
    return int(columns[0]) * wide, int(rows[0]) * high, int(columns[-1] + 1) * wide, int(rows[-1] + 1) * high


def over_white(image: Image.Image) -> np.ndarray:
    """RGBA to uint8 [h, w, 3], transparent parts white."""
    pixels = np.asarray(image)
    if (pixels[..., 3] == 255).all():
        return np.ascontiguousarray(pixels[..., :3])
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, (WHITE,) * 4), image))[..., :3].copy()
