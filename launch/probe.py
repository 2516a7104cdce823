"""What is an encoder worth on labelled patches, and how far above an untrained one and above plain colour is it?

    histoscale probe encoder=runs/release dataset=crc data_root=~/data out=runs/crc
    histoscale probe encoder=hf:~/models/phikon dataset=pcam data_root=~/data/pcam 'protocols=[honest,eva]' out=runs/phikon_pcam
    histoscale probe encoder=hf:~/models/phikon dataset=folder data_root=tiles out=runs/phikon_own
    histoscale probe encoder=timm:vit_small_patch14_dinov2.lvd142m dataset=folder data_root=tiles out=runs/lvd_own
    histoscale probe encoder=runs/release dataset=cohort data_root=runs/cohort out=runs/cohort_probe    # with runs/cohort/catalog

dataset=folder reads labels.csv (path, label; split, patient_id, site, slide_id where known) or folders of classes; names are one
however they are written, and classes are counted before anything is fitted.
protocols=[honest] chooses inside the training patients and reads the reported labels once; protocols=[eva] trains, stops and
selects as kaiko's eva does, for comparison. Every score stands beside the floors `random` (untrained, five initialisations) and
`colour` (42 numbers), with a 95 % interval over patients. Leaves table.txt, table.md, report.html, summary.json and
predictions.npz, which `histoscale compare` reads. Sets with masks (consep, monusac) fit decoders, hest a regression.
"""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from histoscale.data.catalog import open_catalog
from histoscale.data.journal import Journal, JournalConfig, write_text
from histoscale.data.jsonfiles import read_object
from histoscale.data.ranks import Ranks, open_ranks
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.datasets.cohort import CutConfig
from histoscale.eval.datasets.hest import AVERAGED, open_hest
from histoscale.eval.datasets.masks import LabelledMasks
from histoscale.eval.datasets.opening import CUT, MASKS, SPOTS, AnyDataset, open_dataset
from histoscale.eval.datasets.patches import LabelledPatches, counted_classes
from histoscale.eval.datasets.spots import LabelledSpots
from histoscale.eval.datasets.tp53 import StudyPatches
from histoscale.eval.encoder import Encoder, open_encoder, random_floor_spec
from histoscale.eval.eva import EvaConfig, eva
from histoscale.eval.features import Vectors, embed_patches
from histoscale.eval.floors import FLOOR_POOLS, FloorsConfig
from histoscale.eval.hardware import EncodingConfig, ThreadsConfig, torch_threads
from histoscale.eval.honest import HonestConfig, check_probes, colour_floor, honest, random_floor
from histoscale.eval.inputs import read_catalog, read_encoder
from histoscale.eval.leakage import (
    Sourced,
    corpus_of_catalog,
    find_leaks,
    join_copies,
    published_corpora,
    recorded_corpora,
    shared_sources,
    trained_rows,
    twin_words,
)
from histoscale.eval.patch_report import ReportConfig, Segmentation, Segmented, SetResults, write_patch_report
from histoscale.eval.pool import check_pool
from histoscale.eval.predictions import FILE, Predictions, predictions_of, save_predictions
from histoscale.eval.probe import ProbeConfig
from histoscale.eval.regression import Embedded, RegressionConfig, average, run_hest
from histoscale.eval.resolution import ResolutionConfig, TargetConfig, check_resolution, sight_of, view_of
from histoscale.eval.results import Outcome, Score
from histoscale.eval.scores.interval import Interval
from histoscale.eval.scoring import ScoringConfig, Truth, check_metrics, score
from histoscale.eval.scoring import Seen as Sight
from histoscale.eval.segment import SegmentConfig, run_segmentation
from histoscale.eval.table import is_few_shot, summary
from histoscale.eval.table_text import markdown_table, terminal_table
from histoscale.eval.within_study import LEAST, prior_outcomes, within_study_scores

RESULT = (
    "encoder", "precision", "dataset", "data_root", "catalog", "pretraining", "pretraining_roles", "grid", "protocols",
    "resolution", "probe", "honest", "eva", "segment", "regression", "floors", "scoring", "report",
)  # fmt: skip
INPUTS = ("encoder", "data_root", "catalog", "pretraining")
MADE = ("table.txt", "table.md", "report.html", "features", "segment", FILE)
CACHES = {"features": ("encoder", "precision", "dataset", "grid", "resolution", "protocols", "floors")}
PROTOCOLS = ("honest", "eva")
EVA_INPUT = ResolutionConfig("eva", None)


