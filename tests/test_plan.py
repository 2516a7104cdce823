"""The pure plan: every visit once, no visit twice in a batch, exact mixes, floor or ceil counts, nested budgets."""

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from histoscale.data.keys import key
from histoscale.data.pixelfilter import PixelFilterConfig, hsv, passes
from histoscale.data.plan import (
    Passes,
    Plan,
    SamplerConfig,
    SlideTable,
    Visit,
    budgeted,
    rank_slots,
    slide_weights,
    target_name,
    without,
)

FILTER = PixelFilterConfig("none", [90, 180], [8, 255], [103, 255], 0.6, 8)
SAMPLER = SamplerConfig(
    magnification="discrete",
    mpps=[0.25, 0.5, 1.0],
    weights=[1, 3, 2],
    patch_px=64,
    grid=2,
    lanes_per_slot=3,
    tissue_fraction=0.4,
    mpp_tolerance=0.05,
    max_upsample=1.0,
    slide_weighting="patients",
    weighting_exponent=0.0,
    unservable="error",
    slide_budget=None,
    patch_budget=None,
    pixel_filter=FILTER,
)


def slides(count: int, patients: int, mpps: int = 3, seed: int = 0) -> SlideTable:
    """Slides dealt unevenly to patients; the first mpp is served by every second slide only."""
    draw = np.random.default_rng(seed)
    names = [f"p{i}" for i in [*range(patients), *draw.integers(0, patients, count - patients)]]
    eligible = np.ones((count, mpps), bool)
    eligible[1::2, 0] = False
    ids = [f"s{i}" for i in range(count)]
    site = [f"site{int(name[1:]) % 3}" for name in names]
    return SlideTable(ids, names, ["skin"] * count, site, [""] * count, draw.uniform(1, 300, count), eligible)


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**63))  # G, lanes, grid, seed


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_a_visit_is_read_once_and_never_twice_in_a_batch(shape: tuple[int, int, int, int]) -> None:
    batch, lanes, grid, seed = shape
    plan = Plan(seed, batch, replace(SAMPLER, grid=grid, lanes_per_slot=lanes), slides(7, 4))
    lived: dict[tuple[int, int, int], list[int]] = {}
    taken: Counter[tuple[int, int, int, int]] = Counter()
    for step in range(4 * lanes * grid**2):
        places = [plan.place(step, slot) for slot in range(batch)]
        visits = [(p.slot, p.lane, p.turn) for p in places]
        assert len(set(visits)) == batch
        for place, visit in zip(places, visits, strict=True):
            lived.setdefault(visit, []).append(step)
            taken[(*visit, place.number)] += 1
            assert place.last == (len(lived[visit]) == grid**2 or (place.turn == 0 and place.last))
    assert set(taken.values()) == {1}
    for (_, _, turn), steps in lived.items():
        assert steps[-1] - steps[0] < grid**2 * lanes
        if turn not in (0, max(t for _, _, t in lived)):
            assert len(steps) == grid**2
    for slot in range(batch):
        for lane in range(lanes):
            turns = sorted(turn for g, k, turn in lived if (g, k) == (slot, lane))
            assert turns == list(range(len(turns)))
    assert max(Counter(step for steps in lived.values() for step in steps).values()) == batch


def test_at_most_lanes_visits_of_a_slot_are_open() -> None:
    plan = Plan(3, 2, SAMPLER, slides(7, 4))
    spans: dict[tuple[int, int], list[int]] = {}
    for step in range(200):
        place = plan.place(step, 1)
        spans.setdefault((place.lane, place.turn), []).append(step)
    for step in range(200):
        assert sum(min(steps) <= step <= max(steps) for steps in spans.values()) <= SAMPLER.lanes_per_slot


