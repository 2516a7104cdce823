"""Splits: patients whole, subsets nested, overlap an error."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoscale.data.manifest import Slide
from histoscale.data.splits import SplitError, check_disjoint, folds, groups, nested_subset


def slide(name: str, patient: str | None) -> Slide:
    return Slide(name, "x.svs", patient, None, None, None, None, None, None, None, None, {})


names_strategy = st.lists(st.sampled_from([f"p{i}" for i in range(20)]), min_size=30, max_size=80)


@given(names_strategy, st.integers(0, 5))
def test_no_patient_is_torn_apart_and_folds_are_even(names: list[str], seed: int) -> None:
    distinct = len(set(names))
    if distinct < 4:
        with pytest.raises(SplitError, match="cannot fill"):
            folds(names, 4, seed)
        return
    fold = folds(names, 4, seed)
    assert all(len({f for f, n in zip(fold, names, strict=True) if n == name}) == 1 for name in set(names))
    patients = Counter(dict(zip(names, fold, strict=True)).values())
    assert max(patients.values()) - min(patients.values()) <= 1 and len(patients) == 4


def test_strata_are_spread_over_the_folds() -> None:
    names = [f"p{i}" for i in range(40)]
    strata = ["tumour" if i < 8 else "benign" for i in range(40)]
    fold = folds(names, 4, 0, strata)
    assert Counter(f for f, s in zip(fold, strata, strict=True) if s == "tumour") == {0: 2, 1: 2, 2: 2, 3: 2}
    assert folds(names, 4, 1, strata) != fold


@given(names_strategy, st.integers(0, 5), st.integers(1, 30), st.integers(1, 30))
def test_subsets_are_nested_and_keep_patients_whole(names: list[str], seed: int, a: int, b: int) -> None:
    small, large = (set(nested_subset(names, size, seed)) for size in sorted((a, b)))
    assert small <= large and len(small) >= min(a, b)
    assert {names[i] for i in large}.isdisjoint({name for i, name in enumerate(names) if i not in large})


def test_a_new_patient_does_not_move_the_others() -> None:
    names = [f"p{i}" for i in range(30)]
    before = {names[i] for i in nested_subset(names, 10, 3)}
    after = {[*names, "new"][i] for i in nested_subset([*names, "new"], 10, 3)}
    assert len(before - after) <= 1


def test_without_patients_only_slides_can_be_split() -> None:
    slides = [slide("a", "p1"), slide("b", None)]
    with pytest.raises(SplitError, match=r"1 of 2 slides.*\(b\).*split.unit=slide"):
        groups(slides, "patient")
    assert groups(slides, "slide") == ["a", "b"]
    with pytest.raises(SplitError, match="'site'"):
        groups(slides, "site")


def test_overlap_is_an_error_that_names_the_patients() -> None:
    check_disjoint({"train": ["p1", "p2", "p1"], "test": ["p3"]})
    with pytest.raises(SplitError, match="p2 in test and train"):
        check_disjoint({"train": ["p1", "p2"], "test": ["p2", "p3"]})
