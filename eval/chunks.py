"""Features on disk: a file for each chunk of rows while they are made, one file when all are there, and a digest of every chunk.

The one file is in the form of safetensors, which any reader of that opens, and is mapped into memory here.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CHUNK_BATCHES = 4  # batches a chunk: what a kill costs at most, a process
FIELDS = {"hashes": ("U64", "<u8"), "sizes": ("I32", "<i4"), "cls": ("F32", "<f4"), "mean": ("F32", "<f4")}
Arrays = dict[str, np.ndarray]  # by field: hashes [n], sizes [n, 2], cls [n, D], mean [n, D or 0]
_LONGEST_HEADER = 100 << 20  # as safetensors allows


class FeatureError(ValueError):
    """Features that are not where they must be; the message says what to do."""


@dataclass(frozen=True)
class Found:
    """good: chunks on disk that hold what was written. damaged: how many do not. joined: nothing is left to do."""

    good: frozenset[int]
    damaged: int
    joined: bool


class FeatureFile:
    """The features of `rows` rows under `path`, made in batches of `batch` rows on `device`.

    Chunks that were made in other batches, or on another kind of device, may differ in their last bits: they are not mixed.
    """

    def __init__(self, path: Path, rows: int, batch: int, device: str) -> None:
        self.path, self.rows, self.length = path, rows, batch * CHUNK_BATCHES
        self.made = {"batch": str(batch), "device": device}
        self.parts = path.with_suffix(f".parts-{batch}-{device}")

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.length)

    def span(self, chunk: int) -> tuple[int, int]:
        return chunk * self.length, min((chunk + 1) * self.length, self.rows)

    def check(self) -> Found:
        """Every byte that is there against its digest; one that fails is deleted or, inside the one file, missing."""
        parts, damaged = self._check_parts()
        if not self.path.exists():
            return Found(parts, damaged, joined=False)
        held = _Joined.open(self.path, self.rows)
        whole = held.good_chunks(self.path.stem) if held is not None else frozenset[int]()
        if held is not None and len(whole) == len(held.digests):
            self._forget_parts()  # a kill may have come between joining them and this
            return Found(frozenset(range(self.chunks)), 0, joined=True)
        damaged += len(held.digests) - len(whole) if held is not None else self.chunks
        return Found(parts | whole if held is not None and held.made == self.made else parts, damaged, joined=False)

    def keep(self, chunk: int, arrays: Arrays) -> None:
        """Write one chunk; it is there after this returns, or not at all."""
        self.parts.mkdir(parents=True, exist_ok=True)
        part = self._part(chunk)
        partial = part.with_suffix(f".{os.getpid()}.partial")
        digest = _digest(self.path.stem, self.span(chunk)[0], arrays)
        save_file({field: np.ascontiguousarray(arrays[field], dtype) for field, (_, dtype) in FIELDS.items()}, partial,
                  {"digest": digest})  # fmt: skip
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(part)

    def join(self) -> None:
        """All chunks into the one file, one at a time; then they are deleted. Raises FeatureError where one is missing."""
        held = _Joined.open(self.path, self.rows) if self.path.exists() else None
        if held is not None and held.made != self.made:
            held = None
        inside = held.good_chunks(self.path.stem) if held is not None else frozenset[int]()
        digests, shapes = [], {}
        for chunk in range(self.chunks):
            if self._part(chunk).exists():
                digest, arrays = self._read(chunk)
                digests.append(digest)
                shapes = {field: [self.rows, *array.shape[1:]] for field, array in arrays.items()}
            elif held is not None and chunk in inside:
                digests.append(held.digests[chunk])
                shapes = held.shapes
            else:
                raise FeatureError(f"{self._part(chunk)} is not there: all processes must see the folder {self.path.parent}")
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            starts = _write_header(file, shapes, {**self.made, "digests": " ".join(digests)})
            for chunk in range(self.chunks):
                start, stop = self.span(chunk)
                arrays = self._read(chunk)[1] if self._part(chunk).exists() else held.read(start, stop)  # type: ignore[union-attr]
                for field, array in arrays.items():
                    file.seek(starts[field] + start * array[:1].nbytes)
                    file.write(array.tobytes())
            file.truncate(starts["end"])
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        self._forget_parts()

    def open(self) -> Arrays:
        """The joined arrays, mapped: pages come from the file, and what is written into them stays in memory."""
        held = _Joined.open(self.path, self.rows)
        if held is None:
            raise FeatureError(f"{self.path} is not what was written a moment ago: all processes must see the same folder")
        return {field: held.map(field) for field in FIELDS}

    def _forget_parts(self) -> None:
        for folder in self.path.parent.glob(f"{self.path.stem}.parts-*"):
            shutil.rmtree(folder)

    def _part(self, chunk: int) -> Path:
        return self.parts / f"{chunk:06}.safetensors"

    def _check_parts(self) -> tuple[frozenset[int], int]:
        good, damaged = [], 0
        for chunk in range(self.chunks) if self.parts.is_dir() else ():
            if self._part(chunk).exists():
                try:
                    self._read(chunk)
                    good.append(chunk)
                except FeatureError:
                    self._part(chunk).unlink()
                    damaged += 1
        return frozenset(good), damaged

    def _read(self, chunk: int) -> tuple[str, Arrays]:
        """Digest and arrays of a chunk's file. Raises FeatureError unless they belong together."""
        path, (start, stop) = self._part(chunk), self.span(chunk)
        try:
            with safe_open(path, framework="numpy") as file:
                digest = (file.metadata() or {}).get("digest", "")
                arrays = {field: file.get_tensor(field) for field in FIELDS}
        except (SafetensorError, OSError, ValueError) as error:  # cut short, or no such tensor
            raise FeatureError(f"{path} cannot be read: {error}") from error
        if any(len(array) != stop - start for array in arrays.values()) or _digest(self.path.stem, start, arrays) != digest:
            raise FeatureError(f"{path} does not hold what was written")
        return digest, arrays


