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
from histoscale.eval.features import embed_patches
from histoscale.eval.pool import check_pool
from histoscale.eval.probe import ProbeConfig
from histoscale.eval.resolution import ResolutionConfig
from histoscale.eval.robustness.clusters import ClustersConfig, cluster
from histoscale.eval.robustness.confounding import ConfoundingConfig, check_confounding, design, performance_drop
from histoscale.eval.robustness.curves import CurvesConfig, asked_rows, curve, fit_probes, questions_of
from histoscale.eval.robustness.findings import Finding, RobustnessError, summary, text_table
from histoscale.eval.robustness.neighbours import NeighboursConfig, Where, count, index_interval, margin_intervals, margins
from histoscale.eval.robustness.perturb import METHODS, MethodsConfig, PerturbationsConfig, normalised, perturbed
from histoscale.eval.robustness.registered import RegisteredConfig, RegisteredTiles, compare, open_registered
from histoscale.eval.robustness.report import write_robustness_report
from histoscale.eval.scores.interval import IntervalConfig
from histoscale.launch.probe import label_of

RESULT = (
    "encoder", "precision", "dataset", "data_root", "catalog", "cut", "registered", "registration", "measures", "normalisations",
    "methods", "resolution", "robustness", "perturbations", "curves", "probe", "initialisations", "interval",
)  # fmt: skip
MEASURES = ("index", "clusters", "confounding", "curves")


@dataclass(frozen=True)
class SuiteConfig:
    neighbours: NeighboursConfig
    clusters: ClustersConfig
    confounding: ConfoundingConfig


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
    words = "\n".join([text_table(found), "", *(f"! {remark}" for remark in remarks)]).rstrip()
    journal.say(words)
    write_atomic(journal.path("table.txt"), words + "\n")
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
    return open_dataset(config.dataset, config.data_root, config.catalog, config.cut, store)


def _open_registered(config: Config) -> RegisteredTiles:
    assert config.registered is not None
    return open_registered(Path(config.registered).expanduser(), config.registration, config.cut.threads)


def _embed(
    encoders: Sequence[Encoder], patches: LabelledPatches, config: Config, journal: Journal, ranks: Ranks
) -> list[np.ndarray]:
    """Features [n, D] of each, pooled as probe.pool says."""
    folder = journal.path("features")
    found = embed_patches(encoders, patches, config.resolution, config.batch, config.threads, folder, journal, ranks)
    return [vectors.pooled(config.probe.pool) for vectors in found]


# A labelled set with sites.


@dataclass(frozen=True)
class Known:
    """units: [n], slides (or patients where slides are unknown). owners: [n], what intervals draw, which `groups` names."""

    units: np.ndarray
    owners: np.ndarray
    groups: str


def known_of(patches: LabelledPatches) -> Known:
    """Raises RobustnessError where sites are unknown, or neither slides nor patients are."""
    used = patches.roles != ""
    if (patches.sites[used] == "").any():
        raise RobustnessError(
            f"{patches.name}: {int((patches.sites[used] == '').sum())} patches have no site: fill in the column site"
        )
    slides = bool((patches.slide_ids[used] != "").all())
    if not slides and patches.groups == "none":
        raise RobustnessError(
            f"{patches.name}: neither slides nor patients are known, and patches of one slide are near each other anyway: "
            "fill in slide_id or patient_id"
        )
    units = patches.slide_ids if slides else patches.patients
    return Known(units, *((patches.slide_ids, "slide") if patches.groups == "none" else (patches.patients, patches.groups)))


def _labelled(
    cast: Cast, patches: LabelledPatches, config: Config, journal: Journal, ranks: Ranks, remarks: list[str]
) -> list[Finding]:
    known = known_of(patches)
    sites = np.unique(patches.sites, return_inverse=True)[1]
    everything = Where(patches.labels, sites, known.units, known.owners)
    inside = np.flatnonzero((patches.roles != "") & (patches.roles != "external"))
    encoders = [cast.encoder, *cast.untrained, cast.colour]
    found: list[Finding] = []
    for method in config.normalisations:
        clean, normaliser = normalised(patches, known.units, method, config.methods)
        features = _embed(encoders, clean, config, journal, ranks)
        if ranks.main:
            refused = normaliser.refused() if normaliser is not None else {}
            if refused:
                first, why = next(iter(refused.items()))
                remarks.append(f"{method} cannot be fitted on {len(refused)} slides, which pass as they are ({first}: {why})")
            held = {cast.name: features[:1], "random": features[1:-1], "colour": features[-1:]}
            found += _structure(cast, held, everything, inside, patches, known, method, config, journal, remarks)
        if "curves" in config.measures:
            chosen = dict(zip(cast.single, [features[0], *features[1:2][: len(cast.untrained)], features[-1]], strict=True))
            found += _curves(cast, chosen, patches, known, method, config, journal, ranks)
    return found


