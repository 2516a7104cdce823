"""MoNuSAC 2020: nuclei of four organs from TCGA with a type each, outlined in XML.

    <data_root>/MoNuSAC_images_and_annotations/<TCGA slide>/<TCGA slide>_<k>.{tif,xml}
    <data_root>/MoNuSAC Testing Data and Annotations/<TCGA slide>/…

The first three fields of a slide's barcode are its patient.
"""

import re
from pathlib import Path

import numpy as np

from histoscale.data.fingerprint import contents
from histoscale.eval.datasets.masks import (
    MASK_ROLES,
    LabelledMasks,
    check_counts,
    check_public,
    folder_of,
    image_shape,
    inside,
    rgb,
)
from histoscale.eval.datasets.patches import DatasetError, check_roles, hash_of
from histoscale.eval.datasets.polygons import paint, read_polygons
from histoscale.eval.datasets.public import PublicConfig

CLASSES = ("background", "epithelial", "lymphocyte", "neutrophil", "macrophage")
AMBIGUOUS = 5  # zones of the test part with fuzzy borders; as in eva, every unknown name is one
LABELS = {"Epithelial": 1, "Lymphocyte": 2, "Neutrophil": 3, "Macrophage": 4}
OFFICIAL = {"train": 209, "report": 85}
MPP = 0.25
PARTS = ("MoNuSAC_images_and_annotations", "MoNuSAC Testing Data and Annotations")

_BARCODE = re.compile(r"(TCGA-[0-9A-Z]{2}-[0-9A-Z]{4})-.+")  # project, source site, participant: the patient


def open_monusac(root: Path, config: PublicConfig) -> LabelledMasks:
    """The images under `root`, sorted by slide and number in each part. Later outlines cover earlier ones, as in eva.

    Raises DatasetError: a folder or an XML is missing, counts are not the official ones, a folder is no TCGA slide, a patient
    stands in both parts; on reading, what `read_polygons` refuses.
    """
    check_public(config, MPP)
    images: list[Path] = []
    roles: list[str] = []
    found = {}
    for role, part in zip(MASK_ROLES, PARTS, strict=True):
        folder = folder_of(root, part)
        paths = sorted(folder.glob("*/*.tif"))
        bare = [path for path in paths if not path.with_suffix(".xml").is_file()]
        if bare:
            raise DatasetError(
                f"{folder}: {len(bare)} of {len(paths)} images have no XML beside them ({bare[0].name}), expected one for each: "
                "complete the folder"
            )
        lone = [path for path in sorted(folder.glob("*/*.xml")) if not path.with_suffix(".tif").is_file()]
        if lone:
            raise DatasetError(
                f"{folder}: {len(lone)} outlines have no image that is read beside them ({lone[0].name}), expected one .tif "
                "for each: complete the folder"
            )
        images += paths
        roles += [role] * len(paths)
        found[part] = len(paths)
    notes = check_counts(root, found, dict(zip(found, OFFICIAL.values(), strict=True)), config.counts)
    for path in images:
        inside(root, path)
        inside(root, path.with_suffix(".xml"))
    slides = [path.parent.name for path in images]
    patients = np.array([_patient(path) for path in images])
    role_array = np.array(roles, dtype="<U8")
    check_roles(role_array, patients, "patient")
    shapes = [image_shape(path) for path in images]

    def read(row: int) -> tuple[np.ndarray, np.ndarray]:
        pixels = rgb(images[row])
        mask = np.zeros(pixels.shape[1:], np.int64)
        for name, vertices in read_polygons(images[row].with_suffix(".xml")):
            paint(mask, vertices, LABELS.get(name, AMBIGUOUS))
        return pixels, mask

    files = [file for path in images for file in (path, path.with_suffix(".xml"))]
    names = [path.relative_to(root).as_posix() for path in files]
    return LabelledMasks(
        name="monusac",
        classes=CLASSES,
        ignore=AMBIGUOUS,
        names=np.array([path.stem for path in images]),
        shapes=np.array(shapes, np.int64),
        roles=role_array,
        patients=patients,
        groups="patient",
        blocks=patients,
        slide_ids=np.array(slides),
        mpp=MPP,
        tile_px=None,
        hash=hash_of("monusac", names, contents(files), CLASSES, LABELS, roles),
        read=read,
        notes=notes,
    )


def _patient(path: Path) -> str:
    match = _BARCODE.fullmatch(path.parent.name)
    if match is None:
        raise DatasetError(
            f"{path.parent} is no TCGA slide, expected a folder such as TCGA-5P-A9K0-01Z-00-DX1: rename or remove it"
        )
    return match[1]
