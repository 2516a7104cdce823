"""The synthetic cohort: deterministic, readable, labelled as drawn, and the same to a histogram whatever the class."""

import hashlib
import json
import os
import re
import select
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from scipy.ndimage import map_coordinates

from histoscale.data.cohort import morphology as m
from histoscale.data.cohort.artefacts import draw_artefacts
from histoscale.data.cohort.fields import Linear, between, generator, smooth_field
from histoscale.data.cohort.nuclei import hard_core
from histoscale.data.cohort.patches import OPEN, PURITY, PatchesConfig
from histoscale.data.cohort.plate import LEAST_FOCUS_UM2, class_map
from histoscale.data.cohort.roles import STRATA, SiteConfig, draw_slides
from histoscale.data.cohort.slide import _mean
from histoscale.data.cohort.tissue import MAP_UM, chromatin_texture, draw_nuclei, grow
from histoscale.data.cohort.truth import outlines
from histoscale.data.cohort.write import CohortConfig, make_slide, render_region, slides_of, write_cohort
from histoscale.data.journal import Journal, JournalConfig
from histoscale.launch.footprint import family
from histoscale.launch.run import invoke

ROOT = Path(__file__).resolve().parents[1]


def cohort_config(name: str, **changed: object) -> CohortConfig:
    values = yaml.safe_load((ROOT / "configs" / "cohort" / f"{name}.yaml").read_text())
    values["sites"] = [SiteConfig(**site) for site in values["sites"]]
    values["patches"] = PatchesConfig(**values["patches"])
    return replace(CohortConfig(**values), **changed)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CohortConfig]:
    out = tmp_path_factory.mktemp("cohort")
    config = cohort_config("tiny")
    write_cohort(out, config, Journal(out, JournalConfig("off", 10, "off", "test", False)), workers=2)
    return out, config


def digests(folder: Path) -> dict[str, str]:
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path, journal: Journal) -> None:
    site = SiteConfig("north", 0.5, 20, train=1, monitor=0, test=0, external=0)
    config = cohort_config("tiny", sites=[site], panel_mm=[0.6, 0.15], case_mm=[0.2, 0.15])
    for name, seed, workers in (("a", 0, 1), ("b", 0, 4), ("c", 1, 1)):
        write_cohort(tmp_path / name, replace(config, seed=seed), journal, workers=workers)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b and len(a) > 10
    assert all(a[name] != c[name] for name in a if name.endswith((".svs", "nuclei.parquet")))


def test_openslide_reads_the_slides_as_aperio(written: tuple[Path, CohortConfig]) -> None:
    out, config = written
    for spec in slides_of(config)[:4]:
        slide, drawn = openslide.OpenSlide(out / "slides" / f"{spec.slide_id}.svs"), make_slide(spec, config)
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == config.sites[spec.site].mpp
        assert int(slide.properties["openslide.objective-power"]) == config.sites[spec.site].objective
        assert slide.dimensions == (drawn.width, drawn.height) and slide.level_downsamples == (1.0, 4.0, 16.0)
        assert slide.properties["openslide.level[0].tile-width"] == "256"
        x, y = drawn.width // 3, drawn.height // 3
        read = np.asarray(slide.read_region((x, y), 0, (128, 96)).convert("RGB")).astype(int)
        assert np.abs(read - drawn.pixels(x, y, 128, 96)).mean() < 6  # what JPEG costs
        whole = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(float)
        small = np.asarray(slide.read_region((0, 0), 1, slide.level_dimensions[1]).convert("RGB")).astype(float)
        mean = whole.reshape(small.shape[0], 4, small.shape[1], 4, 3).mean((1, 3))
        grey = (mean - small).mean(2)  # chroma subsampling and JPEG cost single colours more
        assert abs(grey.mean()) < 0.5 and np.abs(grey).mean() < 5


def test_a_window_is_a_function_of_its_place() -> None:
    config = cohort_config("tiny", artefacts=6.0)
    for spec in slides_of(config)[:3]:
        slide = make_slide(spec, config)
        large = slide.pixels(100, 80, 300, 200).astype(int)
        part = slide.pixels(170, 130, 90, 110).astype(int)
        apart = np.abs(large[50:160, 70:160] - part)
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-3  # float32 rounds once in a while; an edge would show


