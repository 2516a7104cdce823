"""A timm vision transformer, and one forward of it that adds mask tokens, any grid and batch-subset stochastic depth."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from histoscale.data import keys as draw
from histoscale.pretrain.blocks import join_blocks


@dataclass(frozen=True)
class ModelConfig:
    architecture: str  # a timm vision transformer; SwiGLU and position-embedding conventions come with the name
    img_size: int  # px; its grid is the grid of the position table
    patch_size: int
    width: int | None  # null: the architecture's own
    depth: int | None
    heads: int | None
    mlp_ratio: float | None
    registers: int
    layer_scale: float | None  # initial LayerScale; null: none
    drop_path: float  # stochastic depth by batch subset, the same rate in every block


def rotary(config: ModelConfig) -> bool:
    """Whether this is a DINOv3 of timm: rotary positions, always LayerScale (arXiv 2508.10104)."""
    return "dinov3" in config.architecture


def timm_arguments(config: ModelConfig) -> dict[str, Any]:
    """What `timm.create_model` takes beside the architecture: plain JSON, so a release can carry it."""
    chosen = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads, "mlp_ratio": config.mlp_ratio}
    return {
        "img_size": config.img_size,
        "patch_size": config.patch_size,
        "num_reg_tokens" if rotary(config) else "reg_tokens": config.registers,
        "init_values": config.layer_scale or 0.0,  # timm drops None and would keep an architecture's own LayerScale
        "dynamic_img_size": True,
        "num_classes": 0,
        "global_pool": "token",
        **{name: value for name, value in chosen.items() if value is not None},
    }


def build_backbone(config: ModelConfig, seed: int) -> VisionTransformer:
    """The timm model with fresh weights drawn from `seed`; the global generator is left as it was.

    Raises ValueError for an architecture that is no plain ViT with class token and learned positions, nor DINOv3's with rotary
    ones, or sizes that do not fit.
    """
    known = [*timm.list_models(module="vision_transformer"), *timm.list_models("*dinov3*", module="eva")]
    if config.architecture not in known:
        near = ", ".join(get_close_matches(config.architecture, known, 3)) or "vit_small_patch16_224"
        raise ValueError(f"model.architecture={config.architecture!r} is not one of timm's vision transformers, such as {near}")
    if config.img_size % config.patch_size:
        raise ValueError(f"model.img_size={config.img_size} is not a multiple of model.patch_size={config.patch_size}")
    if not 0 <= config.drop_path < 1:
        raise ValueError(f"model.drop_path={config.drop_path} must be in [0, 1)")
    if rotary(config) and not config.layer_scale:
        raise ValueError(f"model.architecture={config.architecture!r} has LayerScale: set model.layer_scale, to 1e-5 say")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw.key(seed, "backbone") >> 1)
        vit = timm.create_model(config.architecture, pretrained=False, **timm_arguments(config))
    if vit.cls_token is None or (vit.pos_embed is None and not rotary(config)):
        raise ValueError(f"model.architecture={config.architecture!r} has no class token, or no positions that are known here")
    joined = cast(VisionTransformer, vit)
    join_blocks(joined)
    return joined


@lru_cache(maxsize=64)
def position_matrix(source: tuple[int, int], target: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[h*w, H*W]: bicubic antialiased resizing of a table on grid `source` to grid `target`, timm's convention."""
    cells = source[0] * source[1]
    table = torch.eye(cells, dtype=torch.float64).view(1, cells, *source)
    return F.interpolate(table, size=target, mode="bicubic", antialias=True).view(cells, -1).t().contiguous().to(device, dtype)


