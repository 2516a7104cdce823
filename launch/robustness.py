"""Does an encoder see biology, or the hospital, the stain and the scanner?

    histoscale robustness encoder=runs/release dataset=folder data_root=sites out=runs/sites
    histoscale robustness encoder=hf:~/models/phikon dataset=folder data_root=camelyon robustness=pathorob_camelyon \\
        out=runs/pathorob
    histoscale robustness encoder=timm:vit_small_patch14_dinov2.lvd142m registered=plism out=runs/plism
    histoscale robustness encoder=runs/release dataset=cohort data_root=runs/cohort out=runs/cohort_sites

data_root: any labelled patches with a site column, such as labels.csv with path, label, site, slide_id (and split, patient_id).
measures: `index` (PathoROB's robustness index, CRoMa's margins), `clusters` (its clustering score), `confounding` (its average
performance drop), `curves` (a probe under HED shift, blur, JPEG, downscale). registered: the same tiles under several scanners
and stains, as PLISM: cosine and retrieval. All with and without the `normalisations` of stain, beside an untrained
encoder and plain colour, with 95 % intervals over patients. Leaves table.txt, report.html, summary.json and findings.jsonl.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from histoscale.data.journal import Journal, JournalConfig, write_rows, write_text
from histoscale.data.ranks import Ranks, close_ranks, open_ranks
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.datasets.cohort import CutConfig
from histoscale.eval.datasets.opening import CUT, MASKS, SPOTS, AnyDataset, open_dataset
from histoscale.eval.datasets.patches import LabelledPatches, counted_classes, hash_of
from histoscale.eval.encoder import Encoder, open_encoder, random_floor_spec
from histoscale.eval.features import Vectors, embed_patches
from histoscale.eval.hardware import EncodingConfig, ThreadsConfig, torch_threads
from histoscale.eval.honest import Question
from histoscale.eval.inputs import read_catalog, read_encoder
from histoscale.eval.leakage import join_copies, twin_words
from histoscale.eval.pool import check_pool
from histoscale.eval.probe import ProbeConfig
from histoscale.eval.resolution import ResolutionConfig, TargetConfig, check_resolution
from histoscale.eval.robustness.confounding import check_confounding
from histoscale.eval.robustness.curves import CLEAN, CURVES, Asked, CurvesConfig, asked_rows, curve, fit_probes, questions_of
from histoscale.eval.robustness.findings import Finding, RobustnessError, summary, text_table
from histoscale.eval.robustness.perturb import (
    METHODS,
    MethodsConfig,
    PerturbationsConfig,
    UnitNormaliser,
    changed_rows,
    normalised,
)
from histoscale.eval.robustness.registered import RegisteredConfig, RegisteredTiles, compare, open_registered
from histoscale.eval.robustness.report import write_robustness_report
from histoscale.eval.robustness.suite import STRUCTURE, Known, SuiteConfig, by_slide, known_of, structure
from histoscale.eval.scores.interval import IntervalConfig
from histoscale.launch.probe import label_of

RESULT = (
    "encoder", "precision", "dataset", "data_root", "catalog", "grid", "registered", "registration", "measures", "normalisations",
    "methods", "resolution", "robustness", "perturbations", "curves", "probe", "initialisations", "interval",
)  # fmt: skip
INPUTS = ("encoder", "data_root", "catalog", "registered")
MADE = ("table.txt", "report.html", "findings.jsonl", "features")
CACHES = {"features": (
    "encoder", "precision", "dataset", "grid", "registration", "measures", "normalisations", "methods", "resolution",
    "perturbations", "curves", "initialisations",
)}  # fmt: skip
MEASURES = (*STRUCTURE, "curves")
FLOORS = ("random", "colour")
_PATIENCE_S = 7 * 86400.0  # ranks wait for the slowest share of the embedding; one that dies ends all of them


@dataclass(frozen=True)
class Config:
    """encoder, precision, dataset, data_root, catalog, grid, resolution, hardware, stream: as `probe` takes them; the pool is
    probe.pool. registered: a folder with registered.csv; null where there is none. One of the two must be given.

    measures: on the labelled set. normalisations: some of none, macenko, vahadane, reinhard, fitted on each slide's own patches.
    """

    encoder: str
    precision: str
    dataset: AnyDataset
    data_root: str | None
    catalog: str
    grid: TargetConfig
    registered: str | None
    registration: RegisteredConfig
    measures: list[str]
    normalisations: list[str]
    methods: MethodsConfig
    resolution: str
    robustness: SuiteConfig
    perturbations: PerturbationsConfig
    curves: CurvesConfig
    probe: ProbeConfig
    initialisations: int
    interval: IntervalConfig
    hardware: EncodingConfig
    stream: ThreadsConfig
    storage: StorageConfig
    logging: JournalConfig
    out: str


def identity(config: Config) -> dict[str, Any]:
    """The bytes behind the names: weights, data, and what tables say of it.

    Raises RobustnessError for a configuration that means nothing.
    """
    check(config)
    store = Store(config.storage)
    found = {"encoder_hash": open_encoder(config.encoder, store, "cpu", config.precision).hash}
    read_encoder(config.encoder, store)
    if config.data_root is not None:
        patches = _open(config, store)
        found["data_hash"] = patches.hash
        if config.dataset.name in CUT:
            found["catalog"] = read_catalog(config.catalog, store, patches.slide_ids.tolist())
        found["known_hash"] = hash_of(*(column.tolist() for column in (patches.sites, patches.slide_ids, patches.patients)))
    if config.registered is not None:
        held = _open_registered(config)
        found["registered_hash"] = held.patches.hash
        columns = (held.conditions, held.tiles, held.owners)
        found["registered_known_hash"] = hash_of(held.slides, *(column.tolist() for column in columns))
    return found


def check(config: Config) -> None:
    """Mistakes are found before anything is embedded. Raises RobustnessError, ValueError for a pool or a resolution."""
    check_resolution(ResolutionConfig(config.resolution, config.grid.mpp))
    check_pool(config.probe.pool)
    for name, given, known in (("measures", config.measures, MEASURES), ("normalisations", config.normalisations, METHODS)):
        wrong = sorted(set(given) - set(known))
        if wrong or not given or len(set(given)) < len(given):
            raise RobustnessError(f"{name} is {given}: expected some of {', '.join(known)}, each once")
    if config.data_root is None and config.registered is None:
        raise RobustnessError(
            "nothing to look at: give data_root= (labelled patches with sites), registered= (registered tiles), or both"
        )
    name = label_of(config.encoder)
    if name in FLOORS:
        raise RobustnessError(
            f"encoder={config.encoder} is called {name}, which stands beside every encoder as a floor: give another encoder, or "
            "rename its folder"
        )
    if config.initialisations < 1:
        raise RobustnessError(f"initialisations is {config.initialisations}: expected at least 1")
    check_confounding(config.robustness.confounding)
    for perturbation in config.perturbations.each():
        perturbation.check()
    if config.data_root is not None and config.dataset.name in (*MASKS, SPOTS):
        raise RobustnessError(f"dataset={config.dataset.name} has no class a patch: expected a labelled patch set")


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Raises RobustnessError, DatasetError for a set, and what encoders raise."""
    check(config)
    with torch_threads(config.hardware.threads):
        ranks = open_ranks(config.hardware.device, _PATIENCE_S)
        seen = _embedded(config, journal, ranks)
        close_ranks()
        return _measured(seen, config, journal, ranks.device) if ranks.main else {}


