"""Labelled patches of any source: who may choose, who is reported, and pixels in bounded batches."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from histoscale.data.names import codes, site_key

# Choices see train, and select where a set has an official part for that; report and external are only ever scored.
ROLES = ("train", "select", "report", "external")
NEEDED = ("train", "report")

# rows int64 [b] -> b images uint8 [3, h, w]; one array [b, 3, S, S] where all have one size
Reading = Callable[[np.ndarray], Sequence[np.ndarray] | np.ndarray]


@dataclass(frozen=True)
class DatasetConfig:
    """Labelled patches beside a catalog (`cohort`), and which of their roles may choose and which are reported.

    task: the labels' name where a set has several; null where it has one.
    train, report, external: the set's own names of the three roles; external may be null.
    mpp: null, because the table says it itself.
    """

    name: str
    task: str | None
    train: str
    report: str
    external: str | None
    mpp: float | None


@dataclass(frozen=True)
class Usage:
    """What a protocol may do with the parts of a set.

    choose: how the honest protocol chooses: `folds` (inner folds of train, by block), `select` (the official part for it) or
    `outer` (the set has no test part: grouped folds over everything that is labelled are reported).
    eva_select: the role that eva selects its checkpoint on; eva_report: the roles that eva reports, first the one it ranks by.
    positive: the class whose probability AUROC, F1 and operating points of a binary set look at; None with more classes.
    """

    choose: str
    eva_select: str
    eva_report: tuple[str, ...]
    positive: str | None


USAGE_OF_OWN = Usage(choose="folds", eva_select="report", eva_report=("report",), positive=None)


class DatasetError(ValueError):
    """A labelled set that cannot be used; the message names the file, the column or the ids."""


@dataclass(frozen=True)
class LabelledPatches:
    """n patches of S px, or images of any size. labels: int64 [n] into `classes`. roles: [n] of ROLES, "" for rows of no role.

    patients, groups: what an interval resamples, and what that is (`patient`, `slide`, `core`, or `none` where nothing is known
    and every image is its own). blocks: what no fold may split, as coarse as `patients` or coarser. slide_ids: of the source
    slides, "" where unknown: looked up in a pretraining catalog. mpp: nominal µm per pixel, None where unknown.
    size_px: side of the square patches, None where images differ. hash: of everything that makes the pixels and labels.
    notes: what must stand beside every number of this set, a sentence each.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    roles: np.ndarray
    patients: np.ndarray
    sites: np.ndarray
    groups: str
    mpp: float | None
    size_px: int | None
    hash: str
    read: Reading
    blocks: np.ndarray
    slide_ids: np.ndarray
    usage: Usage
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, role: str) -> np.ndarray:
        return np.flatnonzero(self.roles == role)

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, Sequence[np.ndarray] | np.ndarray]]:
        """(rows [b], b images uint8 [3, h, w]) in order, at most `size` at once."""
        for start in range(0, len(self), size):
            rows = np.arange(start, min(start + size, len(self)))
            yield rows, self.read(rows)

    def only(self, rows: np.ndarray) -> "LabelledPatches":
        """A part of the patches, in the given order."""
        return replace(
            self,
            labels=self.labels[rows],
            roles=self.roles[rows],
            patients=self.patients[rows],
            sites=self.sites[rows],
            blocks=self.blocks[rows],
            slide_ids=self.slide_ids[rows],
            hash=hashlib.sha256(self.hash.encode() + rows.astype("<i8").tobytes()).hexdigest()[:16],
            read=lambda part: self.read(rows[part]),
        )


def check_roles(roles: np.ndarray, patients: np.ndarray, groups: str) -> None:
    """Raises DatasetError when a patient stands in two roles, or when train or report is empty."""
    for role in NEEDED:
        if not (roles == role).any():
            raise DatasetError(f"no labelled patch has the role {role!r}: expected patches in {NEEDED[0]} and {NEEDED[1]}")
    if groups == "none":
        return
    for a, first in enumerate(ROLES):
        for second in ROLES[a + 1 :]:
            both = sorted(set(patients[roles == first]) & set(patients[roles == second]))
            if both:
                raise DatasetError(
                    f"{len(both)} {groups}s stand in both {first} and {second} ({', '.join(both[:4])}): "
                    f"every {groups} must have one role"
                )


def check_sites(roles: np.ndarray, sites: np.ndarray) -> None:
    """Raises DatasetError unless the external patches come from known sites that no other patch comes from."""
    outside, inside = set(sites[roles == "external"]), set(sites[roles != "external"])
    if "" in outside:
        raise DatasetError("external patches have no site, so they prove nothing external: fill it or set dataset.external=null")
    shared = {site_key(site) for site in outside} & {site_key(site) for site in inside} - {""}
    both = sorted(site for site in outside if site_key(site) in shared)
    if both:
        raise DatasetError(f"the sites {', '.join(both[:4])} have both external and other patches: an external site must be new")


def encode_labels(names: Sequence[str], train: np.ndarray, where: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes in the order of their folded names, and int64 labels. Raises DatasetError when fewer than two classes can be learnt
    from, or when a reported class has no training patch."""
    table = np.asarray(names)
    labels = codes(table)
    classes = table[np.unique(labels, return_index=True)[1]].tolist()
    unseen = sorted(set(classes) - set(table[train].tolist()))
    if len(classes) < 2 or unseen:
        problem = f"the class {unseen[0]!r} has no training patch" if unseen else f"there is one class, {classes}"
        raise DatasetError(f"{where}: {problem}; a probe needs at least two classes, each with training patches")
    return tuple(classes), labels


def counted_classes(patches: LabelledPatches) -> str:
    """`tiles: normal 40 (train 20, report 20), tumour 60 (train 30, report 30)`: what there is, before anything is fitted."""
    words = []
    for label, name in enumerate(patches.classes):
        own = patches.roles[patches.labels == label]
        roles = [(role, int((own == role).sum())) for role in ROLES if (patches.roles == role).any()]
        by_role = f" ({', '.join(f'{role} {count}' for role, count in roles)})" if len(roles) > 1 else ""
        words.append(f"{name} {len(own)}{by_role}")
    return f"{patches.name}, {len(patches)} images in {len(patches.classes)} classes: {', '.join(words)}"


def hash_of(*parts: object) -> str:
    """16 hex digits over parts that print without loss."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) and part.dtype != object else repr(part).encode())
        digest.update(b"\x1f")
    return digest.hexdigest()[:16]