@dataclass(frozen=True)
class Config:
    """encoder: a release, a checkpoint, timm:<name>, hf:<name or folder>, hf-hub:<name>, random:<one of these> or colour.
    precision: fp32, bf16, fp16 or auto (launch/precision.py).

    data_root: the folder of the labelled set. catalog: of its slides (dataset=cohort, tp53). pretraining: a catalog that the
    encoder was pretrained on, whose slides and patients are looked for in the set; null where there is none.
    pretraining_roles: it was pretrained on the slides of these roles alone; null: on all.
    protocols: honest, eva or both. resolution: resize, eva or native (eval/resolution.py). stream.threads read and decode ahead.
    """

    encoder: str
    precision: str
    dataset: AnyDataset
    data_root: str
    catalog: str
    pretraining: str | None
    pretraining_roles: list[str] | None
    grid: TargetConfig
    protocols: list[str]
    resolution: str
    probe: ProbeConfig
    honest: HonestConfig
    eva: EvaConfig
    segment: SegmentConfig
    regression: RegressionConfig
    floors: FloorsConfig
    scoring: ScoringConfig
    report: ReportConfig
    hardware: EncodingConfig
    stream: ThreadsConfig
    storage: StorageConfig
    logging: JournalConfig
    out: str


@dataclass
class Found:
    """What one set gave. about: plain facts for the summary."""

    scores: list[Score]
    predictions: Predictions | None = None
    sets: list[SetResults] = field(default_factory=list)
    segmentations: list[Segmentation] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def identity(config: Config) -> dict[str, Any]:
    """The bytes behind the names: weights and data. Raises ValueError for a protocol, probe or metric that is none."""
    check(config)
    store = Store(config.storage)
    encoder = open_encoder(config.encoder, store, "cpu", config.precision)
    read_encoder(config.encoder, store)
    opened = open_labelled(config, store)
    hashes = [one.hash for one in opened] if isinstance(opened, list) else opened.hash
    pretraining = read_catalog(config.pretraining, store) if config.pretraining else None
    slides = opened.slide_ids.tolist() if isinstance(opened, LabelledPatches) else []
    catalog = read_catalog(config.catalog, store, slides) if config.dataset.name in CUT else None
    return {"encoder_hash": encoder.hash, "data_hash": hashes, "pretraining": pretraining, "catalog": catalog}


