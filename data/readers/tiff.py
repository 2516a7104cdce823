"""The directories of a TIFF: few tags, values as arrays, in time and memory that the size of the file bounds.

TIFF 6.0 and BigTIFF in both byte orders. Nothing is taken on trust: a value lies inside the file, so no table is larger than the
file that holds it; chains end.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from histoscale.data.readers.pyramid import LayoutError
from histoscale.data.readers.rangefile import RangeFile

_MOST_PAGES = 1000  # directories in a file
_MOST_TAGS = 4096  # in a directory
_MOST_TEXT = 64 << 20  # bytes: Philips keeps pictures in its description
_TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u4", 7: "u1", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
_RATIONAL, _TEXT = 5, 2  # two numbers a value; a byte a character


class Tag(IntEnum):
    """The tags that a layout needs."""

    NEW_SUBFILE_TYPE, SUBFILE_TYPE, WIDTH, HEIGHT, BITS, COMPRESSION = 254, 255, 256, 257, 258, 259
    PHOTOMETRIC, DESCRIPTION, MAKE, SAMPLES, X_RESOLUTION, Y_RESOLUTION = 262, 270, 271, 277, 282, 283
    PLANAR, RESOLUTION_UNIT, SOFTWARE, PREDICTOR = 284, 296, 305, 317
    TILE_WIDTH, TILE_HEIGHT, OFFSETS, COUNTS, SUB_IFDS, JPEG_TABLES = 322, 323, 324, 325, 330, 347
    XMP, DEPTH, NDPI_VERSION = 700, 32997, 65420


_WANTED = np.array([int(tag) for tag in Tag])


class TiffError(ValueError):
    """The file is no TIFF or a damaged one; the message says where."""


@dataclass(frozen=True)
class _Field:
    """type: the code of TIFF. count: values. held: their bytes where they stand in the directory. place: where they are, else."""

    type: int
    count: int
    held: bytes
    place: int


class Page:
    """One directory. width, height: px."""

    def __init__(self, file: "Tiff", fields: dict[int, _Field]) -> None:
        self.file, self._fields = file, fields
        self.width, self.height = self.number(Tag.WIDTH, 0), self.number(Tag.HEIGHT, 0)
        self.tiled = Tag.TILE_WIDTH in fields
        self.description, self.software = self._text(Tag.DESCRIPTION), self._text(Tag.SOFTWARE)

    def __contains__(self, tag: Tag) -> bool:
        return tag in self._fields

    def count(self, tag: Tag) -> int:
        """How many values a tag says that it has; 0 where it is not there."""
        return self._fields[tag].count if tag in self._fields else 0

    def number(self, tag: Tag, default: int) -> int:
        """The first value of a tag."""
        values = self.numbers(tag, 1)
        return int(values[0]) if len(values) else default

    def numbers(self, tag: Tag, most: int) -> np.ndarray:
        """The values of a tag, at most so many: int64 [n]; of rationals numerators and denominators in turn.

        Raises TiffError for values outside the file, or of a type that no tag here has.
        """
        field = self._fields.get(tag)
        if field is None:
            return np.zeros(0, np.int64)
        if field.type not in _TYPES:
            raise TiffError(f"tag {int(tag)} has the unknown type {field.type}")
        code = np.dtype(self.file.order + _TYPES[field.type])
        count = min(field.count, most) * (2 if field.type == _RATIONAL else 1)
        data = field.held[: count * code.itemsize] if field.held else self.file.read(field.place, count * code.itemsize)
        return np.frombuffer(data, code).astype(np.int64)

    def fraction(self, tag: Tag) -> float | None:
        """A rational; None where it is none, or nothing."""
        field = self._fields.get(tag)
        if field is None or field.type != _RATIONAL:
            return None
        above, below = self.numbers(tag, 1).tolist() or (0, 0)
        return above / below if above and below else None

    def data(self, tag: Tag) -> bytes:
        """The bytes of a tag. Raises LayoutError for more than any slide has."""
        field = self._fields.get(tag)
        if field is None:
            return b""
        if field.count > _MOST_TEXT:
            raise LayoutError(f"tag {int(tag)} of {field.count} bytes: expected at most {_MOST_TEXT}")
        return self.numbers(tag, field.count).astype(np.uint8).tobytes()

    def _text(self, tag: Tag) -> str:
        if tag not in self._fields or self._fields[tag].type != _TEXT:
            return ""
        data = self.data(tag).rstrip(b"\0")
        try:
            return data.decode("utf-8").strip()
        except UnicodeDecodeError:
            return data.decode("cp1252", "replace").strip()


class Tiff:
    """Raises TiffError; what reading the file raises passes through."""

    def __init__(self, file: RangeFile) -> None:
        self.file, self.size = file, file.size
        head = self.read(0, 16) if file.size >= 16 else self.read(0, 8).ljust(16, b"\0")
        self.order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        version = int(np.frombuffer(head, f"{self.order}u2", 1, 2)[0]) if self.order else 0
        if version not in (42, 43):
            raise TiffError(f"no TIFF: it begins with {head[:4]!r}")
        self.big = version == 43
        self.first = self._number(head[8:16] if self.big else head[4:8])

    def read(self, place: int, count: int) -> bytes:
        """Bytes of the file. Raises TiffError for what lies outside it."""
        if place < 0 or count < 0 or place + count > self.size:
            raise TiffError(f"{count} bytes at byte {place}, the file has {self.size}")
        self.file.seek(place)
        return self.file.read(count)

    def pages(self) -> list[Page]:
        """The directories of the chain. Raises LayoutError for more than any slide has, TiffError for a chain without end."""
        found: list[Page] = []
        seen: set[int] = set()
        place = self.first
        while place:
            if place in seen:
                raise TiffError(f"its directories go round: the one at byte {place} comes again")
            if len(found) == _MOST_PAGES:
                raise LayoutError(f"more than {_MOST_PAGES} images in one file: no slide has so many")
            seen.add(place)
            page, place = self.page(place)
            found.append(page)
        return found

    def below(self, page: Page) -> list[Page]:
        """The directories that a page has as SubIFDs."""
        if page.count(Tag.SUB_IFDS) > _MOST_PAGES:
            raise LayoutError(f"more than {_MOST_PAGES} images below one: no slide has so many")
        return [self.page(int(place))[0] for place in page.numbers(Tag.SUB_IFDS, _MOST_PAGES)]

    def page(self, place: int) -> tuple[Page, int]:
        """The directory at a place, and where the next one is; 0: there is none."""
        wide, entry, after = (8, 20, 8) if self.big else (2, 12, 4)
        count = self._number(self.read(place, wide))
        if count > _MOST_TAGS:
            raise TiffError(f"a directory of {count} tags at byte {place}")
        data = self.read(place + wide, count * entry + after)
        held = [
            ("tag", f"{self.order}u2"),
            ("type", f"{self.order}u2"),
            ("count", f"{self.order}u{after}"),
            ("value", f"V{after}"),
        ]
        rows = np.frombuffer(data, np.dtype(held), count)
        fields: dict[int, _Field] = {}
        for tag, kind, many, value in rows[np.isin(rows["tag"], _WANTED)].tolist():
            size = many * np.dtype(_TYPES.get(kind, "u1")).itemsize * (2 if kind == _RATIONAL else 1)
            field = _Field(kind, many, value[:size], 0) if size <= after else _Field(kind, many, b"", self._number(value))
            fields.setdefault(tag, field)
        return Page(self, fields), self._number(data[count * entry :])

    def _number(self, data: bytes) -> int:
        return int.from_bytes(data, "little" if self.order == "<" else "big")
