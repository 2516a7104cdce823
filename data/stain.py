"""Stains: optical density, and jitter of haematoxylin, eosin and DAB."""

import torch
from torch import Tensor

from histoscale.data.augment import constant

# rows: optical density in R, G, B of haematoxylin, eosin, DAB (Ruifrok and Johnston 2001, Anal Quant Cytol Histol 23:291)
HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
_APART = tuple(tuple(row) for row in torch.linalg.inv(torch.tensor(HED, dtype=torch.float64)).tolist())
_FLOOR = 1e-6  # added to intensities before the logarithm


def hed_jitter(rgb: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Concentration s of each stain becomes scale * s + shift, alike for all pixels of an image (arXiv 1808.05896, 1902.06543).

    rgb: float [n, 3, h, w] in [0, 1]; scale, shift: [n, 3] for H, E, D, in natural-log optical density. Returns the like of rgb.
    """
    stains, apart = (constant(rows, rgb.device, torch.float64) for rows in (HED, _APART))
    # separation, scaling and mixing are one 3 x 3 matrix an image: od' = od M^-1 diag(scale) M + shift M
    mixed = apart @ (scale.double()[:, :, None] * stains)
    offset = shift.double() @ stains
    density = (rgb + _FLOOR).log_().flatten(2)  # minus the optical density: the signs cancel in the linear part
    moved = torch.baddbmm(offset[:, :, None].to(rgb.dtype), mixed.transpose(1, 2).to(rgb.dtype), density, beta=-1)
    return moved.exp_().sub_(_FLOOR).clamp_(0, 1).view_as(rgb)