@dataclass(frozen=True)
class Cast:
    """The encoder and its floors: the same architecture untrained, and colour."""

    name: str
    encoder: Encoder
    untrained: Sequence[Encoder]
    colour: Encoder

    @property
    def single(self) -> dict[str, Encoder]:
        """One of each by name."""
        return {self.name: self.encoder, **({"random": self.untrained[0]} if self.untrained else {}), "colour": self.colour}


@dataclass(frozen=True)
class Seen:
    """All that is measured: of each set None where it is not given. registered: by normalisation, of each of Cast.single."""

    cast: Cast
    labelled: "Labelled | None"
    held: RegisteredTiles | None
    registered: dict[str, list[Vectors]]


def _embedded(config: Config, journal: Journal, ranks: Ranks) -> Seen:
    """All ranks share it; nothing is measured before they are done."""
    store = Store(config.storage)
    encoder = open_encoder(config.encoder, store, ranks.device, config.precision)
    floor = random_floor_spec(config.encoder)
    numbers = range(config.initialisations if floor is not None else 0)
    untrained = [open_encoder(str(floor), store, ranks.device, config.precision, seed=number) for number in numbers]
    cast = Cast(label_of(config.encoder), encoder, untrained, open_encoder("colour", store, ranks.device))
    patches = _open(config, store) if config.data_root is not None else None
    held = _open_registered(config) if config.registered is not None else None
    labelled = _look_labelled(cast, patches, config, journal, ranks) if patches is not None else None
    return Seen(cast, labelled, held, _look_registered(cast, held, config, journal, ranks) if held is not None else {})


