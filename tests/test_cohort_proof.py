"""The proof of the cohort: its checks run on files as written, and each can fail."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from histoscale.data.catalog import open_catalog
from histoscale.data.cohort import morphology as m
from histoscale.data.cohort.patches import PatchesConfig
from histoscale.data.cohort.roles import SiteConfig
from histoscale.data.cohort.tissue import grow
from histoscale.data.cohort.write import CohortConfig, render_region, write_cohort
from histoscale.data.journal import Journal
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.ceiling import CeilingConfig, ceiling_predictions
from histoscale.eval.colour import _quantiles, colour_features, colour_predictions
from histoscale.eval.oracle import oracle_features
from histoscale.eval.proof import (
    Measured,
    ProofConfig,
    accuracy,
    contact_sheet,
    forest,
    leak,
    prove,
    read_places,
    site_accuracy,
)
from histoscale.launch.run import invoke

ROOT = Path(__file__).resolve().parents[1]


def cohort_config(name: str = "tiny", **changed: object) -> CohortConfig:
    values = yaml.safe_load((ROOT / "configs" / "cohort" / f"{name}.yaml").read_text())
    values["sites"] = [SiteConfig(**site) for site in values["sites"]]
    values["patches"] = PatchesConfig(**values["patches"])
    return replace(CohortConfig(**values), **changed)


def proof_config(ceiling: bool) -> ProofConfig:
    values, full = (yaml.safe_load((ROOT / "configs" / "proof" / f"{name}.yaml").read_text()) for name in ("demo", "full"))
    return ProofConfig(**{**values, "ceiling": CeilingConfig(**full["ceiling"]) if ceiling else None})


def proven(folder: Path, config: CohortConfig, proof: ProofConfig, journal: Journal) -> dict[str, Measured]:
    """A cohort drawn, indexed and measured in `folder`."""
    write_cohort(folder / "cohort", config, journal, workers=2)
    wanted = [f"manifest={folder / 'cohort' / 'manifest.csv'}", "tissue.close_um=48", "logging.progress=off"]
    invoke("index", [*wanted, f"out={folder / 'catalog'}"])
    return {one.name: one for one in prove(folder / "cohort", folder / "catalog", storage(), proof, journal)}


def storage() -> Store:
    return Store(StorageConfig(**yaml.safe_load((ROOT / "configs" / "storage" / "default.yaml").read_text())))


def oracle_table(gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, class names and patients of 9 patches a class and patient of 8 patients."""
    features, labels, patients = [], [], []
    corners = np.arange(3) * 66.0
    y, x = (v.ravel() for v in np.meshgrid(corners, corners, indexing="ij"))
    for patient in range(8):
        for code in m.MATCHED:
            nuclei = grow(np.full((100, 100), code, np.uint8), m.draw_law(0, patient), gap, False, patient * 10 + code).nuclei
            columns = {name: getattr(nuclei, name) for name in ("x", "y", "a", "b", "theta", "nucleolus")}
            features.append(oracle_features(columns, x, y, 64.0))
            labels += [m.CLASSES[code]] * 9
            patients += [patient] * 9
    return np.concatenate(features), np.array(labels), np.array(patients)


def test_the_oracle_knows_the_classes_and_nothing_where_there_is_no_gap() -> None:
    for gap, low, high in ((1.3, 0.85, 1.0), (0.0, 0.0, 0.75)):
        features, labels, patients = oracle_table(gap)
        train = patients < 5
        found = accuracy(labels[~train], forest(features[train], labels[train], features[~train], 100, 0))
        assert low <= found <= high, gap


def test_colour_does_not_know_the_matched_classes() -> None:
    config = cohort_config()
    pixels, labels, patients = [], [], []
    for patient in range(10):
        for code in m.MATCHED:
            region = render_region(m.CLASSES[code], 192, 1.0, config, patient, patient % 2, 0)
            pixels += [region[i : i + 64, j : j + 64].transpose(2, 0, 1) for i in (0, 64, 128) for j in (0, 64, 128)]
            labels += [m.CLASSES[code]] * 9
            patients += [patient] * 9
    names, train = np.array(labels), np.array(patients) < 6
    features = colour_features(np.stack(pixels))
    scores = [accuracy(names[~train], p) for p in colour_predictions(features[train], names[train], features[~train], 0).values()]
    assert max(scores) < 0.55  # small sample; the demo's 2,000 patches hold .45


def test_colour_features_are_the_statistics_that_they_name() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 3, 16, 16), np.uint8)
    found = colour_features(pixels)
    red = pixels[1, 0].ravel() / 255
    assert found.shape == (3, 42)
    assert np.allclose(found[1, :7], [red.mean(), red.std(), *np.quantile(red, (0.1, 0.25, 0.5, 0.75, 0.9))], atol=1e-5)
    channels = rng.random((3, 6, 257), np.float32)
    for drawn in (channels, channels[..., :1], channels[..., :2], np.round(channels, 1)):
        assert (_quantiles(drawn.copy()) == np.quantile(drawn, (0.1, 0.25, 0.5, 0.75, 0.9), axis=2)).all()
    shuffled = pixels.reshape(3, 3, -1)[:, :, rng.permutation(256)].reshape(pixels.shape)
    assert np.allclose(colour_features(shuffled), found, atol=1e-4)
    with pytest.raises(ValueError, match="uint8"):
        colour_features(pixels.astype(np.float32))


