"""Every tiled TIFF that slides come in, pixel for pixel against tifffile and OpenSlide; slides of several files."""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import fsspec
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from histoscale.data.readers.codec import decode_tile
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.pyramid import DecodeError, LayoutError, Reader
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import Store

MakeSlide = Callable[..., Path]
Draw = Callable[..., np.ndarray]
MARGIN = 7  # px of the outside that are read as well


def opened(path: Path, store: Store) -> Reader:
    return open_reader(str(path), read_layout(str(path), store), store)


def framed(reader: Reader, number: int) -> np.ndarray:
    """A whole level as the reader gives it in four uneven parts; checks that the outside is white."""
    level = reader.layout.levels[number]
    xs, ys = ([-MARGIN, side // 3, side + MARGIN] for side in (level.width, level.height))
    rows = []
    for top, below in zip(ys, ys[1:], strict=False):
        parts = [reader.region(number, x, top, right - x, below - top) for x, right in zip(xs, xs[1:], strict=False)]
        rows.append(np.concatenate(parts, axis=1))
    whole = np.concatenate(rows)
    assert (whole[:MARGIN] == 255).all() and (whole[-MARGIN:] == 255).all()
    assert (whole[:, :MARGIN] == 255).all() and (whole[:, -MARGIN:] == 255).all()
    return whole[MARGIN:-MARGIN, MARGIN:-MARGIN]


def same_as_tifffile(reader: Reader, path: Path) -> None:
    with tifffile.TiffFile(path) as file:
        every = [page for top in file.pages for page in (top, *(top.pages or ()))]
        for number, level in enumerate(reader.layout.levels):
            page = next(page for page in every if page.shape[:2] == (level.height, level.width))
            ours, theirs = framed(reader, number), page.asarray()
            absent = np.repeat(np.repeat((level.counts == 0).reshape(level.rows, -1), level.tile_height, 0), level.tile_width, 1)
            absent = absent[: level.height, : level.width]
            assert (ours[absent] == 255).all()
            np.testing.assert_array_equal(ours[~absent], theirs[~absent])


def same_as_openslide(reader: Reader, path: Path, tolerance: int = 0) -> None:
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == tuple((level.width, level.height) for level in reader.layout.levels)
        for number, step in enumerate(slide.level_downsamples):
            if step == int(step):
                theirs = np.asarray(slide.read_region((0, 0), number, slide.level_dimensions[number]))
                ours, solid = framed(reader, number), theirs[..., 3] == 255
                assert np.abs(ours[solid].astype(int) - theirs[solid][:, :3]).max(initial=0) <= tolerance
                assert (ours[~solid] == 255).all()


def opens_in_openslide(path: Path) -> bool:
    try:
        openslide.OpenSlide(path).close()
    except openslide.OpenSlideError:
        return False
    return True


STORED: list[dict[str, Any]] = [
    {"compression": "jpeg", "colour": "rgb"},
    *({"compression": "jpeg", "colour": "ycbcr", "subsampling": by} for by in ((1, 1), (2, 1), (2, 2), (4, 1))),
    {"compression": "j2k_rgb"},
    {"compression": "j2k"},
    {"compression": "raw"},
    *({"compression": name, "predictor": difference} for name in ("deflate", "lzw") for difference in (False, True)),
]


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: "-".join(map(str, stored.values())))
@pytest.mark.parametrize(("byteorder", "bigtiff"), list(product("<>", (False, True))))
def test_every_tiff(
    tmp_path: Path, store: Store, make_slide: MakeSlide, stored: dict[str, Any], byteorder: str, bigtiff: bool
) -> None:
    """Borders padded, a tile missing in each row, two levels: as a generic TIFF, and as OME-TIFF with its levels in SubIFDs."""
    shape = {"width": 290, "height": 210, "tile": 64, "downsamples": (1, 2), "byteorder": byteorder, "bigtiff": bigtiff}
    for kind in ("generic", "ome"):
        path = make_slide(tmp_path / f"{kind}.tif", kind=kind, subifds=kind == "ome", missing=(1, 9, 10, 19), **shape, **stored)
        reader = opened(path, store)
        assert reader.layout.kind == "tiff" and reader.layout.mpp == pytest.approx(0.5)
        assert [level.downsample for level in reader.layout.levels] == [1.0, 2.0]
        same_as_tifffile(reader, path)
        if kind == "generic" and opens_in_openslide(path):
            same_as_openslide(reader, path)


@pytest.mark.parametrize(
    "stored",
    [
        *({"colour": "ycbcr", "subsampling": by} for by in ((1, 1), (2, 1), (2, 2), (4, 1))),
        {"colour": "rgb"},
        {"compression": "j2k_ycc"},
        {"compression": "j2k_rgb"},
    ],
    ids=lambda stored: "-".join(map(str, stored.values())),
)
def test_aperio_equals_openslide(tmp_path: Path, store: Store, make_slide: MakeSlide, stored: dict[str, Any]) -> None:
    """Without missing tiles: above one, OpenSlide draws its own reduction in place of the tile that is stored."""
    for bigtiff in (False, True):
        path = make_slide(tmp_path / f"{bigtiff}.svs", 500, 330, 96, (1, 2, 4), bigtiff=bigtiff, **stored)
        reader = opened(path, store)
        assert reader.layout.kind == "tiff" and reader.layout.objective == 20.0
        same_as_openslide(reader, path)


def write_tiles(path: Path, tiles: Sequence[bytes], side: int, across: int, **tags: Any) -> Path:
    """One level of given encoded tiles, `across` in a row."""
    shape = (len(tiles) // across * side, across * side, 3)
    with tifffile.TiffWriter(path) as file:
        file.write(iter(tiles), shape=shape, dtype=np.uint8, tile=(side, side), metadata=None, **tags)
    return path


def abbreviated(whole: bytes) -> tuple[bytes, bytes]:
    """A JPEG split into its tables and the rest."""
    tables, rest, place = b"\xff\xd8", b"\xff\xd8", 2
    while whole[place + 1] != 0xDA:
        stop = place + 2 + int.from_bytes(whole[place + 2 : place + 4], "big")
        if whole[place + 1] in (0xDB, 0xC4):
            tables += whole[place:stop]
        else:
            rest += whole[place:stop]
        place = stop
    return tables + b"\xff\xd9", rest + whole[place:]


@pytest.mark.parametrize("restart", [0, 1, 3])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_shared_tables_and_restart_markers(
    tmp_path: Path, store: Store, draw_tissue: Draw, restart: int, subsampling: str
) -> None:
    pixels, tiles = draw_tissue(192, 128, whole=True), []
    for y, x in product(range(0, 128, 64), range(0, 192, 64)):
        file = io.BytesIO()
        part = Image.fromarray(pixels[y : y + 64, x : x + 64])
        part.save(file, "JPEG", quality=80, subsampling=subsampling, restart_marker_blocks=restart)
        tables, rest = abbreviated(file.getvalue())
        assert (b"\xff\xd0" in rest) == bool(restart)
        tiles.append(rest)
    sampled = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}[subsampling]
    tags = {"compression": 7, "photometric": "ycbcr", "subsampling": sampled, "resolution": (2e4, 2e4)}
    path = write_tiles(
        tmp_path / "a.tif", tiles, 64, 3, extratags=[(347, 7, len(tables), tables, True)], resolutionunit=3, **tags
    )
    reader = opened(path, store)
    assert reader.layout.levels[0].tables == tables
    same_as_tifffile(reader, path)
    same_as_openslide(reader, path)


# 32 x 32 px, YCbCr with chroma at half the width and at half of both, as OpenJPEG's opj_compress wrote them
SUBSAMPLED = {
    "4:2:2": "|4;u>051Rl0000W0000W00000000000000W0000W000000000000RdB0S5vB2Lb{AQUDA9000310t5sA0smY83P3<eNKi;fQ2%5AB>(|Ka%Ew3Wn>^?"
    "c_2@4Wo}APMMofZWpZ<AZ*CwmE;TMN|BwI*000000LuUY|C7hekUaQ{;*MuJ8j1i7EQ&ooaz5VTh5*TCpk1Itv2%b~m3n<`M90Qd2*6#R=S9$v_DI@JQ0@(6"
    "Yw_)G$;Zr86ae)qWUmX}A72*$j|F*+VTjrAlz_qT9|wqm!+;RXHyrv1!u{E>@VQhv=?ogFi9cs1z6=?gkD@V<z~O))OC_>_EP%n)AmiXFfEs>r%5<p(gw;-s"
    "<wQ5ug%obazZ!mVv=#J6lsgh+$=~IK8h&xd5UGlCmk5CW*#",
    "4:2:0": "|4;u>051Rl0000W0000W00000000000000W0000W000000000000RdB0S5vC2Lb~BQUDA9000310t5sA0smY83P3<eNKi;fQ2%5AB>(|Ka%Ew3Wn>^?"
    "c_2@4Wo}APMMofZWpZ<AZ*CwmE;TMN|BwI*000000L}mb|C7hekUaQ{;*MuJ8j1i7EQ&ooaz5VTh5*TCpk1Itv2%b~m3n<`M90!N5BD#>CH^T4QCZb-aIeSA"
    "G!xFD|8UpYnGxGX#V^2Bz*Ybk1sS=8he_AWQiu#1X*!i;2??mX>;=K_6$iv32MiLA3WUd<_6MfB5O~I0Asjux5N=koA-BNjuo3_vxm)CM6JgA4fWgN>$3Sr)"
    "71)=bjymq(z#%%e$D#trNtD|`APGMleipJ-71*ggROGgIs(}C5",
}  # fmt: skip


@pytest.mark.parametrize("name", SUBSAMPLED)
def test_subsampled_jpeg2000_is_within_rounding_of_openslide(tmp_path: Path, store: Store, name: str) -> None:
    """Aperio's own 33003: OpenJPEG's library converts such tiles itself and cuts fractions off where OpenSlide rounds."""
    text = "Aperio Image Library v11.2.1 \r\n96x64 (32x32) J2K/YUV16 Q=70|AppMag = 40|MPP = 0.25"
    path = write_tiles(
        tmp_path / "a.svs",
        [base64.b85decode(SUBSAMPLED[name])] * 6,
        32,
        3,
        compression=33003,
        photometric="rgb",
        description=text,
    )
    reader = opened(path, store)
    assert reader.layout.kind == "tiff"
    same_as_openslide(reader, path, tolerance=1)
    assert np.ptp(framed(reader, 0)[..., 0].astype(int)) > 90  # not grey


@pytest.mark.parametrize("boxed", [False, True], ids=["codestream", "JP2 file"])
def test_jpeg2000_with_and_without_its_boxes(tmp_path: Path, store: Store, draw_tissue: Draw, boxed: bool) -> None:
    """A forged size in the codestream is refused before anything is allocated, in boxes as well."""
    pixels = draw_tissue(128, 64, whole=True)
    tiles = [
        imagecodecs.jpeg2k_encode(np.ascontiguousarray(part), level=0, codecformat="jp2" if boxed else "j2k", reversible=True)
        for part in (pixels[:, :64], pixels[:, 64:])
    ]
    assert tiles[0].startswith(b"\xff\x4f") != boxed
    path = write_tiles(tmp_path / "a.tif", tiles, 64, 2, compression=34712, photometric="rgb")
    reader = opened(path, store)
    np.testing.assert_array_equal(framed(reader, 0), pixels)
    size = tiles[0].index(b"\xff\x4f\xff\x51") + 8
    forged = tiles[0][:size] + b"\x7f\xff\xff\xff" * 2 + tiles[0][size + 8 :]
    with pytest.raises(DecodeError, match="its image is 2147483647x2147483647"):
        decode_tile(forged, reader.layout.levels[0])


# Philips


def philips_xml(mpps: Sequence[float]) -> str:
    def attribute(name: str, value: str) -> str:
        return f'<Attribute Name="{name}" Group="0x0028" Element="0x0030" PMSVR="IString">{value}</Attribute>'

    def spacing(mpp: float) -> str:
        return attribute("DICOM_PIXEL_SPACING", f"&quot;{mpp / 1e3:.9f}&quot; &quot;{mpp / 1e3:.9f}&quot;")

    def several(name: str, kind: str, parts: Sequence[str]) -> str:
        held = "".join(f'<DataObject ObjectType="{kind}">{part}</DataObject>' for part in parts)
        return (
            f'<Attribute Name="{name}" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array>{held}</Array></Attribute>'
        )

    numbered = [spacing(mpp) + attribute("PIIM_PIXEL_DATA_REPRESENTATION_NUMBER", str(i)) for i, mpp in enumerate(mpps)]
    stored = several("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", "PixelDataRepresentation", numbered)
    scanned = attribute("PIM_DP_IMAGE_TYPE", "WSI") + spacing(mpps[0]) + stored
    known = attribute("DICOM_MANUFACTURER", "PHILIPS") + attribute("DICOM_MANUFACTURERS_MODEL_NAME", "UFS Scanner")
    images = several("PIM_DP_SCANNED_IMAGES", "DPScannedImage", [scanned])
    return f'<?xml version="1.0" encoding="UTF-8" ?>\n<DataObject ObjectType="DPUfsImport">{known}{images}</DataObject>'


def write_philips(path: Path, pixels: np.ndarray, tile: int, mpps: Sequence[float], missing: Sequence[int]) -> Path:
    """Every level padded to whole tiles and said to be so large; `missing` tiles of each level are not stored."""

    def encoded(padded: np.ndarray) -> Iterator[bytes]:
        places = product(range(0, padded.shape[0], tile), range(0, padded.shape[1], tile))
        for number, (y, x) in enumerate(places):
            file = io.BytesIO()
            Image.fromarray(padded[y : y + tile, x : x + tile]).save(file, "JPEG", quality=85, subsampling="4:2:0")
            yield b"" if number in missing else file.getvalue()

    with tifffile.TiffWriter(path, bigtiff=True) as out:
        for i in range(len(mpps)):
            image = np.asarray(Image.fromarray(pixels).reduce(2**i))
            high, wide = (-(-side // tile) * tile for side in image.shape[:2])
            padded = np.full((high, wide, 3), 90, np.uint8)
            padded[: image.shape[0], : image.shape[1]] = image
            out.write(
                encoded(padded), shape=padded.shape, dtype=np.uint8, tile=(tile, tile), compression=7, photometric="ycbcr",
                subsampling=(2, 2), metadata=None, software="Philips DP v1.0", subfiletype=1 if i else 0,
                description=philips_xml(mpps) if i == 0 else "",
            )  # fmt: skip
    return path


@pytest.mark.parametrize("mpps", [(0.25, 0.5, 1.0, 2.0), (0.227273, 0.454545, 0.909091)], ids=len)
@pytest.mark.parametrize("missing", [(), (1, 2, 7)], ids=len)
def test_philips_levels_lose_their_padding(
    tmp_path: Path, store: Store, draw_tissue: Draw, mpps: tuple[float, ...], missing: tuple[int, ...]
) -> None:
    path = write_philips(tmp_path / "a.tiff", draw_tissue(640, 384, whole=True), 128, mpps, missing)
    with tifffile.TiffFile(path) as file:
        assert file.pages[2].shape == (128, 256, 3)  # the true size is 160 x 96
    reader = opened(path, store)
    layout = reader.layout
    assert (layout.kind, layout.scanner) == ("tiff", "UFS Scanner") and layout.mpp == pytest.approx(mpps[0])
    assert [level.downsample for level in layout.levels] == [2.0**i for i in range(len(mpps))]
    same_as_openslide(reader, path)


def test_philips_without_its_spacings_goes_to_openslide_or_is_refused(tmp_path: Path, store: Store, draw_tissue: Draw) -> None:
    path = write_philips(tmp_path / "a.tiff", draw_tissue(640, 384), 128, (0.25, 0.5), ())
    data = path.read_bytes()
    path.write_bytes(data.replace(b'PixelDataRepresentation"', b'PixelDataRepresentatiom"'))
    try:
        layout = read_layout(str(path), store)
    except LayoutError as error:
        assert "pixel spacings for 0 levels" in str(error)
    else:
        assert layout.kind == "openslide"


def test_levels_stored_smallest_first(tmp_path: Path, store: Store, draw_tissue: Draw) -> None:
    image = Image.fromarray(draw_tissue(256, 192, whole=True))
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for shrunk in (4, 2, 1):
            file.write(
                np.asarray(image.reduce(shrunk)), tile=(32, 32), photometric="rgb", metadata=None, resolution=(2e4, 2e4),
                resolutionunit=3, subfiletype=1 if shrunk > 1 else 0,
            )  # fmt: skip
    reader = opened(tmp_path / "a.tif", store)
    assert [level.width for level in reader.layout.levels] == [256, 128, 64]
    same_as_tifffile(reader, tmp_path / "a.tif")


# A slide of several files


def write_vms(folder: Path, pixels: np.ndarray) -> None:
    """A Hamamatsu VMS slide of one JPEG, whose restart markers are the tiles, a map, a macro; a foreign file beside it."""
    folder.mkdir()
    image = Image.fromarray(pixels)
    for name, shrunk in (("slide.jpg", 1), ("slide_map2.jpg", 8), ("slide_macro.jpg", 8)):
        image.reduce(shrunk).save(folder / name, "JPEG", quality=90, subsampling="4:4:4", restart_marker_blocks=8)
    (folder / "other.jpg").write_bytes(b"not of this slide")
    fields = {"NoLayers": 1, "NoJpegColumns": 1, "NoJpegRows": 1, "ImageFile": "slide.jpg", "MapFile": "slide_map2.jpg"}
    fields |= {"MacroImage": "slide_macro.jpg", "OptimisationFile": "gone.opt", "ImageFile(9)": "../../secret", "LayerSpacing": 0}
    fields |= {"PhysicalWidth": pixels.shape[1] * 500, "PhysicalHeight": pixels.shape[0] * 500, "MacroHorizontalOffset": 0}
    lines = [f"{name}={value}" for name, value in fields.items()]
    (folder / "slide.vms").write_text("[Virtual Microscope Specimen]\r\n" + "\r\n".join(lines) + "\r\n")


def remote(folder: Path) -> str:
    """The same folder in a store that OpenSlide cannot see."""
    memory, name = fsspec.filesystem("memory"), f"/formats/{folder.name}"
    for file in folder.rglob("*"):
        if file.is_file():
            memory.pipe(f"{name}/{file.relative_to(folder)}", file.read_bytes())
    return f"memory:/{name}"


def test_a_vms_slide_brings_the_files_that_it_names(tmp_path: Path, store: Store, draw_tissue: Draw) -> None:
    write_vms(tmp_path / "vms", draw_tissue(512, 256, whole=True))
    here = tmp_path / "vms/slide.vms"
    (tmp_path / "secret").write_bytes(b"no part of it")
    there = remote(tmp_path / "vms") + "/slide.vms"
    copied = store.local(there)
    assert {file.name for file in copied.parent.iterdir()} == {"slide.vms", "slide.jpg", "slide_map2.jpg", "slide_macro.jpg"}
    assert [path.name for path in (tmp_path / "cache").rglob("secret")] == []
    layout = read_layout(there, store)
    assert layout.kind == "openslide" and layout.mpp == pytest.approx(0.5)
    reader = open_reader(there, layout, store)
    with openslide.OpenSlide(here) as slide:
        for number, size in enumerate(slide.level_dimensions):
            theirs = np.asarray(slide.read_region((0, 0), number, size))[..., :3]
            np.testing.assert_array_equal(reader.region(number, 0, 0, *size), theirs)


def test_a_dicom_series_is_read_from_a_store(shared_data: Path, store: Store) -> None:
    here = shared_data / "slides/dicom/CMU-1-Small-Region-wsidicomizer"
    there = remote(here)
    expected = opened(here, store).region(0, 700, 900, 300, 200)
    for uri in (there, f"{there}/{sorted(file.name for file in here.iterdir())[2]}"):
        np.testing.assert_array_equal(open_reader(uri, read_layout(uri, store), store).region(0, 700, 900, 300, 200), expected)