def test_roles_are_exact_and_labels_are_dealt_evenly() -> None:
    config = cohort_config("demo")
    slides = slides_of(config)
    roles = {s.patient_id: s.role for s in slides}
    assert all(roles[s.patient_id] == s.role for s in slides)
    for i, site in enumerate(config.sites):
        patients = {s.patient_id: s.role for s in slides if s.site == i}
        counts = {role: list(patients.values()).count(role) for role in ("train", "monitor", "test", "external")}
        assert counts == {role: getattr(site, role) for role in counts}
        cases = [s for s in slides if s.site == i and s.kind == "case"]
        assert abs(np.mean([s.tumour for s in cases]) - 0.5) < 0.13
        for label in (True, False):
            assert abs(np.mean([s.mimic for s in cases if s.tumour == label]) - 0.5) < 0.26
    assert all((s.tumour is None) == (s.kind == "panel") for s in slides)
    assert all(STRATA[s.stratum][0] <= s.tumour_share <= STRATA[s.stratum][1] for s in slides if s.tumour)
    held_out = [p for p, role in roles.items() if role == "test"]
    assert len(held_out) >= 20 and sum(role == "external" for role in roles.values()) >= 12


def test_rho_ties_the_label_to_the_site() -> None:
    sites = [SiteConfig(n, 0.5, 20, 20, 0, 0, 0) for n in "ab"]
    for rho, apart in ((0.0, 0.0), (1.0, 0.9)):
        slides = draw_slides(3, sites, 0, 1, 0.5, rho)
        low, high = (np.mean([bool(s.tumour) for s in slides if s.site == i]) for i in (0, 1))
        assert high - low == pytest.approx(apart, abs=0.101)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prevalence": 1.5}, "prevalence"),
        ({"rho": -0.1}, "rho"),
        ({"panels": 0, "cases": 0}, "panels"),
        ({"case_mm": [1.0]}, "case_mm"),
    ],
)
def test_values_out_of_range_are_named(changed: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        slides_of(cohort_config("tiny", **changed))


def test_foci_have_the_area_that_was_drawn_and_stay_in_the_tissue() -> None:
    positives = [s for s in slides_of(cohort_config("demo")) if s.tumour][:12]
    for spec in positives:
        bare = class_map(replace(spec, tumour=False, mimic=False), 800, 1000)
        classes = class_map(spec, 800, 1000)
        assert ((classes > 0) == (bare > 0)).all()
        found = (class_map(replace(spec, mimic=False), 800, 1000) == m.TUMOUR).sum() * MAP_UM**2
        wanted = max(spec.tumour_share * (bare > 0).sum() * MAP_UM**2, LEAST_FOCUS_UM2)
        assert found == pytest.approx(wanted, rel=0.02)


def test_a_positive_has_at_least_fifteen_tumour_nuclei() -> None:
    config = cohort_config("demo")
    smallest = sorted((s for s in slides_of(config) if s.tumour), key=lambda s: s.tumour_share)[:3]
    for spec in smallest:
        assert (make_slide(spec, config).tissue.nuclei.kind == m.TUMOUR).sum() >= 15


def test_thinning_equals_a_loop() -> None:
    rng = generator(5)
    x, y, r = rng.random(400) * 100, rng.random(400) * 100, rng.uniform(1, 4, 400)
    kept: list[int] = []
    for i in range(400):
        if all(np.hypot(x[i] - x[j], y[i] - y[j]) >= r[i] + r[j] for j in kept):
            kept.append(i)
    assert np.flatnonzero(hard_core(x, y, r)[0]).tolist() == kept


def test_every_matched_class_obeys_the_same_law() -> None:
    """Nuclear cover and mean nuclear density, averaged over patients, agree between classes although nuclei do not."""
    cover, mass = {c: [] for c in m.MATCHED}, {c: [] for c in m.MATCHED}
    for patient in range(6):
        law = m.draw_law(0, patient)
        for code in m.MATCHED:
            tissue = grow(np.full((160, 160), code, np.uint8), law, 1.3, False, 100 + patient * 10 + code)
            density, covered = draw_nuclei(tissue.nuclei, tissue.morphology, chromatin_texture(0.5), 0.25, 0.25, 0.5, (640, 640))
            lumen = np.kron(tissue.maps[0] > 0, np.ones((4, 4), bool))
            cover[code].append(covered[~lumen].mean() / law.nuclear_fraction[code])
            mass[code].append(density.sum() / covered.sum() / law.nuclear_density[code])
    covers, masses = (np.array([np.mean(v[c]) for c in m.MATCHED]) for v in (cover, mass))
    assert np.abs(covers / covers.mean() - 1).max() < 0.12
    assert np.abs(masses / masses.mean() - 1).max() < 0.05


def test_gap_moves_classes_about_their_mean() -> None:
    same, usual, wide = (m.morphologies(gap) for gap in (0.0, 1.0, 1.5))
    assert len({same[c].semi_axis_um for c in m.MATCHED}) == 1
    assert usual[m.TUMOUR].semi_axis_um == pytest.approx(3.9) and usual[m.STROMA].elongation == pytest.approx(3.4)
    assert wide[m.TUMOUR].semi_axis_um > 3.9 > same[m.TUMOUR].semi_axis_um
    with pytest.raises(ValueError, match="gap"):
        m.morphologies(-1)


def test_truth_is_what_was_drawn(written: tuple[Path, CohortConfig]) -> None:
    out, config = written
    spec = next(s for s in slides_of(config) if s.tumour)
    slide, truth = make_slide(spec, config), out / "truth" / spec.slide_id
    classes = np.asarray(Image.open(truth / "classes.png"))
    assert (classes == slide.tissue.classes).all()
    nuclei = pq.read_table(truth / "nuclei.parquet").to_pydict()
    rows, columns = (np.array(nuclei[n]) / MAP_UM for n in "yx")
    kinds = np.array(m.CLASSES)[classes[rows.astype(int), columns.astype(int)]]
    assert (kinds == np.array(nuclei["kind"])).mean() > 0.999  # float32 rounds a few across a cell's edge

    def area(ring: list[list[float]]) -> float:
        x, y = np.array(ring).T
        return 0.5 * float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))

    features = json.loads((truth / "foci.geojson").read_text())["features"]
    polygons = [[abs(area(ring)) for ring in f["geometry"]["coordinates"]] for f in features]
    drawn = sum(outer - sum(holes) for outer, *holes in polygons)
    assert drawn * slide.mpp**2 == pytest.approx((classes == m.TUMOUR).sum() * MAP_UM**2, rel=0.03)
    tumour = np.argwhere(classes == m.TUMOUR).mean(0)[::-1] * MAP_UM / slide.mpp
    first = ElementTree.parse(truth / "foci.xml").getroot().find("Annotations/Annotation")
    assert first is not None and first.get("PartOfGroup") == "Tumor"
    corners = np.concatenate([np.array(f["geometry"]["coordinates"][0]) for f in features])
    assert (corners.min(0) <= tumour).all() and (tumour <= corners.max(0)).all()


