"""Labelled patches that are cut from catalogued slides: `patches.parquet` of the synthetic cohort, or of your own slides."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from histoscale.data.catalog import Catalog
from histoscale.data.fingerprint import bytes_of
from histoscale.data.names import fold, known, nearest, slide_key
from histoscale.data.readers.scale import choose_scale, read_scaled
from histoscale.data.storage import Store
from histoscale.eval.datasets.labels import one_class, one_patient, one_site
from histoscale.eval.datasets.patches import (
    USAGE_OF_OWN,
    DatasetConfig,
    DatasetError,
    LabelledPatches,
    Reading,
    check_roles,
    check_sites,
    encode_labels,
    hash_of,
)
from histoscale.eval.resolution import LevelConfig

_TEXTS = ("slide_id", "patient_id", "site", "role", "task", "label")
COLUMNS = ("slide_id", "patient_id", "site", "role", "task", "x", "y", "mpp", "size_px", "label")


@dataclass(frozen=True)
class CutConfig(LevelConfig):
    """threads: slides that are read at once."""

    threads: int


def open_cohort(uri: str, catalog: Catalog, store: Store, config: DatasetConfig, cut: CutConfig) -> LabelledPatches:
    """The patches of `uri` whose task and role the configuration names.

    uri: a Parquet file with COLUMNS; x, y are level-0 pixels of the top-left corner, mpp and size_px those of the patch.
    Raises DatasetError: a column or a slide is missing, sizes or mpp differ, a patient has two roles; on reading, a slide that
    cannot serve the mpp.
    """
    table = _table(uri, store, config)
    roles = _roles(table["role"], config)
    names, of_labels = one_class(_filled(table["label"], "label", uri), uri)
    classes, labels = encode_labels(names, roles == "train", uri)
    of_rows, of_patients = one_patient(_filled(table["patient_id"], "patient_id", uri), uri)
    at, of_sites = one_site(table["site"].tolist(), uri)
    patients, sites = np.array(of_rows), np.array(at)
    check_roles(roles, patients, "patient")
    check_sites(roles, sites)
    mpp, size_px = float(_single(table["mpp"], "mpp", uri)), int(_single(table["size_px"], "size_px", uri))

    place = _places(sorted({str(slide_id) for slide_id in table["slide_id"]}), catalog, uri)
    slides = np.array([place[str(slide_id)] for slide_id in table["slide_id"]])
    x, y = table["x"].astype(np.int64), table["y"].astype(np.int64)

    return LabelledPatches(
        name=f"cohort/{config.task}" if config.task else "cohort",
        classes=classes,
        labels=labels,
        roles=roles,
        patients=patients,
        sites=sites,
        groups="patient",
        mpp=mpp,
        size_px=size_px,
        hash=hash_of(
            "cut", catalog.hash, mpp, size_px, cut.mpp_tolerance, cut.max_upsample, slides, x, y, labels, *classes, *roles
        ),
        read=cut_from(catalog, store, slides, x, y, mpp, size_px, cut),
        blocks=patients,
        slide_ids=np.array([str(slide_id) for slide_id in table["slide_id"]]),
        usage=USAGE_OF_OWN,
        notes=(*of_labels, *of_patients, *of_sites),
    )


def _filled(column: np.ndarray, name: str, uri: str) -> list[str]:
    """Raises DatasetError for rows without a value."""
    values = column.tolist()
    if not all(values):
        raise DatasetError(
            f"{uri}: {values.count('')} of {len(values)} patches have no {name} (nan, NA, null and none are none): fill it in or "
            "drop the rows"
        )
    return values


def _places(slide_ids: list[str], catalog: Catalog, uri: str) -> dict[str, int]:
    """The catalog's row of each slide, by its id or, where only one slide fits, by the id without folder and suffix.

    Raises DatasetError: a slide that the catalog does not hold, and the one that looks most like it.
    """
    exact = {str(slide_id): i for i, slide_id in enumerate(catalog.slide_ids)}
    by_key: dict[str, list[int]] = {}
    for slide_id, i in exact.items():
        by_key.setdefault(slide_key(slide_id), []).append(i)
    found = {}
    for slide_id in slide_ids:
        fits = [exact[slide_id]] if slide_id in exact else by_key.get(slide_key(slide_id), [])
        if len(fits) == 1:
            found[slide_id] = fits[0]
    missing = [slide_id for slide_id in slide_ids if slide_id not in found]
    if missing:
        near = nearest(missing[0], exact)
        guess = f"; the nearest to {missing[0]} is {near}: is that the one?" if near else ""
        raise DatasetError(
            f"{uri} has patches of {len(missing)} slides that the catalog does not hold: {', '.join(missing[:4])}{guess}"
        )
    return found


def cut_from(
    catalog: Catalog, store: Store, slides: np.ndarray, x: np.ndarray, y: np.ndarray, mpp: float, size_px: int, cut: CutConfig
) -> Reading:
    """Reads patches of `size_px` at `mpp` whose corners are x, y (level-0 px, int64 [n]) of the catalog's rows `slides` [n].

    Raises DatasetError, on reading, for a slide that cannot serve the mpp.
    """

    def cut_slide(slide: int, rows: np.ndarray) -> list[np.ndarray]:
        scale = choose_scale(catalog.level_mpps(slide), mpp, cut.mpp_tolerance, cut.max_upsample)
        if scale is None:
            raise DatasetError(f"slide {catalog.slides[slide].slide_id} has no level that can serve {mpp} µm/px")
        reader = catalog.reader(slide, store)
        downsample = catalog.layout(slide).levels[scale.level].downsample
        corners = [(round(x[i] / downsample), round(y[i] / downsample)) for i in rows]
        return [read_scaled(reader, scale, left, top, size_px, size_px) for left, top in corners]

    def read(rows: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(rows), 3, size_px, size_px), np.uint8)
        places = [np.flatnonzero(slides[rows] == slide) for slide in np.unique(slides[rows])]
        with ThreadPoolExecutor(cut.threads) as pool:
            for place, patches in zip(places, pool.map(lambda p: cut_slide(slides[rows[p[0]]], rows[p]), places), strict=True):
                pixels[place] = np.stack(patches).transpose(0, 3, 1, 2)
        return pixels

    return read


def _table(uri: str, store: Store, config: DatasetConfig) -> dict[str, np.ndarray]:
    """The rows of the task and of the three roles, sorted by slide and position so that neighbours are read together."""
    try:
        bytes_of(uri, store)
        table = pq.read_table(store.local(uri))
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{uri} is not a Parquet file: {error}") from error
    missing = sorted(set(COLUMNS) - set(table.column_names))
    if missing:
        raise DatasetError(f"{uri} lacks the columns {', '.join(missing)}; expected {', '.join(COLUMNS)}")
    tasks = sorted({known(str(task)) for task in table["task"].to_pylist()})
    if config.task is None and len(tasks) > 1:
        raise DatasetError(f"{uri} holds the tasks {', '.join(tasks)}: name one with dataset.task=")
    if config.task is not None and config.task not in tasks:
        raise DatasetError(f"{uri} holds no task {config.task!r}; it has {', '.join(tasks)}")
    columns = {name: np.array(table[name].to_pylist()) for name in COLUMNS if name not in _TEXTS}
    columns |= {name: np.array([known(str(value)) for value in table[name].to_pylist()], dtype=str) for name in _TEXTS}
    columns["role"] = np.array([fold(role) for role in columns["role"].tolist()], dtype=str)
    wanted = [fold(role) for role in (config.train, config.report, config.external) if role is not None]
    keep = np.isin(columns["role"], wanted) & ((columns["task"] == (config.task or "")) | (config.task is None))
    order = np.lexsort((columns["x"], columns["y"], columns["slide_id"]))
    order = order[keep[order]]
    return {name: column[order] for name, column in columns.items()}


def _roles(column: np.ndarray, config: DatasetConfig) -> np.ndarray:
    named = [("train", config.train), ("report", config.report), ("external", config.external)]
    own = [fold(name) for _, name in named if name is not None]
    if len(set(own)) < len(own):
        raise DatasetError(f"dataset.train, .report and .external are {', '.join(own)}: expected three different roles")
    roles = np.full(len(column), "", dtype="<U8")
    for role, name in named:
        if name is not None:
            roles[column == fold(name)] = role
    return roles


def _single(column: np.ndarray, name: str, uri: str) -> float:
    values = np.unique(column)
    if len(values) != 1:
        raise DatasetError(f"{uri} mixes {name} {values[:4].tolist()} in one task: expected one value")
    return float(values[0])
