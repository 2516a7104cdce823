"""What keeps class tokens apart, KoLeo and KDE: definitions, signs, duplicates, and pools over ranks. Then Gram anchoring."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import restated
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import two_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from histoscale.pretrain.losses import gram, kde, kde_reversed, koleo, regrid

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(term: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    term(z).backward()
    assert z.grad is not None
    return z.grad


# ------------------------------------------------------------------------------------------------------ KoLeo


@pytest.mark.parametrize("pool", [4, 12, None])
def test_koleo_equals_the_definition(pool: int | None) -> None:
    z = noise(12, 6)
    assert torch.allclose(koleo(z, pool), restated.koleo(z, pool or 12), rtol=1e-12)
    assert torch.allclose(gradient(lambda z: koleo(z, pool), z), gradient(lambda z: restated.koleo(z, pool or 12), z), atol=1e-12)


def test_koleo_over_several_neighbours_is_their_mean() -> None:
    z = F.normalize(noise(10, 5), dim=1)
    near = torch.cdist(z, z).fill_diagonal_(torch.inf).sort(1).values[:, :3]
    assert torch.allclose(koleo(z, None, neighbours=3), -near.log().mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="10 neighbours in pools of 10 rows"):
        koleo(z, None, neighbours=10)


@pytest.mark.parametrize(("width", "ceiling"), [(384, 15.4), (1024, 14.9), (1536, 14.7)])
def test_koleo_of_identical_rows_is_its_ceiling(width: int, ceiling: float) -> None:
    assert abs(koleo(torch.ones(8, width), 8).item() - ceiling) < 0.05


def test_the_neighbour_learns_too() -> None:
    """Row 2 is nobody's nearest neighbour and far away; rows 0 and 1 move each other in both roles."""
    z = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.3, 0.0], [0.0, 0.2, 1.0]], dtype=torch.float64), dim=1)
    grad = gradient(lambda z: koleo(z, None), z)
    pulled = z.clone().requires_grad_()
    nearest = z[[1, 0, 1]]
    (-(pulled - nearest).norm(dim=1).log().mean()).backward()
    assert pulled.grad is not None
    tangent = pulled.grad - (pulled.grad * z).sum(1, keepdim=True) * z  # what learns where neighbours are constants
    assert torch.allclose(grad[2], tangent[2], atol=1e-6) and not torch.allclose(grad[:2], tangent[:2], atol=1e-2)


# ------------------------------------------------------------------------------------------------------ KDE


@pytest.mark.parametrize("pool", [4, 12, None])
def test_kde_equals_the_definition(pool: int | None) -> None:
    z = noise(12, 6)
    assert torch.allclose(kde(z, 10.0, pool), restated.kde(z, 10.0, pool or 12), rtol=1e-12)
    ours = gradient(lambda z: kde(z, 10.0, pool), z)
    assert torch.allclose(ours, gradient(lambda z: restated.kde(z, 10.0, pool or 12), z), atol=1e-12)


@pytest.mark.parametrize(("kappa", "spread"), [(5.0, 0.03), (10.0, 0.12)])
def test_kde_golden_values(kappa: float, spread: float) -> None:
    assert math.isclose(kde(noise(1, 384).expand(48, 384), kappa, 48).item(), kappa, rel_tol=1e-9)
    assert abs(kde(torch.eye(384, dtype=torch.float64)[:48], kappa, 48).item()) < 1e-9
    drawn = torch.stack([kde(noise(48, 384, seed=seed), kappa, 48) for seed in range(20)])
    assert abs(drawn.mean().item() - spread) < 0.01
    angle = [0.1, 0.5, 1.0, 2.0, 3.0]
    pairs = [kde(torch.tensor([[1.0, 0.0], [math.cos(a), math.sin(a)]], dtype=torch.float64), kappa, 2).item() for a in angle]
    assert all(math.isclose(v, kappa * math.cos(a), rel_tol=1e-9) for v, a in zip(pairs, angle, strict=True))


