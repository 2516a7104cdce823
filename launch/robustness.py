"""Does an encoder see biology, or the hospital, the stain and the scanner?

    histoscale robustness encoder=runs/release dataset=folder data_root=tiles
    histoscale robustness encoder=hf:~/models/phikon dataset=folder data_root=camelyon robustness=pathorob_camelyon
    histoscale robustness encoder=timm:vit_small_patch14_dinov2.lvd142m registered=plism
    histoscale robustness encoder=runs/release dataset=cohort data_root=runs/cohort catalog=runs/catalog

data_root: any labelled patches with a site column, such as labels.csv with path, label, site, slide_id (and split, patient_id).
measures: `index` (PathoROB's robustness index, CRoMa's margins), `clusters` (its clustering score), `confounding` (its average
performance drop), `curves` (a probe under HED shift, blur, JPEG, downscale). registered: the same tiles under several scanners
and stains, as PLISM: cosine and retrieval. All with and without the `normalisations` of stain, beside an untrained
encoder and plain colour, with 95 % intervals over patients. Leaves table.txt, report.html, summary.json and findings.jsonl.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from histoscale.data.journal import Journal, JournalConfig, write_atomic
from histoscale.data.ranks import Ranks, open_ranks
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.datasets.cohort import CutConfig
from histoscale.eval.datasets.opening import MASKS, SPOTS, AnyDataset, open_dataset
from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.encoder import Encoder, open_encoder, random_floor_spec
from histoscale.eval.features import Vectors, embed_patches
from histoscale.eval.pool import check_pool
from histoscale.eval.probe import ProbeConfig
from histoscale.eval.resolution import ResolutionConfig
from histoscale.eval.robustness.confounding import check_confounding
from histoscale.eval.robustness.curves import CLEAN, CURVES, CurvesConfig, asked_rows, curve, fit_probes, questions_of
from histoscale.eval.robustness.findings import Finding, RobustnessError, summary, text_table
from histoscale.eval.robustness.perturb import METHODS, MethodsConfig, PerturbationsConfig, UnitNormaliser, normalised, perturbed
from histoscale.eval.robustness.registered import RegisteredConfig, RegisteredTiles, compare, open_registered
from histoscale.eval.robustness.report import write_robustness_report
from histoscale.eval.robustness.suite import STRUCTURE, SuiteConfig, by_slide, known_of, structure
from histoscale.eval.scores.interval import IntervalConfig
from histoscale.launch.probe import label_of

RESULT = (
    "encoder", "precision", "dataset", "data_root", "catalog", "cut", "registered", "registration", "measures", "normalisations",
    "methods", "resolution", "robustness", "perturbations", "curves", "probe", "initialisations", "interval",
)  # fmt: skip
MEASURES = (*STRUCTURE, "curves")


@dataclass(frozen=True)
class Config:
    """encoder, precision, dataset, data_root, catalog, cut, resolution, batch, threads, device: as `probe` takes them; the pool
    is probe.pool. registered: a folder with registered.csv; null where there is none. One of the two must be given.

    measures: on the labelled set. normalisations: some of none, macenko, vahadane, reinhard, fitted on each slide's own patches.
    """

    encoder: str
    precision: str
    dataset: AnyDataset
    data_root: str | None
    catalog: str
    cut: CutConfig
    registered: str | None
    registration: RegisteredConfig
    measures: list[str]
    normalisations: list[str]
    methods: MethodsConfig
    resolution: ResolutionConfig
    robustness: SuiteConfig
    perturbations: PerturbationsConfig
    curves: CurvesConfig
    probe: ProbeConfig
    initialisations: int
    interval: IntervalConfig
    batch: int
    threads: int
    device: str
    storage: StorageConfig
    logging: JournalConfig
    out: str


def identity(config: Config) -> dict[str, Any]:
    """The bytes behind the names: weights and data. Raises RobustnessError for a configuration that means nothing."""
    check(config)
    store = Store(config.storage)
    found = {"encoder_hash": open_encoder(config.encoder, store, "cpu", config.precision).hash}
    if config.data_root is not None:
        found["data_hash"] = _open(config, store).hash
    if config.registered is not None:
        found["registered_hash"] = _open_registered(config).patches.hash
    return found


def check(config: Config) -> None:
    """Mistakes are found before anything is embedded. Raises RobustnessError, ValueError for a pool."""
    check_pool(config.probe.pool)
    for name, given, known in (("measures", config.measures, MEASURES), ("normalisations", config.normalisations, METHODS)):
        wrong = sorted(set(given) - set(known))
        if wrong or not given or len(set(given)) < len(given):
            raise RobustnessError(f"{name} is {given}: expected some of {', '.join(known)}, each once")
    if config.data_root is None and config.registered is None:
        raise RobustnessError(
            "nothing to look at: give data_root= (labelled patches with sites), registered= (registered tiles), or both"
        )
    if config.encoder == "colour":
        raise RobustnessError("encoder is colour, which stands beside every encoder as a floor: give another encoder")
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
    store, ranks = Store(config.storage), open_ranks(config.device)
    encoder = open_encoder(config.encoder, store, ranks.device, config.precision)
    floor = random_floor_spec(config.encoder)
    numbers = range(config.initialisations if floor is not None else 0)
    untrained = [open_encoder(str(floor), store, ranks.device, config.precision, seed=number) for number in numbers]
    cast = Cast(label_of(config.encoder), encoder, untrained, open_encoder("colour", store, ranks.device))
    found: list[Finding] = []
    remarks: list[str] = []
    about: dict[str, Any] = {
        "encoder": encoder.name,
        "label": cast.name,
        "encoder_hash": encoder.hash,
        "precision": config.precision,
    }
    if config.data_root is not None:
        patches = _open(config, store)
        about |= {"dataset": patches.name, "data_hash": patches.hash, "classes": list(patches.classes)}
        remarks += [f"data set: {note}" for note in patches.notes]
        found += _labelled(cast, patches, config, journal, ranks, remarks)
    if config.registered is not None:
        held = _open_registered(config)
        about |= {"registered": held.patches.name, "registered_hash": held.patches.hash, "slides": len(held.slides)}
        found += _registered(cast, held, config, journal, ranks)
    if not ranks.main:
        return {}
    if not untrained:
        remarks.append("no random floor: this encoder has no architecture that could be left untrained")
    said = ["", *(f"! {remark}" for remark in remarks)]
    brief = [one for one in found if one.measure not in CURVES or (one.condition.endswith(CLEAN) and not one.minus)]
    more = ["", "curves under perturbation stand in report.html and table.txt"] if len(brief) < len(found) else []
    journal.say("\n".join([text_table(brief), *more, *said]).rstrip())
    write_atomic(journal.path("table.txt"), "\n".join([text_table(found), *said]).rstrip() + "\n")
    write_atomic(journal.path("findings.jsonl"), "".join(json.dumps(asdict(one)) + "\n" for one in found))
    title = f"Robustness of {cast.name}"
    write_robustness_report(journal.path("report.html"), title, cast.name, found, remarks, config.interval.level)
    return {"robustness": {**about, "remarks": remarks, "measures": summary(found)}}


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


def _open(config: Config, store: Store) -> LabelledPatches:
    assert config.data_root is not None
    return by_slide(open_dataset(config.dataset, config.data_root, config.catalog, config.cut, store))


def _open_registered(config: Config) -> RegisteredTiles:
    assert config.registered is not None
    return open_registered(Path(config.registered).expanduser(), config.registration, config.cut.threads)


def _embed(
    encoders: Sequence[Encoder], patches: LabelledPatches, config: Config, journal: Journal, ranks: Ranks
) -> list[Vectors]:
    folder = journal.path("features")
    return embed_patches(encoders, patches, config.resolution, config.batch, config.threads, folder, journal, ranks)


# A labelled set with sites. All ranks embed first; then one of them measures.


@dataclass(frozen=True)
class Seen:
    """Of one normalisation: features of every row, by encoder (of a floor: each initialisation), and of the rows that are tested,
    by perturbation and encoder. normaliser: what fitted the slides; None without."""

    clean: dict[str, list[Vectors]]
    changed: dict[str, dict[str, Vectors]]
    normaliser: UnitNormaliser | None


def _labelled(
    cast: Cast, patches: LabelledPatches, config: Config, journal: Journal, ranks: Ranks, remarks: list[str]
) -> list[Finding]:
    known = known_of(patches)
    questions = questions_of(patches, config.curves.folds, config.probe.seed) if "curves" in config.measures else []
    asked = asked_rows(patches, questions, known.owners, known.groups, config.curves.rows, config.interval)
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *(one.rows for one in asked)]))
    seen = {method: _look(cast, patches, known.units, method, rows, config, journal, ranks) for method in config.normalisations}
    if not ranks.main:
        return []
    found: list[Finding] = []
    measures = [measure for measure in config.measures if measure in STRUCTURE]
    for method, looked in seen.items():
        remarks += _refused(method, looked.normaliser)
        for name, each in looked.clean.items():
            floor = name != cast.name
            features = [vectors.pooled(config.probe.pool) for vectors in each]
            # clusters and training sets take long: those of floors stand beside the encoder's without normalisation
            wanted = [m for m in measures if m == "index" or method == "none" or not floor]
            more, left_out = structure(
                name, floor, method, features, known, wanted, config.robustness, config.interval, ranks.device, journal
            )
            found += more
            remarks += left_out
            if not asked:
                continue
            probed = fit_probes(features[0], questions, config.probe, str(ranks.device))
            changed = {condition: by[name].pooled(config.probe.pool) for condition, by in looked.changed.items()}
            for one in asked:
                place = np.searchsorted(rows, one.rows)
                moved = {condition: x[place] for condition, x in changed.items()}
                found += curve(name, floor, method, probed, one, features[0][one.rows], moved, len(patches.classes))
    return found


def _look(
    cast: Cast,
    patches: LabelledPatches,
    units: np.ndarray,
    method: str,
    rows: np.ndarray,
    config: Config,
    journal: Journal,
    ranks: Ranks,
) -> Seen:
    """rows: those that are perturbed; each slide is then normalised by its own colours after the perturbation."""
    clean, normaliser = normalised(patches, units, method, config.methods)
    own, *untrained, colour = _embed([cast.encoder, *cast.untrained, cast.colour], clean, config, journal, ranks)
    held = {cast.name: [own], **({"random": untrained} if untrained else {}), "colour": [colour]}
    changed: dict[str, dict[str, Vectors]] = {}
    part = patches.only(rows)
    for perturbation in config.perturbations.each() if len(rows) else ():
        pictures, _ = normalised(perturbed(part, perturbation), units[rows], method, config.methods)
        made = _embed(list(cast.single.values()), pictures, config, journal, ranks)
        changed[str(perturbation)] = dict(zip(cast.single, made, strict=True))
    return Seen(held, changed, normaliser)


def _refused(method: str, normaliser: UnitNormaliser | None) -> list[str]:
    refused = normaliser.refused() if normaliser is not None else {}
    if not refused:
        return []
    first, why = next(iter(refused.items()))
    return [f"{method} cannot be fitted on {len(refused)} slides, which pass as they are ({first}: {why})"]


# Registered tiles.


def _registered(cast: Cast, held: RegisteredTiles, config: Config, journal: Journal, ranks: Ranks) -> list[Finding]:
    seen: dict[str, list[Vectors]] = {}
    for method in config.normalisations:
        pictures, _ = normalised(held.patches, held.patches.slide_ids, method, config.methods)
        seen[method] = _embed(list(cast.single.values()), pictures, config, journal, ranks)
    if not ranks.main:
        return []
    return [
        one
        for method, made in seen.items()
        for name, vectors in zip(cast.single, made, strict=True)
        for one in compare(
            name, name != cast.name, method, vectors.pooled(config.probe.pool), held, config.registration, config.interval,
            str(ranks.device),
        )
    ]  # fmt: skip


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("robustness", sys.argv[1:]))
