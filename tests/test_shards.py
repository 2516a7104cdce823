"""WebDataset shards through the same plan and stream: local, from a store, over HTTP; named by braces; damaged in every way."""

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
from PIL import Image

from histoscale.data.keys import key
from histoscale.data.memory import StreamConfig
from histoscale.data.pixelfilter import PixelFilterConfig
from histoscale.data.plan import Plan, SamplerConfig, Visit
from histoscale.data.shards import Shards, TilesError, shards_of
from histoscale.data.storage import StorageError, Store
from histoscale.data.stream import Batch, Stream
from histoscale.data.tiles import TileSource, open_tiles
from histoscale.data.visit import VisitFailed
from histoscale.launch.loopback import Server

ROOT = Path(__file__).resolve().parents[1]
SIDE = 24
Pack = Callable[..., Path]


@pytest.fixture
def sampler() -> SamplerConfig:
    values = yaml.safe_load((ROOT / "configs/sampler/default.yaml").read_text())
    values |= {"mpps": [0.5], "weights": [1], "patch_px": SIDE, "grid": 2, "lanes_per_slot": 2}
    values["pixel_filter"] = PixelFilterConfig(**values["pixel_filter"])
    return SamplerConfig(**values)


def encoded(number: int, kind: str) -> bytes:
    """A flat tile whose colour is its number."""
    file = io.BytesIO()
    image = Image.fromarray(np.full((SIDE, SIDE, 3), (number, 255 - number, 40), np.uint8))
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def write_shard(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def members(slides: Sequence[tuple[str, int]], start: int, **about: Any) -> list[tuple[str, bytes]]:
    """Images in turn as PNG and WebP, a class file and a JSON to each: slides with so many tiles, numbered from `start`."""
    found: list[tuple[str, bytes]] = []
    for slide, count in slides:
        for i in range(count):
            kind = ("PNG", "WEBP")[i % 2]
            found.append((f"{slide}/{i:05d}.{kind.lower()}", encoded(start, kind)))
            found.append((f"{slide}/{i:05d}.cls", b"3"))
            if about:
                found.append((f"{slide}/{i:05d}.json", json.dumps({**about, "extra": [1, 2]}).encode()))
            start += 1
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards; slide b lies in two of them."""
    contents = [members([("a", 7)], 0), members([("b", 3), ("c", 9)], 7), members([("b", 2)], 19)]
    for i, held in enumerate(contents):
        write_shard(tmp_path / "shards" / f"train-{i:03d}.tar", held)
    return tmp_path / "shards"


OWN = {"a": range(7), "b": [7, 8, 9, 19, 20], "c": range(10, 19)}


def visit(number: int, slide: int) -> Visit:
    return Visit(0, 0, number, 0, slide, 0, key(1, "visit", number), 0.5)


def numbers(source: TileSource, number: int, slide: int) -> list[int]:
    return [int(patch[0, 0, 0]) for patch in source.read(visit(number, slide)).pixels]


def in_memory(folder: Path) -> str:
    for path in folder.iterdir():
        fsspec.filesystem("memory").pipe(f"/{folder.name}/{path.name}", path.read_bytes())
    return f"memory://{folder.name}"


@pytest.mark.parametrize("where", ["folder", "braces", "one", "memory", "memory braces"])
def test_a_visit_is_tiles_of_one_slide(folder: Path, store: Store, sampler: SamplerConfig, where: str) -> None:
    remote = in_memory(folder)
    uri = {
        "folder": str(folder), "braces": f"{folder}/train-{{000..002}}.tar", "one": f"{folder}/train-001.tar", "memory": remote,
        "memory braces": f"{remote}/train-{{000..002}}.tar",
    }[where]  # fmt: skip
    source = open_tiles(uri, "^(.+)/", sampler, store)
    slides = ["b", "c"] if where == "one" else ["a", "b", "c"]
    assert list(source.slide_ids) == slides
    for number in range(12):
        for row, name in enumerate(slides):
            found, own = numbers(source, number, row), set(OWN[name]) & set(range(7, 19) if where == "one" else range(99))
            assert set(found) <= own and len(set(found)) == min(4, len(own))
            again: TileSource = pickle.loads(pickle.dumps(source))
            assert numbers(again, number, row) == found


def test_what_the_json_says(tmp_path: Path, store: Store, sampler: SamplerConfig) -> None:
    held = members([("x", 3)], 0, slide_id="S-1", mpp=0.51, patient_id="P7", site="north", organ="lung")
    held += members([("y", 2)], 3, mpp=1.0, patient_id=8) + members([("z", 1)], 5)
    write_shard(tmp_path / "a.tar", held)
    source = open_tiles(str(tmp_path / "a.tar"), "^(.+)/", sampler, store)
    assert list(source.slide_ids) == ["S-1", "y", "z"]
    table = source.table()
    assert table.eligible.tolist() == [[True], [False], [True]]
    assert table.patients == ["P7", "8", "z"] and source.describe(0) == ("north", "", "lung")
    assert source.read(visit(0, 0)).mpp == 0.51 and np.isnan(source.read(visit(0, 2)).mpp)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_with_long_names(tmp_path: Path, store: Store, sampler: SamplerConfig, form: int) -> None:
    name = "/".join(["d" * 60] * 2 + ["n" * 90]) if form == tarfile.USTAR_FORMAT else "/".join(["d" * 90] * 3)
    held = [(f"{name}.png", encoded(3, "PNG")), ("ünïcode/1.jpg", encoded(4, "JPEG")), ("dir.with.dots/1.PNG", encoded(5, "PNG"))]
    path = write_shard(tmp_path / "a.tar", held, form)
    with tarfile.open(path, "a") as archive:  # what is no file of its own
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo(f"other/{kind!r}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    source = open_tiles(str(path), "^(.+)/", sampler, store)
    assert sorted(source.slide_ids) == sorted([name.rsplit("/", 1)[0], "ünïcode", "dir.with.dots"])


def test_the_index_is_made_once(folder: Path, store: Store, sampler: SamplerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, asked = in_memory(folder), []
    first = open_tiles(uri, "^(.+)/", sampler, store)
    read = Store.ranges
    monkeypatch.setattr(Store, "ranges", lambda self, uri, spans: asked.append(len(spans)) or read(self, uri, spans))
    again = open_tiles(uri, "^(.+)/", sampler, store)
    assert asked == [] and again.tiles.columns == first.tiles.columns and again.tiles.identity == first.tiles.identity
    assert again.read(visit(3, 0)).pixels and asked == [4]  # four tiles of one shard are one request
    asked.clear()
    fsspec.filesystem("memory").pipe("/shards/train-000.tar", write_shard(folder / "n.tar", members([("n", 2)], 40)).read_bytes())
    changed = open_tiles(uri, "^(.+)/", sampler, store)
    assert list(changed.slide_ids) == ["b", "c", "n"] and changed.tiles.identity != first.tiles.identity and asked


def test_many_shards_are_indexed_at_once(tmp_path: Path, store: Store, sampler: SamplerConfig) -> None:
    """Threads fill and tidy the cache together: an entry that appears or vanishes under one of them is no error."""
    for i in range(80):
        write_shard(tmp_path / "many" / f"{i:03d}.tar", members([(f"s{i:03d}", 1)], i))
    source = open_tiles(str(tmp_path / "many"), "^(.+)/", sampler, store)
    assert [numbers(source, 0, row)[0] for row in range(80)] == list(range(80))


def batches(source: TileSource, workers: int) -> list[Batch]:
    plan = Plan(1, 6, source.sampler, source.table())
    with Stream(plan, source, config(workers)) as stream:
        return [next(stream) for _ in range(8)]


def config(workers: int) -> StreamConfig:
    values = yaml.safe_load((ROOT / "configs/stream/default.yaml").read_text())
    return StreamConfig(**{**values, "workers": workers, "prefetch": 1})


def test_a_stream_over_shards_is_the_same_for_any_workers_and_place(folder: Path, store: Store, sampler: SamplerConfig) -> None:
    here = open_tiles(str(folder), "^(.+)/", sampler, store)
    there = open_tiles(in_memory(folder), "^(.+)/", sampler, store)
    known = batches(here, 0)
    for found in (batches(here, 2), batches(there, 0)):  # memory:// is not shared with other processes
        for one, other in zip(known, found, strict=True):
            assert one.pixels.numpy().tobytes() == other.pixels.numpy().tobytes() and one.x.tolist() == other.x.tolist()
    assert len({tuple(batch.slide.tolist()) for batch in known}) > 1


def test_a_stream_over_http_with_worker_processes(
    folder: Path, folder_server: tuple[Server, Path], store: Store, sampler: SamplerConfig
) -> None:
    server, served = folder_server
    shutil.copytree(folder, served / "shards")
    uri = f"{server.url}/shards/train-{{000..002}}.tar"
    known = batches(open_tiles(str(folder), "^(.+)/", sampler, store), 0)
    for workers in (0, 2):
        for one, other in zip(known, batches(open_tiles(uri, "^(.+)/", sampler, store), workers), strict=True):
            assert one.pixels.numpy().tobytes() == other.pixels.numpy().tobytes() and one.x.tolist() == other.x.tolist()


# Damage


def damaged(path: Path, name: str, junk: bytes) -> None:
    """The bytes of a member overwritten in place."""
    with tarfile.open(path) as archive:
        place = archive.getmember(name)
    with path.open("r+b") as file:
        file.seek(place.offset_data)
        file.write((junk * place.size)[: place.size])


@pytest.mark.parametrize("junk", [b"\0", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"], ids=["zeros", "png", "webp"])
def test_damaged_members_are_left_out(folder: Path, store: Store, sampler: SamplerConfig, junk: bytes) -> None:
    for i in (0, 1, 5):
        damaged(folder / "train-000.tar", f"a/{i:05d}.{('png', 'webp')[i % 2]}", junk)
    source = open_tiles(str(folder), "^(.+)/", sampler, store)
    found = {tile for number in range(20) for tile in numbers(source, number, 0)}
    assert found == {2, 3, 4, 6}
    for i in range(7):
        damaged(folder / "train-000.tar", f"a/{i:05d}.{('png', 'webp')[i % 2]}", junk)
    with pytest.raises(VisitFailed, match="none of 7 tiles"):
        source.read(visit(0, 0))


def test_a_shard_that_shrank_loses_its_last_tiles_and_one_that_is_gone_all(
    folder: Path, store: Store, sampler: SamplerConfig
) -> None:
    source = open_tiles(str(folder), "^(.+)/", sampler, store)
    assert isinstance(source.tiles, Shards)
    path = folder / "train-001.tar"
    with path.open("r+b") as file:
        file.truncate(int(source.tiles.offset[source.tiles.columns["slide_id"].index("c") + 4]))
    assert {tile for number in range(12) for tile in numbers(source, number, 2)} == {10, 11, 12, 13}
    path.unlink()
    assert {tile for number in range(12) for tile in numbers(source, number, 1)} == {19, 20}
    with pytest.raises(VisitFailed):
        source.read(visit(0, 2))


def test_a_store_that_fails_is_no_lost_tile(
    folder: Path, store: Store, sampler: SamplerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_tiles(str(folder), "^(.+)/", sampler, store)

    def outage(self: Store, uri: str, spans: Any) -> list[bytes]:
        raise StorageError(f"{uri}: no answer")

    monkeypatch.setattr(Store, "ranges", outage)
    with pytest.raises(StorageError, match="no answer"):
        source.read(visit(0, 0))


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.95])
def test_a_truncated_shard_is_refused(folder: Path, store: Store, sampler: SamplerConfig, cut: float) -> None:
    data = (folder / "train-001.tar").read_bytes()
    with tarfile.open(folder / "train-001.tar") as archive:
        last = max(member.offset_data + member.size for member in archive)
    (folder / "train-001.tar").write_bytes(data[: int(last * cut)])
    with pytest.raises(TilesError, match=r"train-001\.tar is damaged"):
        open_tiles(str(folder), "^(.+)/", sampler, store)


def test_what_is_no_shard(tmp_path: Path, store: Store, sampler: SamplerConfig) -> None:
    image = encoded(1, "PNG")
    known: dict[str, tuple[bytes | list[tuple[str, bytes]], str]] = {
        "text": (b"I am no archive\n" * 100, "is damaged, or no tar file"),
        "nothing": ([("a/1.txt", b"x")], "holds no images"),
        "twice": ([("a/1.png", image), ("a/1.jpg", image)], "two images of the key '1'"),
        "nameless": ([("1.png", image)], "finds no slide id"),
        "bad": ([("a/1.png", image), ("a/1.json", b"{")], "1.json cannot be read"),
        "mpp": ([("a/1.png", image), ("a/1.json", b'{"mpp": "fine"}')], "1.json cannot be read"),
    }
    for name, (held, words) in known.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(held) if isinstance(held, bytes) else write_shard(path, held)
        with pytest.raises(TilesError, match=words):
            open_tiles(str(path), "^(.+)/", sampler, store)
    with pytest.raises(TilesError, match="unpack it to a plain .tar"):
        open_tiles("az://c/a.tar.gz", "^(.+)/", sampler, store)
    with pytest.raises(TilesError, match="names 0 shards"):
        shards_of("a-{5..3}.tar", store)
    with pytest.raises(TilesError, match="expected 1 to 100000"):
        shards_of("a-{0..999999999}.tar", store)
    assert shards_of("s3://b/{00..01}/t-{8..10}.tar", store)[:4] == [f"s3://b/00/t-{i}.tar" for i in (8, 9, 10)] + [
        "s3://b/01/t-8.tar"
    ]
