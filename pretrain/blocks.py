"""A transformer block for all resolutions of a micro-batch at once: batch-subset stochastic depth and the attention back ends.

The parameters are timm's, by name and by value; only the forward is ours.
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ATTENTIONS = ("auto", "sdpa", "math", "packed", "varlen", "xformers")
_PACKED = ("packed", "varlen", "xformers")
Residual = Callable[[Tensor, list[torch.Size]], Tensor]


class JointBlock(nn.Module):
    """A pre-norm block of timm that also takes a list of token tensors, one a resolution; mixed into timm's own class.

    attention: "sdpa" (one fused call a resolution), "math" (explicit products), or with norms and linear layers run once over
    the tokens of all resolutions: "packed" (one fused call a resolution), "varlen" (torch.nn.attention.varlen) and "xformers"
    (its block-diagonal bias), which also attend in one call. recompute: keep the inputs only, run again in the backward.
    """

    attention = "sdpa"
    recompute = False

    def forward(self, x: Any, kept: Any = None, angles: dict[int, Tensor] | None = None, **others: Any) -> Any:
        """Tokens [B_i, N_i, D] of each resolution i -> the same shapes. A plain tensor goes through timm's own forward.

        kept: a resolution's rows of each branch, int64 [2, n_i], or None: branch outputs of those rows only, scaled by
        B_i / n_i (batch-subset stochastic depth, arXiv 2304.07193). angles: N_i -> sines and cosines of its patches [P_i, 2 d],
        for rotary positions.
        """
        if isinstance(x, Tensor):
            return super().forward(x, **others)
        kept = [None] * len(x) if kept is None else kept
        if self.recompute and torch.is_grad_enabled():  # nothing in a block draws from a generator, so there is none to restore
            return checkpoint(self._both, x, kept, angles, use_reentrant=False, preserve_rng_state=False)
        return self._both(x, kept, angles)

    def _both(self, x: list[Tensor], kept: list[Tensor | None], angles: dict[int, Tensor] | None) -> list[Tensor]:
        run = self._packed if self.attention in _PACKED else self._apart

        def attend(tokens: Tensor, shapes: list[torch.Size]) -> Tensor:
            return self._attend(tokens, shapes, angles)

        x = run(x, [rows if rows is None else rows[0] for rows in kept], attend)
        return run(x, [rows if rows is None else rows[1] for rows in kept], self._project)

    def _apart(self, x: list[Tensor], rows: list[Tensor | None], branch: Residual) -> list[Tensor]:
        parts = [_pick(a, kept) for a, kept in zip(x, rows, strict=True)]
        return [_add(a, kept, branch(part, [part.shape])) for a, kept, part in zip(x, rows, parts, strict=True)]

    def _packed(self, x: list[Tensor], rows: list[Tensor | None], branch: Residual) -> list[Tensor]:
        parts = [_pick(a, kept) for a, kept in zip(x, rows, strict=True)]
        shapes = [part.shape for part in parts]
        update = branch(torch.cat([part.flatten(0, 1) for part in parts]), shapes)
        updates = update.split([shape[0] * shape[1] for shape in shapes])
        return [_add(a, kept, u.view(shape)) for a, kept, u, shape in zip(x, rows, updates, shapes, strict=True)]

    def _attend(self, tokens: Tensor, shapes: list[torch.Size], angles: dict[int, Tensor] | None) -> Tensor:
        """Tokens [B, N, D], or those of several shapes in a row as [T, D] -> the attention branch's output, same shape."""
        raise NotImplementedError

    def _project(self, tokens: Tensor, shapes: list[torch.Size]) -> Tensor:
        """The same of the MLP branch."""
        raise NotImplementedError


