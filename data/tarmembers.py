"""The members of a tar file, from their headers alone: ustar, GNU and pax, in memory that no header can raise.

Links, devices and sparse files are passed over: they hold no bytes of their own, or not those that their size says. A name is
only a name: nothing is unpacked.
"""

from collections.abc import Iterator
from typing import IO, NamedTuple

BLOCK = 512
_MOST_NAME = 1 << 16  # bytes of a long name, or of a pax header
_REGULAR = (b"0", b"\0", b"7")  # the kinds of a file
_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: without data whatever their size says
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = b"L", b"K", b"x", b"g", b"S"


class TarError(ValueError):
    """The file is no tar file, or a damaged one; the message says at which byte."""


class Member(NamedTuple):
    """A file. offset: of its first byte."""

    name: str
    offset: int
    size: int


def members(file: IO[bytes], size: int) -> Iterator[Member]:
    """The files in a tar file of `size` bytes; it ends behind the first block of zeros, where `file` then stands.

    Raises TarError.
    """
    place = 0
    told: dict[str, str] = {}  # what stands before a header for it
    while True:
        file.seek(place)
        head = file.read(BLOCK)
        if len(head) == BLOCK and not head.strip(b"\0"):
            file.seek(place)
            return
        kind, length = _checked(head, place)
        data, place = place + BLOCK, place + BLOCK
        if kind == _SPARSE:
            place = data = _behind_sparse(file, head, place)
        if kind in _REGULAR and "size" in told:
            length = _decimal(told["size"], place)
        if kind not in _EMPTY:
            place += -(-length // BLOCK) * BLOCK
        if place > size + BLOCK - 1 or (kind not in _EMPTY and data + length > size):
            raise TarError(f"at byte {data} a member of {length} bytes is cut: the file has {size}")
        if kind in (_LONG_NAME, _PAX):
            if length > _MOST_NAME:
                raise TarError(f"at byte {data} a name of {length} bytes: expected at most {_MOST_NAME}")
            file.seek(data)
            held = file.read(length)
            told |= {"path": held.split(b"\0")[0].decode("utf-8", "replace")} if kind == _LONG_NAME else _records(held, data)
        elif kind not in (_LONG_LINK, _PAX_GLOBAL):
            if kind in _REGULAR and not any(name.startswith("GNU.sparse") for name in told):
                yield Member(told.get("path") or _name(head), data, length)
            told = {}


def _checked(head: bytes, place: int) -> tuple[bytes, int]:
    """Kind and size of a header whose checksum is right."""
    if len(head) != BLOCK:
        raise TarError(f"at byte {place} it is cut")
    total = sum(head) - sum(head[148:156]) + 8 * ord(" ")
    signed = total - 256 * sum(byte > 127 for byte in head[:148] + head[156:])
    if _number(head[148:156], place) not in (total, signed):
        raise TarError(f"at byte {place} stands no header")
    return head[156:157], _number(head[124:136], place)


def _number(field: bytes, place: int) -> int:
    """Octal digits, or behind the byte 0x80 a binary number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return _decimal(field.split(b"\0")[0].strip().decode("latin-1") or "0", place, 8)


def _decimal(text: str, place: int, base: int = 10) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 20 or (base == 8 and set(text) & set("89")):
        raise TarError(f"at byte {place} the number {text[:20]!r} is none")
    return int(text, base)


def _name(head: bytes) -> str:
    name = head[:100].split(b"\0")[0]
    prefix = head[345:500].split(b"\0")[0] if head[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _behind_sparse(file: IO[bytes], head: bytes, place: int) -> int:
    """Where the data of an old GNU sparse file begins: behind blocks that go on with its map."""
    more = head[482]
    while more:
        file.seek(place)
        block = file.read(BLOCK)
        if len(block) != BLOCK:
            raise TarError(f"at byte {place} it is cut")
        more, place = block[504], place + BLOCK
    return place


def _records(data: bytes, place: int) -> dict[str, str]:
    """`<length> <key>=<value>\\n`, one behind the other. Raises TarError."""
    found: dict[str, str] = {}
    start = 0
    while start < len(data) and data[start]:
        digits, there, _ = data[start : start + 20].partition(b" ")
        length = _decimal(digits.decode("latin-1"), place) if there else 0
        key, equals, value = data[start + len(digits) + 1 : start + length].partition(b"=")
        if length <= len(digits) + 1 or start + length > len(data) or not equals or not value.endswith(b"\n"):
            raise TarError(f"at byte {place + start} stands no record of a pax header")
        found[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "replace")
        start += length
    return found
