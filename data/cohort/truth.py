"""What is known about a slide because it was made: masks, the nuclei table, outlines of the foci."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import contourpy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from histoscale.data.cohort import morphology as m
from histoscale.data.cohort.nuclei import Nuclei
from histoscale.data.cohort.slide import VirtualSlide
from histoscale.data.cohort.tissue import MAP_UM
from histoscale.data.journal import write_json

Array = np.ndarray


def write_truth(folder: Path, slide: VirtualSlide) -> None:
    """Write classes.png and artefacts.png (codes and bits at MAP_UM), nuclei.parquet (um), foci.geojson and foci.xml
    (level-0 px)."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(slide.tissue.classes).save(folder / "classes.png", compress_level=6)
    Image.fromarray(slide.artefacts.mask).save(folder / "artefacts.png", compress_level=6)
    pq.write_table(nuclei_table(slide.tissue.nuclei), folder / "nuclei.parquet")
    rings = outlines(slide.tissue.classes == m.TUMOUR, slide.mpp)
    write_json(folder / "foci.geojson", _geojson(rings), compact=True)
    (folder / "foci.xml").write_bytes(_asap(rings))


def nuclei_table(nuclei: Nuclei) -> pa.Table:
    """Columns x, y, a, b (um), kind (class name), theta (radians), nucleolus (bool)."""
    names = pa.array(m.CLASSES)
    table = {name: getattr(nuclei, name).astype(np.float32) for name in ("x", "y", "a", "b", "theta")}
    kind = pa.DictionaryArray.from_arrays(nuclei.kind.astype(np.int8), names)
    return pa.table({**table, "kind": kind, "nucleolus": nuclei.nucleolus})


def outlines(mask: Array, mpp: float) -> list[Array]:
    """Closed outer and inner rings of a mask at MAP_UM, each float64 [n, 2] (x, y) in level-0 px, outer ones before their
    holes."""
    padded = np.pad(mask.astype(np.float32), 1)
    found: Any = contourpy.contour_generator(z=padded, fill_type="OuterOffset").filled(0.5, 2.0)
    rings = []
    for points, cuts in zip(found[0], found[1], strict=True):
        xy = (np.asarray(points) - 0.5) * MAP_UM / mpp  # padding shifts by one cell; a cell's value stands at its middle
        rings += [xy[start:stop] for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
    return rings


def _area(ring: Array) -> float:
    x, y = ring.T
    return float(0.5 * np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))


def _geojson(rings: list[Array]) -> dict[str, Any]:
    """QuPath's annotations: a polygon with its holes each."""
    features: list[dict] = []
    for ring in rings:
        coordinates = np.round(ring, 1).tolist()
        if features and _area(ring) * features[-1]["sign"] < 0:
            features[-1]["geometry"]["coordinates"].append(coordinates)
        else:
            features.append({
                "type": "Feature", "geometry": {"type": "Polygon", "coordinates": [coordinates]}, "sign": np.sign(_area(ring)),
                "properties": {"objectType": "annotation", "classification": {"name": "tumour", "color": [200, 0, 0]}},
            })
    for feature in features:
        del feature["sign"]
    return {"type": "FeatureCollection", "features": features}


def _asap(rings: list[Array]) -> bytes:
    """ASAP's annotations as Camelyon uses them: group Tumor, and Exclusion for holes."""
    root = ElementTree.Element("ASAP_Annotations")
    annotations = ElementTree.SubElement(root, "Annotations")
    outer = 0.0
    for i, ring in enumerate(rings):
        hole = outer * _area(ring) < 0
        outer = outer if hole else _area(ring)
        group = "Exclusion" if hole else "Tumor"
        named = {"Name": f"Annotation {i}", "Type": "Polygon", "PartOfGroup": group, "Color": "#F4FA58"}
        annotation = ElementTree.SubElement(annotations, "Annotation", named)
        coordinates = ElementTree.SubElement(annotation, "Coordinates")
        for order, (x, y) in enumerate(ring[:-1]):
            ElementTree.SubElement(coordinates, "Coordinate", Order=str(order), X=f"{x:.1f}", Y=f"{y:.1f}")
    groups = ElementTree.SubElement(root, "AnnotationGroups")
    for name in ("Tumor", "Exclusion"):
        ElementTree.SubElement(groups, "Group", Name=name, PartOfGroup="None", Color="#64FE2E")
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
