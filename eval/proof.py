"""What is there to know in a synthetic cohort, and what gives it away? Floors, oracle, ceiling and traps, measured on its files.

Figures without a verdict: the ranges that they should hold are those of a test over seeds (tests/test_cohort_proof.py).
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from histoscale.data.catalog import Catalog, open_catalog
from histoscale.data.cohort.morphology import ADIPOSE
from histoscale.data.cohort.tissue import MAP_UM
from histoscale.data.journal import Journal
from histoscale.data.readers.scale import choose_scale, read_scaled
from histoscale.data.storage import Store
from histoscale.eval.ceiling import CeilingConfig, ceiling_predictions
from histoscale.eval.colour import colour_features, colour_predictions
from histoscale.eval.oracle import oracle_features
from histoscale.eval.scores.auroc import areas, report_area
from histoscale.eval.scores.classification import balanced_accuracy

Array = np.ndarray


@dataclass(frozen=True)
class ProofConfig:
    """ceiling: the supervised network, or null to leave it out. trees: of the oracle's forest. mpp_tolerance, max_upsample,
    threads: of reading. sheet_mpp, sheet_um: resolution and width of a picture in the contact sheet."""

    ceiling: CeilingConfig | None
    trees: int
    mpp_tolerance: float
    max_upsample: float
    threads: int
    sheet_mpp: float
    sheet_um: float
    seed: int


@dataclass(frozen=True)
class Measured:
    """One figure. name: stable, a key of summary.json. low, high: its 95 % interval, where it has one. guess: what it is where
    nothing is known."""

    name: str
    value: float
    low: float | None
    high: float | None
    guess: float

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{interval}"

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high, "guess": self.guess}


@dataclass(frozen=True)
class Places:
    """n labelled patches: ids and labels str [n], corners int64 [n] in level-0 px, um per level-0 pixel [n], mpp and size of
    the task."""

    slide: Array
    patient: Array
    site: Array
    role: Array
    label: Array
    x: Array
    y: Array
    mpp0: Array
    mpp: float
    size_px: int

    def __len__(self) -> int:
        return len(self.x)


def read_places(patches: Path, task: str, catalog: Catalog) -> Places:
    """The rows of one task. Raises KeyError for a slide that the catalog does not hold, ValueError for an unknown task."""
    table = {name: np.array(column) for name, column in pq.read_table(patches).to_pydict().items()}
    rows = np.flatnonzero(table["task"] == task)
    if not len(rows):
        raise ValueError(f"{patches} holds no task {task!r}: expected one of {', '.join(sorted(set(table['task'])))}")
    part = {name: column[rows] for name, column in table.items()}
    mpp0 = {s: catalog.level_mpps(catalog.row(s))[0] for s in np.unique(part["slide_id"]).tolist()}
    return Places(
        part["slide_id"], part["patient_id"], part["site"], part["role"], part["label"], part["x"], part["y"],
        np.array([mpp0[s] for s in part["slide_id"].tolist()]), float(part["mpp"][0]), int(part["size_px"][0]),
    )  # fmt: skip


def read_pixels(places: Places, catalog: Catalog, store: Store, config: ProofConfig, mpp: float, size_px: int) -> Array:
    """uint8 [n, 3, size_px, size_px] from the corners of the patches, at another mpp and size where wanted."""
    pixels = np.empty((len(places), 3, size_px, size_px), np.uint8)

    def cut(slide_id: str) -> None:
        i = catalog.row(slide_id)
        scale = choose_scale(catalog.level_mpps(i), mpp, config.mpp_tolerance, config.max_upsample)
        if scale is None:
            raise ValueError(f"slide {slide_id} cannot serve {mpp} um/px: its levels have {catalog.level_mpps(i)}")
        reader, downsample = catalog.reader(i, store), catalog.layout(i).levels[scale.level].downsample
        for row in np.flatnonzero(places.slide == slide_id):
            corner = round(places.x[row] / downsample), round(places.y[row] / downsample)
            pixels[row] = read_scaled(reader, scale, *corner, size_px, size_px).transpose(2, 0, 1)

    with ThreadPoolExecutor(config.threads) as pool:
        list(pool.map(cut, dict.fromkeys(places.slide.tolist())))
    return pixels


def read_oracle(places: Places, truth: Path) -> Array:
    """`oracle_features` of every patch, from truth/<slide_id>/nuclei.parquet: float64 [n, 11]."""
    features = np.empty((len(places), 11))
    for slide_id in dict.fromkeys(places.slide.tolist()):
        rows = np.flatnonzero(places.slide == slide_id)
        table = pq.read_table(truth / slide_id / "nuclei.parquet", columns=["x", "y", "a", "b", "theta", "nucleolus"])
        nuclei = {name: table[name].to_numpy() for name in table.column_names}
        corners = (places.x * places.mpp0)[rows], (places.y * places.mpp0)[rows]
        features[rows] = oracle_features(nuclei, *corners, places.mpp * places.size_px)
    return features


def accuracy(labels: Array, predicted: Array) -> float:
    """Balanced accuracy of class names [n]."""
    names = np.unique(np.concatenate([labels, predicted]))
    return balanced_accuracy(np.searchsorted(names, labels), np.searchsorted(names, predicted), len(names))


def forest(train: Array, labels: Array, test: Array, trees: int, seed: int) -> Array:
    from sklearn.ensemble import RandomForestClassifier  # a second of imports, for those who measure alone

    return RandomForestClassifier(trees, min_samples_leaf=2, random_state=seed).fit(train, labels).predict(test)


def leak(features: Array, labels: Array, patients: Array, seed: int) -> float:
    """How much a split by tiles flatters: balanced accuracy of 15 nearest neighbours on random halves, less that on halves
    of patients."""
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    names = np.unique(patients)
    random_half = rng.random(len(labels)) < 0.5
    patient_half = np.isin(patients, rng.permutation(names)[: len(names) // 2])
    scores = []
    for half in (random_half, patient_half):
        both = []
        for fit in (half, ~half):
            model = make_pipeline(StandardScaler(), KNeighborsClassifier(15)).fit(features[fit], labels[fit])
            both.append(accuracy(labels[~fit], model.predict(features[~fit])))
        scores.append(float(np.mean(both)))
    return scores[0] - scores[1]


def site_accuracy(features: Array, sites: Array, patients: Array, trees: int, seed: int) -> float:
    """Balanced accuracy for the site by the better of logistic regression and a forest, across two halves of each site's
    patients."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    half = np.zeros(len(sites), bool)
    for site in np.unique(sites):
        half |= np.isin(patients, np.unique(patients[sites == site])[::2])
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    found: dict[str, list[float]] = {"linear": [], "forest": []}
    for fit in (half, ~half):
        found["linear"].append(accuracy(sites[~fit], linear.fit(features[fit], sites[fit]).predict(features[~fit])))
        found["forest"].append(accuracy(sites[~fit], forest(features[fit], sites[fit], features[~fit], trees, seed)))
    return max(float(np.mean(scores)) for scores in found.values())


