"""Counter hashes: bijective, uniform, independent, and the same for tensors and integers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from histoscale.data.keys import fork, key, keys, normal, permutation, permute, uniform, unit


@given(st.integers(0, 2**64 - 1), st.integers(1, 300))
def test_a_permutation_is_one(k: int, n: int) -> None:
    assert sorted(permutation(k, n).tolist()) == list(range(n))


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(0, 10**6))
def test_tensors_and_integers_agree(seed: int, step: int, slot: int) -> None:
    (found,) = keys(seed, "purpose", step, torch.tensor([slot])).tolist()
    assert found & (2**64 - 1) == key(seed, "purpose", step, slot)


@pytest.mark.parametrize("n", [2, 7, 16, 64, 65, 100])
def test_places_of_a_permutation_are_uniform(n: int) -> None:
    """Every item is equally likely in the first and the last place, and behind every other: chi-square, fixed keys."""
    trials = 100 * n
    orders = np.stack([permutation(key(1, "p", k), n) for k in range(trials)])
    for place in (0, n - 1):
        assert chisquare(np.bincount(orders[:, place], minlength=n)).pvalue > 1e-4
    after = np.bincount((orders[:, 1] - orders[:, 0]) % n, minlength=n)[1:]
    assert n == 2 or chisquare(after).pvalue > 1e-4


def test_draws_are_uniform_and_independent() -> None:
    parents = keys(0, "test", 5, torch.arange(20000))
    u = uniform(parents, 3).double()
    n = normal(parents, 2).double()
    forked = uniform(fork(parents, "other"), 1).double()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002
    assert abs(n.mean()) < 0.02 and abs(n.var() - 1) < 0.03
    together = torch.corrcoef(torch.cat([u, n, forked], 1).T)
    assert (together - torch.eye(6)).abs().max() < 0.03


GOLDEN_ORDER = [0, 4, 8, 2, 3, 5, 6, 1, 9, 7]
GOLDEN_KEY = 0xB8DAA809941FC3C2


def test_golden_values() -> None:
    """Other values would silently change what every recorded run means."""
    assert key(0, "visit", 1, 2, 3) == key(0, "visit", 1, 2, 3) != key(0, "visit", 1, 3, 2)
    assert [permute(12345, 10, i) for i in range(10)] == GOLDEN_ORDER
    assert key(7, "order", 3, 9) == GOLDEN_KEY and 0 <= unit(GOLDEN_KEY) < 1
