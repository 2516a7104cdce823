"""Has an encoder seen in pretraining what it is scored on? By slide and patient ids, by published corpora, by equal pixels."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.data.names import fold, is_barcode, patient_key, slide_key
from histoscale.eval.datasets.patches import ROLES, DatasetError, LabelledPatches

# Set -> its source corpora -> the roles that come from them (reference: the registry of section 1.15).
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "pcam": {"Camelyon16": ROLES},
    "pcam_10shot": {"Camelyon16": ROLES},
    "camelyon16": {"Camelyon16": ROLES},
    "crc": {"TCGA": ("report",)},
    "crc_nonorm": {"TCGA": ("report",)},
    "monusac": {"TCGA": ROLES},
    "tp53": {"TCGA": ROLES},
    "panda": {"PANDA": ROLES},
}
# Encoder -> corpora that its authors name (clemsgrs/croma:scripts/bench/model_metadata.csv); () where none of the above is among
# them. A name counts where it stands as a word of its own in the encoder's name.
PUBLISHED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("kaiko", "midnight", "openmidnight", "mascaret", "lunit", "ctranspath", "phikon", "phaet", "h0-mini", "mstar", "musk",
         "genbio-pathfm"),
        ("TCGA",),
    ),
    "gpfm": ("TCGA", "CAMELYON", "PANDA"),
    "prost40m": ("LEOPARD", "TCGA-PRAD"),
    **dict.fromkeys(("virchow", "uni", "conch", "h-optimus", "prov-gigapath", "hibou", "rudolfv"), ()),
}  # fmt: skip
_SHOWN = 4
_READ = 64  # pictures that are looked at together


class Sourced(Protocol):
    """A labelled set of any kind that says where its images come from."""

    @property
    def groups(self) -> str: ...
    @property
    def patients(self) -> np.ndarray: ...
    @property
    def slide_ids(self) -> np.ndarray: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def rows(self, role: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Corpus:
    """What an encoder was pretrained on. corpora: names of public collections in it, as far as ids and cohorts tell."""

    name: str
    slide_ids: frozenset[str]
    patient_ids: frozenset[str]
    corpora: tuple[str, ...]


@dataclass(frozen=True)
class Leak:
    """Patches of one role that a corpus holds too. slides, patients: ids of the labelled set; images: its rows that come from
    them, of `total` in this role."""

    corpus: str
    role: str
    slides: tuple[str, ...]
    patients: tuple[str, ...]
    images: int
    total: int

    def sentence(self) -> str:
        ids = self.slides or self.patients
        what = f"{len(self.slides)} slides" if self.slides else f"{len(self.patients)} patients"
        more = ", …" if len(ids) > _SHOWN else ""
        return (
            f"leakage: {self.images} of {self.total} images in {self.role} come from {what} of {self.corpus} "
            f"({', '.join(ids[:_SHOWN])}{more})"
        )


def corpus_of_catalog(catalog: Catalog, rows: Iterable[int] | None) -> Corpus:
    """The slides of a catalog, or those rows of it that were trained on."""
    kept = range(len(catalog)) if rows is None else sorted(rows)
    columns = [catalog.texts(name) for name in ("slide_id", "patient_id", "cohort")]
    slides, patients, cohorts = ({str(column[i]) for i in kept if column[i]} for column in columns)
    corpora = set(cohorts)
    corpora |= {"TCGA" for slide in slides if slide_key(slide).startswith("TCGA-")}
    return Corpus(f"the catalog {catalog.hash}", frozenset(slides), frozenset(patients), tuple(sorted(corpora)))


def trained_rows(catalog: Catalog, roles: Sequence[str] | None) -> list[int] | None:
    """Rows that `pretrain roles=` trains on: of those values of the manifest's column `role`; None, all of them, without roles or
    without that column. Raises ValueError for roles that no slide has."""
    found = catalog.labels("role")
    if roles is None or not any(found):
        return None
    wanted = {fold(role) for role in roles}
    rows = [i for i, role in enumerate(found) if role and fold(str(role)) in wanted]
    if not rows:
        known = ", ".join(sorted({str(role) for role in found if role}))
        raise ValueError(f"pretraining_roles={list(roles)} selects no slide of the pretraining catalog: its roles are {known}")
    return rows


def find_leaks(patches: Sourced, corpus: Corpus) -> list[Leak]:
    """What of each role the corpus holds: by slide id, and by patient id where the set knows patients or TCGA barcodes."""
    slides = patches.patients if patches.groups == "slide" else patches.slide_ids
    known = _Barcodes.of(corpus.slide_ids)
    seen_patients = {patient_key(name) for name in corpus.patient_ids}
    seen_patients |= {patient_key(name) for name in corpus.slide_ids if is_barcode(name)}
    slide_hit = {name: known.holds(name) for name in set(slides.tolist())}
    slides_of_row = np.array([slide_hit[name] for name in slides.tolist()], dtype=bool)
    people = _patients(patches, slides)
    patient_hit = {name: bool(name) and patient_key(name) in seen_patients for name in set(people)}
    patients_of_row = np.array([patient_hit[name] for name in people], dtype=bool)
    leaks = []
    for role in ROLES:
        rows = patches.rows(role)
        hit = rows[slides_of_row[rows] | patients_of_row[rows]]
        if len(hit):
            found = tuple(sorted({str(slides[i]) for i in hit if slides_of_row[i]}))
            persons = tuple(sorted({people[i] for i in hit if patients_of_row[i]}))
            leaks.append(Leak(corpus.name, role, found, persons, len(hit), len(rows)))
    return leaks


def published_corpora(encoder: str) -> tuple[str, ...] | None:
    """Corpora that the authors of a published encoder name; None where nothing is known of it."""
    name = encoder.lower().replace("_", "-")
    for known in sorted(PUBLISHED, key=len, reverse=True):
        if re.search(rf"(?<![a-z0-9]){re.escape(known)}(?![a-z])", name):
            return PUBLISHED[known]
    return None


def recorded_corpora(card: Mapping[str, Any]) -> tuple[str, ...]:
    """Corpora that a release's MODEL.json names under `corpora`, at its top or in `data`; () where it says nothing."""
    data = card.get("data")
    named = card.get("corpora") or (data.get("corpora") if isinstance(data, Mapping) else None) or ()
    return tuple(str(name) for name in named) if isinstance(named, list | tuple) else (str(named),)


