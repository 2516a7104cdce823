"""Slide-level models on embedding stores: trained by patient, read once on held-out patients and on sites never seen.

    histoscale mil embeddings=runs/embeddings manifest=manifest.csv task=slide task.label=tumour split=patients out=runs/mil_plain
    histoscale mil embeddings=runs/embeddings manifest=manifest.csv task=slide task.label=her2 'task.positive=[pos]' \\
        'task.negative=[neg]' split=patients 'split.external_sites=[north]' out=runs/mil_her2
    histoscale mil embeddings=runs/embeddings manifest=manifest.csv task=classes task.label=grade \\
        'task.classes={low: [1], high: [2, 3]}' split=sites out=runs/mil_grade
    histoscale mil embeddings=runs/jittered copies=2 manifest=manifest.csv task=slide task.label=tumour \\
        split=patients out=runs/mil_jitter
    histoscale mil embeddings=runs/macenko manifest=manifest.csv task=slide task.label=tumour split=patients out=runs/mil_macenko

task= says what is asked (two classes, classes, a number, a time), split= who trains and who is read (fixed parts, folds, one
site at a time), mil= the model. Give catalog= for the pages that a second reader opens, annotations= (outlines of lesions by
slide id) to measure whether attention points at them, floor_embeddings= (stores of encoder=colour) for the colour floor, and
copies= to train on the stain-jittered stores of `embed jitter.copies=`. Slides without a usable store are counted by part and
hospital, with the reason, before anything trains; stores of an `embed` that has not finished are refused unless
allow_unfinished=true. Stopped or killed, it goes on behind the models that it had trained. Leaves report.html,
slides/<slide_id>/page.html, scores.csv, model/ and summary.json.
"""

import hashlib
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from histoscale.data.catalog import Catalog, open_catalog
from histoscale.data.fingerprint import bytes_of, contents
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.manifest import read_manifest
from histoscale.data.spreadsheet import write_table
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.annotations import Annotations, coverage
from histoscale.eval.evidence.case import EvidenceConfig, Measured
from histoscale.eval.evidence.measure import pooled
from histoscale.eval.evidence.page import About
from histoscale.eval.evidence.write import choose, write_slide_pages
from histoscale.eval.hardware import ThreadsConfig, torch_threads
from histoscale.eval.inputs import read_catalog
from histoscale.eval.leakage import published_corpora
from histoscale.eval.mil.absent import Absent, absent_slides
from histoscale.eval.mil.aggregators.pooling import MeanConfig
from histoscale.eval.mil.arms import READ, Arm, Trained, read_rows, reader_of, train
from histoscale.eval.mil.bags import BagError, Bags, read_bags, reasons, spoilt, without
from histoscale.eval.mil.decodability import DecodabilityConfig, decodability
from histoscale.eval.mil.explain import Outlines, case_of, place_of
from histoscale.eval.mil.features import Features
from histoscale.eval.mil.fit import FitConfig
from histoscale.eval.mil.floors import plain_floors
from histoscale.eval.mil.folder import read_folder
from histoscale.eval.mil.leakage import leakage_chapter, leakage_checks
from histoscale.eval.mil.pointing import pointing
from histoscale.eval.mil.report import write_mil_page
from histoscale.eval.mil.score_table import score_rows
from histoscale.eval.mil.seeds import seed_values
from histoscale.eval.mil.split import SplitConfig, make_plan
from histoscale.eval.mil.study import Study, StudyConfig, study
from histoscale.eval.mil.task import BinaryTask, ClassesTask, TaskConfig
from histoscale.eval.mil.trials import Check, Plan, some
from histoscale.eval.mil.words import cannot_say, show
from histoscale.eval.scores.interval import IntervalConfig
from histoscale.eval.stores import StoreError, read_attribute, with_copies

RESULT = (
    "embeddings", "copies", "floor_embeddings", "allow_unfinished", "manifest", "annotations", "pretraining", "pretraining_roles",
    "corpora", "task", "split", "mil", "interval", "study", "decodability", "evidence",
)  # fmt: skip
INPUTS = ("embeddings", "floor_embeddings", "manifest", "catalog", "annotations", "pretraining")
MADE = ("report.html", "slides", "scores.csv", "model", "trained")
CACHES = {"trained": None}  # each file is named by what it was trained on
TRAINED = "trained"  # in `out` while it runs: <arm>/<trial>/<model>.safetensors, so that what was killed goes on


