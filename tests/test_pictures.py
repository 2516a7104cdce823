"""A picture reads the same however it was saved; its values mean what its type says, never what one picture happens to hold."""

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from histoscale.data import pictures
from histoscale.data.pictures import PictureError, bits_used, largest_float, pixels_of, size_of

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (7, 5, 3), np.uint8)
FEW = RNG.integers(0, 256, (6, 3), np.uint8)[RNG.integers(0, 6, (7, 5))]  # six colours, as a palette holds them
GREY = np.repeat(RNG.integers(0, 256, (7, 5, 1), np.uint8), 3, 2)
TWO = np.repeat(RNG.integers(0, 2, (7, 5, 1), np.uint8) * 255, 3, 2)


def pillow(pixels: np.ndarray, mode: str, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256) if mode == "P" else image.convert(mode)
    image.save(file, kind)
    return file.getvalue()


def tiff(values: np.ndarray, photometric: str, **about: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric=photometric, **about)
    return file.getvalue()


def wide(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.uint16) * 257


def declared(value: float, kind: int = 3, samples: int = 1) -> list[tuple[object, ...]]:
    return [(341, kind, samples, (value,) * samples if samples > 1 else value, False)]


def grey_png16(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(wide(pixels[..., 0])).save(file, "PNG")
    return file.getvalue()


WAYS: dict[str, tuple[np.ndarray, Callable[[np.ndarray], bytes]]] = {
    "palette": (FEW, lambda x: pillow(x, "P")),
    "palette tiff": (FEW, lambda x: pillow(x, "P", "TIFF")),
    "rgba": (RGB, lambda x: pillow(x, "RGBA")),
    "grey": (GREY, lambda x: pillow(x, "L")),
    "grey and alpha": (GREY, lambda x: pillow(x, "LA")),
    "one bit": (TWO, lambda x: pillow(x, "1")),
    "one bit tiff": (TWO, lambda x: pillow(x, "1", "TIFF")),
    "cmyk": (RGB, lambda x: pillow(x, "CMYK", "TIFF")),
    "bmp": (RGB, lambda x: pillow(x, "RGB", "BMP")),
    "16 bits grey png": (GREY, grey_png16),
    "16 bits grey": (GREY, lambda x: tiff(wide(x[..., 0]), "minisblack")),
    "16 bits grey, big endian": (GREY, lambda x: tiff(wide(x[..., 0]), "minisblack", byteorder=">")),
    "16 bits, shifted": (GREY, lambda x: tiff(x[..., 0].astype(np.uint16) << 8, "minisblack")),
    "16 bits, white is zero": (GREY, lambda x: tiff(wide(255 - x[..., 0]), "miniswhite")),
    "16 bits rgb": (RGB, lambda x: tiff(wide(x), "rgb")),
    "16 bits rgb in planes": (RGB, lambda x: tiff(np.moveaxis(wide(x), -1, 0), "rgb", planarconfig="separate")),
    "16 bits, compressed tiles": (RGB, lambda x: tiff(wide(x), "rgb", tile=(16, 16), compression="zlib")),
    "16 bits rgba": (RGB, lambda x: tiff(wide(np.dstack([x, np.full(x.shape[:2], 255)])), "rgb", extrasamples=["unassalpha"])),
    "12 bits declared": (GREY, lambda x: tiff(x[..., 0].astype(np.uint16) << 4, "minisblack", extratags=declared(4095))),
    "12 bits rgb declared": (RGB, lambda x: tiff(x.astype(np.uint16) << 4, "rgb", extratags=declared(4095, 3, 3))),
    "signed, 15 bits declared": (GREY, lambda x: tiff(x[..., 0].astype(np.int16) << 7, "minisblack", extratags=declared(32767))),
    "floats": (GREY, lambda x: tiff((x[..., 0] / 255).astype(np.float32), "minisblack")),
    "rgb of floats": (RGB, lambda x: tiff((x / 255).astype(np.float64), "rgb")),
    "floats to 255, declared": (
        RGB, lambda x: tiff(x.astype(np.float32), "rgb", extratags=[(341, 11, 3, (255.0,) * 3, False)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_another_encoding_holds_the_same_pixels(way: str, tmp_path: Path) -> None:
    pixels, encode = WAYS[way]
    data = encode(pixels)
    (tmp_path / "x").write_bytes(data)
    for source in (data, tmp_path / "x"):
        assert size_of(source) == (5, 7)
        found = pixels_of(source)
        assert found.dtype == np.uint8 and np.array_equal(found, pixels), way


@pytest.mark.parametrize("way", [name for name in WAYS if "bits" in name or "floats" in name])
def test_a_picture_of_several_windows_is_one(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_WINDOW_PX", 2)
    pixels, encode = WAYS[way]
    assert np.array_equal(pixels_of(encode(pixels)), pixels)


@pytest.mark.parametrize("values", [
    wide(np.resize(RGB, (1500, 1600, 3))), (np.resize(RGB, (1500, 1600, 3)) / 255).astype(np.float32),
    wide(np.resize(RGB, (1500, 1600, 4))),
], ids=["16 bits", "floats", "alpha"])  # fmt: skip
def test_what_is_held_beside_the_values_is_small(values: np.ndarray) -> None:
    """The file's bytes are given; then come the strip and the values, and three bytes a pixel."""
    data = tiff(values, "rgb", compression="zlib", rowsperstrip=1500, extrasamples=["unassalpha"] * (values.shape[2] - 3))
    tracemalloc.start()
    try:
        found = pixels_of(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.shape == (1500, 1600, 3) and peak <= 2 * values.nbytes + found.nbytes + (24 << 20)


@pytest.mark.parametrize("values", [np.zeros((64, 64, 8)), wide(np.zeros((64, 640, 3), np.uint8))], ids=["floats", "16 bits"])
def test_what_would_take_too_much_memory_is_not_decoded(
    values: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_MOST_BYTES", 64 * 64 * (2 * 8 * 8 + 3) - 1)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", None)  # it would be needed
    path = tmp_path / "x.tif"
    path.write_bytes(tiff(values, "minisblack" if values.shape[2] == 8 else "rgb", planarconfig="contig"))
    for read in (pixels_of, largest_float, bits_used):
        if read is not bits_used or values.dtype.kind == "u":  # Pillow opens no floats of several samples
            with pytest.raises(PictureError, match=r"px of \d+ bytes each: it would take .* MB of memory, expected at most"):
                read(path)
    monkeypatch.setattr(pictures, "_MOST_BYTES", 200)
    path.write_bytes(grey_png16(GREY))
    for read in (pixels_of, bits_used):
        with pytest.raises(PictureError, match="it would take .* MB of memory"):
            read(path)


@pytest.mark.parametrize("way", [name for name in WAYS if "16" in name or "floats" in name])
def test_no_picture_is_stretched_by_its_own_values(way: str) -> None:
    """A dark one stays as dark as it is beside a bright one."""
    pixels, encode = WAYS[way]
    dark = pixels // 8
    assert np.array_equal(pixels_of(encode(dark)), dark)


def test_a_declared_maximum_of_one_picture_is_no_range() -> None:
    """Some writers put the largest value there: only 2^k - 1 says how many bits were used."""
    values = wide(GREY[..., 0])
    assert np.array_equal(pixels_of(tiff(values, "minisblack", extratags=declared(int(values.max()) - 3))), GREY)


def test_what_is_transparent_is_white() -> None:
    clear = np.dstack([RGB, np.zeros((7, 5), np.uint8)])
    file = io.BytesIO()
    Image.fromarray(clear).save(file, "PNG")
    assert (pixels_of(file.getvalue()) == 255).all()
    assert (pixels_of(tiff(wide(clear), "rgb", extrasamples=["unassalpha"])) == 255).all()


@pytest.mark.parametrize("data, words", [
    (b"no picture", "cannot identify"),
    (tiff((GREY[..., 0] * 1.0).astype(np.float32), "minisblack"), "its values go from .* floats go from 0 to 1 unless"),
    (tiff(np.full((4, 4), np.nan, np.float32), "minisblack"), "nan"),
    (tiff(GREY[..., 0].astype(np.uint32), "minisblack"), "uint32 without a declared SMaxSampleValue"),
    (tiff(GREY[..., 0].astype(np.int16), "minisblack"), "int16 without a declared"),
    (tiff(wide(GREY[..., 0]), "minisblack", extratags=declared(4095)), "and it declares 12 bits"),
    (tiff(wide(RGB), "rgb", compression="zlib")[:-40], "^it is damaged or cut short: "),
    (pillow(RGB, "RGB")[:-30], "^it is damaged or cut short: "),
])  # fmt: skip
def test_what_means_nothing_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(PictureError, match=words) as error:
        pixels_of(data)
    assert "\n" not in str(error.value)
