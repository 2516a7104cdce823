"""Slides, manifests, catalogs, masks, pictures and shards from hostile hands: one named error, or the one row that it costs."""

import io
import json
import random
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tifffile
from PIL import Image

from histoscale.data import index as indexing
from histoscale.data import masks
from histoscale.data.catalog import CatalogError, open_catalog
from histoscale.data.index import build_catalog, examine, thumbnail
from histoscale.data.journal import Journal
from histoscale.data.manifest import ManifestError, Slide, parse_manifest, read_manifest
from histoscale.data.masks import MaskError, drawn_mask, filled
from histoscale.data.parts import Rejected
from histoscale.data.pictures import PictureError, pixels_of, size_of
from histoscale.data.readers.codec import decode_tile
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.pyramid import DecodeError, Level
from histoscale.data.readers.region import open_reader
from histoscale.data.shards import TilesError, index
from histoscale.data.storage import Store, check_uri
from histoscale.data.tissue import TissueConfig
from histoscale.launch.config import load
from histoscale.launch.overrides import ConfigError
from histoscale.launch.run import invoke

MakeSlide = Callable[..., Path]


@contextmanager
def within(megabytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
    finally:
        tracemalloc.stop()


# URIs

CREDENTIALS = (
    "https://user:SECRET@host/a.svs", "https://SECRET@host/a.svs", "https://user:SE/SECRET@host/a.svs",
    "https:/user:SECRET@host/a.svs", "https://user%3ASECRET@host/a.svs", "HTTPS://user:SECRET@[::1]:80/a.svs",
    "s3://AKIA:SECRET@bucket/a.svs",
    "az://container:SECRET@account/a.svs", "file://user:SECRET@host/a.svs", "simplecache::https://user:SECRET@host/a.svs",
    "zip://a.svs::https://user:SECRET@host/a.zip",
    "zip://a.svs::simplecache::https://user:SE/SECRET@host/a.zip", "https://[::1]:SECRET@host/a.svs", "s3://arn:SE/SECRET@b/a.svs",
    "s3://arn:aws:s3:SECRET@bucket/a.svs",
    "sftp://user:SECRET@host/a.svs", "https://host/a.svs?sig=SECRET",
)  # fmt: skip
PLAIN = (
    "az://container@account.dfs.core.windows.net/a.svs", "abfs://container@account/a@b.svs", "s3://bucket/a@2x:b.svs",
    "http://h:80/a.svs", "https://[::1]:80/a.svs", "/data/user:x@y.svs", "a@b.svs", "memory://bucket/a.svs",
    "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/my-ap/key.svs", "s3://arn:aws-cn:s3::1:accesspoint:my-ap/a.svs",
    "zip://a.zip::s3://bucket/x", "zip://a::https://host/x", "zip://a::simplecache::https://[::1]:80/x",
    "zip://a::az://container@account/x", "zip://*.svs::file:///data/a.zip", "zip://a::s3://arn:aws:s3:us-west-2:1:accesspoint/b/x",
)  # fmt: skip


@pytest.mark.parametrize("uri", CREDENTIALS)
def test_a_credential_in_a_uri_is_refused_and_not_shown(tmp_path: Path, store: Store, uri: str) -> None:
    (tmp_path / "m.csv").write_text(
        f"slide_id,uri,mask,origin\na,{uri},,\nb,b.svs,{uri},\nc,c.svs,,seen at {uri.split('?')[0]}\n"
    )
    with pytest.raises(ManifestError) as rows:
        read_manifest(str(tmp_path / "m.csv"), store)
    with pytest.raises(ConfigError) as key:
        load("pretrain", [f"catalog={uri}", "recipe=demo"])
    assert "SECRET" not in f"{rows.value} {key.value}" and "storage.options" in str(rows.value)
    assert str(rows.value).count("\n  row") == (2 if "?" in uri or "https:/u" in uri else 3) and "catalog=" in str(key.value)


def test_other_uris_are_none(store: Store) -> None:
    for uri in PLAIN:
        check_uri(uri)


def test_the_beginning_of_a_password_is_one_in_every_link_of_a_chain() -> None:
    arn = "arn:aws:s3:us-west-2:123456789012:SECRET"
    for uri in ("zip://user:SECRET::https://host/a.zip", "zip://a::https://user:SECRET/a.zip", f"https://{arn}/a.svs"):
        with pytest.raises(ValueError, match="names a user or a password") as caught:
            check_uri(uri)
        assert "SECRET" not in str(caught.value)


# Manifests

BAD: dict[str, dict[str, str]] = {
    "a NUL": {"site": "no\0rth"}, "an escape": {"note": "\x1b[2J"}, "a separator at the end": {"patient_id": "p\x1f"},
    "a NUL in the path": {"uri": "a\0.svs"}, "a line in the path": {"uri": "a\n.svs"}, "a path as id": {"slide_id": "../../x"},
    "a NUL in the id": {"slide_id": "a\0b"}, "a hidden id": {"slide_id": ".x"}, "a long id": {"slide_id": "x" * 201},
    "a megabyte": {"note": "x" * 1_000_000}, "a megabyte of marks": {"note": "a" + "\u0300\u0316" * 500_000},
    "a NUL in the mask": {"mask": "m\0.json"},
}  # fmt: skip


def bad_rows(uri: str) -> list[dict[str, str]]:
    rows = [{"slide_id": "good", "uri": uri, "site": "n\u00f6rd", "patient_id": "p", "mask": "", "note": "two\nlines\tand a tab"}]
    return rows + [{**rows[0], "slide_id": f"s{i}", **changed} for i, changed in enumerate(BAD.values())]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_row_that_no_person_typed_costs_its_slide(tmp_path: Path, store: Store, make_slide: MakeSlide, kind: str) -> None:
    """All of them in one manifest: the catalog has the good slide, and every bad row with its reason."""
    rows, path = bad_rows(str(make_slide(tmp_path / "good.svs", 640, 480))), tmp_path / f"m.{kind}"
    if kind == "csv":
        lines = [",".join(f'"{cell}"' for cell in row) for row in (rows[0], *(row.values() for row in rows))]
        path.write_text("\n".join(lines), newline="")
    else:
        columns = {name: pyarrow.array([row[name].encode() for row in rows]) for name in rows[0]}
        columns["site"] = pyarrow.array([b"\xff\xfe" if i == 1 else b"north" for i in range(len(rows))])
        pyarrow.parquet.write_table(pyarrow.table({name: column.view("string") for name, column in columns.items()}), path)
    out = tmp_path / "out"
    found = invoke("index", [f"manifest={path}", f"out={out}", "logging.progress=off"])["index"]
    assert (found["accepted"], found["rejected_by_reason"]) == (1, {"bad row": len(BAD)})
    catalog = open_catalog(str(out), store)
    assert list(catalog.slide_ids) == ["good"] and catalog.slides[0].labels == {"note": "two\nlines\tand a tab"}
    reasons = [one.reason for one in catalog.rejected]
    assert all(one.slide_id.isprintable() and len(one.reason) < 400 for one in catalog.rejected)
    for words in ("row ", "control character", "1000000 characters", "file name", "line break"):
        assert any(words in reason for reason in reasons), (words, reasons)


def test_a_manifest_of_bad_rows_alone_and_a_quote_that_stays_open(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "m.csv"
    for text, words in {
        "slide_id,uri\na\0,a.svs\n../b,b.svs\n": "2 bad rows",
        'slide_id,uri\na,a.svs\nb,"b.svs\nc,c.svs\n': "a quote in row 3 is never closed",
        "slide_id,uri,no\0te\na,a.svs,\n": "the name of the column",
        "slide_id,uri" + ",x" * 100_000 + "\na,a.svs" * 1000: "twice",
        "slide_id,uri" + "".join(f",x{i}" for i in range(30_000)) + "\na,a.svs" * 1000: "leave empty",
    }.items():
        path.write_text(text)
        with pytest.raises(ManifestError, match=words):
            read_manifest(str(path), store)
    path.write_bytes("slide_id,uri\na,a.svs\n".encode("utf-16-le"))
    assert [slide.slide_id for slide in parse_manifest(str(path), store)[0]] == ["a"]


@pytest.mark.parametrize("uri", ["a\0b.svs", "a\ud800.svs", "x" * 5000, "a.csv/b.svs", "round/b.svs"])
def test_a_path_that_can_name_no_file_is_a_missing_slide(
    tmp_path: Path, store: Store, tissue_config: TissueConfig, uri: str
) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "round").symlink_to(tmp_path / "round")
    slide = Slide("a", f"{tmp_path}/{uri}", None, None, None, None, None, 0.5, None, None, None, {})
    found = examine(slide, store, tissue_config)
    assert isinstance(found, Rejected) and found.reason.startswith("missing")


# Slides


def test_hostile_descriptions_take_time_in_proportion(tmp_path: Path, make_slide: MakeSlide) -> None:
    """Two megabytes of each in a process of a minute: patterns that go back need hours for one."""
    texts = [
        "<OME>" + "<Objective " * 200_000,
        "<OME><Pixels " + 'a="1" ' * 300_000,
        "Aperio" + "|" + " = " * 600_000,
        "Aperio" + "| a" * 600_000,
    ]
    texts += [
        "<OME>" + "<a>" * 600_000,
        "<OME><Objective " + " " * 2_000_000 + "NominalMagnification",
        "<OME>" + "<Microscope Model " * 100_000,
    ]
    for i, text in enumerate(texts):
        pixels = np.zeros((64, 64, 3), np.uint8)
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels, tile=(64, 64), photometric="rgb", metadata=None, description=text)
    script = (
        "import sys; from pathlib import Path; from histoscale.data.storage import Store, StorageConfig; "
        "from histoscale.data.readers.layout import read_layout; "
        "store = Store(StorageConfig({}, 'fsspec', sys.argv[1], 1, 1.0, 1.0, 60.0)); "
        "print([read_layout(str(path), store).kind for path in sorted(Path(sys.argv[1]).glob('*.tif'))])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("tiff") == len(texts), done.stderr


def test_entities_do_not_expand(tmp_path: Path, store: Store, make_slide: MakeSlide) -> None:
    bomb = '<!DOCTYPE OME [<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    text = f'{bomb}]><OME><Instrument><Microscope Model="&h;"/></Instrument></OME>'
    tifffile.imwrite(
        tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint8), tile=(64, 64), photometric="rgb", metadata=None, description=text
    )
    with within(16):
        assert read_layout(str(tmp_path / "a.tif"), store).scanner is None