class PlainBlock(JointBlock, Block):  # type: ignore[misc]
    """timm's Block: learned positions, added before the first one."""

    def _attend(self, tokens: Tensor, shapes: list[torch.Size], angles: dict[int, Tensor] | None) -> Tensor:
        attn = cast(Attention, self.attn)
        qkv = attn.qkv(self.norm1(tokens)).reshape(-1, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.unbind(1)  # [T, H, d] each
        q, k = attn.q_norm(q), attn.k_norm(k)
        mixed = _ATTEND[self.attention](q, k, v, shapes)
        return self.ls1(attn.proj(attn.norm(mixed.reshape(*tokens.shape[:-1], -1))))

    def _project(self, tokens: Tensor, shapes: list[torch.Size]) -> Tensor:
        return self.ls2(self.mlp(self.norm2(tokens)))


class RotaryBlock(JointBlock, EvaBlock):  # type: ignore[misc]
    """timm's EvaBlock as DINOv3 has it (arXiv 2508.10104): patches turn their queries and keys by place, prefixes do not."""

    def _attend(self, tokens: Tensor, shapes: list[torch.Size], angles: dict[int, Tensor] | None) -> Tensor:
        attn = cast(EvaAttention, self.attn)
        assert attn.qkv is not None and angles is not None
        bias = None if attn.q_bias is None else torch.cat([attn.q_bias, cast(Tensor, attn.k_bias), attn.v_bias])
        qkv = F.linear(self.norm1(tokens), attn.qkv.weight, bias).reshape(-1, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.unbind(1)
        q, k = (_turn(x, shapes, angles, attn.num_prefix_tokens, attn.rotate_half) for x in (attn.q_norm(q), attn.k_norm(k)))
        mixed = _ATTEND[self.attention](q.to(v.dtype), k.to(v.dtype), v, shapes)
        return _scaled(attn.proj(attn.norm(mixed.reshape(*tokens.shape[:-1], -1))), self.gamma_1)

    def _project(self, tokens: Tensor, shapes: list[torch.Size]) -> Tensor:
        return _scaled(self.mlp(self.norm2(tokens)), self.gamma_2)


def join_blocks(vit: VisionTransformer) -> None:
    """Give every block of a timm vision transformer the forward above.

    Raises ValueError for blocks of another form (residual post-norm, parallel, gated attention), dropout or drop path.
    """
    for block in cast(Iterable[Block], vit.blocks):
        known = {(Block, Attention): PlainBlock, (EvaBlock, EvaAttention): RotaryBlock}.get((type(block), type(block.attn)))
        if known is None or getattr(block.attn, "gate", None) is not None or getattr(block.attn, "qkv", None) is None:
            raise ValueError(f"the blocks of this architecture are {type(block).__name__} with {type(block.attn).__name__}: only "
                             "timm's pre-norm Block and EvaBlock with their plain attention can be trained here")  # fmt: skip
        random = [name for name, part in block.named_modules() if isinstance(part, nn.Dropout) and part.p > 0]
        random += [name for name in ("drop_path1", "drop_path2") if not isinstance(getattr(block, name), nn.Identity)]
        if random:
            raise ValueError(f"blocks with {', '.join(random)} draw from a global generator: build the model without dropout")
        block.__class__ = known


def choose_attention(wanted: str, device: torch.device, precision: str) -> str:
    """The back end for `wanted`. auto is sdpa; on a CPU in 16 bits math, because there sdpa's backward takes four times as long.

    Raises ValueError for an unknown word and for a back end that is not there or cannot compute in this precision.
    """
    if wanted not in ATTENTIONS:
        raise ValueError(f"hardware.attention is {wanted!r}: expected one of {', '.join(ATTENTIONS)}")
    if wanted == "auto":
        return "math" if device.type == "cpu" and precision != "fp32" else "sdpa"
    why = unavailable(wanted, device, precision)
    if why:
        raise ValueError(f"hardware.attention={wanted} cannot be used here: {why}; set it to auto, sdpa or packed")
    return wanted


def unavailable(wanted: str, device: torch.device, precision: str) -> str | None:
    """Why a back end cannot run on this device in this precision, or None."""
    if wanted not in ("varlen", "xformers"):
        return None
    if device.type != "cuda":
        return "it needs a CUDA device"
    if wanted == "varlen":
        if precision == "fp32":
            return "it computes in bf16 and fp16 only"
        return None if find_spec("torch.nn.attention.varlen") else f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None if find_spec("xformers") else "xformers is not installed"


def joint_blocks(module: nn.Module) -> list[JointBlock]:
    """Those of them inside a module, in order."""
    return [part for part in module.modules() if isinstance(part, JointBlock)]


def _turn(x: Tensor, shapes: list[torch.Size], angles: dict[int, Tensor], prefix: int, half: bool) -> Tensor:
    """Rotary positions: queries or keys [T, H, d] of tokens of these shapes, prefix tokens left as they are."""
    turned = []
    for part, shape in zip(x.split([shape[0] * shape[1] for shape in shapes]), shapes, strict=True):
        rows = part.unflatten(0, tuple(shape[:2]))  # [B, N, H, d]
        patches = apply_rot_embed_cat(rows[:, prefix:], angles[shape[1]][:, None], half=half)
        turned.append(torch.cat([rows[:, :prefix], patches.to(rows.dtype)], 1).flatten(0, 1))
    return turned[0] if len(turned) == 1 else torch.cat(turned)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def _pick(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _add(x: Tensor, rows: Tensor | None, update: Tensor) -> Tensor:
    return x + update if rows is None else x.index_add(0, rows, (update * (len(x) / len(rows))).to(x.dtype))


def _by_resolution(q: Tensor, k: Tensor, v: Tensor, shapes: list[torch.Size]) -> Tensor:
    """[T, H, d] each -> [T, H, d]: one scaled_dot_product_attention a resolution."""
    sizes = [shape[0] * shape[1] for shape in shapes]
    found = []
    for part, shape in zip(zip(*(x.split(sizes) for x in (q, k, v)), strict=True), shapes, strict=True):
        heads = [x.unflatten(0, tuple(shape[:2])).transpose(1, 2) for x in part]  # [B, H, N, d]
        found.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1))
    return found[0] if len(found) == 1 else torch.cat(found)


def _math(q: Tensor, k: Tensor, v: Tensor, shapes: list[torch.Size]) -> Tensor:
    """The same for one resolution by explicit products; under autocast the softmax is computed in float32."""
    (shape,) = shapes
    q, k, v = (x.unflatten(0, tuple(shape[:2])).transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return ((q @ k.transpose(-2, -1)).softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, shapes: list[torch.Size]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, start = [], 0
    for rows, length in ((shape[0], shape[1]) for shape in shapes):  # on the device: the host would have to wait for a copy
        starts.append(torch.arange(rows, dtype=torch.int32, device=q.device) * length + start)
        start += rows * length
    ends = torch.cat([*starts, torch.full((1,), start, dtype=torch.int32, device=q.device)])
    longest = max(shape[1] for shape in shapes)
    return cast(Tensor, varlen_attn(q, k, v, ends, ends, longest, longest))


def _xformers(q: Tensor, k: Tensor, v: Tensor, shapes: list[torch.Size]) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens([shape[1] for shape in shapes for _ in range(shape[0])])
    return cast(Tensor, memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0])


_ATTEND = {"sdpa": _by_resolution, "packed": _by_resolution, "math": _math, "varlen": _varlen, "xformers": _xformers}
