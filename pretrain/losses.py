"""Self-supervised losses and teacher targets: pure functions of tensors, at least float32 inside.

Sources: DINO arXiv 2104.14294, iBOT 2111.07832, DINOv2 2304.07193 with Sinkhorn-Knopp of SwAV 2006.09882, KoLeo 1806.03198,
KDE as a regulariser 2408.00738, Gram anchoring 2508.10104. `across` is the process group whose rows count as one batch; None is
this process alone.
"""

import math
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from histoscale.data.ranks import gather

Across = dist.ProcessGroup | None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sum(x: Tensor, across: Across) -> Tensor:
    if across is not None:
        dist.all_reduce(x, group=across)
    return x


@torch.no_grad()
def sinkhorn_targets(logits: Tensor, temp: float, iterations: int, across: Across = None) -> Tensor:
    """Teacher logits [n, K] -> Sinkhorn-Knopp targets [n, K]: prototypes and samples are normalised in turn, samples last.

    Prototypes are used equally over the rows of all ranks. One table of exponentials and `2 * iterations` products with it: in
    the log domain each of them goes five times through memory. A prototype's greatest entry over all rows, and then a row's
    greatest, are brought to 1, so that every sum lies between 1 / (nK) and nK whatever the logits. Rows begin at what their
    shift took away, because three iterations do not converge and would keep it.
    """
    table = _wide(logits) / temp
    top = table.amax(0)
    if across is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=across)
    table -= top
    shift = table.amax(1, keepdim=True)
    table = table.sub_(shift).exp_()
    samples = shift[:, 0].exp()
    with torch.autocast(table.device.type, enabled=False):
        for _ in range(iterations):
            prototypes = _sum(samples @ table, across).reciprocal()
            samples = (table @ prototypes).reciprocal()
    return table.mul_(prototypes).mul_(samples[:, None])


@torch.no_grad()
def center_targets(logits: Tensor, centre: Tensor, temp: float) -> Tensor:
    """Teacher logits [n, K], centre [K] -> softmax((logits - centre) / temp)."""
    return F.softmax((_wide(logits) - centre) / temp, -1)


@torch.no_grad()
def center_update(logits: Tensor, centre: Tensor, momentum: float, across: Across = None) -> Tensor:
    """The centre for the next step: momentum * centre + (1 - momentum) * mean over ranks of each rank's mean."""
    mean = _wide(logits).mean(0)
    if across is not None:
        dist.all_reduce(mean, group=across)
        mean /= dist.get_world_size(across)
    return momentum * centre + (1 - momentum) * mean


def dino_ce(student: Tensor, targets: Tensor, temp: float, local_weight: float = 1.0) -> Tensor:
    """Mean cross-entropy over pairs of a student crop and another global view's target.

    student: logits [V + L, B, K], globals first; targets: [V, B, K] probabilities. V(V-1) + VL pairs: none of a view with itself.
    local_weight multiplies the local crops' part of that mean (facebookresearch/dinov3). Raises ValueError when there is no pair.
    """
    views, crops = len(targets), len(student)
    pairs = views * (views - 1) + views * (crops - views)
    if pairs == 0:
        raise ValueError("DINO needs at least two global views, or one and a local one")
    log_p = F.log_softmax(_wide(student) / temp, -1)
    total = targets.sum(0)
    globals_ = (log_p[:views] * (total - targets)).sum()
    locals_ = (log_p[views:].sum(0) * total).sum()  # the sum over views is the cross-entropy with the summed targets
    return -(globals_ + local_weight * locals_) / (student.shape[1] * pairs)


def ibot_ce(student: Tensor, targets: Tensor, weights: Tensor, crops: int, temp: float) -> Tensor:
    """Masked-patch cross-entropy: student logits [M, K], targets [M, K], weights [M] = 1 / masked patches of the token's crop.

    Divided by all `crops` global crops (V * B), also the unmasked, as DINOv2 does: with half of them masked it is half the mean.
    """
    log_p = F.log_softmax(_wide(student) / temp, -1)
    return -((log_p * targets).sum(-1) * weights).sum() / crops