def mask_iou(catalog: Catalog, i: int, classes: Array, map_um: float) -> float:
    """Overlap of the catalog's tissue mask with the true one, which is the class map at map_um without its background.

    Fat is left out of both: it is tissue to the truth and white to any mask.
    """
    mask = catalog.mask(i)
    rows, columns = (((np.arange(n) + 0.5) * catalog.mask_mpp(i) / map_um).astype(int) for n in mask.shape)
    rows, columns = rows.clip(0, classes.shape[0] - 1), columns.clip(0, classes.shape[1] - 1)
    codes = classes[rows[:, None], columns[None, :]]
    true, counted = codes > 0, codes != ADIPOSE
    return float((mask & true & counted).sum() / max(((mask | true) & counted).sum(), 1))


def contact_sheet(places: Places, catalog: Catalog, store: Store, config: ProofConfig) -> Array:
    """Classes (columns) by sites (rows), two patches each: uint8 [sites * S, classes * 2 S, 3]; white where there is none."""
    size = round(config.sheet_um / config.sheet_mpp)
    sites, labels = np.unique(places.site), np.unique(places.label)
    sheet = np.full((len(sites) * size, len(labels) * 2 * size, 3), 255, np.uint8)
    for i, site in enumerate(sites):
        for j, label in enumerate(labels):
            rows = np.flatnonzero((places.site == site) & (places.label == label))
            rows = rows[[0, -1]] if len(rows) > 1 else rows
            columns: dict[str, Any] = {name: v[rows] for name, v in vars(places).items() if isinstance(v, np.ndarray)}
            for k, picture in enumerate(read_pixels(replace(places, **columns), catalog, store, config, config.sheet_mpp, size)):
                left = (2 * j + k) * size
                sheet[i * size : (i + 1) * size, left : left + size] = picture.transpose(1, 2, 0)
    return sheet


