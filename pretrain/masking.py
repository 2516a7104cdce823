"""Block masks with exact counts, drawn by key within groups of slots, so that shapes never change and ranks do not matter."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from histoscale.data import keys as draw

_TRIES = 96  # blocks tried per crop before the rest is filled at random
_PATIENCE = 10  # failed tries in a row that end the blocks (BEiT, arXiv 2106.08254)
_SMALLEST = 4  # patches; the smallest block asked for
_ASPECT = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class MaskConfig:
    probability: float  # share of the global crops that are masked
    ratio: list[float]  # least and greatest masked share of a masked crop
    shift: bool  # move each mask around the grid's edges, so that no place is masked more often (facebookresearch/dinov3)


class Masks(NamedTuple):
    crops: Tensor  # bool [V * B, P], crop-major
    indices: Tensor  # int64 [M], masked tokens in crops.flatten(), ascending; M depends on the configuration and the shapes only
    weights: Tensor  # float32 [M], 1 / masked patches of the token's crop


def counts(config: MaskConfig, crops: int, patches: int) -> list[int]:
    """Patches of each masked crop in a group of `crops`: ratios in even steps to the greatest (facebookresearch/dinov3)."""
    masked = int(crops * config.probability)
    edges = np.linspace(config.ratio[0], config.ratio[1], masked + 1)[1:]
    return [int(patches * ratio) for ratio in edges]


def make_masks(config: MaskConfig, seed: int, step: int, slots: Tensor, grid: tuple[int, int], views: int, group: int) -> Masks:
    """Masks of the global crops of `slots` [B] (whole groups of `group` consecutive slots), on the slots' device.

    Raises ValueError when B is not a multiple of `group`, or when nothing would be masked.
    """
    batch, patches = len(slots), grid[0] * grid[1]
    if batch % group:
        raise ValueError(f"masks: {batch} slots are not whole groups of method.group={group}")
    sizes = counts(config, views * group, patches)
    if sum(sizes) == 0:
        raise ValueError(
            f"method.mask: probability={config.probability} and ratio={config.ratio} mask no patch of {views * group} crops "
            f"of {patches} patches; raise one of them or method.group, or set method.ibot_weight=0"
        )
    wanted = np.zeros((views, batch), np.int64)
    for start in range(0, batch, group):
        first = int(slots[start])
        for size, place in zip(sizes, draw.permutation(draw.key(seed, "masked", step, first), views * group), strict=False):
            wanted[place // group, start + place % group] = size
    parents = draw.keys(seed, "mask", step, slots.cpu())
    crop_keys = torch.stack([draw.fork(parents, f"global/{v}") for v in range(views)]).flatten()
    masks = torch.from_numpy(block_masks(crop_keys, wanted.flatten(), grid, config.shift))
    indices = masks.flatten().nonzero().flatten()
    weights = (1 / torch.from_numpy(wanted).flatten().clamp(min=1).float())[indices // patches]
    return Masks(masks.to(slots.device), indices.to(slots.device), weights.to(slots.device))


def block_masks(keys: Tensor, wanted: np.ndarray, grid: tuple[int, int], shift: bool) -> np.ndarray:
    """One mask per key with exactly `wanted` [n] patches: bool [n, P].

    Blocks as in BEiT (arXiv 2106.08254): area uniform in [4, min(missing, P / 2)], log-uniform aspect, uniform corner, taken when
    they add at least one patch and not too many; what is still missing after ten failures in a row is filled at random. With
    `shift` every mask is then rolled around the edges by a uniform number of rows and columns, because blocks favour the middle.
    """
    height, width = grid
    patches = height * width
    chosen = np.flatnonzero(wanted)
    draws = draw.uniform(keys[torch.from_numpy(chosen)], 4 * _TRIES).numpy().astype(np.float64).reshape(-1, _TRIES, 4)
    masks = np.zeros((len(chosen), height, width), bool)
    missing, failures = wanted[chosen].copy(), np.zeros(len(chosen), np.int64)
    rows, columns = np.arange(height)[None, :, None], np.arange(width)[None, None, :]
    for turn in range(_TRIES):
        open_ = np.flatnonzero((missing > 0) & (failures < _PATIENCE))
        if not len(open_):
            break
        u = draws[open_, turn]
        area = _SMALLEST + u[:, 0] * (np.minimum(missing[open_], patches // 2) - _SMALLEST)
        aspect = np.exp(math.log(_ASPECT[0]) + u[:, 1] * math.log(_ASPECT[1] / _ASPECT[0]))
        h, w = np.round(np.sqrt(area * aspect)).astype(int), np.round(np.sqrt(area / aspect)).astype(int)
        top = np.floor(u[:, 2] * np.maximum(height - h + 1, 1)).astype(int)[:, None, None]
        left = np.floor(u[:, 3] * np.maximum(width - w + 1, 1)).astype(int)[:, None, None]
        block = (rows >= top) & (rows < top + h[:, None, None]) & (columns >= left) & (columns < left + w[:, None, None])
        new = (block & ~masks[open_]).sum((1, 2))
        taken = (h < height) & (w < width) & (new > 0) & (new <= missing[open_])
        masks[open_[taken]] |= block[taken]
        missing[open_[taken]] -= new[taken]
        failures[open_] = np.where(taken, 0, failures[open_] + 1)
    result = np.zeros((len(wanted), patches), bool)
    result[chosen] = masks.reshape(-1, patches)
    order = draw.uniform(draw.fork(keys[torch.from_numpy(chosen)], "fill"), patches).numpy()
    for row in np.flatnonzero(missing):
        free = np.flatnonzero(~result[chosen[row]])
        result[chosen[row], free[np.argsort(order[row, free], kind="stable")[: missing[row]]]] = True
    if shift:
        moves = draw.uniform(draw.fork(keys[torch.from_numpy(chosen)], "shift"), 2).numpy() * grid
        for row, (down, right) in zip(chosen, moves.astype(int), strict=True):
            result[row] = np.roll(result[row].reshape(grid), (down, right), (0, 1)).flatten()
    return result
