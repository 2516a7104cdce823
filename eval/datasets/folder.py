"""Images with labels of your own: a CSV with patients and splits, or folders by split, class and patient."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

from histoscale.data.fingerprint import content, contents
from histoscale.data.names import fold, is_missing, patient_key
from histoscale.data.picturefolder import Listing, counted, list_pictures
from histoscale.data.pictures import SUFFIXES
from histoscale.eval.datasets.imagefiles import ImageFiles, common_side, dark_note, measure
from histoscale.eval.datasets.labels import find_image, one_class, one_patient, one_site, read_labels
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

    Classes, patients, sites and splits are one however they are written; what was joined, and files that are no pictures, are
    notes. Raises DatasetError: no layout, or more than one, fits; an image is missing, unreadable or listed twice; a class folder
    without an image that is read; a patient stands in two roles; a path leaves the folder; a name fits no split or patient; a
    class has too few patients for what is asked.
    """
    listing = _listing(root, config)
    layout = _layout(root, config, listing)
    rows, notes = _csv_rows(root) if layout == "csv" else _folder_rows(root, layout, listing)
    known = _patients_known(root, rows)
    groups = "patient" if known else "none"
    rows, roles, said = _roles(root, config, layout, rows)
    notes = (*notes, *said)
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
    notes = (*notes, *dark_note(paths, threads))
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
        hash=hash_of("folder 2", *rows.paths, contents(paths), classes, labels, usage, *roles, *patients),
        read=ImageFiles(paths, sizes, threads),
        blocks=patients,
        slide_ids=np.array(rows.slides),
        usage=usage,
        notes=notes,
    )


# Which image is what.


