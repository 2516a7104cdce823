"""Drawn tissue masks: polygons and PNGs against independent rasters, into the catalog, and what is refused."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import matplotlib.path
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from histoscale.data.catalog import Catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import ManifestError, read_manifest
from histoscale.data.masks import MaskError, drawn_mask, filled
from histoscale.data.storage import Store
from histoscale.data.tissue import TissueConfig

Build = Callable[[list[str]], Catalog]
MakeSlide = Callable[..., Path]


def shoelace(ring: np.ndarray) -> float:
    x, y = ring.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def star(centre: tuple[float, float], radii: np.ndarray) -> np.ndarray:
    """A polygon without crossings: corners at rising angles around a centre."""
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    return np.array(centre) + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def raster(polygon: list[np.ndarray], shape: tuple[int, int] = (120, 150)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    filled(mask, polygon)
    return mask


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(3, 90), min_size=3, max_size=12), st.floats(-20, 170), st.floats(-20, 140))
def test_a_polygon_is_the_pixels_whose_centre_lies_in_it(radii: list[float], x: float, y: float) -> None:
    """Against matplotlib's point-in-polygon test; centres within a thousandth of an edge may fall to either side."""
    ring = star((x, y), np.array(radii))
    rows, columns = np.mgrid[0:120, 0:150]
    centres = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], 1)
    path = matplotlib.path.Path(np.vstack([ring, ring[:1]]), closed=True)
    inner, outer = (path.contains_points(centres, radius=radius).reshape(120, 150) for radius in (-1e-3, 1e-3))
    sure = inner == outer
    assert (raster([ring])[sure] == inner[sure]).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(20, 50), min_size=5, max_size=40), st.floats(0.2, 0.8))
def test_its_area_is_the_shoelace_formulas(radii: list[float], share: float) -> None:
    """With a hole of its own shape. Pixels are right within what the outline crosses."""
    outline = star((75, 60), np.array(radii))
    hole = star((75, 60), np.array(radii) * share)
    mask = raster([outline, hole])
    length = sum(np.hypot(*(np.roll(ring, -1, 0) - ring).T).sum() for ring in (outline, hole))
    assert abs(mask.sum() - (shoelace(outline) - shoelace(hole))) <= 0.1 * length + 8
    assert not mask[60, 75] and (raster([outline]) & ~raster([hole]) == mask).all()


def feature(*rings: list[list[float]], kind: str = "Polygon") -> dict[str, Any]:
    held: Any = list(rings) if kind == "Polygon" else [[ring] for ring in rings]
    return {
        "type": "Feature",
        "id": "a1",
        "geometry": {"type": kind, "coordinates": held},
        "properties": {"objectType": "annotation"},
    }


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def write(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value))
    return str(path)


SLIDE, SHAPE, PITCH = (1600, 1200), (75, 100), 16.0


TWO = box(160, 80, 800, 480), box(960, 800, 1120, 1200)
FORMS: dict[str, Any] = {
    "FeatureCollection": {"type": "FeatureCollection", "features": [feature(ring) for ring in TWO]},
    "list of features": [feature(ring) for ring in TWO],
    "MultiPolygon": feature(*TWO, kind="MultiPolygon"),
    "GeometryCollection": {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [r]} for r in TWO]},
    "positions with a height": [feature([[*corner, 0.0] for corner in ring]) for ring in TWO],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_geojson(tmp_path: Path, store: Store, form: str) -> None:
    mask = drawn_mask(write(tmp_path / "m.geojson", FORMS[form]), store, SLIDE, SHAPE, PITCH)
    expected = np.zeros(SHAPE, bool)
    expected[5:30, 10:50] = True
    expected[50:75, 60:70] = True
    assert (mask == expected).all()