@pytest.mark.parametrize("rows", ["spread", "near duplicates", "two duplicates"])
def test_kdes_gradient_is_bounded_where_koleos_explodes(rows: str) -> None:
    z = F.normalize(noise(16, 32), dim=1)
    if rows == "near duplicates":
        z = F.normalize(z[:1] + 1e-6 * z, dim=1)
    elif rows == "two duplicates":
        z[1] = z[0] + 1e-5 * z[2]
        z = F.normalize(z, dim=1)
    longest = gradient(lambda z: kde(z, 10.0, None), z).norm(dim=1).max()
    assert 0 < longest <= 2 * 10.0 / 16
    if rows != "spread":
        assert gradient(lambda z: koleo(z, None), z).norm(dim=1).max() > 1000 * longest


def test_the_published_kde_rewards_collapse() -> None:
    """MedARC-AI/OpenMidnight's term at n = 48, kappa = 5: -8.87 collapsed, -5.27 orthogonal; ours is the other way round."""
    collapsed, orthogonal = torch.ones(48, 384), torch.eye(384)[:48]
    assert abs(kde_reversed(collapsed, 5.0, 48).item() + 8.87) < 0.01
    assert abs(kde_reversed(orthogonal, 5.0, 48).item() + 5.27) < 0.01
    assert kde(collapsed, 5.0, 48) > kde(orthogonal, 5.0, 48) + 4.9


# ------------------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("term", [lambda z: koleo(z, None), lambda z: kde(z, 10.0, None)])
def test_identical_rows_stay_finite(dtype: torch.dtype, rows: int, term: Callable[[Tensor], Tensor]) -> None:
    """In half precision 1e-8 is 0 and the logarithm of the distance infinite (facebookresearch/dinov2#143)."""
    z = noise(1, 384, dtype=dtype).expand(rows, 384).clone().requires_grad_()
    value = term(z)
    value.backward()
    assert z.grad is not None
    assert value.isfinite() and z.grad.isfinite().all() and value.dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize("term", [koleo, lambda z, pool: kde(z, 5.0, pool)])
@pytest.mark.parametrize(("rows", "pool"), [(3, 1), (1, None)])
def test_a_row_alone_is_zero_and_told(term: Callable[[Tensor, int | None], Tensor], rows: int, pool: int | None) -> None:
    with pytest.warns(UserWarning, match="is 0: each row is alone in its pool"):
        assert term(noise(rows, 4), pool).item() == 0


def test_pools_are_as_large_as_told_and_at_most_all() -> None:
    z = noise(12, 6)
    assert koleo(z, 64) == koleo(z, 12) == koleo(z, None) != koleo(z, 6)
    with pytest.raises(ValueError, match="pools of 5 rows do not divide the 12 rows"):
        kde(z, 5.0, 5)


@pytest.mark.parametrize("term", [lambda z: koleo(z, 16), lambda z: kde(z, 5.0, 16)])
def test_one_gradient_step_spreads_the_rows(term: Callable[[Tensor], Tensor]) -> None:
    """The sign: minimising must push apart (public code adds the density with the wrong one)."""
    z = noise(1, 32) + 0.05 * noise(16, 32, seed=1)

    def similarity_after(term: Callable[[Tensor], Tensor]) -> float:
        grad = gradient(term, z)
        rows = F.normalize(z - 0.05 * grad / grad.norm(dim=1, keepdim=True), dim=1)
        return float((rows @ rows.T).mean())

    before = float((F.normalize(z, dim=1) @ F.normalize(z, dim=1).T).mean())
    assert similarity_after(term) < before < similarity_after(lambda z: kde_reversed(z, 5.0, 16))


