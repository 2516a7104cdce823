"""Headers to tile tables: what a slide file holds, so that later reads touch pixels only."""

from collections.abc import Sequence

import numpy as np

from histoscale.data.readers import described, vendor
from histoscale.data.readers.pyramid import Layout, LayoutError, Level, downsample
from histoscale.data.readers.rangefile import RangeFile
from histoscale.data.readers.tiff import Page, Tag, Tiff, TiffError
from histoscale.data.storage import Store

BLOCK = 256 << 10  # header bytes a request: five requests opened a 100 MB slide
_MOST_HEADER = 256 << 20  # bytes of headers in all: a million tiles take 16 MB; more is no slide, or a hostile one
_MOST_TILES = 1 << 22  # of all levels: half a million pixels square in tiles of 256
_MOST_TILE_PX = 1 << 26  # pixels of a tile: they are held in memory at once
_SHARED = 16  # times the bytes of the file that its tiles may be: blank tiles may be stored once, a bomb stores all tiles once
_ASPECT = 0.03  # a level may differ so much from level 0's aspect: rounding of small levels
_COMPRESSIONS = {1: "raw", 5: "lzw", 7: "jpeg", 8: "deflate", 32946: "deflate"}
_COMPRESSIONS |= {33003: "jpeg2000", 33005: "jpeg2000", 34712: "jpeg2000"}
_RGB, _YCBCR = 2, 6  # TIFF photometric interpretations
_JFIF = b"\xff\xd8\xff\xe0", b"JFIF\0"  # at byte 0, at byte 6


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
        found = _tiff(Tiff(headers))
    except LayoutError:
        raise
    except OSError as error:
        if headers.exceeded:
            raise LayoutError(f"its headers take more than {_MOST_HEADER >> 20} MB: they are damaged") from error
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # also what no rule foresaw: one slide stops no index
        kind = "" if isinstance(error, TiffError) else f"{type(error).__name__}: "
        found = f"its TIFF header is damaged or a vendor's own ({kind}{error})"
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
        if int(level.counts.sum()) > _SHARED * size:
            raise LayoutError(f"its tiles overlap: those of level {number} are {level.counts.sum()} bytes, the file has {size}")
    return found


def _by_openslide(uri: str, store: Store, reason: str) -> Layout:
    """What OpenSlide knows of it; `reason` says why it is not read by range."""
    try:
        return vendor.read_header(uri, store)
    except LayoutError as error:
        raise LayoutError(f"{error}; not read by range either: {reason}") from error


def _vendor(first: Page) -> str | None:
    """Whose own TIFF this is, by its first directory; None for those that are read here."""
    if Tag.NDPI_VERSION in first and Tag.MAKE in first:
        return "ndpi"
    if first.description.endswith("</scn>"):
        return "scn"
    ventana = "Ventana" in first.software or first.software.startswith("ScanOutputManager")
    if Tag.XMP in first and (ventana or first.description in ("Label Image", "Label_Image", "Probability_Image")):
        return "bif"
    return "qpi" if first.software.startswith("PerkinElmer-QPI") else None


def _tiff(file: Tiff) -> Layout | str:
    """The layout, or why this TIFF goes to OpenSlide. Raises LayoutError, TiffError."""
    name = _vendor(file.page(file.first)[0])
    if name is not None:
        return f"{name} is a vendor's own TIFF"
    pages = file.pages()
    tiled = [page for page in pages if page.tiled and not _is_associated(page)]
    if not tiled:
        return "no tiled image in this TIFF"
    if pages[0].software.startswith("Philips DP") and pages[0].description.endswith("</DataObject>"):
        return _philips(tiled, pages[0].description)
    tiled.sort(key=lambda page: -page.width * page.height)
    first = tiled[0]
    text = first.description or pages[0].description
    ome = "<OME" in text
    smaller = sorted(file.below(first), key=lambda page: -page.width * page.height)
    size = (first.width, first.height)
    levels: list[Level] = []
    for page in (first, *(smaller or tiled[1:])):
        if not page.tiled or (levels and not _is_level(page, size, levels[-1])):
            continue
        problem = _problem(page)
        if problem and not levels:
            return problem
        if not problem:
            levels.append(_level(page, (page.width, page.height), levels, size, ome))
    if text.startswith("Aperio"):
        return Layout("tiff", tuple(levels), *described.aperio(text))
    if ome:
        known = described.ome(text, size)
        return Layout("tiff", tuple(levels), known.mpp or _resolution(first), known.objective, known.scanner)
    return Layout("tiff", tuple(levels), _resolution(first), None, None)