def trained_on(card: Mapping[str, Any], catalog_hash: str) -> bool:
    """Whether a release's MODEL.json says that this very catalog was streamed in pretraining."""
    return ((card.get("recipe") or {}).get("facts") or {}).get("catalog") == catalog_hash


def shared_sources(dataset: str, corpora: Iterable[str]) -> list[str]:
    """A sentence for each corpus that the set and the encoder share, by the registry: ids need not be known."""
    found = []
    for source, roles in SOURCES.get(dataset, {}).items():
        named = sorted({name for name in corpora if _family(name) == _family(source)})
        if named:
            part = "all of it" if roles == ROLES else " and ".join(roles)
            found.append(f"leakage: {dataset} ({part}) is made of {source}, and the encoder was pretrained on {', '.join(named)}")
    return found


# Equal pixels.


@dataclass(frozen=True)
class Duplicate:
    """One picture in several roles. rows: of the set, ascending; roles: which ones."""

    rows: tuple[int, ...]
    roles: tuple[str, ...]


def duplicates(hashes: Sequence[Hashable], roles: np.ndarray) -> list[Duplicate]:
    """Pictures that stand in more than one role; rows without a role are left alone."""
    places: dict[Hashable, list[int]] = {}
    for row, found in enumerate(hashes):
        if roles[row]:
            places.setdefault(found, []).append(row)
    several = (rows for rows in places.values() if len(rows) > 1)
    pairs = [(tuple(rows), tuple(role for role in ROLES if any(roles[i] == role for i in rows))) for rows in several]
    return [Duplicate(rows, found) for rows, found in pairs if len(found) > 1]


def twin_words(hashes: Sequence[Hashable], roles: np.ndarray) -> list[str]:
    """Equal pictures in several roles, in a sentence."""
    twins = duplicates(hashes, roles)
    if not twins:
        return []
    parts = sorted({" and ".join(twin.roles) for twin in twins})
    return [f"leakage: {len(twins)} pictures stand in several parts ({'; '.join(parts)}), pixel for pixel"]


