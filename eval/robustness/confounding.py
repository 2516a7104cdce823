"""What a classifier loses when its training set ties biology to the site: PathoROB's average performance drop (arXiv 2507.17845).

Training sets of one size go from balanced (every class as often at every site) to confounded (every class at its own sites only).
APD = mean over confounded sets of accuracy / balanced accuracy's, minus 1, meaned over resamplings, as in
bifold-pathomics/PathoROB:pathorob/apd/utils.py (the mean of ratios, not the ratio of means).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from histoscale.data.keys import key, permutation
from histoscale.eval.robustness.findings import RobustnessError
from histoscale.eval.robustness.neighbours import Where
from histoscale.eval.scores.classification import balanced_accuracy_of
from histoscale.eval.scores.interval import Interval, IntervalConfig, Resampling

PARTS = ("train", "choose", "test")


@dataclass(frozen=True)
class ConfoundingConfig:
    """splits: training sets from balanced to confounded, at most as many as slides allow. resamplings: of patients, and of which
    class goes with which site. train, choose: shares of the patients who have the same classes at the same sites; the rest is
    tested. patches: drawn of a slide and class, slides with fewer are left out; null: the quantile of what slides have.
    penalties: scikit-learn's C = 10^ these."""

    splits: int
    resamplings: int
    train: float
    choose: float
    patches: int | None
    quantile: float
    penalties: list[float]
    seed: int


@dataclass(frozen=True)
class Sets:
    """Of one resampling: rows to train on in each split, and rows that choose the penalty and are tested in all of them."""

    train: tuple[np.ndarray, ...]
    choose: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Design:
    """sites: those that take part. slides: of a class at a site in the balanced set. patches: of each slide and class.
    tables: int64 [splits, sites, classes], slides of each split, in the first resampling. left_out: sites that lack a class."""

    sites: tuple[int, ...]
    slides: int
    patches: int
    tables: np.ndarray
    sets: tuple[Sets, ...]
    left_out: tuple[int, ...]


@dataclass(frozen=True)
class Dropped:
    """inside, external: float64 [splits, resamplings], balanced accuracies; external None without such rows. drop_*: APD."""

    inside: np.ndarray
    external: np.ndarray | None
    drop_inside: Interval
    drop_external: Interval | None


def shares(sites: int, classes: int, slides: int, split: int, splits: int, turn: Sequence[int]) -> np.ndarray:
    """Slides by site and class, int64 [sites, classes], of one split: 0 is balanced, splits - 1 confounded.

    Every class keeps its sites · slides. turn: a permutation that says which class goes with which site (cyclic where there are
    more of one). Steps are even; what cannot be shared out evenly goes to the sites that come first after a class's own: then,
    with as many sites as classes, no site grows either.
    """
    table = np.zeros((sites, classes), np.int64)
    for c in range(classes):
        own = np.array([s for s in range(sites) if _goes(s, c, sites, classes, turn)])
        others = np.setdiff1d(np.arange(sites), own)
        extra = round(len(others) * slides * split / (splits - 1))
        for cells, total in ((own, len(own) * slides + extra), (others, len(others) * slides - extra)):
            for place, s in enumerate(sorted(cells.tolist(), key=lambda s: (s - int(own[0])) % sites)):
                table[s, c] = total // len(cells) + (place < total % len(cells))
    return table


def _goes(site: int, c: int, sites: int, classes: int, turn: Sequence[int]) -> bool:
    return turn[site % classes] == c if sites >= classes else turn[c % sites] == site


