"""Hostile and damaged headers: refused or read, in bounded memory, never an endless loop or another kind of error."""

import io
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from histoscale.data.index import examine
from histoscale.data.manifest import Slide
from histoscale.data.parts import Rejected
from histoscale.data.readers import layout
from histoscale.data.readers.codec import decode_tile
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.pyramid import DecodeError, LayoutError, Level
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import Missing, Store
from histoscale.data.tissue import TissueConfig

MakeSlide = Callable[..., Path]
Draw = Callable[..., np.ndarray]


def directory(entries: dict[int, tuple[int, int, bytes]], following: int) -> bytes:
    """A classic little-endian IFD: tag -> (type, count, value of 4 bytes)."""
    rows = b"".join(struct.pack("<HHI4s", tag, *entry) for tag, entry in sorted(entries.items()))
    return struct.pack("<H", len(entries)) + rows + struct.pack("<I", following)


def long(value: int) -> tuple[int, int, bytes]:
    return 4, 1, struct.pack("<I", value)


def tiled(**changed: tuple[int, int, bytes]) -> dict[int, tuple[int, int, bytes]]:
    """A 64 x 64 px level of one uncompressed tile at byte 8."""
    tags = {
        "width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262, "samples": 277, "planar": 284,
        "tile_width": 322, "tile_height": 323, "offsets": 324, "counts": 325, "subifds": 330,
    }  # fmt: skip
    values = {name: long(64) for name in ("width", "height", "tile_width", "tile_height")}
    values |= {"bits": long(8), "compression": long(1), "photometric": long(2), "samples": long(3), "planar": long(1)}
    values |= {"offsets": long(8), "counts": long(64 * 64 * 3)}
    return {tags[name]: value for name, value in {**values, **changed}.items()}


PIXELS = 64 * 64 * 3
AT = 8 + PIXELS  # where the first directory stands


def written(path: Path, *directories: bytes, size: int | None = None) -> Path:
    path.write_bytes(b"II*\0" + struct.pack("<I", AT) + bytes(PIXELS) + b"".join(directories))
    if size is not None:
        with path.open("r+b") as file:
            file.truncate(size)
    return path


def many(count: int) -> list[bytes]:
    """A chain of so many equal directories, each at its own place."""
    one = len(directory(tiled(), 0))
    return [directory(tiled(), AT + (i + 1) * one if i + 1 < count else 0) for i in range(count)]


