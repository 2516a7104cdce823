"""Who is in which part: by patient, by keyed hash, never overlapping."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from histoscale.data.keys import key
from histoscale.data.manifest import Slide
from histoscale.data.names import fold, patient_key

UNITS = ("patient", "slide")


class SplitError(ValueError):
    """The slides cannot be split honestly; the message says what is missing or shared."""


def groups(slides: Sequence[Slide], unit: str) -> list[str]:
    """What may not be torn apart, one name a slide: its patient, or with unit `slide` the slide itself.

    Raises SplitError for an unknown unit, and with unit `patient` for slides without patient_id.
    """
    if unit not in UNITS:
        raise SplitError(f"split.unit is {unit!r}: expected {' or '.join(UNITS)}")
    if unit == "slide":
        return [slide.slide_id for slide in slides]
    nameless = [slide.slide_id for slide in slides if slide.patient_id is None]
    if nameless:
        shown = ", ".join(nameless[:5])
        raise SplitError(
            f"{len(nameless)} of {len(slides)} slides have no patient_id ({shown}{', …' if len(nameless) > 5 else ''}): "
            "add the column to the manifest, or set split.unit=slide, and every number will say that its groups are slides"
        )
    return [str(slide.patient_id) for slide in slides]


def folds(names: Sequence[str], count: int, seed: int, strata: Sequence[str] | None = None) -> list[int]:
    """A fold in range(count) for every slide, given its group (`groups`): groups are dealt out in keyed order.

    With `strata` (a class per slide) they are dealt per stratum, a group counting as its most frequent one. Raises SplitError
    when there are fewer groups than folds.
    """
    members: dict[str, list[str]] = {}
    for name, stratum in zip(names, strata if strata is not None else [""] * len(names), strict=True):
        members.setdefault(name, []).append(stratum)
    if count < 2 or len(members) < count:
        raise SplitError(f"{len(members)} groups cannot fill {count} folds: expected at least 2 folds, and a group for each")
    order = ordered(members, seed, "folds")
    order.sort(key=lambda name: max(sorted(set(members[name])), key=members[name].count))  # stable: keyed inside a stratum
    place = {name: i % count for i, name in enumerate(order)}
    return [place[name] for name in names]


def nested_subset(names: Sequence[str], size: int, seed: int) -> list[int]:
    """Places of at least `size` slides, groups whole, in keyed order until there are so many: a larger size holds the smaller.

    Raises SplitError when there are fewer slides.
    """
    if not 0 < size <= len(names):
        raise SplitError(f"a subset of {size} slides was asked of {len(names)}")
    sizes, total = Counter(names), 0
    chosen: set[str] = set()
    for name in ordered(names, seed, "subset"):
        if total >= size:
            break
        chosen.add(name)
        total += sizes[name]
    return [i for i, name in enumerate(names) if name in chosen]


def ordered(names: Iterable[str], seed: int, purpose: str) -> list[str]:
    """The distinct names in an order that depends on the seed and on each name alone, however it is written: adding names keeps
    the others' order."""
    return sorted(set(names), key=lambda name: (key(seed, purpose, name_key(fold(name))), name))


def name_key(name: str) -> int:
    """A name as an unsigned 64-bit counter."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def check_disjoint(parts: dict[str, Sequence[str]]) -> None:
    """Raises SplitError when a group, however it is written, stands in two of the named parts."""
    owner: dict[str, tuple[str, str]] = {}
    shared: dict[str, set[str]] = {}
    for part, names in parts.items():
        for name in set(names):
            first, before = owner.setdefault(patient_key(name), (part, name))
            if first != part:
                shared.setdefault(before, {first}).add(part)
    if shared:
        listed = "; ".join(f"{name} in {' and '.join(sorted(where))}" for name, where in sorted(shared.items())[:5])
        raise SplitError(f"{len(shared)} groups stand in more than one part ({listed}): a patient belongs to one part only")