def design(where: Where, config: ConfoundingConfig) -> Design:
    """Which slides train, choose and are tested, by patients. Raises RobustnessError where a site has too few slides."""
    check_confounding(config)
    cells, patches = _cells(where, config)
    classes, known = np.unique(where.biology).tolist(), np.unique(where.sites).tolist()
    sites = [s for s in known if all((s, c) in cells for c in classes)]
    if len(sites) < 2 or len(classes) < 2:
        raise RobustnessError(
            f"the performance drop needs two classes that two sites both have, on slides with {patches} patches of a class: "
            f"{len(sites)} of {len(known)} sites have all {len(classes)} classes"
        )
    pools = [_pools(where, cells, patches, sites, classes, config, number) for number in range(config.resamplings)]
    smallest = min(len(pool["train", s, c]) for pool in pools for s in sites for c in classes)
    own = max(len(sites) // len(classes), 1)  # sites that a class has to itself in the end, at least
    slides = smallest * own // len(sites)
    if slides < 1:
        raise RobustnessError(
            f"the performance drop needs {-(-len(sites) // own)} training slides of every class at every site, and one has "
            f"{smallest} (confounding.train is {config.train:g}, slides with {patches} patches of a class count): give more "
            "slides, or lower confounding.patches"
        )
    splits = min(config.splits, (len(sites) - own) * slides + 1)
    sets, tables = [], []
    for number, pool in enumerate(pools):
        turn = permutation(key(config.seed, "robustness/turn", number), min(len(sites), len(classes))).tolist()
        tables.append(np.stack([shares(len(sites), len(classes), slides, split, splits, turn) for split in range(splits)]))
        train = [
            _rows([pool["train", s, c][: counts[i, j]] for i, s in enumerate(sites) for j, c in enumerate(classes)])
            for counts in tables[-1]
        ]
        choose, test = (_rows([pool[part, s, c] for s in sites for c in classes]) for part in ("choose", "test"))
        if len(np.unique(where.biology[choose])) < 2 or len(np.unique(where.biology[test])) < 2:
            raise RobustnessError(
                f"the performance drop leaves no patients of two classes to choose on and to test: confounding.train is "
                f"{config.train:g} and .choose {config.choose:g} of few patients; lower them, or give more patients"
            )
        sets.append(Sets(tuple(train), choose, test))
    left_out = tuple(s for s in known if s not in sites)
    return Design(tuple(sites), slides, patches, tables[0], tuple(sets), left_out)


def _rows(pools: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *(rows for pool in pools for rows in pool)])


def check_confounding(config: ConfoundingConfig) -> None:
    """Raises RobustnessError for a value that means nothing."""
    for name, good, expected in (
        ("splits", config.splits >= 2, "at least 2"),
        ("resamplings", config.resamplings >= 1, "at least 1"),
        ("train", 0 < config.train < 1, "between 0 and 1"),
        ("choose", 0 < config.choose < 1 - config.train, "above 0, and less than confounding.train leaves"),
        ("penalties", bool(config.penalties), "at least one"),
    ):
        if not good:
            raise RobustnessError(f"confounding.{name} is {getattr(config, name)}: expected {expected}")


def _cells(where: Where, config: ConfoundingConfig) -> tuple[dict[tuple[int, int], list[np.ndarray]], int]:
    """(rows of every slide that is large enough, by site and class; patches that are drawn of each)."""
    groups: dict[tuple[int, int, str], list[int]] = {}
    for row, name in enumerate(zip(where.sites.tolist(), where.biology.tolist(), where.units.tolist(), strict=True)):
        groups.setdefault(name, []).append(row)
    sizes = [len(rows) for rows in groups.values()]
    patches = config.patches or max(1, int(np.quantile(sizes, config.quantile)))
    cells: dict[tuple[int, int], list[np.ndarray]] = {}
    for site, c, unit in sorted(groups):
        if len(groups[site, c, unit]) >= patches:
            cells.setdefault((site, c), []).append(np.array(groups[site, c, unit]))
    return cells, patches


def _pools(
    where: Where,
    cells: dict[tuple[int, int], list[np.ndarray]],
    patches: int,
    sites: Sequence[int],
    classes: Sequence[int],
    config: ConfoundingConfig,
    number: int,
) -> dict[tuple[str, int, int], list[np.ndarray]]:
    """(part, site, class) -> drawn rows of each slide, in keyed order. A patient has one part, with all sites and classes."""
    pools: dict[tuple[str, int, int], list[np.ndarray]] = {(p, s, c): [] for p in PARTS for s in sites for c in classes}
    has: dict[str, set[tuple[int, int]]] = {}
    for s in sites:
        for c in classes:
            for rows in cells[s, c]:
                has.setdefault(str(where.owners[rows[0]]), set()).add((s, c))
    kinds = {owner: tuple(sorted(each)) for owner, each in has.items()}
    part_of: dict[str, str] = {}
    for place, kind in enumerate(sorted(set(kinds.values()))):  # alike in sites and classes
        owners = sorted(owner for owner, own in kinds.items() if own == kind)
        order = permutation(key(config.seed, "robustness/patients", number, place), len(owners)).tolist()
        few = min(1, max(len(owners) - 2, 0))  # one patient chooses and one is tested wherever there are three
        tested = max(round(len(owners) * (1 - config.train - config.choose)), few)
        chooses = max(round(len(owners) * config.choose), few)
        for rank, i in enumerate(order):
            part_of[owners[i]] = "test" if rank < tested else "choose" if rank < tested + chooses else "train"
    for place, s in enumerate(sites):
        for c in classes:
            slides = cells[s, c]
            for i in permutation(key(config.seed, "robustness/slides", number, place, c), len(slides)).tolist():
                rows = slides[i]
                draw = permutation(key(config.seed, "robustness/patches", number, int(rows[0])), len(rows))[:patches]
                pools[part_of[str(where.owners[rows[0]])], s, c].append(rows[draw])
    return pools