def _listing(root: Path, config: FolderConfig) -> Listing:
    if config.layout not in ("auto", *LAYOUTS):
        raise DatasetError(f"dataset.layout is {config.layout!r}: expected auto, {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise DatasetError(f"data_root={root} is no folder: expected one that holds {'; or '.join(LAYOUTS.values())}")
    listed = config.layout == "csv" or (config.layout == "auto" and (root / TABLE).is_file())
    return Listing([], [], {}) if listed else list_pictures(root)


def _layout(root: Path, config: FolderConfig, listing: Listing) -> str:
    """The layout that is configured, or with `auto` the one that is there. Raises DatasetError."""
    if config.layout != "auto":
        return config.layout
    if (root / TABLE).is_file():
        return "csv"
    parts = [path.split("/") for path in listing.pictures]
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
    found += "".join(f"; {sentence}" for sentence in listing.told())
    raise DatasetError(f"{root} holds neither {TABLE} nor images in {', '.join(list(LAYOUTS.values())[1:])}: found {found}")


def _names_a_split(name: str) -> bool:
    return fold(name) in _SPLIT_NAMES or _SPLIT_LIKE.fullmatch(fold(name)) is not None


def _folder_rows(root: Path, layout: str, listing: Listing) -> tuple[_Rows, tuple[str, ...]]:
    rows, deep = _Rows(), 1 if layout == "class" else 2
    for path in listing.pictures:
        parts = path.split("/")
        if len(parts) - 1 != deep:
            raise DatasetError(f"{root / path} does not fit dataset.layout={layout}: expected {LAYOUTS[layout]}; move it away")
        first = parts[0] if deep == 2 else ""
        if layout == "patient" and is_missing(first):
            raise DatasetError(f"{root / first} stands for a missing patient: name the patient, or move the folder away")
        rows.add(path, parts[-2], split=first, patient=first if layout == "patient" else "")
    if not rows.paths:
        raise DatasetError(f"{root} holds no image in {LAYOUTS[layout]}: expected files {', '.join(SUFFIXES)}")
    rows, said = _one_name_each(root, rows)
    return rows, (*said, *listing.told(), *_empty(root, layout, listing, rows))


def _empty(root: Path, layout: str, listing: Listing, rows: _Rows) -> tuple[str, ...]:
    """A sentence for patients that merely lack a class. Raises DatasetError for other class folders without an image that is
    read, and for what should be one."""
    deep = 1 if layout == "class" else 2
    full = {path.rpartition("/")[0] for path in rows.paths}
    bare = [name for name in listing.folders if name and name.count("/") == deep - 1 and name not in full]
    classes = {fold(label) for label in rows.labels}
    lacking = [
        name for name in bare
        if layout == "patient" and name not in listing.skipped and fold(name.split("/")[-1]) in classes
    ]  # fmt: skip
    wrong = [name for name in bare if name not in lacking]
    if wrong:
        told = "; ".join(f"{name} ({counted(listing.skipped.get(name, {})) or 'empty'})" for name in wrong[:4])
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise DatasetError(
            f"{root}: {len(wrong)} class folders hold no image that is read: {told}{more}; save their images as "
            f"{', '.join(SUFFIXES)}, or move the folders away"
        )
    return (f"{len(lacking)} patients have an empty class folder ({', '.join(lacking[:4])})",) if lacking else ()


def _csv_rows(root: Path) -> tuple[_Rows, tuple[str, ...]]:
    path, rows = root / TABLE, _Rows()
    if not path.is_file():
        raise DatasetError(f"{root} holds no {TABLE}: dataset.layout=csv expects it, with {', '.join(COLUMNS)}")
    content(path)
    table = read_labels(path, COLUMNS, OPTIONAL)
    for number, row in table.rows:
        if not row["path"]:
            raise DatasetError(f"{path} line {number} names no image: fill in the column path, or drop the row")
        try:
            image = find_image(root, row["path"])
        except DatasetError as error:
            raise DatasetError(f"{path} line {number}: {error}") from error
        if not row["label"]:
            raise DatasetError(
                f"{path} line {number}: the image {row['path']!r} has no label (nan, NA, null and none are none): fill it in or "
                "drop the row"
            )
        rows.add(image.as_posix(), row["label"], *(row.get(name, "") for name in OPTIONAL))
    twice = sorted(name for name, times in Counter(rows.paths).items() if times > 1)
    if twice:
        raise DatasetError(f"{path} lists {len(twice)} images twice ({', '.join(twice[:4])}): every image must stand there once")
    if not rows.paths:
        raise DatasetError(f"{path} has no row: expected an image in each")
    return _one_name_each(path, rows)


def _one_name_each(where: Path, rows: _Rows) -> tuple[_Rows, tuple[str, ...]]:
    """Classes, patients and sites in one spelling each, and what was joined."""
    labels, of_labels = one_class(rows.labels, str(where))
    patients, of_patients = one_patient(rows.patients, str(where))
    sites, of_sites = one_site(rows.sites, str(where))
    return replace(rows, labels=labels, patients=patients, sites=sites), (*of_labels, *of_patients, *of_sites)


def _patients_known(root: Path, rows: _Rows) -> bool:
    if any(rows.patients) and not all(rows.patients):
        absent = sum(not patient for patient in rows.patients)
        raise DatasetError(
            f"{root / TABLE}: some rows have a patient_id and some have none ({absent} of {len(rows.patients)} are missing); "
            "fill in all or none"
        )
    return all(rows.patients)


# Who may choose, and who is reported.


def _roles(root: Path, config: FolderConfig, layout: str, rows: _Rows) -> tuple[_Rows, np.ndarray, tuple[str, ...]]:
    """(rows that have a role, their roles, notes); no roles where folds over everything are to be made."""
    if config.split not in SPLITS:
        raise DatasetError(f"dataset.split is {config.split!r}: expected {', '.join(SPLITS)}")
    asked = {"train": config.train, "select": config.select, "report": config.report, "external": config.external}
    key = patient_key if layout == "patient" else fold
    role_of = {key(name): role for role, names in asked.items() for name in names}
    if len(role_of) < sum(len(names) for names in asked.values()):
        raise DatasetError(
            f"dataset.train, .select, .report and .external are {', '.join(n for names in asked.values() for n in names)}: "
            "expected different names"
        )
    there = {key(name): name for name in sorted(set(rows.splits) - {""}, reverse=True)}
    unsplit = not there or (layout == "patient" and not there.keys() & role_of.keys())
    if config.split == "outer" or (config.split == "auto" and unsplit):
        return rows, np.array([], dtype="<U8"), ()
    what = "patients" if layout == "patient" else "splits"
    absent = sorted(name for names in asked.values() for name in names if key(name) not in there)
    if absent or not config.train or not config.report:
        problem = f"none is called {', '.join(absent)}" if absent else "dataset.train and dataset.report must name some"
        raise DatasetError(
            f"{root} holds the {what} {', '.join(sorted(there.values())[:8]) or 'none'}, and {problem}: name them with "
            "dataset.train=, dataset.report= (and .select=, .external=), or set dataset.split=outer for folds over everything"
        )
    kept = [i for i, name in enumerate(rows.splits) if key(name) in role_of]
    roles = np.array([role_of[key(rows.splits[i])] for i in kept], dtype="<U8")
    unused = sorted(name for split, name in there.items() if split not in role_of)
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