HUGE = struct.pack("<I", 1 << 31)
HOSTILE: dict[str, list[bytes]] = {
    "an empty level": [directory(tiled(width=long(0)), 0)],
    "an absurd width": [directory(tiled(width=(4, 1, HUGE)), 0)],
    "absurd sides": [directory(tiled(width=(4, 1, HUGE), height=(4, 1, HUGE)), 0)],
    "absurd tiles": [directory(tiled(tile_width=(4, 1, HUGE), tile_height=(4, 1, HUGE)), 0)],
    "no tile size": [directory(tiled(tile_width=long(0)), 0)],
    "two counts for one tile": [directory(tiled(counts=(4, 2, struct.pack("<I", 8))), 0)],
    "2^31 offsets": [directory(tiled(offsets=(4, 1 << 31, struct.pack("<I", 8))), 0)],
    "an absurd width and as many offsets": [
        directory(tiled(width=(4, 1, HUGE), **dict.fromkeys(("offsets", "counts"), (4, 1 << 25, b"\x08\x00\x00\x00"))), 0)
    ],
    "an offset outside": [directory(tiled(offsets=long(1 << 30)), 0)],
    "a count outside": [directory(tiled(counts=long((1 << 32) - 1)), 0)],
    "2000 images": many(2000),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_in_bounded_memory(tmp_path: Path, store: Store, name: str) -> None:
    path = written(tmp_path / "a.tif", *HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(LayoutError):
            read_layout(str(path), store)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def philips(*levels: dict[str, object], spacings: str = "", text: str = "") -> list[bytes]:
    """Directories of Philips' kind, and behind them what their tags point at: pixel spacings in mm by level, or another text."""
    said = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">"{one}"</Attribute></DataObject>'
        for one in spacings.split("|")
    )
    texts = {305: b"Philips DP v1.0\0", 270: (text or f"<DataObject>{said}</DataObject>").encode() + b"\0"}
    entries = [tiled(**changed) for changed in levels]  # type: ignore[arg-type]
    starts = [AT]
    for i, one in enumerate(entries):
        starts.append(starts[-1] + 6 + 12 * (len(one) + (2 if i == 0 else 0)))
    place = starts[-1]
    for tag, data in texts.items():
        entries[0][tag] = (2, len(data), struct.pack("<I", place))
        place += len(data)
    following = [*starts[1:-1], 0]
    return [*(directory(one, after) for one, after in zip(entries, following, strict=True)), *texts.values()]


def double(name: str, value: float) -> list[bytes]:
    """A directory with one tag whose value is a double, which lies behind it."""
    behind = struct.pack("<I", AT + len(directory(tiled(), 0)))
    return [directory(tiled(**{name: (12, 1, behind)}), 0), struct.pack("<d", value)]


TWO = {"width": long(128), "offsets": (4, 2, long(8)[2]), "counts": (4, 2, long(8)[2])}
RUINOUS: dict[str, tuple[list[bytes], str]] = {
    "Philips without an object": (philips({}, text="x</DataObject>"), "no bright-field tissue"),  # OpenSlide reads it
    "a smaller level of the same spacing": (
        philips(TWO, {}, spacings="0.5 0.5|0.5 0.5"),
        "a level of 128x64 px: its directory holds 64x64 px",
    ),
    "a ratio beyond all numbers": (philips({}, {}, spacings="1e-300 1e-300|1e300 1e300"), "inf times those of level 0"),
    "a ratio beyond the level": (philips({}, {}, spacings="0.0005 0.0005|0.5 0.5"), "1000 times those of level 0"),
    "a width that is no number": (double("width", float("nan")), "tag 256 has the unknown type 12"),
    "a compression without end": (double("compression", float("inf")), "tag 259 has the unknown type 12"),
    "offsets that are no number": (double("offsets", float("nan")), "tag 324 has the unknown type 12"),
}


@pytest.mark.parametrize("name", RUINOUS)
def test_what_a_header_says_costs_its_slide_and_not_the_index(
    tmp_path: Path, store: Store, tissue_config: TissueConfig, name: str
) -> None:
    directories, reason = RUINOUS[name]
    path = written(tmp_path / "a.tif", *directories)
    found = examine(Slide("a", str(path), *[None] * 5, 0.5, *[None] * 3, {}), store, tissue_config)
    assert isinstance(found, Rejected) and reason in found.reason


@pytest.mark.parametrize("error", [ArithmeticError, KeyError, TypeError, ValueError])
def test_what_no_rule_foresaw_is_a_damaged_header(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(file: object) -> None:
        raise error("strange")

    monkeypatch.setattr(layout, "_tiff", fail)
    with pytest.raises(LayoutError, match=f"its TIFF header is damaged or a vendor's own \\({error.__name__}: '?strange'?\\)"):
        read_layout(str(written(tmp_path / "a.tif")), store)


def test_the_drawn_header_is_a_slide_when_nothing_is_wrong_with_it(tmp_path: Path, store: Store) -> None:
    layout = read_layout(str(written(tmp_path / "a.tif", directory(tiled(), 0))), store)
    assert layout.kind == "tiff" and layout.levels[0].counts.tolist() == [PIXELS]


@pytest.mark.parametrize("cycle", ["next", "subifds", "subifd of itself"])
def test_cyclic_directories_end(tmp_path: Path, store: Store, cycle: str) -> None:
    """The first directory is whole: it is read, or the file refused, but nothing goes round for ever."""
    first = tiled() if cycle == "next" else tiled(subifds=long(AT if cycle == "subifd of itself" else AT + 200))
    body = directory(first, AT if cycle == "next" else 0)
    second = directory(tiled(subifds=long(AT)), AT)
    path = written(tmp_path / "a.tif", body.ljust(200, b"\0"), second)
    try:
        assert len(read_layout(str(path), store).levels) == 1
    except LayoutError as error:
        assert str(error)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path, store: Store) -> None:
    """Half a billion tiles in a sparse file that really is so long."""
    entries = tiled(
        width=(4, 1, HUGE), height=long(1 << 20), offsets=(4, 1 << 29, b"\x08\0\0\0"), counts=(4, 1 << 29, b"\x08\0\0\0")
    )
    path = written(tmp_path / "a.tif", directory(entries, 0), size=3 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(LayoutError, match="headers take more than 256 MB"):
            read_layout(str(path), store)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_fourteen_million_tiles_of_a_sparse_file_are_refused(tmp_path: Path, store: Store) -> None:
    """Their tables do lie in the file, which takes no room on a disk: as numbers of Python they take a gigabyte."""
    side, tiles = 3742 * 64, 3742**2
    table = (4, tiles, long(1 << 20)[2])
    entries = tiled(width=long(side), height=long(side), offsets=table, counts=table)
    path = written(tmp_path / "a.tif", directory(entries, 0), size=64 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(LayoutError, match="14002564 tiles of 64x64 px"):
            read_layout(str(path), store)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_tiles_that_are_one_another_are_refused(tmp_path: Path, store: Store) -> None:
    """A quarter of a million tiles that are all the same twelve kilobytes: an hour of decoding from two megabytes. A blank tile
    that a few share is none of that."""
    for across, refused in ((512, True), (4, False)):
        count, place = across**2, AT + 512
        entries = tiled(width=long(across * 64), height=long(across * 64))
        entries |= {tag: (4, count, struct.pack("<I", at)) for tag, at in ((324, place), (325, place + 4 * count))}
        tables = struct.pack("<I", 8) * count + struct.pack("<I", PIXELS) * count
        path = written(tmp_path / "a.tif", directory(entries, 0).ljust(512, b"\0"), tables)
        if refused:
            with pytest.raises(LayoutError, match="its tiles overlap"):
                read_layout(str(path), store)
        else:
            assert len(read_layout(str(path), store).levels[0].offsets) == 16


@pytest.mark.parametrize("count", [4097, 65535])
def test_a_directory_of_too_many_tags_is_damaged(tmp_path: Path, store: Store, count: int) -> None:
    with pytest.raises(LayoutError, match=f"a directory of {count} tags"):
        read_layout(str(written(tmp_path / "a.tif", struct.pack("<H", count) + bytes(12 * count + 4))), store)


def test_a_jpeg_that_claims_to_be_huge_allocates_nothing(draw_tissue: Draw) -> None:
    file = io.BytesIO()
    Image.fromarray(draw_tissue(64, 64)).save(file, "JPEG")
    data, nothing = bytearray(file.getvalue()), np.zeros(0, np.int64)
    frame = data.index(b"\xff\xc0")
    level = Level(64, 64, 64, 64, 1.0, "jpeg", "ycbcr", 1, b"", nothing, nothing)
    assert decode_tile(bytes(data), level).shape == (64, 64, 3)
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    with pytest.raises(DecodeError, match="its image is 65500x65500"):
        decode_tile(bytes(data), level)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["aperio", "generic", "ome"]), data=st.data())
def test_whatever_a_header_says_it_is_a_layout_or_an_error(
    tmp_path: Path, store: Store, make_slide: MakeSlide, kind: str, data: st.DataObject
) -> None:
    """Bytes of the directories flipped at random; what still opens gives pixels or says what is wrong."""
    path = tmp_path / f"{kind}.tif"
    if not path.exists():
        make_slide(path, 100, 80, 64, (1, 2), kind=kind, compression="deflate")
    whole = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        stored = [(a, a + n) for page in file.pages for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    headers = [i for i in range(len(whole)) if not any(start <= i < stop for start, stop in stored)]
    for place in data.draw(st.lists(st.sampled_from(headers), min_size=1, max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.tif"
    damaged.write_bytes(whole)
    try:
        reader = open_reader(str(damaged), read_layout(str(damaged), store), store)
        for number in range(len(reader.layout.levels)):
            assert reader.region(number, -5, -5, 90, 70).shape == (70, 90, 3)
    except (LayoutError, DecodeError, Missing):
        pass
