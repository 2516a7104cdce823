"""Headers to tile tables: what a slide file holds, so that later reads touch pixels only."""

import logging
import re
import xml.sax.saxutils
from collections.abc import Iterable
from typing import IO, Any, cast

import numpy as np
import tifffile

from histoscale.data.readers import vendor
from histoscale.data.readers.pyramid import Layout, LayoutError, Level, downsample
from histoscale.data.readers.rangefile import RangeFile
from histoscale.data.storage import StorageError, Store

BLOCK = 256 << 10  # header bytes a request: five requests opened a 100 MB slide
_MOST_HEADER = 256 << 20  # bytes of headers in all: a million tiles take 16 MB; more is no slide, or a hostile one
_MOST_PAGES = 1000  # directories in a file
_MOST_TILE_PX = 1 << 26  # pixels of a tile: they are held in memory at once
_ASPECT = 0.03  # a level may differ so much from level 0's aspect: rounding of small levels
_COMPRESSIONS = {1: "raw", 5: "lzw", 7: "jpeg", 8: "deflate", 32946: "deflate"}
_COMPRESSIONS |= {33003: "jpeg2000", 33005: "jpeg2000", 34712: "jpeg2000"}
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it finds wrong ends in a LayoutError or with OpenSlide
_RGB, _YCBCR = 2, 6  # TIFF photometric interpretations
_MICRONS = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}  # units of OME-XML


def read_layout(uri: str, store: Store) -> Layout:
    """The layout of a slide; raises LayoutError, Missing or StorageError. Label and macro images are never opened."""
    if store.is_folder(uri):
        return _by_openslide(uri, store, "it is a folder")
    size = store.size(uri)
    if size == 0:
        raise LayoutError("the file is empty")
    head = store.ranges(uri, [(0, min(size, 8))])[0]
    if head[:2] not in (b"II", b"MM"):
        return _by_openslide(uri, store, "it is no TIFF")
    headers = RangeFile(uri, size, store, BLOCK, _MOST_HEADER)
    try:
        with tifffile.TiffFile(cast("IO[bytes]", headers)) as file:
            found = _tiff(file)
    except (StorageError, LayoutError):
        raise
    except Exception as error:  # tifffile meets damaged headers with many types
        found = f"its TIFF header is damaged or a vendor's own ({type(error).__name__}: {error})"
    if headers.exceeded:
        raise LayoutError(f"its headers take more than {_MOST_HEADER >> 20} MB: they are damaged")
    if isinstance(found, str):
        return _by_openslide(uri, store, found)
    for number, level in enumerate(found.levels):
        outside = (level.offsets < 0) | (level.counts < 0) | (level.offsets > size) | (level.counts > size - level.offsets)
        if outside.any():
            tile = int(outside.argmax())
            span = f"{level.counts[tile]} bytes at byte {level.offsets[tile]}"
            raise LayoutError(f"truncated: tile {tile} of level {number} is {span}, the file has {size}")
        if not level.counts.any():
            raise LayoutError(f"level {number} has no tiles")
    return found


def _by_openslide(uri: str, store: Store, reason: str) -> Layout:
    """What OpenSlide knows of it; `reason` says why it is not read by range."""
    try:
        return vendor.read_header(uri, store)
    except LayoutError as error:
        raise LayoutError(f"{error}; not read by range either: {reason}") from error


def _tiff(file: tifffile.TiffFile) -> Layout | str:
    """The layout, or why this TIFF goes to OpenSlide."""
    for name in ("ndpi", "scn", "bif", "qpi"):
        if getattr(file, f"is_{name}"):
            return f"{name} is a vendor's own TIFF"
    pages = _pages(file.pages)
    tiled = [page for page in pages if page.is_tiled and not _is_associated(page)]
    if not tiled:
        return "no tiled image in this TIFF"
    if file.is_philips:
        return _philips(tiled, pages[0].description)
    tiled.sort(key=lambda page: -page.imagewidth * page.imagelength)
    first = tiled[0]
    text = first.description or pages[0].description or ""
    ome = "<OME" in text
    smaller = sorted(_pages(first.pages or ()), key=lambda page: -page.imagewidth * page.imagelength)
    levels: list[Level] = []
    size = (first.imagewidth, first.imagelength)
    for page in (first, *(smaller or tiled[1:])):
        if not page.is_tiled or (levels and not _is_level(page, size, levels[-1])):
            continue
        problem = _problem(page)
        if problem and not levels:
            return problem
        if not problem:
            levels.append(_level(page, (page.imagewidth, page.imagelength), size, ome))
    if text.startswith("Aperio"):
        fields = dict(re.findall(r"\|\s*([^|=]+?)\s*=\s*([^|]*?)\s*(?=\||$)", text))
        return Layout("tiff", tuple(levels), _float(fields.get("MPP")), _float(fields.get("AppMag")), fields.get("ScanScope ID"))
    if ome:
        mpp, objective, scanner = _ome(text, size)
        return Layout("tiff", tuple(levels), mpp or _resolution(first), objective, scanner)
    return Layout("tiff", tuple(levels), _resolution(first), None, None)


