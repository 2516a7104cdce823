"""Parsers with the faults that the engine looks for, to see that it finds them."""

from pathlib import Path

from fuzz.engine import MOST_MB, Target


def _other(data: bytes) -> None:
    if b"!" in data:
        raise KeyError("an error that nobody names")


def _wrong(data: bytes) -> None:
    assert b"!" not in data, "a wrong result"


def _large(data: bytes) -> None:
    if b"!" in data:
        bytearray(2 * MOST_MB << 20)


def _endless(data: bytes) -> None:
    while b"!" in data:
        pass


def targets(folder: Path) -> dict[str, Target]:
    return {
        call.__name__.strip("_"): Target([b"seed"], call, (ValueError,), [b"!"], most_s=0.2)
        for call in (_other, _wrong, _large, _endless)
    }
