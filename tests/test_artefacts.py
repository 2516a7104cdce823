"""Artefacts made on known tissue: ink, thickness, defocus and glass are found where they are, and stain alone is none."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tifffile
from evidence_cases import MPP, evidence_config, grid, open_slide, softmax_case
from scipy.ndimage import gaussian_filter

from histoscale.data.cohort.scanner import Scanner, expose, site_scanner
from histoscale.data.readers.pyramid import Reader
from histoscale.data.storage import Store
from histoscale.eval.artefacts import KINDS, ArtefactConfig, judge, look, read_optics, white_point
from histoscale.eval.evidence.measure import measure_artefacts

SIDE, TILE = 1024, 128  # level-0 px of 0.5 µm: 64 tiles of 64 µm
ACROSS = SIDE // TILE
CONFIG = evidence_config().artefacts
HALO = 6


@lru_cache(maxsize=3)
def dyes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Haematoxylin and eosin, float32 [SIDE + 2 HALO, SIDE + 2 HALO]: nuclei in stroma."""
    rng = np.random.default_rng(seed)
    whole = SIDE + 2 * HALO
    haematoxylin = np.full((whole, whole), 0.08, np.float32)
    yy, xx = np.mgrid[-10:11, -10:11]
    for x, y in rng.integers(12, whole - 12, (1150, 2)):
        nucleus = (yy / rng.uniform(5, 9)) ** 2 + (xx / rng.uniform(5, 9)) ** 2 < 1
        haematoxylin[y - 10 : y + 11, x - 10 : x + 11][nucleus] = rng.uniform(0.6, 1.1)
    haematoxylin *= 1 + gaussian_filter(rng.normal(0, 0.5, (whole, whole)).astype(np.float32), 1.2)
    fine, coarse = (rng.normal(0, sd, (whole, whole)).astype(np.float32) for sd in (1.2, 4))
    eosin = 0.35 + gaussian_filter(fine, 2) + gaussian_filter(coarse, 8)
    return haematoxylin.clip(0), eosin.clip(0)