def test_outlines_keep_holes() -> None:
    mask = np.zeros((40, 40), bool)
    mask[5:30, 5:30] = True
    mask[12:20, 12:20] = False
    rings = outlines(mask, 0.5)
    assert len(rings) == 2 and all((ring[0] == ring[-1]).all() for ring in rings)
    assert rings[0].min() == pytest.approx(5 * MAP_UM / 0.5, abs=2.1)
    assert rings[0].max() == pytest.approx(30 * MAP_UM / 0.5, abs=2.1)


def test_patches_are_filled_by_their_class_and_free_of_artefacts(written: tuple[Path, CohortConfig]) -> None:
    out, config = written
    table = pq.read_table(out / "patches.parquet").to_pylist()
    assert {row["task"] for row in table} == {"matched4", "mixed4", "natural6"}
    mpp = {s.slide_id: config.sites[s.site].mpp for s in slides_of(config)}
    for row in table:
        folder = out / "truth" / row["slide_id"]
        classes, artefacts = (np.asarray(Image.open(folder / f"{name}.png")) for name in ("classes", "artefacts"))
        side, left, top = row["size_px"] * row["mpp"], row["x"] * mpp[row["slide_id"]], row["y"] * mpp[row["slide_id"]]
        whole, middle = (
            np.s_[round((top + f * side) / MAP_UM) : round((top + (1 - f) * side) / MAP_UM),
                  round((left + f * side) / MAP_UM) : round((left + (1 - f) * side) / MAP_UM)] for f in (0.0, 0.25)
        )  # fmt: skip
        share = (classes[middle] == m.CLASSES.index(row["label"])).mean()
        assert share >= PURITY - 0.08 if row["task"] != "mixed4" else share < PURITY + 0.08
        assert (artefacts[whole] > 0).mean() < 0.05 and (classes[middle] > 0).mean() > OPEN


