"""Robustness of features: every measure against a restatement in loops and against what it must say."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, balanced_accuracy_score

from histoscale.data.journal import Journal
from histoscale.eval.robustness.clusters import ClustersConfig, adjusted_rand, cluster
from histoscale.eval.robustness.confounding import ConfoundingConfig, design, drop, performance_drop, shares
from histoscale.eval.robustness.findings import RobustnessError, summary
from histoscale.eval.robustness.neighbours import (
    NeighboursConfig,
    Where,
    chance,
    count,
    index_interval,
    margin_intervals,
    margins,
    nearest,
    tail_mean,
)
from histoscale.eval.robustness.suite import STRUCTURE, Known, SuiteConfig, structure
from histoscale.eval.scores.interval import IntervalConfig
from histoscale.launch.config import load

INTERVAL = IntervalConfig(draws=200, level=0.95, seed=0)
NEIGHBOURS = NeighboursConfig(k=5, most_k=50, pairs=False, margin=3, tail=0.1)
CLUSTERS = ClustersConfig(least=2, most=5, choosing_starts=3, trials=4, starts=2, seed=1337, cell=None)
CONFOUNDING = ConfoundingConfig(
    splits=5, resamplings=3, train=0.6, choose=0.2, patches=4, quantile=0.25, penalties=[-2.0, 0.0, 2.0], seed=0
)


def made(biology: float, site: float, sites: int = 2, classes: int = 2, slides: int = 10, each: int = 6, seed: int = 0) -> Any:
    """(features [n, 16], Where): directions of class and site of the given strengths, a slide's own, and noise."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    rows = []
    for s, c, slide in itertools.product(range(sites), range(classes), range(slides)):
        own = rng.normal(size=16) * 0.2
        for _ in range(each):
            x = biology * directions[c] + site * directions[8 + s] + own + rng.normal(size=16) * 0.3
            rows.append((x, c, s, f"slide {s} {c} {slide}", f"patient {s} {c} {slide // 2}"))
    order = rng.permutation(len(rows))
    x, c, s, unit, owner = (np.array([rows[i][column] for i in order]) for column in range(5))
    return x.astype(np.float32), Where(c, s, unit, owner)


def test_neighbours_are_those_of_a_loop() -> None:
    x, where = made(1.0, 1.0)
    found = nearest(x, where.units, 7)
    normed = x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    for row in range(len(x)):
        distances = np.linalg.norm(normed - normed[row], axis=1)
        others = [i for i in np.argsort(distances, kind="stable") if where.units[i] != where.units[row]]
        assert found[row].tolist() == others[:7]


def test_neighbours_are_truncated_to_the_query_with_the_fewest() -> None:
    x = np.random.default_rng(0).normal(size=(9, 4))
    assert nearest(x, np.array(list("aaaaabbcd")), 7).shape == (9, 4)
    with pytest.raises(RobustnessError, match="all 9 rows are of one slide"):
        nearest(x, np.array(["a"] * 9), 3)


def by_hand(x: np.ndarray, where: Where, k: int) -> tuple[int, int]:
    """SO and OS over all queries."""
    so = os = 0
    for row, near in enumerate(nearest(x, where.units, k)):
        for other in near:
            same, here = where.biology[other] == where.biology[row], where.sites[other] == where.sites[row]
            so, os = so + (same and not here), os + (here and not same)
    return so, os


@pytest.mark.parametrize(("biology", "site"), [(1.0, 1.0), (2.0, 0.3), (0.3, 2.0)])
def test_the_index_counts_pairs(biology: float, site: float) -> None:
    x, where = made(biology, site)
    counted = count(x, where, NEIGHBOURS)
    so, os = by_hand(x, where, 5)
    assert counted.index == pytest.approx(so / (so + os)) and counted.same.sum(1).tolist() == [5] * len(x)
    assert counted.by_k[5] == counted.index and list(counted.by_k) == [1, 3, 5]
    found = index_interval([counted], INTERVAL)
    assert found.low is not None and found.high is not None and found.low <= found.value <= found.high
    assert found.patients == 20 and (found.value > 0.9) == (biology == 2.0) and (found.value < 0.2) == (site == 2.0)
    assert index_interval([counted, counted], INTERVAL).value == pytest.approx(found.value)