def test_the_plan_does_not_depend_on_the_order_of_asking() -> None:
    table = slides(9, 4)
    forward, backward = Plan(5, 4, SAMPLER, table), Plan(5, 4, SAMPLER, table)
    asked = [(step, slot) for step in range(60) for slot in range(4)]
    first = {at: forward.place(*at) for at in asked}
    second = {at: backward.place(*at) for at in reversed(asked)}
    assert first == second
    assert Plan(6, 4, SAMPLER, table).visit(0, 0, 0) != forward.visit(0, 0, 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**63), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_mix_is_exact_in_every_cycle(seed: int, weights: list[int]) -> None:
    sampler = replace(SAMPLER, mpps=[2.0**i for i in range(len(weights))], weights=weights)
    table = slides(5, 3, len(weights))
    plan = Plan(seed, 2, sampler, table)
    ordinal = [plan.visit(slot, lane, turn).target for turn in range(8) for slot in range(2) for lane in range(3)]
    cycle = sum(weights)
    for start in range(0, len(ordinal) - cycle + 1, cycle):
        counts = Counter(ordinal[start : start + cycle])
        assert [counts[i] for i in range(len(weights))] == weights


def visits(plan: Plan, turns: int) -> list[Visit]:
    return [
        plan.visit(slot, lane, turn) for turn in range(turns) for slot in range(plan.global_batch) for lane in range(plan.lanes)
    ]


@pytest.mark.parametrize("edges", [[0.25, 2.0], [0.25, 0.5, 1.0, 2.0], [0.3 * 1.2**i for i in range(12)]], ids=len)
def test_continuous_magnification_is_log_uniform(edges: list[float]) -> None:
    """Equal ratios and equal counts: one log-uniform distribution from the first edge to the last, whatever the ranges."""
    bins = len(edges) - 1
    sampler = replace(SAMPLER, magnification="log_uniform", mpps=edges, weights=[1] * bins)
    plan = Plan(8, 4, sampler, slides(9, 4, bins))
    drawn = visits(plan, 400)
    for visit in drawn:
        low, high = plan.targets[visit.target]
        assert low == edges[visit.target] and high == edges[visit.target + 1] and low <= visit.mpp < high
    places = np.log([visit.mpp for visit in drawn])
    start, stop = np.log(edges[0]), np.log(edges[-1])
    assert stats.kstest((places - start) / (stop - start), "uniform").pvalue > 1e-3
    assert stats.kstest((places - start) / (stop - start) * 0.97, "uniform").pvalue < 1e-3  # the test can fail
    assert len({visit.mpp for visit in drawn}) == len(drawn)
    again = plan.visit(1, 2, 3, attempt=5)
    assert again.mpp == plan.visit(1, 2, 3).mpp and again.key != plan.visit(1, 2, 3).key
    assert target_name(plan.targets[0]) == f"{edges[0]:g}-{edges[1]:g}"


def test_discrete_magnification_is_the_target_itself() -> None:
    plan = Plan(8, 4, SAMPLER, slides(9, 4))
    assert all(visit.mpp == SAMPLER.mpps[visit.target] for visit in visits(plan, 30))


def test_a_pickled_plan_holds_no_names_and_is_the_same_plan() -> None:
    table = slides(500, 90)
    plan = Plan(5, 4, SAMPLER, table)
    data = pickle.dumps(plan)
    assert len(data) < 3 * 500 * 12 + 3000  # two numbers a slide and target
    assert b"site1" not in data and b"s499" not in data
    again: Plan = pickle.loads(data)
    assert visits(again, 20) == visits(plan, 20)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63), st.lists(st.floats(0.01, 100), min_size=1, max_size=40))
def test_a_pass_holds_floor_or_ceil_of_every_share(seed: int, weights: list[float]) -> None:
    count, shares = len(weights), np.array(weights) / np.sum(weights)
    endless = Passes(np.arange(count), np.array(weights))
    for number in range(3):
        found = Counter(endless.at(seed, 1, number * count + i) for i in range(count))
        for slide in range(count):
            expected = count * shares[slide]
            assert np.floor(expected - 1e-6) <= found[slide] <= np.ceil(expected + 1e-6)


def test_equal_weights_give_each_slide_once_a_pass() -> None:
    endless = Passes(np.arange(10, 17), np.ones(7))
    for number in range(50):
        assert sorted(endless.at(1, 0, number * 7 + i) for i in range(7)) == list(range(10, 17))