def _philips(tiled: list[Page], text: str) -> Layout | str:
    """Philips pads every level to whole tiles and writes the padded sizes: a level's true size is that of level 0, itself padded,
    divided by the ratio of the pixel spacings, which OpenSlide takes for whole numbers too."""
    spacings, scanner = described.philips(text)
    if len(spacings) != len(tiled) or any(len(pair) != 2 or min(pair) <= 0 for pair in spacings):
        return f"its Philips XML has pixel spacings for {len(spacings)} levels, the file has {len(tiled)}"
    size = (tiled[0].width, tiled[0].height)
    levels: list[Level] = []
    for page, (down, across) in zip(tiled, spacings, strict=True):
        ratio = (down / spacings[0][0] + across / spacings[0][1]) / 2
        if not ratio <= min(size):
            raise LayoutError(f"its Philips XML has pixels of {down:g} x {across:g} mm, {ratio:g} times those of level 0")
        shrunk = max(1, round(ratio))
        problem = _problem(page)
        if problem:
            return problem
        levels.append(_level(page, (size[0] // shrunk, size[1] // shrunk), levels, size, False))
    mpp = described.square(spacings[0][1] * 1e3, spacings[0][0] * 1e3)
    return Layout("tiff", tuple(levels), mpp, None, scanner)


def _is_associated(page: Page) -> bool:
    """Label and macro images: they carry names, so they are told by their tags alone."""
    last = page.description.rsplit("\n", 1)[-1].strip().lower()
    old = {2: 1, 3: 2}.get(page.number(Tag.SUBFILE_TYPE, 0), 0)
    return last.startswith(("label", "macro")) or (page.number(Tag.NEW_SUBFILE_TYPE, 0) or old) == 9


def _is_level(page: Page, size: tuple[int, int], previous: Level) -> bool:
    if not 0 < page.width < previous.width or not 0 < page.height < previous.height:
        return False
    across, down = size[0] / page.width, size[1] / page.height
    return abs(across - down) <= max(_ASPECT * across, across * (1 / page.width + 1 / page.height))


def _problem(page: Page) -> str | None:
    compression, photometric = page.number(Tag.COMPRESSION, 1), page.number(Tag.PHOTOMETRIC, 0)
    samples, planar, depth = page.number(Tag.SAMPLES, 1), page.number(Tag.PLANAR, 1), page.number(Tag.DEPTH, 1)
    bits = sorted(set(page.numbers(Tag.BITS, min(max(samples, 1), 4)).tolist())) or [1]
    if compression not in _COMPRESSIONS:
        return f"compression {compression}"
    if bits != [8] or samples != 3 or planar != 1 or (depth != 1 and not page.software.startswith("Philips")):
        return f"{samples} samples of {' and '.join(map(str, bits))} bit, planar configuration {planar}"
    if photometric not in (_RGB, _YCBCR):
        return f"photometric interpretation {photometric}"
    if photometric == _YCBCR and compression in (1, 5, 8, 32946):
        return "YCbCr without JPEG"
    if page.number(Tag.PREDICTOR, 1) not in (1, 2):
        return f"predictor {page.number(Tag.PREDICTOR, 1)}"
    return None


def _level(page: Page, size: tuple[int, int], above: Sequence[Level], full: tuple[int, int], ome: bool) -> Level:
    """size: of the level, which may be less than what the directory says; above: the levels before it; full: of level 0.

    The photometric tag says what JPEG samples are (OpenSlide goes by it too), but writers of OME-TIFF put RGB there and JFIF
    tiles, which are YCbCr by definition.
    """
    code, wide, high = page.number(Tag.COMPRESSION, 1), page.number(Tag.TILE_WIDTH, 0), page.number(Tag.TILE_HEIGHT, 0)
    if not (0 < wide and 0 < high and wide * high <= _MOST_TILE_PX) or min(size) < 1:
        raise LayoutError(
            f"tiles of {wide}x{high} px on a level of {size[0]}x{size[1]}: expected at most {_MOST_TILE_PX} px a tile"
        )
    if size[0] > page.width or size[1] > page.height:
        raise LayoutError(f"a level of {size[0]}x{size[1]} px: its directory holds {page.width}x{page.height} px")
    columns, rows = -(-page.width // wide), -(-page.height // high)
    told = page.count(Tag.OFFSETS), page.count(Tag.COUNTS)
    if 16 * max(told) > _MOST_HEADER:
        raise LayoutError(f"its headers take more than {_MOST_HEADER >> 20} MB: they are damaged")
    if not told[0] == told[1] == columns * rows:
        expected = f"{columns}x{rows} tiles"
        raise LayoutError(f"truncated: a level of {expected} has {told[0]} offsets and {told[1]} counts")
    total = columns * rows + sum(len(level.offsets) for level in above)
    if total > _MOST_TILES:
        raise LayoutError(f"{total} tiles of {wide}x{high} px: no slide has more than {_MOST_TILES}")
    offsets, counts = (page.numbers(tag, columns * rows) for tag in (Tag.OFFSETS, Tag.COUNTS))
    ycbcr = page.number(Tag.PHOTOMETRIC, 0) == _YCBCR
    jpeg_ycbcr = _COMPRESSIONS[code] == "jpeg" and (ycbcr or (ome and _is_jfif(page, offsets, counts)))
    inside = np.ix_(range(-(-size[1] // high)), range(-(-size[0] // wide)))
    return Level(
        *size, wide, high, downsample(full, size), _COMPRESSIONS[code], "ycbcr" if jpeg_ycbcr or code == 33003 else "rgb",
        page.number(Tag.PREDICTOR, 1), page.data(Tag.JPEG_TABLES),
        *(values.reshape(rows, columns)[inside].ravel() for values in (offsets, counts)),
    )  # fmt: skip


def _is_jfif(page: Page, offsets: np.ndarray, counts: np.ndarray) -> bool:
    """Whether the first tile that there is begins as a JFIF file does."""
    stored = np.flatnonzero(counts)
    if not len(stored):
        return False
    head = page.file.read(int(offsets[stored[0]]), 11)
    return head.startswith(_JFIF[0]) and head[6:] == _JFIF[1]


def _resolution(page: Page) -> float | None:
    microns = {2: 25400.0, 3: 10000.0}.get(page.number(Tag.RESOLUTION_UNIT, 0))
    sides = [page.fraction(tag) for tag in (Tag.X_RESOLUTION, Tag.Y_RESOLUTION)]
    return described.square(*(microns / side if microns and side else None for side in sides))
