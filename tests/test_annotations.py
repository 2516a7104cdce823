"""Outlines of ASAP and of GeoJSON: the same shapes, holes, areas cut out, and files that are neither."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from histoscale.data.cohort.truth import _asap, _geojson, outlines
from histoscale.data.masks import filled
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
    for name, content in (("a.xml", _asap(rings)), ("a.geojson", json.dumps(_geojson(rings)).encode())):
        (tmp_path / name).write_bytes(content)
        found = read_annotations(tmp_path / name, ["Exclusion"])
        at = points * 2.0 / 0.5  # cells of 2 µm in level-0 px of 0.5 µm
        seen = contains(found.inside, at) & ~contains(found.outside, at)
        np.testing.assert_array_equal(seen[~border], inside[~border])


def drawn(coordinates: str, kind: str = "Polygon") -> str:
    return f'{{"features": [{{"geometry": {{"type": "{kind}", "coordinates": {coordinates}}}}}]}}'


def asap_text(order: object, x: object) -> str:
    """A triangle whose first corner says that."""
    corners = "".join(f'<Coordinate Order="{o}" X="{at}" Y="{o}" />' for o, at in ((order, x), (1, 5), (2, 9)))
    coordinates = f'<Annotation Type="Polygon"><Coordinates>{corners}</Coordinates></Annotation>'
    return f"<ASAP_Annotations><Annotations>{coordinates}</Annotations></ASAP_Annotations>"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.xml", "<ASAP_Annotations><Annotations>", "no ASAP annotation"),
        ("a.xml", "<Annotations/>", "expected ASAP_Annotations"),
        ("a.xml", '<!DOCTYPE x [<!ENTITY e "y">]><ASAP_Annotations>&e;</ASAP_Annotations>', "declares a document type"),
        ("a.xml", "<ASAP_Annotations>" + "<a>" * 40, "nests elements 33 deep"),
        ("a.xml", "<?xml version='1.0' encoding='wtf-8'?><ASAP_Annotations/>", "unknown encoding"),
        ("a.xml", "", "no ASAP annotation"),
        *(
            ("a.xml", asap_text(order, x), "no ASAP annotation")
            for order, x in (("nan", 0), ("1e400", 0), ("x", 0), (0, "nan"), (0, "1e400"), (0, "inf"), (0, ""), (0, "1e12"))
        ),
        ("a.xml", asap_text(0, 0).replace("Order=", "Odrer="), "no ASAP annotation"),
        ("a.geojson", "{", "no GeoJSON of outlines"),
        ("a.geojson", "", "it is empty"),
        ("a.geojson", "[" * 200_000, "nested too deep"),
        ("a.geojson", '{"features":' * 200_000, "nested too deep"),
        ("a.geojson", "5", "no GeoJSON of outlines"),
        ("a.geojson", '{"features": {"geometry": 1}}', "no GeoJSON of outlines"),
        ("a.geojson", drawn("[[[0, 0], [1e400, 0], [1, 1]]]"), "reaches to inf, which is no place on a slide"),
        ("a.geojson", drawn("[[[0, 0], [-Infinity, 0], [1, 1]]]"), "no place on a slide"),
        ("a.geojson", drawn("[[[0, 0], [NaN, 0], [1, 1]]]"), "no place on a slide"),
        ("a.geojson", drawn("[[[0, 0], [1e300, 0], [1, 1]]]"), "reaches to 1e.300, which is no place on a slide"),
        ("a.geojson", drawn(f"[[[0, 0], [{-(2**63)}, 0], [1, 1]]]"), "no place on a slide"),
        ("a.geojson", drawn(f"[[[0, 0], [{10**400}, 0], [1, 1]]]"), "not all are x and y"),
        ("a.geojson", drawn(f"[[[0, 0], [{'9' * 5000}, 0], [1, 1]]]"), "no whole JSON"),
        ("a.geojson", drawn('[["12", "34", "56", "78", "90", "12"]]'), "not all are x and y"),
        ("a.geojson", drawn('[[["1", "2"], ["3", "4"], ["5", "6"]]]'), "not all are x and y"),
        ("a.geojson", drawn("[[[1], [2], [3], [4], [5], [6]]]"), "not all are x and y"),
        ("a.geojson", drawn("[[[[0, 0], [9, 0]], [[9, 9], [0, 9]]]]"), "not all are x and y"),
        ("a.geojson", drawn("[[[0, 0], [1], [1, 1]]]"), "no GeoJSON of outlines"),
        ("a.geojson", drawn("[[[0, 0], null, [1, 1]]]"), "no GeoJSON of outlines"),
        ("a.geojson", drawn("[]"), "a Polygon has no ring"),
        ("a.geojson", drawn("[[]]"), "a ring of 0 points"),
        ("a.geojson", drawn("[[]]", "MultiPolygon"), "a MultiPolygon has no ring"),
        ("a.geojson", drawn("[]", "MultiPolygon"), "a MultiPolygon has no ring"),
        ("a.geojson", drawn("{}"), "no ring"),
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
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_rings_that_cross_themselves_or_stay_open_follow_the_even_odd_rule(tmp_path: Path) -> None:
    """As the masks of data/masks.py, which are filled row by row, on the same outlines."""
    rng = np.random.default_rng(0)
    star = [[50 + 45 * np.sin(4 * np.pi * i / 5), 50 - 45 * np.cos(4 * np.pi * i / 5)] for i in range(5)]
    bow = [[5, 5], [95, 95], [95, 5], [5, 95]]
    shapes = [[star], [bow], [OUTER, HOLE, star], *([rng.uniform(0, 100, (12, 2)).tolist()] * 2 for _ in range(3)),
              *[[rng.uniform(0, 100, (30, 2)).tolist()] for _ in range(5)]]  # fmt: skip
    at = np.stack(np.meshgrid(np.arange(100) + 0.5, np.arange(100) + 0.5), -1).reshape(-1, 2)
    for rings in shapes:
        for closed in (False, True):
            whole = [ring + ring[:1] if closed else ring for ring in rings]
            path = collection(tmp_path / "a.geojson", [{"type": "Polygon", "coordinates": whole}])
            filled_rows = np.zeros((100, 100), bool)
            filled(filled_rows, [np.array(ring, float) for ring in rings])
            np.testing.assert_array_equal(contains(read_annotations(path, []).inside, at).reshape(100, 100), filled_rows)


def test_many_corners_cost_what_they_cross(tmp_path: Path) -> None:
    """Every corner for every point of every tile would be 3e11 steps."""
    angle = np.linspace(0, 2 * np.pi, 200_000, endpoint=False)
    radius = 10_000 + 300 * np.sin(50 * angle)
    ring = np.stack([20_000 + radius * np.cos(angle), 20_000 + radius * np.sin(angle)], 1).round(1)
    path = collection(tmp_path / "a.geojson", [{"type": "Polygon", "coordinates": [ring.tolist()]}])
    tiles = np.stack(np.meshgrid(np.arange(0, 40_000, 256), np.arange(0, 40_000, 256)), -1).reshape(-1, 2)
    begun = time.process_time()
    area = coverage(tiles, 256, read_annotations(path, [])).sum() * 256**2
    assert area == pytest.approx(np.pi * (10_000**2 + 300**2 / 2), rel=1e-3)
    assert time.process_time() - begun < 10
