"""Which slides train and which are read, in one or several trials: fixed parts, folds, one site at a time; never overlapping."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from histoscale.data.keys import key
from histoscale.data.names import NamesError, one_spelling, value_key
from histoscale.data.names import fold as folded
from histoscale.data.splits import UNITS, SplitError, ordered
from histoscale.eval.mil.bags import Bag, Bags
from histoscale.eval.mil.trials import PARTS, Plan, Trial, check_trials, some
from histoscale.eval.mil.trials import Check as Check

_CLASSES = 10  # more distinct targets than these are numbers, and are levelled by rank
_RANKS = 5


@dataclass(frozen=True)
class FixedSplit:
    """Parts that stand before anything is trained. unit: `patient`, or `slide` where patients are unknown.

    role: a manifest column whose values `train`, `internal` and `external` list. Without it (null) `external_sites` are the
    external sites and a keyed share `test` of the other patients is internal.
    """

    kind: Literal["fixed"]
    unit: str
    role: str | None
    train: list[str]
    internal: list[str]
    external: list[str]
    external_sites: list[str]
    test: float
    seed: int

    def __post_init__(self) -> None:
        _check_unit(self.unit)
        listed = [folded(value) for part in PARTS for value in getattr(self, part)]
        twice = sorted({value for value in listed if listed.count(value) > 1})
        if twice:
            named = ", ".join(twice)
            raise SplitError(f"split.train, split.internal and split.external share {named}: name a value once, in one part")
        if self.role is not None and self.external_sites:
            raise SplitError(
                f"split.role={self.role} and split.external_sites={self.external_sites} both say what is external: set one"
            )
        if self.role is None and not 0 <= self.test < 1:
            raise SplitError(f"split.test is {self.test}: expected a share of the patients in [0, 1)")


@dataclass(frozen=True)
class FoldSplit:
    """Every patient is read once, by a model of the other folds. column: a manifest column that names each slide's fold, or null
    for `folds` keyed folds, level in target and site (one of the two is null). external_sites: held out of all folds."""

    kind: Literal["folds"]
    unit: str
    column: str | None
    folds: int | None
    external_sites: list[str]
    seed: int

    def __post_init__(self) -> None:
        _check_unit(self.unit)
        if (self.column is None) == (self.folds is None):
            raise SplitError(f"split.column is {self.column} and split.folds {self.folds}: give one and set the other to null")
        if self.folds is not None and self.folds < 2:
            raise SplitError(f"split.folds is {self.folds}: expected 2 or more")


@dataclass(frozen=True)
class SiteSplit:
    """Every site is read once, by a model of the other sites; random folds of patients beside it show what the change of site
    costs. blocks: so many groups of whole sites are held out instead of one site at a time, for many small sites; null: one at a
    time. folds: null for as many as there are blocks (or sites), so that models on both sides train on as much."""

    kind: Literal["sites"]
    unit: str
    blocks: int | None
    folds: int | None
    seed: int

    def __post_init__(self) -> None:
        _check_unit(self.unit)
        if any(count is not None and count < 2 for count in (self.folds, self.blocks)):
            raise SplitError(f"split.folds is {self.folds} and split.blocks {self.blocks}: expected 2 or more of each, or null")


SplitConfig = Annotated[FixedSplit | FoldSplit | SiteSplit, Field(discriminator="kind")]


def make_plan(bags: Bags, config: FixedSplit | FoldSplit | SiteSplit) -> Plan:
    """The trials of a study.

    fixed: one. folds: one a fold, which is internal, and `all`, which trains on every fold, reads the external sites and is
    deployed. sites: one a site (or block of sites), which is external; one a random fold, which is internal; and `all`, which
    reads nothing and is deployed.
    Raises SplitError: nothing to train on, an unknown column or site, too few patients or sites, a slide or patient on two sides
    of a trial, a site inside and outside, an external slide without a site.
    """
    if config.unit != bags.groups:
        raise SplitError(
            f"split.unit is {config.unit} but the bags are grouped by {bags.groups}: read them with the split's unit"
        )
    if isinstance(config, FixedSplit):
        trials, left_out = _fixed(bags.rows, config)
    elif isinstance(config, FoldSplit):
        trials, left_out = _folds(bags.rows, config)
    else:
        trials, left_out = _sites(bags.rows, config), {}
    for trial in trials:
        if not trial.train:
            raise SplitError(
                f"the trial {trial.name} has no slide to train on: look at split.{_deciding(config)} and the manifest"
            )
    return Plan(config.kind, tuple(trials), len(trials) - 1, check_trials(bags.rows, trials, config.unit), left_out)


def side_of(site: str, columns: Mapping[str, str], config: FixedSplit | FoldSplit | SiteSplit) -> str:
    """Where a slide stands, or would stand, in words; "" in no part. By its site and manifest columns alone, so that slides
    without a store are counted too; shares and folds are drawn among those that have one, so they are only known to be inside."""
    if isinstance(config, FixedSplit) and config.role is not None:
        return _SIDES.get(_roles(config).get(folded(columns.get(config.role, "")), ""), "")
    if isinstance(config, SiteSplit):
        return "every hospital in turn"
    outside = {folded(each) for each in config.external_sites}
    return _SIDES["external"] if folded(site) in outside else "inside (train or test)"


def grouped_folds(rows: Sequence[Bag], count: int, seed: int) -> list[int]:
    """A fold in range(count) for every row: groups whole, targets as level as that allows, then sites, then sizes.

    Groups, the largest first and equal ones in keyed order, go where the squared shares of their targets grow least. Up to ten
    distinct targets are levelled as classes, more by fifths of their rank; censored times apart from the others.
    Raises SplitError when there are fewer groups than folds, or of one of two classes fewer than folds.
    """
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row.group, []).append(i)
    if len(members) < count:
        raise SplitError(f"{len(members)} groups cannot fill {count} folds: expected one for each; fewer folds, or more slides")
    strata = _strata(rows)
    if len(set(strata)) == 2:
        having = {stratum: len({rows[i].group for i, own in enumerate(strata) if own == stratum}) for stratum in set(strata)}
        rare = min(having, key=lambda stratum: (having[stratum], stratum))
        if having[rare] < count:
            target = next(rows[i].target for i, own in enumerate(strata) if own == rare)
            raise SplitError(
                f"{having[rare]} groups hold a slide of the target {target:g} for {count} folds: fewer folds, or more slides"
            )
    targets, sites = _one_hot(strata), _one_hot([row.site for row in rows])
    totals = [columns.sum(axis=0) for columns in (targets, sites)]
    held = [np.zeros((count, columns.shape[1])) for columns in (targets, sites)]
    sizes = np.zeros(count)
    fold: dict[str, int] = {}
    keyed = ordered(members, seed, "mil/grouped folds")
    for turn, name in enumerate(sorted(keyed, key=lambda name: -len(members[name]))):
        own = [columns[members[name]].sum(axis=0) for columns in (targets, sites)]
        # In shares of each column's total, so that a rare class counts as much; rounded, so that equal folds are equal.
        growth = [
            ((2 * have + add) * add / all_of**2).sum(axis=1).round(9) for have, add, all_of in zip(held, own, totals, strict=True)
        ]
        start = key(seed, "mil/first fold", turn) % count
        places = [(start + i) % count for i in range(count)]
        fold[name] = min(places, key=lambda k: (growth[0][k], growth[1][k], sizes[k]))
        for have, add in zip(held, own, strict=True):
            have[fold[name]] += add
        sizes[fold[name]] += len(members[name])
    return [fold[row.group] for row in rows]


_SIDES = {"train": "train", "internal": "internal test", "external": "external"}


def _roles(config: FixedSplit) -> dict[str, str]:
    """Folded value of the column -> part."""
    return {folded(value): part for part in PARTS for value in getattr(config, part)}


def _fixed(rows: Sequence[Bag], config: FixedSplit) -> tuple[list[Trial], dict[str, str]]:
    left_out: dict[str, str] = {}
    if config.role is not None:
        values = _column(rows, config.role, "split.role")
        part_of = _roles(config)
        parts = [part_of.get(folded(value), "") for value in values]
        for row, value, part in zip(rows, values, parts, strict=True):
            if not part:
                what = f"its {config.role} {value!r} is" if value else f"it has no {config.role} and is"
                left_out[row.slide_id] = f"{what} in no part of the split"
    else:
        outside = _outside(rows, config.external_sites)
        order = ordered((row.group for row in rows if row.site not in outside), config.seed, "mil/split")
        test = set(order[: round(config.test * len(order))])
        parts = [
            "external" if row.site in outside else "internal" if row.group in test else "train"
            for row in rows
        ]  # fmt: skip
    chosen = {part: tuple(i for i, own in enumerate(parts) if own == part) for part in PARTS}
    return [Trial("fixed", chosen["train"], chosen["internal"], chosen["external"])], left_out


def _folds(rows: Sequence[Bag], config: FoldSplit) -> tuple[list[Trial], dict[str, str]]:
    outside = _outside(rows, config.external_sites)
    external = tuple(i for i, row in enumerate(rows) if row.site in outside)
    inside = [i for i, row in enumerate(rows) if row.site not in outside]
    left_out: dict[str, str] = {}
    if config.column is not None:
        values = _column(rows, config.column, "split.column")
        left_out = {rows[i].slide_id: f"it has no {config.column}" for i in inside if not values[i]}
        inside = [i for i in inside if values[i]]
        try:
            names, _ = one_spelling([values[i] for i in inside], f"folds of split.column={config.column}", value_key)
        except NamesError as error:
            raise SplitError(str(error)) from error
        if len(set(names)) < 2:
            raise SplitError(f"split.column={config.column} names {len(set(names))} folds: expected 2 or more different values")
        _whole(rows, inside, names, config.column)
    else:
        assert config.folds is not None
        names = _numbered(grouped_folds([rows[i] for i in inside], config.folds, config.seed))
    return [*_each("fold", inside, names), Trial("all", tuple(inside), (), external)], left_out


def _sites(rows: Sequence[Bag], config: SiteSplit) -> list[Trial]:
    nameless = [row.slide_id for row in rows if not row.site]
    if nameless:
        raise SplitError(
            f"{len(nameless)} slides have no site ({some(nameless)}): fill the manifest's site column, or take folds"
        )
    sites = sorted({row.site for row in rows})
    least = config.blocks or 2
    if len(sites) < least:
        raise SplitError(f"the slides come from {len(sites)} sites ({some(sites)}): expected {least} or more to hold out in turn")
    everything = list(range(len(rows)))
    prefix, held = "site", [row.site for row in rows]
    if config.blocks is not None:
        blocks = grouped_folds([replace(row, group=row.site) for row in rows], config.blocks, key(config.seed, "mil/blocks"))
        prefix, held = "sites", _numbered(blocks)
    outer = [Trial(trial.name, trial.train, (), trial.internal) for trial in _each(prefix, everything, held)]
    inner = _each("fold", everything, _numbered(grouped_folds(rows, config.folds or len(outer), config.seed)))
    return [*outer, *inner, Trial("all", tuple(everything), (), ())]


def _each(prefix: str, inside: Sequence[int], names: Sequence[str]) -> list[Trial]:
    """A trial for every name: its rows are internal, the others train."""
    found = []
    for name in sorted(set(names)):
        held = tuple(i for i, own in zip(inside, names, strict=True) if own == name)
        train = tuple(i for i, own in zip(inside, names, strict=True) if own != name)
        found.append(Trial(f"{prefix} {name}", train, held, ()))
    return found


def _numbered(places: Sequence[int]) -> list[str]:
    """Counted from 1, and as long as each other: names sort as numbers do."""
    width = len(str(max(places) + 1))
    return [f"{place + 1:0{width}d}" for place in places]


def _check_unit(unit: str) -> None:
    if unit not in UNITS:
        raise SplitError(f"split.unit is {unit!r}: expected {' or '.join(UNITS)}")


def _column(rows: Sequence[Bag], column: str, option: str) -> list[str]:
    values = [row.columns.get(column, "") for row in rows]
    if not any(values):
        known = sorted({name for row in rows for name in row.columns})
        raise SplitError(
            f"{option} is {column!r}, which no labelled slide has; the manifest has {', '.join(known) or 'no columns'}"
        )
    return values


def _outside(rows: Sequence[Bag], external_sites: Sequence[str]) -> set[str]:
    sites = {folded(row.site): row.site for row in rows if row.site}
    absent = sorted(site for site in external_sites if folded(site) not in sites)
    if absent:
        known = sorted({row.site for row in rows} - {""})
        raise SplitError(
            f"split.external_sites names {', '.join(absent)}, which no labelled slide comes from: expected some of {some(known)}"
        )
    return {sites[folded(site)] for site in external_sites}


def _whole(rows: Sequence[Bag], inside: Sequence[int], names: Sequence[str], column: str) -> None:
    folds: dict[str, set[str]] = {}
    for i, name in zip(inside, names, strict=True):
        folds.setdefault(rows[i].group, set()).add(name)
    torn = [f"{group} in {' and '.join(sorted(own))}" for group, own in sorted(folds.items()) if len(own) > 1]
    if torn:
        raise SplitError(
            f"split.column={column} tears {len(torn)} patients apart ({some(torn)}): give all slides of a patient one fold"
        )


def _strata(rows: Sequence[Bag]) -> list[str]:
    targets = np.array([row.target for row in rows])
    values, place = np.unique(targets, return_inverse=True)
    if len(values) > _CLASSES:
        rank = targets.argsort(kind="stable").argsort(kind="stable")
        place = rank * _RANKS // len(rows)
    return [f"{own}{'' if row.event else ' censored'}" for own, row in zip(place.tolist(), rows, strict=True)]


def _one_hot(names: Sequence[str]) -> np.ndarray:
    values, place = np.unique(np.asarray(names), return_inverse=True)
    return np.eye(len(values))[place]


def _deciding(config: FixedSplit | FoldSplit | SiteSplit) -> str:
    if isinstance(config, FixedSplit):
        return "train" if config.role is not None else "external_sites"
    return "external_sites" if isinstance(config, FoldSplit) else "blocks"