@dataclass(frozen=True)
class Config:
    """embeddings: folder of <slide_id>.h5. copies: so many stain-jittered stores of every slide train beside the plain one.

    allow_unfinished: whether the stores of an `embed` that did not finish are studied.
    floor_embeddings, catalog, annotations: null where there are none; a manifest's column `annotations` needs no folder.
    pretraining: the catalog that the encoder was pretrained on, pretraining_roles: on its slides of these roles alone; corpora:
    public collections that it saw. Null where unknown; of published encoders the corpora are then those that their authors name.
    cache_bytes: features held in memory; more slides are read again each epoch. stream.threads: that read ahead.
    hardware.threads: of torch; bags are small, and more than one thread mostly waits.
    """

    embeddings: str
    copies: int
    floor_embeddings: str | None
    allow_unfinished: bool
    manifest: str
    catalog: str | None
    annotations: str | None
    pretraining: str | None
    pretraining_roles: list[str] | None
    corpora: list[str] | None
    task: TaskConfig
    split: SplitConfig
    mil: FitConfig
    interval: IntervalConfig
    study: StudyConfig
    decodability: DecodabilityConfig
    evidence: EvidenceConfig
    cache_bytes: int
    hardware: ThreadsConfig
    stream: ThreadsConfig
    storage: StorageConfig
    logging: JournalConfig
    out: str


def identity(config: Config) -> dict[str, Any]:
    """What stands behind the names: targets, trials, encoder and tiles of every slide."""
    bags, store = _bags(config, config.embeddings), Store(config.storage)
    trials = [asdict(trial) for trial in make_plan(bags, config.split).trials]
    seen = [trials, bags.left_out, *((b.slide_id, b.group, b.site, b.target, b.event, b.tiles) for b in bags.rows)]
    bytes_of(config.manifest, store)
    floors = _bags(config, config.floor_embeddings).rows if config.floor_embeddings else ()
    stores = with_copies([bag.path for bag in bags.rows], config.copies)
    contents([*(path for each in stores for path in each), *(bag.path for bag in floors)])
    outlines = Outlines(Path(config.annotations) if config.annotations else None, Path(config.manifest), config.evidence.exclude)
    contents([path for bag in bags.rows if (path := outlines.path(bag)) is not None])
    names = [bag.slide_id for bag in bags.rows]
    return {
        "encoder_hash": bags.encoder,
        "slides": hashlib.sha256(repr(seen).encode()).hexdigest()[:16],
        "catalog": read_catalog(config.catalog, store, names) if config.catalog else None,
        "pretraining": read_catalog(config.pretraining, store) if config.pretraining else None,
    }


def run(config: Config, journal: Journal) -> dict[str, Any]:
    with torch_threads(config.hardware.threads):
        return _run(config, journal)


def _run(config: Config, journal: Journal) -> dict[str, Any]:
    bags, features = _readable(config, _bags(config, config.embeddings, journal.say), config.copies)
    absent = _absent(config, bags)
    if absent.sentence:
        journal.say("\n".join(absent.words))
    plan = make_plan(bags, config.split)
    catalog = _catalog(config, config.catalog)
    outlines = Outlines(Path(config.annotations) if config.annotations else None, Path(config.manifest), config.evidence.exclude)
    outlined = {row: drawn for row in read_rows(plan) if (drawn := outlines.of(bags.rows[row])) is not None}
    encoder = _encoder(bags)
    checks = _checks(config, bags, features, plan, catalog, encoder)
    arms = _arms(config, bags, features)
    kept = journal.path(TRAINED)
    before = len(list(kept.glob("*/*/*.safetensors")))
    if before:
        journal.say(f"{before} models are trained already; those of the same slides, stores and keys are taken as they are")
    with journal.progress(sum(arm.epochs(plan) for arm in arms.values()), "slide models", "epochs") as progress:
        trained = {name: train(arm, plan, config.task, progress, kept / name) for name, arm in arms.items()}
    model = trained.pop("model")
    floors = {name: each.outputs for name, each in trained.items()}
    floors |= plain_floors(bags, plan, config.task, _tissue(catalog, bags))
    found = study(bags, plan, model.outputs, floors, config.task, config.interval, config.study)
    means = np.stack([model.arm.features.moments(row)[0] for row in range(len(bags.rows))])
    decoded = decodability(bags, means, config.task, config.interval, config.decodability)
    seeds = seed_values(bags, plan, model.seeds, config.task)
    rows = score_rows(bags, plan, model.outputs, config.task)
    _save(journal, config, plan, model, found, rows)

    pointed = _pointing(config, plan, model, outlined)
    pages = _pages(config, plan, model, found, outlines, catalog, journal)
    links = {page.slide_id: f"slides/{quote(page.slide_id)}/page.html" for page in pages if page.picture}
    leakage, report = leakage_chapter(checks), journal.path("report.html")
    write_mil_page(report, found, checks, leakage, decoded, seeds, links, rows, encoder, absent)
    journal.say(show(found, checks, decoded, absent))
    if pointed:
        journal.say("\n".join(_pointing_words(part, values) for part, values in pointed.items()))
    summary = {
        **found.as_dict(),
        "absent": absent.as_dict(),
        "encoder_hash": bags.encoder,
        "seeds": seeds,
        "decodability": decoded.as_dict(),
        "checks": [asdict(check) for check in checks],
        "cannot_say": cannot_say(found, checks, decoded),
        "pointing": pointed,
        "slides": {page.slide_id: page.as_dict() for page in pages},
        "evidence": pooled(pages, config.interval),
        "heatmaps": [f"slides/{page.picture}" for page in pages if page.picture],
    }
    shutil.rmtree(kept)
    _say_next(config, journal, bool(pages))
    return {"mil": summary}


