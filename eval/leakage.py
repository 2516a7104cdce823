"""Has an encoder seen in pretraining what it is scored on? By slide and patient ids, by published corpora, by equal pixels."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.eval.datasets.patches import ROLES

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
_SUFFIX = re.compile(r"(\.(ome|svs|tiff?|ndpi|mrxs|scn|bif|vmu?s?|czi|dcm|isyntax|svslide|zarr|h5|png|jpe?g))+$", re.IGNORECASE)
_TCGA = re.compile(r"TCGA-\w{2}-\w{4}(-\w+)*", re.IGNORECASE)
_CAMELYON = re.compile(r"(?:camelyon16_)?(?:train_)?((?:normal|tumor|test)_\d{3})", re.IGNORECASE)
_PATIENT_FIELDS = 3  # of a TCGA barcode: project, source site, participant
_SHOWN = 4


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
    rows = [i for i, role in enumerate(found) if role in roles]
    if not rows:
        known = ", ".join(sorted({str(role) for role in found if role}))
        raise ValueError(f"pretraining_roles={list(roles)} selects no slide of the pretraining catalog: its roles are {known}")
    return rows


def slide_key(slide_id: str) -> str:
    """The id by which a slide is the same everywhere: without file suffixes, TCGA barcodes without the file's UUID, Camelyon16
    slides by the challenge's own name."""
    text = _SUFFIX.sub("", slide_id.strip())
    barcode = _TCGA.match(text)
    if barcode:
        return barcode[0].upper()
    camelyon = _CAMELYON.fullmatch(_told_test(text))
    return camelyon[1].lower() if camelyon else text.lower()


def patient_key(patient_id: str) -> str:
    """The id by which a patient is the same everywhere: of TCGA barcodes the first three fields."""
    barcode = _TCGA.match(patient_id.strip())
    return "-".join(barcode[0].upper().split("-")[:_PATIENT_FIELDS]) if barcode else patient_id.strip().lower()


def find_leaks(patches: Sourced, corpus: Corpus) -> list[Leak]:
    """What of each role the corpus holds: by slide id, and by patient id where the set knows patients or TCGA barcodes."""
    slides = patches.patients if patches.groups == "slide" else patches.slide_ids
    known = _Barcodes.of(corpus.slide_ids)
    seen_patients = {patient_key(name) for name in corpus.patient_ids}
    seen_patients |= {patient_key(name) for name in corpus.slide_ids if _TCGA.match(name)}
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
    named = card.get("corpora") or (card.get("data") or {}).get("corpora") or ()
    return (named,) if isinstance(named, str) else tuple(str(name) for name in named)


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
    return ["-".join(parts[:count]) for count in range(_PATIENT_FIELDS + 1, len(parts))]


def _patients(patches: Sourced, slides: np.ndarray) -> list[str]:
    """The patient of each row: the set's own, or the one in a TCGA barcode, or ""."""
    if patches.groups == "patient":
        return [str(name) for name in patches.patients.tolist()]
    return [patient_key(name) if _TCGA.match(name) else "" for name in slides.tolist()]


def _told_test(text: str) -> str:
    """PCam writes the slide test_001 as camelyon16_test_001."""
    return re.sub(r"^camelyon16_(test_\d{3})$", r"\1", text, flags=re.IGNORECASE)


def same_collection(one: str, other: str) -> bool:
    """Whether two names mean one collection: Camelyon16 and CAMELYON, TCGA and TCGA-LUAD."""
    return _family(one) == _family(other)


def _family(corpus: str) -> str:
    """Camelyon16, Camelyon17 and CAMELYON hold slides of one collection; so do TCGA and its projects."""
    return re.split(r"[-_ \d]", corpus.strip().lower())[0]
