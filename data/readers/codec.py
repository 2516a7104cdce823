"""Bytes of one tile to pixels; damaged bytes raise, they never become grey pixels."""

import zlib
from typing import NamedTuple

import imagecodecs
import numpy as np
import simplejpeg
from PIL import Image

from histoscale.data.readers.pyramid import DecodeError, Level

try:  # compiled where the machine that installs has a C compiler and libjpeg-turbo's headers; same pixels, faster
    from histoscale.data.readers import jpegparts
except ImportError:
    jpegparts = None  # type: ignore[assignment]

_APP0, _APP14, _SOS = 0xE0, 0xEE, 0xDA
_PLAIN = {0x01, *range(0xD0, 0xD9)}  # JPEG markers without a length
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}  # of them
_CODESTREAM = b"\xff\x4f\xff\x51"  # SOC and SIZ of JPEG 2000
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_MOST_PARTS = 1024  # tiles inside a codestream: OpenJPEG takes ten kilobytes for each, whatever stands in it
_END_OF_CODESTREAM = b"\xff\xd9"
_HEADS_KEPT = 256
_START_OF_SCAN, _MOST_SCANS = b"\xff\xda", 100  # jpegtile.h has the same: cjpeg writes no more
_ADOBE = {"rgb": 0, "ycbcr": 1}  # the transform byte of the Adobe marker
# T.871 (JFIF) in libjpeg's 16-bit fixed point
_HALF = 1 << 15
_RED_CR, _GREEN_CB, _GREEN_CR, _BLUE_CB = 91881, -22554, -46802, 116130


class _Frame(NamedTuple):
    """lossless: a kind that has no frequencies, and so no reduced scale."""

    width: int
    height: int
    lossless: bool


class _Head(NamedTuple):
    """What stands before the scan: of a tile as it is stored, and of the JPEG that it becomes; the frame header of it."""

    theirs: bytes
    ours: bytes
    frame: _Frame


_heads: dict[tuple[bytes, str], _Head] = {}  # by tables and colour: the last one


def returns_in_time(level: Level) -> bool:
    """Whether `paint` itself keeps to its seconds: our own decoder of JPEG does, and what is unpacked ends with the tile."""
    return level.compression not in ("jpeg", "jpeg2000") or (level.compression == "jpeg" and jpegparts is not None)