def _pool(rows: Tensor, size: int | None, across: Across) -> tuple[Tensor, Tensor, Tensor, int]:
    """This rank's rows [B, D] beside those that they are compared with: `size` consecutive rows in rank order, at most all.

    Returns own rows [g, n, D]; all rows [g, c, D], with gradient to every rank; bool [n, c], true for a row itself and for other
    pools; the pool's size. Nothing is gathered where pools divide a rank's rows. Raises ValueError when pools do not divide all.
    """
    batch, world = len(rows), 1 if across is None else dist.get_world_size(across)
    size = min(size or batch * world, batch * world)
    if batch % size == 0:
        own = rows.unflatten(0, (-1, size))
        return own, own, torch.eye(size, dtype=torch.bool, device=rows.device), size
    if batch * world % size:
        raise ValueError(f"pools of {size} rows do not divide the {batch * world} rows of all ranks: choose a divisor, or null")
    first = 0 if across is None else dist.get_rank(across) * batch
    places, all_places = torch.arange(first, first + batch, device=rows.device), torch.arange(batch * world, device=rows.device)
    itself = places[:, None] == all_places
    return rows[None], gather(rows, across)[None], itself | (places[:, None] // size != all_places // size), size


def _alone(z: Tensor, name: str) -> Tensor:
    warnings.warn(f"{name} is 0: each row is alone in its pool; raise the pool or the batch", stacklevel=3)
    return _wide(z).sum() * 0


def koleo(z: Tensor, pool: int | None, across: Across = None, neighbours: int = 1) -> Tensor:
    """Kozachenko-Leonenko entropy term: -mean log distance to the `neighbours` nearest of `pool` consecutive rows (None: all).

    z: [B, D] class tokens of one global view; float32 inside, so identical rows stay finite (15.4 for D = 384) in any dtype.
    The mean is over this rank's rows; pools may span ranks, and gradients then reach remote neighbours: averaged over ranks,
    value and gradient are those of the joined rows. A row alone gives 0 with a warning.
    Raises ValueError for pools that do not divide the rows, or that are no larger than `neighbours`.
    """
    with torch.autocast(z.device.type, enabled=False):
        own, rows, apart, size = _pool(F.normalize(_wide(z), dim=-1, eps=1e-8), pool, across)
        if size == 1:
            return _alone(z, "KoLeo")
        if not 0 < neighbours < size:
            raise ValueError(f"KoLeo over {neighbours} neighbours in pools of {size} rows: expected 1 to {size - 1}")
        with torch.no_grad():
            similarity = (own @ rows.transpose(1, 2)).masked_fill(apart, -2)
            nearest = similarity.topk(neighbours, -1).indices.flatten(1)  # [g, n * k]
        others = rows.gather(1, nearest[..., None].expand(-1, -1, rows.shape[2])).unflatten(1, (-1, neighbours))
        distance = F.pairwise_distance(own[:, :, None], others, eps=1e-8)
        return -(distance + 1e-8).log().mean()


def kde(z: Tensor, kappa: float, pool: int | None, across: Across = None) -> Tensor:
    """Mean log density on the sphere, to be minimised: mean_i [ logsumexp_{j != i} kappa z_i.z_j - log(n - 1) ].

    z: [B, D]; pools of n rows as in `koleo`. kappa when collapsed, 0 when orthogonal; 0 with a warning for a row alone.
    The gradient by a unit row is at most 2 kappa / B long, also next to duplicates.
    """
    with torch.autocast(z.device.type, enabled=False):
        own, rows, apart, size = _pool(F.normalize(_wide(z), dim=-1), pool, across)
        if size == 1:
            return _alone(z, "KDE")
        density = (kappa * own @ rows.transpose(1, 2)).masked_fill(apart, -math.inf)
        return (density.logsumexp(-1) - math.log(size - 1)).mean()


def kde_reversed(z: Tensor, kappa: float, pool: int | None, across: Across = None) -> Tensor:
    """The density term as MedARC-AI/OpenMidnight adds it, for ablations only: its sign rewards collapse, a row meets itself.

    -mean_i log( sum_j exp(kappa z_i.z_j) + 1e-9 ), over pools as in `koleo`.
    """
    with torch.autocast(z.device.type, enabled=False):
        own, rows, apart, _ = _pool(F.normalize(_wide(z), dim=-1), pool, across)
        others = (kappa * own @ rows.transpose(1, 2)).masked_fill(apart, -math.inf).exp().sum(-1)
        return -(others + (kappa * own.square().sum(-1)).exp() + 1e-9).log().mean()


def gram(student: Tensor, target: Tensor, negatives: str = "keep") -> Tensor:
    """Gram anchoring (arXiv 2508.10104): mean squared difference between the cosines of all pairs of patch tokens.

    student, target: [N, P, D], the pairs of one row of N each; the target has no gradient. Negative cosines are kept, or "both"
    sides are clamped at 0, or the "teacher" only, with the student's where both are negative (facebookresearch/dinov3).
    Raises ValueError for another word.
    """
    if negatives not in ("keep", "both", "teacher"):
        raise ValueError(f"gram negatives={negatives!r}: expected keep, both or teacher")
    with torch.autocast(student.device.type, enabled=False):
        x, y = F.normalize(_wide(student), dim=-1), F.normalize(_wide(target.detach()), dim=-1)
        ours, theirs = x @ x.transpose(-1, -2), y @ y.transpose(-1, -2)
        if negatives == "both":
            ours, theirs = ours.clamp(min=0), theirs.clamp(min=0)
        elif negatives == "teacher":
            ours, theirs = ours.masked_fill((ours < 0) & (theirs < 0), 0), theirs.clamp(min=0)
        return (ours - theirs).square().mean()


@torch.no_grad()
def regrid(tokens: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Patch tokens [N, H * W, D] of grid `source` -> [N, h * w, D] of grid `target`: bicubic, without antialiasing (ibid.)."""
    if source == target:
        return tokens
    maps = _wide(tokens).transpose(1, 2).unflatten(2, source)
    return F.interpolate(maps, size=target, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
