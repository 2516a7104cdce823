"""Bags: embedding stores joined with the manifest's target, patient and site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from histoscale.data.manifest import Slide
from histoscale.data.names import patient_key
from histoscale.data.splits import groups
from histoscale.eval.mil.folder import read_folder
from histoscale.eval.mil.task import ClassesTask, SurvivalTask, Task, read_targets
from histoscale.eval.stores import StoreError, StoreInfo, StoreLocked, open_store, store_path

_SHOWN = 3
_RATIO = 1.15  # of two mpps: an embedding may take a stored level that is up to 5 % off, either way


@dataclass(frozen=True)
class Bag:
    """One slide with a target and an embedding store. group: patient (or slide). target, event: as in task.Target.
    size_px: side of a tile in level-0 px, 0 where the store does not say. tiles_um2: area of all tiles, NaN where the store does
    not say its mpp. columns: the label columns of its manifest row."""

    slide_id: str
    group: str
    site: str
    target: float
    event: bool
    path: Path
    tiles: int
    size_px: int
    tiles_um2: float
    columns: dict[str, str]

    @property
    def label(self) -> int:
        """The class."""
        return int(self.target)


class BagError(ValueError):
    """Slides, targets and stores that cannot be studied together."""


@dataclass(frozen=True)
class Bags:
    """rows: the slides of the study. width, encoder, mpp: of their stores. groups: patient or slide. left_out: slide -> why."""

    rows: tuple[Bag, ...]
    width: int
    encoder: str
    mpp: float
    groups: str
    left_out: dict[str, str]

    def labels(self, rows: Sequence[int]) -> np.ndarray:
        """Classes of some rows: int64 [len(rows)]."""
        return np.array([self.rows[i].label for i in rows], np.int64)

    def targets(self, rows: Sequence[int]) -> np.ndarray:
        """Targets of some rows: float64 [len(rows)]."""
        return np.array([self.rows[i].target for i in rows], np.float64)

    def events(self, rows: Sequence[int]) -> np.ndarray:
        """Whether the event was seen, of some rows: bool [len(rows)]."""
        return np.array([self.rows[i].event for i in rows], bool)


def read_bags(embeddings: Path, slides: Sequence[Slide], task: Task, unit: str, unfinished: bool = False) -> Bags:
    """Join stores and manifest. Slides without target or without a whole store are left out by name, never in silence.

    unit: `patient`, or `slide` where patients are unknown. unfinished: whether stores are taken of an `embed` that has not
    finished. Raises SplitError: slides without patient_id. Raises TaskError: labels that the task does not name. Raises
    StoreError: a slide id that leaves the folder. Raises BagError: stores of different encoders or mpps, stores that another
    process writes to, an unfinished folder, no store at all, a patient with two targets of whom one decision is asked.
    """
    names = dict(zip((s.slide_id for s in slides), _one_spelling(groups(slides, unit), unit), strict=True))
    targets, left_out = read_targets(slides, task)
    folder = read_folder(embeddings)
    if folder.unfinished and not unfinished:
        held = sum(store_path(embeddings, name).exists() for name in targets)
        raise BagError(
            f"the embed that fills {embeddings} has not finished (it is {folder.unfinished}; {held} of the {len(targets)} "
            "labelled slides have a store): let the same embed end, or set allow_unfinished=true to study what is there"
        )
    rows, stores, locked = [], [], []
    for slide in (s for s in slides if s.slide_id in targets):
        path = store_path(embeddings, slide.slide_id)
        if not path.exists():
            left_out[slide.slide_id] = folder.absent(slide.slide_id)
            continue
        try:
            store = open_store(path)
        except StoreLocked as error:
            locked.append(error)
            continue
        except StoreError as error:
            left_out[slide.slide_id] = spoilt(error)
            continue
        target = targets[slide.slide_id]
        stores.append(store)
        rows.append(
            Bag(
                slide_id=slide.slide_id,
                group=names[slide.slide_id],
                site=slide.site or "",
                target=target.value,
                event=target.event,
                path=path,
                tiles=store.tiles,
                size_px=store.size_px,
                tiles_um2=store.tiles * (store.mpp * store.patch_px) ** 2,
                columns=dict(slide.labels),
            )
        )
    if locked:
        more = f" (and {len(locked) - 1} more)" if len(locked) > 1 else ""
        raise BagError(f"{locked[0]}{more}")
    if not rows:
        why = reasons({name: left_out[name] for name in targets})
        hint = f"; {folder.hint}" if folder.hint else ""
        raise BagError(
            f"{embeddings} holds no store <slide_id>.h5 that can be used of the {len(targets)} labelled slides: "
            f"{'; '.join(why)}{hint}"
        )
    _check_one_encoder(rows, stores)
    if task.decision == "patient":
        _check_one_target(rows, task)
    return Bags(tuple(rows), stores[0].width, stores[0].encoder, stores[0].mpp, unit, left_out)


def _check_one_target(rows: Sequence[Bag], task: Task) -> None:
    """Of a patient, where the task cannot tell which of two to take: neither the highest nor the mean makes sense."""
    if not isinstance(task, SurvivalTask) and not (isinstance(task, ClassesTask) and not task.ordered):
        return
    first: dict[str, Bag] = {}
    for bag in rows:
        other = first.setdefault(bag.group, bag)
        if (bag.target, bag.event) != (other.target, other.event):
            raise BagError(
                f"the slides {other.slide_id} and {bag.slide_id} of {bag.group} bear different values of {task.label}: give a "
                "patient one, or set task.decision=slide"
            )


def spoilt(error: StoreError) -> str:
    """Why a slide is left out whose store cannot be used."""
    return f"its store {error.why or error}"


def reasons(left_out: Mapping[str, str]) -> list[str]:
    """`why: how many (the first names)`, the commonest first."""
    named: dict[str, list[str]] = {}
    for name, why in left_out.items():
        named.setdefault(why, []).append(name)
    return [
        f"{why}: {len(names)} ({', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' * (len(names) > _SHOWN)})"
        for why, names in sorted(named.items(), key=lambda pair: -len(pair[1]))
    ]


def without(bags: Bags, why: Mapping[str, str]) -> Bags:
    """The bags less some slides: slide id -> why."""
    return replace(bags, rows=tuple(bag for bag in bags.rows if bag.slide_id not in why), left_out={**bags.left_out, **why})


def _one_spelling(names: Sequence[str], unit: str) -> list[str]:
    """One name a patient, the first that the manifest has: `P1` and `p1`, and barcodes of two samples, are one patient."""
    first: dict[str, str] = {}
    return [first.setdefault(patient_key(name), name) for name in names] if unit == "patient" else list(names)


def _check_one_encoder(rows: Sequence[Bag], stores: Sequence[StoreInfo]) -> None:
    first = stores[0]
    for bag, store in zip(rows, stores, strict=True):
        if (store.encoder, store.width) != (first.encoder, first.width):
            raise BagError(
                f"{bag.slide_id} was embedded by {store.encoder} (width {store.width}), {rows[0].slide_id} by {first.encoder} "
                f"(width {first.width}): embed all slides with one encoder"
            )
        if max(store.mpp, first.mpp) > _RATIO * min(store.mpp, first.mpp):  # false where one is NaN
            where = f"{bag.slide_id} was embedded at {store.mpp:g} um/px, {rows[0].slide_id} at {first.mpp:g}"
            raise BagError(f"{where}: embed all slides at one mpp")
