"""Images with labels of your own: a CSV with patients and splits, or folders by split, class and patient."""

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

from histoscale.eval.datasets.imagefiles import SUFFIXES, ImageFiles, common_side, measure, stamps
from histoscale.eval.datasets.patches import (
    USAGE_OF_OWN,
    DatasetError,
    LabelledPatches,
    Usage,
    check_roles,
    check_sites,
    encode_labels,
    hash_of,
)

TABLE = "labels.csv"
COLUMNS = ("path", "label")
OPTIONAL = ("split", "patient_id", "site", "slide_id")
LAYOUTS = {
    "csv": f"{TABLE} with {', '.join(COLUMNS)}",
    "split": "<split>/<class>/<image>",
    "class": "<class>/<image>",
    "patient": "<patient>/<class>/<image>",
}
SPLITS = ("auto", "named", "outer")
USAGE_SELECT = Usage(choose="select", eva_select="select", eva_report=("report",), positive=None)
USAGE_OUTER = Usage(choose="outer", eva_select="", eva_report=(), positive=None)
_SPLIT_NAMES = {
    "train", "training", "val", "valid", "validation", "dev", "select", "test", "testing", "report", "external", "holdout",
}  # fmt: skip
_SPLIT_LIKE = re.compile(r"(fold|split|part|set|cv|train|val|test)[-_ ]?\d+", re.IGNORECASE)


def _names(value: Any) -> Any:
    """One name, a list of names or null -> a list of texts: patients are often numbers."""
    listed = [] if value is None else value if isinstance(value, list | tuple) else [value]
    return [str(name) if isinstance(name, int | float) and not isinstance(name, bool) else name for name in listed]


Names = Annotated[list[str], BeforeValidator(_names)]


@dataclass(frozen=True)
class FolderConfig:
    """Which images, which of them may choose, and which are reported.

    layout: one of LAYOUTS, or `auto`, which takes labels.csv where it is and else what the folders say without doubt.
    split: `named`: the names below are splits, or patients in the layout `patient`; `outer`: folds over everything; `auto`:
    `outer` where nothing names a split, else `named`. train, select, report, external: a name, a list of names, or null.
    mpp: µm per pixel of the images; null where unknown.
    """

    name: str
    layout: str
    split: str
    train: Names
    select: Names
    report: Names
    external: Names
    mpp: float | None


@dataclass
class _Rows:
    """What a layout says of every image; a column that it does not have is empty. splits: what `train` and the others name."""

    paths: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    slides: list[str] = field(default_factory=list)

    def add(self, path: str, label: str, split: str = "", patient: str = "", site: str = "", slide: str = "") -> None:
        for column, value in zip(vars(self).values(), (path, label, split, patient, site, slide), strict=True):
            column.append(value)

    def only(self, rows: Sequence[int]) -> "_Rows":
        return _Rows(*([column[i] for i in rows] for column in vars(self).values()))


def open_folder(root: Path, config: FolderConfig, threads: int) -> LabelledPatches:
    """Images of any size under `root`. Without patients every image is its own group, and the result says `groups: none`.

    Raises DatasetError: no layout, or more than one, fits; an image is missing, unreadable or listed twice; a patient stands in
    two roles; a path leaves the folder; a name fits no split or patient; a class has too few patients for what is asked.
    """
    layout = _layout(root, config)
    rows = _csv_rows(root) if layout == "csv" else _folder_rows(root, layout)
    known = _patients_known(root, rows)
    groups = "patient" if known else "none"
    rows, roles, notes = _roles(root, config, layout, rows)
    outer = not len(roles)
    paths = [root / name for name in rows.paths]
    patients = np.array(rows.patients if known else rows.paths)
    if outer:
        roles = np.full(len(paths), "train", dtype="<U8")
        _check_outer(root, rows.labels, patients, groups)
        notes = (*notes, _told_outer(layout, config, patients, groups))
    else:
        check_roles(roles, patients, groups)
        check_sites(roles, np.array(rows.sites))
    classes, labels = encode_labels(rows.labels, roles == "train", str(root))
    if not known:
        notes = (*notes, "groups: none; no patients are known, so intervals take every image as independent and are too narrow")
    usage = USAGE_OUTER if outer else USAGE_SELECT if (roles == "select").any() else USAGE_OF_OWN
    sizes = measure(paths, threads)
    return LabelledPatches(
        name=root.name,
        classes=classes,
        labels=labels,
        roles=roles,
        patients=patients,
        sites=np.array(rows.sites),
        groups=groups,
        mpp=config.mpp,
        size_px=common_side(sizes),
        hash=hash_of("folder", *rows.paths, stamps(paths, threads), classes, labels, usage, *roles, *patients),
        read=ImageFiles(paths, sizes, threads),
        blocks=patients,
        slide_ids=np.array(rows.slides),
        usage=usage,
        notes=notes,
    )


