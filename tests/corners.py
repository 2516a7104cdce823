"""An encoder whose features can be read off the pixels, and small catalogs to embed with it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from histoscale.data.catalog import Catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import read_manifest
from histoscale.data.normalise.slide import NoneConfig
from histoscale.data.storage import Store
from histoscale.data.tissue import TissueConfig
from histoscale.eval.embed import JitterConfig, Recipe
from histoscale.eval.encoder import Encoder
from histoscale.eval.grid import GridConfig, PipeConfig
from histoscale.eval.stores import StoreConfig

NONE = NoneConfig("none")
GRID = GridConfig(mpp=0.5, patch_px=64, tissue_fraction=0.4, mpp_tolerance=0.05, max_upsample=1.0)
NO_JITTER = JitterConfig(copies=0, sigma_od=0.1, seed=0)
RECIPE = Recipe("cls", GRID, NONE, NO_JITTER, StoreConfig("fp32"))
PIPE = PipeConfig(batch=7, threads=2, read_px=300)


def corners(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """An encoder that can be checked: the first pixel's colour, and as patch tokens the last pixel's."""
    return pixels[:, :, 0, 0].double(), pixels[:, None, :, -1, -1].double()


def encoder(digest: str = "e1", tokens: Any = corners) -> Encoder:
    nothing, place = (0.0, 0.0, 0.0), torch.device("cpu")
    return Encoder("corners", 3, None, (), None, None, None, nothing, nothing, "bicubic", "fp32", digest, place, None, tokens)


def catalog_of(folder: Path, store: Store, tissue: TissueConfig, journal: Journal) -> Catalog:
    slides = sorted(folder.glob("*.tif"))
    (folder / "manifest.csv").write_text("slide_id,uri\n" + "".join(f"{path.stem},{path.name}\n" for path in slides))
    return build_catalog(read_manifest(str(folder / "manifest.csv"), store), store, tissue, folder / "catalog", 0, None, journal)
