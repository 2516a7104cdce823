"""The public tables of TCGA: barcodes, hospitals, TP53 labels, and folds that keep a hospital whole."""

import csv
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histoscale.data.fingerprint import content
from histoscale.eval.datasets.patches import DatasetError

# What changes the protein (MAF's Variant_Classification), and what is known and does not.
NON_SILENT = frozenset({
    "Missense_Mutation", "Nonsense_Mutation", "Frame_Shift_Del", "Frame_Shift_Ins", "In_Frame_Del", "In_Frame_Ins", "Splice_Site",
    "Translation_Start_Site", "Nonstop_Mutation",
})  # fmt: skip
SILENT = frozenset({
    "Silent", "Splice_Region", "Intron", "RNA", "3'UTR", "5'UTR", "3'Flank", "5'Flank", "IGR", "Targeted_Region", "lincRNA",
    "De_novo_Start_InFrame", "De_novo_Start_OutOfFrame",
})  # fmt: skip
VARIANT_COLUMNS = ("Hugo_Symbol", "Variant_Classification", "Tumor_Sample_Barcode")
MUTATIONS, SEQUENCED = "data_mutations.txt", "case_lists/cases_sequenced.txt"  # of a study as cBioPortal packs it
STUDIES = "_tcga_pan_can_atlas_2018"  # what its PanCancer Atlas studies end in: `luad_tcga_pan_can_atlas_2018`
HOSPITALS = "tissueSourceSite.tsv"  # the GDC's table of source-site codes
HOSPITAL_COLUMNS = ("TSS Code", "Source Site")
PINNED = "SHA256SUMS"
# Other names of one hospital in the GDC's table, as `plain_hospital` has them -> the name that is kept. Washington University and
# BLN passed on tissue of others: those count with the hospital that they name.
ONE_HOSPITAL = {
    plain: kept
    for kept, others in {
        "BLN - Baylor": "bln baylor, baylor network",
        "Brigham and Women's Hospital": "brigham and women s hospital, brigham and women s hospital division of thoracic surgery",
        "British Columbia Cancer Agency": "british columbia cancer agency, bc cancer agency",
        "Christiana Healthcare": "christiana healthcare, christiana care",
        "Cleveland Clinic Foundation": (
            "cleveland clinic foundation, cleveland clinic, bln cleveland clinic, washington university cleveland clinic"
        ),
        "Duke University": "duke university, duke",
        "Emory University": "emory university, emory university winship cancer inst, washington university emory",
        "Fondazione IRCCS Besta": "fondazione besta, milan italy fondazione irccs instituto neuroligico c besta",
        "Fox Chase Cancer Center": "fox chase cancer center, fox chase",
        "Greenville Health System": "greenville health system, greenville health systems",
        "Gundersen Lutheran Health System": "gundersen lutheran health system, gundersen lutheran",
        "Hartford Hospital": "hartford hospital, hartford",
        "International Genomics Consortium": "international genomics consortium, international genomics conosrtium",
        "MD Anderson Cancer Center": ("md anderson cancer center, md anderson, university of texas md anderson cancer center"),
        "Mayo Clinic - Rochester": "mayo clinic rochester, mayo clinic, mayo, washington university mayo clinic",
        "Memorial Sloan Kettering Cancer Center": "memorial sloan kettering cancer center, memorial sloan kettering, mskcc",
        "Ohio State University": "ohio state university, the ohio state university",
        "Ontario Institute for Cancer Research": (
            "ontario institute for cancer research, ontario institute for cancer research oicr, "
            "ontario institute for cancer research oicr ottawa"
        ),
        "Roswell Park": "roswell park, roswell",
        "St. Joseph's Hospital (AZ)": "st joseph s hospital az, st joseph s hospital arizona",
        "Thoraxklinik at University Hospital Heidelberg": "thoraxklinik at university hospital heidelberg, thoraxklinik",
        "Translational Genomics Research Institute": "translational genomics research institute, tgen",
        "University Health Network, Toronto": "university health network toronto, university health network",
        "University of Alabama": "university of alabama, washington university alabama",
        "University of California San Francisco": "university of california san francisco, ucsf",
        "University of Chicago": "university of chicago, bln university of chicago",
        "University of Colorado Denver": "university of colorado denver, st university of colorado denver",
        "University of Hawaii": "university of hawaii, university of hawaii normal study",
        "University of Kansas": "university of kansas, university of kansas medical center",
        "University of Miami": "university of miami, bln university of miami",
        "University of Michigan": "university of michigan, michigan university",
        "University of North Carolina": "university of north carolina, unc",
        "Vanderbilt University": "vanderbilt university, vanderbilt",
        "Washington University": "washington university, washington university st louis",
        "Yale University": "yale university, yale",
    }.items()
    for plain in others.split(", ")
}
# Study, as the GDC's table names it, in lower case -> the project's abbreviation.
PROJECTS = {
    "acute myeloid leukemia": "LAML", "adrenocortical carcinoma": "ACC", "bladder urothelial carcinoma": "BLCA",
    "brain lower grade glioma": "LGG", "breast invasive carcinoma": "BRCA",
    "cervical squamous cell carcinoma and endocervical adenocarcinoma": "CESC", "cholangiocarcinoma": "CHOL",
    "colon adenocarcinoma": "COAD", "esophageal carcinoma": "ESCA", "glioblastoma multiforme": "GBM",
    "head and neck squamous cell carcinoma": "HNSC", "kidney chromophobe": "KICH", "kidney renal clear cell carcinoma": "KIRC",
    "kidney renal papillary cell carcinoma": "KIRP", "liver hepatocellular carcinoma": "LIHC", "lung adenocarcinoma": "LUAD",
    "lung squamous cell carcinoma": "LUSC", "lymphoid neoplasm diffuse large b-cell lymphoma": "DLBC", "mesothelioma": "MESO",
    "ovarian serous cystadenocarcinoma": "OV", "pancreatic adenocarcinoma": "PAAD",
    "pheochromocytoma and paraganglioma": "PCPG", "prostate adenocarcinoma": "PRAD", "rectum adenocarcinoma": "READ",
    "sarcoma": "SARC", "skin cutaneous melanoma": "SKCM", "stomach adenocarcinoma": "STAD", "testicular germ cell tumors": "TGCT",
    "thymoma": "THYM", "thyroid carcinoma": "THCA", "uterine carcinosarcoma": "UCS",
    "uterine corpus endometrial carcinoma": "UCEC", "uveal melanoma": "UVM",
}  # fmt: skip
_PATIENT = re.compile(r"TCGA-(?P<code>[A-Z0-9]{2})-[A-Z0-9]{4}(?![A-Z0-9])")
_DIAGNOSTIC = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}-\d{2}[A-Z]-\d{2}-DX[A-Z0-9]*(\.|$)")