def test_a_wide_level_is_shrunk_in_blocks_of_bounded_memory(
    tmp_path: Path, store: Store, make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 gigapixels in long rows, of which one tile is stored; and blocks give what strips give."""
    path = make_slide(tmp_path / "a.tif", 900, 700, 64, (1,), kind="generic")
    reader = open_reader(str(path), read_layout(str(path), store), store)
    strips = thumbnail(reader, 0, 5)
    level = reader.layout.levels[0]
    with monkeypatch.context() as patched:
        patched.setattr(indexing, "_WIDEST_PX", 1000)
        patched.setattr(indexing, "_STRIP_PX", 10_000)
        np.testing.assert_array_equal(thumbnail(reader, 0, 5), strips)
    offsets, counts = np.zeros(128 * 16, np.int64), np.zeros(128 * 16, np.int64)
    offsets[1000], counts[1000] = level.offsets[40], level.counts[40]
    wide = replace(level, width=1 << 17, height=1 << 14, tile_width=1024, tile_height=1024, offsets=offsets, counts=counts)
    reader.layout = replace(reader.layout, levels=(wide,))
    with within(256):
        assert thumbnail(reader, 0, 32).shape == (512, 4096, 3)


def siz(width: int, height: int, part: int, components: int = 3) -> bytes:
    """The beginning of a JPEG 2000 codestream."""
    sizes = b"".join(value.to_bytes(4, "big") for value in (width, height, 0, 0, part, part, 0, 0))
    return (
        b"\xff\x4f\xff\x51"
        + (38 + 3 * components).to_bytes(2, "big")
        + b"\0\0"
        + sizes
        + components.to_bytes(2, "big")
        + b"\7\1\1" * components
    )


def test_jpeg_2000_is_measured_by_what_the_decoder_reads() -> None:
    """A small size in a box before the codestream, a large one in it: four bytes a pixel and component would be allocated."""
    nothing = np.zeros(0, np.int64)
    level = Level(64, 64, 64, 64, 1.0, "jpeg2000", "rgb", 1, b"", nothing, nothing)
    large = imagecodecs.jpeg2k_encode(np.zeros((3000, 3000, 3), np.uint8), level=0, codecformat="jp2", reversible=True)
    small = imagecodecs.jpeg2k_encode(np.zeros((64, 64, 3), np.uint8), level=0, codecformat="jp2", reversible=True)
    assert decode_tile(small, level).shape == (64, 64, 3)
    box = siz(64, 64, 64)
    hidden = large[:12] + (8 + len(box)).to_bytes(4, "big") + b"free" + box + large[12:]
    start = small.index(b"\xff\x4f\xff\x51")
    for data, words in (
        (hidden, "no JPEG 2000 codestream"), (large, "its image is 3000x3000"),
        (small.replace(b"jp2c", b"jp2x"), "no JPEG 2000 codestream"), (b"x" + small[start:], "no JPEG 2000"),
        (siz(64, 64, 64, 16000) + b"\xff\xd9", "16000 components"), (siz(64, 64, 1) + b"\xff\xd9", "parts of 1x1"),
    ):  # fmt: skip
        with pytest.raises(DecodeError, match=words):
            decode_tile(data, level)


@pytest.mark.parametrize("kind", ["deflate", "lzw"])
def test_a_tile_that_unpacks_to_more_than_it_holds_takes_no_memory(kind: str) -> None:
    nothing = np.zeros(0, np.int64)
    level = Level(64, 64, 64, 64, 1.0, kind, "rgb", 1, b"", nothing, nothing)
    bomb = (imagecodecs.zlib_encode if kind == "deflate" else imagecodecs.lzw_encode)(bytes(20 << 20))
    with within(8), pytest.raises(DecodeError):
        decode_tile(bomb + b"\0" * (kind == "deflate"), level)


# Catalogs


@pytest.fixture
def slides(tmp_path: Path, make_slide: MakeSlide) -> list[Slide]:
    uris = [make_slide(tmp_path / f"{name}.svs", 640, 480, seed=i) for i, name in enumerate("ab")] + [tmp_path / "gone.svs"]
    return [Slide(uri.stem, str(uri), "p", "x", None, None, None, None, None, None, None, {"t": "1"}) for uri in uris]


def everything(out: Path, store: Store) -> list[Any]:
    """All that a catalog says."""
    catalog = open_catalog(str(out), store)
    said: list[Any] = [list(catalog.slides), catalog.rejected, catalog.windows().tolist(), catalog.levels("width").tolist()]
    for i in range(len(catalog)):
        said += [[level.offsets.tolist(), level.counts.tolist(), level.tables] for level in catalog.layout(i).levels]
        said += [catalog.mask(i).tolist(), catalog.mask_mpp(i), catalog.thumbnail(i), catalog.fingerprint(i)]
    return said


def test_one_byte_changed_in_a_catalog_is_noticed_or_harmless(
    tmp_path: Path, slides: list[Slide], store: Store, tissue_config: TissueConfig, journal: Journal
) -> None:
    out = tmp_path / "catalog"
    catalog = build_catalog(slides, store, tissue_config, out, 0, None, journal)
    whole, draw = everything(out, store), random.Random(0)
    for path in [out / "catalog.json", *sorted((out / catalog.info["folder"]).iterdir())]:
        data, noticed = path.read_bytes(), 0
        for place in sorted(draw.sample(range(len(data)), min(len(data), 25))):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
            try:
                assert everything(out, store) == whole, f"{path.name}, byte {place}"
            except CatalogError as error:
                assert path.name in str(error) or path.name == "catalog.json"
                noticed += 1
        path.write_bytes(data)
        assert noticed == 25 or path.name == "catalog.json"
    assert everything(out, store) == whole


def test_a_damaged_part_is_examined_again(
    tmp_path: Path,
    slides: list[Slide],
    store: Store,
    tissue_config: TissueConfig,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A byte of a tile table in the journal of an index that was stopped."""
    whole = build_catalog(slides, store, tissue_config, tmp_path / "whole", 0, None, journal)
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(indexing, "write_catalog", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
        with pytest.raises(OSError, match="stopped"):
            build_catalog(slides, store, tissue_config, out, 0, None, journal)
    (part,) = (out / "parts").iterdir()
    data, thumbnail = bytearray(part.read_bytes()), whole.thumbnail(0)
    data[data.index(thumbnail) + len(thumbnail) // 2] ^= 1
    part.write_bytes(data)
    assert build_catalog(slides, store, tissue_config, out, 0, None, journal).thumbnail(0) == thumbnail


def test_a_wrong_manifest_leaves_the_catalog_that_was_there(tmp_path: Path, make_slide: MakeSlide, store: Store) -> None:
    out, good, wrong = tmp_path / "out", tmp_path / "good.csv", tmp_path / "wrong.csv"
    good.write_text(f"slide_id,uri\na,{make_slide(tmp_path / 'a.svs', 640, 480)}\n")
    wrong.write_text("slide_id,uri\na,elsewhere/a.svs\nb,elsewhere/b.svs\n")
    invoke("index", [f"manifest={good}", f"out={out}", "logging.progress=off"])
    before = everything(out, store), (out / "slides.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"none of the 2 slides was accepted.*stays as it was"):
        invoke("index", [f"manifest={wrong}", f"out={out}", "logging.progress=off"])
    assert (everything(out, store), (out / "slides.parquet").read_bytes()) == before and not (out / "parts").exists()
    assert not (out / "writing.partial").exists()


# Masks, pictures, shards

RING = [[0, 0], [600, 0], [600, 400]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "neither a PNG nor GeoJSON"),
        ('{"type":"GeometryCollection","geometries":[' * 2000, "neither a PNG nor GeoJSON"),
        (json.dumps({"type": "Polygon", "coordinates": [[[10**400, 0], [1, 1], [2, 0]]]}), "no list of positions"),
        ('{"type":"Polygon","coordinates":[[[1e400,0],[1,1],[2,0]]]}', "finite"),
        (json.dumps({"type": "MultiPolygon", "coordinates": [7]}), "neither a PNG nor GeoJSON"),
        (json.dumps({"type": "MultiPolygon", "coordinates": [[]]}), "no outline"),
        (json.dumps({"type": "x" * 1_000_000}), "holds xxx"),
        (json.dumps({"type": "MultiPolygon", "coordinates": [[RING]] * 3000}), "hundreds of times"),
        (json.dumps({"type": "Polygon", "coordinates": [[[i % 600, i % 2 * 400] for i in range(30_000)]]}), "cross"),
    ],
)  # fmt: skip
def test_a_hostile_mask_is_refused(tmp_path: Path, store: Store, text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_MOST_WORK", 1 << 24)
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(MaskError, match=words) as error:
        drawn_mask(str(tmp_path / "m.json"), store, (600, 400), (400, 600), 1.0)
    assert len(str(error.value)) < 500


def test_an_outline_of_many_edges_is_filled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four million rows are crossed; small parts give what large ones give."""
    zigzag = [np.array([[i % 997 / 2, i % 2 * 400 + 0.25] for i in range(10_001)])]
    found = []
    for at_once in (1 << 40, 1 << 16):
        monkeypatch.setattr(masks, "_AT_ONCE", at_once)
        mask = np.zeros((400, 500), bool)
        with within(16 if at_once == 1 << 16 else 1024):
            filled(mask, zigzag)
        found.append(mask)
    assert found[0].any() and (found[0] == found[1]).all()


def claimed(width: int, height: int) -> bytes:
    """A PNG whose header says more than it holds."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = imagecodecs.zlib_crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def tiff(values: np.ndarray, **about: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **about)
    return file.getvalue()


def test_a_picture_is_measured_before_it_is_decoded() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    zeros = np.zeros((16, 16, 3), np.uint16)
    tiles = bytearray(tiff(zeros, photometric="rgb", tile=(16, 16), compression="deflate"))
    for tag in (322, 323):
        place = tiles.index(tag.to_bytes(2, "little") + b"\4\0\1\0\0\0")
        tiles[place + 8 : place + 12] = (60_000).to_bytes(4, "little")
    with within(64):
        for data, words in (
            (claimed(12_000, 12_000), "12000 x 12000 px"), (claimed(1 << 20, 200), "exceeds limit"), (postscript, ""),
            (bytes(tiles), "60000 x 60000"),
            (tiff(np.zeros((4, 4, 3000), np.uint16), photometric="minisblack", planarconfig="contig"), "3000 samples"),
        ):  # fmt: skip
            with pytest.raises(PictureError, match=words):
                pixels_of(data)
    assert size_of(claimed(9_000, 9_000)) == (9_000, 9_000)


def header(name: str, size: int, kind: bytes = b"0", raw: bytes = b"") -> bytes:
    """A header of GNU tar. raw: what stands where its size should."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    head[124:136] = raw or head[124:136]
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    return bytes(head)


END = bytes(1024)
BODY = b"x".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header("a/1.png", 0, raw=b"\xff" * 12) + BODY + END, "is none"),
        (header("a/1.png", 1 << 32) + BODY + END, "is cut"),
        (header("a/1.png", 0, raw=b"\x80" + b"\xff" * 11) + BODY + END, "is cut"),
        (header("././@LongLink", 1 << 20, b"L") + bytes(1 << 20) + END, "a name of 1048576 bytes"),
        (header("x", 12, b"x") + b"12 size=-99\n".ljust(512, b"\0") + header("a/1.png", 1) + BODY + END, "is none"),
        (header("x", 9, b"x") + b"99 path=\n".ljust(512, b"\0") + header("a/1.png", 1) + BODY + END, "no record"),
        ((header("x", 9, b"x") + b"9 path=a\n".ljust(512, b"\0")) * 5000 + END, "images"),
        (header("a/1.png", 1) + BODY + header("b/2.png", 1), "is cut"),
        (header("a/1.png", 1)[:300], "is cut"),
    ],
)
def test_a_lying_shard_is_refused(tmp_path: Path, store: Store, data: bytes, words: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with within(16):
        if "images" in words:  # five thousand headers for nothing are only long
            assert len(index(str(path), len(data), store)) == 0
        else:
            with pytest.raises(TilesError, match=words) as error:
                index(str(path), len(data), store)
            assert "a.tar" in str(error.value)


def test_links_folders_and_absolute_names_in_a_shard_are_names(tmp_path: Path, store: Store) -> None:
    link = header("a/2.png", 0, b"2") + header("a/3.png", 7, b"1") + header("a/4.png", 0, b"5")
    data = link + header("/etc/../a/1.png", 1) + BODY + header("b/\x1b.png", 1, b"S") + BODY + END
    (tmp_path / "a.tar").write_bytes(data)
    table = index(str(tmp_path / "a.tar"), len(data), store)
    assert table["key"].to_pylist() == ["/etc/../a/1"] and data[table["offset"][0].as_py()] == ord("x")
