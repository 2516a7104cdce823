"""TCGA: slides as the GDC gives them; patients by barcode, sites by the hospital's name, never by its two-letter codes.

`TCGA-XX-XXXX-….svs` anywhere below the folder (gdc-client makes a folder for each), and the GDC's `tissueSourceSite.tsv`. A code
belongs to one study, so that it tells the study alone, and most hospitals own several: grouping by code would put one hospital on
both sides of a split. Labels come from another table (`labels.path`); without the GDC's table that one must give the site too.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from histoscale.eval.cohorts.cohort import Cohort, CohortError, find
from histoscale.eval.datasets.patches import DatasetError
from histoscale.eval.datasets.tcga import (
    ONE_HOSPITAL,
    hospital_of,
    is_diagnostic,
    patient_of,
    plain_hospital,
    read_cases,
    read_hospitals,
    read_projects,
)

SLIDES = ("diagnostic", "all")
NOTES = ("TCGA is in the pretraining of most published encoders: see the leakage page",)
_SUFFIXES = (".svs", ".tif", ".tiff")
_SLIDE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}-\d{2}(?P<vial>[A-Z])-\d{2}-(?P<kind>DX|TS|BS|MS)[A-Z0-9]*")


@dataclass(frozen=True)
class TcgaConfig:
    """slides: `diagnostic` (-DX, of formalin-fixed tissue) or `all` (frozen ones too). hospitals: the GDC's tissueSourceSite.tsv,
    a path in root; null where labels.columns gives `site`. studies: the folder in root with cBioPortal's PanCancer Atlas studies,
    for the column tp53; null: without it."""

    kind: Literal["tcga"]
    slides: str
    hospitals: str | None
    studies: str | None

    def __post_init__(self) -> None:
        if self.slides not in SLIDES:
            raise CohortError(f"collection.slides is {self.slides!r}: expected {' or '.join(SLIDES)}")


def read_tcga(root: Path, config: TcgaConfig) -> Cohort:
    """cohort: the project (TCGA-LUAD). preparation: FFPE, frozen, or "" where the barcode does not tell. site and cohort are ""
    without the GDC's table.

    tp53: 1 with a non-silent variant, 0 sequenced without one.

    Raises CohortError: a table has another form or lacks a code.
    """
    hospitals, projects = {}, {}
    if config.hospitals is not None:
        try:
            hospitals, projects = read_hospitals(root / config.hospitals), read_projects(root / config.hospitals)
        except DatasetError as error:
            raise CohortError(f"{error}; or set collection.hospitals=null and take the site from the label table") from error
    left_out: dict[str, str] = {}
    rows: list[dict[str, str]] = []
    for path in find(root, _SUFFIXES):
        match = _SLIDE.match(path.stem)
        if match is None:
            left_out[path.name] = "its name is no barcode of a TCGA slide"
            continue
        if config.slides == "diagnostic" and not is_diagnostic(path.stem):
            left_out[path.stem] = "no diagnostic slide"
            continue
        patient = patient_of(path.stem)
        try:
            site = hospital_of(patient, hospitals) if hospitals else ""
        except DatasetError as error:
            raise CohortError(str(error)) from error
        rows.append(
            {
                "slide_id": path.stem,
                "uri": str(path.absolute()),
                "patient_id": patient,
                "site": site,
                "cohort": projects.get(patient.split("-")[1], "TCGA"),
                "organ": "",
                "stain": "H&E",
                "preparation": _preparation(match["kind"], match["vial"]),
            }
        )
    rows.sort(key=lambda row: row["slide_id"])
    if config.studies is not None:
        try:
            cases = read_cases(root / config.studies)
        except DatasetError as error:
            raise CohortError(str(error)) from error
        for row in rows:
            case = cases.get(row["patient_id"])
            row["tp53"] = "" if case is None else str(case.label)
    found = {"slides": len(rows), "patients": len({row["patient_id"] for row in rows})}
    if config.studies is not None:
        found |= {
            f"TP53 {name}": sum(row["tp53"] == value for row in rows) for value, name in (("1", "mutant"), ("0", "wild type"))
        }
    found |= dict(sorted(Counter(row["cohort"] for row in rows).items()))
    return Cohort("TCGA", tuple(rows), (), found, left_out, NOTES)


def _preparation(kind: str, vial: str) -> str:
    """Tissue slides of vial A are frozen; of later vials some are not."""
    return "FFPE" if kind == "DX" else "frozen" if vial == "A" else ""


def one_name(cohort: Cohort) -> Cohort:
    """Sites of a label table under the name that the GDC's hospital has here: `Mayo Clinic` and `Mayo Clinic - Rochester` are
    one."""
    named = [ONE_HOSPITAL.get(plain_hospital(row["site"]), row["site"]) for row in cohort.rows]
    return replace(cohort, rows=tuple({**row, "site": site} for row, site in zip(cohort.rows, named, strict=True)))


def check_sites(cohort: Cohort) -> None:
    """Raises CohortError: no site at all, or sites that are the codes of barcodes."""
    sites = {row["site"] for row in cohort.rows}
    if sites == {""}:
        raise CohortError(
            "no slide has a site: set collection.hospitals to the GDC's tissueSourceSite.tsv, or name a column of the label "
            "table in labels.columns as site"
        )
    if any(row["site"].upper() == row["patient_id"].split("-")[1] for row in cohort.rows):
        raise CohortError(
            "the sites are the two-letter codes of the barcodes: a code belongs to one study and a hospital owns several; set "
            "collection.hospitals to the GDC's tissueSourceSite.tsv"
        )
