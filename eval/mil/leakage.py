"""The leakage page of a study: what was compared between the slides that train and those that are read, and with what an encoder
saw in pretraining."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.data.catalog import Catalog
from histoscale.data.manifest import Slide
from histoscale.data.names import site_key
from histoscale.data.splits import SplitError
from histoscale.eval.leakage import corpus_of_catalog, find_leaks, same_collection, trained_rows
from histoscale.eval.mil.bags import Bag, Bags
from histoscale.eval.mil.lookalikes import Moments, Pair, alike, equal_files, equal_tiles
from histoscale.eval.mil.trials import PARTS, Check, Plan, some
from histoscale.eval.page import Cell, Chapter, Grid, Part, Prose

_SHOWN = 4
_ROLE_OF = {"train": "train", "internal": "report", "external": "external"}
LIMITS = (
    "Not looked for: sections of one block under different ids, one patient under different ids at two hospitals, a second scan "
    "in another frame, and what a published encoder saw beyond the collections that its authors name."
)


def leakage_checks(
    bags: Bags,
    plan: Plan,
    slides: Sequence[Slide],
    catalog: Catalog | None,
    encoder: str,
    pretraining: Catalog | None,
    roles: Sequence[str] | None,
    corpora: Sequence[str] | None,
    moments: Moments | None = None,
) -> tuple[Check, ...]:
    """Every line of the page: the plan's own, then equal features, files and looks between two sides, then pretraining.

    catalog: of the slides, for files and thumbnails. encoder: its name in words. pretraining: the catalog that it was trained on,
    or of that the slides of some roles. corpora: public collections that it saw; None where that is not known.
    moments: of the features by row, where they are known already. Raises SplitError when two slides of two sides have the same
    features. Raises StoreError.
    """
    checks = [*plan.checks, _tiles(bags, plan, moments)]
    if catalog is not None:
        checks += [_files(bags, plan, catalog), _looks(bags, plan, catalog)]
    if pretraining is not None:
        rows = trained_rows(pretraining, roles)
        checks += [_seen(bags, plan, pretraining, rows), *_seen_sites(bags, plan, pretraining, rows)]
    checks.append(_collections(bags, slides, encoder, corpora, pretraining is not None))
    return tuple(checks)


def leakage_chapter(checks: Sequence[Check]) -> Chapter:
    """The checks as a table for the study's page: first what does not hold."""
    order = sorted(checks, key=lambda check: check.holds)
    failed = sum(not check.holds for check in checks)
    lead = (
        f"{failed} of {len(checks)} checks found something that a reader of the numbers must know."
        if failed
        else f"Nothing was found by {len(checks)} checks."
    )
    rows: list[list[Cell | str]] = [
        [
            Cell(check.name, look="strong"),
            "holds" if check.holds else "look",
            Cell(check.found, look="small" if check.holds else "small strong"),
            Cell(check.compared, look="small"),
        ]
        for check in order
    ]
    parts: list[Part] = [Prose(lead), Grid(("check", "", "found", "compared"), rows, 4, ""), Prose(LIMITS)]
    return Chapter("Leakage", parts)


# Between two sides.


def _across(plan: Plan, pairs: Iterable[Pair]) -> list[Pair]:
    """Pairs that some trial has on two sides."""
    sides = [{i: part for part in PARTS for i in getattr(trial, part)} for trial in plan.trials]
    return [
        pair
        for pair in pairs
        if any(pair.first in side and pair.second in side and side[pair.first] != side[pair.second] for side in sides)
    ]


def _tiles(bags: Bags, plan: Plan, moments: Moments | None) -> Check:
    pairs = equal_tiles(bags.rows, moments)
    torn = _across(plan, pairs)
    if torn:
        raise SplitError(
            f"{len(torn)} pairs of slides on two sides have equal features ({_named(bags.rows, torn)}): "
            "they are one slide under two names; leave one out, or give both one patient"
        )
    inside = f"; {len(pairs)} pairs on one side are equal ({_named(bags.rows, pairs)})" if pairs else ""
    compared = "features of all stores, in whatever order, between two sides"
    return Check("features", compared, f"no two are equal{inside}", not pairs)


def _files(bags: Bags, plan: Plan, catalog: Catalog) -> Check:
    torn = _across(plan, equal_files(bags.rows, catalog))
    held = len({bag.slide_id for bag in bags.rows} & set(catalog.slide_ids))
    compared = f"size and etag (or time of change) of the files of {held} of {len(bags.rows)} slides, between two sides"
    if not torn:
        return Check("files", compared, "no two agree", True)
    return Check("files", compared, f"{len(torn)} pairs agree and may be one file ({_named(bags.rows, torn)})", False)