def test_chance_is_what_blind_neighbours_give() -> None:
    x, where = made(1.0, 1.0, sites=3, classes=4, slides=4)
    blind = count(np.random.default_rng(0).normal(size=x.shape), where, NeighboursConfig(30, 50, False, 3, 0.1))
    assert chance(where, False) == pytest.approx(2 / (2 + 3)) and abs(blind.index - 0.4) < 0.03
    assert chance(where, True) == 0.5


def test_pairs_pool_the_counts_of_every_two_by_two() -> None:
    x, where = made(1.0, 1.0, sites=3, classes=3, slides=4)
    pooled = [0, 0]
    for classes, sites in itertools.product(itertools.combinations(range(3), 2), itertools.combinations(range(3), 2)):
        rows = np.flatnonzero(np.isin(where.biology, classes) & np.isin(where.sites, sites))
        pooled = [a + b for a, b in zip(pooled, by_hand(x[rows], where.only(rows), 5), strict=True)]
    counted = count(x, where, NeighboursConfig(5, 50, True, 3, 0.1))
    assert counted.subsets == 9 and counted.index == pytest.approx(pooled[0] / sum(pooled))


def test_k_is_the_one_whose_vote_names_biology_best() -> None:
    x, where = made(0.5, 0.5)
    counted = count(x, where, NeighboursConfig(None, 40, False, 3, 0.1))
    near = nearest(x, where.units, 40)

    def accuracy(k: int) -> float:
        votes = [np.bincount(where.biology[row[:k]], minlength=2).argmax() for row in near]
        return float(balanced_accuracy_score(where.biology, votes))

    tried = [1, 3, 5, 7, 9, 11, 21, 31]
    assert list(counted.by_k) == tried and counted.k == max(tried, key=accuracy)


def test_an_index_without_meaning_is_refused_in_words() -> None:
    x, where = made(1, 1, sites=1)
    with pytest.raises(RobustnessError, match="2 classes at 1 sites"):
        count(x, where, NEIGHBOURS)
    x, where = made(1, 1, slides=2)
    with pytest.raises(RobustnessError, match="neighbours.k is 45, and a query has 42"):
        count(x, where, NeighboursConfig(45, 50, False, 3, 0.1))


def test_margins_are_those_of_a_loop() -> None:
    x, where = made(1.0, 0.7, slides=3, each=4)
    found = margins(x, where, 3)
    normed = x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    for row in range(len(x)):
        away = 1 - normed @ normed[row]
        other = where.units != where.units[row]
        same, here = where.biology == where.biology[row], where.sites == where.sites[row]
        elsewhere, impostor = (np.sort(away[other & kind])[:3].mean() for kind in (same & ~here, ~same & here))
        assert found[row] == pytest.approx((impostor - elsewhere) / (impostor + elsewhere))
    assert np.isnan(margins(x, where, 13)).all()  # there are 12 of a kind
    middle, tail = margin_intervals(found, where.owners, 0.1, INTERVAL)
    assert middle.value == pytest.approx(np.median(found)) and tail.value == pytest.approx(tail_mean(found, 0.1))
    assert tail.value < np.quantile(found, 0.1) < middle.value


def test_adjusted_rand_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, 30), rng.integers(0, 3, 30)
        table = np.zeros((4, 3))
        np.add.at(table, (a, b), 1)
        assert adjusted_rand(table) == pytest.approx(adjusted_rand_score(a, b))
    assert adjusted_rand(np.array([[3.0, 0.0], [0.0, 4.0]])) == 1.0 == adjusted_rand(np.array([[7.0]]))


