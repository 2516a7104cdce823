"""TP53 from TCGA, `tp53_v1`: a weak patch task of our own, defined so that anyone can rebuild it. It claims no parity.

Slides are the diagnostic ones of a catalog. Labels come from mutation calls and lists of sequenced samples, as the PanCancer
Atlas studies of cBioPortal hold them. Every tile carries its patient's label; a patient's score is the mean logit of the tiles.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.data.cells import Cells, Tissue
from histoscale.data.keys import key_array
from histoscale.data.readers.scale import choose_scale
from histoscale.data.splits import check_disjoint, name_key
from histoscale.data.storage import Store
from histoscale.eval.datasets.cohort import CutConfig, cut_from
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches, Usage, check_roles, hash_of
from histoscale.eval.datasets.public import PublicConfig, file_in, wants_official
from histoscale.eval.datasets.tcga import (
    HOSPITALS,
    MUTATIONS,
    SEQUENCED,
    STUDIES,
    Case,
    check_pinned,
    hospital_folds,
    hospital_of,
    is_diagnostic,
    patient_of,
    read_cases,
    read_hospitals,
)

CLASSES = ("wild_type", "mutant")
MPP, SIDE, TISSUE, TILES = 0.5, 224, 0.4, 64
PATIENTS = 30  # of each class, in a study that is taken
FOLDS = 5
PART, ARCHIVE = "dataset.counts=any:", "the public tables of TCGA"
LISTS = {"train": "slides_ids_train.txt", "select": "slides_ids_val.txt", "report": "slides_ids_test.txt"}
# `site`: all five folds are reported, each by the others. `ref`: published lists (kaczmarj/pancancer-tp53-mut.tcga, CC BY 4.0).
USAGE = {
    "site": Usage(choose="outer", eva_select="select", eva_report=("report",), positive="mutant"),
    "ref": Usage(choose="select", eva_select="select", eva_report=("report",), positive="mutant"),
}


@dataclass(frozen=True)
class Tp53Config(PublicConfig):
    """split: `site` (five folds of whole hospitals) or `ref` (the published lists). counts: `official` takes studies with
    at least 30 patients of each class, `any` all studies with both classes."""

    split: str


@dataclass(frozen=True)
class StudyPatches(LabelledPatches):
    """Patches that are scored inside their study. studies: [n], `LUAD`. `sites` are hospitals."""

    studies: np.ndarray = field(kw_only=True)

    def only(self, rows: np.ndarray) -> "StudyPatches":
        part = super().only(rows)
        assert isinstance(part, StudyPatches)
        return replace(part, studies=self.studies[rows])


def open_tp53(root: Path, config: Tp53Config, catalog: Catalog, store: Store, cut: CutConfig) -> StudyPatches:
    """The tiles of labelled diagnostic slides, by slide, row and column.

    root: `<study>_tcga_pan_can_atlas_2018/` folders, tissueSourceSite.tsv, SHA256SUMS, and with dataset.split=ref the published
    lists slides_ids_{train,val,test}.txt. dataset.split=site: roles are folds 0 (report), 1 (select) and 2 to 4 (train), and the
    blocks are the folds, so that an outer cross-validation over blocks is the five-fold one of the definition.
    Raises DatasetError: a table is missing, changed or malformed; no diagnostic slide; too few patients; a patient in two parts.
    """
    if config.split not in USAGE or config.mpp != MPP:
        raise DatasetError(
            f"dataset.split is {config.split!r} and dataset.mpp {config.mpp}: expected {' or '.join(USAGE)}, and {MPP} as "
            "tp53_v1 defines it"
        )
    cases, hospitals = read_cases(root), read_hospitals(file_in(root, HOSPITALS, ARCHIVE))
    tables = [f"{folder.name}/{name}" for folder in sorted(root.glob(f"*{STUDIES}")) for name in (MUTATIONS, SEQUENCED)]
    lists = list(LISTS.values()) if config.split == "ref" else []
    for name in lists:
        file_in(root, name, "the published lists")
    pinned = check_pinned(root, [*tables, HOSPITALS, *lists])

    ids = list(catalog.slide_ids)
    diagnostic = [i for i, slide_id in enumerate(ids) if is_diagnostic(slide_id)]
    if not diagnostic:
        raise DatasetError(
            f"{catalog.uri} holds no diagnostic slide of TCGA: expected ids as TCGA-83-5908-01Z-00-DX1.<uuid>, index them"
        )
    known = [i for i in diagnostic if patient_of(ids[i]) in cases]
    studies, notes = _studies({patient_of(ids[i]) for i in known}, cases, config)
    slides = [i for i in known if cases[patient_of(ids[i])].study in studies]
    role_of = _site_roles(ids, slides, cases, hospitals) if config.split == "site" else _listed_roles(root, ids, slides)

    rows, x, y, without = [], [], [], 0
    for slide in slides:
        if ids[slide] not in role_of:
            continue
        corners = tissue_tiles(catalog, slide, cut)
        kept = keyed_tiles(ids[slide], *corners, TILES)
        without += not len(kept)
        rows += [slide] * len(kept)
        x.append(corners[0][kept])
        y.append(corners[1][kept])
    if without:
        notes += (f"{without} slides have no tile with {TISSUE:.0%} tissue at {MPP} µm/px and are left out",)
    slide_of = np.array(rows, np.int64)
    return _patches(config, catalog, store, cut, slide_of, _joined(x), _joined(y), role_of, cases, hospitals, notes, pinned)


def _patches(
    config: Tp53Config, catalog: Catalog, store: Store, cut: CutConfig, slides: np.ndarray, x: np.ndarray, y: np.ndarray,
    role_of: dict[str, tuple[str, str]], cases: dict[str, Case], hospitals: dict[str, str], notes: tuple[str, ...],
    pinned: dict[str, str],
) -> StudyPatches:  # fmt: skip
    distinct, slide = np.unique(slides, return_inverse=True)
    of_slide = [catalog.slide_ids[int(row)] for row in distinct]
    owner = [patient_of(slide_id) for slide_id in of_slide]
    patients = np.array(owner, "<U16")[slide]
    roles = np.array([role_of[slide_id][0] for slide_id in of_slide], "<U8")[slide]
    blocks = np.array([role_of[slide_id][1] for slide_id in of_slide], str)[slide]
    labels = np.array([cases[patient].label for patient in owner], np.int64)[slide]
    check_roles(roles, patients, "patient")
    if len(set(labels[roles == "train"].tolist())) < len(CLASSES):
        raise DatasetError(
            f"the training patients of tp53/{config.split} have one class: expected {' and '.join(CLASSES)}, index more slides"
        )
    return StudyPatches(
        name=f"tp53_v1/{config.split}" + (" (part)" if notes[0].startswith(PART) else ""),
        classes=CLASSES,
        labels=labels,
        roles=roles,
        patients=patients,
        sites=np.array([hospital_of(patient, hospitals) for patient in owner], str)[slide],
        groups="patient",
        mpp=MPP,
        size_px=SIDE,
        hash=hash_of(
            "tp53_v1", catalog.hash, sorted(pinned.items()), cut.mpp_tolerance, cut.max_upsample, slides, x, y, *roles, *blocks
        ),
        read=cut_from(catalog, store, slides, x, y, MPP, SIDE, cut),
        blocks=blocks,
        slide_ids=np.array(of_slide, str)[slide],
        usage=USAGE[config.split],
        notes=notes,
        studies=np.array([cases[patient].study for patient in owner], str)[slide],
    )


def tissue_tiles(catalog: Catalog, slide: int, cut: CutConfig) -> tuple[np.ndarray, np.ndarray]:
    """Corners x, y (level-0 px, int64 [n]) of the tiles with enough tissue: a grid without overlap from the slide's origin.

    The cells are those of the level that is read; none where no level can serve 0.5 µm/px.
    """
    mpps = catalog.level_mpps(slide)
    scale = choose_scale(mpps, MPP, cut.mpp_tolerance, cut.max_upsample)
    if scale is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    level = catalog.layout(slide).levels[scale.level]
    size = SIDE * scale.factor
    tissue = Tissue(catalog.bitmap(slide), catalog.mask_mpp(slide))
    cells = Cells(tissue, level.width, level.height, mpps[scale.level], size, TISSUE)
    row, column = np.indices((int(level.height // size), int(level.width // size))).reshape(2, -1)
    fits = cells.fits(column * size, row * size, 1)[:, 0, 0]
    x, y = (np.rint(place[fits] * size * level.downsample).astype(np.int64) for place in (column, row))
    return x, y


def keyed_tiles(slide_id: str, x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` tiles with the smallest hash of (slide_id, x, y), in the order of rows and columns: int64.

    A larger count holds the smaller ones, and nothing but the slide's own id and tiles decides.
    """
    hashes = key_array(name_key(slide_id), "tp53_v1", 0, (y.astype(np.int64) << 32) + x)
    kept = np.lexsort((x, y, hashes))[:count]
    return kept[np.lexsort((x[kept], y[kept]))]