def join_copies(patches: LabelledPatches, hashes: np.ndarray) -> tuple[LabelledPatches, tuple[str, ...]]:
    """(the set with all copies of a picture in one block, patient and slide, what was joined in a sentence).

    hashes: [n], of the pixels. Copies are looked for among the rows that learn and choose, and inside each tested role: there no
    fold and no interval may take them for two. Pictures of one colour alone say nothing of where they are from, and stay apart.
    Raises DatasetError where one unit is left of a set that is reported by folds.
    """
    part = np.where(patches.roles == "select", "train", patches.roles)
    places: dict[tuple[str, Hashable], list[int]] = {}
    for row, key in enumerate(zip(part.tolist(), hashes.tolist(), strict=True)):
        if key[0]:
            places.setdefault(key, []).append(row)
    copies = [rows for rows in places.values() if len(rows) > 1]
    torn = [rows for rows in copies if len({(patches.blocks[i], patches.patients[i]) for i in rows}) > 1]
    plain = _of_one_colour(patches, [rows[0] for rows in torn])
    linked = [rows for rows in torn if rows[0] not in plain]
    said = []
    if plain:
        said.append(f"{len(plain)} pictures of one colour alone stand several times, and are taken for different ones")
    if not linked:
        return patches, tuple(said)
    before = len(np.unique(patches.blocks[patches.roles != ""]))
    joined = replace(patches, blocks=_joined(patches.blocks, linked), patients=_joined(patches.patients, linked))
    if (patches.slide_ids[patches.roles != ""] != "").all():
        joined = replace(joined, slide_ids=_joined(patches.slide_ids, linked))
    after = len(np.unique(joined.blocks[joined.roles != ""]))
    if after < 2 and patches.usage.choose == "outer":
        raise DatasetError(
            f"{patches.name}: {len(linked)} pictures stand several times, pixel for pixel, and tie all {before} units together, "
            "so that no fold can be held out: keep one copy of each"
        )
    unlike = sum(len(set(patches.labels[rows].tolist())) > 1 for rows in linked)
    labels = f", {unlike} of them under different labels" if unlike else ""
    said.append(
        f"copies: {len(linked)} pictures stand several times, pixel for pixel ({sum(map(len, linked))} images{labels}); the "
        f"copies of one are one unit in folds and intervals, so that {before} units became {after}"
    )
    return joined, tuple(said)


def _of_one_colour(patches: LabelledPatches, rows: Sequence[int]) -> set[int]:
    found: set[int] = set()
    for start in range(0, len(rows), _READ):
        some = np.array(rows[start : start + _READ], np.int64)
        found |= {int(row) for row, image in zip(some, patches.read(some), strict=True) if (image == image[:, :1, :1]).all()}
    return found


def _joined(names: np.ndarray, linked: Sequence[Sequence[int]]) -> np.ndarray:
    """Names [n] in which those of linked rows have become one, the first in the order of folded names."""
    above = {name: name for name in names.tolist()}

    def top(name: str) -> str:
        while above[name] != name:
            above[name] = name = above[above[name]]
        return name

    for rows in linked:
        tops = sorted({top(names[i]) for i in rows}, key=lambda name: (fold(name), name))
        above.update(dict.fromkeys(tops, tops[0]))
    return np.array([top(name) for name in names.tolist()])


# Names.


@dataclass(frozen=True)
class _Barcodes:
    """Slide keys of a corpus, and the beginnings of its TCGA barcodes that name a sample or more."""

    keys: frozenset[str]
    beginnings: frozenset[str]

    @staticmethod
    def of(slide_ids: Iterable[str]) -> "_Barcodes":
        keys = frozenset(slide_key(name) for name in slide_ids if name)
        return _Barcodes(keys, frozenset(part for key in keys for part in _beginnings(key)))

    def holds(self, slide_id: str) -> bool:
        key = slide_key(slide_id)
        return bool(slide_id) and (key in self.keys or key in self.beginnings or bool(self.keys & set(_beginnings(key))))


def _beginnings(key: str) -> list[str]:
    """Of a TCGA barcode: what is left when fields are dropped from its end, as long as it names more than a patient."""
    if not key.startswith("TCGA-"):
        return []
    parts = key.split("-")
    return ["-".join(parts[:count]) for count in range(len(patient_key(key).split("-")) + 1, len(parts))]


def _patients(patches: Sourced, slides: np.ndarray) -> list[str]:
    """The patient of each row: the set's own, or the one in a TCGA barcode, or ""."""
    if patches.groups == "patient":
        return [str(name) for name in patches.patients.tolist()]
    return [patient_key(name) if is_barcode(name) else "" for name in slides.tolist()]


def same_collection(one: str, other: str) -> bool:
    """Whether two names mean one collection: Camelyon16 and CAMELYON, TCGA and TCGA-LUAD."""
    return _family(one) == _family(other)


def _family(corpus: str) -> str:
    """Camelyon16, Camelyon17 and CAMELYON hold slides of one collection; so do TCGA and its projects."""
    return re.split(r"[-_ \d]", fold(corpus))[0]
