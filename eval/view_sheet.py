"""What a model learns from, as pictures: patches side by side, and what training does to them, one augmentation at a time."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from histoscale.data.views import ViewsConfig, make_views

_SIDE, _GAP, _LABEL = 112, 4, 230  # px of a tile, between tiles, of the words on the left


def patch_sheet(patches: np.ndarray, columns: int, gap_px: int = 3) -> np.ndarray:
    """uint8 [N, 3, S, S] -> one uint8 picture [rows*(S+gap)-gap, columns*(S+gap)-gap, 3] on white."""
    n, _, side, _ = patches.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (side + gap_px) - gap_px, columns * (side + gap_px) - gap_px, 3), 255, np.uint8)
    for i, patch in enumerate(patches):
        y, x = (i // columns) * (side + gap_px), (i % columns) * (side + gap_px)
        sheet[y : y + side, x : x + side] = patch.transpose(1, 2, 0)
    return sheet


def view_sheet(pixels: Tensor, seed: int, slots: Tensor, config: ViewsConfig) -> np.ndarray:
    """Patches uint8 [n, 3, S, S] and their slots -> uint8 [h, w, 3], a row an augmentation that `config` uses, a column a patch.

    Its draws are those of step 0 with probability 1, so the last rows are the views of the first step.
    """
    rows = [("patches", pixels.permute(0, 2, 3, 1).numpy()), *_rows(pixels, seed, slots, config)]
    width = _LABEL + len(pixels) * (_SIDE + _GAP) - _GAP
    sheet = Image.new("RGB", (width, len(rows) * (_SIDE + _GAP) - _GAP), "white")
    words = ImageDraw.Draw(sheet)
    for i, (name, tiles) in enumerate(rows):
        top = i * (_SIDE + _GAP)
        words.multiline_text((4, top + _SIDE // 3), name, fill="black", font_size=14)
        for j, tile in enumerate(tiles):
            shown = Image.fromarray(tile).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            sheet.paste(shown, (_LABEL + j * (_SIDE + _GAP), top))
    return np.asarray(sheet)


def _rows(pixels: Tensor, seed: int, slots: Tensor, config: ViewsConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tiles uint8 [n, h, w, 3]."""
    for name, alone in _each_alone(config, pixels.shape[-1]):
        made = make_views(pixels, seed, 0, slots, alone)
        yield name, _shown(made.globals if alone.global_count else made.locals, config)
    views, n = make_views(pixels, seed, 0, slots, config), len(pixels)
    for kind, tiles, px in (("global", views.globals, config.global_px), ("local", views.locals, config.local_px)):
        for i in range(min(2, len(tiles) // n)):
            yield f"{kind} view {i + 1}\n{px} px", _shown(tiles[i * n : (i + 1) * n], config)


def _shown(tiles: Tensor, config: ViewsConfig) -> np.ndarray:
    light = tiles.permute(0, 2, 3, 1).numpy() * np.array(config.std) + np.array(config.mean)
    return (light * 255).round().clip(0, 255).astype(np.uint8)


def _each_alone(config: ViewsConfig, side: int) -> Iterator[tuple[str, ViewsConfig]]:
    """Configurations with one augmentation and nothing else, those that `config` does not use left out."""
    off = replace(
        config, global_count=1, global_px=side, global_scale=[1.0, 1.0], local_count=0, scale_of="patch", ratio=[1.0, 1.0],
        hflip=0.0, vflip=0.0, quarter_turns=False, hed_p=0.0, jitter_p=0.0, grey_p=0.0, global_solarize_p=[0.0],
        blur=replace(config.blur, global_p=[0.0], local_p=0.0),
    )  # fmt: skip
    cut = replace(off, scale_of=config.scale_of, ratio=config.ratio)
    yield "global crop", replace(cut, global_px=config.global_px, global_scale=config.global_scale)
    if config.local_count:
        none = replace(off.blur, global_p=[])
        yield "local crop", replace(cut, global_count=0, global_solarize_p=[], blur=none, local_count=1)
    yield "flips and turns", replace(off, hflip=config.hflip, vflip=config.vflip, quarter_turns=config.quarter_turns)
    if config.hed_p > 0:
        yield f"HED jitter, p {config.hed_p:g}\n+-{config.hed_sigma_od:g} density", replace(off, hed_p=1.0)
    if config.jitter_p > 0:
        strengths = " ".join(f"{v:g}" for v in (config.brightness, config.contrast, config.saturation, config.hue))
        yield f"colour jitter, p {config.jitter_p:g}\n{strengths}", replace(off, jitter_p=1.0)
    if config.grey_p > 0:
        yield f"grey, p {config.grey_p:g}", replace(off, grey_p=1.0)
    blurs = [*config.blur.global_p, config.blur.local_p]
    if any(blurs):
        yield f"blur, p {' '.join(f'{p:g}' for p in blurs)}", replace(off, blur=replace(off.blur, global_p=[1.0]))
    if any(config.global_solarize_p):
        yield f"solarize, p {' '.join(f'{p:g}' for p in config.global_solarize_p)}", replace(off, global_solarize_p=[1.0])