def _studies(patients: set[str], cases: dict[str, Case], config: Tp53Config) -> tuple[set[str], tuple[str, ...]]:
    """The studies with enough patients of both classes, and what was taken and left as notes."""
    counts = Counter((cases[patient].study, cases[patient].label) for patient in patients)
    least = PATIENTS if wants_official(config) else 1
    found = sorted({study for study, _ in counts})
    taken = [study for study in found if min(counts[study, 0], counts[study, 1]) >= least]

    def listed(studies: Sequence[str]) -> str:
        return ", ".join(f"{study} {counts[study, 1]}/{counts[study, 0]}" for study in studies)

    if not taken:
        instead = "" if config.counts == "any" else ", or set dataset.counts=any to score a part and have every result say so"
        raise DatasetError(
            f"no study has {least} patients of each class with a diagnostic slide: found mutant/wild type "
            f"{listed(found) or 'nobody'}, "
            f"index more slides{instead}"
        )
    notes = [f"patients, mutant/wild type: {listed(taken)}"]
    small = [study for study in taken if min(counts[study, 0], counts[study, 1]) < PATIENTS]
    if small:
        notes.insert(0, f"{PART} {listed(small)} have under {PATIENTS} patients of a class")
    left = [study for study in found if study not in taken]
    if left:
        notes.append(f"left out, under {least} patients of a class: {listed(left)}")
    return set(taken), tuple(notes)


