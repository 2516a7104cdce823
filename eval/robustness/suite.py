"""PathoROB's measures of one labelled set: what is known of its rows, and every measure that has a meaning there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from histoscale.data.journal import Journal
from histoscale.data.names import codes
from histoscale.eval.datasets.patches import LabelledPatches, check_roles
from histoscale.eval.robustness.clusters import ClustersConfig, cluster
from histoscale.eval.robustness.confounding import ConfoundingConfig, design, performance_drop
from histoscale.eval.robustness.findings import Finding, RobustnessError
from histoscale.eval.robustness.neighbours import (
    NeighboursConfig,
    Where,
    chance,
    count,
    index_interval,
    margin_intervals,
    margins,
)
from histoscale.eval.scores.interval import IntervalConfig

STRUCTURE = ("index", "clusters", "confounding")


@dataclass(frozen=True)
class SuiteConfig:
    neighbours: NeighboursConfig
    clusters: ClustersConfig
    confounding: ConfoundingConfig


@dataclass(frozen=True)
class Known:
    """Of all rows of a set. units: [n], slides (or patients where slides are unknown). owners: [n], what intervals draw, which
    `groups` names. inside, external: int64, rows that have a role, and those at sites of their own. sites: names."""

    where: Where
    inside: np.ndarray
    external: np.ndarray
    groups: str
    sites: tuple[str, ...]

    @property
    def units(self) -> np.ndarray:
        return self.where.units

    @property
    def owners(self) -> np.ndarray:
        return self.where.owners


def by_slide(patches: LabelledPatches) -> LabelledPatches:
    """Slides in the place of patients where those are unknown, for folds and intervals: patches of a slide are no strangers.

    Raises DatasetError for a slide in two roles.
    """
    if patches.groups != "none" or (patches.slide_ids[patches.roles != ""] == "").any():
        return patches
    if patches.usage.choose != "outer":
        check_roles(patches.roles, patches.slide_ids, "slide")
    notes = [note for note in patches.notes if not note.startswith("groups: none")]
    notes.append("no patients are known: slides stand in their place, in folds and in intervals")
    slides = patches.slide_ids
    return replace(patches, patients=slides, blocks=slides, groups="slide", notes=tuple(notes))


def known_of(patches: LabelledPatches) -> Known:
    """patches: as `by_slide` gives them. Raises RobustnessError where sites are unknown, or neither slides nor patients are."""
    used = patches.roles != ""
    if (patches.sites[used] == "").any():
        absent = int((patches.sites[used] == "").sum())
        raise RobustnessError(f"{patches.name}: {absent} patches have no site: fill in the column site")
    slides = bool((patches.slide_ids[used] != "").all())
    if patches.groups == "none":
        raise RobustnessError(
            f"{patches.name}: neither slides nor patients are known, and patches of one slide are near each other anyway: "
            "fill in slide_id or patient_id"
        )
    sites = codes(patches.sites)
    names = patches.sites[np.unique(sites, return_index=True)[1]]
    where = Where(patches.labels, sites, patches.slide_ids if slides else patches.patients, patches.patients)
    external = patches.rows("external")
    return Known(where, np.setdiff1d(np.flatnonzero(used), external), external, patches.groups, tuple(map(str, names)))


def structure(
    name: str,
    floor: bool,
    normalise: str,
    features: Sequence[np.ndarray],
    known: Known,
    measures: Sequence[str],
    suite: SuiteConfig,
    interval: IntervalConfig,
    device: str | torch.device,
    journal: Journal,
) -> tuple[list[Finding], list[str]]:
    """Findings of `measures` (of STRUCTURE), and sentences of those that have no meaning on this set or not all of it.

    features: [n, D] of all rows, of equal encoders; the index is their mean, the others are of the first.
    """
    base: dict[str, Any] = {"encoder": name, "normalise": normalise, "condition": "", "groups": known.groups, "floor": floor}
    here = known.where.only(known.inside)
    inside = [x[known.inside] for x in features]
    asked: dict[str, Callable[[], list[Finding]]] = {
        "index": lambda: _index(inside, here, base, suite.neighbours, interval, device),
        "clusters": lambda: _clusters(inside[0], here, base, suite.clusters, interval, journal),
        "confounding": lambda: _drops(features[0], known, base, suite.confounding, interval, journal, remarks),
    }
    found: list[Finding] = []
    remarks: list[str] = []
    for measure in measures:
        try:
            found += asked[measure]()
        except RobustnessError as error:
            remarks.append(f"{measure} of {name}, normalisation {normalise}, is left out: {error}")
    return found, remarks


def _index(
    features: Sequence[np.ndarray],
    here: Where,
    base: dict[str, Any],
    config: NeighboursConfig,
    interval: IntervalConfig,
    device: str | torch.device,
) -> list[Finding]:
    counted = [count(x, here, config, device) for x in features]
    support = float(np.mean([(one.same[:, [1, 2]].sum(1) > 0).mean() for one in counted]))
    about = {"k": [one.k for one in counted], "by_k": counted[0].by_k, "subsets": counted[0].subsets, "support": support,
             "chance": chance(here, config.pairs)}  # fmt: skip
    spread = float(np.std([one.index for one in counted], ddof=1)) if len(counted) > 1 else None
    found = [Finding("robustness_index", interval=index_interval(counted, interval), spread=spread, about=about, **base)]
    values = margins(features[0], here, config.margin, device)
    undefined = int(np.isnan(values).sum())
    notes = [f"{undefined} patches have too few neighbours of a kind"] if undefined else []
    notes += ["of the first initialisation"] if len(features) > 1 else []
    for measure, drawn in zip(
        ("margin_median", "margin_tail"), margin_intervals(values, here.owners, config.tail, interval), strict=True
    ):
        found.append(Finding(measure, interval=drawn, note="; ".join(notes), **base))
    return found


def _clusters(
    x: np.ndarray, here: Where, base: dict[str, Any], config: ClustersConfig, interval: IntervalConfig, journal: Journal
) -> list[Finding]:
    with journal.progress(0, f"clusters of {base['encoder']}, {base['normalise']}", "pairs") as progress:
        made = cluster(x, here, config, interval, progress.advance)
    about = {"combinations": len(made.names), "clusters": list(made.clusters), "ari_biology": float(made.biology.mean()),
             "ari_site": float(made.site.mean())}  # fmt: skip
    return [Finding("clustering_score", interval=made.interval, spread=made.spread, about=about, **base)]


def _drops(
    x: np.ndarray,
    known: Known,
    base: dict[str, Any],
    config: ConfoundingConfig,
    interval: IntervalConfig,
    journal: Journal,
    remarks: list[str],
) -> list[Finding]:
    here = known.where.only(known.inside)
    made = design(here, config)
    if len(made.tables) < config.splits:
        remarks.append(
            f"confounding has {len(made.tables)} splits where {config.splits} were asked for: a class has {made.slides} training "
            "slides at a site in the balanced one; more slides, or a larger confounding.train, give more"
        )
    outside = (x[known.external], known.where.only(known.external)) if len(known.external) else None
    total = config.resamplings * len(made.tables)
    with journal.progress(total, f"training sets of {base['encoder']}, {base['normalise']}", "fits") as progress:
        dropped = performance_drop(x[known.inside], here, made, outside, config, interval, progress.advance)
    about = {"sites": [known.sites[s] for s in made.sites], "left_out": [known.sites[s] for s in made.left_out],
             "slides_a_cell": made.slides, "patches_a_slide": made.patches, "tables": made.tables.tolist()}  # fmt: skip
    parts = {"inside": (dropped.inside, dropped.drop_inside), "external": (dropped.external, dropped.drop_external)}
    found = []
    for part, (accuracy, drop) in parts.items():
        if accuracy is None or drop is None:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (accuracy[1:] / accuracy[:1]).mean(0)
        spread = float(ratio.std(ddof=1)) if len(ratio) > 1 else None
        facts = {**about, "balanced_accuracy_by_split": accuracy.mean(1).tolist()}
        found.append(Finding(f"drop_{part}", interval=drop, spread=spread, about=facts, **base))
    return found