def _pages(found: Iterable[Any]) -> list[tifffile.TiffPage]:
    """The directories of a chain. Raises LayoutError where it does not end."""
    pages: list[tifffile.TiffPage] = []
    for page in found:
        if len(pages) == _MOST_PAGES:
            raise LayoutError(f"more than {_MOST_PAGES} images in one file: no slide has so many")
        if isinstance(page, tifffile.TiffPage):
            pages.append(page)
    return pages


def _philips(tiled: list[tifffile.TiffPage], text: str) -> Layout | str:
    """Philips pads every level to whole tiles and writes the padded sizes: a level's true size is that of level 0, itself padded,
    divided by the ratio of the pixel spacings, which OpenSlide takes for whole numbers too."""
    spacings = []
    for part in re.findall(r'ObjectType="PixelDataRepresentation"(.*?)</DataObject>', text, re.DOTALL):
        found = re.search(r'Name="DICOM_PIXEL_SPACING"[^>]*>([^<]*)<', part)
        values = re.findall(r"[0-9.eE+-]+", xml.sax.saxutils.unescape(found[1], {"&quot;": '"'})) if found else []
        spacings.append([_float(value) or 0.0 for value in values])
    if len(spacings) != len(tiled) or any(len(pair) != 2 or min(pair) <= 0 for pair in spacings):
        return f"its Philips XML has pixel spacings for {len(spacings)} levels, the file has {len(tiled)}"
    size, levels = (tiled[0].imagewidth, tiled[0].imagelength), []
    for page, (down, across) in zip(tiled, spacings, strict=True):
        shrunk = max(1, round((down / spacings[0][0] + across / spacings[0][1]) / 2))
        problem = _problem(page)
        if problem:
            return problem
        levels.append(_level(page, (size[0] // shrunk, size[1] // shrunk), size, False))
    model = re.search(r'Name="DICOM_MANUFACTURERS_MODEL_NAME"[^>]*>([^<]*)<', text)
    mpp = _mean(spacings[0][1] * 1e3, spacings[0][0] * 1e3)
    return Layout("tiff", tuple(levels), mpp, None, model[1].strip() or None if model else None)


def _is_associated(page: tifffile.TiffPage) -> bool:
    """Label and macro images: they carry names, so they are told by their tags alone."""
    last = (page.description or "").rsplit("\n", 1)[-1].strip().lower()
    return last.startswith(("label", "macro")) or (page.subfiletype == 9)


def _is_level(page: tifffile.TiffPage, size: tuple[int, int], previous: Level) -> bool:
    if page.imagewidth >= previous.width or page.imagelength >= previous.height:
        return False
    across, down = size[0] / page.imagewidth, size[1] / page.imagelength
    return abs(across - down) <= max(_ASPECT * across, across * (1 / page.imagewidth + 1 / page.imagelength))


def _problem(page: tifffile.TiffPage) -> str | None:
    if int(page.compression) not in _COMPRESSIONS:
        return f"compression {int(page.compression)}"
    if page.bitspersample != 8 or page.samplesperpixel != 3 or page.planarconfig != 1 or page.imagedepth != 1:
        return f"{page.samplesperpixel} samples of {page.bitspersample} bit, planar configuration {int(page.planarconfig)}"
    if int(page.photometric) not in (_RGB, _YCBCR):
        return f"photometric interpretation {int(page.photometric)}"
    if int(page.photometric) == _YCBCR and int(page.compression) in (1, 5, 8, 32946):
        return "YCbCr without JPEG"
    if page.predictor not in (1, 2):
        return f"predictor {page.predictor}"
    return None


def _level(page: tifffile.TiffPage, size: tuple[int, int], full: tuple[int, int], ome: bool) -> Level:
    """size: of the level, which may be less than what the directory says; full: of level 0.

    The photometric tag says what JPEG samples are (OpenSlide goes by it too), but writers of OME-TIFF put RGB there and JFIF
    tiles, which are YCbCr by definition.
    """
    code, wide, high = int(page.compression), page.tilewidth, page.tilelength
    if not 0 < wide * high <= _MOST_TILE_PX or min(size) < 1:
        raise LayoutError(
            f"tiles of {wide}x{high} px on a level of {size[0]}x{size[1]}: expected at most {_MOST_TILE_PX} px a tile"
        )
    columns, rows = -(-page.imagewidth // wide), -(-page.imagelength // high)
    offsets, counts = (np.asarray(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
    if not len(offsets) == len(counts) == columns * rows:
        expected = f"{columns}x{rows} tiles"
        raise LayoutError(f"truncated: a level of {expected} has {len(offsets)} offsets and {len(counts)} counts")
    jpeg_ycbcr = _COMPRESSIONS[code] == "jpeg" and (int(page.photometric) == _YCBCR or (ome and _is_jfif(page, offsets, counts)))
    inside = np.ix_(range(-(-size[1] // high)), range(-(-size[0] // wide)))
    return Level(
        *size, wide, high, downsample(full, size), _COMPRESSIONS[code], "ycbcr" if jpeg_ycbcr or code == 33003 else "rgb",
        int(page.predictor), bytes(page.jpegtables or b""),
        *(values.reshape(rows, columns)[inside].ravel() for values in (offsets, counts)),
    )  # fmt: skip


def _is_jfif(page: tifffile.TiffPage, offsets: np.ndarray, counts: np.ndarray) -> bool:
    """Whether the first tile that there is begins as a JFIF file does."""
    stored = np.flatnonzero(counts)
    if not len(stored):
        return False
    file = page.parent.filehandle
    file.seek(int(offsets[stored[0]]))
    return bool(re.match(rb"\xff\xd8\xff\xe0..JFIF\0", file.read(11), re.DOTALL))


def _float(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _ome(text: str, size: tuple[int, int]) -> tuple[float | None, float | None, str | None]:
    """mpp, objective and scanner of OME-XML, by patterns: an XML parser would expand hostile entities."""
    mpp = None
    for pixels in re.findall(r"<(?:\w+:)?Pixels\b([^>]*)>", text):
        values = {k: xml.sax.saxutils.unescape(v) for k, v in re.findall(r'(\w+)\s*=\s*"([^"]*)"', pixels)}
        if (values.get("SizeX"), values.get("SizeY")) == (str(size[0]), str(size[1])):
            sides = []
            for axis in "XY":
                unit = values.get(f"PhysicalSize{axis}Unit", "µm").replace("\u03bc", "µ").replace("&#181;", "µ")
                length = _float(values.get(f"PhysicalSize{axis}"))
                sides.append(length * _MICRONS[unit] if length and unit in _MICRONS else None)
            mpp = _mean(*sides)
            break
    power = re.search(r'<(?:\w+:)?Objective\b[^>]*\bNominalMagnification\s*=\s*"([^"]*)"', text)
    model = re.search(r'<(?:\w+:)?Microscope\b[^>]*\bModel\s*=\s*"([^"]*)"', text)
    return mpp, _float(power[1]) if power else None, model[1] if model else None


def _resolution(page: tifffile.TiffPage) -> float | None:
    unit = page.tags.get("ResolutionUnit")
    microns = {2: 25400.0, 3: 10000.0}.get(int(unit.value)) if unit else None
    sides: list[float | None] = []
    for name in ("XResolution", "YResolution"):
        tag = page.tags.get(name)
        above, below = tag.value if tag else (0, 1)
        sides.append(microns * below / above if microns and above and below else None)
    return _mean(*sides)


def _mean(across: float | None, down: float | None) -> float | None:
    if across is None or down is None:
        return across or down
    if abs(across - down) > 0.02 * max(across, down):
        raise LayoutError(f"pixels are not square: {across:g} x {down:g} µm")
    return (across + down) / 2
