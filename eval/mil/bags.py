"""Bags: embedding stores joined with the manifest's label, patient, site and part, and every overlap refused."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from histoscale.data.manifest import Slide
from histoscale.data.splits import check_disjoint, groups, ordered
from histoscale.eval.scores.operating import RULES

PARTS = ("train", "internal", "external")


@dataclass(frozen=True)
class TaskConfig:
    """label: a manifest column; positive, negative: its values. sensitivities: what a threshold each must keep, by `rule`
    (conformal or empirical). prevalence: the stated one for PPV and NPV. decision: `slide`, or `patient` (highest slide)."""

    name: str
    label: str
    positive: list[str]
    negative: list[str]
    sensitivities: list[float]
    rule: str
    prevalence: float
    decision: str

    def __post_init__(self) -> None:
        if self.decision not in ("slide", "patient"):
            raise ValueError(f"task.decision is {self.decision!r}: expected slide or patient")
        if self.rule not in RULES:
            raise ValueError(f"task.rule is {self.rule!r}: expected {' or '.join(RULES)}")
        if not self.sensitivities or not all(0 < value < 1 for value in (*self.sensitivities, self.prevalence)):
            given = f"task.sensitivities is {self.sensitivities}, task.prevalence {self.prevalence}"
            raise ValueError(f"{given}: expected numbers between 0 and 1")


@dataclass(frozen=True)
class SplitConfig:
    """unit: `patient`, or `slide` where patients are unknown. role: a manifest column whose values `train`, `internal` and
    `external` list; null: `external_sites` are the external sites and a keyed share `test` of the other patients is internal."""

    unit: str
    role: str | None
    train: list[str]
    internal: list[str]
    external: list[str]
    external_sites: list[str]
    test: float
    seed: int


@dataclass(frozen=True)
class Bag:
    """One slide with a label and an embedding store. group: patient (or slide). size_px: side of a tile in level-0 pixels."""

    slide_id: str
    group: str
    site: str
    part: str
    label: int
    path: Path
    tiles: int
    size_px: int
    tiles_um2: float


class BagError(ValueError):
    """Slides, labels and stores that cannot be studied together."""


@dataclass(frozen=True)
class Bags:
    """rows: the slides of the study. width, encoder: of every store. groups: `patient` or `slide`. left_out: slide -> why."""

    rows: tuple[Bag, ...]
    width: int
    encoder: str
    mpp: float
    groups: str
    left_out: dict[str, str]

    def part(self, name: str) -> list[int]:
        return [i for i, bag in enumerate(self.rows) if bag.part == name]

    def labels(self, rows: Sequence[int]) -> np.ndarray:
        """int64 [len(rows)], 1 for positive."""
        return np.array([self.rows[i].label for i in rows], np.int64)


def read_bags(embeddings: Path, slides: Sequence[Slide], task: TaskConfig, split: SplitConfig) -> Bags:
    """Join stores and manifest. Slides without label, without part or without store are left out by name, never in silence.

    Raises SplitError: patients missing, a patient in two parts. Raises BagError: a site inside and outside, unknown label values,
    stores of different encoders, no store at all.
    """
    names = dict(zip((s.slide_id for s in slides), groups(slides, split.unit), strict=True))
    labels, left_out = _labels(slides, task)
    parts = _parts([s for s in slides if s.slide_id in labels], names, split)
    rows, stores = [], {}
    for slide in slides:
        if slide.slide_id not in labels:
            continue
        if slide.slide_id not in parts:
            left_out[slide.slide_id] = f"its {split.role} is in no part of the split"
            continue
        path = _inside(embeddings, slide.slide_id)
        if not path.exists():
            left_out[slide.slide_id] = "no embedding store"
            continue
        store = _open(path)
        stores[slide.slide_id] = store
        rows.append(
            Bag(
                slide_id=slide.slide_id,
                group=names[slide.slide_id],
                site=slide.site or "",
                part=parts[slide.slide_id],
                label=labels[slide.slide_id],
                path=path,
                tiles=store.tiles,
                size_px=store.size_px,
                tiles_um2=store.tiles * (store.mpp * store.patch_px) ** 2,
            )
        )
    if not rows:
        raise BagError(f"{embeddings} holds no store <slide_id>.h5 of the {len(labels)} labelled slides of the manifest")
    check_disjoint({part: [bag.group for bag in rows if bag.part == part] for part in PARTS})
    _check_sites(rows)
    first = stores[rows[0].slide_id]
    for name, store in stores.items():
        if (store.encoder, store.width) != (first.encoder, first.width):
            raise BagError(
                f"{name} was embedded by {store.encoder} (width {store.width}), {rows[0].slide_id} by {first.encoder} "
                f"(width {first.width}): embed all slides with one encoder"
            )
    return Bags(tuple(rows), first.width, first.encoder, first.mpp, split.unit, left_out)


class Features:
    """Features by row, from a cache of at most `cache_bytes`; a slide that does not fit is read again each time."""

    def __init__(self, bags: Bags, cache_bytes: int) -> None:
        self.bags, self.cache_bytes = bags, cache_bytes
        self._held: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0

    def __getitem__(self, row: int) -> np.ndarray:
        """float32 [n, D]."""
        if row in self._held:
            self._held.move_to_end(row)
            return self._held[row]
        with h5py.File(self.bags.rows[row].path) as file:
            values = np.asarray(file["features"], np.float32)
        if not np.isfinite(values).all():
            raise BagError(f"{self.bags.rows[row].path} holds features that are not finite: embed that slide again")
        self._held[row] = values
        self._bytes += values.nbytes
        while self._bytes > self.cache_bytes:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return values

    def coords(self, row: int) -> np.ndarray:
        """int64 [n, 2], level-0 x and y of each tile's top-left corner."""
        with h5py.File(self.bags.rows[row].path) as file:
            return np.asarray(file["coords"], np.int64)


