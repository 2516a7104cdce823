"""Losses and targets against definitions restated naively, row by row, in float64; then their traps."""

import math
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import two_ranks
from torch import Tensor

from histoscale.pretrain.losses import (
    center_targets,
    center_update,
    dino_ce,
    gram,
    ibot_ce,
    kde,
    koleo,
    sinkhorn_targets,
)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    parts = [math.exp(v - top) for v in row]
    return [v / sum(parts) for v in parts]


def cross_entropy(target: list[float], logits: list[float], temp: float) -> float:
    return -sum(p * math.log(q) for p, q in zip(target, softmax([v / temp for v in logits]), strict=True))


def assignment(logits: Tensor, temp: float, rounds: int) -> Tensor:
    """Sinkhorn-Knopp as a matrix that is rescaled in place (arXiv 2006.09882): prototypes to 1/K, then samples to 1/N."""
    q = (logits / temp).exp()
    q = q / q.sum()
    for _ in range(rounds):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


@pytest.mark.parametrize("temp", [0.04, 0.07])
@pytest.mark.parametrize("rounds", [1, 3])
def test_sinkhorn_equals_the_matrix_form(temp: float, rounds: int) -> None:
    logits = torch.nn.functional.normalize(noise(60, 24), dim=1)
    assert torch.allclose(sinkhorn_targets(logits, temp, rounds), assignment(logits, temp, rounds), atol=1e-10, rtol=1e-10)
    single = sinkhorn_targets(logits.float(), temp, rounds)
    expected = assignment(logits.float().double(), temp, rounds)
    assert single.dtype == torch.float32 and ((single - expected).abs() / expected).max() < 5e-6


def test_sinkhorn_is_a_softmax_with_one_bias_a_prototype() -> None:
    logits = noise(20, 8)
    bias = sinkhorn_targets(logits, 0.5, 3).log() - logits / 0.5
    bias = bias - bias.mean(1, keepdim=True)  # a shift of a row changes no softmax
    assert torch.allclose(bias, bias[:1].expand_as(bias), atol=1e-10) and bias.std() > 1e-2


def test_sinkhorn_ignores_a_shift_of_all_and_of_prototypes_but_not_of_samples() -> None:
    logits = noise(30, 10)
    targets = sinkhorn_targets(logits, 0.1, 3)
    assert torch.allclose(sinkhorn_targets(logits + 3, 0.1, 3), targets, atol=1e-9)
    assert torch.allclose(sinkhorn_targets(logits + noise(1, 10, seed=1), 0.1, 3), targets, atol=1e-9)
    assert not torch.allclose(sinkhorn_targets(logits + noise(30, 1, seed=1), 0.1, 3), targets, atol=1e-2)


def test_sinkhorn_does_not_overflow_where_the_matrix_form_does() -> None:
    logits = 20 * noise(16, 6).float()
    assert not assignment(logits, 0.04, 3).isfinite().all()
    assert sinkhorn_targets(logits, 0.04, 3).isfinite().all()


def test_sinkhorn_uses_prototypes_equally() -> None:
    logits = noise(400, 8) + 5 * noise(1, 8, seed=2)
    assert torch.allclose(sinkhorn_targets(logits, 1.0, 50).mean(0), torch.full((8,), 1 / 8, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("locals_", [0, 3])
def test_dino_equals_the_sum_over_pairs(locals_: int) -> None:
    views, batch, prototypes, temp = 2, 3, 5, 0.1
    student, targets = noise(views + locals_, batch, prototypes), noise(views, batch, prototypes, seed=1).softmax(-1)
    pairs = [(v, c) for v in range(views) for c in range(views + locals_) if v != c]
    expected = sum(
        cross_entropy(targets[v, b].tolist(), student[c, b].tolist(), temp) for v, c in pairs for b in range(batch)
    ) / (batch * len(pairs))  # fmt: skip
    assert abs(dino_ce(student, targets, temp).item() - expected) < 1e-10


def test_local_weight_scales_the_local_part_of_the_mean() -> None:
    student, targets = noise(5, 3, 6), noise(2, 3, 6, seed=1).softmax(-1)
    globals_only = dino_ce(student[:2], targets, 0.1) * 2 / 8  # 2 of 8 pairs are global
    locals_part = dino_ce(student, targets, 0.1) - globals_only
    assert torch.allclose(dino_ce(student, targets, 0.1, 0.25), globals_only + 0.25 * locals_part, rtol=1e-12)


def test_dino_without_a_pair_is_an_error() -> None:
    with pytest.raises(ValueError, match="two global views"):
        dino_ce(noise(1, 2, 4), noise(1, 2, 4).softmax(-1), 0.1)


def test_uniform_student_has_cross_entropy_ln_k() -> None:
    targets = noise(2, 4, 64).softmax(-1)
    assert math.isclose(dino_ce(torch.zeros(10, 4, 64), targets, 0.1).item(), math.log(64), rel_tol=1e-6)


def test_ibot_weighs_crops_alike_and_divides_by_all_of_them() -> None:
    sizes, crops, temp = [3, 1, 5], 6, 0.1  # three of six crops are masked
    student, targets = noise(9, 7), noise(9, 7, seed=1).softmax(-1)
    weights = torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in sizes])
    expected, start = 0.0, 0
    for n in sizes:
        rows = range(start, start + n)
        expected += sum(cross_entropy(targets[i].tolist(), student[i].tolist(), temp) for i in rows) / n / crops
        start += n
    assert abs(ibot_ce(student, targets, weights, crops, temp).item() - expected) < 1e-10


def test_centring() -> None:
    logits, centre = noise(6, 4), noise(4, seed=1)
    expected = [softmax([(v - c) / 0.07 for v, c in zip(row, centre.tolist(), strict=True)]) for row in logits.tolist()]
    assert torch.allclose(center_targets(logits, centre, 0.07), torch.tensor(expected, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(center_update(logits, centre, 0.9), 0.9 * centre + 0.1 * logits.mean(0), atol=1e-12)


def test_autocast_does_not_reach_inside() -> None:
    student, targets, z = noise(3, 4, 16).float(), noise(2, 4, 16).softmax(-1).float(), noise(8, 32).float()

    def all_terms() -> list[Tensor]:
        regular = [koleo(z, 8), kde(z, 10.0, 8), gram(z[None], z.flip(0)[None])]
        return [dino_ce(student, targets, 0.1), sinkhorn_targets(z, 0.07, 3), *regular]

    with torch.autocast("cpu", torch.bfloat16):
        inside = all_terms()
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(inside, all_terms(), strict=True))


def test_two_ranks_equal_one(tmp_path: Any) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(two_ranks.targets_and_centre, (f"file://{tmp_path / 'meet'}", results), nprocs=2)
        whole = sinkhorn_targets(two_ranks.logits(), 0.07, 3)
        for rank, (targets, centre) in results.items():
            assert torch.allclose(targets, whole[rank * 12 : rank * 12 + 12], atol=1e-10)
            assert torch.allclose(centre, center_update(two_ranks.logits(), torch.zeros(10), 0.9), atol=1e-10)


def test_inputs_are_not_changed() -> None:
    inputs = [noise(4, 6, 8), noise(2, 6, 8).softmax(-1), noise(8, 8)]
    before = [x.clone() for x in inputs]
    dino_ce(inputs[0], inputs[1], 0.1), sinkhorn_targets(inputs[2], 0.1, 3)
    koleo(inputs[2], 4), kde(inputs[2], 5.0, 4), gram(inputs[0], inputs[0].flip(0), "both")
    center_update(inputs[2], inputs[2][0], 0.9)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
