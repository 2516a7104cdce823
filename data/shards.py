"""WebDataset shards: tar files of images and JSON, indexed once by the places of their members and read by range."""

import json
import posixpath
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow
import pyarrow.parquet

from histoscale.data.cache import FileCache
from histoscale.data.delimited import damage, shown
from histoscale.data.fingerprint import sketch_of
from histoscale.data.pictures import SUFFIXES
from histoscale.data.readers.rangefile import RangeFile
from histoscale.data.storage import Changed, Fingerprint, Missing, Store, join
from histoscale.data.tarmembers import BLOCK, Member, TarError, members

ABOUT = ("patient_id", "site", "organ", "cohort", "scanner")
_BLOCK = 1 << 20  # bytes a request while the headers of a shard are walked
_MOST_JSON = 1 << 20
_MOST_IMAGE = 1 << 28  # bytes of an encoded image: it is fetched whole
_MOST_PADDING = 1 << 20  # zeros after the last member: tar fills its last record, of 10 KB unless told otherwise
_MOST_SHARDS = 100_000
_AT_ONCE = 8  # shards that are indexed at a time
_SCHEMA = pyarrow.schema(
    [("key", pyarrow.string()), ("offset", pyarrow.int64()), ("size", pyarrow.int64()), ("mpp", pyarrow.float64())]
    + [(name, pyarrow.string()) for name in ("slide_id", *ABOUT)]
)


class TilesError(ValueError):
    """There are no tiles in what was given, or they are damaged; the message says what is missing."""


def shards_of(uri: str, store: Store) -> list[str]:
    """The shards that a URI names: one tar file, a folder's, or WebDataset's `train-{000..041}.tar`; none if it names others.

    Raises TilesError for compressed ones: they cannot be read by range.
    """
    if uri.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise TilesError(f"{uri} is compressed: a shard is read by range, so unpack it to a plain .tar")
    if uri.lower().endswith(".tar"):
        return _expanded(uri)
    if store.is_folder(uri):
        return [join(uri, name) for name in store.children(uri) if name.lower().endswith(".tar")]
    return []


