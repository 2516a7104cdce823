"""Camelyon17: 100 patients of five centres with five lymph nodes each, staged (Bandi et al. 2019, doi 10.1109/TMI.2018.2867350).

`patient_XXX_node_Y.tif` anywhere below the folder, `stage_labels.csv` (or `stages.csv`; columns `patient` and `stage`, a row for
each node and one for each patient), and lesions as XML of ASAP for 50 slides.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from histoscale.eval.cohorts.cohort import Cohort, CohortError, by_name, check_counts, find, one_file, read_table

PUBLISHED = {"labelled nodes": 500, "labelled patients": 100}
STAGES = ("negative", "itc", "micro", "macro")
PATIENT_STAGES = ("pN0", "pN0(i+)", "pN1mi", "pN1", "pN2")
PATIENTS_OF_CENTRE = 20  # patients 0 to 19 are of centre 0, and so on; of the challenge's test patients this is not published
TRAINING_PATIENTS = 100
NOTES = (
    "itc (isolated tumour cells) are tumour, but do not make a node positive in pN staging: the task says what counts",
    "isolated tumour cells are not outlined exhaustively, so a tile outside every lesion may still hold tumour",
    "two of the five centres are those of Camelyon16",
)
_NODE = re.compile(r"patient_(?P<patient>\d{3})_node_(?P<node>\d)")
_PATIENT = re.compile(r"patient_\d{3}")
_CENTRE = re.compile(r"cent(?:er|re)_(\d)")


@dataclass(frozen=True)
class Camelyon17Config:
    """counts: `published` refuses all but 500 labelled nodes; `any` takes what is there, and says so."""

    kind: Literal["camelyon17"]
    counts: str


def read_camelyon17(root: Path, config: Camelyon17Config) -> Cohort:
    """Columns: stage (negative, itc, micro, macro), pn_stage (of the patient), annotations (the lesions' XML). site: the centre.

    Raises CohortError: the table has another form, a stage is unknown, a slide lies in the folder of another centre, or counts
    are not as published.
    """
    slides = by_name([path for path in find(root, (".tif", ".tiff")) if _NODE.fullmatch(path.stem)], "the slide")
    lesions = by_name([path for path in find(root, (".xml",)) if _NODE.fullmatch(path.stem)], "the lesions")
    nodes, patients = read_stages(one_file(root, ("stage_labels.csv", "stages.csv")))
    left_out = {name: "in the table, but its slide was not found" for name in nodes if name not in slides}
    rows = []
    for name, path in sorted(slides.items()):
        match = _NODE.fullmatch(name)
        assert match is not None
        patient = f"patient_{match['patient']}"
        rows.append(
            {
                "slide_id": name,
                "uri": str(path.absolute()),
                "patient_id": patient,
                "site": _site(path, root, int(match["patient"])),
                "cohort": "CAMELYON17",
                "organ": "lymph node",
                "stain": "H&E",
                "stage": nodes.get(name, ""),
                "pn_stage": patients.get(patient, ""),
                "annotations": str(lesions[name].absolute()) if name in lesions else "",
            }
        )
    labelled = [row for row in rows if row["stage"]]
    found = {
        "labelled nodes": len(labelled),
        "labelled patients": len({row["patient_id"] for row in labelled}),
        **{f"nodes {stage}": sum(row["stage"] == stage for row in rows) for stage in STAGES},
        "with lesions": sum(bool(row["annotations"]) for row in rows),
    }
    notes = check_counts("Camelyon17", config.counts, PUBLISHED, found)
    return Cohort("Camelyon17", tuple(rows), (), found, left_out, NOTES + notes)


def read_stages(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(node -> its stage, patient -> pN stage). Raises CohortError for a row that is neither, or a stage that is unknown."""
    nodes: dict[str, str] = {}
    patients: dict[str, str] = {}
    for row in read_table(path, ("patient", "stage")):
        name, stage = row["patient"].removesuffix(".tif").removesuffix(".zip"), row["stage"]
        if not stage:
            continue
        if _NODE.fullmatch(name) and stage.lower() in STAGES:
            nodes[name] = stage.lower()
        elif _PATIENT.fullmatch(name) and stage in PATIENT_STAGES:
            patients[name] = stage
        else:
            raise CohortError(
                f"{path}: {row['patient']} has the stage {stage!r}: expected patient_XXX_node_Y.tif with one of "
                f"{', '.join(STAGES)}, or patient_XXX.zip with one of {', '.join(PATIENT_STAGES)}"
            )
    return nodes, patients


def _site(path: Path, root: Path, patient: int) -> str:
    """By the patient's number, or by the folder of a centre where there is one."""
    told = [match[1] for part in path.relative_to(root).parts for match in [_CENTRE.fullmatch(part)] if match]
    if patient >= TRAINING_PATIENTS:
        return f"center_{told[0]}" if told else ""
    centre = patient // PATIENTS_OF_CENTRE
    if told and int(told[0]) != centre:
        raise CohortError(f"{path} lies in the folder of centre {told[0]}: patient {patient} is of centre {centre}, move it")
    return f"center_{centre}"