def test_two_ranks_equal_one_with_the_joined_batch(tmp_path: Any) -> None:
    """Values and gradients averaged over ranks, in float64, whether pools lie in a rank, span ranks or straddle their border."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(two_ranks.pooled, (f"file://{tmp_path / 'meet'}", results), nprocs=2)
        halves = dict(results)
    for name, (term, pool) in two_ranks.TERMS.items():
        joined = two_ranks.features().requires_grad_()
        value = term(joined, pool, None)
        value.backward()
        assert joined.grad is not None and joined.grad.abs().max() > 0
        assert torch.allclose((halves[0][name][0] + halves[1][name][0]) / 2, value, rtol=1e-12), name
        averaged = torch.cat([halves[0][name][1], halves[1][name][1]]) / 2  # as DDP and FSDP do
        assert torch.allclose(averaged, joined.grad, rtol=1e-10, atol=1e-12), name


# ------------------------------------------------------------------------------------------------------ Gram


def test_gram_equals_the_definition() -> None:
    x, y = noise(3, 9, 8), noise(3, 9, 8, seed=1)
    assert torch.allclose(gram(x, y), restated.gram(x, y), rtol=1e-12)
    assert torch.allclose(gradient(lambda x: gram(x, y), x), gradient(lambda x: restated.gram(x, y), x), atol=1e-12)


def test_gram_is_zero_on_itself_and_blind_to_rotation_and_scale() -> None:
    x, y = noise(3, 9, 8), noise(3, 9, 8, seed=1)
    rotation = torch.linalg.qr(noise(8, 8, seed=2)).Q
    scale = noise(3, 9, 1, seed=3).exp()
    assert gram(x, x).item() < 1e-28 and gram(x, scale * x @ rotation).item() < 1e-28
    assert torch.allclose(gram(scale * x @ rotation, y), gram(x, y), rtol=1e-10)
    assert gram(x, y) > 0.01


def test_gram_teaches_the_student_only_and_changes_neither() -> None:
    x, y = noise(2, 5, 4).requires_grad_(), noise(2, 5, 4, seed=1).requires_grad_()
    before = x.detach().clone(), y.detach().clone()
    for negatives in ("keep", "both", "teacher"):
        gram(x, y, negatives).backward()
    assert x.grad is not None and y.grad is None
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_gram_negatives() -> None:
    """One pair of tokens with cosine a against b: the two off-diagonal entries of four are what differs."""

    def tokens(cosine: float) -> Tensor:
        return torch.tensor([[[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]]], dtype=torch.float64)

    def found(a: float, b: float, negatives: str) -> float:
        return 2 * gram(tokens(a), tokens(b), negatives).item()

    expected = {"keep": lambda a, b: (a - b) ** 2, "both": lambda a, b: (max(a, 0) - max(b, 0)) ** 2,
                "teacher": lambda a, b: ((0 if a < 0 and b < 0 else a) - max(b, 0)) ** 2}  # fmt: skip
    for negatives, rule in expected.items():
        for a, b in ((0.5, 0.2), (-0.5, 0.2), (0.5, -0.2), (-0.5, -0.2)):
            assert math.isclose(found(a, b, negatives), rule(a, b), abs_tol=1e-12), (negatives, a, b)
    with pytest.raises(ValueError, match="negatives='drop'"):
        gram(tokens(0.5), tokens(0.5), "drop")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_is_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    x, y = noise(2, 6, 16, dtype=dtype), noise(2, 6, 16, seed=1, dtype=dtype)
    value = gram(x, y)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(value.double(), restated.gram(x.double(), y.double()), rtol=1e-6)


def test_gram_holds_nothing_larger_than_the_pairs_of_a_crop() -> None:
    """The cosines of all crops together would take (N P)^2 numbers, 2.5 GB for 64 patches of 196 tokens."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.numel = max(self.numel, *(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out])
                                           if isinstance(x, Tensor)), 0)  # fmt: skip
            return out

    x, y = noise(16, 9, 4).requires_grad_(), noise(16, 9, 4, seed=1)
    with Largest() as largest:
        gram(x, y).backward()
    assert largest.numel == 16 * 9 * 9


def test_regrid_is_bicubic_without_antialiasing() -> None:
    tokens = noise(2, 8 * 12, 5)
    smaller = regrid(tokens, (8, 12), (4, 6))
    maps = tokens.transpose(1, 2).view(2, 5, 8, 12)
    kernel = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375], dtype=torch.float64)  # Keys' cubic, a = -0.75, at half way
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate").unfold(2, 4, 2).unfold(3, 4, 2)
    expected = torch.einsum("ncijab,a,b->ncij", padded, kernel, kernel).flatten(2).transpose(1, 2)
    assert torch.allclose(smaller, expected, atol=1e-12)
    assert regrid(tokens, (8, 12), (8, 12)) is tokens
    assert regrid(tokens.half(), (8, 12), (4, 6)).dtype == torch.float32
