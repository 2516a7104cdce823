"""Slide-level models on embedding stores: trained by patient, read once on held-out patients and on sites never seen.

    histoscale mil embeddings=runs/embeddings manifest=cohort/manifest.csv task=cohort out=runs/mil
    histoscale mil embeddings=… manifest=… task=slide task.label=her2 'task.positive=[pos]' 'task.negative=[neg]' \\
        split=patients 'split.external_sites=[north]' out=…

Give catalog= for heatmaps on the slides, truth= (a folder with <slide_id>/foci.geojson) to outline the foci and to measure
whether attention points at them, and floor_embeddings= (stores of encoder=colour) for the colour floor.
"""

import csv
import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from histoscale.data.catalog import Catalog, open_catalog
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.manifest import read_manifest
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.heatmap import HeatmapConfig, Tiles, choose, draw, read_thumbnail, write_tiles
from histoscale.eval.mil.aggregators.pooling import MeanConfig
from histoscale.eval.mil.bags import BagError, Bags, read_bags
from histoscale.eval.mil.decodability import DecodabilityConfig, decodability
from histoscale.eval.mil.ensemble import Reading
from histoscale.eval.mil.features import Features
from histoscale.eval.mil.fit import FitConfig, Fitted, fit
from histoscale.eval.mil.floors import plain_floors
from histoscale.eval.mil.pointing import coverage, pointing, read_foci
from histoscale.eval.mil.score_table import score_rows
from histoscale.eval.mil.split import FixedSplit, Plan, Trial, make_plan
from histoscale.eval.mil.study import Study, StudyConfig, study
from histoscale.eval.mil.task import BinaryTask
from histoscale.eval.mil.words import cannot_say, show
from histoscale.eval.scores.interval import IntervalConfig

RESULT = (
    "embeddings",
    "floor_embeddings",
    "manifest",
    "truth",
    "task",
    "split",
    "mil",
    "interval",
    "study",
    "decodability",
    "heatmap",
)


@dataclass(frozen=True)
class Config:
    """embeddings: folder of <slide_id>.h5. floor_embeddings, catalog, truth: null where there are none.

    cache_bytes: features held in memory; more slides are read again each epoch. threads: of torch; bags are small, and more
    than one thread mostly waits.
    """

    embeddings: str
    floor_embeddings: str | None
    manifest: str
    catalog: str | None
    truth: str | None
    task: BinaryTask
    split: FixedSplit
    mil: FitConfig
    interval: IntervalConfig
    study: StudyConfig
    decodability: DecodabilityConfig
    heatmap: HeatmapConfig
    cache_bytes: int
    threads: int
    storage: StorageConfig
    logging: JournalConfig
    out: str


def identity(config: Config) -> dict[str, Any]:
    """What stands behind the names: labels, parts, encoder and tiles of every slide."""
    bags = _bags(config, config.embeddings)
    parts = [(part, *rows) for part, rows in asdict(_plan(config, bags).trials[0]).items()]
    seen = [parts, *((b.slide_id, b.group, b.site, b.label, b.tiles) for b in bags.rows)]
    return {"encoder_hash": bags.encoder, "slides": hashlib.sha256(repr(seen).encode()).hexdigest()[:16]}


def run(config: Config, journal: Journal) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return _run(config, journal)
    finally:
        torch.set_num_threads(before)


def _run(config: Config, journal: Journal) -> dict[str, Any]:
    bags = _bags(config, config.embeddings)
    plan = _plan(config, bags)
    trial = plan.trials[0]
    catalog = open_catalog(config.catalog, Store(config.storage)) if config.catalog else None
    fits = _fits(config, bags)
    epochs = config.mil.folds * config.mil.repeats * config.mil.epochs * len(fits)
    fitted: dict[str, tuple[Fitted, Features]] = {}
    with journal.progress(epochs, "slide models", "epochs") as progress:
        for name, (source, chosen) in fits.items():
            held = Features([[bag.path] for bag in source.rows], source.width, config.cache_bytes, config.threads)
            fitted[name] = fit(source, trial.train, held, config.task, chosen, progress), held
    readings = {name: [each.read(row, held) for row in range(len(bags.rows))] for name, (each, held) in fitted.items()}
    outputs = {name: np.array([reading.output for reading in each])[None] for name, each in readings.items()}
    floors = {name: values for name, values in outputs.items() if name != "model"}
    floors |= plain_floors(bags, plan, config.task, _tissue(catalog, bags))
    found = study(bags, plan, outputs["model"], floors, config.task, config.interval, config.study)

    model, features = fitted["model"]
    facts = {"encoder_hash": bags.encoder, "mpp": bags.mpp, "task": asdict(config.task)}
    thresholds = {f"{at.required:g}": at.value if math.isfinite(at.value) else None for at in found.thresholds}
    model.ensemble.save(journal.path("model/config.json").parent, {**facts, "thresholds": thresholds})
    _write_scores(journal.path("scores.csv"), score_rows(bags, plan, outputs["model"], config.task))
    pointed = _pointing(config, bags, trial, readings["model"], features)
    drawn = _heatmaps(config, bags, trial, readings["model"], features, found, catalog, journal)
    means = np.stack([features.moments(row)[0] for row in range(len(bags.rows))])
    decoded = decodability(bags, means, config.task, config.interval, config.decodability)
    journal.say(show(found, plan.checks, decoded))
    if pointed:
        journal.say("\n".join(_pointing_words(part, values) for part, values in pointed.items()))
    summary = {**found.as_dict(), "encoder_hash": bags.encoder, "cannot_say": cannot_say(found, plan.checks, decoded)}
    summary["decodability"] = decoded.as_dict()
    return {"mil": {**summary, "pointing": pointed, "heatmaps": drawn}}