def test_a_leak_is_found_where_patients_have_their_own_classes_colour() -> None:
    rng = np.random.default_rng(0)
    patients, classes = np.repeat(np.arange(30), 24), np.tile(np.repeat(np.arange(4), 6), 30)
    own = rng.normal(0, 1, (30, 4, 5))[patients, classes] + rng.normal(0, 0.3, (720, 5))
    assert leak(own, classes.astype(str), patients, 0) > 0.2
    assert abs(leak(rng.normal(0, 1, (720, 5)), classes.astype(str), patients, 0)) < 0.1


def test_site_accuracy_is_between_patients() -> None:
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(24), 20)
    sites = np.array(["a", "b", "c"])[patients % 3]
    own = rng.normal(0, 1, (24, 6))[patients]  # tells patients apart, not sites
    shared = own + 5 * np.eye(6)[patients % 3]
    assert site_accuracy(own, sites, patients.astype(str), 50, 0) < 0.6
    assert site_accuracy(shared, sites, patients.astype(str), 50, 0) > 0.9


def test_the_ceiling_learns_a_shape_and_repeats_itself() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    pixels = rng.integers(150, 200, (200, 3, 32, 32)).astype(np.uint8)
    for i, label in enumerate(labels):
        x, y = rng.integers(2, 18, 2)
        size = (4, 9) if label else (6, 6)
        pixels[i, :, y : y + size[0], x : x + size[1]] = 60
    config = CeilingConfig(100, 24, [8, 12, 12, 16], 5e-3, 0.05, 0.1, 0)
    train = np.arange(140)
    first, again = (ceiling_predictions(pixels, train, labels, 2, config) for _ in range(2))
    assert (first == again).all() and (first[140:] == labels[140:]).mean() > 0.8
    with pytest.raises(ValueError, match="training patch"):
        ceiling_predictions(pixels, train[:0], labels, 2, config)


def test_prove_runs_on_a_cohort_as_written(tmp_path: Path, journal: Journal) -> None:
    found = proven(tmp_path, cohort_config(), proof_config(ceiling=False), journal)
    for wanted in ("colour floor, internal", "oracle on nuclei, external", "site from oracle", "slide label from site, AUC"):
        assert wanted in found
    assert found["oracle on nuclei, internal"].value > 0.7 > found["colour floor, internal"].value
    assert found["colour floor, internal"].guess == 0.25 and found["slide label from site, AUC"].guess == 0.5
    catalog = open_catalog(str(tmp_path / "catalog"), storage())
    places = read_places(tmp_path / "cohort" / "patches.parquet", "matched4", catalog)
    sheet = contact_sheet(places, catalog, storage(), proof_config(ceiling=False))
    assert sheet.shape == (3 * 128, 4 * 2 * 128, 3) and sheet.std() > 20
    with pytest.raises(ValueError, match="matched4"):
        read_places(tmp_path / "cohort" / "patches.parquet", "unknown", catalog)


RANGES = {  # of every cohort: at least, at most
    "colour floor, internal": (0.0, 0.45),
    "colour floor, external": (0.0, 0.45),
    "oracle on nuclei, internal": (0.90, 1.0),
    "oracle on nuclei, external": (0.90, 1.0),
    "site from colour": (0.90, 1.0),
    "leak of a tile split, colour kNN": (0.02, 1.0),
}
SEEDS = (0, 200, 201)


@pytest.mark.slow
def test_cohorts_are_neither_trivial_nor_impossible(tmp_path: Path, journal: Journal) -> None:
    """Over seeds, because a cohort alone may miss by chance: 95 % intervals leave out .5 once in twenty."""
    config = cohort_config("demo", cases=1)  # as the demo's, with one labelled slide a patient in place of two
    found = [
        proven(tmp_path / str(seed), replace(config, seed=seed), proof_config(ceiling=seed == SEEDS[0]), journal)
        for seed in SEEDS
    ]
    for name, (least, most) in RANGES.items():
        assert all(least <= one[name].value <= most for one in found), (name, [one[name].value for one in found])
    assert found[0]["supervised ceiling, internal"].value >= 0.85
    assert np.mean([one["site from oracle"].value for one in found]) <= 1 / 3 + 0.05  # one cohort scatters
    masks = [one["tissue mask against truth, median IoU"].value for one in found]
    assert np.mean(masks) >= 0.94, masks  # .948 to .960 on the eleven of tests/records/demo_seeds.md
    labels = [one for each in found for name, one in each.items() if name.startswith("slide label from")]
    missed = [one for one in labels if one.low is not None and one.high is not None and not one.low <= 0.5 <= one.high]
    assert len(labels) == 4 * len(SEEDS) and len(missed) <= 3, missed  # more than 3 of 12 by chance: once in 450
