"""Synthetic slides for tests: small pyramids with one knob per trap, and a store to read them with."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from histoscale.data.storage import StorageConfig, Store
from histoscale.data.tissue import TissueConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Local files, short patience."""
    return Store(StorageConfig({}, "fsspec", str(tmp_path / "cache"), 1 << 30, 20.0, 5.0, 60.0))


@pytest.fixture(scope="session")
def tissue_config() -> TissueConfig:
    """The committed default."""
    return TissueConfig(**yaml.safe_load((ROOT / "configs/tissue/default.yaml").read_text()))


@pytest.fixture(scope="session")
def make_slide() -> Callable[..., Path]:
    """`write_slide` below."""
    return write_slide


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ready tiles of noise, 40 px wide, in the folders a and b."""
    folder = tmp_path_factory.mktemp("tiles")
    for i in range(4):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def draw_tissue() -> Callable[..., np.ndarray]:
    """`tissue_pixels` below."""
    return tissue_pixels


def tissue_pixels(width: int, height: int, seed: int = 0, whole: bool = False) -> np.ndarray:
    """uint8 [height, width, 3]: a pink blob with purple dots on glass; with `whole` there is no glass."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    coarse = rng.normal(size=(height // 16 + 2, width // 16 + 2)).astype(np.float32)
    field = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))[..., None]
    fine = rng.normal(0, 4, (height, width, 1))
    pixels = np.array([222, 140, 180.0]) + field * np.array([18, 30, 16]) + fine
    pixels = np.where(field > 0.9, np.array([110, 70, 150.0]) + fine, pixels)
    inside = ((rows / height - 0.5) ** 2 + (columns / width - 0.5) ** 2) < 0.12
    if not whole:
        pixels = np.where(inside[..., None], pixels, np.array([244, 243, 245.0]) + fine / 4)
    return pixels.clip(0, 255).astype(np.uint8)


def write_slide(
    path: Path,
    width: int = 1100,
    height: int = 900,
    tile: int = 256,
    downsamples: Sequence[float] = (1, 4),
    compression: str = "jpeg",
    colour: str = "rgb",
    subsampling: tuple[int, int] = (1, 1),
    mpp: float | None = 0.5,
    kind: str = "aperio",
    byteorder: str = "<",
    bigtiff: bool = False,
    subifds: bool = False,
    missing: Sequence[int] = (),
    predictor: bool = False,
    seed: int = 0,
    pixels: np.ndarray | None = None,
) -> Path:
    """A tiled pyramid. kind: aperio, generic (resolution tags) or ome. compression: jpeg, raw, deflate, lzw, j2k_rgb (33005),
    j2k_ycc (33003) or j2k (34712). colour of JPEG samples: rgb or ycbcr. missing: level-0 tiles with count 0.
    """
    full = tissue_pixels(width, height, seed) if pixels is None else pixels
    height, width = full.shape[:2]
    levels = [full]
    for downsample in downsamples[1:]:
        size = (max(1, int(width / downsample)), max(1, int(height / downsample)))
        levels.append(np.asarray(Image.fromarray(full).resize(size, Image.Resampling.BOX)))
    codes = {"raw": 1, "lzw": 5, "jpeg": 7, "deflate": 8, "j2k_ycc": 33003, "j2k_rgb": 33005, "j2k": 34712}
    common: dict[str, Any] = {
        "tile": (tile, tile), "compression": codes[compression], "metadata": None,
        "photometric": "ycbcr" if colour == "ycbcr" else "rgb", "predictor": predictor,
    }  # fmt: skip
    if compression == "jpeg":
        common |= {"subsampling": subsampling, "compressionargs": {"outcolorspace": colour}}  # else tifffile turns RGB into YCbCr
    if kind == "generic" and mpp is not None:
        common |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder) as file:  # type: ignore[arg-type]
        for number, image in enumerate(levels):
            high, wide = image.shape[:2]
            data = _tiles(image, tile, compression, colour, subsampling, predictor, missing if number == 0 else ())
            below = subifds and number > 0
            file.write(
                data, shape=image.shape, dtype=np.uint8, **common,
                description=_description(kind, number, (width, height), (wide, high), tile, mpp),
                subifds=len(levels) - 1 if subifds and number == 0 else None,
                subfiletype=1 if (kind == "generic" or below) and number else 0,
            )  # fmt: skip
    return path


def _tiles(
    image: np.ndarray,
    tile: int,
    compression: str,
    colour: str,
    subsampling: tuple[int, int],
    predictor: bool,
    missing: Sequence[int],
) -> Iterator[bytes]:
    """Encoded tiles, row by row; borders padded with grey, so that padding that leaks is seen."""
    high, wide = (-(-side // tile) * tile for side in image.shape[:2])
    padded = np.full((high, wide, 3), 90, np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    number = 0
    for y in range(0, high, tile):
        for x in range(0, wide, tile):
            part = np.ascontiguousarray(padded[y : y + tile, x : x + tile])
            yield b"" if number in missing else _encode(part, compression, colour, subsampling, predictor)
            number += 1


def _encode(part: np.ndarray, compression: str, colour: str, subsampling: tuple[int, int], predictor: bool) -> bytes:
    if compression == "jpeg":
        space = "YCBCR" if colour == "ycbcr" else "RGB"
        return imagecodecs.jpeg8_encode(part, level=85, colorspace="RGB", outcolorspace=space, subsampling=subsampling)
    if compression.startswith("j2k"):
        if compression == "j2k_ycc":
            part = np.asarray(Image.fromarray(part).convert("YCbCr"))
        return imagecodecs.jpeg2k_encode(part, level=0, codecformat="j2k", mct=compression != "j2k_ycc", reversible=True)
    if predictor:
        part = np.diff(part, axis=1, prepend=np.zeros_like(part[:, :1]))
    data = part.tobytes()
    if compression == "raw":
        return data
    return imagecodecs.zlib_encode(data) if compression == "deflate" else imagecodecs.lzw_encode(data)


def _description(
    kind: str, number: int, full: tuple[int, int], size: tuple[int, int], tile: int, mpp: float | None
) -> str | None:
    if kind == "aperio":
        to = "" if number == 0 else f" -> {size[0]}x{size[1]}"
        known = f"|AppMag = 20|MPP = {mpp}|ScanScope ID = TEST1" if mpp is not None else ""
        return f"Aperio Image Library v11.2.1 \r\n{full[0]}x{full[1]} ({tile}x{tile}){to} JPEG/RGB Q=85{known}"
    if kind == "ome" and number == 0:
        sides = (f'PhysicalSize{axis}="{mpp}" PhysicalSize{axis}Unit="&#181;m"' for axis in "XY")
        where = " ".join(sides) if mpp else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
            '<Instrument ID="I:0"><Microscope Model="Scope 9"/><Objective ID="O:0" NominalMagnification="40.0"/></Instrument>'
            f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="{full[0]}" '
            f'SizeY="{full[1]}" SizeC="3" SizeZ="1" SizeT="1" Interleaved="true" {where}>'
            '<Channel ID="C:0" SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>'
        )
    return None
