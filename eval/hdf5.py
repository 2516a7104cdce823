"""HDF5 that others wrote: a data set is read where the file itself holds it, and as much as it holds.

HDF5 follows links and external storage into any file that this user can read, gives zeros for what was never written, and lets a
few bytes declare any size. What does so is refused before anything is read.
"""

import math
from collections.abc import Iterable

import h5py
import numpy as np

_EXPANDS = 100  # times its stored bytes: features, counts and pictures are noise to a compressor
_SMALL = 64 << 20  # bytes that may expand further
_LONGEST_TEXT = 1 << 16
_FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf", 32001: "blosc",
            32004: "lz4", 32008: "bitshuffle", 32013: "zfp", 32015: "zstd", 32026: "blosc2"}  # fmt: skip


class Hdf5Error(ValueError):
    """Why a part of a file is not read, as a predicate of the file (`holds …`)."""


def array(group: h5py.Group, name: str, kinds: str) -> h5py.Dataset:
    """A data set that the group itself holds; nothing of it is read. kinds: of its type, as numpy's dtype.kind, S for text.

    Raises Hdf5Error: none there, a link, storage in other files, another type, compressed by a filter that
    is not installed.
    """
    data = _own(group, name)
    if not isinstance(data, h5py.Dataset):
        raise Hdf5Error(f"holds {name} as a group, expected a data set")
    if data.is_virtual:
        raise Hdf5Error(f"holds {name} as a virtual data set, whose values lie in other files")
    if data.external:
        raise Hdf5Error(f"holds {name} as an external data set, whose values lie in other files")
    _check_type(data, name, kinds)
    if data.shape is None:
        raise Hdf5Error(f"holds {name} without a shape")
    _check_filters(data, name)
    return data


def group(parent: h5py.Group, name: str) -> h5py.Group:
    """A group that another itself holds. Raises Hdf5Error for a link and for what is none."""
    found = _own(parent, name)
    if not isinstance(found, h5py.Group):
        raise Hdf5Error(f"holds {name} as a data set, expected a group")
    return found


def attributes(holder: h5py.Group | h5py.Dataset, names: Iterable[str]) -> dict[str, str | int | float]:
    """Those of the named attributes that are there: single numbers and texts. Raises Hdf5Error for others."""
    found = {}
    for name in names:
        if name in holder.attrs:
            found[name] = _single(holder, name)
    return found


def _own(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    if name in ("", ".") or "/" in name or "\0" in name:  # h5py follows whatever a path goes through, and looks at its last part
        raise Hdf5Error(f"names {name[:80]!r}, expected the name of something that lies in the group itself")
    link = group.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        raise Hdf5Error(f"holds {name} as a link to another file")
    if isinstance(link, h5py.SoftLink):
        raise Hdf5Error(f"holds {name} as a soft link")
    if link is None:
        raise Hdf5Error(f"holds no {name}")
    return group[name]


def _check_type(data: h5py.Dataset, name: str, kinds: str) -> None:
    try:
        kind, words = "S" if h5py.check_string_dtype(data.dtype) else data.dtype.kind, str(data.dtype)
    except (TypeError, ValueError):  # a type that numpy has none for
        kind, words = "", "another type than numpy's"
    if kind not in kinds or not kind:
        raise Hdf5Error(f"holds {name} of {words[:80]}, expected {' or '.join(_WORDS[each] for each in kinds)}")


_WORDS = {"f": "floating point", "i": "integers", "u": "unsigned integers", "S": "text"}


def check_written(data: h5py.Dataset, name: str) -> None:
    """Look at what is stored; of many chunks that takes a while. Raises Hdf5Error: a part was never written and would be read as
    zeros, or the data set declares more than its bytes can hold."""
    stored, declared = data.id.get_storage_size(), math.prod(data.shape) * data.dtype.itemsize
    if not declared:
        return
    if data.chunks is not None:
        chunks = math.prod(-(-side // step) for side, step in zip(data.shape, data.chunks, strict=True))
        written = data.id.get_num_chunks()
        if written != chunks:
            raise Hdf5Error(f"holds {name} of shape {data.shape}, and never wrote {chunks - written} of its {chunks} chunks")
    elif stored < declared:
        raise Hdf5Error(f"holds {name} of shape {data.shape}, and never wrote {declared - stored} of its {declared} bytes")
    if declared > max(_SMALL, _EXPANDS * stored):
        raise Hdf5Error(f"holds {name} of shape {data.shape}, {declared} bytes, in {stored}: nothing real is so even")


def _check_filters(data: h5py.Dataset, name: str) -> None:
    plist = data.id.get_create_plist()
    for number in range(plist.get_nfilters()):
        code = plist.get_filter(number)[0]
        if not h5py.h5z.filter_avail(code):
            raise Hdf5Error(f"holds {name} compressed by {_FILTERS.get(code, f'filter {code}')}, which is not installed here")


def _single(holder: h5py.Group | h5py.Dataset, name: str) -> str | int | float:
    held = holder.attrs.get_id(name)
    if held.get_space().get_simple_extent_npoints() != 1 or held.get_storage_size() > _LONGEST_TEXT:
        raise Hdf5Error(f"has an attribute {name} that is no single number or text")
    try:
        value = np.asarray(holder.attrs[name]).reshape(-1)[0]
    except (TypeError, ValueError, OSError) as error:
        raise Hdf5Error(f"has an attribute {name} that cannot be read ({error})") from error
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, str | int | float) or (isinstance(value, str) and len(value) > _LONGEST_TEXT):
        raise Hdf5Error(f"has an attribute {name} that is no single number or text")
    return value