def _bags(config: Config, folder: str) -> Bags:
    slides = read_manifest(config.manifest, Store(config.storage))
    return read_bags(Path(folder), slides, config.task, config.split.unit)


def _plan(config: Config, bags: Bags) -> Plan:
    return make_plan(bags, config.split)


def _fits(config: Config, bags: Bags) -> dict[str, tuple[Bags, FitConfig]]:
    """The model, and the floors that are trained like it."""
    mean = replace(config.mil, aggregator=MeanConfig("mean"))
    fits = {"model": (bags, config.mil)}
    if config.mil.aggregator.kind != "mean":
        fits["mean_pooling"] = bags, mean
    if config.floor_embeddings is not None:
        colour = _bags(config, config.floor_embeddings)
        if [bag.slide_id for bag in colour.rows] != [bag.slide_id for bag in bags.rows]:
            absent = sorted({b.slide_id for b in bags.rows} ^ {b.slide_id for b in colour.rows})
            raise BagError(f"embeddings and floor_embeddings hold different slides, such as {absent[0]}: embed the same ones")
        fits |= {f"colour_{config.mil.aggregator.kind}": (colour, config.mil), "colour_mean_pooling": (colour, mean)}
    return fits


def _tissue(catalog: Catalog | None, bags: Bags) -> dict[str, float]:
    """Tissue area, µm², by the masks of the catalog."""
    if catalog is None:
        return {}
    rows = {bag.slide_id: catalog.row(bag.slide_id) for bag in bags.rows}
    return {name: float(catalog.mask(row).sum()) * catalog.mask_mpp(row) ** 2 for name, row in rows.items()}


def _write_scores(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _foci(config: Config, slide_id: str) -> list[np.ndarray] | None:
    path = Path(config.truth) / slide_id / "foci.geojson" if config.truth else None
    return read_foci(path) if path and path.exists() else None


def _pointing(config: Config, bags: Bags, trial: Trial, readings: Sequence[Reading], features: Features) -> dict[str, Any]:
    """Pointing accuracy by part over the positive slides whose foci are known."""
    found = {}
    for part, read in (("internal", trial.internal), ("external", trial.external)):
        known = [(i, _foci(config, bags.rows[i].slide_id)) for i in read if bags.rows[i].label]
        rows = [(i, rings) for i, rings in known if rings]
        covered = [coverage(features.coords(i), bags.rows[i].size_px, rings) for i, rings in rows]
        patients = [bags.rows[i].group for i, _ in rows]
        result = pointing([readings[i].attention for i, _ in rows], covered, patients, config.interval)
        if result:
            found[part] = {**asdict(result), "gain": result.gain.as_dict(), "slides": len(rows)}
    return found


def _pointing_words(part: str, found: dict[str, Any]) -> str:
    gain = found["gain"]
    interval = f" [{gain['low']:.3f}, {gain['high']:.3f}]" if gain["low"] is not None else f" ({gain['note']})"
    hits = f"the most attended tile meets a focus in {found['hits']:.0%} of {found['slides']} positive slides"
    return f"{part}: {hits}, a random tile in {found['chance']:.1%}; gain {gain['value']:+.3f}{interval}"


def _heatmaps(
    config: Config,
    bags: Bags,
    trial: Trial,
    readings: Sequence[Reading],
    features: Features,
    found: Study,
    catalog: Catalog | None,
    journal: Journal,
) -> list[str]:
    """Write heatmaps/<slide_id>.png with its raw tiles beside it; without a catalog the raw tiles alone. Returns the names."""
    read = trial.internal + trial.external
    picked = choose([bags.rows[i].slide_id for i in read], bags.labels(read).tolist(), config.heatmap.slides, config.heatmap.seed)
    at = next((each for each in found.thresholds if math.isfinite(each.value)), found.thresholds[0])
    names = []
    for i in (read[place] for place in picked):
        bag, reading = bags.rows[i], readings[i]
        tiles = Tiles(features.coords(i), bag.size_px, reading.attention, reading.contribution[:, 0])
        path = journal.path(f"heatmaps/{bag.slide_id}.png")
        if catalog is None:
            write_tiles(path.with_suffix(".parquet"), tiles)
            continue
        row = catalog.row(bag.slide_id)
        reader = catalog.reader(row, Store(config.storage))
        mpp = catalog.level_mpps(row)[0]
        thumbnail = read_thumbnail(reader, mpp, config.heatmap.longest_px, config.heatmap.level_tolerance)
        limit = f"threshold {at.value:.3g} for {at.required:g}" if math.isfinite(at.value) else "no threshold: all flagged"
        flag = "flagged" if reading.output[0] >= at.value else "not flagged"
        label = "positive" if bag.label else "negative"
        part = "internal" if i in trial.internal else "external"
        title = f"{bag.slide_id} · {bag.site} ({part}) · {label} · score {reading.output[0]:.3f}, {limit}: {flag}"
        draw(path, thumbnail, tiles, _foci(config, bag.slide_id), title, config.heatmap)
        names.append(f"heatmaps/{path.name}")
    return names


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("mil", sys.argv[1:]))