def paint(
    pixels: np.ndarray, tiles: list[memoryview], places: np.ndarray, level: Level, reduce: int, seconds: float
) -> dict[int, str]:
    """Decodes a part of each tile into its place in `pixels`, uint8 [h, w, 3]; why, of the tiles that are damaged, by index.

    places: int64 [n, 6]: left, top, right, bottom of the part (px of the tile / reduce) and its corner x, y in `pixels`.
    Raises TimeoutError where that is found to take more than `seconds` of CPU time.
    """
    if level.compression == "jpeg" and jpegparts is not None:
        ycbcr = level.colour == "ycbcr"
        found = jpegparts.paint(pixels, tiles, places, level.tables, ycbcr, level.tile_width, level.tile_height, reduce, seconds)
        return {i: f"damaged jpeg data of {len(tiles[i])} bytes: {why}" for i, why in found.items()}
    # A tile is copied before the next one is decoded: one buffer serves them all.
    scratch = np.empty((level.tile_height // reduce, level.tile_width // reduce, 3), np.uint8)
    reasons = {}
    for i, (left, top, right, bottom, x, y) in enumerate(places.tolist()):
        try:
            tile = decode_tile(tiles[i], level, reduce, scratch)
        except DecodeError as error:
            reasons[i] = str(error)
            continue
        pixels[y : y + bottom - top, x : x + right - left] = tile[top:bottom, left:right]
    return reasons


def decode_tile(data: bytes | memoryview, level: Level, reduce: int = 1, scratch: np.ndarray | None = None) -> np.ndarray:
    """uint8 [tile_height / reduce, tile_width / reduce, 3] RGB; in `scratch`, of that shape, where the decoder can.

    Raises DecodeError.

    JPEG decodes at reduced scale from the low frequencies of each block (means within 1 grey level of averaged pixels, none off
    by 32); everything else decodes whole and is averaged. The low band of JPEG 2000 is no average (off by 3 grey levels), so it
    is not used.
    """
    try:
        if level.compression == "jpeg":
            tile = _jpeg(data, level, reduce, scratch)
        else:
            tile = _DECODERS[level.compression](bytes(data), level)
            _check(tile, level, 1)
            tile = tile if reduce == 1 else np.asarray(Image.fromarray(tile).reduce(reduce))
    except (ValueError, RuntimeError, IndexError, zlib.error) as error:
        raise DecodeError(f"damaged {level.compression} data of {len(data)} bytes: {error}") from error
    _check(tile, level, reduce)
    return tile


def _check(tile: np.ndarray, level: Level, reduce: int) -> None:
    shape = (level.tile_height // reduce, level.tile_width // reduce, 3)
    if tile.shape != shape or tile.dtype != np.uint8:
        raise DecodeError(f"a {level.compression} tile is {tile.dtype} {tile.shape}: expected uint8 {shape}")


def _jpeg(data: bytes | memoryview, level: Level, reduce: int, scratch: np.ndarray | None) -> np.ndarray:
    whole, frame = _joined(data, level.tables, level.colour)
    width, height = level.tile_width, level.tile_height
    if frame[:2] != (width, height):  # the decoder would allocate it before it looks at the pixels
        raise ValueError(f"its image is {frame.width}x{frame.height}, expected {width}x{height}")
    if reduce > 1 and frame.lossless:  # the decoder would write its full size into our memory
        raise ValueError("it is lossless, and has no reduced scale")
    check_scans(whole)
    if reduce == 1:
        return simplejpeg.decode_jpeg(whole, "RGB", buffer=scratch, strict=True)
    small = {"min_height": height // reduce, "min_width": width // reduce, "min_factor": 1}
    return simplejpeg.decode_jpeg(whole, "RGB", **small, buffer=scratch, strict=True)


def check_scans(data: bytes) -> None:
    """Raises ValueError for a JPEG of more scans than any encoder writes: ten bytes of each take as long as all of its pixels."""
    if data.count(_START_OF_SCAN) > _MOST_SCANS:
        raise ValueError(f"it has more than {_MOST_SCANS} scans")


def with_tables(data: bytes | memoryview, tables: bytes, colour: str) -> bytes:
    """A whole JPEG of a tile and the shared tables, with an Adobe marker that says what the samples are.

    The layout decides the colour space, so the tile's own JFIF and Adobe markers are dropped: libjpeg would believe JFIF first.
    """
    return _joined(data, tables, colour)[0]


def _joined(data: bytes | memoryview, tables: bytes, colour: str) -> tuple[bytes, _Frame]:
    """`with_tables`, and the frame header.

    Tiles of a level mostly begin alike up to their scan, so the last beginning is remembered with what it became.
    """
    known = _heads.get((tables, colour))
    if known is not None and data[: len(known.theirs)] == known.theirs:
        return b"".join((known.ours, data[len(known.theirs) :])), known.frame
    data = bytes(data)
    own, scan = _segments(data)
    if scan < 0:
        raise ValueError("the JPEG ends before its pixels")
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([_ADOBE[colour]])
    ours = b"\xff\xd8" + _segments(tables)[0] + marker + own
    if len(_heads) > _HEADS_KEPT:
        _heads.clear()
    _heads[tables, colour] = _Head(data[:scan], ours, _frame_of(ours))
    return ours + data[scan:], _heads[tables, colour].frame


def _frame_of(head: bytes) -> _Frame:
    place = 2
    while place + 9 <= len(head) and head[place] == 0xFF and head[place + 1] not in _FRAMES:
        place += 2 + int.from_bytes(head[place + 2 : place + 4], "big")
    height, width = (int.from_bytes(head[i : i + 2], "big") for i in (place + 5, place + 7))
    return _Frame(width, height, bool(_LOSSLESS & {*head[place + 1 : place + 2]}))


def _segments(data: bytes) -> tuple[bytes, int]:
    """What stands between SOI and the scan, without APP0 and APP14, and where the scan begins (-1: there is none)."""
    if not data:
        return b"", -1
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG start marker")
    kept: list[bytes] = []
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            raise ValueError(f"no JPEG marker at byte {place}")
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        if marker == _SOS:
            return b"".join(kept), place
        if marker in _PLAIN:
            place += 2
            continue
        stop = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker not in (_APP0, _APP14):
            kept.append(data[place:stop])
        place = stop
    return b"".join(kept), -1


def _jpeg2000(data: bytes, level: Level) -> np.ndarray:
    """Its codestream says what will be allocated: image, components, and tiles of its own. All of that is looked at first."""
    start = _codestream(data)
    size = data[start : start + 51]
    right, bottom, left, top, wide, high, across, down = (int.from_bytes(size[i : i + 4], "big") for i in range(8, 40, 4))
    if (right - left, bottom - top) != (level.tile_width, level.tile_height):
        raise ValueError(f"its image is {right - left}x{bottom - top}")
    if size[40:42] != b"\0\3" or b"pclr" in data[:start]:
        raise ValueError(f"it has {int.from_bytes(size[40:42], 'big')} components, or a palette: expected 3 components")
    if not (wide and high) or -(-(right - across) // wide) * -(-(bottom - down) // high) > _MOST_PARTS:
        raise ValueError(f"it is cut into parts of {wide}x{high} px")
    if _END_OF_CODESTREAM not in data[-16:]:  # OpenJPEG may decode a cut one in silence
        raise ValueError("the codestream has no end")
    tile = imagecodecs.jpeg2k_decode(data)
    # Aperio's 33003 stores chroma at half the width: the decoder takes such a codestream for YCbCr and gives RGB.
    subsampled = len(set(size[43::3])) > 1 or len(set(size[44::3])) > 1
    return rgb_of_ycbcr(tile) if level.colour == "ycbcr" and not subsampled else tile


def _codestream(data: bytes) -> int:
    """Where the codestream begins that a decoder reads: at once, or in the first box for it of a JP2 file."""
    place = 0
    if data.startswith(_JP2):
        while data[place + 4 : place + 8] != b"jp2c":
            length, long = int.from_bytes(data[place : place + 4], "big"), int.from_bytes(data[place + 8 : place + 16], "big")
            step = long if length == 1 else length
            if step < 8 or place + step >= len(data):
                raise ValueError("no JPEG 2000 codestream")
            place += step
        place += 16 if data[place : place + 4] == b"\0\0\0\1" else 8
    if not data.startswith(_CODESTREAM, place) or data.find(_CODESTREAM) != place:  # another one before it might be taken
        raise ValueError("no JPEG 2000 codestream")
    return place


def rgb_of_ycbcr(tile: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] full-range YCbCr to RGB (ITU-T T.871), rounded as libjpeg does."""
    y, cb, cr = (tile[..., i].astype(np.int32) for i in range(3))
    cb, cr = cb - 128, cr - 128
    red = y + ((_RED_CR * cr + _HALF) >> 16)
    green = y + ((_GREEN_CB * cb + _GREEN_CR * cr + _HALF) >> 16)
    blue = y + ((_BLUE_CB * cb + _HALF) >> 16)
    return np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8)


def _raw(data: bytes, level: Level) -> np.ndarray:
    shape = (level.tile_height, level.tile_width, 3)
    tile = np.frombuffer(data, np.uint8).reshape(shape)
    return np.cumsum(tile, axis=1, dtype=np.uint8) if level.predictor == 2 else tile


def _deflate(data: bytes, level: Level) -> np.ndarray:
    expected = level.tile_height * level.tile_width * 3
    stream = zlib.decompressobj()
    return _raw(stream.decompress(data, expected + 1), level)


def _lzw(data: bytes, level: Level) -> np.ndarray:
    return _raw(bytes(imagecodecs.lzw_decode(data, out=level.tile_height * level.tile_width * 3 + 1)), level)


_DECODERS = {"jpeg2000": _jpeg2000, "raw": _raw, "deflate": _deflate, "lzw": _lzw}