@dataclass(frozen=True)
class _Joined:
    """The one file: where its arrays begin, their shapes, and the digests of its chunks."""

    path: Path
    made: dict[str, str]
    digests: list[str]
    shapes: dict[str, list[int]]
    starts: dict[str, int]

    @classmethod
    def open(cls, path: Path, rows: int) -> "_Joined | None":
        """None for a file that is not what `FeatureFile.join` writes for so many rows."""
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length < _LONGEST_HEADER:
                    return None
                header = json.loads(file.read(length))
            said = header["__metadata__"]
            starts = {field: 8 + length + header[field]["data_offsets"][0] for field in FIELDS}
            shapes = {field: [int(n) for n in header[field]["shape"]] for field in FIELDS}
            stops = [starts[field] + _bytes(field, shapes[field]) for field in FIELDS]
            if max(stops) != path.stat().st_size or any(shape[0] != rows for shape in shapes.values()):
                return None
            made, digests = {name: said[name] for name in ("batch", "device")}, said["digests"].split()
            if len(digests) != -(-rows // (int(made["batch"]) * CHUNK_BATCHES)):
                return None
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None
        return cls(path, made, digests, shapes, starts)

    def good_chunks(self, name: str) -> frozenset[int]:
        length, rows = int(self.made["batch"]) * CHUNK_BATCHES, self.shapes["cls"][0]
        spans = [(start, min(start + length, rows)) for start in range(0, rows, length)]
        return frozenset(i for i, span in enumerate(spans) if _digest(name, span[0], self.read(*span)) == self.digests[i])

    def read(self, start: int, stop: int) -> Arrays:
        """Rows [start, stop), read and not mapped, so that no page of the rest is touched."""
        arrays = {}
        with self.path.open("rb") as file:
            for field, (_, dtype) in FIELDS.items():
                row = _bytes(field, [1, *self.shapes[field][1:]])
                file.seek(self.starts[field] + start * row)
                data = file.read((stop - start) * row)
                arrays[field] = np.frombuffer(data, dtype).reshape(stop - start, *self.shapes[field][1:])
        return arrays

    def map(self, field: str) -> np.ndarray:
        shape = tuple(self.shapes[field])
        if 0 in shape:
            return np.zeros(shape, FIELDS[field][1])
        return np.memmap(self.path, FIELDS[field][1], "c", self.starts[field], shape).view(np.ndarray)


def _write_header(file: BinaryIO, shapes: Mapping[str, list[int]], metadata: dict[str, str]) -> dict[str, int]:
    """Where each array begins in the file, and `end`."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for field, (kind, _) in FIELDS.items():
        size = _bytes(field, shapes[field])
        header[field] = {"dtype": kind, "shape": shapes[field], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # arrays stand at multiples of their items
    file.write(len(text).to_bytes(8, "little") + text)
    first = 8 + len(text)
    return {**{field: first + header[field]["data_offsets"][0] for field in FIELDS}, "end": first + offset}


def _bytes(field: str, shape: list[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(FIELDS[field][1]).itemsize


def _digest(name: str, start: int, arrays: Arrays) -> str:
    """Of a chunk's bytes and of its place, 16 hex digits."""
    digest = hashlib.sha256(f"{name} {start}".encode())
    for field, (_, dtype) in FIELDS.items():
        array = np.ascontiguousarray(arrays[field], dtype)
        digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()[:16]
