"""One name however it is written: patients, sites, classes, slides and cells of tables, compared by case, blanks, Unicode form.

Both halves of the product go through here, so that what is one patient to a slide model is one patient to a probe.
"""

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

_MISSING = frozenset(("", "nan", "-nan", "na", "n/a", "n.a.", "<na>", "#n/a", "#na", "null"))  # in any case
_MISSING_AS_WRITTEN = frozenset(("None", "NaT"))  # of Python and pandas; NAT is normal adjacent tissue, and none is a class too
_TRUE, _FALSE = frozenset(("true", "yes", "1")), frozenset(("false", "no", "0"))
_SUFFIX = re.compile(r"(\.(ome|svs|tiff?|ndpi|mrxs|scn|bif|vmu?s?|czi|dcm|isyntax|svslide|zarr|h5|png|jpe?g))+$", re.IGNORECASE)
_TCGA = re.compile(r"TCGA-\w{2}-\w{4}(-\w+)*", re.IGNORECASE)
_CAMELYON = re.compile(r"(?:camelyon16_)?(?:train_)?((?:normal|tumor|test)_\d{3})", re.IGNORECASE)
_PATIENT_FIELDS = 3  # of a TCGA barcode: project, source site, participant
_SHOWN = 4


class NamesError(ValueError):
    """Names of which nobody can say whether they are one; the message lists them."""


def tidy(text: str) -> str:
    """As a person reads it: Unicode's NFKC, no invisible characters, single blanks, none at the ends."""
    plain = unicodedata.normalize("NFKC", text)
    return " ".join("".join(c for c in plain if unicodedata.category(c) != "Cf").split())


def fold(text: str) -> str:
    """What two spellings of one name share: `tidy` without case."""
    return tidy(tidy(text).casefold())


def is_missing(text: str) -> bool:
    """Whether a cell is empty, or says so in words: nan, NA, N/A, null in any case, None and NaT to the letter, as tables are
    written by pandas, R and people."""
    return fold(text) in _MISSING or tidy(text) in _MISSING_AS_WRITTEN


def known(text: str | None) -> str:
    """The cell of a table without blanks at its ends, "" for a missing value."""
    return "" if text is None or is_missing(text) else text.strip()


def is_barcode(name: str) -> bool:
    """Whether a name begins as a barcode of TCGA."""
    return _TCGA.match(tidy(name)) is not None


def slide_key(slide_id: str) -> str:
    """The id by which a slide is the same everywhere: without folders and file suffixes, TCGA barcodes without the file's UUID,
    Camelyon16 slides by the challenge's own name."""
    text = _SUFFIX.sub("", re.split(r"[/\\]", tidy(slide_id))[-1])
    barcode = _TCGA.match(text)
    if barcode:
        return barcode[0].upper()
    # PCam writes the slide test_001 as camelyon16_test_001.
    camelyon = _CAMELYON.fullmatch(re.sub(r"^camelyon16_(test_\d{3})$", r"\1", text, flags=re.IGNORECASE))
    return fold(camelyon[1] if camelyon else text)


def patient_key(patient_id: str) -> str:
    """The id by which a patient is the same everywhere: of TCGA barcodes the first three fields; 7.0 is 7."""
    text = tidy(patient_id)
    barcode = _TCGA.match(text)
    if barcode:
        return "-".join(barcode[0].upper().split("-")[:_PATIENT_FIELDS])
    return fold(re.sub(r"^(\d+)\.0+$", r"\1", text))


def site_key(site: str) -> str:
    """A site however it is written: `St. Mary` and `st mary` are one."""
    return " ".join(re.findall(r"\w+", fold(site)))


def column_key(name: str) -> str:
    """The name of a column: `Patient ID` is `patient_id`."""
    return re.sub(r"[\s\-]+", "_", fold(name))


def truth(text: str) -> bool | None:
    """True for true, yes, 1, 1.0; False for false, no, 0, 0.0; None for anything else."""
    value = value_key(text)
    return True if value in _TRUE else False if value in _FALSE else None


def value_key(text: str) -> str:
    """What two spellings of one label share: `fold`, and whole numbers without a fraction of zeros, as pandas writes them."""
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", fold(text))


def same_value(one: str, other: str) -> bool:
    """Whether two texts say one value: `tumour` and `Tumour `, 1 and 1.0, 1 and True, no and False."""
    a, b = value_key(one), value_key(other)
    return a == b or (truth(a) is not None and truth(a) == truth(b))


def nearest(sought: str, names: Iterable[str]) -> str | None:
    """The name that is the same without folders and suffixes, else the one that looks most like it; None where none does."""
    there = sorted(set(names), reverse=True)
    same = [name for name in there if slide_key(name) == slide_key(sought)]
    if same:
        return same[-1]
    by_key = {fold(name): name for name in there}
    found = difflib.get_close_matches(fold(sought), by_key, n=1, cutoff=0.5)
    return by_key[found[0]] if found else None


def one_spelling(names: Sequence[str], what: str, key: Callable[[str], str] = fold) -> tuple[list[str], list[str]]:
    """(each name in the spelling that most of its kind have, the first in the alphabet among equals; a sentence where names were
    written in several ways). what: what they are, in the plural. "" stays.

    Raises NamesError for two names that a blank inside tells apart: they may be one, or not.
    """
    spellings: dict[str, Counter[str]] = {}
    for name, count in Counter(names).items():
        if name:
            spellings.setdefault(key(name), Counter())[name] += count
    joined: dict[str, list[str]] = {}
    for one, written in spellings.items():
        joined.setdefault(fold(min(written)).replace(" ", ""), []).append(one)
    for several in (same for same in joined.values() if len(same) > 1):
        listed = " and ".join(repr(min(spellings[one])) for one in sorted(several)[:_SHOWN])
        raise NamesError(
            f"the {what} {listed} differ by a blank inside alone: write them alike where they are one, and tell them apart by "
            "more than a blank where they are not"
        )
    chosen = {one: tidy(min(written, key=lambda name: (-written[name], tidy(name)))) for one, written in spellings.items()}
    several_ways = [(chosen[one], sorted(written)) for one, written in sorted(spellings.items()) if len(written) > 1]
    listed = "; ".join(f"{', '.join(map(repr, written))} as {name}" for name, written in several_ways[:_SHOWN])
    more = f"; and {len(several_ways) - _SHOWN} more" if len(several_ways) > _SHOWN else ""
    said = f"{what} written in several ways are one each: {listed}{more}"
    return [chosen[key(name)] if name else "" for name in names], [said] if several_ways else []


def codes(names: Sequence[str] | np.ndarray) -> np.ndarray:
    """int64 [n]: the names counted from 0 in the order of their folded forms, so that no spelling moves a fold or a draw."""
    distinct, place = np.unique(np.asarray(names), return_inverse=True)
    folded = [(fold(name), name) for name in distinct.astype(str).tolist()]
    rank = np.empty(len(distinct), np.int64)
    rank[sorted(range(len(distinct)), key=folded.__getitem__)] = np.arange(len(distinct))
    return rank[place.reshape(-1)]