def _measured(seen: Seen, config: Config, journal: Journal, device: torch.device) -> dict[str, Any]:
    """One rank measures and writes."""
    cast, labelled, held = seen.cast, seen.labelled, seen.held
    found: list[Finding] = []
    remarks: list[str] = []
    about: dict[str, Any] = {
        "encoder": cast.encoder.name,
        "label": cast.name,
        "encoder_hash": cast.encoder.hash,
        "precision": config.precision,
    }
    if labelled is not None:
        patches = labelled.patches
        about |= {"dataset": patches.name, "data_hash": patches.hash, "classes": list(patches.classes)}
        remarks += [*(f"data set: {note}" for note in patches.notes), *labelled.copies]
        found += _labelled(cast, labelled, config, journal, device, remarks)
    if held is not None:
        about |= {"registered": held.patches.name, "registered_hash": held.patches.hash, "slides": len(held.slides)}
        found += _registered(cast, held, seen.registered, config, device)
    if not cast.untrained:
        remarks.append("no random floor: this encoder has no architecture that could be left untrained")
    said = ["", *(f"! {remark}" for remark in remarks)]
    brief = [one for one in found if one.measure not in CURVES or (one.condition.endswith(CLEAN) and not one.minus)]
    more = ["", "curves under perturbation stand in report.html and table.txt"] if len(brief) < len(found) else []
    journal.say("\n".join([text_table(brief), *more, *said]).rstrip())
    write_text(journal.path("table.txt"), "\n".join([text_table(found), *said]).rstrip() + "\n")
    write_rows(journal.path("findings.jsonl"), map(asdict, found))
    title = f"Robustness of {cast.name}"
    write_robustness_report(journal.path("report.html"), title, cast.name, found, remarks, config.interval.level)
    journal.say(f"open {journal.path('report.html')}; next, {_next(config)}")
    return {"robustness": {**about, "remarks": remarks, "measures": summary(found)}}


def _next(config: Config) -> str:
    """What to type: scores on the same set, or this set beside the registered tiles."""
    if config.data_root is None:
        typed = shlex.join([f"encoder={config.encoder}", "data_root=TILES"])
        return f"labelled tiles of several sites: histoscale robustness {typed}"
    set_of = [f"dataset={config.dataset.name}", f"data_root={config.data_root}", f"out={config.out}_probe"]
    return f"what the encoder is worth there: histoscale probe {shlex.join([f'encoder={config.encoder}', *set_of])}"


def _open(config: Config, store: Store) -> LabelledPatches:
    assert config.data_root is not None
    cut = CutConfig(config.grid.mpp_tolerance, config.grid.max_upsample, config.stream.threads)
    return by_slide(open_dataset(config.dataset, config.data_root, config.catalog, cut, store))


def _open_registered(config: Config) -> RegisteredTiles:
    assert config.registered is not None
    return open_registered(Path(config.registered).expanduser(), config.registration, config.stream.threads)


def _embed(
    encoders: Sequence[Encoder], patches: LabelledPatches, config: Config, journal: Journal, ranks: Ranks
) -> list[Vectors]:
    folder, resolution = journal.path("features"), ResolutionConfig(config.resolution, config.grid.mpp)
    return embed_patches(encoders, patches, resolution, config.hardware.batch, config.stream.threads, folder, journal, ranks)


# A labelled set with sites.


@dataclass(frozen=True)
class Looked:
    """Of one normalisation: features of every row, by encoder (of a floor: each initialisation), and of the rows that are tested,
    by perturbation and encoder. normalisers: what fitted the slides, by perturbation, "" for clean patches; empty without."""

    clean: dict[str, list[Vectors]]
    changed: dict[str, dict[str, Vectors]]
    normalisers: dict[str, UnitNormaliser]


@dataclass(frozen=True)
class Labelled:
    """looked: by normalisation. rows: int64, sorted, those that are perturbed: of all `asked`, which the probes are tested on.
    copies: sentences of pictures that stand several times."""

    patches: LabelledPatches
    known: Known
    questions: list[Question]
    asked: list[Asked]
    rows: np.ndarray
    looked: dict[str, Looked]
    copies: tuple[str, ...]