@dataclass(frozen=True)
class Case:
    """A patient whose TP53 is known. study: `LUAD`; label: 1 mutant, 0 wild type."""

    study: str
    label: int


def patient_of(barcode: str) -> str:
    """The first three fields of a barcode. Raises DatasetError for a text that is none."""
    match = _PATIENT.match(barcode)
    if match is None:
        raise DatasetError(f"{barcode!r} is no TCGA barcode: expected TCGA-<site>-<patient> and more, correct it")
    return match[0]


def is_diagnostic(slide_id: str) -> bool:
    """Whether a slide id is that of a diagnostic slide (`-DX1`); frozen ones (`-TS1`, `-BS1`) are not."""
    return _DIAGNOSTIC.match(slide_id) is not None


def hospital_of(patient: str, hospitals: Mapping[str, str]) -> str:
    """The hospital of a patient. Raises DatasetError for a code that the table lacks."""
    code = patient.split("-")[1]
    if code not in hospitals:
        raise DatasetError(
            f"{HOSPITALS} lacks the source-site code {code!r} of {patient}: expected every code, fetch it again from the GDC"
        )
    return hospitals[code]


def read_hospitals(path: Path) -> dict[str, str]:
    """Source-site code -> the hospital's name. One hospital owns several codes, one for each study, so the name is the site; of
    the several spellings of a name one is kept. Codes that no barcode can hold (`LUSC`) are passed over.

    Raises DatasetError: no such file, a column is missing, a code that a spreadsheet shortened, two names for one code.
    """
    found: dict[str, str] = {}
    kept: dict[str, str] = {}
    for row in _tsv(path, HOSPITAL_COLUMNS):
        code, told = row["TSS Code"].strip(), " ".join(row["Source Site"].split())
        if len(code) < 2 or not told:
            raise DatasetError(
                f"{path}: the code {code!r} with the name {told!r}: expected two characters and a name, fetch the table again "
                "(spreadsheets drop leading zeros)"
            )
        if len(code) > 2:
            continue
        plain = plain_hospital(told)
        name = kept.setdefault(plain, ONE_HOSPITAL.get(plain, told))
        if found.setdefault(code, name) != name:
            raise DatasetError(
                f"{path}: the code {code} is both {found[code]!r} and {name!r}: expected one hospital, fetch it again"
            )
    return found


