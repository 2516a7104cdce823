"""A picture as people save it -> uint8 RGB: 8 and 16 bits, palette, grey, alpha, CMYK, one bit, floats.

What a value means follows from the file's type and from what it declares, never from the values of one picture:
16-bit pixels keep their high byte, so that 8 bits times 257 (or shifted by 8) come back as they were; where a TIFF declares that
its samples end at 2^k - 1 (SMaxSampleValue, MaxSampleValue), of fewer bits than they are stored in, the high 8 of those k bits.
Floats go from 0 to 1, or over the range that the TIFF declares, or to what the caller says of the set that the picture is from.
What is transparent lies on white, as a viewer shows it. What a header says is looked at before anything is decoded: a picture of
more than MOST_PX pixels is refused, one of more than 8 bits that would take more than 512 MiB of memory, and kinds of file that
nobody asked for (Pillow would run PostScript).
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from histoscale.data.readers.codec import check_scans

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
UNREAD = (  # images to their owners, and not read here
    ".jp2", ".j2k", ".jpx", ".jxl", ".jfif", ".avif", ".heic", ".heif", ".gif", ".ppm", ".pgm", ".tga", ".psd", ".exr", ".raw",
    ".dng", ".npy", ".npz", ".dcm", ".svs", ".ndpi", ".mrxs",
)  # fmt: skip
MOST_PX = 1 << 27  # of a picture: 11,585 px square, 400 MB of RGB; what is larger is a slide
KINDS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")  # as Pillow calls them
_MOST_BYTES = 1 << 29  # of memory for one of more than 8 bits: its values twice (a strip, and where they go), and RGB
_WINDOW_PX = 512  # side of what is scaled at a time
_MOST_SAMPLES = 8  # of a pixel: three colours, alpha, and a few that are not read
BROKEN = (Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError)  # as Pillow says it
_BROKEN_TIFF = (LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError, struct.error, zlib.error)  # tifffile
_DEEP = ("I", "F")  # Pillow's modes of more than 8 bits: I, I;16 and its kind, F
_DEEP_BYTES = {"I": 4, "F": 4}  # a pixel; others 2
_LEAST, _MOST = (340, 280), (341, 281)  # SMinSampleValue, MinSampleValue; SMaxSampleValue, MaxSampleValue
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2  # TIFF's PhotometricInterpretation
_PREMULTIPLIED, _ALPHA = 1, 2  # TIFF's ExtraSamples
_BITS = 258  # TIFF's BitsPerSample
_TILE = (322, 323)  # TIFF's TileWidth, TileLength


class PictureError(ValueError):
    """No picture, a damaged one, or one whose values could mean several things; the message says which."""


def size_of(source: Path | bytes) -> tuple[int, int]:
    """Width and height from the header. Raises PictureError."""
    try:
        with _image(source) as image:
            return image.size
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        with _first_page(source, error) as page:
            return page.imagewidth, page.imagelength
    except BROKEN as error:
        raise PictureError(_broken(error)) from error


def pixels_of(source: Path | bytes, white: Callable[[], float] = lambda: 1.0) -> np.ndarray:
    """uint8 [h, w, 3] of a file, or of the bytes of one; of several pages the first.

    white: what floats end at where the file does not declare it; asked only then. Raises PictureError.
    """
    try:
        with _image(source) as image:
            if image.format in ("JPEG", "MPO"):
                check_scans(source if isinstance(source, bytes) else source.read_bytes())
            if image.format == "TIFF" and max(image.tag_v2.get(_BITS, (1,))) > 8:  # type: ignore[attr-defined]
                return _of_tiff(source, None, white)
            if image.mode.startswith(_DEEP):  # a PNG of 16 bits, whose samples always fill them
                _check_memory(*image.size, _DEEP_BYTES.get(image.mode, 2))
                return _as_rgb((np.asarray(image) >> 8).astype(np.uint8)[..., None])
            return np.asarray(_on_white(image))
    except PictureError:
        raise
    except UnidentifiedImageError as error:  # RGB of floats, say
        return _of_tiff(source, error, white)
    except BROKEN as error:
        raise PictureError(_broken(error)) from error


def largest_float(path: Path) -> float:
    """Of a TIFF of floats that declares no range its largest value, of anything else 0. Raises PictureError."""
    with path.open("rb") as file:
        if file.read(2) not in (b"II", b"MM"):
            return 0.0
    with _first_page(path, None) as page:
        is_float = page.dtype is not None and page.dtype.kind == "f" and _declared(page, _MOST) is None
        return float(page.asarray().max()) if is_float else 0.0


def bits_used(path: Path) -> tuple[int, int] | None:
    """(bits a sample is stored in, bits that its values take) of a grey PNG or a TIFF of more than 8 unsigned bits that declares
    no fewer; None for anything else. Raises PictureError."""
    try:
        with _image(path) as image:
            deep = image.format == "TIFF" and max(image.tag_v2.get(_BITS, (1,))) > 8  # type: ignore[attr-defined]
            if not deep:
                if not image.mode.startswith("I;16"):
                    return None
                _check_memory(*image.size, _DEEP_BYTES.get(image.mode, 2))
                return 16, int(np.asarray(image).max()).bit_length()
    except PictureError:
        raise
    except BROKEN as error:
        raise PictureError(_broken(error)) from error
    with _first_page(path, None) as page:
        if page.dtype is None or page.dtype.kind != "u" or _declared(page, _MOST) is not None:
            return None
        return int(page.bitspersample), int(page.asarray().max()).bit_length()


@contextmanager
def _image(source: Path | bytes) -> Iterator[Image.Image]:
    """By Pillow, not decoded yet. Raises PictureError for one that is too large, UnidentifiedImageError for other kinds."""
    with Image.open(_opened(source), formats=KINDS) as image:
        _check_size(*image.size)
        if image.format == "TIFF":
            tags = image.tag_v2  # type: ignore[attr-defined]
            _check_size(*(int(np.max(tags.get(tag, 1))) for tag in _TILE))
        yield image


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PX:
        raise PictureError(f"{width} x {height} px: expected at most {MOST_PX} pixels; cut it into tiles, or index it as a slide")


def _check_memory(width: int, height: int, value_bytes: int) -> None:
    """value_bytes: of the decoded values of a pixel."""
    taken = width * height * (2 * value_bytes + 3)
    if taken > _MOST_BYTES:
        raise PictureError(
            f"{width} x {height} px of {value_bytes} bytes each: it would take {taken / 1e6:,.1f} MB of memory, expected at most "
            f"{_MOST_BYTES / 1e6:,.1f} MB; save it with 8 bits, or cut it into tiles"
        )


def _broken(error: Exception) -> str:
    """What Pillow or tifffile say, in words for a person where the file's bytes are to blame."""
    told = isinstance(error, UnidentifiedImageError | Image.DecompressionBombError) or getattr(error, "errno", None) is not None
    return str(error) if told else f"it is damaged or cut short: {error}"