def positions(vit: VisionTransformer, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
    """Position embeddings of the prefix tokens ([1, R, D], or None where the model gives them none) and of `grid` [1, h*w, D].

    The product is computed in float32 at least, also under autocast. At the table's own grid it is the table itself.
    """
    assert vit.pos_embed is not None
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    table = vit.pos_embed[:, prefix:]
    source = (vit.patch_embed.grid_size[0], vit.patch_embed.grid_size[1])
    if grid != source:
        with torch.autocast("cpu" if table.is_meta else table.device.type, enabled=False):  # meta tensors know no autocast
            table = position_matrix(source, grid, table.dtype, table.device) @ table
    return (vit.pos_embed[:, :prefix] if prefix else None), table


def kept_rows(keys: Tensor, crops: int, group: int, rate: float, branches: int) -> Tensor:
    """Which rows each residual branch runs on: int64 [branches, groups * n], n = max(1, floor(crops * group * (1 - rate))).

    keys: int64 [crops * B], crop-major. Rows are drawn within groups of `group` consecutive slots, so ranks and micro-batches
    do not matter as long as they hold whole groups. Raises ValueError when they do not.
    """
    batch = len(keys) // crops
    if batch % group:
        raise ValueError(f"stochastic depth: {batch} slots are not whole groups of method.group={group}")
    rows = torch.arange(len(keys), device=keys.device).view(crops, batch // group, group)
    rows = rows.transpose(0, 1).reshape(-1, crops * group)
    kept = max(1, int(rows.shape[1] * (1 - rate)))
    order = draw.uniform(keys, branches)[rows].argsort(dim=1, stable=True)[:, :kept]  # [groups, n, branches]
    return rows[:, :, None].expand(-1, -1, branches).gather(1, order).permute(2, 0, 1).flatten(1)


def forward_tokens(
    vit: VisionTransformer,
    x: Tensor,
    masks: Tensor | None = None,
    mask_token: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] -> class token [B, D] and patch tokens [B, N, D], both after the final norm.

    masks: bool [B, N], patches whose embedding becomes mask_token [1, D] before the position is added (arXiv 2304.07193).
    kept: from `kept_rows` (2 * depth branches): branch outputs of those rows only, scaled by B / kept (stochastic depth, ibid.).
    """
    return forward_views(vit, [x], [masks], mask_token, [kept])[0]


def forward_views(
    vit: VisionTransformer,
    views: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    mask_token: Tensor | None,
    kept: Sequence[Tensor | None],
) -> list[tuple[Tensor, Tensor]]:
    """`forward_tokens` of several resolutions; every block is called once, with the tokens of all of them."""
    tokens = [vit.norm_pre(_embed(vit, x, mask, mask_token)) for x, mask in zip(views, masks, strict=True)]
    angles = _angles(vit, views)
    for depth, block in enumerate(vit.blocks):
        tokens = block(tokens, [None if rows is None else rows[2 * depth : 2 * depth + 2] for rows in kept], angles)
    tokens = [vit.norm(x) for x in tokens]
    return [(x[:, 0], x[:, vit.num_prefix_tokens :]) for x in tokens]


def _angles(vit: VisionTransformer, views: Sequence[Tensor]) -> dict[int, Tensor] | None:
    """Number of tokens -> sines and cosines of its patches [P, 2 d] in float32, once a forward; None for learned positions.

    Raises ValueError for two grids of as many patches.
    """
    if vit.pos_embed is not None:
        return None
    size = vit.patch_embed.patch_size
    grids = {(x.shape[2] // size[0], x.shape[3] // size[1]) for x in views}
    if len({height * width for height, width in grids}) < len(grids):
        raise ValueError(f"views of the grids {sorted(grids)} have as many patches: rotary positions could not tell them apart")
    return {vit.num_prefix_tokens + h * w: vit.rope.get_embed(shape=[h, w]) for h, w in grids}  # type: ignore[union-attr,operator]


def _embed(vit: VisionTransformer, x: Tensor, masks: Tensor | None, mask_token: Tensor | None) -> Tensor:
    size = vit.patch_embed.patch_size
    grid = (x.shape[2] // size[0], x.shape[3] // size[1])
    tokens = vit.patch_embed(x).flatten(1, 2)
    if masks is not None and mask_token is not None:
        tokens = torch.where(masks[:, :, None], mask_token.to(tokens.dtype), tokens)
    at_prefix, at_patches = (None, None) if vit.pos_embed is None else positions(vit, grid)
    prefix = torch.cat([token for token in (vit.cls_token, vit.reg_token) if token is not None], 1)
    if at_prefix is not None:
        prefix = prefix + at_prefix
    return torch.cat([prefix.expand(len(x), -1, -1), tokens if at_patches is None else tokens + at_patches], 1)