def test_clusters_follow_what_is_stronger() -> None:
    biology, site = (cluster(*made(b, s), CLUSTERS, INTERVAL) for b, s in ((3.0, 0.2), (0.2, 3.0)))
    assert biology.interval.value > 0.9 and site.interval.value < -0.9 and biology.clusters == (2,)
    assert biology.interval.low is not None and biology.interval.low > 0.5
    three = cluster(*made(3.0, 0.2, sites=3, classes=3, slides=4), CLUSTERS, INTERVAL)
    assert len(three.names) == 9 and three.biology.shape == (9, 4)
    assert three.interval.value == pytest.approx((three.biology - three.site).mean())
    with pytest.raises(RobustnessError, match="two classes that two sites both have"):
        cluster(*made(1, 1, sites=1), CLUSTERS, INTERVAL)


def test_shares_of_two_by_two_are_those_of_camelyon() -> None:
    """pathorob/apd/utils.py: 7 - split and 7 + split slides."""
    for split in range(8):
        assert shares(2, 2, 7, split, 8, [1, 0]).tolist() == [[7 - split, 7 + split], [7 + split, 7 - split]]


@pytest.mark.parametrize(("sites", "classes", "slides", "splits"), [(4, 4, 2, 7), (2, 6, 3, 4), (5, 2, 4, 6), (3, 4, 3, 5)])
def test_shares_keep_every_class_and_end_confounded(sites: int, classes: int, slides: int, splits: int) -> None:
    turn = np.random.default_rng(0).permutation(min(sites, classes)).tolist()
    tables = np.stack([shares(sites, classes, slides, split, splits, turn) for split in range(splits)])
    assert (tables[0] == slides).all() and (tables.sum(1) == sites * slides).all() and (tables >= 0).all()
    ends = tables[-1] > 0
    assert (ends.sum(1) >= 1).all() and (sites > classes or (ends.sum(0) == 1).all())
    assert sites < classes or (ends.sum(1) == 1).all()  # a site is left with one class
    if sites == classes:
        assert (tables.sum(2) == sites * slides).all()  # no site grows either


def test_patients_have_one_part_in_a_design() -> None:
    x, where = made(1, 1, slides=20)
    found = design(where, CONFOUNDING)
    assert found.slides == 6 and found.patches == 4 and len(found.sets) == 3 and found.tables.shape == (5, 2, 2)
    for sets in found.sets:
        owners = [set(where.owners[rows]) for rows in (np.concatenate(sets.train), sets.choose, sets.test)]
        assert all(owners) and not any(a & b for a, b in itertools.combinations(owners, 2))
        assert len({len(rows) for rows in sets.train}) == 1  # all training sets are of one size
        for rows in sets.train:
            assert np.bincount(where.biology[rows]).tolist() == [48, 48] and len(np.unique(rows)) == len(rows)
        ends = sets.train[-1]
        assert len(set(zip(where.biology[ends].tolist(), where.sites[ends].tolist(), strict=True))) == 2
    assert not np.array_equal(found.sets[0].test, found.sets[1].test)


def test_a_patient_at_two_sites_has_one_part() -> None:
    _, where = made(1, 1, slides=20)
    both = np.array([owner.split()[3] if int(owner.split()[3]) < 5 else owner for owner in where.owners])  # half of them
    found = design(Where(where.biology, where.sites, where.units, both), CONFOUNDING)
    for sets in found.sets:
        owners = [set(both[rows]) for rows in (np.concatenate(sets.train), sets.choose, sets.test)]
        assert all(owners) and not any(a & b for a, b in itertools.combinations(owners, 2))


def test_seventeen_slides_of_a_class_at_a_site_reach_the_splits_of_camelyon() -> None:
    values = load("robustness", ["encoder=unused", "data_root=unused", "robustness=pathorob_camelyon"]).values
    config = ConfoundingConfig(**values["robustness"]["confounding"])
    _, where = made(1, 1, slides=17, each=config.patches)
    found = design(Where(where.biology, where.sites, where.units, where.units), config)
    assert found.slides == 7 and found.patches == 300 and len(found.tables) == 8
    assert all(np.sort(found.tables[split].ravel()).tolist() == [7 - split] * 2 + [7 + split] * 2 for split in range(8))
    assert all(len(np.unique(where.units[sets.test])) == 8 for sets in found.sets)