def test_holes_islands_and_overlaps(tmp_path: Path, store: Store) -> None:
    """A hole is no tissue, an island in it is, and two overlapping polygons are one."""
    ring = feature(box(160, 160, 1280, 960), box(320, 320, 1120, 800))
    uri = write(tmp_path / "m.json", [ring, feature(box(480, 480, 640, 640)), feature(box(560, 480, 800, 640))])
    mask = drawn_mask(uri, store, SLIDE, SHAPE, PITCH)
    expected = np.zeros(SHAPE, bool)
    expected[10:60, 10:80] = True
    expected[20:50, 20:70] = False
    expected[30:40, 30:50] = True
    assert (mask == expected).all()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", "neither a PNG nor GeoJSON"),
        ("[" * 100_000, "neither a PNG nor GeoJSON"),
        ("\x89PNG", "neither a PNG nor GeoJSON"),
        ("[]", "holds no polygon"),
        ({"type": "FeatureCollection", "features": []}, "no features"),
        ({"type": "Point", "coordinates": [1, 2]}, "holds Point: expected polygons"),
        ({"type": "LineString", "coordinates": [[1, 2], [3, 4]]}, "holds LineString"),
        ({"type": "Feature", "geometry": None}, "holds NoneType"),
        (feature([[0, 0], [100, 100], [0, 0]]), "at least three different"),
        (feature([[0, 0], [100, "a"], [0, 9]]), "no list of positions"),
        (feature([[0, 0], [100], [0, 9]]), "ring of its GeoJSON"),
        ('{"type":"Polygon","coordinates":[[[0,0],[NaN,1],[5,5]]]}', "finite"),
        (feature(box(100, 100, 4000, 500)), "leaves the slide of 1600x1200: expected level-0 pixels"),
        (feature(box(-300, 100, 400, 500)), "leaves the slide"),
        (feature(box(1, 1, 3, 3)), "holds no tissue"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 60 else None,
)
def test_geojson_that_is_no_mask(tmp_path: Path, store: Store, value: Any, words: str) -> None:
    path = tmp_path / "m.geojson"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="latin-1")
    with pytest.raises(MaskError, match=words):
        drawn_mask(str(path), store, SLIDE, SHAPE, PITCH)


def png(path: Path, pixels: np.ndarray, mode: str | None = None) -> str:
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, "PNG")
    return str(path)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16"])
@pytest.mark.parametrize("scale", [1, 4, 0.5], ids=["of the grid", "finer", "coarser"])
def test_a_png_of_any_size_and_kind_covers_the_slide(tmp_path: Path, store: Store, mode: str, scale: float) -> None:
    rows, columns = np.mgrid[0 : int(75 * scale), 0 : int(100 * scale)]
    inside = ((columns + 0.5) / scale - 40) ** 2 + ((rows + 0.5) / scale - 30) ** 2 < 20**2
    level = inside.astype(np.uint8) * 255
    if mode == "I;16":
        uri = png(tmp_path / "m.png", level.astype(np.uint16) * 3)
    else:
        uri = png(tmp_path / "m.png", level, mode)
    mask = drawn_mask(uri, store, SLIDE, SHAPE, PITCH)
    v, u = np.mgrid[0:75, 0:100] + 0.5
    distance = np.hypot(u - 40, v - 30)
    near = 0.8 / min(scale, 1)
    assert mask[distance < 20 - near].all() and not mask[distance > 20 + near].any()


def test_transparent_png_is_no_tissue_and_the_grid_beyond_the_slide_is_none(tmp_path: Path, store: Store) -> None:
    pixels = np.full((60, 80, 4), 255, np.uint8)
    pixels[:, :40, 3] = 0
    uri = png(tmp_path / "m.png", pixels)
    mask = drawn_mask(uri, store, (1590, 1190), (76, 101), 16.0)  # a row and a column of the grid reach over the edge
    assert not mask[:, :49].any() and mask[:74, 51:99].all() and not mask[75:].any() and not mask[:, 100:].any()


def test_a_png_that_is_no_mask(tmp_path: Path, store: Store) -> None:
    white = np.full((75, 100), 255, np.uint8)
    known = {
        "tall": (png(tmp_path / "a.png", white.T.copy()), "has not the aspect"),
        "3 %": (png(tmp_path / "b.png", white[:, :97]), "has not the aspect"),
        "black": (png(tmp_path / "c.png", white * 0), "holds no tissue"),
    }
    (tmp_path / "d.png").write_bytes((tmp_path / "c.png").read_bytes()[:60])
    known["cut"] = str(tmp_path / "d.png"), "cannot be read"
    for uri, words in known.values():
        with pytest.raises(MaskError, match=words):
            drawn_mask(uri, store, SLIDE, SHAPE, PITCH)
    assert drawn_mask(png(tmp_path / "e.png", white[:, :99]), store, SLIDE, SHAPE, PITCH).all()  # 1 % is rounding


# Through the manifest


@pytest.fixture
def build(tmp_path: Path, store: Store, tissue_config: TissueConfig, journal: Journal) -> Build:
    """Catalogs of manifest rows; into the same folder again, from what is known."""
    catalogs: list[Catalog] = []

    def index(rows: list[str]) -> Catalog:
        manifest = tmp_path / "sets" / "manifest.csv"
        manifest.parent.mkdir(exist_ok=True)
        manifest.write_text("\n".join(["slide_id,uri,mask", *rows]) + "\n")
        slides = read_manifest(str(manifest), store)
        previous = catalogs[-1] if catalogs else None
        catalogs.append(build_catalog(slides, store, tissue_config, tmp_path / "catalog", 0, previous, journal))
        return catalogs[-1]

    return index