def _site_roles(
    ids: Sequence[str], slides: Sequence[int], cases: dict[str, Case], hospitals: dict[str, str]
) -> dict[str, tuple[str, str]]:
    """Slide -> (role, fold): five folds of whole hospitals."""
    patients = sorted({patient_of(ids[slide]) for slide in slides})
    of_patient = [hospital_of(patient, hospitals) for patient in patients]
    strata = [f"{cases[patient].study}/{cases[patient].label}" for patient in patients]
    folds = hospital_folds(of_patient, strata, FOLDS)
    check_disjoint({f"fold {fold}": [h for h, f in zip(of_patient, folds, strict=True) if f == fold] for fold in range(FOLDS)})
    fold_of = dict(zip(patients, folds.tolist(), strict=True))
    role = {0: "report", 1: "select"}
    return {ids[slide]: (role.get(fold := fold_of[patient_of(ids[slide])], "train"), f"fold {fold}") for slide in slides}


def _listed_roles(root: Path, ids: Sequence[str], slides: Sequence[int]) -> dict[str, tuple[str, str]]:
    """Slide -> (role, patient) by the published lists; slides that stand in none are left out."""
    wanted = {ids[slide] for slide in slides}
    found: dict[str, tuple[str, str]] = {}
    for role, name in LISTS.items():
        for line in (root / name).read_text().split():
            slide_id = line.removesuffix(".svs")
            if found.get(slide_id, (role, ""))[0] != role:
                raise DatasetError(
                    f"{root / name} lists {slide_id}, as another part does: expected one part a slide, fetch the lists again"
                )
            found[slide_id] = (role, patient_of(slide_id))
    kept = {slide_id: part for slide_id, part in found.items() if slide_id in wanted}
    if not kept:
        raise DatasetError(
            f"{root / LISTS['train']} and its siblings list no slide of the catalog: expected its slide ids, index those slides"
        )
    return kept


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
