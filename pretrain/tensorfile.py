"""safetensors as their headers describe them, held against the files before a tensor is read, and a digest that names weights.

A header is believed in nothing: each tensor must lie in the file, right behind the one before it, in the bytes that its type and
shape need. The parts of a tensor that several ranks wrote must make it up without gap or overlap.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from histoscale.data.jsonfiles import JsonError, parse_object

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_ABOUT, _SHARDING, _OFFSETS = "__metadata__", "DCP_SHARDING_INFO", "saved_offsets"  # as torch.distributed.checkpoint writes them
_LONGEST_HEADER = 16 << 20  # a hundred thousand tensors
_BLOCK = 16 << 20


class TensorFileError(ValueError):
    """A safetensors file that is not what its header says; the message names the file."""


@dataclass(frozen=True)
class Part:
    """A tensor, or what one rank held of it: its bytes [start, stop) in the file. offsets: of its first entry in the whole."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Whole:
    """A tensor over all files. dtype: as safetensors spell it. parts: in the order of its entries."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def read_header(path: Path) -> dict[str, Part]:
    """The tensors of one file by name. Raises TensorFileError, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise TensorFileError(f"{path} announces a header of {length} bytes in a file of {size}: it is cut short, or none")
        text = file.read(length)
    try:
        header = parse_object(text, once=True)
        about = header.pop(_ABOUT, {})
        sharding = parse_object(about[_SHARDING], once=True) if _SHARDING in about else None
        parts = {name: _part(path, name, entry, sharding, 8 + length) for name, entry in header.items()}
    except (JsonError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{path} has a damaged header ({error})") from None
    place = 8 + length
    for name, part in sorted(parts.items(), key=lambda pair: (pair[1].start, pair[1].stop)):
        if part.start != place:
            raise TensorFileError(f"{path} keeps {name!r} from byte {part.start} on: expected {place}, behind the one before it")
        place = part.stop
    if place != size:
        raise TensorFileError(f"{path} has {size} bytes, its header describes {place}")
    return parts


def _part(path: Path, name: str, entry: Any, sharding: Mapping[str, Any] | None, first: int) -> Part:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        offsets = [0] * len(shape) if sharding is None else sharding[name][_OFFSETS]
        whole = all(type(count) is int and count >= 0 for count in (*shape, *offsets, start, stop))
        if not whole or len(offsets) != len(shape) or math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
            raise ValueError(f"{dtype} {shape} at {start}:{stop}")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        why = " ".join(str(error).split())[:200]
        raise TensorFileError(f"{path} does not describe {name[:200]!r} rightly ({type(error).__name__}: {why})") from None
    return Part(path, dtype, tuple(shape), tuple(offsets), first + start, first + stop)


def read_wholes(paths: Iterable[Path]) -> dict[str, Whole]:
    """The tensors that some files hold together. Raises TensorFileError, OSError."""
    found: dict[str, list[Part]] = {}
    for path in paths:
        for name, part in read_header(path).items():
            found.setdefault(name, []).append(part)
    return {name: _whole(name, parts) for name, parts in found.items()}


def _whole(name: str, parts: Sequence[Part]) -> Whole:
    """Ranks share a tensor along its first dimension."""
    parts = sorted(parts, key=lambda part: (part.offsets, part.shape))
    first, place = parts[0], 0
    for part in parts:
        alike = part.dtype == first.dtype and part.shape[1:] == first.shape[1:] and not any(part.offsets[1:])
        if not alike or len(part.shape) != len(first.shape) or (part.offsets[0] if part.shape else len(parts) - 1) != place:
            raise TensorFileError(f"{part.path}: {name!r} is no part that fits behind the others of that name")
        place += part.shape[0] if part.shape else 0
    return Whole(first.dtype, (place, *first.shape[1:]) if first.shape else (), tuple(parts))


def weights_digest(tensors: Mapping[str, Whole]) -> str:
    """sha256 over name, type, shape and bytes of every tensor, by name: equal weights have one, in whatever order and files they
    lie. 64 hex digits."""
    digest = hashlib.sha256()
    for name, whole in sorted(tensors.items()):
        digest.update(json.dumps([name, whole.dtype, whole.shape]).encode() + b"\n")
        for part in whole.parts:
            with part.path.open("rb") as file:
                file.seek(part.start)
                left = part.stop - part.start
                while left:
                    block = file.read(min(left, _BLOCK))
                    if not block:
                        raise TensorFileError(f"{part.path} was cut while it was read")
                    digest.update(block)
                    left -= len(block)
    return digest.hexdigest()
