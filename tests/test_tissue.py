"""Where tissue is: real H&E, pale, all-tissue regions; and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from histoscale.data.index import examine, thumbnail
from histoscale.data.manifest import Slide
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import Store
from histoscale.data.tissue import NoTissue, TissueConfig, otsu, tissue_mask

Draw = Callable[..., np.ndarray]
ROOT = Path(__file__).resolve().parents[1]


def glass(height: int = 300, width: int = 300, noise: float = 2.0) -> np.ndarray:
    return (243 + np.random.default_rng(0).normal(0, noise, (height, width, 3))).clip(0, 255).astype(np.uint8)


def test_a_blob_is_found_with_its_border(draw_tissue: Draw, tissue_config: TissueConfig) -> None:
    mask = tissue_mask(draw_tissue(400, 300), 8.0, tissue_config)
    rows, columns = np.mgrid[0:300, 0:400]
    truth = ((rows / 300 - 0.5) ** 2 + (columns / 400 - 0.5) ** 2) < 0.12
    assert (mask & truth).sum() / (mask | truth).sum() > 0.97


def test_a_region_without_glass_is_all_tissue(draw_tissue: Draw, tissue_config: TissueConfig) -> None:
    assert tissue_mask(draw_tissue(200, 200, whole=True), 8.0, tissue_config).mean() > 0.98


def test_pale_tissue_is_tissue(draw_tissue: Draw, tissue_config: TissueConfig) -> None:
    pale = (245 - (245 - draw_tissue(300, 300).astype(float)) * 0.3).clip(0, 255).astype(np.uint8)
    assert 0.3 < tissue_mask(pale, 8.0, tissue_config).mean() < 0.42


def test_tinted_glass_is_not_tissue(draw_tissue: Draw, tissue_config: TissueConfig) -> None:
    tinted = (draw_tissue(300, 300) * np.array([1.0, 0.98, 0.93])).astype(np.uint8)
    assert 0.3 < tissue_mask(tinted, 8.0, tissue_config).mean() < 0.45


def test_black_padding_is_not_tissue(draw_tissue: Draw, tissue_config: TissueConfig) -> None:
    padded = np.zeros((300, 900, 3), np.uint8)
    padded[:, :300] = draw_tissue(300, 300)
    mask = tissue_mask(padded, 8.0, tissue_config)
    assert not mask[:, 310:].any() and mask[:, :300].mean() > 0.3


@pytest.mark.parametrize("noise", [0.0, 2.0, 6.0])
def test_blank_glass_has_none(tissue_config: TissueConfig, noise: float) -> None:
    with pytest.raises(NoTissue, match="no tissue"):
        tissue_mask(glass(noise=noise), 8.0, tissue_config)


def test_fluorescence_and_black_are_refused(tissue_config: TissueConfig) -> None:
    dark = np.zeros((300, 300, 3), np.uint8)
    with pytest.raises(NoTissue, match="bright-field"):
        tissue_mask(dark, 8.0, tissue_config)
    dark[100:200, 100:200, 2] = 200  # nuclei in DAPI
    with pytest.raises(NoTissue, match="bright-field"):
        tissue_mask(dark, 8.0, tissue_config)


def test_dust_and_pinholes_vanish(tissue_config: TissueConfig) -> None:
    image = glass()
    image[100:200, 100:200] = (200, 120, 170)
    image[148:152, 148:152] = 243  # 32 µm
    image[20:24, 20:24] = (200, 120, 170)
    mask = tissue_mask(image, 8.0, replace(tissue_config, close_um=8.0))
    assert mask[150, 150] and not mask[:50, :50].any()
    with pytest.raises(NoTissue):
        tissue_mask(image, 8.0, replace(tissue_config, min_tissue_um2=1e7))


# Fixed bounds of colour


@pytest.fixture
def fixed(tissue_config: TissueConfig) -> TissueConfig:
    """The committed `tissue=hsv`."""
    changed = yaml.safe_load((ROOT / "configs/tissue/hsv.yaml").read_text())
    return replace(tissue_config, **{name: value for name, value in changed.items() if name != "defaults"})


def test_fixed_bounds_find_a_blob_and_leave_out_pen(draw_tissue: Draw, tissue_config: TissueConfig, fixed: TissueConfig) -> None:
    image = draw_tissue(400, 300)
    rows, columns = np.mgrid[0:300, 0:400]
    truth = ((rows / 300 - 0.5) ** 2 + (columns / 400 - 0.5) ** 2) < 0.12
    assert (iou := _iou(tissue_mask(image, 8.0, fixed), truth)) > 0.97, iou
    image[5:35, 20:380] = (30, 130, 70)  # green pen
    image[270:295, 20:380] = (20, 20, 25)  # black pen
    assert _iou(tissue_mask(image, 8.0, fixed), truth) > 0.97
    assert tissue_mask(image, 8.0, tissue_config)[20, 50:350].all()  # saturation alone takes the green line for tissue
    assert tissue_mask(draw_tissue(200, 200, whole=True), 8.0, fixed).mean() > 0.98
    with pytest.raises(NoTissue, match="no tissue"):
        tissue_mask(glass(), 8.0, fixed)
    with pytest.raises(ValueError, match="tissue.kind is 'hvs': expected otsu or hsv"):
        tissue_mask(image, 8.0, replace(fixed, kind="hvs"))


def test_fixed_bounds_do_not_depend_on_the_rest_of_the_slide(draw_tissue: Draw, fixed: TissueConfig) -> None:
    """Beside strongly stained tissue Otsu's threshold moves; fixed bounds do not."""
    alone = draw_tissue(300, 300)
    both = np.concatenate([alone, np.broadcast_to(np.array([90, 20, 120], np.uint8), (300, 300, 3))], axis=1)
    assert (tissue_mask(both, 8.0, fixed)[:, :280] == tissue_mask(alone, 8.0, fixed)[:, :280]).all()


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_otsu_splits_two_humps() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.1, 0.02, 3000), rng.normal(0.6, 0.05, 1000)])
    assert 0.15 < otsu(values) < 0.5


