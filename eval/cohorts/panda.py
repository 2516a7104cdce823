"""PANDA: 10,616 prostate biopsies of two providers with ISUP grades (Bulten et al. 2022, doi 10.1038/s41591-021-01620-2).

`train_images/<id>.tiff` and `train.csv` (image_id, data_provider, isup_grade, gleason_score). With `noisy`, the table that
analokmaus/kaggle-panda-challenge-public gives as train.csv, eva's split stands in the columns `eva` and `eva_small`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from histoscale.eval.cohorts.cohort import Cohort, CohortError, by_name, check_counts, find, read_table

COLUMNS = ("image_id", "data_provider", "isup_grade", "gleason_score")
NOISE = "noise_ratio_10"
PROVIDERS = ("karolinska", "radboud")
GRADES = tuple("012345")
PUBLISHED = {"slides": 10_616}
PUBLISHED_KEPT = {"kept by noise_ratio_10": 9_555}
# kaiko-ai/eva:src/eva/vision/data/datasets/classification/panda.py (Apache-2.0)
EVA_SEED = 42
EVA_SHARES = {"eva": (0.7, 0.15, 0.15), "eva_small": (0.1, 0.05, 0.05)}
PARTS = ("train", "val", "test")
NOTES = (
    "PANDA publishes no patient ids: slides of one patient may stand on both sides of any split, and near-duplicates are known",
    "the two providers grade by different conventions, so a gap between them is not the scanner's alone",
    "eva reports macro accuracy, nearly everyone else quadratic kappa: never compare the two",
)


@dataclass(frozen=True)
class PandaConfig:
    """counts: `published` refuses all but 10,616 slides; `any` takes what is there, and says so. noisy: the table with
    noise_ratio_10, a path in root; null: no columns of eva's split."""

    kind: Literal["panda"]
    counts: str
    noisy: str | None


def read_panda(root: Path, config: PandaConfig) -> Cohort:
    """Columns: isup (0 to 5), gleason, eva and eva_small (train, val, test, or "" where eva leaves the slide out). site: the
    provider.

    Raises CohortError: a table or an image is missing, a grade or provider is unknown, counts are not as published.
    """
    table = read_table(root / (config.noisy or "train.csv"), (*COLUMNS, NOISE) if config.noisy else COLUMNS)
    if not (root / "train_images").is_dir():
        raise CohortError(f"{root} holds no folder train_images: give the folder that PANDA was unpacked into")
    slides = by_name(list(find(root / "train_images", (".tiff", ".tif"))), "the slide")
    labelled = {row["image_id"]: row for row in table}
    for name, row in labelled.items():
        if row["isup_grade"] not in GRADES or row["data_provider"] not in PROVIDERS:
            raise CohortError(
                f"{name} has the ISUP grade {row['isup_grade']!r} of {row['data_provider']!r}: expected 0 to 5 of "
                f"{' or '.join(PROVIDERS)}, get the table again"
            )
    kept = sorted(name for name, row in labelled.items() if _noisy(name, row) != 0) if config.noisy else []
    splits = {
        column: eva_split(kept, [int(labelled[name]["isup_grade"]) for name in kept], shares)
        for column, shares in EVA_SHARES.items()
        if config.noisy
    }
    left_out = {name: "in train_images, but not in the table" for name in slides if name not in labelled}
    left_out |= {name: "in the table, but its image was not found" for name in labelled if name not in slides}
    rows = [
        {
            "slide_id": name,
            "uri": str(slides[name].absolute()),
            "patient_id": "",
            "site": row["data_provider"],
            "cohort": "PANDA",
            "organ": "prostate",
            "stain": "H&E",
            "isup": row["isup_grade"],
            "gleason": row["gleason_score"],
            **{column: parts.get(name, "") for column, parts in splits.items()},
        }
        for name, row in sorted(labelled.items())
        if name in slides
    ]
    found = {"slides": len(rows), **{f"ISUP {grade}": sum(row["isup"] == grade for row in rows) for grade in GRADES}}
    if config.noisy:
        found["kept by noise_ratio_10"] = len(kept)
    notes = check_counts("PANDA", config.counts, PUBLISHED | (PUBLISHED_KEPT if config.noisy else {}), found)
    odd = [row["slide_id"] for row in rows if row["gleason"] == "4+3" and row["isup"] != "3"]
    if odd:
        notes += (f"the grades of {', '.join(odd)} contradict each other (4+3 is ISUP 3): as published",)
    return Cohort("PANDA", tuple(rows), tuple(splits), found, left_out, NOTES + notes)


def eva_split(ids: Sequence[str], classes: Sequence[int], shares: tuple[float, float, float]) -> dict[str, str]:
    """Id -> train, val or test, as eva deals sorted ids out: class by class one generator shuffles the places, which are cut at
    the floors of the shares; what is left is test where the shares add up to 1, and in no part where they do not."""
    generator = np.random.default_rng(EVA_SEED)
    of_class = np.asarray(classes)
    found: dict[str, str] = {}
    for one in np.unique(of_class):
        places = np.flatnonzero(of_class == one)
        generator.shuffle(places)
        sizes = [math.floor(share * len(places)) or 1 for share in shares]
        if sum(shares) == 1:
            sizes[2] = len(places) - sizes[0] - sizes[1]
        for part, end, size in zip(PARTS, np.cumsum(sizes).tolist(), sizes, strict=True):
            found |= {ids[place]: part for place in places[end - size : end].tolist()}
    return found


def _noisy(name: str, row: dict[str, str]) -> float:
    try:
        return float(row[NOISE])
    except ValueError as error:
        raise CohortError(f"{name} has the {NOISE} {row[NOISE]!r}: expected a number, get the table again") from error
