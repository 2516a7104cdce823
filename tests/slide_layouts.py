"""Public cohorts of slides in their exact layouts: names, tables and headers as published, next to no pixels."""

import csv
import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import tifffile

from histoscale.eval.datasets import tcga

RUMC_MPP, UMCU_MPP = 0.243, 0.227
# Test slides with tumour, as testing/reference.csv has them.
C16_TEST_TUMOR = (
    1, 2, 4, 8, 10, 11, 13, 16, 21, 26, 27, 29, 30, 33, 38, 40, 46, 48, 51, 52, 61, 64, 65, 66, 68, 69, 71, 73, 74, 75, 79, 82,
    84, 90, 92, 94, 97, 99, 102, 104, 105, 108, 110, 113, 114, 116, 117, 121, 122,
)  # fmt: skip
ASAP = """<?xml version="1.0"?>
<ASAP_Annotations><Annotations><Annotation Name="Annotation 0" Type="Polygon" PartOfGroup="Tumor" Color="#F4FA58"><Coordinates>
<Coordinate Order="0" X="8" Y="8"/><Coordinate Order="1" X="24" Y="8"/><Coordinate Order="2" X="24" Y="24"/>
</Coordinates></Annotation></Annotations></ASAP_Annotations>
"""


@cache
def tiny_slide(mpp: float) -> bytes:
    """One tiled level of 32 px with its pixel size in the header."""
    file = io.BytesIO()
    pixels = np.full((32, 32, 3), 200, np.uint8)
    tifffile.imwrite(
        file, pixels, tile=(16, 16), photometric="rgb", compression="deflate", resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit=3
    )
    return file.getvalue()


def write_slide_file(path: Path, mpp: float = 0.25) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny_slide(mpp))


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_camelyon16(root: Path) -> Path:
    """All 399 slides, in the archive's folders; sites of test slides by the pixel size of their headers."""
    for number in range(1, 161):
        if number != 86:
            write_slide_file(root / f"training/normal/normal_{number:03d}.tif", RUMC_MPP if number <= 100 else UMCU_MPP)
    for number in range(1, 112):
        write_slide_file(root / f"training/tumor/tumor_{number:03d}.tif", RUMC_MPP if number <= 70 or number == 111 else UMCU_MPP)
        _write_text(root / f"training/lesion_annotations/tumor_{number:03d}.xml", ASAP)
    lines = []
    for number in range(1, 131):
        if number == 49:
            continue
        tumor = number in C16_TEST_TUMOR
        write_slide_file(root / f"testing/images/test_{number:03d}.tif", RUMC_MPP if number % 5 < 3 else UMCU_MPP)
        lines.append(f"test_{number:03d},{'Tumor,IDC,' + ('Macro', 'Micro')[number % 2] if tumor else 'Normal,DCIS,None'}")
        if tumor:
            _write_text(root / f"testing/lesion_annotations/test_{number:03d}.xml", ASAP)
    _write_text(root / "testing/reference.csv", "\n".join(lines) + "\n")
    return root


def write_camelyon17(root: Path, patients: int = 100) -> Path:
    rows: list[dict[str, object]] = []
    for patient in range(patients):
        name, centre = f"patient_{patient:03d}", patient // 20
        stages = [("negative", "itc", "micro", "macro")[(patient + node) * (patient % 2) % 4] for node in range(5)]
        rows.append({"patient": f"{name}.zip", "stage": "pN0" if patient % 2 == 0 else "pN1"})
        for node, stage in enumerate(stages):
            rows.append({"patient": f"{name}_node_{node}.tif", "stage": stage})
            write_slide_file(root / f"training/center_{centre}/{name}/{name}_node_{node}.tif")
            if patient % 20 < 10 and node == 4:
                _write_text(root / f"training/lesion_annotations/{name}_node_{node}.xml", ASAP)
    write_rows(root / "training/stage_labels.csv", rows)
    return root


def write_panda(root: Path, slides: int, noisy: bool) -> Path:
    rng = np.random.default_rng(3)
    rows: list[dict[str, object]] = []
    gleason = ("0+0", "3+3", "3+4", "4+3", "4+4", "5+5")
    for i in range(slides):
        name, grade = f"{int(rng.integers(0, 1 << 62)):032x}", int(rng.integers(0, 6))
        provider = ("karolinska", "radboud")[i % 2]
        write_slide_file(root / f"train_images/{name}.tiff", 0.4862)
        rows.append({"image_id": name, "data_provider": provider, "isup_grade": grade, "gleason_score": gleason[grade]})
        if noisy:
            rows[-1][NOISE] = int(rng.uniform() > 0.1)
    write_rows(root / "train.csv", [{k: v for k, v in row.items() if k != NOISE} for row in rows])
    if noisy:
        write_rows(root / "train_with_noisy_labels.csv", [{"": i, **row} for i, row in enumerate(rows)])
    return root


NOISE = "noise_ratio_10"


def write_tcga(root: Path, slides: Mapping[str, str], table: Sequence[tuple[str, str, str]]) -> Path:
    """slides: file name -> the folder's name, as gdc-client makes them. table: code, hospital, study."""
    for name, folder in slides.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).touch()
    lines = ["TSS Code\tSource Site\tStudy Name\tBCR", *["\t".join((*row, "NCH")) for row in table]]
    (root / tcga.HOSPITALS).write_text("\n".join([*lines, "LUSC\tUnknown\tLung squamous cell carcinoma\tUnknown"]) + "\n")
    return root


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