def read_projects(path: Path) -> dict[str, str]:
    """Source-site code -> the project, `TCGA-LUAD`, by the study that the GDC's table names; codes of no project are absent.

    Raises DatasetError: no such file, or a column is missing.
    """
    rows = _tsv(path, ("TSS Code", "Study Name"))
    studies = {row["TSS Code"].strip(): " ".join(row["Study Name"].split()).lower() for row in rows}
    return {code: f"TCGA-{PROJECTS[study]}" for code, study in studies.items() if study in PROJECTS}


def plain_hospital(name: str) -> str:
    """A name without capitals and punctuation: `St. Joseph's Medical Center-(MD)` and `St Joseph's Medical Center (MD)` agree."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def tp53_labels(variants: Iterable[Mapping[str, str]], sequenced: Iterable[str]) -> dict[str, int]:
    """Patient -> 1 with at least one TP53 variant of NON_SILENT, else 0 where a sample of the patient was sequenced.

    variants: rows with VARIANT_COLUMNS. sequenced: sample barcodes. Patients that are in neither are left out.
    Raises DatasetError for a barcode that is none, or a class of variant that is not known.
    """
    labels = {patient_of(sample): 0 for sample in sequenced}
    for row in variants:
        if row["Hugo_Symbol"] != "TP53":
            continue
        kind = row["Variant_Classification"]
        if kind not in NON_SILENT | SILENT:
            raise DatasetError(
                f"a TP53 variant of the class {kind!r}: expected a Variant_Classification of the MAF format, fetch it again"
            )
        if kind in NON_SILENT:
            labels[patient_of(row["Tumor_Sample_Barcode"])] = 1
    return labels


def read_cases(root: Path) -> dict[str, Case]:
    """Patient -> case, over the studies `<study>_tcga_pan_can_atlas_2018` below `root`.

    Raises DatasetError: no study, a file or column is missing, a patient in two studies.
    """
    folders = sorted(path for path in root.glob(f"*{STUDIES}") if path.is_dir())
    if not folders:
        raise DatasetError(
            f"{root} holds no study: expected folders <study>{STUDIES} with {MUTATIONS} and {SEQUENCED}, unpack them there"
        )
    cases: dict[str, Case] = {}
    for folder in folders:
        study = folder.name.removesuffix(STUDIES).upper()
        for patient, label in tp53_labels(_tsv(folder / MUTATIONS, VARIANT_COLUMNS), read_sequenced(folder / SEQUENCED)).items():
            if patient in cases:
                raise DatasetError(
                    f"{patient} stands in {cases[patient].study} and {study}: expected one study a patient, remove one"
                )
            cases[patient] = Case(study, label)
    return cases


def read_sequenced(path: Path) -> list[str]:
    """The sample barcodes of a case list: the line `case_list_ids:`, tab-separated. Raises DatasetError."""
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "case_list_ids" and value.split():
            return value.split()
    raise DatasetError(
        f"{path} has no line `case_list_ids:` with samples: expected a case list as cBioPortal packs it, fetch it again"
    )


def check_pinned(root: Path, tables: Sequence[str]) -> dict[str, str]:
    """Table -> sha256, as `SHA256SUMS` in `root` has it (the form that sha256sum writes and checks).

    Raises DatasetError: no such file, a table that it does not list, or one whose bytes differ.
    """
    listed: dict[str, str] = {}
    if (root / PINNED).is_file():
        for line in _text(root / PINNED).splitlines():
            digest, _, name = line.partition(" ")
            listed[name.lstrip(" *").removeprefix("./")] = digest.lower()
    found = {}
    for table in tables:
        content(root / table)
        found[table] = hashlib.sha256((root / table).read_bytes()).hexdigest()
        if listed.get(table) != found[table]:
            problem = f"pins {table} at {listed[table][:12]}…" if table in listed else f"does not pin {table}"
            raise DatasetError(
                f"{root / PINNED} {problem}: expected {found[table][:12]}…, restore the file, or write the sums of the tables "
                "that "
                f"you mean with `sha256sum`"
            )
    return found


def hospital_folds(hospitals: Sequence[str], strata: Sequence[str], count: int) -> np.ndarray:
    """A fold in range(count) for every patient: hospitals whole, strata (study and label) as even as that allows; int64 [n].

    Hospitals from the largest to the smallest, each to the fold where the squared shares of the strata grow least; no chance in
    it. Raises DatasetError when there are fewer hospitals than folds.
    """
    names, hospital = np.unique(np.asarray(hospitals), return_inverse=True)
    if len(names) < count:
        raise DatasetError(f"{len(names)} hospitals cannot fill {count} folds: expected one for each at least, index more slides")
    _, stratum = np.unique(np.asarray(strata), return_inverse=True)
    counts = np.zeros((len(names), stratum.max() + 1))
    np.add.at(counts, (hospital, stratum), 1)
    counts /= counts.sum(axis=0)
    held, fold = np.zeros((count, counts.shape[1])), np.zeros(len(names), np.int64)
    sizes = np.bincount(hospital)
    for place in sorted(range(len(names)), key=lambda i: (-sizes[i], names[i])):
        fold[place] = int(((2 * held + counts[place]) * counts[place]).sum(axis=1).argmin())
        held[fold[place]] += counts[place]
    empty = np.setdiff1d(np.arange(count), fold)
    if len(empty):
        raise DatasetError(
            f"{len(names)} hospitals leave {len(empty)} of {count} folds empty: expected more hospitals, index more slides"
        )
    return fold[hospital]


def _tsv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a tab-separated table, lines of `#` before its header left out."""
    lines = [line for line in _text(path).splitlines() if line and not line.startswith("#")]
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = sorted(set(columns) - set(rows.fieldnames or ()))
    if missing:
        raise DatasetError(f"{path} lacks the columns {', '.join(missing)}: expected {', '.join(columns)}, fetch it again")
    found = []
    for row in rows:
        if any(row[name] is None for name in columns):
            raise DatasetError(f"{path} has a row of fewer cells than its header: expected a whole table, fetch it again")
        found.append({name: row[name] for name in columns})
    return found


def _text(path: Path) -> str:
    if not path.is_file():
        raise DatasetError(f"{path} is missing: expected the public table of that name, put it there")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is no UTF-8 text ({error}): expected a plain table, fetch it again") from error