def tissue(seed: int, thickness: np.ndarray, light: np.ndarray | None = None, blurred: np.ndarray | None = None) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3] through a scanner of the synthetic cohort. thickness: factor on both dyes; light [3, …]: factor on
    the light; blurred: bool, where the lens is 2.5 µm out of focus."""
    shown = [np.pad(thickness, HALO, mode="edge") * dye for dye in dyes(seed)]
    if blurred is not None:
        where = np.pad(blurred, HALO, mode="edge")
        shown = [np.where(where, gaussian_filter(dye, 2.5 / MPP), dye) for dye in shown]
    beam = None if light is None else np.pad(light, [(0, 0), (HALO, HALO), (HALO, HALO)], mode="edge").astype(np.float32)
    return expose(*(dye.astype(np.float32) for dye in shown), scanner(seed), MPP, (0, 0), beam)


def scanner(seed: int) -> Scanner:
    return site_scanner(3, seed, 1.3)


def square(rows: slice, columns: slice) -> np.ndarray:
    """bool [SIDE, SIDE]: whole tiles."""
    mask = np.zeros((ACROSS, ACROSS), bool)
    mask[rows, columns] = True
    return mask.repeat(TILE, 0).repeat(TILE, 1)


def reader_of(folder: Path, pixels: np.ndarray, store: Store) -> Reader:
    path = folder / "slide.tiff"
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb", compression="deflate", resolution=(2e4, 2e4), resolutionunit=3
    )
    return open_slide(path, store)


@pytest.fixture
def judged(tmp_path: Path, store: Store) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    def see(pixels: np.ndarray) -> dict[str, np.ndarray]:
        coords = grid(SIDE, SIDE, TILE)
        optics = read_optics(reader_of(tmp_path, pixels, store), coords, TILE, MPP, white_point(pixels), CONFIG, 1)
        assert optics.read.all()
        found = judge(optics, np.arange(len(coords)), CONFIG)
        return {kind: flags.reshape(ACROSS, ACROSS) for kind, flags in found.items()}

    return see


PLAIN = np.ones((SIDE, SIDE), np.float32)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tissue_alone_is_no_artefact(judged: Callable, seed: int) -> None:
    """Three sites with stains far from each other, one corner of glass."""
    pixels = tissue(seed, np.where(square(slice(0, 2), slice(0, 8)), 0, PLAIN))
    found = judged(pixels)
    assert found["glass"][:2].all() and not found["glass"][2:].any()
    assert sum(found[kind].sum() for kind in ("pen", "fold", "blur")) <= 2


@pytest.mark.parametrize("ink", [(0.18, 0.30, 0.75), (0.20, 0.60, 0.30), (0.16, 0.16, 0.18), (0.80, 0.20, 0.25)])
def test_ink_of_any_colour_is_pen_over_tissue_and_over_glass(judged: Callable, ink: tuple[float, ...]) -> None:
    marked = square(slice(3, 5), slice(1, 6))
    light = np.where(marked, np.array(ink)[:, None, None], 1)
    found = judged(tissue(0, np.where(square(slice(4, 8), slice(0, 8)), 0, PLAIN), light))
    assert found["pen"][3:5, 1:6].all() and found["pen"].sum() == 10
    assert not (found["pen"] & (found["fold"] | found["blur"] | found["glass"])).any()


def test_defocus_is_blur_and_half_of_a_tile_does_not_hide_it(judged: Callable) -> None:
    blurred = square(slice(1, 5), slice(2, 6))
    found = judged(tissue(1, PLAIN, blurred=blurred))
    assert found["blur"][1:5, 2:6].mean() > 0.9 and found["blur"].sum() <= found["blur"][1:5, 2:6].sum() + 2
    shifted = np.roll(blurred, int(0.4 * TILE), 1)  # 60 % of the first column's tiles are out of focus
    assert judged(tissue(1, PLAIN, blurred=shifted))["blur"][1:5, 2].mean() >= 0.75


def test_a_fold_is_as_dense_in_pale_and_in_dark_parts(judged: Callable) -> None:
    found = judged(tissue(2, np.where(square(slice(0, 8), slice(3, 5)), 1.6, PLAIN)))
    assert found["fold"][:, 3:5].mean() > 0.9 and found["fold"].sum() <= found["fold"][:, 3:5].sum() + 2
    assert found["blur"].sum() <= 2 and not found["pen"].any()


def test_flags_follow_the_slide_and_not_the_stain(judged: Callable) -> None:
    """All of the tissue 1.6 times as thick is another stain, not a fold."""
    found = judged(tissue(1, 1.6 * PLAIN))
    assert found["fold"].sum() <= 2 and found["blur"].sum() <= 2


def test_the_audit_compares_the_most_attended_tiles(tmp_path: Path, store: Store) -> None:
    marked = square(slice(0, 1), slice(0, 8))
    pixels = tissue(0, PLAIN, np.where(marked, np.array((0.2, 0.6, 0.3))[:, None, None], 1))
    coords = grid(SIDE, SIDE, TILE)
    case = softmax_case(reader_of(tmp_path, pixels, store), coords, TILE)
    attention = np.where(coords[:, 1] < TILE, 2.0, 1.0) + np.arange(len(coords)) * 1e-6
    config = evidence_config(top=0.1)
    shares, kinds = measure_artefacts(replace(case, attention=attention / attention.sum()), white_point(pixels), config, 1)
    assert shares["pen"] == (1.0, pytest.approx(1 / 8)) and shares["glass"] == (0.0, 0.0)
    assert kinds[0] == ["pen"] and set(shares) == set(KINDS)
    few = evidence_config(top=0.1, sample=20)
    shares, kinds = measure_artefacts(replace(case, attention=attention / attention.sum()), white_point(pixels), few, 1)
    assert shares["pen"][0] == 1.0 and 0 < shares["pen"][1] < 0.4 and len(kinds) < 40


def test_blank_tiles_and_wrong_limits() -> None:
    white = np.full((64, 64, 3), 244, np.uint8)
    glass, pen, sharpness, density = look(white, np.array([244.0, 244, 244]), 1.0)
    assert (glass, pen, sharpness, density) == (1.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="expected shares between 0 and 1, and fold above 1"):
        ArtefactConfig(mpp=1.0, pen=0.1, fold=0.9, blur=0.7, glass=0.5)