# Which image is what.


def _layout(root: Path, config: FolderConfig) -> str:
    """The layout that is configured, or with `auto` the one that is there. Raises DatasetError."""
    if config.layout not in ("auto", *LAYOUTS):
        raise DatasetError(f"dataset.layout is {config.layout!r}: expected auto, {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise DatasetError(f"data_root={root} is no folder: expected one that holds {'; or '.join(LAYOUTS.values())}")
    if config.layout != "auto":
        return config.layout
    if (root / TABLE).is_file():
        return "csv"
    parts = [path.split("/") for path in _images(root)]
    depths = {len(path) - 1 for path in parts}
    tops = sorted({path[0] for path in parts})
    if depths == {1} and not all(_names_a_split(top) for top in tops):
        return "class"
    if depths == {2}:
        splits = [top for top in tops if _names_a_split(top)]
        if len(splits) == len(tops):
            return "split"
        if not splits and all(re.search(r"\d", top) for top in tops):
            return "patient"
        raise DatasetError(
            f"the folders {', '.join(tops[:4])} of {root} may be splits or patients: say dataset.layout=split "
            f"({LAYOUTS['split']}) or dataset.layout=patient ({LAYOUTS['patient']})"
        )
    found = f"images {' and '.join(str(depth) for depth in sorted(depths))} folders deep" if parts else "no image"
    raise DatasetError(f"{root} holds neither {TABLE} nor images in {', '.join(list(LAYOUTS.values())[1:])}: found {found}")


def _names_a_split(name: str) -> bool:
    return name.lower() in _SPLIT_NAMES or _SPLIT_LIKE.fullmatch(name) is not None


def _images(root: Path) -> list[str]:
    """Paths of all images below `root`, with slashes, sorted; hidden folders and those of archivers are left alone."""
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if not name.startswith((".", "__"))]
        here = Path(folder).relative_to(root)
        found += [(here / name).as_posix() for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def _folder_rows(root: Path, layout: str) -> _Rows:
    rows, deep = _Rows(), 1 if layout == "class" else 2
    for path in _images(root):
        parts = path.split("/")
        if len(parts) - 1 != deep:
            raise DatasetError(f"{root / path} does not fit dataset.layout={layout}: expected {LAYOUTS[layout]}; move it away")
        first = parts[0] if deep == 2 else ""
        rows.add(path, parts[-2], split=first, patient=first if layout == "patient" else "")
    if not rows.paths:
        raise DatasetError(f"{root} holds no image in {LAYOUTS[layout]}: expected files {', '.join(SUFFIXES)}")
    return rows


def _csv_rows(root: Path) -> _Rows:
    path, rows, inside = root / TABLE, _Rows(), root.resolve()
    if not path.is_file():
        raise DatasetError(f"{root} holds no {TABLE}: dataset.layout=csv expects it, with {', '.join(COLUMNS)}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = sorted(set(COLUMNS) - set(reader.fieldnames or ()))
        if missing:
            optional = f"and {', '.join(OPTIONAL)} where known"
            raise DatasetError(f"{path} lacks the columns {', '.join(missing)}; expected {', '.join(COLUMNS)}, {optional}")
        table = list(reader)
    for number, row in enumerate(table, start=2):
        image = (root / row["path"]).resolve()
        if not image.is_relative_to(inside):
            raise DatasetError(f"{path}: the path {row['path']!r} leaves the folder")
        if not image.is_file():
            raise DatasetError(f"{path}: the image {row['path']!r} is missing")
        if not row["label"]:
            raise DatasetError(f"{path} line {number}: the image {row['path']!r} has no label; fill it in or drop the row")
        rows.add(row["path"], row["label"], *(row.get(name) or "" for name in OPTIONAL))
    twice = sorted(name for name, times in Counter(rows.paths).items() if times > 1)
    if twice:
        raise DatasetError(f"{path} lists {len(twice)} images twice ({', '.join(twice[:4])}): every image must stand there once")
    if not rows.paths:
        raise DatasetError(f"{path} has no row: expected an image in each")
    return rows


def _patients_known(root: Path, rows: _Rows) -> bool:
    if any(rows.patients) and not all(rows.patients):
        raise DatasetError(f"{root / TABLE}: some rows have a patient_id and some have none; fill in all or none")
    return all(rows.patients)


# Who may choose, and who is reported.


def _roles(root: Path, config: FolderConfig, layout: str, rows: _Rows) -> tuple[_Rows, np.ndarray, tuple[str, ...]]:
    """(rows that have a role, their roles, notes); no roles where folds over everything are to be made."""
    if config.split not in SPLITS:
        raise DatasetError(f"dataset.split is {config.split!r}: expected {', '.join(SPLITS)}")
    asked = {"train": config.train, "select": config.select, "report": config.report, "external": config.external}
    role_of = {name: role for role, names in asked.items() for name in names}
    if len(role_of) < sum(len(names) for names in asked.values()):
        raise DatasetError(
            f"dataset.train, .select, .report and .external are {', '.join(n for names in asked.values() for n in names)}: "
            "expected different names"
        )
    there = set(rows.splits) - {""}
    unsplit = not there or (layout == "patient" and not there & set(role_of))
    if config.split == "outer" or (config.split == "auto" and unsplit):
        return rows, np.array([], dtype="<U8"), ()
    what = "patients" if layout == "patient" else "splits"
    absent = sorted(set(role_of) - there)
    if absent or not config.train or not config.report:
        problem = f"none is called {', '.join(absent)}" if absent else "dataset.train and dataset.report must name some"
        raise DatasetError(
            f"{root} holds the {what} {', '.join(sorted(there)[:8]) or 'none'}, and {problem}: name them with dataset.train=, "
            "dataset.report= (and .select=, .external=), or set dataset.split=outer for folds over everything"
        )
    kept = [i for i, name in enumerate(rows.splits) if name in role_of]
    roles = np.array([role_of[rows.splits[i]] for i in kept], dtype="<U8")
    unused = sorted(there - set(role_of))
    left = len(rows.paths) - len(kept)
    notes = (f"{left} images of the {what} {', '.join(unused[:4]) or '(none)'} have no role and are not used",) if left else ()
    return rows.only(kept), roles, notes


def _told_outer(layout: str, config: FolderConfig, patients: np.ndarray, groups: str) -> str:
    names = ", ".join([*config.train, *config.report])
    absent = f"no patient is called {names}" if layout == "patient" else f"no split is named in {LAYOUTS[layout]}"
    why = "dataset.split=outer" if config.split == "outer" else absent
    whole = f"all {len(set(patients.tolist()))} {'patients' if groups == 'patient' else 'images'}"
    return f"{why}: folds over {whole} are reported, each image by the fold that held it out"


def _check_outer(root: Path, labels: Sequence[str], patients: np.ndarray, groups: str) -> None:
    """Raises DatasetError unless every class is left to learn from whichever group is held out."""
    units: dict[str, set[str]] = {}
    for label, patient in zip(labels, patients.tolist(), strict=True):
        units.setdefault(label, set()).add(patient)
    poor = sorted(label for label, found in units.items() if len(found) < 2)
    if poor:
        unit = "patients" if groups == "patient" else "images"
        raise DatasetError(
            f"{root} holds {len(labels)} images in {len(units)} classes, and {poor[0]} has {len(units[poor[0]])} of the {unit}: "
            f"folds over everything need at least 2 {unit} of every class, one to learn from while another is held out; add some"
        )
