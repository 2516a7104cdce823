"""What scanners and programs write into a TIFF's ImageDescription: Aperio's fields, Philips' XML, OME-XML.

The texts are untrusted: each is read once from its beginning to its end. XML is read from its root element on, so there is no
document type, and no entity that expands.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple
from xml.parsers import expat

from histoscale.data.names import tidy
from histoscale.data.readers.pyramid import LayoutError

_MICRONS = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}  # units of OME-XML
_LONGEST = 200  # characters of a number or a name
_SQUARE = 0.02  # sides of a pixel may differ so much


class Described(NamedTuple):
    """mpp: µm per pixel at level 0; objective: its magnification; scanner: its name. None where nothing is said."""

    mpp: float | None
    objective: float | None
    scanner: str | None


def aperio(text: str) -> Described:
    """`Aperio …|AppMag = 20|MPP = 0.499|ScanScope ID = SS1302`."""
    fields = {}
    for part in text.split("|")[1:]:
        name, there, value = part.partition("=")
        if there:
            fields[name.strip()] = value
    return Described(number(fields.get("MPP")), number(fields.get("AppMag")), word(fields.get("ScanScope ID")))


def ome(text: str, size: tuple[int, int]) -> Described:
    """OME-XML. size: width and height of level 0, by which its image is told from a label's. Raises LayoutError."""
    sides: list[float | None] = []
    said: dict[str, str] = {}

    def begin(name: str, values: Mapping[str, str]) -> None:
        name = name.rpartition(":")[2]
        if name == "Pixels" and not sides and (values.get("SizeX"), values.get("SizeY")) == (str(size[0]), str(size[1])):
            for axis in "XY":
                unit = values.get(f"PhysicalSize{axis}Unit", "µm").replace("\u03bc", "µ")
                length = number(values.get(f"PhysicalSize{axis}"))
                sides.append(length * _MICRONS[unit] if length and unit in _MICRONS else None)
        elif name == "Objective" and "NominalMagnification" in values:
            said.setdefault(name, values["NominalMagnification"])
        elif name == "Microscope" and "Model" in values:
            said.setdefault(name, values["Model"])

    _walk(text[text.index("<OME") :], begin)
    mpp = square(*sides) if sides else None
    return Described(mpp, number(said.get("Objective")), word(said.get("Microscope")))


def philips(text: str) -> tuple[list[list[float]], str | None]:
    """(the pixel spacings of every level in mm, down and across; the scanner's name). None of a text without an object."""
    spacings: list[str | None] = []  # of the levels; None: not said
    inside: list[int] = []  # for every open object the level that it is, -1 for others
    taking: list[str] | None = None
    model: list[str] = []

    def begin(name: str, values: Mapping[str, str]) -> None:
        nonlocal taking
        taking = None
        if name == "DataObject":
            level = values.get("ObjectType") == "PixelDataRepresentation"
            inside.append(len(spacings) if level else -1)
            spacings.extend([None] if level else [])
        elif name == "Attribute" and values.get("Name") == "DICOM_PIXEL_SPACING" and inside and inside[-1] >= 0:
            taking = [] if spacings[inside[-1]] is None else None
        elif name == "Attribute" and values.get("Name") == "DICOM_MANUFACTURERS_MODEL_NAME" and not model:
            taking = model

    def hear(data: str) -> None:
        if taking is not None:
            taking.append(data)

    def end(name: str) -> None:
        nonlocal taking
        if taking is not None and taking is not model:
            spacings[inside[-1]] = "".join(taking)
        taking = None
        if name == "DataObject":
            inside.pop()

    _walk("".join(text.partition("<DataObject")[1:]), begin, hear, end)
    pairs = [(one or "").replace('"', " ").split(maxsplit=2)[:2] for one in spacings]
    return [[number(value) or 0.0 for value in pair] for pair in pairs], word("".join(model))


def _walk(
    text: str,
    begin: Callable[[str, dict[str, str]], None],
    hear: Callable[[str], None] | None = None,
    end: Callable[[str], None] | None = None,
) -> None:
    """The elements of an XML text. Of a damaged one, those before the damage."""
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.CharacterDataHandler, parser.EndElementHandler = begin, hear, end
    try:
        parser.Parse(text, True)
    except (expat.ExpatError, UnicodeEncodeError):
        pass


def number(text: str | None) -> float | None:
    """A finite number; None for anything else."""
    try:
        value = float(text) if text and len(text) < _LONGEST else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def word(text: str | None) -> str | None:
    """A name that can stand in a table; None for anything else."""
    plain = tidy(text) if text and len(text) < _LONGEST else ""
    return plain if plain and plain.isprintable() else None


def square(across: float | None, down: float | None) -> float | None:
    """The side of a pixel, of which one side may not be known. Raises LayoutError where they differ."""
    if across is None or down is None:
        return across or down
    if abs(across - down) > _SQUARE * max(across, down):
        raise LayoutError(f"pixels are not square: {across:g} x {down:g} µm")
    return (across + down) / 2