def test_thumbnail_is_the_mean_of_whole_blocks(
    tmp_path: Path, store: Store, make_slide: Callable[..., Path], draw_tissue: Draw
) -> None:
    pixels = draw_tissue(1000, 700)
    path = make_slide(tmp_path / "a.tif", pixels=pixels, downsamples=(1,), compression="raw", kind="generic")
    found = thumbnail(open_reader(str(path), read_layout(str(path), store), store), 0, 16)
    assert found.shape == (44, 63, 3)
    expected = pixels[:688, :992].reshape(43, 16, 62, 16, 3).mean((1, 3))
    assert np.abs(found[:43, :62] - expected).max() <= 0.51


def test_real_slides(shared_data: Path, store: Store, tissue_config: TissueConfig, fixed: TissueConfig) -> None:
    """Shares of tissue as people see them on the thumbnails, by either method."""
    expected = {
        "svs/CMU-1-Small-Region.svs": (0.3, 0.45),
        "tiff/CMU-0-small.tiff": (0.15, 0.25),
        "ome-tiff/OS-1-detail.ome.tif": (0.95, 1.0),
        "svs/tcga-cr-7395-01a-01-ts1.svs": (0.6, 0.75),
    }
    for name, (least, most) in expected.items():
        uri = str(shared_data / "slides" / name)
        mpp = 0.25 if "tcga" in name else None
        slide = Slide("s", uri, None, None, None, None, None, mpp, None, None, None, {})
        own, same = (examine(slide, store, tissue).mask for tissue in (tissue_config, fixed))  # type: ignore[union-attr]
        assert least <= own.mean() <= most and least <= same.mean() <= most, name
        assert _iou(own, same) > 0.9, name