def _opened(source: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _as_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 1 or 3] -> [h, w, 3]."""
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


# TIFFs of more than 8 bits a sample: Pillow reads them in part, and without what they declare.


@contextmanager
def _first_page(source: Path | bytes, error: Exception | None) -> Iterator[tifffile.TiffPage]:
    """error: of Pillow, which is told where this is no TIFF either. Raises PictureError, also for what is read inside, and for
    one whose values would take too much memory."""
    try:
        with tifffile.TiffFile(_opened(source)) as file:
            page = file.pages.first
            if not isinstance(page, tifffile.TiffPage) or page.samplesperpixel > _MOST_SAMPLES or page.imagedepth > 1:
                raise PictureError(f"a TIFF of {page.samplesperpixel} samples a pixel: expected at most {_MOST_SAMPLES}")
            _check_size(page.imagewidth, page.imagelength)
            _check_size(page.tilewidth, page.tilelength)
            value_bytes = page.samplesperpixel * (8 if page.dtype is None else page.dtype.itemsize)
            _check_memory(page.imagewidth, page.imagelength, value_bytes)
            _check_memory(page.tilewidth, page.tilelength, value_bytes)
            yield page
    except PictureError:
        raise
    except (tifffile.TiffFileError, *_BROKEN_TIFF, *BROKEN) as other:
        raise PictureError(str(error) if error and isinstance(other, tifffile.TiffFileError) else _broken(other)) from other


def _of_tiff(source: Path | bytes, error: Exception | None, white: Callable[[], float]) -> np.ndarray:
    with _first_page(source, error) as page:
        return _of_page(page, white)


def _of_page(page: tifffile.TiffPage, white: Callable[[], float]) -> np.ndarray:
    if page.axes not in ("YX", "YXS", "SYX") or page.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        raise PictureError(f"a TIFF of {page.dtype} in {page.axes}, {page.photometric!s} is not read: save it as RGB of 8 bits")
    values = page.asarray()
    if page.axes == "SYX":
        values = np.moveaxis(values, 0, -1)
    elif page.axes == "YX":
        values = values[..., None]
    bytes_of = _bytes_of(values, page, white)
    rgb = np.empty((*values.shape[:2], 3), np.uint8)
    for y in range(0, rgb.shape[0], _WINDOW_PX):  # in windows, so that what stands between is small
        for x in range(0, rgb.shape[1], _WINDOW_PX):
            window = np.s_[y : y + _WINDOW_PX, x : x + _WINDOW_PX]
            rgb[window] = _colours(bytes_of(values[window]), page)
    return rgb


def _colours(pixels: np.ndarray, page: tifffile.TiffPage) -> np.ndarray:
    """uint8 [h, w, samples] of a page -> [h, w, 1 or 3] on white."""
    colours = 3 if page.photometric == _RGB else 1
    alpha = next((i for i, kind in enumerate(page.extrasamples) if kind in (_PREMULTIPLIED, _ALPHA)), None)
    rgb = pixels[..., :colours]
    if page.photometric == _WHITE_IS_ZERO:
        rgb = 255 - rgb
    if alpha is not None:
        cover = pixels[..., colours + alpha, None] / 255
        weight = 1.0 if page.extrasamples[alpha] == _PREMULTIPLIED else cover
        rgb = np.rint(rgb * weight + 255 * (1 - cover)).clip(0, 255).astype(np.uint8)
    return rgb


def _bytes_of(values: np.ndarray, page: tifffile.TiffPage, white: Callable[[], float]) -> Callable[[np.ndarray], np.ndarray]:
    """What makes uint8 of the values, or of some of them. Raises PictureError for values outside the range, and for types that
    have none."""
    least, most = (_declared(page, tags) for tags in (_LEAST, _MOST))
    if values.dtype.kind == "f":
        low, high = (0.0, white()) if most is None else (float(least or 0), float(most))
        _check(values, low, high, f"floats go from {low:g} to {high:g} unless the file declares another SMaxSampleValue")
        return lambda some: np.rint((some.astype(np.float64) - low) / (high - low) * 255).astype(np.uint8)
    bits = int(page.bitspersample)
    if most is not None and 255 <= most < 2**bits and (int(most) + 1) & int(most) == 0:  # else it tells of one picture's values
        bits = int(most).bit_length()
    elif values.dtype.kind != "u" or bits > 16:
        raise PictureError(
            f"whole numbers of type {values.dtype} without a declared SMaxSampleValue of 2^k - 1: nobody can say which is white; "
            "save it with 8 or 16 unsigned bits"
        )
    _check(values, 0, 2**bits - 1, f"it declares {bits} bits")
    return lambda some: (some >> (bits - 8)).astype(np.uint8)


def _declared(page: tifffile.TiffPage, tags: tuple[int, ...]) -> float | None:
    """The value that all samples declare."""
    for tag in tags:
        found = np.unique(np.atleast_1d(page.tags.valueof(tag, ())))
        if len(found) == 1 and np.isfinite(found[0]) and found[0] > 0:
            return float(found[0])
    return None


def _check(values: np.ndarray, low: float, high: float, why: str) -> None:
    if not values.size or not (values.min() >= low and values.max() <= high):  # false for NaN
        raise PictureError(f"its values go from {values.min():g} to {values.max():g}, and {why}: save it as RGB of 8 bits")
