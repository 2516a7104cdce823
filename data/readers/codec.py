"""Bytes of one tile to pixels; damaged bytes raise, they never become grey pixels."""

import zlib

import imagecodecs
import numpy as np
import simplejpeg
from PIL import Image

from histoscale.data.readers.pyramid import DecodeError, Level

_APP0, _APP14, _SOS = 0xE0, 0xEE, 0xDA
_PLAIN = {0x01, *range(0xD0, 0xD9)}  # JPEG markers without a length
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers
_CODESTREAM = b"\xff\x4f\xff\x51"  # SOC and SIZ of JPEG 2000
_END_OF_CODESTREAM = b"\xff\xd9"
_ADOBE = {"rgb": 0, "ycbcr": 1}  # the transform byte of the Adobe marker
# T.871 (JFIF) in libjpeg's 16-bit fixed point
_HALF = 1 << 15
_RED_CR, _GREEN_CB, _GREEN_CR, _BLUE_CB = 91881, -22554, -46802, 116130


def decode_tile(data: bytes | memoryview, level: Level, reduce: int = 1) -> np.ndarray:
    """uint8 [tile_height / reduce, tile_width / reduce, 3] RGB. Raises DecodeError.

    JPEG decodes at reduced scale from the low frequencies of each block (means within 1 grey level of averaged pixels, none off
    by 32); everything else decodes whole and is averaged. The low band of JPEG 2000 is no average (off by 3 grey levels), so it
    is not used.
    """
    data = bytes(data)
    try:
        if level.compression == "jpeg":
            tile = _jpeg(data, level, reduce)
        else:
            tile = _DECODERS[level.compression](data, level)
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


def _jpeg(data: bytes, level: Level, reduce: int) -> np.ndarray:
    whole = with_tables(data, level.tables, level.colour)
    _check_frame(whole, level)
    if reduce == 1:
        return simplejpeg.decode_jpeg(whole, "RGB", strict=True)
    height, width = level.tile_height // reduce, level.tile_width // reduce
    return simplejpeg.decode_jpeg(whole, "RGB", min_height=height, min_width=width, min_factor=1, strict=True)


def _check_frame(whole: bytes, level: Level) -> None:
    """The decoder allocates what the frame header says before it looks at the pixels: a forged one would take gigabytes."""
    place = 2
    while whole[place] == 0xFF and whole[place + 1] not in _FRAMES:
        place += 2 + int.from_bytes(whole[place + 2 : place + 4], "big")
    height, width = (int.from_bytes(whole[i : i + 2], "big") for i in (place + 5, place + 7))
    if (width, height) != (level.tile_width, level.tile_height):
        raise ValueError(f"its image is {width}x{height}, expected {level.tile_width}x{level.tile_height}")


def with_tables(data: bytes, tables: bytes, colour: str) -> bytes:
    """A whole JPEG of a tile and the shared tables, with an Adobe marker that says what the samples are.

    The layout decides the colour space, so the tile's own JFIF and Adobe markers are dropped: libjpeg would believe JFIF first.
    """
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([_ADOBE[colour]])
    return b"\xff\xd8" + _segments(tables, False) + marker + _segments(data, True)


def _segments(data: bytes, scan: bool) -> bytes:
    """What stands between SOI and the scan (with it, if `scan`), without APP0 and APP14."""
    if not data:
        return b""
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
            return b"".join(kept) + (data[place:] if scan else b"")
        if marker in _PLAIN:
            place += 2
            continue
        stop = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker not in (_APP0, _APP14):
            kept.append(data[place:stop])
        place = stop
    if scan:
        raise ValueError("the JPEG ends before its pixels")
    return b"".join(kept)


def _jpeg2000(data: bytes, level: Level) -> np.ndarray:
    start = data.find(_CODESTREAM)  # 0, or behind the boxes of a JP2 file
    if start < 0:
        raise ValueError("no JPEG 2000 codestream")
    size = data[start : start + 51]  # it tells its size before anything is allocated for it
    right, bottom, left, top = (int.from_bytes(size[i : i + 4], "big") for i in (8, 12, 16, 20))
    if (right - left, bottom - top) != (level.tile_width, level.tile_height):
        raise ValueError(f"its image is {right - left}x{bottom - top}")
    if _END_OF_CODESTREAM not in data[-16:]:  # OpenJPEG may decode a cut one in silence
        raise ValueError("the codestream has no end")
    tile = imagecodecs.jpeg2k_decode(data)
    # Aperio's 33003 stores chroma at half the width: the decoder takes such a codestream for YCbCr and gives RGB.
    subsampled = len(set(size[43::3])) > 1 or len(set(size[44::3])) > 1
    return rgb_of_ycbcr(tile) if level.colour == "ycbcr" and not subsampled else tile


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
    return _raw(bytes(imagecodecs.lzw_decode(data, out=level.tile_height * level.tile_width * 3)), level)


_DECODERS = {"jpeg2000": _jpeg2000, "raw": _raw, "deflate": _deflate, "lzw": _lzw}