def test_fewer_splits_than_asked_for_are_said(journal: Journal) -> None:
    x, where = made(1, 1, slides=10)
    known = Known(where, np.arange(len(x)), np.empty(0, np.int64), "patient", ("here", "there"))
    suite = SuiteConfig(NEIGHBOURS, CLUSTERS, replace(CONFOUNDING, splits=9))
    found, remarks = structure("e", False, "none", [x], known, ["confounding"], suite, INTERVAL, "cpu", journal)
    splits = len(found[0].about["tables"])
    assert len(remarks) == 1 and remarks[0].startswith(f"confounding has {splits} splits where 9 were asked for")
    suite = replace(suite, confounding=replace(CONFOUNDING, splits=splits))
    assert structure("e", False, "none", [x], known, ["confounding"], suite, INTERVAL, "cpu", journal)[1] == []


def test_the_drop_is_a_mean_of_ratios_and_shows_confounding() -> None:
    x, where = made(0.5, 2.0, slides=40)
    found = performance_drop(x, where, design(where, CONFOUNDING), None, CONFOUNDING, INTERVAL)
    assert found.inside.shape == (5, 3) and found.external is None
    ratios = [found.inside[1:, r] / found.inside[0, r] for r in range(3)]
    assert found.drop_inside.value == pytest.approx(np.mean(ratios) - 1) == pytest.approx(float(drop(found.inside)))
    assert found.drop_inside.value < -0.05 and found.drop_inside.high is not None and found.drop_inside.high < 0
    part = np.array([[0.8, np.nan, 0.0], [0.4, np.nan, 0.3]])  # nobody of the second is drawn, nothing of the third is right
    assert drop(part) == pytest.approx(-0.5) and np.isnan(drop(part[:, 1:]))
    x, where = made(2.0, 0.0, slides=20)
    outside = made(2.0, 0.0, sites=1, slides=10, seed=1)
    free = performance_drop(x, where, design(where, CONFOUNDING), outside, CONFOUNDING, INTERVAL)
    assert abs(free.drop_inside.value) < 0.02 and free.drop_external is not None and free.drop_external.patients == 10


def test_too_few_slides_are_named() -> None:
    _, where = made(1, 1, sites=3, slides=6)
    with pytest.raises(RobustnessError, match="needs 3 training slides of every class at every site, and one has 2"):
        design(where, CONFOUNDING)
    _, where = made(1, 1, slides=2)
    with pytest.raises(RobustnessError, match="leaves no patients of two classes to choose on and to test"):
        design(where, CONFOUNDING)
    with pytest.raises(RobustnessError, match="confounding.choose is 0.5"):
        design(where, ConfoundingConfig(5, 3, 0.6, 0.5, 4, 0.25, [0.0], 0))


def test_a_measure_without_meaning_leaves_the_others(journal: Journal) -> None:
    x, where = made(1, 1, slides=2)
    known = Known(where, np.arange(len(x)), np.empty(0, np.int64), "patient", ("here", "there"))
    suite = SuiteConfig(NEIGHBOURS, CLUSTERS, CONFOUNDING)
    found, left_out = structure("e", False, "none", [x], known, STRUCTURE, suite, INTERVAL, "cpu", journal)
    assert [one.measure for one in found] == ["robustness_index", "margin_median", "margin_tail", "clustering_score"]
    (sentence,) = left_out
    assert sentence.startswith("confounding of e, normalisation none, is left out: the performance drop leaves no patients")
    assert all(one.interval.low is None and "4 patients" in one.interval.note for one in found)
    assert list(summary(found)) == ["robustness_index", "margin_median", "margin_tail", "clustering_score"]
    with pytest.raises(ValueError, match="two findings stand at robustness_index"):
        summary([*found, found[0]])