def test_passes_come_near_their_weights_and_so_do_replacements() -> None:
    weights = np.array([0.1, 0.2, 0.7, 1.0, 3.0])
    endless = Passes(np.arange(5), weights)
    rounds = 4000
    shares = np.bincount([endless.at(2, 0, i) for i in range(5 * rounds)], minlength=5) / (5 * rounds)
    assert np.allclose(shares, weights / 5, atol=4 * np.sqrt(0.25 / rounds) / 5)
    drawn = np.bincount([endless.draw(key(7, "draw", i)) for i in range(20000)], minlength=5) / 20000
    assert np.allclose(drawn, weights / 5, atol=4 * np.sqrt(0.25 / 20000))


def test_weightings() -> None:
    table = slides(12, 4)
    rows = np.arange(12)
    assert set(slide_weights(table, rows, "slides", 0)) == {1.0}
    assert np.allclose(slide_weights(table, rows, "area", 0.5) ** 2, table.area)
    share = slide_weights(table, rows, "patients", 0)
    per_patient = Counter[str]()
    for name, weight in zip(table.patients, share, strict=True):
        per_patient[name] += weight
    assert np.allclose(list(per_patient.values()), 1)
    for exponent, expected in ((0.0, [1, 1, 1]), (1.0, [2, 1, 1])):  # patients 0 and 3 are of site0
        weights = slide_weights(table, rows, "site", exponent)
        per_site = [sum(w for w, site in zip(weights, table.sites, strict=True) if site == f"site{i}") for i in range(3)]
        assert np.allclose(per_site, expected)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["organ", "site", "cohort"]),
    st.floats(0, 1.5),
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.integers(0, 2**63),
)
def test_groups_are_drawn_by_their_size_to_the_exponent(kind: str, exponent: float, sizes: list[int], seed: int) -> None:
    """Patients with 1-3 slides each: a pass gives every group its share within one visit; patients of a group are equal."""
    draw = np.random.default_rng(seed)
    rows = [(f"g{g}", f"g{g}p{p}") for g, size in enumerate(sizes) for p in range(size) for _ in range(draw.integers(1, 4))]
    groups, patients = [group for group, _ in rows], [patient for _, patient in rows]
    names = {name: groups if name == kind else ["x"] * len(rows) for name in ("organ", "site", "cohort")}
    ids = [f"s{i}" for i in range(len(rows))]
    table = SlideTable(ids, patients, names["organ"], names["site"], names["cohort"], np.ones(len(rows)), np.ones((len(rows), 1)))
    weights = slide_weights(table, np.arange(len(rows)), kind, exponent)
    wanted = np.array(sizes) ** exponent / (np.array(sizes) ** exponent).sum()
    shares = Counter[str]()
    for name, weight in zip([*groups, *patients], [*weights, *weights], strict=True):
        shares[name] += weight / weights.sum()
    assert np.allclose([shares[f"g{g}"] for g in range(len(sizes))], wanted)
    for g, size in enumerate(sizes):
        assert np.allclose([shares[f"g{g}p{p}"] for p in range(size)], wanted[g] / size)
    endless, turns = Passes(np.arange(len(rows)), weights), 6 * len(rows)
    drawn = Counter(groups[endless.at(seed, 0, i)] for i in range(turns))
    for g in range(len(sizes)):  # rows of a group follow one another: a pass gives it floor or ceil of its share
        assert abs(drawn[f"g{g}"] - turns * wanted[g]) <= 6 + 1e-6


def test_only_slides_that_can_serve_a_magnification_do() -> None:
    table = slides(12, 4)
    plan = Plan(1, 4, SAMPLER, table)
    for turn in range(40):
        for attempt in (0, 3):
            visit = plan.visit(2, 1, turn, attempt)
            assert table.eligible[visit.slide, visit.target]


def test_an_attempt_keeps_the_magnification_and_changes_the_key() -> None:
    plan = Plan(1, 4, SAMPLER, slides(12, 4))
    visits = [plan.visit(0, 0, 5, attempt) for attempt in range(9)]
    assert len({v.target for v in visits}) == 1
    assert len({v.key for v in visits}) == 9
    assert len({v.slide for v in visits}) > 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**63), st.integers(1, 40), st.integers(1, 12))
def test_budgets_are_nested_whatever_the_seed_and_the_cohort(seed: int, count: int, patients: int) -> None:
    table = slides(max(count, patients), patients, seed=seed % 1000)
    every = len(table.slide_ids)
    before: set[int] = set()
    for budget in range(1, every + 1):
        kept = set(np.flatnonzero(budgeted(seed, table, budget)).tolist())
        assert len(kept) == budget and before < kept
        before = kept
    assert before == set(np.flatnonzero(budgeted(seed, table, None)).tolist())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**63), st.integers(1, 4), st.integers(1, 4))
