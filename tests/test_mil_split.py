"""Trials of slide models: fixed parts, folds and sites that never share a slide, a patient or, where external, a site."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from histoscale.data.splits import SplitError
from histoscale.eval.mil.bags import Bag, Bags
from histoscale.eval.mil.split import FixedSplit, FoldSplit, Plan, SiteSplit, SplitConfig, grouped_folds, make_plan

FIXED = FixedSplit(
    kind="fixed",
    unit="patient",
    role="role",
    train=["train", "monitor"],
    internal=["test"],
    external=["external"],
    external_sites=[],
    test=0.25,
    seed=0,
)
DRAWN = replace(FIXED, role=None, train=[], internal=[], external=[], external_sites=["far"])
FOLDS = FoldSplit(kind="folds", unit="patient", column=None, folds=5, external_sites=["far"], seed=0)
SITES = SiteSplit(kind="sites", unit="patient", blocks=None, folds=3, seed=0)


def a_bag(slide_id: str, group: str, site: str, target: float, event: bool = True, columns: dict[str, str] | None = None) -> Bag:
    return Bag(slide_id, group, site, target, event, Path(f"{slide_id}.h5"), 9, 64, 1.0, columns or {})


def some(rows: tuple[Bag, ...], groups: str = "patient") -> Bags:
    return Bags(rows, 4, "abc", 0.5, groups, {})


def cohort(patients: int = 60) -> Bags:
    """Two slides a patient, three sites near and one far; a role and a fold for each."""
    rows = []
    for patient in range(patients):
        role = ("train", "monitor", "test", "external")[patient % 4]
        site = "far" if role == "external" else f"near{patient % 3}"
        for number in range(2):
            columns = {"role": role, "fold": str(patient % 5)}
            rows.append(a_bag(f"s{patient}-{number}", f"p{patient}", site, float((patient // 4 + number) % 2), True, columns))
    return some(tuple(rows))


def changed(bags: Bags, place: int, **values: object) -> Bags:
    rows = list(bags.rows)
    rows[place] = replace(rows[place], **values)  # type: ignore[arg-type]
    return replace(bags, rows=tuple(rows))


def shares_nothing(bags: Bags, plan: Plan) -> None:
    for trial in plan.trials:
        parts = [trial.train, trial.internal, trial.external]
        assert trial.train and not set(parts[0]) & set(parts[1]) | set(parts[0]) & set(parts[2]) | set(parts[1]) & set(parts[2])
        people = [{bags.rows[i].group for i in part} for part in parts]
        assert not people[0] & people[1] and not people[0] & people[2] and not people[1] & people[2]
        assert not {bags.rows[i].site for i in trial.external} & {bags.rows[i].site for i in (*trial.train, *trial.internal)}


def test_a_column_fixes_the_parts() -> None:
    bags = changed(cohort(), 5, columns={"role": "discarded"})
    plan = make_plan(bags, FIXED)
    (trial,) = plan.trials
    shares_nothing(bags, plan)
    assert {bags.rows[i].columns["role"] for i in trial.train} == {"train", "monitor"}
    assert {bags.rows[i].columns["role"] for i in trial.internal} == {"test"}
    assert {bags.rows[i].site for i in trial.external} == {"far"}
    assert plan.left_out == {"s2-1": "its role 'discarded' is in no part of the split"}
    assert [check.name for check in plan.checks] == ["slides", "patients", "sites", "internal sites"]
    assert all(check.holds for check in plan.checks)


def test_named_sites_are_external_and_a_share_of_patients_internal() -> None:
    bags = cohort()
    plan = make_plan(bags, DRAWN)
    (trial,) = plan.trials
    shares_nothing(bags, plan)
    assert {bags.rows[i].site for i in trial.external} == {"far"} and len(trial.external) == 30
    assert len(trial.internal) == 2 * round(0.25 * 45)
    assert make_plan(bags, DRAWN) == plan != make_plan(bags, replace(DRAWN, seed=1))
    assert make_plan(bags, replace(DRAWN, external_sites=[], test=0.0)).trials[0].internal == ()


@pytest.mark.parametrize("column", [None, "fold"])
def test_every_patient_is_read_once_by_folds(column: str | None) -> None:
    bags = cohort()
    plan = make_plan(bags, replace(FOLDS, column=column, folds=None if column else 5))
    shares_nothing(bags, plan)
    *folds, last = plan.trials
    inside = [i for i, row in enumerate(bags.rows) if row.site != "far"]
    assert [trial.name for trial in plan.trials][-1] == "all" and plan.deployed == len(folds) == 5
    assert sorted(i for trial in folds for i in trial.internal) == inside == sorted(last.train)
    assert all(set(trial.train) | set(trial.internal) == set(inside) and not trial.external for trial in folds)
    assert last.internal == () and {bags.rows[i].site for i in last.external} == {"far"}
    if column:
        assert all(len({bags.rows[i].columns["fold"] for i in trial.internal}) == 1 for trial in folds)


def test_a_fold_is_one_however_it_is_written() -> None:
    bags = cohort()
    other = bags
    for i, row in enumerate(bags.rows):
        fold = row.columns["fold"]
        other = changed(other, i, columns={"fold": (f"{fold}.0", f" {fold}")[i % 2]})
    config = replace(FOLDS, column="fold", folds=None)
    wanted = [trial.internal for trial in make_plan(bags, config).trials]
    assert [trial.internal for trial in make_plan(other, config).trials] == wanted
    torn = changed(changed(bags, 0, columns={"fold": "one a"}), 1, columns={"fold": "onea"})
    with pytest.raises(SplitError, match="the folds of split.column=fold 'one a' and 'onea' differ by a blank inside alone"):
        make_plan(torn, config)


def test_a_slide_without_a_fold_is_left_out_by_name() -> None:
    bags = changed(cohort(), 0, columns={})
    plan = make_plan(bags, replace(FOLDS, column="fold", folds=None))
    assert plan.left_out == {"s0-0": "it has no fold"}
    assert all(0 not in (*trial.train, *trial.internal, *trial.external) for trial in plan.trials)


def test_every_site_is_read_once_by_a_model_that_never_saw_it() -> None:
    bags = cohort()
    plan = make_plan(bags, SITES)
    shares_nothing(bags, plan)
    named = {trial.name: trial for trial in plan.trials}
    assert list(named) == ["site far", "site near0", "site near1", "site near2", "fold 1", "fold 2", "fold 3", "all"]
    for site in ("far", "near0", "near1", "near2"):
        assert {bags.rows[i].site for i in named[f"site {site}"].external} == {site}
        assert len(named[f"site {site}"].train) + len(named[f"site {site}"].external) == len(bags.rows)
    assert sorted(i for k in "123" for i in named[f"fold {k}"].internal) == list(range(len(bags.rows)))
    assert plan.trials[plan.deployed] == named["all"] and len(named["all"].train) == len(bags.rows)


def test_random_folds_train_on_as_much_as_held_out_sites() -> None:
    bags = cohort()
    plan = make_plan(bags, replace(SITES, folds=None))
    sizes = {kind: [len(t.train) for t in plan.trials if t.name.startswith(kind)] for kind in ("site ", "fold ")}
    assert len(sizes["site "]) == len(sizes["fold "]) == 4 and sum(sizes["site "]) == sum(sizes["fold "])


def test_many_sites_are_held_out_in_blocks() -> None:
    rows = tuple(a_bag(f"s{i}", f"p{i}", f"site{i % 13}", float(i % 3 == 0)) for i in range(130))
    plan = make_plan(some(rows), replace(SITES, blocks=4))
    shares_nothing(some(rows), plan)
    blocks = [trial for trial in plan.trials if trial.name.startswith("sites ")]
    assert len(blocks) == 4 and sorted(i for trial in blocks for i in trial.external) == list(range(130))


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=8, max_size=60),
    count=st.integers(2, 5),
    classes=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_folds_keep_groups_whole_and_level_the_targets(sizes: list[int], count: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [
        a_bag(f"{g}-{i}", f"g{g}", f"site{g % 3}", float(target))
        for g, (size, target) in enumerate(zip(sizes, rng.integers(0, classes, len(sizes)), strict=True))
        for i in range(size)
    ]
    having = Counter(target for _, target in {(row.group, row.target) for row in rows})
    if len(having) == 2 and min(having.values()) < count:
        with pytest.raises(SplitError, match=f"groups hold a slide of the target .* for {count} folds"):
            grouped_folds(rows, count, seed)
        return
    folds = grouped_folds(rows, count, seed)
    assert len({(row.group, fold) for row, fold in zip(rows, folds, strict=True)}) == len(sizes)
    assert folds == grouped_folds(rows, count, seed) and set(folds) <= set(range(count))
    for target in having:  # the fullest fold has no more of a class than the emptiest and one largest group
        held = [sum(row.target == target for row, own in zip(rows, folds, strict=True) if own == fold) for fold in range(count)]
        assert max(held) - min(held) <= max(sizes)


def test_one_slide_a_patient_is_dealt_out_exactly_by_class_and_site() -> None:
    rows = [a_bag(f"s{i}", f"p{i}", f"site{i % 2}", float(i // 2 % 3)) for i in range(120)]
    folds = grouped_folds(rows, 4, 7)
    cells = Counter((row.site, row.target, fold) for row, fold in zip(rows, folds, strict=True))
    assert set(Counter(folds).values()) == {30}
    assert all(sum(cells[site, t, f] for site in ("site0", "site1")) == 10 for t in (0, 1, 2) for f in range(4))
    assert all(13 <= sum(cells[site, t, f] for t in (0, 1, 2)) <= 17 for site in ("site0", "site1") for f in range(4))


def test_rare_classes_of_patients_with_several_are_spread() -> None:
    """Five nodes a patient of mixed stages: the fold with the most of a rare one has few more than the fold with the fewest."""
    spread = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        shares = rng.dirichlet([2, 0.2, 0.3, 0.5], size=100)
        rows = [
            a_bag(f"s{p}-{n}", f"p{p}", f"c{p // 20}", float(rng.choice(4, p=shares[p]))) for p in range(100) for n in range(5)
        ]
        counts = Counter(zip(grouped_folds(rows, 5, 0), (row.target for row in rows), strict=True))
        rare = [counts[fold, 1.0] for fold in range(5)]
        spread.append((max(rare) - min(rare)) / np.mean(rare))
    assert np.mean(spread) < 0.5


def test_numbers_and_censored_times_are_levelled_by_rank() -> None:
    rng = np.random.default_rng(0)
    rows = [a_bag(f"s{i}", f"p{i}", "", float(rng.exponential()), i % 3 > 0) for i in range(200)]
    folds = np.array(grouped_folds(rows, 5, 0))
    ranks = np.array([row.target for row in rows]).argsort().argsort()
    censored = np.array([not row.event for row in rows])
    for fold in range(5):
        assert abs(ranks[folds == fold].mean() - 99.5) < 12 and abs(censored[folds == fold].sum() - censored.sum() / 5) < 2


def test_another_seed_deals_other_folds() -> None:
    rows = cohort().rows
    assert grouped_folds(rows, 5, 0) != grouped_folds(rows, 5, 1)


def test_the_page_says_when_every_slide_is_its_own_patient() -> None:
    assert make_plan(cohort(), FIXED).checks[1].found == "none of 60 on two sides"
    alone = some(tuple(replace(row, group=row.slide_id) for row in cohort().rows))
    assert make_plan(alone, FIXED).checks[1].found == "none of 120 on two sides; every slide has a patient of its own"


def test_internal_slides_of_a_site_that_does_not_train_are_told() -> None:
    bags = cohort()
    rows = tuple(replace(row, site="new") if row.group in ("p2", "p6") else row for row in bags.rows)
    check = make_plan(some(rows), FIXED).checks[-1]
    assert not check.holds and check.found == "4 of 30 internal slides are of sites that do not train (new)"


# --- what is refused ---


def test_a_patient_in_two_parts_is_refused() -> None:
    bags = changed(cohort(), 0, columns={"role": "test"})
    with pytest.raises(SplitError, match=r"tears 1 patients apart \(s0-1 in train and s0-0 in internal are one patient\)"):
        make_plan(bags, FIXED)


def test_a_patient_under_two_spellings_is_one() -> None:
    bags = changed(cohort(), 0, group="TCGA-55-8507-01A")
    bags = changed(bags, 4, group="tcga-55-8507")
    with pytest.raises(SplitError, match="s0-0 in train and s2-0 in internal are one patient"):
        make_plan(bags, FIXED)


def test_a_slide_under_two_names_is_one_though_patients_are_unknown() -> None:
    bags = replace(cohort(), groups="slide")
    rows = [replace(row, group=row.slide_id) for row in bags.rows]
    rows[0] = replace(rows[0], slide_id="TCGA-55-8507-01Z-00-DX1.3C6198CF", group="a")
    rows[4] = replace(rows[4], slide_id="TCGA-55-8507-01Z-00-DX1.svs", group="b")
    with pytest.raises(SplitError, match="tears 1 slides apart"):
        make_plan(some(tuple(rows), "slide"), replace(FIXED, unit="slide"))
    rows[4] = replace(rows[4], slide_id="TCGA-55-8507-01Z-00-DX2")
    with pytest.raises(SplitError, match="tears 1 patients apart"):  # the barcode says whose they are
        make_plan(some(tuple(rows), "slide"), replace(FIXED, unit="slide"))
    rows[4] = replace(rows[4], slide_id="TCGA-55-8508-01Z-00-DX2")
    check = make_plan(some(tuple(rows), "slide"), replace(FIXED, unit="slide")).checks[1]
    assert not check.holds and check.found.startswith("unknown of 118 of 120 slides")


def test_a_site_inside_and_outside_is_refused() -> None:
    bags = cohort()
    rows = tuple(replace(row, site="far") if row.group == "p0" else row for row in bags.rows)
    with pytest.raises(SplitError, match="has the sites far inside and outside"):
        make_plan(some(rows), FIXED)


def test_a_site_in_two_spellings_is_one() -> None:
    rows = tuple(replace(row, site="Far-") if row.group == "p0" else row for row in cohort().rows)
    with pytest.raises(SplitError, match="has the sites Far-, far inside and outside"):
        make_plan(some(rows), FIXED)


def test_an_external_slide_without_a_site_is_refused() -> None:
    bags = cohort()
    rows = tuple(replace(row, site="") if row.columns["role"] == "external" else row for row in bags.rows)
    with pytest.raises(SplitError, match="30 external slides have no site"):
        make_plan(some(rows), FIXED)


def test_a_patient_at_two_sites_cannot_be_held_out_with_one_of_them() -> None:
    bags = changed(cohort(), 0, site="near1")
    with pytest.raises(SplitError, match="trial site near0 tears 1 patients apart"):
        make_plan(bags, SITES)


def test_a_fold_column_that_tears_a_patient_is_refused() -> None:
    bags = changed(cohort(), 0, columns={"fold": "4"})
    with pytest.raises(SplitError, match=r"split.column=fold tears 1 patients apart \(p0 in 0 and 4\)"):
        make_plan(bags, replace(FOLDS, column="fold", folds=None))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(FIXED, role="part"), "split.role is 'part', which no labelled slide has; the manifest has fold, role"),
        (replace(DRAWN, external_sites=["moon"]), "names moon, which no labelled slide comes from"),
        (replace(FIXED, train=["nobody"]), "the trial fixed has no slide to train on"),
        (replace(FOLDS, folds=50), "45 groups cannot fill 50 folds"),
        (replace(FOLDS, column="group", folds=None), "split.column is 'group'"),
        (replace(SITES, blocks=9), "come from 4 sites"),
        (replace(FIXED, unit="slide"), "the bags are grouped by patient"),
    ],
)
def test_what_cannot_be_planned_is_named(config: FixedSplit | FoldSplit | SiteSplit, words: str) -> None:
    with pytest.raises(SplitError, match=words.replace("(", r"\(")):
        make_plan(cohort(), config)


@pytest.mark.parametrize(
    ("base", "values", "words"),
    [
        (FIXED, {"external_sites": ["far"]}, "both say what is external"),
        (FIXED, {"internal": ["train"]}, "share train"),
        (FIXED, {"external": ["Train "]}, "share train: name a value once, in one part"),
        (DRAWN, {"test": 1.0}, "expected a share"),
        (DRAWN, {"unit": "tile"}, "expected patient or slide"),
        (FOLDS, {"column": "fold"}, "give one"),
        (FOLDS, {"folds": 1}, "expected 2 or more"),
        (SITES, {"folds": 1}, "expected 2 or more"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(base: object, values: dict[str, object], words: str) -> None:
    with pytest.raises(SplitError, match=words):
        replace(base, **values)  # type: ignore[type-var]


def test_the_kind_decides_the_schema() -> None:
    adapter: TypeAdapter[object] = TypeAdapter(SplitConfig)
    for config in (FIXED, FOLDS, SITES):
        assert adapter.validate_python(vars(config)) == config


def test_two_classes_need_a_patient_a_fold() -> None:
    rows = tuple(a_bag(f"s{i}", f"p{i}", "x", float(i < 3)) for i in range(30))
    with pytest.raises(SplitError, match="3 groups hold a slide of the target 1 for 5 folds"):
        make_plan(some(rows), replace(FOLDS, external_sites=[]))