def _structure(
    cast: Cast,
    features: dict[str, list[np.ndarray]],
    where: Where,
    inside: np.ndarray,
    patches: LabelledPatches,
    known: Known,
    method: str,
    config: Config,
    journal: Journal,
    remarks: list[str],
) -> list[Finding]:
    """Index, clusters and performance drop; the last two of floors only without normalisation. What has no meaning is said."""
    suite, here = config.robustness, where.only(inside)
    external = patches.rows("external")
    found: list[Finding] = []
    for name, each in features.items():
        floor = name != cast.name
        base: dict[str, Any] = {"encoder": name, "normalise": method, "condition": "", "groups": known.groups, "floor": floor}
        if not each:
            continue
        try:
            if "index" in config.measures:
                found += _index([x[inside] for x in each], here, base, config)
            if "clusters" in config.measures and (method == "none" or not floor):
                with journal.progress(0, f"clusters of {name}, {method}", "pairs") as progress:
                    made = cluster(each[0][inside], here, suite.clusters, config.interval, progress.advance)
                about = {"combinations": len(made.names), "clusters": list(made.clusters),
                         "ari_biology": float(made.biology.mean()), "ari_site": float(made.site.mean())}  # fmt: skip
                found.append(Finding("clustering_score", interval=made.interval, spread=made.spread, about=about, **base))
            if "confounding" in config.measures and (method == "none" or not floor):
                found += _drops(each[0], here, inside, where, external, patches, base, config, journal)
        except RobustnessError as error:
            remarks.append(f"left out for {name}, {method}: {error}")
    return found


def _index(features: list[np.ndarray], here: Where, base: dict[str, Any], config: Config) -> list[Finding]:
    suite, device = config.robustness.neighbours, open_ranks(config.device).device
    counted = [count(x, here, suite, device) for x in features]
    about = {"k": [one.k for one in counted], "by_k": counted[0].by_k, "subsets": counted[0].subsets,
             "support": float(np.mean([(one.same[:, [1, 2]].sum(1) > 0).mean() for one in counted]))}  # fmt: skip
    spread = float(np.std([one.index for one in counted], ddof=1)) if len(counted) > 1 else None
    found = [Finding("robustness_index", interval=index_interval(counted, config.interval), spread=spread, about=about, **base)]
    values = margins(features[0], here, suite.margin, device)
    middle, tail = margin_intervals(values, here.owners, suite.tail, config.interval)
    undefined = int(np.isnan(values).sum())
    note = f"{undefined} patches have too few neighbours of a kind" if undefined else ""
    note = "; ".join(filter(None, (note, "of the first initialisation" if len(features) > 1 else "")))
    return [
        *found,
        Finding("margin_median", interval=middle, note=note, **base),
        Finding("margin_tail", interval=tail, note=note, **base),
    ]


def _drops(
    x: np.ndarray,
    here: Where,
    inside: np.ndarray,
    where: Where,
    external: np.ndarray,
    patches: LabelledPatches,
    base: dict[str, Any],
    config: Config,
    journal: Journal,
) -> list[Finding]:
    suite = config.robustness.confounding
    made = design(here, suite)
    outside = (x[external], where.only(external)) if len(external) else None
    with journal.progress(suite.resamplings * len(made.tables), f"training sets of {base['encoder']}", "fits") as progress:
        dropped = performance_drop(x[inside], here, made, outside, suite, config.interval, progress.advance)
    names = np.unique(patches.sites)
    about = {"sites": [str(names[s]) for s in made.sites], "left_out": [str(names[s]) for s in made.left_out],
             "slides_a_cell": made.slides, "patches_a_slide": made.patches, "tables": made.tables.tolist()}  # fmt: skip
    found = []
    for part, accuracy, drop in (
        ("inside", dropped.inside, dropped.drop_inside),
        ("external", dropped.external, dropped.drop_external),
    ):
        if accuracy is None or drop is None:
            continue
        ratio = (accuracy[1:] / accuracy[:1]).mean(0)
        spread = float(ratio.std(ddof=1)) if len(ratio) > 1 else None
        facts = {**about, "balanced_accuracy_by_split": accuracy.mean(1).tolist()}
        found.append(Finding(f"drop_{part}", interval=drop, spread=spread, about=facts, **base))
    return found


def _curves(
    cast: Cast,
    features: dict[str, np.ndarray],
    patches: LabelledPatches,
    known: Known,
    method: str,
    config: Config,
    journal: Journal,
    ranks: Ranks,
) -> list[Finding]:
    """Probes of clean patches on perturbed ones; both normalised alike, each slide by its own colours after the perturbation."""
    questions = questions_of(patches, config.curves.folds, config.probe.seed)
    asked = asked_rows(patches, questions, known.owners, known.groups, config.curves.rows, config.interval)
    rows = np.unique(np.concatenate([one.rows for one in asked]))
    part, units = patches.only(rows), known.units[rows]
    changed: dict[str, dict[str, np.ndarray]] = {name: {} for name in features}
    for perturbation in config.perturbations.each():
        seen, _ = normalised(perturbed(part, perturbation), units, method, config.methods)
        for name, x in zip(features, _embed(list(cast.single.values()), seen, config, journal, ranks), strict=True):
            changed[name][str(perturbation)] = x
    if not ranks.main:
        return []
    found: list[Finding] = []
    for name, x in features.items():
        probed = fit_probes(x, questions, config.probe, str(ranks.device))
        for one in asked:
            place = np.searchsorted(rows, one.rows)
            here = {condition: moved[place] for condition, moved in changed[name].items()}
            found += curve(name, name != cast.name, method, probed, one, x[one.rows], here, len(patches.classes))
    return found


# Registered tiles.


def _registered(cast: Cast, held: RegisteredTiles, config: Config, journal: Journal, ranks: Ranks) -> list[Finding]:
    found: list[Finding] = []
    for method in config.normalisations:
        seen, _ = normalised(held.patches, held.patches.slide_ids, method, config.methods)
        features = _embed(list(cast.single.values()), seen, config, journal, ranks)
        for name, x in zip(cast.single, features, strict=True):
            if ranks.main:
                floor = name != cast.name
                found += compare(name, floor, method, x, held, config.registration, config.interval, str(ranks.device))
    return found


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("robustness", sys.argv[1:]))