def _say_next(config: Config, journal: Journal, pages: bool) -> None:
    out = Path(config.out)
    drawn = f"\nopen {out / 'slides' / 'index.html'}: the slides for a second reader" if pages else ""
    journal.say(f"\nopen {out / 'report.html'}: the study{drawn}")
    other = "abmil" if config.mil.aggregator.kind == "mean" else "mean"
    again, both = shlex.quote(f"out={out}_{other}"), shlex.quote(f"runs=[{out},{out}_{other}]")
    journal.say(f"next: the same command with mil={other} {again}, and histoscale compare {both}")


def _bags(config: Config, folder: str, say: Callable[[str], None] | None = None) -> Bags:
    slides = read_manifest(config.manifest, Store(config.storage), say)
    return read_bags(Path(folder), slides, config.task, config.split.unit, config.allow_unfinished)


def _absent(config: Config, bags: Bags) -> Absent:
    slides = read_manifest(config.manifest, Store(config.storage))
    unfinished = bool(read_folder(Path(config.embeddings)).unfinished)
    return absent_slides(bags, slides, config.task, config.split, unfinished)


def _catalog(config: Config, uri: str | None) -> Catalog | None:
    return open_catalog(uri, Store(config.storage)) if uri else None


def _encoder(bags: Bags) -> str:
    """Its name in words."""
    try:
        return read_attribute(bags.rows[0].path, "encoder")
    except StoreError:  # stores of other tools name it elsewhere or nowhere
        return bags.encoder or "an encoder that the stores do not name"


def _checks(
    config: Config, bags: Bags, features: Features, plan: Plan, catalog: Catalog | None, encoder: str
) -> tuple[Check, ...]:
    """What was compared between slides that train and slides that are read. Raises SplitError for one slide on two sides."""
    corpora = published_corpora(encoder) if config.corpora is None else config.corpora
    slides = read_manifest(config.manifest, Store(config.storage))
    seen, roles = _catalog(config, config.pretraining), config.pretraining_roles
    return leakage_checks(bags, plan, slides, catalog, encoder, seen, roles, corpora, features.moments)


def _readable(config: Config, bags: Bags, copies: int) -> tuple[Bags, Features]:
    """The bags whose features can be read to the end and are finite, by one pass that the standardisation needs anyway; the
    others are left out by name. Jittered copies are read too: one that is broken is an error, not a slide that trains with fewer
    stains. Raises BagError when none is left, StoreError for a copy."""
    features = _features(config, bags, copies)
    broken = {}
    for row, bag in enumerate(bags.rows):
        try:
            features.moments(row)
        except StoreError as error:
            broken[bag.slide_id] = spoilt(error)
    if broken:
        if len(broken) == len(bags.rows):
            raise BagError(f"no store of {config.embeddings} can be read to its end: {'; '.join(reasons(broken))}")
        features = features.of([row for row, bag in enumerate(bags.rows) if bag.slide_id not in broken])
        bags = without(bags, broken)
    features.check_copies()
    return bags, features


def _arms(config: Config, bags: Bags, features: Features) -> dict[str, Arm]:
    """The model, and the floors that are trained like it."""
    mean = replace(config.mil, aggregator=MeanConfig("mean"))
    arms = {"model": Arm(bags, features, config.mil)}
    if config.mil.aggregator.kind != "mean":
        arms["mean_pooling"] = Arm(bags, features, mean)
    if config.floor_embeddings is not None:
        colour = _bags(config, config.floor_embeddings)
        colour = without(colour, {name: why for name, why in bags.left_out.items() if name not in colour.left_out})
        if [bag.slide_id for bag in colour.rows] != [bag.slide_id for bag in bags.rows]:
            name = min({b.slide_id for b in bags.rows} ^ {b.slide_id for b in colour.rows})
            why = colour.left_out.get(name) or bags.left_out.get(name) or "in one alone"
            raise BagError(f"embeddings and floor_embeddings hold different slides, such as {name} ({why}): embed the same ones")
        plain = _features(config, colour, 0)
        for row in range(len(colour.rows)):  # before hours of training, not behind them
            plain.moments(row)
        arms[f"colour_{config.mil.aggregator.kind}"] = Arm(colour, plain, config.mil)
        arms["colour_mean_pooling"] = Arm(colour, plain, mean)
    return arms