def test_patch_budgets_are_nested(seed: int, visits_a_lane: int, more: int) -> None:
    unit, table = 2 * 3 * 4, slides(9, 4)
    small, large = (Plan(seed, 2, replace(SAMPLER, patch_budget=unit * n), table) for n in (visits_a_lane, visits_a_lane + more))
    kept, all_kept = ({(v.key, v.slide, v.mpp) for v in visits(plan, 3 * plan.epoch_visits)} for plan in (small, large))  # type: ignore[operator]
    assert len(kept) == 6 * visits_a_lane and len(all_kept) == 6 * (visits_a_lane + more)
    assert kept < all_kept


def test_slide_budgets_are_nested_and_take_whole_patients_first() -> None:
    table = slides(30, 9)
    kept = [set(np.flatnonzero(budgeted(4, table, budget))) for budget in range(1, 31)]
    assert [len(k) for k in kept] == list(range(1, 31))
    assert all(small < large for small, large in zip(kept, kept[1:], strict=False))
    for chosen in kept:
        taken = Counter(table.patients[s] for s in chosen)
        partial = [patient for patient, count in taken.items() if count < table.patients.count(patient)]
        assert len(partial) <= 1
    with pytest.raises(ValueError, match="slide_budget is 31: 30 slides"):
        budgeted(4, table, 31)
    plan = Plan(4, 4, replace(SAMPLER, slide_budget=5), table)
    assert {plan.visit(g, k, v).slide for g in range(4) for k in range(3) for v in range(20)} <= kept[4]


def test_a_patch_budget_repeats_its_visits_in_a_new_order() -> None:
    unit = 4 * 3 * 4
    plan = Plan(4, 4, replace(SAMPLER, patch_budget=5 * unit), slides(9, 4))
    endless = Plan(4, 4, SAMPLER, slides(9, 4))
    for slot in range(4):
        for lane in range(3):
            epochs = [[plan.visit(slot, lane, 5 * e + i) for i in range(5)] for e in range(4)]
            keys = {frozenset(v.key for v in epoch) for epoch in epochs}
            assert keys == {frozenset(endless.visit(slot, lane, v).key for v in range(5))}
            assert len({tuple(v.key for v in epoch) for epoch in epochs}) > 1
    with pytest.raises(ValueError, match=f"nearest are {5 * unit} and {6 * unit}"):
        Plan(4, 4, replace(SAMPLER, patch_budget=5 * unit + 1), slides(9, 4))
    with pytest.raises(ValueError, match=f"nearest are {unit}$"):
        Plan(4, 4, replace(SAMPLER, patch_budget=3), slides(9, 4))


def test_bad_samplers_are_refused() -> None:
    table = slides(9, 4)
    for change, words in (
        ({"weights": [1, 2]}, "as many whole counts as magnifications"),
        ({"weights": [1, 2, 0]}, "at least 1"),
        ({"grid": 0}, "sampler.grid is 0"),
        ({"slide_weighting": "patient"}, "expected one of patients"),
        ({"magnification": "continuous"}, "expected one of discrete, log_uniform"),
        ({"magnification": "log_uniform"}, "one count less than edges"),
        ({"magnification": "log_uniform", "mpps": [1.0, 0.5, 0.25, 2.0]}, "rising edges"),
        ({"mpps": [0.25, 0.0, 1.0]}, "positive magnifications"),
    ):
        with pytest.raises(ValueError, match=words):
            Plan(1, 4, replace(SAMPLER, **change), table)
    nowhere = replace(table, eligible=table.eligible & np.array([True, False, True]))
    pasted = r"sampler.mpps=\[0.25,1\] sampler.weights=\[1,2\], or sampler.unservable=drop"
    with pytest.raises(ValueError, match=f"none of 9 slides can serve 0.5 um/px: take it out with {pasted}"):
        Plan(1, 4, SAMPLER, nowhere)
    with pytest.raises(ValueError, match="sampler.unservable is 'skip': expected one of error, drop"):
        Plan(1, 4, replace(SAMPLER, unservable="skip"), table)
    for unservable in ("error", "drop"):  # nothing is left to drop to
        config, none = replace(SAMPLER, unservable=unservable), replace(table, eligible=table.eligible & False)
        with pytest.raises(ValueError, match="none of 9 slides can serve 0.25 or 0.5 or 1 um/px, and b.s.mpps has no other"):
            Plan(1, 4, config, none, "b.s")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=5), st.booleans(), st.integers(0, 2**63))