def test_a_drawn_mask_takes_the_place_of_the_automatic_one(tmp_path: Path, make_slide: MakeSlide, build: Build) -> None:
    """Relative to the manifest; in um like the automatic mask; the slide without one keeps its own."""
    path = make_slide(tmp_path / "a.svs", 1600, 1200)  # 0.5 um/px
    write(tmp_path / "sets_mask.geojson", feature(box(320, 160, 960, 800)))
    catalog = build([f"a,{path},../sets_mask.geojson", f"b,{path},"])
    drawn, own = catalog.mask(0), catalog.mask(1)
    assert drawn.shape == own.shape and catalog.mask_mpp(0) == catalog.mask_mpp(1)
    assert drawn.sum() * catalog.mask_mpp(0) ** 2 == pytest.approx(640 * 640 * 0.25, rel=0.02)
    pitch = catalog.mask_mpp(0) / 0.5
    rows, columns = np.nonzero(drawn)
    assert (rows.min() * pitch, columns.min() * pitch) == (160, 320)
    assert (drawn & ~own).any() and catalog.slides[0].mask_uri == str(tmp_path / "sets_mask.geojson")
    assert "mask" not in catalog.slides[0].labels


def test_a_changed_mask_is_read_again_and_an_equal_one_is_not(
    tmp_path: Path, make_slide: MakeSlide, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mask = make_slide(tmp_path / "a.svs"), tmp_path / "sets" / "a.png"
    mask.parent.mkdir()
    png(mask, np.pad(np.full((45, 55), 255, np.uint8), ((0, 0), (0, 55))).repeat(2, 0))
    first = build([f"a,{path},a.png"])
    opened: list[str] = []
    read = Store.ranges
    monkeypatch.setattr(Store, "ranges", lambda self, uri, spans: opened.append(uri) or read(self, uri, spans))
    again = build([f"a,{path},a.png"])
    assert again.hash == first.hash and str(path) not in opened
    png(mask, np.full((90, 110), 255, np.uint8))
    os.utime(mask, ns=(1, 1))
    changed = build([f"a,{path},a.png"])
    assert str(path) in opened and changed.hash != first.hash and changed.mask(0).mean() > 0.95
    opened.clear()
    without = build([f"a,{path},"])
    assert str(path) in opened and without.mask(0).mean() < 0.6


def test_bad_masks_are_rejected_with_their_reason(tmp_path: Path, make_slide: MakeSlide, build: Build) -> None:
    path = make_slide(tmp_path / "a.svs")
    (tmp_path / "sets").mkdir()
    write(tmp_path / "sets/outside.json", feature(box(0, 0, 90000, 90000)))
    (tmp_path / "sets/text.json").write_text("not json")
    png(tmp_path / "sets/tall.png", np.full((90, 30), 255, np.uint8))
    png(tmp_path / "sets/empty.png", np.zeros((90, 110), np.uint8))
    names = ("outside.json", "text.json", "tall.png", "empty.png", "gone.png")
    catalog = build([f"{name.split('.')[0]},{path},{name}" for name in names] + [f"good,{path},"])
    assert [slide.slide_id for slide in catalog.slides] == ["good"]
    reasons = {found.slide_id: found.reason for found in catalog.rejected}
    assert reasons.pop("gone").startswith("missing: ")
    for name, words in (("outside", "leaves the slide"), ("text", "neither"), ("tall", "aspect"), ("empty", "no tissue")):
        assert reasons[name].startswith("unusable mask: ") and words in reasons[name] and name in reasons[name]


def test_a_mask_with_a_token_is_refused_by_the_manifest(tmp_path: Path, store: Store) -> None:
    (tmp_path / "m.csv").write_text("slide_id,uri,mask\na,a.svs,az://c/m.png?sig=abc\n")
    with pytest.raises(ManifestError, match="has a query string"):
        read_manifest(str(tmp_path / "m.csv"), store)


def test_a_mask_from_a_store(tmp_path: Path, store: Store) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((30, 40), 255, np.uint8)).save(file, "PNG")
    fsspec.filesystem("memory").pipe("/masks/m.png", file.getvalue())
    assert drawn_mask("memory://masks/m.png", store, SLIDE, SHAPE, PITCH).all()