def _looks(bags: Bags, plan: Plan, catalog: Catalog) -> Check:
    pairs, shown = alike(bags.rows, catalog)
    torn = _across(plan, pairs)
    compared = f"thumbnails of {shown} of {len(bags.rows)} slides, turned and mirrored, between two sides"
    if not torn:
        return Check("look-alikes", compared, "no two look alike", True)
    return Check("look-alikes", compared, f"{len(torn)} pairs look alike: look at {_named(bags.rows, torn)}", False)


# With pretraining.


@dataclass(frozen=True)
class _Read:
    """The study as a labelled set: a slide's role is the strictest in which some trial reads it."""

    bags: Bags
    roles: np.ndarray

    @staticmethod
    def of(bags: Bags, plan: Plan) -> "_Read":
        roles = np.full(len(bags.rows), "", dtype="<U8")
        for part in PARTS:  # the last one wins
            for trial in plan.trials:
                roles[list(getattr(trial, part))] = _ROLE_OF[part]
        return _Read(bags, roles)

    @property
    def groups(self) -> str:
        return self.bags.groups

    @property
    def patients(self) -> np.ndarray:
        return np.array([bag.group for bag in self.bags.rows])

    @property
    def slide_ids(self) -> np.ndarray:
        return np.array([bag.slide_id for bag in self.bags.rows])

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def rows(self, role: str) -> np.ndarray:
        return np.flatnonzero(self.roles == role)


def _seen(bags: Bags, plan: Plan, pretraining: Catalog, rows: Sequence[int] | None) -> Check:
    """Slides that only train may have been seen: that is said, and leaves the read ones new."""
    corpus = corpus_of_catalog(pretraining, rows)
    part_of = {role: part for part, role in _ROLE_OF.items()}
    said, read = [], False
    for leak in find_leaks(_Read.of(bags, plan), corpus):
        read |= part_of[leak.role] != "train"
        ids = leak.slides or leak.patients
        kind = "slides" if leak.slides else "patients"
        said.append(f"{part_of[leak.role]}: {leak.images} of {leak.total} slides, by {kind} ({some(ids)})")
    compared = f"slide and patient ids against the {len(corpus.slide_ids)} slides of {corpus.name} that pretraining saw"
    return Check("pretraining", compared, "; ".join(said) or "none was seen in pretraining", not read)


def _seen_sites(bags: Bags, plan: Plan, pretraining: Catalog, rows: Sequence[int] | None) -> list[Check]:
    """A site may be external to the slide model and not to its encoder."""
    outside = {bags.rows[i].site for trial in plan.trials for i in trial.external}
    if not outside:
        return []
    everyone = pretraining.texts("site")
    sites = [str(everyone[i] or "") for i in (range(len(everyone)) if rows is None else rows)]
    plain = {site_key(site) for site in outside}
    known, nameless = [site for site in sites if site and site_key(site) in plain], sum(not site for site in sites)
    compared = f"external sites ({some(sorted(outside))}) against the sites of the pretraining catalog"
    unknown = f"; the site of {nameless} of {len(sites)} slides is not known" if nameless else ""
    if not known:
        return [Check("pretraining sites", compared, f"the encoder saw no slide that is named theirs{unknown}", not nameless)]
    counts = ", ".join(f"{known.count(site)} of {site}" for site in sorted(set(known))[:_SHOWN])
    return [Check("pretraining sites", compared, f"the encoder saw slides of them: {counts}{unknown}", False)]


def _collections(bags: Bags, slides: Sequence[Slide], encoder: str, corpora: Sequence[str] | None, catalog: bool) -> Check:
    """By the manifest's column cohort and by TCGA barcodes: ids need not be known."""
    used = {bag.slide_id for bag in bags.rows}
    cohorts = sorted({slide.cohort for slide in slides if slide.slide_id in used and slide.cohort})
    barcodes = sum(bag.slide_id.upper().startswith("TCGA-") for bag in bags.rows)
    own = [*cohorts, *(["TCGA"] if barcodes and not any(same_collection(one, "TCGA") for one in cohorts) else [])]
    compared = f"those of the slides ({some(own) or 'none is named'}) against those that {encoder} saw"
    if corpora is None and catalog:
        return Check("public collections", compared, "by the pretraining catalog alone, see above", True)
    if corpora is None:
        return Check(
            "public collections", compared, "not known: its authors name none, and no pretraining catalog was given", False
        )
    shared = sorted({name for name in corpora for one in own if same_collection(name, one)})
    if shared:
        return Check(
            "public collections",
            compared,
            f"pretraining saw {', '.join(shared)}: its slides may not be new to the encoder",
            False,
        )
    return Check("public collections", compared, f"none shared (it saw {some(list(corpora)) or 'none of the public ones'})", True)


def _named(rows: Sequence[Bag], pairs: Sequence[Pair]) -> str:
    return some([f"{rows[pair.first].slide_id} and {rows[pair.second].slide_id}" for pair in pairs])
