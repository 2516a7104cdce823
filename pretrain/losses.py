"""Self-supervised losses and teacher targets: pure functions of tensors, at least float32 inside.

Sources: DINO arXiv 2104.14294, iBOT 2111.07832, DINOv2 2304.07193 with Sinkhorn-Knopp of SwAV 2006.09882, KoLeo 1806.03198,
KDE as a regulariser 2408.00738. `across` is the process group whose rows count as one batch; None is this process alone.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Across = dist.ProcessGroup | None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _logsumexp_rows(x: Tensor, across: Across) -> Tensor:
    """log sum exp over the rows of all ranks: [n, K] -> [K]."""
    if across is None:
        return x.logsumexp(0)
    top = x.max(0).values
    dist.all_reduce(top, dist.ReduceOp.MAX, group=across)
    total = (x - top).exp().sum(0)
    dist.all_reduce(total, group=across)
    return total.log() + top


@torch.no_grad()
def sinkhorn_scalings(logits: Tensor, temp: float, iterations: int, across: Across = None) -> Tensor:
    """Teacher logits [n, K] -> one bias per prototype [K], such that softmax(logits / temp + bias) is the Sinkhorn-Knopp target.

    The log-domain form: prototypes and samples are normalised in turn, samples last, so constants cancel and nothing overflows.
    No shift per sample may enter at the start: three iterations do not converge and would keep it.
    """
    scores = _wide(logits) / temp
    samples = torch.zeros_like(scores[:, :1])
    for i in range(iterations):
        prototypes = -_logsumexp_rows(scores + samples, across)
        if i + 1 < iterations:
            samples = -(scores + prototypes).logsumexp(1, keepdim=True)
    return prototypes


@torch.no_grad()
def sinkhorn_targets(logits: Tensor, temp: float, iterations: int, across: Across = None) -> Tensor:
    """Teacher logits [n, K] -> target probabilities [n, K]; prototypes are used equally over the rows of all ranks."""
    return F.softmax(_wide(logits) / temp + sinkhorn_scalings(logits, temp, iterations, across), -1)


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


def dino_ce(student: Tensor, targets: Tensor, temp: float) -> Tensor:
    """Mean cross-entropy over pairs of a student crop and another global view's target.

    student: logits [V + L, B, K], globals first; targets: [V, B, K] probabilities. V(V-1) + VL pairs: none of a view with itself.
    Raises ValueError when there is no pair.
    """
    views, crops = len(targets), len(student)
    pairs = views * (views - 1) + views * (crops - views)
    if pairs == 0:
        raise ValueError("DINO needs at least two global views, or one and a local one")
    log_p = F.log_softmax(_wide(student) / temp, -1)
    total = targets.sum(0)
    globals_ = (log_p[:views] * (total - targets)).sum()
    locals_ = (log_p[views:].sum(0) * total).sum()  # the sum over views is the cross-entropy with the summed targets
    return -(globals_ + locals_) / (student.shape[1] * pairs)


def ibot_ce(student: Tensor, targets: Tensor, weights: Tensor, crops: int, temp: float) -> Tensor:
    """Masked-patch cross-entropy: student logits [M, K], targets [M, K], weights [M] = 1 / masked patches of the token's crop.

    Divided by all `crops` global crops (V * B), also the unmasked, as DINOv2 does: with half of them masked it is half the mean.
    """
    log_p = F.log_softmax(_wide(student) / temp, -1)
    return -((log_p * targets).sum(-1) * weights).sum() / crops


def koleo(z: Tensor, group: int) -> Tensor:
    """Kozachenko-Leonenko entropy term: -mean log distance to the nearest neighbour among `group` consecutive rows.

    z: [B, D] class tokens of one global view; float32 inside whatever the dtype, so identical rows stay finite. Groups of one
    have no neighbour: the value is 0.
    """
    if group == 1:
        return _wide(z).sum() * 0
    with torch.autocast(z.device.type, enabled=False):
        rows = F.normalize(_wide(z), dim=-1, eps=1e-8).unflatten(0, (-1, group))
        with torch.no_grad():
            similarity = rows @ rows.transpose(1, 2)
            similarity.diagonal(dim1=1, dim2=2).fill_(-2)
            nearest = similarity.argmax(-1)
        neighbours = rows.gather(1, nearest[..., None].expand_as(rows))
        distance = F.pairwise_distance(rows.flatten(0, 1), neighbours.flatten(0, 1), eps=1e-8)
        return -(distance + 1e-8).log().mean()


def kde(z: Tensor, kappa: float, group: int) -> Tensor:
    """Mean log density on the sphere, to be minimised: mean_i [ logsumexp_{j != i} kappa z_i.z_j - log(group - 1) ].

    z: [B, D], in groups of `group` consecutive rows. kappa when collapsed, 0 when orthogonal; 0 for groups of one.
    """
    if group == 1:
        return _wide(z).sum() * 0
    with torch.autocast(z.device.type, enabled=False):
        rows = F.normalize(_wide(z), dim=-1).unflatten(0, (-1, group))
        itself = torch.eye(group, dtype=torch.bool, device=z.device)
        density = (kappa * rows @ rows.transpose(1, 2)).masked_fill(itself, -math.inf)
        return (density.logsumexp(-1) - math.log(group - 1)).mean()