def _look_labelled(cast: Cast, patches: LabelledPatches, config: Config, journal: Journal, ranks: Ranks) -> Labelled:
    slides = known_of(patches).units  # whose stains are fitted
    if ranks.main:
        journal.say("\n".join([counted_classes(patches), *(f"data set: {note}" for note in patches.notes)]))
    (seen,) = _embed([cast.colour], patches, config, journal, ranks)  # for the hashes of the pictures as they are
    assert seen.hashes is not None
    patches, copies = join_copies(patches, seen.hashes)
    copies += tuple(twin_words(seen.hashes.tolist(), patches.roles))
    known = known_of(patches)
    questions = questions_of(patches, config.curves.folds, config.probe.seed) if "curves" in config.measures else []
    asked = asked_rows(patches, questions, known.owners, known.groups, config.curves.rows, config.interval)
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *(one.rows for one in asked)]))
    looked = {method: _look(cast, patches, slides, method, rows, config, journal, ranks) for method in config.normalisations}
    return Labelled(patches, known, questions, asked, rows, looked, copies)


def _look(
    cast: Cast,
    patches: LabelledPatches,
    units: np.ndarray,
    method: str,
    rows: np.ndarray,
    config: Config,
    journal: Journal,
    ranks: Ranks,
) -> Looked:
    """rows: those that are perturbed; each slide is then normalised by its own colours after the perturbation."""
    clean, normaliser = normalised(patches, units, method, config.methods)
    own, *untrained, colour = _embed([cast.encoder, *cast.untrained, cast.colour], clean, config, journal, ranks)
    held = {cast.name: [own], **({"random": untrained} if untrained else {}), "colour": [colour]}
    normalisers = {} if normaliser is None else {"": normaliser}
    changed: dict[str, dict[str, Vectors]] = {}
    for perturbation in config.perturbations.each() if len(rows) else ():
        pictures, normaliser = changed_rows(patches, rows, units, perturbation, method, config.methods)
        made = _embed(list(cast.single.values()), pictures, config, journal, ranks)
        changed[str(perturbation)] = dict(zip(cast.single, made, strict=True))
        normalisers |= {} if normaliser is None else {str(perturbation): normaliser}
    return Looked(held, changed, normalisers)


def _refused(method: str, looked: Looked, seen: Labelled) -> list[str]:
    said = []
    for condition, normaliser in looked.normalisers.items():
        refused = normaliser.refused(seen.rows if condition else np.arange(len(seen.patches)))
        if refused:
            first, why = next(iter(refused.items()))
            when = f" under {condition}" if condition else ""
            said.append(f"{method} cannot be fitted on {len(refused)} slides{when}, which pass as they are ({first}: {why})")
    return said


def _labelled(
    cast: Cast, seen: Labelled, config: Config, journal: Journal, device: torch.device, remarks: list[str]
) -> list[Finding]:
    found: list[Finding] = []
    measures = [measure for measure in config.measures if measure in STRUCTURE]
    for method, looked in seen.looked.items():
        remarks += _refused(method, looked, seen)
        for name, each in looked.clean.items():
            floor = name != cast.name
            features = [vectors.pooled(config.probe.pool) for vectors in each]
            # clusters and training sets take long: those of floors stand beside the encoder's without normalisation
            wanted = [m for m in measures if m == "index" or method == "none" or not floor]
            more, said = structure(
                name, floor, method, features, seen.known, wanted, config.robustness, config.interval, device, journal
            )
            found += more
            remarks += [one for one in said if one not in remarks]
            if not seen.asked:
                continue
            probed = fit_probes(features[0], seen.questions, config.probe, str(device))
            changed = {condition: by[name].pooled(config.probe.pool) for condition, by in looked.changed.items()}
            for one in seen.asked:
                place = np.searchsorted(seen.rows, one.rows)
                moved = {condition: x[place] for condition, x in changed.items()}
                found += curve(name, floor, method, probed, one, features[0][one.rows], moved, len(seen.patches.classes))
    return found


# Registered tiles.


def _look_registered(
    cast: Cast, held: RegisteredTiles, config: Config, journal: Journal, ranks: Ranks
) -> dict[str, list[Vectors]]:
    seen: dict[str, list[Vectors]] = {}
    for method in config.normalisations:
        pictures, _ = normalised(held.patches, held.patches.slide_ids, method, config.methods)
        seen[method] = _embed(list(cast.single.values()), pictures, config, journal, ranks)
    return seen


def _registered(
    cast: Cast, held: RegisteredTiles, seen: dict[str, list[Vectors]], config: Config, device: torch.device
) -> list[Finding]:
    return [
        one
        for method, made in seen.items()
        for name, vectors in zip(cast.single, made, strict=True)
        for one in compare(
            name, name != cast.name, method, vectors.pooled(config.probe.pool), held, config.registration, config.interval,
            str(device),
        )
    ]  # fmt: skip


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("robustness", sys.argv[1:]))