def performance_drop(
    features: np.ndarray,
    where: Where,
    made: Design,
    external: tuple[np.ndarray, Where] | None,
    config: ConfoundingConfig,
    interval: IntervalConfig,
    advance: Callable[[], None] = lambda: None,
) -> Dropped:
    """features: float [n, D]. external: features and what is known of rows at sites that no training set has, or None.

    Intervals draw the tested patients, with training sets and penalties as they are. advance: called after every fit.
    """
    classes = int(max(where.biology.max(), external[1].biology.max() if external else 0)) + 1
    parts = {"inside": (features, where)} | ({"external": external} if external else {})
    splits, resamplings = len(made.sets[0].train), len(made.sets)
    draws = {name: Resampling.of(known.owners, interval) for name, (_, known) in parts.items()}
    counts = {name: np.zeros((int(draw.codes.max()) + 1, splits, resamplings, classes, classes)) for name, draw in draws.items()}
    for number, sets in enumerate(made.sets):
        asked = {"inside": sets.test, "external": np.arange(len(external[0])) if external else sets.test}
        for split, train in enumerate(sets.train):
            model = fit(
                features[train], where.biology[train], features[sets.choose], where.biology[sets.choose], config.penalties
            )
            for name, (x, known) in parts.items():
                rows = asked[name]
                places = (draws[name].codes[rows] * classes + known.biology[rows]) * classes + model.predict(x[rows])
                found = np.bincount(places, minlength=len(counts[name]) * classes**2)
                counts[name][:, split, number] = found.reshape(-1, classes, classes)
            advance()
    accuracy = {name: balanced_accuracy_of(table.sum(0)) for name, table in counts.items()}
    drops = {
        name: draws[name].interval(table.reshape(len(table), -1), _drop_of(table.shape[1:])) for name, table in counts.items()
    }
    return Dropped(accuracy["inside"], accuracy.get("external"), drops["inside"], drops.get("external"))


def drop(accuracy: np.ndarray) -> np.ndarray:
    """APD of accuracies [..., splits, resamplings], the balanced set first.

    A resampling without a tested row (in a draw of patients), or whose balanced set has none right, has no ratio and is left out;
    NaN where all are.
    """
    base = np.where(accuracy[..., :1, :] > 0, accuracy[..., :1, :], np.nan)
    ratio = (accuracy[..., 1:, :] / base).mean(-2)
    known = np.isfinite(ratio)
    with np.errstate(invalid="ignore"):
        return np.where(known, ratio, 0).sum(-1) / known.sum(-1) - 1


def _drop_of(shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    def of(totals: np.ndarray) -> np.ndarray:
        return drop(balanced_accuracy_of(totals.reshape(-1, *shape))).reshape(totals.shape[:-1])

    return of


def fit(x: np.ndarray, y: np.ndarray, choose_x: np.ndarray, choose_y: np.ndarray, penalties: Sequence[float]) -> Any:
    """scikit-learn's logistic regression as it comes, its C = 10^ the first of `penalties` with the best balanced accuracy on the
    rows that choose; 100 iterations and no standardisation, as published: it may stop short of the optimum."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    best, model = -1.0, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for power in penalties:
            tried = LogisticRegression(C=10**power, random_state=0).fit(x, y)
            reached = balanced_accuracy_score(choose_y, tried.predict(choose_x))
            if reached > best:
                best, model = reached, tried
    return model