def slide_labels(catalog: Catalog, store: Store, truth: Path, map_um: float) -> list[Measured]:
    """What must not tell the slide label: site, tissue area, mean colour, artefacts. Fitted on `train`, area under ROC on
    other patients. And how well the catalog's masks cover the tissue."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    cases = [i for i, s in enumerate(catalog.slides) if s.labels.get("tumour") in ("0", "1")]
    slides = [catalog.slides[i] for i in cases]
    positive = np.array([s.labels["tumour"] == "1" for s in slides]).astype(np.int64)
    train = np.array([s.labels["role"] == "train" for s in slides])
    sites = np.array([s.site for s in slides])
    area = np.array([catalog.mask(i).sum() * catalog.mask_mpp(i) ** 2 for i in cases])
    artefact = np.array([(_map(truth / s.slide_id / "artefacts.png") > 0).mean() for s in slides])
    colours = np.stack([_mean_colour(catalog, i, store) for i in cases])
    one_hot = (sites[:, None] == np.unique(sites[train])[None]).astype(float)
    known = {"site": one_hot, "tissue area": area[:, None], "mean colour": colours, "artefact share": artefact[:, None]}
    patients = [str(slides[j].patient_id) for j in np.flatnonzero(~train)]
    measured = []
    for name, features in known.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0)).fit(features[train], positive[train])
        areas_found = areas(positive[~train], model.decision_function(features[~train]), patients)
        found = report_area(areas_found, 0, len(set(patients)), len(patients), 0.95)
        measured.append(Measured(f"slide label from {name}, AUC", found.value, found.low, found.high, 0.5))
    overlap = [mask_iou(catalog, i, _map(truth / s.slide_id / "classes.png"), map_um) for i, s in zip(cases, slides, strict=True)]
    return [*measured, Measured("tissue mask against truth, median IoU", float(np.median(overlap)), None, None, 0.0)]


def prove(cohort: Path, catalog_uri: str | Path, store: Store, config: ProofConfig, journal: Journal) -> list[Measured]:
    """All figures of a written and indexed cohort (`data/cohort/write.py`).

    Raises ValueError when the cohort lacks the task `matched4`, FileNotFoundError when it lacks its truth.
    """
    catalog = open_catalog(str(catalog_uri), store)
    places = read_places(Path(cohort) / "patches.parquet", "matched4", catalog)
    train, internal, external = (places.role == role for role in ("train", "test", "external"))
    parts = [("internal", internal)] + ([("external", external)] if external.any() else [])
    labels, inside = places.label, ~external
    sites, patients = places.site[inside], places.patient[inside]
    measured: list[Measured] = []

    def note(name: str, value: float, guess: float) -> None:
        measured.append(Measured(name, value, None, None, guess))

    with journal.progress(4 + (config.ceiling is not None), "looking for shortcuts", "steps") as progress:
        pixels = read_pixels(places, catalog, store, config, places.mpp, places.size_px)
        colour, oracle = colour_features(pixels), read_oracle(places, Path(cohort) / "truth")
        progress.advance(1)
        classes, codes = np.unique(labels, return_inverse=True)
        by_colour = colour_predictions(colour[train], labels[train], colour, config.seed)
        by_oracle = forest(oracle[train], labels[train], oracle, config.trees, config.seed)
        for part, rows in parts:
            best = max(accuracy(labels[rows], p[rows]) for p in by_colour.values())
            note(f"colour floor, {part}", best, 1 / len(classes))
        for part, rows in parts:
            note(f"oracle on nuclei, {part}", accuracy(labels[rows], by_oracle[rows]), 1 / len(classes))
        progress.advance(1)
        if config.ceiling is not None:
            top = classes[ceiling_predictions(pixels, np.flatnonzero(train), codes, len(classes), config.ceiling)]
            for part, rows in parts:
                note(f"supervised ceiling, {part}", accuracy(labels[rows], top[rows]), 1 / len(classes))
            progress.advance(1)
        for name, features in (("colour", colour), ("oracle", oracle)):
            found = site_accuracy(features[inside], sites, patients, config.trees, config.seed)
            note(f"site from {name}", found, 1 / len(np.unique(sites)))
        note("leak of a tile split, colour kNN", leak(colour[inside], labels[inside], patients, config.seed), 0.0)
        progress.advance(1)
        measured += slide_labels(catalog, store, Path(cohort) / "truth", MAP_UM)
        progress.advance(1)
    return measured


def _map(path: Path) -> Array:
    with Image.open(path) as image:
        return np.asarray(image)


def _mean_colour(catalog: Catalog, i: int, store: Store) -> Array:
    """Mean RGB [3] of the coarsest level under the tissue mask."""
    level = catalog.layout(i).levels[-1]
    last = len(catalog.layout(i).levels) - 1
    pixels = catalog.reader(i, store).region(last, 0, 0, level.width, level.height)
    rows, columns = (np.arange(n) * m // n for n, m in zip(pixels.shape[:2], catalog.mask(i).shape, strict=True))
    return pixels[catalog.mask(i)[rows[:, None], columns[None, :]]].mean(0)
