"""Counter hashes: every random choice is a pure function of a seed, a purpose and counters, the same on every device."""

from __future__ import annotations  # torch is imported by those who have tensors, not by those who only draw by key

import hashlib
import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_FEW, _ROUNDS = 64, 8


def _mix(x: int) -> int:
    """The splitmix64 finaliser: a bijection of 64-bit words."""
    x = ((x ^ (x >> 30)) * _MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> 31)


@lru_cache(maxsize=4096)
def _purpose(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def _absorb(state: int, word: int) -> int:
    return _mix((state + _GOLDEN + (word & _MASK)) & _MASK)


def key(seed: int, purpose: str, *counters: int) -> int:
    """An unsigned 64-bit key of (seed, purpose, counters)."""
    state = _absorb(_mix(seed & _MASK), _purpose(purpose))
    for counter in counters:
        state = _absorb(state, counter)
    return state


def unit(k: int) -> float:
    """A key as a float in [0, 1), from its top 53 bits."""
    return (k >> 11) / (1 << 53)


def permute(k: int, n: int, i: int) -> int:
    """Place i of the permutation of range(n) that key k names; O(1) memory. Raises ValueError unless 0 <= i < n.

    Few places are sorted by their hashes, which is a uniform shuffle; many go through a Feistel network on the next even number
    of bits, walked until it lands inside (Black and Rogaway 2002, doi 10.1007/3-540-45760-7_9), which is not one on few.
    """
    if not 0 <= i < n:
        raise ValueError(f"permute: place {i} is outside range({n})")
    if n <= _FEW:
        return sorted(range(n), key=lambda place: _absorb(k, place))[i]
    half = ((n - 1).bit_length() + 1) // 2
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix((k + turn * _GOLDEN + right) & _MASK) & low)
        i = (left << half) | right
        if i < n:
            return i


def permutation(k: int, n: int) -> np.ndarray:
    """The whole permutation of `permute`: int64 [n]."""
    if n <= _FEW:
        return np.array(sorted(range(n), key=lambda place: _absorb(k, place)), np.int64)
    return np.fromiter((permute(k, n, i) for i in range(n)), np.int64, n)


def key_array(seed: int, purpose: str, step: int, slots: np.ndarray) -> np.ndarray:
    """`key(seed, purpose, step, slot)` for every slot: uint64 [B]."""
    x = slots.astype(np.uint64) + np.uint64((key(seed, purpose, step) + _GOLDEN) & _MASK)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    return x ^ (x >> np.uint64(31))


# The same hash on tensors: int64 products wrap alike on every device; only the right shifts need a mask.


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift(x, 31)


def keys(seed: int, purpose: str, step: int, slots: Tensor) -> Tensor:
    """`key(seed, purpose, step, slot)` for every slot: int64 [B] (the bits of the unsigned keys), on the slots' device."""
    return _mix_tensor(slots.long() + _signed((key(seed, purpose, step) + _GOLDEN) & _MASK))


def fork(parents: Tensor, purpose: str) -> Tensor:
    """Independent keys for another purpose: int64 of the same shape."""
    return _mix_tensor(parents + _signed((_purpose(purpose) + _GOLDEN) & _MASK))


def uniform(parents: Tensor, columns: int) -> Tensor:
    """float32 [*parents.shape, columns] in [0, 1), on a grid of 2^-24 so that every device agrees to the bit."""
    counters = parents.new_ones(columns).cumsum(0) * _signed(_GOLDEN)
    return _shift(_mix_tensor(parents[..., None] + counters), 40).float() * 2.0**-24


def normal(parents: Tensor, columns: int) -> Tensor:
    """float32 [*parents.shape, columns], standard normal by Box-Muller (computed in float64, so devices agree to rounding)."""
    radius = (-2 * (-uniform(fork(parents, "radius"), columns).double()).log1p()).sqrt()
    return (radius * (2 * math.pi * uniform(fork(parents, "angle"), columns).double()).cos()).float()