@dataclass(frozen=True)
class _Store:
    encoder: str
    width: int
    tiles: int
    mpp: float
    patch_px: int
    size_px: int


def _open(path: Path) -> _Store:
    try:
        with h5py.File(path) as file:
            features, coords, attrs = file["features"], file["coords"], file.attrs
            store = _Store(
                encoder=str(attrs["encoder_hash"]),
                width=features.shape[1],
                tiles=features.shape[0],
                mpp=float(attrs["mpp"]),
                patch_px=int(attrs["patch_size"]),
                size_px=_size(attrs),
            )
            paired = coords.shape == (features.shape[0], 2)
    except (OSError, KeyError, IndexError) as error:
        raise BagError(f"{path} is no embedding store: {error}; embed that slide again") from error
    if not paired or store.tiles == 0:
        raise BagError(f"{path} holds {store.tiles} features and coordinates of shape {coords.shape}: expected one [x, y] a tile")
    return store


def _size(attrs: h5py.AttributeManager) -> int:
    """Side in level-0 px, rounded up where it is known exactly: corners are rounded too, and no gap may open between tiles."""
    if "level0_mpp" not in attrs:  # stores of other tools
        return int(attrs["patch_size_level0"])
    return math.ceil(float(attrs["patch_size"]) * float(attrs["mpp"]) / float(attrs["level0_mpp"]) - 1e-6)


def _labels(slides: Sequence[Slide], task: TaskConfig) -> tuple[dict[str, int], dict[str, str]]:
    values = {**dict.fromkeys(task.negative, 0), **dict.fromkeys(task.positive, 1)}
    if len(values) != len(task.positive) + len(task.negative):
        raise BagError(f"task.positive {task.positive} and task.negative {task.negative} share a value")
    if not any(task.label in s.labels for s in slides):
        known = sorted({name for s in slides for name in s.labels})
        raise BagError(f"the manifest has no label column {task.label!r}; it has {', '.join(known) or 'none'}")
    labels: dict[str, int] = {}
    left_out: dict[str, str] = {}
    strange: dict[str, str] = {}
    for slide in slides:
        value = slide.labels.get(task.label, "")
        if value in values:
            labels[slide.slide_id] = values[value]
        elif value == "":
            left_out[slide.slide_id] = f"no value in {task.label}"
        else:
            strange[slide.slide_id] = value
    if strange:
        raise BagError(
            f"{len(strange)} slides have a {task.label} that task.positive and task.negative do not name "
            f"({_some([f'{k}: {v!r}' for k, v in strange.items()])})"
        )
    return labels, left_out


def _parts(slides: Sequence[Slide], names: Mapping[str, str], split: SplitConfig) -> dict[str, str]:
    if split.role is not None:
        part_of = {value: part for part in PARTS for value in getattr(split, part)}
        if not any(split.role in s.labels for s in slides):
            raise BagError(f"the manifest has no column {split.role!r} for split.role; set split.role=null to split by patient")
        return {s.slide_id: part_of[s.labels[split.role]] for s in slides if s.labels.get(split.role) in part_of}
    absent = set(split.external_sites) - {s.site for s in slides}
    if absent:
        raise BagError(f"split.external_sites names {', '.join(sorted(absent))}, which no labelled slide comes from")
    inside = [s for s in slides if s.site not in split.external_sites]
    order = ordered((names[s.slide_id] for s in inside), split.seed, "mil/split")
    test = set(order[: round(split.test * len(order))])
    parts = {s.slide_id: "internal" if names[s.slide_id] in test else "train" for s in inside}
    return {**parts, **{s.slide_id: "external" for s in slides if s.site in split.external_sites}}


def _check_sites(rows: Sequence[Bag]) -> None:
    outside = {bag.site for bag in rows if bag.part == "external"}
    both = outside & {bag.site for bag in rows if bag.part != "external"}
    if both - {""}:
        named = ", ".join(sorted(both))
        raise BagError(f"the sites {named} are external and internal at once: an external site is never trained on")
    if "" in outside:
        raise BagError("external slides without a site: no external claim can be made; fill the manifest's site column")


def _inside(folder: Path, slide_id: str) -> Path:
    path = (folder / f"{slide_id}.h5").resolve()
    if path.parent != folder.resolve():
        raise BagError(f"the slide id {slide_id!r} leaves the folder of embeddings")
    return path


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