def open_labelled(config: Config, store: Store) -> LabelledPatches | LabelledMasks | list[LabelledSpots]:
    """Raises DatasetError for an unknown name or a set that cannot be used."""
    dataset: Any = config.dataset
    root = Path(config.data_root).expanduser()
    if dataset.name in MASKS:
        return MASKS[dataset.name](root, dataset)
    if dataset.name == SPOTS:
        return open_hest(root, dataset)
    cut = CutConfig(config.grid.mpp_tolerance, config.grid.max_upsample, config.stream.threads)
    return open_dataset(dataset, config.data_root, config.catalog, cut, store)


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Raises ValueError for a configuration that cannot be, DatasetError for a set, and what encoders raise."""
    check(config)
    with torch_threads(config.hardware.threads):
        return _run(config, journal)


def _run(config: Config, journal: Journal) -> dict[str, Any]:
    store, ranks = Store(config.storage), open_ranks(config.hardware.device)
    opened = open_labelled(config, store)
    encoder = open_encoder(config.encoder, store, ranks.device, config.precision)
    floor = random_floor_spec(config.encoder)
    numbers = range(config.floors.initialisations if floor is not None else 0)
    untrained = [open_encoder(str(floor), store, ranks.device, config.precision, seed=number) for number in numbers]
    colour = open_encoder("colour", store, ranks.device)
    name = label_of(config.encoder)
    if isinstance(opened, list):
        found = _spots(name, encoder, untrained, opened, config, journal, ranks)
    elif isinstance(opened, LabelledMasks):
        found = _masks(name, encoder, untrained, opened, config, journal, ranks)
    else:
        found = _patches(name, encoder, untrained, colour, opened, config, journal, ranks)
    if not ranks.main:  # the others shared the embedding
        return {}
    first = _reported(opened[0].as_patches()) if isinstance(opened, list) else opened
    remarks = [*_leaks(encoder, first, config, store), *found.remarks, *(f"data set: {note}" for note in first.notes)]
    if not untrained:
        remarks.append("no random floor: this encoder has no architecture that could be left untrained")
    _write(name, found, remarks, config, journal)
    typed = shlex.join([f"runs=[{config.out},OTHER_OUT]", f"out={config.out}_compare"])
    journal.say(f"open {journal.path('report.html')}; next, beside another encoder on the same set: histoscale compare {typed}")
    about: dict[str, Any] = {"encoder": encoder.name, "label": name, "encoder_hash": encoder.hash, "precision": config.precision}
    about |= {"dataset": config.dataset.name, "transductive": encoder.transductive, "remarks": remarks, **found.about}
    return {"probe": {**about, "scores": summary(found.scores)}}


def label_of(spec: str) -> str:
    """A short name for tables: the last part of a path, else the spec."""
    prefix, _, place = spec.rpartition(":")
    path = Path(place).expanduser()
    return f"{prefix}:{path.name}".removeprefix(":") if path.exists() else spec


def check(config: Config) -> None:
    """Mistakes are found before anything is embedded. Raises ValueError."""
    check_resolution(ResolutionConfig(config.resolution, config.grid.mpp))
    for pool in (config.probe.pool, config.eva.pool, *config.honest.pools):
        check_pool(pool)
    check_probes(config.honest)
    check_metrics(config.scoring)
    wrong = sorted(set(config.protocols) - set(PROTOCOLS))
    if wrong or not config.protocols:
        raise ValueError(f"protocols is {config.protocols}: expected one or both of {', '.join(PROTOCOLS)}")
    if config.dataset.name == "pcam_10shot" and (config.honest.few_shot.shots != [10] or config.eva.shots != 10):
        raise ValueError(
            f"dataset=pcam_10shot learns from 10 tiles of each class, but honest.few_shot.shots is "
            f"{config.honest.few_shot.shots} and eva.shots {config.eva.shots}: add honest.few_shot.shots=[10] eva=ten_shot"
        )


# Patches with a class each.


def _patches(
    name: str,
    encoder: Encoder,
    untrained: Sequence[Encoder],
    colour: Encoder,
    patches: LabelledPatches,
    config: Config,
    journal: Journal,
    ranks: Ranks,
) -> Found:
    found = Found([])
    encoders = [encoder, *untrained, colour]
    outcomes: dict[str, list[Outcome]] = {}
    features: dict[str, np.ndarray] = {}
    truth = Truth(patches)
    if ranks.main:
        _say_set(patches, journal)
    for protocol in config.protocols:
        resolution = EVA_INPUT if protocol == "eva" else ResolutionConfig(config.resolution, config.grid.mpp)
        if protocol == "eva" and not patches.usage.eva_select:
            found.remarks.append("protocol=eva left out: the set has no part that eva would select on")
            continue
        vectors = embed_patches(
            encoders, patches, resolution, config.hardware.batch, config.stream.threads, journal.path("features"), journal, ranks
        )
        if not ranks.main:
            continue
        patches, joined = join_copies(patches, _hashes(vectors[0]))
        for sentence in joined:
            journal.say(sentence)
        found.remarks += joined
        seen = _sights(name, encoders, vectors[0], resolution, patches)
        journal.say(f"{name} on {patches.name}, protocol {protocol}, resolution {resolution.name}: {_words(seen[name])}")
        asked = _eva if protocol == "eva" else _honest
        made = asked(name, vectors[0], vectors[1:-1], vectors[-1], patches, config, ranks)
        if config.dataset.name == "pcam_10shot":
            made = [outcome for outcome in made if is_few_shot(outcome.probe)]
        if isinstance(patches, StudyPatches):
            found.scores += _within_studies(made, patches, seen, protocol, config)
        else:
            found.scores += score(made, patches, truth, seen, config.scoring)
        outcomes.setdefault(resolution.name, []).extend(made)
        found.remarks += twin_words(_hashes(vectors[0]).tolist(), patches.roles)
        features[name] = vectors[0].pooled(config.probe.pool)
    if not outcomes:
        return found
    # The draws of few-shot probes would make the file large.
    kept = {key: [o for o in made if not is_few_shot(o.probe)] for key, made in outcomes.items()}
    found.predictions = predictions_of(patches, kept, found.scores, {name: encoder.hash})
    found.sets = [SetResults(patches, outcomes, features)]
    found.remarks = list(dict.fromkeys(found.remarks))
    if truth.reads:
        found.remarks.append(f"{truth} (how often the labels of a part were opened, each time after all was fitted)")
    if patches.groups == "none":
        found.remarks.append("groups: none; no patients are known: intervals take images as independent and are too narrow")
    if not len(patches.rows("external")):
        found.remarks.append("no external site: nothing is said about other hospitals")
    train = patches.rows("train")
    found.about = {"data_hash": patches.hash, "classes": list(patches.classes), "groups": patches.groups,
                   "train": f"{len(train)} images of {len(np.unique(patches.patients[train]))} groups"}  # fmt: skip
    return found


def _say_set(patches: LabelledPatches, journal: Journal) -> None:
    """What the set holds, before anything is fitted."""
    journal.say("\n".join([counted_classes(patches), *(f"data set: {note}" for note in patches.notes)]))


def _honest(
    name: str, own: Vectors, untrained: Sequence[Vectors], colour: Vectors, patches: LabelledPatches, config: Config, ranks: Ranks
) -> list[Outcome]:
    """The primary pool first, which summaries and cards show."""
    pools = [config.probe.pool, *(pool for pool in config.honest.pools if pool != config.probe.pool)]
    with_tokens = pools if own.mean.shape[1] else pools[:1]
    rest = (patches, config.honest, config.probe)
    made = [one for pool in with_tokens for one in honest([own.pooled(pool)], name, pool, *rest, ranks.device)]
    if untrained:
        made += random_floor({pool: [v.pooled(pool) for v in untrained] for pool in FLOOR_POOLS}, *rest, ranks.device)
    return made + colour_floor(colour.cls, *rest, config.floors, ranks.device)


def _eva(
    name: str, own: Vectors, untrained: Sequence[Vectors], colour: Vectors, patches: LabelledPatches, config: Config, ranks: Ranks
) -> list[Outcome]:
    """The encoder, the untrained ones with one run each, and colour."""
    pool, one = config.eva.pool, replace(config.eva, runs=1)
    made = eva(own.pooled(pool), name, pool, patches, config.eva, ranks.device)
    each = [eva(v.pooled(pool), "random", pool, patches, one, ranks.device) for v in untrained]
    made += [replace(parts[0], logs=np.concatenate([p.logs for p in parts])) for parts in zip(*each, strict=True)]
    return made + eva(colour.cls, "colour", "42 numbers", patches, config.eva, ranks.device)


def _sights(
    name: str, encoders: Sequence[Encoder], own: Vectors, resolution: ResolutionConfig, patches: LabelledPatches
) -> dict[str, Sight]:
    assert own.sizes is not None
    found = {}
    for label, encoder in ((name, encoders[0]), ("random", encoders[0]), ("colour", encoders[-1])):
        sight = sight_of(own.sizes, view_of(encoder.size_px, encoder.interpolation, resolution, patches.mpp), patches.mpp)
        mpp = None if sight.effective_mpp is None else sight.effective_mpp.median
        found[label] = Sight(resolution.name, mpp, None if sight.field_um is None else sight.field_um.median)
    return found


def _words(sight: Sight) -> str:
    if sight.effective_mpp is None:
        return "the set's µm/px are unknown"
    return f"the encoder sees {sight.effective_mpp:.4g} µm/px, a field of {sight.field_um:.4g} µm"


def _within_studies(
    made: Sequence[Outcome], patches: StudyPatches, seen: Mapping[str, Sight], protocol: str, config: Config
) -> list[Score]:
    """Inside studies alone: a pooled score would reward telling organs apart. Priors that see no pixel stand beside."""
    priors = prior_outcomes(patches) if protocol == "honest" else []
    found = []
    for outcome in [*(o for o in made if not is_few_shot(o.probe)), *priors]:
        sight = seen.get(outcome.encoder, Sight("", None, None))
        floor = outcome.encoder not in seen or outcome.encoder in ("random", "colour")
        nothing = Interval(math.nan, None, None, 0, 0, "")
        form = Score(
            patches.name, "", "", sight.resolution, protocol, "", "", "", nothing, patches.groups, 1, None,
            sight.effective_mpp, sight.field_um, floor, "", "",
        )  # fmt: skip
        found += within_study_scores(patches, [outcome], form, LEAST, config.scoring.interval)
    return found


def _hashes(own: Vectors) -> np.ndarray:
    assert own.hashes is not None
    return own.hashes


def _reported(patches: LabelledPatches) -> LabelledPatches:
    """Spots are tested in one split or another: all of them are looked for in what an encoder saw."""
    return replace(patches, roles=np.full(len(patches), "report"))


# Spots with numbers each, and images with a class for every pixel.


def _spots(
    name: str,
    encoder: Encoder,
    untrained: Sequence[Encoder],
    tasks: Sequence[LabelledSpots],
    config: Config,
    journal: Journal,
    ranks: Ranks,
) -> Found:
    found, resolution = Found([]), ResolutionConfig(config.resolution, config.grid.mpp)
    colour = open_encoder("colour", Store(config.storage), ranks.device)
    for spots in tasks:
        patches, encoders = spots.as_patches(), [encoder, *untrained, colour]
        vectors = embed_patches(
            encoders, patches, resolution, config.hardware.batch, config.stream.threads, journal.path("features"), journal, ranks
        )
        if not ranks.main:
            continue
        seen = _sights(name, encoders, vectors[0], resolution, patches)

        def row(label: str, pool: str, held: Sequence[Vectors], floor: bool, seen: dict[str, Sight] = seen) -> Embedded:
            features, sight = [v.pooled(pool) for v in held], seen[label]
            return Embedded(label, pool, sight.resolution, features, sight.effective_mpp, sight.field_um, floor)

        rows = [row(name, config.probe.pool, vectors[:1], False)]
        rows += [row("random", pool, vectors[1:-1], True) for pool in FLOOR_POOLS if untrained]
        rows.append(row("colour", "cls", vectors[-1:], True))
        found.scores += run_hest(rows, spots, config.regression, config.scoring.interval)
    if ranks.main:
        found.scores += average(found.scores, AVERAGED)
        found.about = {"data_hash": [spots.hash for spots in tasks], "groups": tasks[0].groups}
    return found


def _masks(
    name: str,
    encoder: Encoder,
    untrained: Sequence[Encoder],
    masks: LabelledMasks,
    config: Config,
    journal: Journal,
    ranks: Ranks,
) -> Found:
    if not ranks.main:  # decoders are fitted by one process
        return Found([])
    folder, interval = journal.path("segment"), config.scoring.interval
    made = run_segmentation([encoder], untrained, masks, config.segment, interval, config.hardware.batch, folder, journal)
    rename = {encoder.name: name}
    scores = [_named(score, rename) for score in [*made.scores, *made.per_class]]
    images = [
        Segmented(one.image, one.pixels.transpose(1, 2, 0), one.truth, one.predicted, f"protocol {one.protocol}")
        for one in made.examples
        if one.encoder == encoder.name
    ]
    beyond = masks.ignore is not None and masks.ignore >= len(masks.classes)
    classes = (*masks.classes, "ambiguous") if beyond else masks.classes
    page = Segmentation(masks.name, name, classes, masks.ignore, images)
    return Found(scores, segmentations=[page], about={"data_hash": masks.hash, "groups": masks.groups})


def _named(score: Score, names: Mapping[str, str]) -> Score:
    return replace(score, encoder=names.get(score.encoder, score.encoder), minus=names.get(score.minus, score.minus))


# What is said and written.


def _leaks(encoder: Encoder, labelled: Sourced, config: Config, store: Store) -> list[str]:
    """Overlap with what the encoder was pretrained on, by ids and by collections, in sentences."""
    said = []
    if config.pretraining is not None:
        pretraining = open_catalog(config.pretraining, store)
        corpus = corpus_of_catalog(pretraining, trained_rows(pretraining, config.pretraining_roles))
        said += [leak.sentence() for leak in find_leaks(labelled, corpus)]
        said += shared_sources(config.dataset.name, corpus.corpora)
        if not said:
            said.append(f"no slide or patient of this set is in the pretraining catalog {config.pretraining}")
    place = f"{config.encoder}/MODEL.json"
    named = recorded_corpora(read_object(Path(place))) if "://" not in config.encoder and Path(place).is_file() else ()
    known = published_corpora(config.encoder)
    said += shared_sources(config.dataset.name, [*named, *(known or ())])
    if encoder.transductive:
        said.append("transductive: pretraining saw the reported patients, without their labels")
    return list(dict.fromkeys(said))


def _write(name: str, found: Found, remarks: Sequence[str], config: Config, journal: Journal) -> None:
    level, table = config.scoring.interval.level, config.report.table
    shown = [score for score in found.scores if not is_few_shot(score.probe)] or found.scores
    if len(shown) < len(found.scores):
        remarks = [*remarks, "probes on a few images of each class stand in report.html and summary.json"]
    words = terminal_table(shown, level, table)
    said = "\n".join(f"! {remark}" for remark in remarks)
    journal.say(f"{words}\n{said}")
    write_text(journal.path("table.txt"), f"{words}\n{said}\n")
    listed = "\n".join(f"- {remark}" for remark in remarks)
    write_text(journal.path("table.md"), f"{markdown_table(shown, level, table)}\n{listed}\n")
    title = f"{name} on {config.dataset.name}"
    write_patch_report(
        journal.path("report.html"), title, found.scores, level, config.report, found.sets, found.segmentations, [],
        remarks,
    )  # fmt: skip
    if found.predictions is not None:
        save_predictions(journal.path(FILE), found.predictions)


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("probe", sys.argv[1:]))
