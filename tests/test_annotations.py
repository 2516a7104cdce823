"""Outlines of ASAP and of GeoJSON: the same shapes, holes, areas cut out, and files that are neither."""

import json
from pathlib import Path

import numpy as np
import pytest

from histoscale.data.cohort.truth import _asap, _geojson, outlines
from histoscale.eval.annotations import AnnotationError, contains, coverage, read_annotations

OUTER = [[0, 0], [150, 0], [150, 200], [0, 200]]
HOLE = [[0, 0], [100, 0], [100, 100], [0, 100]]
COORDS = np.array([[0, 0], [100, 0], [0, 100], [300, 300]])


def asap(path: Path, annotations: list[tuple[str, str, list[list[float]]]], head: str = "") -> Path:
    """Annotations (type, group, points) as ASAP writes them, their points out of order."""
    parts = []
    for kind, group, points in annotations:
        numbered = list(enumerate(points))[::-1]
        text = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in numbered)
        parts.append(
            f'<Annotation Name="Annotation 0" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58">'
            f"<Coordinates>{text}</Coordinates></Annotation>"
        )
    groups = '<AnnotationGroups><Group Name="Tumor" PartOfGroup="None" Color="#64FE2E"><Attributes /></Group></AnnotationGroups>'
    body = "".join(parts)
    path.write_text(f'<?xml version="1.0"?>{head}<ASAP_Annotations><Annotations>{body}</Annotations>{groups}</ASAP_Annotations>')
    return path


def collection(path: Path, shapes: list[dict], group: str = "tumour") -> Path:
    properties = {"objectType": "annotation", "classification": {"name": group, "color": [200, 0, 0]}}
    features = [{"type": "Feature", "geometry": shape, "properties": properties} for shape in shapes]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_holes_and_excluded_groups_are_outside(tmp_path: Path) -> None:
    expected = [0, 0.5, 1, 0]
    drawn = asap(tmp_path / "a.xml", [("Polygon", "Tumor", OUTER), ("Polygon", "Exclusion", HOLE)])
    np.testing.assert_allclose(coverage(COORDS, 100, read_annotations(drawn, ["Exclusion"])), expected)
    holes = collection(tmp_path / "a.geojson", [{"type": "Polygon", "coordinates": [OUTER + OUTER[:1], HOLE + HOLE[:1]]}])
    np.testing.assert_allclose(coverage(COORDS, 100, read_annotations(holes, [])), expected)
    last = [[300, 300], [400, 300], [400, 400], [300, 400]]
    multi = collection(tmp_path / "m.geojson", [{"type": "MultiPolygon", "coordinates": [[OUTER, HOLE], [last]]}])
    np.testing.assert_allclose(coverage(COORDS, 100, read_annotations(multi, [])), [0, 0.5, 1, 1])


def test_outlines_that_overlap_are_one_area(tmp_path: Path) -> None:
    """Even-odd over all rings, as one might do, would cut the overlap out."""
    drawn = asap(tmp_path / "a.xml", [("Polygon", "_0", OUTER), ("Spline", "_1", HOLE), ("Rectangle", "_2", HOLE)])
    np.testing.assert_allclose(coverage(COORDS, 100, read_annotations(drawn, [])), [1, 0.5, 1, 0])
    np.testing.assert_allclose(coverage(COORDS, 100, read_annotations(drawn, ["_2"])), [0, 0.5, 1, 0])


def test_points_and_lines_have_no_area(tmp_path: Path) -> None:
    drawn = asap(tmp_path / "a.xml", [("Dot", "Tumor", [[5, 5]]), ("PointSet", "Tumor", [[5, 5], [6, 6]])])
    shapes = [{"type": "Point", "coordinates": [5, 5]}, {"type": "LineString", "coordinates": [[0, 0], [5, 5]]}]
    for path in (drawn, collection(tmp_path / "p.geojson", shapes)):
        found = read_annotations(path, [])
        assert not found.inside and not coverage(COORDS, 100, found).any()


def test_lists_single_features_and_missing_classes_are_read(tmp_path: Path) -> None:
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [OUTER]}, "properties": None}
    for number, content in enumerate((feature, [feature])):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        (polygon,) = read_annotations(path, ["tumour"]).inside
        assert polygon.group == "" and polygon.rings[0].shape == (4, 2)


def test_the_cohorts_two_files_say_the_same(tmp_path: Path) -> None:
    """A mask with a hole and two parts, through both writers of the synthetic cohort, against the mask itself."""
    mask = np.zeros((60, 80), bool)
    mask[10:40, 10:50] = True
    mask[20:30, 20:30] = False
    mask[45:55, 60:75] = True
    rings = outlines(mask, 0.5)
    rng = np.random.default_rng(0)
    points = rng.uniform(0, [80, 60], (4000, 2))
    inside = mask[points[:, 1].astype(int), points[:, 0].astype(int)]
    border = np.abs(points[:, :, None] - np.array([10, 20, 30, 40, 45, 50, 55, 60, 75])).min((1, 2)) < 0.6
    for name, content in (("a.xml", _asap(rings)), ("a.geojson", _geojson(rings).encode())):
        (tmp_path / name).write_bytes(content)
        found = read_annotations(tmp_path / name, ["Exclusion"])
        at = points * 2.0 / 0.5  # cells of 2 µm in level-0 px of 0.5 µm
        seen = contains(found.inside, at) & ~contains(found.outside, at)
        np.testing.assert_array_equal(seen[~border], inside[~border])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.xml", "<ASAP_Annotations><Annotations>", "no ASAP annotation"),
        ("a.xml", "<Annotations/>", "expected ASAP_Annotations"),
        ("a.xml", '<!DOCTYPE x [<!ENTITY e "y">]><ASAP_Annotations>&e;</ASAP_Annotations>', "declares a document type"),
        ("a.geojson", "{", "no GeoJSON of outlines"),
        ("a.geojson", '{"features": [{"geometry": {"type": "Circle", "coordinates": []}}]}', "a geometry is a Circle"),
        ("a.geojson", '{"features": [{"geometry": null}]}', "no GeoJSON of outlines"),
        (
            "a.geojson",
            '{"features": [{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}}]}',
            "a ring of 2 points",
        ),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(AnnotationError, match=words) as error:
        read_annotations(path, [])
    assert str(path) in str(error.value)
