"""Embedding stores beside the code of TRIDENT and CLAM (run, not copied): theirs reads ours, ours reads theirs.

    git clone https://github.com/mahmoodlab/TRIDENT A; git clone https://github.com/mahmoodlab/CLAM B
    pip install --no-deps --target C "pandas<3" geopandas shapely pyproj pyogrio opencv-python-headless einops scikit-image \\
        imageio lazy_loader networkx python-dateutil pytz tzdata six
    ORACLE_TRIDENT=A ORACLE_CLAM=B ORACLE_PACKAGES=C pytest tests/oracle_stores.py

Run with TRIDENT a91fa84 and CLAM 53e2409 (which needs pandas 2).
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from corners import PIPE, RECIPE, catalog_of, encoder
from store_layouts import grid, write_clam, write_trident
from torch import nn

from histoscale.data.journal import Journal
from histoscale.data.storage import Store
from histoscale.data.tissue import TissueConfig
from histoscale.eval.embed import embed_slides
from histoscale.eval.stores import StoreConfig, open_store, read_coords, read_features


@pytest.fixture(scope="module")
def trident() -> Iterator[Any]:
    """Their modules IO and wsi_objects.WSI."""
    with on_path("ORACLE_TRIDENT"):
        import trident.IO
        import trident.wsi_objects.WSI

        yield trident


@pytest.fixture(scope="module")
def clam() -> Iterator[Any]:
    """Their data set, and their writer of features."""
    with on_path("ORACLE_CLAM"):
        from dataset_modules.dataset_generic import Generic_MIL_Dataset
        from utils.file_utils import save_hdf5

        yield Generic_MIL_Dataset, save_hdf5


class on_path:
    def __init__(self, name: str) -> None:
        if name not in os.environ:
            pytest.skip(f"{name} names no clone")
        self.added = [os.environ[name], os.environ.get("ORACLE_PACKAGES", "")]

    def __enter__(self) -> None:
        sys.path.insert(0, self.added[0])
        sys.path.append(self.added[1])

    def __exit__(self, *_: object) -> None:
        for each in self.added:
            sys.path.remove(each)


@pytest.fixture(params=["fp32", "fp16"])
def ours(
    request: pytest.FixtureRequest, tmp_path: Path, make_slide: Callable[..., Path], store: Store, tissue_config: TissueConfig,
    journal: Journal,
) -> Path:  # fmt: skip
    """A folder of two stores that `embed` wrote."""
    for seed, name in enumerate(("one.a", "two")):
        make_slide(tmp_path / f"{name}.tif", compression="deflate", kind="generic", seed=seed)
    catalog, out = catalog_of(tmp_path, store, tissue_config, journal), tmp_path / "h5_files"
    out.mkdir()
    embed_slides(encoder(), catalog, [0, 1], replace(RECIPE, store=StoreConfig(request.param)), PIPE, store, out, journal)
    return out


class Mean(nn.Module):
    """What their slide encoders get is noted; the mean is what their own MeanSlideEncoder returns."""

    def forward(self, batch: dict[str, Any], device: str) -> torch.Tensor:
        self.seen = batch
        return batch["features"].mean(dim=1)


def test_trident_reads_our_stores(trident: Any, ours: Path, tmp_path: Path) -> None:
    for name in ("one.a", "two"):
        path = ours / f"{name}.h5"
        info, features, coords = open_store(path), read_features(path), read_coords(path)
        attrs, theirs = trident.IO.read_coords(str(path))
        np.testing.assert_array_equal(theirs, coords)
        assert (int(attrs["patch_size"]), int(attrs["patch_size_level0"])) == (info.patch_px, info.size_px)
        slide = object.__new__(trident.wsi_objects.WSI.WSI)
        slide.name, model = name, Mean()
        made = slide.extract_slide_features(str(path), model, str(tmp_path / "slides"), device="cpu")
        np.testing.assert_array_equal(model.seen["features"][0].numpy(), features.astype(np.float32))
        np.testing.assert_array_equal(model.seen["coords"][0].numpy(), coords)
        assert model.seen["attributes"]["patch_size_level0"] == info.size_px
        with h5py.File(made) as file:
            np.testing.assert_allclose(file["features"][:], features.astype(np.float64).mean(0), rtol=1e-5)


def test_clam_reads_our_stores(clam: Any, ours: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("case_id,slide_id,label\np1,one.a,normal\np2,two,tumor\n")
    kept = {"csv_path": str(tmp_path / "labels.csv"), "label_dict": {"normal": 0, "tumor": 1}, "print_info": False}
    slides = clam[0](str(ours.parent), **kept)
    slides.load_from_h5(True)
    for i, name in enumerate(("one.a", "two")):
        features, label, coords = slides[i]
        np.testing.assert_array_equal(features.numpy(), read_features(ours / f"{name}.h5"))
        np.testing.assert_array_equal(coords, read_coords(ours / f"{name}.h5"))
        assert label == i


def described(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return {
            name: (each.shape, each.dtype, each.maxshape, each.chunks, {k: type(v) for k, v in each.attrs.items()})
            for name, each in file.items()
        }


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_stores_that_trident_writes_open_and_the_restated_layout_is_theirs(trident: Any, tmp_path: Path, kind: type) -> None:
    features = np.random.default_rng(0).normal(size=(37, 6)).astype(kind)
    corners, path = tmp_path / "slide_patches.h5", tmp_path / "theirs" / "slide.h5"
    path.parent.mkdir()
    trident.IO.coords_to_h5(grid(37, 512).tolist(), str(corners), 256, 40, 20, "x", 9000, 9000, "slide", 0)
    attrs, coords = trident.IO.read_coords(str(corners))
    about = {"features": {"name": "slide", "savetodir": "x", "encoder": "uni_v1"}, "coords": attrs}
    trident.IO.save_h5(str(path), {"features": features, "coords": coords}, about)
    found = open_store(path)
    assert (found.encoder, found.mpp, found.patch_px, found.size_px) == ("uni_v1", 0.5, 256, 512)
    np.testing.assert_array_equal(read_features(path), features)
    np.testing.assert_array_equal(read_coords(path), coords)
    write_trident(tmp_path / "slide.h5", features, 512)
    assert {name: each[:4] for name, each in described(path).items()} == {
        name: each[:4] for name, each in described(tmp_path / "slide.h5").items()
    }
    assert {name: set(each[4]) for name, each in described(path).items()} == {
        name: set(each[4]) for name, each in described(tmp_path / "slide.h5").items()
    }


def test_stores_that_clam_writes_open_and_the_restated_layout_is_theirs(clam: Any, tmp_path: Path) -> None:
    features, coords = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32), grid(300, 448).astype(np.int32)
    path = tmp_path / "theirs" / "slide.h5"
    path.parent.mkdir()
    for start in range(0, 300, 256):
        stop = start + 256
        clam[1](str(path), {"features": features[start:stop], "coords": coords[start:stop]}, mode="a" if start else "w")
    found = open_store(path)
    assert (found.encoder, found.size_px, found.tiles) == ("", 448, 300)
    np.testing.assert_array_equal(read_features(path), features)
    np.testing.assert_array_equal(read_coords(path), coords)
    write_clam(tmp_path / "slide.h5", features, 448)
    assert described(path) == described(tmp_path / "slide.h5")
