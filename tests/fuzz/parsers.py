"""The parsers of untrusted files that `index`, `pretrain` and `embed` read: what each may raise, and what a right result is."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow
import pyarrow.parquet
import tifffile
import yaml
from fuzz.engine import Target
from PIL import Image
from slide_fixtures import tissue_pixels, write_slide
from test_hostile_headers import philips, written

from histoscale.data.catalog import Catalog, CatalogError, open_catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.manifest import ManifestError, check_slide_id, read_manifest
from histoscale.data.masks import MaskError, drawn_mask
from histoscale.data.pictures import PictureError, pixels_of, size_of
from histoscale.data.readers.codec import decode_tile
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.pyramid import DecodeError, LayoutError, Level
from histoscale.data.readers.region import open_reader
from histoscale.data.shards import TilesError, index
from histoscale.data.storage import Missing, StorageConfig, StorageError, Store, check_uri
from histoscale.data.tissue import TissueConfig

ROOT = Path(__file__).resolve().parents[2]
SIDE = 32  # px of a tile


def targets(folder: Path) -> dict[str, Target]:
    """Every parser of data/, with files below `folder`."""
    store = Store(StorageConfig({}, "fsspec", str(folder / "cache"), 1 << 30, 20.0, 5.0, 60.0))
    return {
        "tiff": _tiff(folder, store),
        **_codecs(),
        "manifest": _manifest(folder, store),
        "parquet manifest": _parquet(folder, store),
        "catalog": _catalog(folder, store),
        "shard": _shard(folder, store),
        "picture": _pictures(),
        "mask": _masks(folder, store),
    }


def _tiff(folder: Path, store: Store) -> Target:
    path = folder / "slide.tif"
    seeds = []
    for kind, more in {
        "aperio": {"compression": "jpeg"},
        "generic": {"compression": "deflate", "predictor": True, "bigtiff": True, "missing": (1,)},
        "ome": {"compression": "lzw", "subifds": True, "byteorder": ">"},
    }.items():
        seeds.append(write_slide(path, 100, 80, SIDE, (1, 2), kind=kind, **more).read_bytes())  # type: ignore[arg-type]
    seeds.append(written(path, *philips({}, {}, spacings="0.5 0.5|1 1")).read_bytes())

    def call(data: bytes) -> None:
        path.write_bytes(data)
        reader = open_reader(str(path), read_layout(str(path), store), store)
        for number, level in enumerate(reader.layout.levels):
            assert 0 < level.width and 0 < level.height and level.downsample > 0
            assert reader.region(number, -3, -3, 70, 50).shape == (50, 70, 3)

    words = [b"Aperio", b"|MPP = 0.5", b"<Objective ", b'NominalMagnification="20"', b"<Pixels SizeX=", b"Philips DP", b"&quot;"]
    return Target(seeds, call, (LayoutError, DecodeError, Missing), words)


def _codecs() -> dict[str, Target]:
    part = np.ascontiguousarray(tissue_pixels(SIDE, SIDE, whole=True))
    nothing = np.zeros(0, np.int64)

    def codec(compression: str, predictor: int, *seeds: bytes) -> Target:
        level = Level(SIDE, SIDE, SIDE, SIDE, 1.0, compression, "rgb", predictor, b"", nothing, nothing)

        def call(data: bytes) -> None:
            for reduce in (1, 2):
                tile = decode_tile(data, level, reduce)
                assert tile.shape == (SIDE // reduce, SIDE // reduce, 3) and tile.dtype == np.uint8

        return Target(seeds, call, (DecodeError,))

    jpegs = [imagecodecs.jpeg8_encode(part, level=80, subsampling=by) for by in ((1, 1), (2, 2))]
    progressive = io.BytesIO()
    Image.fromarray(part).save(progressive, "JPEG", progressive=True)
    jpeg2000 = [imagecodecs.jpeg2k_encode(part, level=0, codecformat=kind, reversible=True) for kind in ("j2k", "jp2")]
    return {
        "jpeg": codec("jpeg", 1, *jpegs, progressive.getvalue()),
        "jpeg 2000": codec("jpeg2000", 1, *jpeg2000),
        "deflate": codec("deflate", 2, imagecodecs.zlib_encode(part)),
        "lzw": codec("lzw", 1, imagecodecs.lzw_encode(part)),
    }


def _read(folder: Path, name: str, store: Store) -> Callable[[bytes], None]:
    path = folder / name

    def call(data: bytes) -> None:
        path.write_bytes(data)
        for slide in read_manifest(str(path), store):
            check_slide_id(slide.slide_id)
            check_uri(slide.uri)

    return call


def _manifest(folder: Path, store: Store) -> Target:
    rows = "a,x/a.svs,p1,north,0.25,1\nb,az://c/b.svs,p2,south,,0\nc,c.svs,P2,North ,0.5,\n"
    seeds = ["slide_id,uri,patient_id,site,mpp,tumour\n" + rows, 'sep=;\nSlide ID;URI;note\n"a";a.svs;"two\nlines"\n']
    words = [
        b"\0",
        b"\x1b[31m",
        b'"',
        b",",
        b"\n",
        b"../",
        b"https://user:password@host/a.svs",
        b"?sig=",
        b"\xc3\xa9",
        b"nan",
        b"1e999",
    ]
    encoded = [*(seed.encode() for seed in seeds), seeds[0].encode("utf-16")]
    return Target(encoded, _read(folder, "manifest.csv", store), (ManifestError,), words)


def _parquet(folder: Path, store: Store) -> Target:
    table = pyarrow.table({"slide_id": ["a", "b"], "uri": ["a.svs", "b.svs"], "mpp": [0.25, None], "tumour": [1, 0]})
    seeds = []
    for packed in ("none", "snappy"):
        file = io.BytesIO()
        pyarrow.parquet.write_table(table, file, compression=packed)
        seeds.append(file.getvalue())
    return Target(seeds, _read(folder, "manifest.parquet", store), (ManifestError,))


def _catalog(folder: Path, store: Store) -> Target:
    """An input names a file of the catalog on its first line, and is what stands in it; a change that shows is an error."""
    tissue = TissueConfig(**yaml.safe_load((ROOT / "configs/tissue/default.yaml").read_text()))
    journal = Journal(folder / "journal", JournalConfig("off", 10, "off", "fuzz", False))
    rows = ["slide_id,uri,site,tumour", "gone,gone.svs,,"]
    for name, seed in (("a", 1), ("b", 2)):
        write_slide(folder / f"{name}.svs", 640, 480, 64, (1, 4), seed=seed)
        rows.append(f"{name},{name}.svs,x,1")
    (folder / "slides.csv").write_text("\n".join(rows))
    slides = read_manifest(str(folder / "slides.csv"), store)
    home = folder / "catalog"
    catalog = build_catalog(slides, store, tissue, home, 0, None, journal)
    inside = home / catalog.info["folder"]
    files = {str(path.relative_to(home)): path.read_bytes() for path in [home / "catalog.json", *sorted(inside.iterdir())]}
    whole = _content(catalog)

    def call(data: bytes) -> None:
        first, _, text = data.partition(b"\n")
        name = first.decode("latin-1")
        if name not in files:
            return
        path = home / name
        path.write_bytes(text)
        try:
            assert _content(open_catalog(str(home), store)) == whole, f"{path.name} is not as it was, and nobody says so"
        finally:
            path.write_bytes(files[name])

    seeds = [name.encode() + b"\n" + text for name, text in files.items()]
    return Target(seeds, call, (CatalogError, Missing))


def _content(catalog: Catalog) -> str:
    """A digest of all that a catalog says."""
    said: list[Any] = [catalog.hash, [str(slide) for slide in catalog.slides], [str(found) for found in catalog.rejected]]
    said += [catalog.windows().tolist(), catalog.levels("width").tolist()]
    for i in range(len(catalog)):
        levels = [
            replace(level, offsets=level.offsets.tolist(), counts=level.counts.tolist()) for level in catalog.layout(i).levels
        ]
        said += [
            str(levels),
            catalog.mask(i).tolist(),
            catalog.mask_mpp(i),
            catalog.thumbnail(i).hex(),
            str(catalog.fingerprint(i)),
        ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _shard(folder: Path, store: Store) -> Target:
    path = folder / "shard.tar"
    picture = io.BytesIO()
    Image.fromarray(tissue_pixels(16, 16, whole=True)).save(picture, "PNG")
    held = [
        ("s1/0.png", picture.getvalue()),
        ("s1/0.json", b'{"slide_id": "s", "mpp": 0.5}'),
        (f"s2/{'n' * 120}.png", picture.getvalue()),
    ]
    seeds = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for name, data in held if form != tarfile.USTAR_FORMAT else held[:2]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        seeds.append(file.getvalue())

    def call(data: bytes) -> None:
        path.write_bytes(data)
        table = index(str(path), len(data), store)
        for offset, size in zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True):
            assert 0 <= offset and 0 <= size and offset + size <= len(data)

    return Target(
        seeds, call, (TilesError,), [b"ustar\0" + b"00", b"ustar  \0", b"0000644\0", b"\x80\0\0\0", b"\xff\xff\xff", b"30 path="]
    )


def _pictures() -> Target:
    pixels = tissue_pixels(20, 16, whole=True)
    seeds = []
    for kind, mode in (
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("PNG", "RGBA"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
        ("BMP", "RGB"),
        ("TIFF", "CMYK"),
    ):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, kind)
        seeds.append(file.getvalue())
    for values, more in (
        (pixels.astype(np.uint16) * 257, {"compression": "deflate"}),
        (pixels / np.float32(255), {"tile": (16, 16)}),
    ):
        file = io.BytesIO()
        tifffile.imwrite(file, values, photometric="rgb", **more)  # type: ignore[arg-type]
        seeds.append(file.getvalue())

    def call(data: bytes) -> None:
        width, height = size_of(data)
        found = pixels_of(data)
        assert found.shape == (height, width, 3) and found.dtype == np.uint8

    return Target(seeds, call, (PictureError,), [b"IHDR", b"IDAT", b"iCCP", b"zTXt", b"RIFF", b"II*\0", b"MM\0*", b"%!PS-Adobe"])


def _masks(folder: Path, store: Store) -> Target:
    path = folder / "mask"
    ring = [[10, 10], [700, 20], [600, 500], [30, 400], [10, 10]]
    polygon = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    several = {"type": "MultiPolygon", "coordinates": [[ring], [[[1, 1], [9.5, 1], [5, 1e1]]]]}
    seeds = [json.dumps({"type": "FeatureCollection", "features": [polygon]}).encode(), json.dumps([several]).encode()]
    for mode in ("L", "RGBA", "P"):
        file = io.BytesIO()
        Image.fromarray(tissue_pixels(80, 60)).convert(mode).save(file, "PNG")
        seeds.append(file.getvalue())

    def call(data: bytes) -> None:
        path.write_bytes(data)
        mask = drawn_mask(str(path), store, (800, 600), (60, 80), 10.0)
        assert mask.shape == (60, 80) and mask.dtype == bool and mask.any()

    words = [
        b'{"type":"Polygon","coordinates":',
        b"[",
        b"[[",
        b"]",
        b"Infinity",
        b"NaN",
        b"1e400",
        b"9" * 5000,
        b"9" * 400,
        b"null",
        b'"geometries":',
    ]
    return Target(seeds, call, (MaskError, StorageError), words)
