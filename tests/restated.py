"""One training step restated from the papers' formulas: a ViT, heads, targets and every loss term, to be read, not to be fast.

Nothing of histoscale is imported. Weights are the dictionary of a branch; autograd gives the gradients.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, w[f"{name}.weight"])
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    rows, tokens, width = x.shape
    q, k, v = linear(w, f"{name}.qkv", x).view(rows, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(width // heads)).softmax(-1)
    return linear(w, f"{name}.proj", torch.einsum("bhij,bhjd->bihd", weights, v).reshape(rows, tokens, width))


def mlp(w: Weights, name: str, x: Tensor, swiglu: bool) -> Tensor:
    x = linear(w, f"{name}.fc1", x)
    if swiglu:
        gate, value = x.chunk(2, -1)
        x = gate * torch.sigmoid(gate) * value
    else:
        x = gelu(x)
    return linear(w, f"{name}.fc2", x)


def residual(x: Tensor, rows: Tensor | None, branch: Tensor) -> Tensor:
    """Batch-subset stochastic depth: x[rows] += b / n * branch."""
    if rows is None:
        return x + branch
    x = x.clone()
    x[rows] = x[rows] + len(x) / len(rows) * branch
    return x


def vit(
    w: Weights, images: Tensor, patch: int, heads: int, swiglu: bool, masks: Tensor | None = None, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Class token [B, D] and patch tokens [B, N, D]. kept: rows of each residual branch, [2 * depth, n]."""
    side = images.shape[-1] // patch
    x = F.conv2d(images, w["backbone.patch_embed.proj.weight"], w["backbone.patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    if masks is not None:
        x = torch.where(masks[..., None], w["mask_token"], x)
    table, cls = w["backbone.pos_embed"], w["backbone.cls_token"]
    grid = math.isqrt(table.shape[1])
    if grid**2 < table.shape[1]:  # the class token has a position of its own
        cls, table = cls + table[:, :1], table[:, 1:]
    if grid != side:
        maps = table.transpose(1, 2).unflatten(2, (grid, grid))
        table = F.interpolate(maps, size=(side, side), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    prefix = [cls] + ([w["backbone.reg_token"]] if "backbone.reg_token" in w else [])
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x + table], 1)
    depth = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("backbone.blocks."))
    for i in range(depth):
        block = f"backbone.blocks.{i}"
        scales = [w.get(f"{block}.ls{j}.gamma", torch.ones((), dtype=x.dtype)) for j in (1, 2)]
        first, second = (None, None) if kept is None else (kept[2 * i], kept[2 * i + 1])
        part = x if first is None else x[first]
        x = residual(x, first, scales[0] * attention(w, f"{block}.attn", norm(w, f"{block}.norm1", part), heads))
        part = x if second is None else x[second]
        x = residual(x, second, scales[1] * mlp(w, f"{block}.mlp", norm(w, f"{block}.norm2", part), swiglu))
    x = norm(w, "backbone.norm", x)
    count = x.shape[1] - side * side
    return x[:, 0], x[:, count:]


def head(w: Weights, name: str, x: Tensor) -> Tensor:
    for layer in (0, 2):
        x = gelu(linear(w, f"{name}.mlp.{layer}", x))
    x = unit(linear(w, f"{name}.mlp.4", x))
    prototypes = unit(w[f"{name}.last_direction"])
    return x @ (prototypes * w.get(f"{name}.last_scale", torch.ones((), dtype=x.dtype))).T


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def sinkhorn(logits: Tensor, temp: float) -> Tensor:
    """Prototypes to 1/K, then samples to 1/N, three times (arXiv 2006.09882)."""
    q = (logits / temp).exp()
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def cross_entropy(target: Tensor, logits: Tensor, temp: float) -> Tensor:
    """Per row: -sum_k p ln softmax(logits / temp)."""
    scaled = logits / temp
    return -(target * (scaled - scaled.exp().sum(-1, keepdim=True).log())).sum(-1)


def dino(student: Tensor, targets: Tensor, temp: float) -> Tensor:
    """student [V + L, B, K], targets [V, B, K]: the mean over all pairs but those of a view with itself."""
    pairs = [(v, c) for v in range(len(targets)) for c in range(len(student)) if v != c]
    return torch.stack([cross_entropy(targets[v], student[c], temp).mean() for v, c in pairs]).mean()


def ibot(student: Tensor, targets: Tensor, masks: Tensor, temp: float) -> Tensor:
    """Rows are the masked patches of the crops `masks` [V * B, P] in order: mean in a crop, sum over crops, by all crops."""
    start, total = 0, student.new_zeros(())
    for count in masks.sum(1).tolist():
        if count:
            rows = slice(start, start + count)
            total = total + cross_entropy(targets[rows], student[rows], temp).mean()
            start += count
    return total / len(masks)


def koleo(z: Tensor, pool: int) -> Tensor:
    z = z / z.square().sum(1, keepdim=True).sqrt()
    logs = []
    for i in range(len(z)):
        others = [j for j in range(i // pool * pool, i // pool * pool + pool) if j != i]
        nearest = max(others, key=lambda j: float((z[i] @ z[j]).detach()))
        logs.append(((z[i] - z[nearest] + 1e-8).square().sum().sqrt() + 1e-8).log())
    return -torch.stack(logs).mean()


def kde(z: Tensor, kappa: float, pool: int) -> Tensor:
    z = unit(z)
    logs = []
    for i in range(len(z)):
        others = [j for j in range(i // pool * pool, i // pool * pool + pool) if j != i]
        logs.append(torch.stack([(kappa * z[i] @ z[j]).exp() for j in others]).mean().log())
    return torch.stack(logs).mean()


def gram(student: Tensor, target: Tensor) -> Tensor:
    """Patch features [N, P, D] of crops: mean over crops and pairs of patches of the squared difference of cosines."""
    apart = []
    for x, y in zip(unit(student), unit(target), strict=True):
        apart.append((x @ x.T - y @ y.T).square().mean())
    return torch.stack(apart).mean()