def test_twins_share_their_biology_and_not_their_colours() -> None:
    config = cohort_config("tiny")
    first, second = (render_region("tumour", 128, 0.5, config, patient=0, site=s, number=0) for s in (0, 2))
    assert np.abs(first.mean((0, 1)) - second.mean((0, 1))).max() > 3
    grey = [np.argsort(np.argsort(p.mean(2).ravel())) for p in (first, second)]
    assert np.corrcoef(grey)[0, 1] > 0.8
    spec = slides_of(config)[0]
    assert (make_slide(spec, config).tissue.nuclei.x == make_slide(spec, config, site=2).tissue.nuclei.x).all()


def test_fields_have_unit_variance_everywhere() -> None:
    stack = np.stack([smooth_field(generator(k), (30, 30), 2.0, 7.0) for k in range(600)])
    assert np.abs(stack.std(0) - 1).max() < 0.15 and np.abs(stack.mean(0)).max() < 0.2


def test_a_grid_is_read_between_its_nodes() -> None:
    grid = np.random.default_rng(0).random((2, 5, 7)).astype(np.float32)
    rows, columns = np.array([-1.0, 0.25, 3.5, 9.0]), np.array([1.0, 2.75, 3.0])
    y, x = np.meshgrid(rows, columns, indexing="ij")
    wanted = [map_coordinates(plane, (y, x), order=1, mode="nearest") for plane in grid]
    assert np.allclose(between(grid, Linear(rows, 5), Linear(columns, 7)), wanted, atol=1e-6)
    assert (between(np.ones((1, 1)), Linear(rows, 1), Linear(columns, 1)) == 1).all()


def test_a_slide_has_the_levels_that_its_pixels_mean() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    for factor in (4, 16):
        mean = pixels.reshape(32 // factor, factor, 48 // factor, factor, 3).mean((1, 3))
        assert (_mean(pixels, factor) == np.floor(mean + 0.5)).all()


def test_artefacts_leave_their_marks_where_the_mask_says() -> None:
    config = cohort_config("tiny", artefacts=0.0)
    spec = slides_of(config)[0]
    clean = make_slide(spec, config)
    marked = replace(clean, artefacts=draw_artefacts(spec.key, clean.artefacts.mask.shape, 20.0))
    assert clean.artefacts.plain and set(np.unpackbits(np.unique(marked.artefacts.mask)[:, None], axis=1).any(0)[1:]) == {True}
    a, b = (s.pixels(0, 0, 512, 448).astype(int) for s in (clean, marked))
    rows, columns = (((np.arange(n) + 0.5) * clean.mpp / MAP_UM).astype(int) for n in a.shape[:2])
    mask = marked.artefacts.mask[rows[:, None], columns[None]] > 0
    changed = np.abs(a - b).max(2)
    seam = draw_artefacts(spec.key, clean.artefacts.mask.shape, 20.0).light[1][rows[:, None], columns[None]] != 1
    assert changed[mask].mean() > 10 * max(changed[~mask & ~seam].mean(), 0.1)


def test_the_command_ends_with_what_to_open_and_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = "cohort.sites=[{name: north, mpp: 0.5, objective: 20, train: 1, monitor: 0, test: 0, external: 0}]"
    small = ["cohort=tiny", site, "cohort.cases=0", "cohort.panel_mm=[0.2,0.15]", "logging.progress=lines"]
    out = tmp_path / "a cohort"
    invoke("cohort", [*small, f"out='{out}'"])
    said = capsys.readouterr().err
    assert "1 slides of 1 patients (1 train)" in said
    opened, typed = (re.findall(rf"^{word}: (.*)$", said, re.MULTILINE)[-1] for word in ("open", "next"))
    assert opened.startswith((out / "slides").as_uri())
    assert shlex.split(typed) == ["histoscale", "index", f"manifest={out / 'manifest.csv'}", f"out={out / 'catalog'}"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_processes_that_draw_end_with_the_one_that_asked_them(tmp_path: Path) -> None:
    wanted = ["cohort=tiny", "logging.progress=lines", "logging.interval_s=0", f"out={tmp_path / 'cohort'}"]
    command = [sys.executable, "-m", "histoscale.launch.cli", "cohort", *wanted]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as main:
        assert main.stderr is not None and any("drawing slides: 1/" in line for line in main.stderr)
        started = [os.pidfd_open(pid) for pid in family(main.pid) if pid != main.pid]
        main.kill()
    assert len(started) >= 2 or len(os.sched_getaffinity(0)) == 1
    for process in started:
        poll = select.poll()
        poll.register(process, select.POLLIN)  # readable once it has ended
        assert poll.poll(60_000), "a process outlived the run that it drew for"
        os.close(process)
