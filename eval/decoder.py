"""The decoder from patch tokens and pixels to classes of pixels, and its loss: eva's, so that numbers compare."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from histoscale.data.keys import key

HIDDEN = (64, 32, 32)  # kaiko-ai/eva:src/eva/vision/models/networks/decoders/segmentation/semantic/with_image.py
SMOOTH = 1e-5  # of MONAI's DiceLoss, in numerator and denominator


class ConvDecoderWithImage(nn.Module):
    """Tokens doubled in size, a convolution, bilinear to the image's size, the image beside them, two convolutions, one 1 x 1.

    250,245 parameters for 384 features and 5 classes. eva's decoder of the same name.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        first, second, third = HIDDEN
        self.tokens = _block(width, first)
        self.image = nn.Sequential(_block(first + 3, second), _block(second, third))
        self.classifier = nn.Conv2d(third, classes, 1)

    def forward(self, tokens: Tensor, rgb: Tensor) -> Tensor:
        """tokens: [B, N, D] of a square grid, rgb: normalised [B, 3, H, W] -> logits [B, K, H, W].

        Raises ValueError where the tokens are no square grid.
        """
        batch, count, width = tokens.shape
        side = round(count**0.5)
        if side == 0 or side * side != count:
            raise ValueError(f"there are {count} patch tokens: expected a square grid of them")
        grid = tokens.transpose(1, 2).reshape(batch, width, side, side)
        doubled = grid[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(batch, width, 2 * side, 2 * side)
        x = bilinear(self.tokens(doubled), rgb.shape[2], rgb.shape[3])
        return self.classifier(self.image(torch.cat([x, rgb], dim=1)))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def new_decoder(width: int, classes: int, seed: int, stream: str, run: int) -> ConvDecoderWithImage:
    """A decoder at torch's own initialisation, drawn by (seed, stream, run) alone; on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, f"segment/{stream}/weights", run) >> 1)
        return ConvDecoderWithImage(width, classes)


def bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """[B, C, h, w] -> [B, C, height, width] as torch's bilinear interpolation without aligned corners, by two fixed matrices:
    its own backward adds in no fixed order on CUDA."""
    rows = _interpolation(x.shape[2], height).to(x)
    columns = _interpolation(x.shape[3], width).to(x)
    return rows @ (x @ columns.T)


@lru_cache(maxsize=32)
def _interpolation(old: int, new: int) -> Tensor:
    """float64 [new, old]: weights of the two nearest centres, clamped at the ends."""
    place = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(min=0)
    low = place.long().clamp(max=old - 1)
    part = place - low
    weights = torch.zeros(new, old, dtype=torch.float64)
    rows = torch.arange(new)
    weights[rows, low] += 1 - part
    weights[rows, (low + 1).clamp(max=old - 1)] += part
    return weights


def dice_loss(logits: Tensor, labels: Tensor, ignore: int | None = None, masked_by: str = "label") -> Tensor:
    """mean over classes, background too, of 1 − (2Σpg + ε) / (Σp + Σg + ε); sums over the batch and its pixels.

    logits: [B, K, H, W], labels: int64 [B, H, W]. ignore: a label whose pixels are left out of all sums; with
    masked_by=`prediction`, as eva does it: they are background with equal logits. MONAI's DiceLoss(softmax, batch).
    """
    if ignore is not None and masked_by == "prediction":
        kept = labels != ignore
        logits, labels, ignore = logits * kept[:, None], labels * kept, None
    p = logits.softmax(dim=1)
    known = torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore
    g = nn.functional.one_hot(torch.where(known, labels, 0), logits.shape[1]).movedim(-1, 1).to(p) * known[:, None]
    p = p * known[:, None]
    axes = (0, 2, 3)
    both, total = (p * g).sum(axes), p.sum(axes) + g.sum(axes)
    return (1 - (2 * both + SMOOTH) / (total + SMOOTH)).mean()