def test_what_no_slide_serves_is_dropped_as_if_it_had_not_been_asked_for(able: list[bool], ranges: bool, seed: int) -> None:
    """Discrete magnifications, and ranges of which outer ones are dropped, give the visits of the mix without them."""
    mpps = [0.25 * 2**i for i in range(len(able) + ranges)]
    asked = replace(
        SAMPLER, mpps=mpps, weights=list(range(1, len(able) + 1)), unservable="drop",
        magnification="log_uniform" if ranges else "discrete",
    )  # fmt: skip
    table = slides(9, 4, len(able))
    table = replace(table, eligible=table.eligible & np.array(able))
    if not any(able):
        with pytest.raises(ValueError, match="has no other"):
            Plan(seed, 4, asked, table)
        return
    plan = Plan(seed, 4, asked, table)
    assert [low for low, _ in plan.dropped] == [mpp for mpp, may in zip(mpps, able, strict=False) if not may]
    visits = [plan.visit(slot, lane, turn) for slot in range(4) for lane in range(3) for turn in range(12)]
    assert {visit.target for visit in visits} == {i for i, may in enumerate(able) if may}
    rest = without(asked, plan.dropped)
    if rest is None:
        assert ranges  # with a hole between them
        return
    plain = Plan(seed, 4, replace(rest, unservable="error"), replace(table, eligible=table.eligible[:, able]))
    numbers = [i for i, may in enumerate(able) if may]
    again = [plain.visit(slot, lane, turn) for slot in range(4) for lane in range(3) for turn in range(12)]
    assert visits == [replace(visit, target=numbers[visit.target]) for visit in again]


def test_slots_of_ranks() -> None:
    assert [list(rank_slots(6, r, 3)) for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="nearest are 96 and 100"):
        rank_slots(97, 0, 4)
    with pytest.raises(ValueError, match="nearest are 4$"):
        rank_slots(3, 0, 4)


def test_a_hundred_thousand_slides() -> None:
    count = 100_000
    eligible = np.ones((count, 3), bool)
    names = [str(i) for i in range(count)]
    table = SlideTable(names, [str(i // 2) for i in range(count)], names, names, names, np.ones(count), eligible)
    plan = Plan(1, 1024, SAMPLER, table)
    drawn = [plan.visit(slot, 0, 3).slide for slot in range(1024)]
    assert len(set(drawn)) > 950


def test_hsv_follows_opencv_units() -> None:
    pure, grey, mixed = [[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[128, 128, 128], [0, 0, 0]], [[200, 100, 150], [255, 0, 1]]
    rgb = np.array([*pure, [255, 0, 128], *grey, *mixed], np.uint8)
    hue, saturation, value = hsv(rgb)
    assert hue.tolist() == [0, 60, 120, 165, 0, 0, 165, 0]  # 180 rounds to 0
    assert saturation.tolist() == [255, 255, 255, 255, 0, 0, 128, 255]
    assert value.tolist() == [255, 255, 255, 255, 128, 0, 200, 255]


def test_the_pixel_filter() -> None:
    pink, white, brown = (np.full((64, 64, 3), colour, np.uint8) for colour in ([200, 100, 150], [245, 245, 245], [150, 90, 40]))
    half = np.concatenate([pink[:38], white[:26]])  # 38 of 64 rows pass: 0.594
    config = replace(FILTER, kind="hsv", stride=1)
    assert passes([pink, white, brown, half], config).tolist() == [True, False, False, False]
    assert passes([half], replace(config, fraction=0.59)).tolist() == [True]
    assert passes([pink, white], replace(config, kind="none")).tolist() == [True, True]
    with pytest.raises(ValueError, match="expected none or hsv"):
        passes([pink], replace(config, kind="HSV"))