def _expanded(uri: str) -> list[str]:
    """`a-{08..11}.tar` as a-08.tar … a-11.tar, for every pair of braces."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", uri)
    counts = [range(int(first), int(last) + 1) for first, last in zip(parts[1::3], parts[2::3], strict=True)]
    total = int(np.prod([len(count) for count in counts], dtype=np.float64))
    if not 0 < total <= _MOST_SHARDS:
        raise TilesError(f"{uri} names {total} shards: expected 1 to {_MOST_SHARDS}")
    widths = [len(first) for first in parts[1::3]]
    names = []
    for numbers in product(*counts):
        filled = [f"{number:0{width}d}" for number, width in zip(numbers, widths, strict=True)]
        names.append("".join(text for pair in zip(parts[::3], [*filled, ""], strict=True) for text in pair))
    return names


class Shards:
    """The images of some shards. pattern: its first group in a sample's key is the slide id, where no JSON has `slide_id`.

    The index of a shard is kept in the cache folder, so that the headers of a shard are walked once a machine.
    """

    def __init__(self, uris: Sequence[str], pattern: str, store: Store) -> None:
        self.uris, self.store = list(uris), store
        self.notes: tuple[str, ...] = ()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            marks = list(pool.map(store.fingerprint, self.uris))
            tables = list(pool.map(self._indexed, self.uris, marks))
        self.identity: Sequence[Any] = [
            (posixpath.basename(uri), sketch_of(uri, store, mark)) for uri, mark in zip(self.uris, marks, strict=True)
        ]
        whole = pyarrow.concat_tables(tables)
        if not len(whole):
            others = f" and {len(tables) - 1} more shards hold" if len(tables) > 1 else " holds"
            raise TilesError(f"{self.uris[0]}{others} no images ({', '.join(SUFFIXES)}; a key ends at the first dot of its name)")
        self.shard = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])
        self.offset, self.size = (whole[name].to_numpy() for name in ("offset", "size"))
        self.columns: dict[str, list[Any]] = {name: whole[name].to_pylist() for name in ("slide_id", "mpp", *ABOUT)}
        self.columns = {name: values for name, values in self.columns.items() if any(value is not None for value in values)}
        told = self.columns.get("slide_id", [None] * len(whole))
        self.columns["slide_id"] = _slide_ids(told, whole["key"].to_pylist(), pattern)

    def _indexed(self, uri: str, mark: Fingerprint) -> pyarrow.Table:
        cache = FileCache(Path(self.store.config.cache_dir).expanduser(), self.store.config.cache_bytes)

        def fill(folder: Path) -> None:
            pyarrow.parquet.write_table(index(uri, mark.size, self.store), folder / "index.parquet")

        folder = cache.folder(f"shard {uri} {mark.size} {mark.tag}", fill)
        return pyarrow.parquet.read_table(folder / "index.parquet", schema=_SCHEMA)

    def images(self, numbers: Sequence[int]) -> list[bytes | None]:
        """The encoded images, one request a shard; None for what is not there any more. Raises StorageError."""
        found: dict[int, bytes | None] = {}
        for shard in sorted({int(self.shard[i]) for i in numbers}):
            held = sorted((i for i in numbers if self.shard[i] == shard), key=lambda i: self.offset[i])
            try:
                found |= zip(held, self._read(shard, held), strict=True)
            except (Missing, Changed):
                found |= {i: self._perhaps(shard, i) for i in held}
        return [found[i] for i in numbers]

    def _read(self, shard: int, numbers: Sequence[int]) -> list[bytes]:
        spans = [(int(self.offset[i]), int(self.offset[i] + self.size[i])) for i in numbers]
        return self.store.ranges(self.uris[shard], spans)

    def _perhaps(self, shard: int, number: int) -> bytes | None:
        try:
            return self._read(shard, [number])[0]
        except (Missing, Changed):
            return None


def _slide_ids(told: Sequence[str | None], keys: Sequence[str], pattern: str) -> list[str]:
    found = []
    for slide_id, key in zip(told, keys, strict=True):
        match = None if slide_id else re.search(pattern, key)
        if not slide_id and (match is None or not match.groups()):
            nowhere = f"in the key {key!r}, and no JSON tells it"
            raise TilesError(f"the pattern {pattern!r} finds no slide id (its first group) {nowhere}")
        found.append(slide_id or match.group(1))  # type: ignore[union-attr]
    return found


def index(uri: str, size: int, store: Store) -> pyarrow.Table:
    """The images of one shard: key, place, and what the JSON beside each says. Raises TilesError, StorageError."""
    file = RangeFile(uri, size, store, _BLOCK, size + (1 << 30))
    samples: dict[str, dict[str, Any]] = {}
    try:
        for member in members(cast("IO[bytes]", file), size):
            folder, name = posixpath.split(member.name)
            stem, _, extension = name.partition(".")
            sample = samples.setdefault(posixpath.join(folder, stem), {})
            kind = f".{extension.lower()}"
            if kind in SUFFIXES:
                if "offset" in sample:
                    raise TilesError(f"{uri} has two images of the key {stem!r}: a key ends at the first dot of its name")
                if member.size > _MOST_IMAGE:
                    raise TilesError(
                        f"{uri}: {shown(member.name)} has {member.size} bytes: expected at most {_MOST_IMAGE} of an image"
                    )
                sample |= {"offset": member.offset, "size": member.size}
            elif kind == ".json":
                sample |= _about(uri, member, file)
        end = file.tell()
        rest = file.read(_MOST_PADDING)
        if len(rest) < BLOCK or rest.strip(b"\0") or end + len(rest) < size:
            raise TarError(f"at byte {end} of {size} it should end in zeros: it was cut, or others were appended")
    except TarError as error:
        raise TilesError(f"{uri} is damaged, or no tar file ({error})") from error
    rows = [{"key": key, **sample} for key, sample in samples.items() if "offset" in sample]
    return pyarrow.Table.from_pylist(rows, _SCHEMA)


def _about(uri: str, member: Member, file: RangeFile) -> dict[str, Any]:
    """What the JSON of a sample says of its slide; everything else in it is not ours."""
    if member.size > _MOST_JSON:
        raise TilesError(f"{uri}: {shown(member.name)} has {member.size} bytes: expected at most {_MOST_JSON} of JSON")
    file.seek(member.offset)
    try:
        held = json.loads(file.read(member.size))
        if not isinstance(held, dict):
            return {}
        known: dict[str, Any] = {name: str(held[name]) for name in ("slide_id", *ABOUT) if held.get(name) is not None}
        for name, text in known.items():
            if damage(text):
                raise ValueError(f"its {name} {damage(text)}")
        return known if held.get("mpp") is None else {**known, "mpp": float(held["mpp"])}
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise TilesError(f"{uri}: {shown(member.name)} cannot be read: {error}") from error