def _features(config: Config, bags: Bags, copies: int) -> Features:
    return Features(with_copies([bag.path for bag in bags.rows], copies), bags.width, config.cache_bytes, config.stream.threads)


def _tissue(catalog: Catalog | None, bags: Bags) -> dict[str, float]:
    """Tissue area, µm², by the masks of the catalog; nothing unless it holds every slide: areas of tiles are of another kind."""
    if catalog is None:
        return {}
    rows = {bag.slide_id: place for bag in bags.rows if (place := place_of(catalog, bag.slide_id)) is not None}
    if len(rows) < len(bags.rows):
        return {}
    return {name: float(catalog.mask(row).sum()) * catalog.mask_mpp(row) ** 2 for name, row in rows.items()}


def _save(journal: Journal, config: Config, plan: Plan, model: Trained, found: Study, rows: Sequence[Mapping[str, Any]]) -> None:
    """model/, the ensemble of the deployed trial with its thresholds, and scores.csv."""
    bags = model.arm.bags
    thresholds = {at.name: at.value if math.isfinite(at.value) else None for at in found.thresholds}
    facts = {"encoder_hash": bags.encoder, "mpp": bags.mpp, "task": asdict(config.task), "thresholds": thresholds}
    model.fitted[plan.deployed].ensemble.save(journal.path("model/config.json").parent, facts)
    write_table(journal.path("scores.csv"), list(rows[0]), rows)


def _pointing(config: Config, plan: Plan, model: Trained, outlined: Mapping[int, Annotations]) -> dict[str, Any]:
    """Pointing accuracy by part over the read slides that bear the finding and whose outlines are known."""
    bags, found = model.arm.bags, {}
    for part in READ:
        rows, covered = [], []
        for row, annotations in outlined.items():
            bears = bags.rows[row].label == 1 if isinstance(config.task, BinaryTask) else True
            if reader_of(plan, row)[1] == part and annotations.inside and bears and bags.rows[row].size_px:
                rows.append(row)
                covered.append(coverage(model.arm.features.coords(row), bags.rows[row].size_px, annotations))
        attention = [model.read(reader_of(plan, row)[0], row).attention for row in rows]
        result = pointing(attention, covered, [bags.rows[row].group for row in rows], config.interval)
        if result:
            found[part] = {**asdict(result), "gain": result.gain.as_dict(), "slides": len(rows)}
    return found


def _pointing_words(part: str, found: Mapping[str, Any]) -> str:
    gain = found["gain"]
    interval = f" [{gain['low']:.3f}, {gain['high']:.3f}]" if gain["low"] is not None else f" ({gain['note']})"
    hits = f"the most attended tile meets an outline in {found['hits']:.0%} of {found['slides']} outlined slides"
    return f"{part}: {hits}, a random tile in {found['chance']:.1%}; gain {gain['value']:+.3f}{interval}"


def _pages(
    config: Config, plan: Plan, model: Trained, found: Study, outlines: Outlines, catalog: Catalog | None, journal: Journal
) -> list[Measured]:
    """slides/<slide_id>/ for slides chosen by key, and the index of their pages."""
    bags, store = model.arm.bags, Store(config.storage)
    rows = [row for row in read_rows(plan) if bags.rows[row].size_px]
    sideless = [bags.rows[row].slide_id for row in read_rows(plan) if not bags.rows[row].size_px]
    if sideless:
        journal.say(f"no page can be drawn of {some(sideless)}: neither store nor coordinates tell the side of a tile")
    labels: Sequence[int] | None = bags.labels(rows).tolist() if isinstance(config.task, BinaryTask) else None
    names = [bags.rows[row].slide_id for row in rows]
    chosen = [rows[place] for place in choose(names, labels, config.evidence.slides, config.evidence.seed)]
    about = About(config.task.name, _question(config), {
        "encoder": bags.encoder, "model": config.mil.aggregator.kind, "µm per pixel": f"{bags.mpp:.3g}",
    })  # fmt: skip
    with journal.progress(len(chosen), "slide pages", "slides") as progress:
        cases = [case_of(model, plan, row, config.task, found, outlines, catalog, store) for row in chosen]
        home, threads = journal.path("slides/index.html").parent, config.stream.threads
        pages = write_slide_pages(home, cases, about, config.evidence, threads, progress.advance)
    for page in pages:
        if page.unread:
            journal.say(f"no page for {page.slide_id}: {page.unread}")
    return pages


def _question(config: Config) -> str:
    task = config.task
    match task:
        case BinaryTask():
            return f"{task.label}: {', '.join(task.positive)} against {', '.join(task.negative)}"
        case ClassesTask():
            return f"{task.label}: {', '.join(task.classes)}"
    return task.label


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("mil", sys.argv[1:]))
