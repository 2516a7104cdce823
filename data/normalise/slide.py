"""Slides normalised by their own stains: fitted once a slide, applied to all of its patches."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from histoscale.data.catalog import Catalog
from histoscale.data.normalise import macenko, reinhard, vahadane
from histoscale.data.normalise.density import NotFitted, Stains
from histoscale.data.normalise.macenko import MacenkoConfig
from histoscale.data.normalise.reinhard import Colours, ReinhardConfig
from histoscale.data.normalise.sample import read_sample
from histoscale.data.normalise.vahadane import VahadaneConfig
from histoscale.data.readers.pyramid import Reader
from histoscale.data.storage import Store

_KEPT = 4096  # slides whose fit a process keeps: a few hundred bytes each


@dataclass(frozen=True)
class NoneConfig:
    kind: Literal["none"]


Methods = MacenkoConfig | VahadaneConfig | ReinhardConfig
NormaliseConfig = Annotated[NoneConfig | MacenkoConfig | VahadaneConfig | ReinhardConfig, Field(discriminator="kind")]


def fit_slide(catalog: Catalog, slide: int, reader: Reader, config: Methods) -> Stains | Colours:
    """The colours of one slide, from its own tissue and the configuration alone.

    Raises NotFitted (too little tissue, one stain only), and what reading raises.
    """
    pixels = read_sample(catalog, slide, reader, config.sample)
    if isinstance(config, MacenkoConfig):
        return macenko.fit(pixels, config)
    return vahadane.fit(pixels, config) if isinstance(config, VahadaneConfig) else reinhard.fit(pixels, config)


def apply(pixels: Tensor, fitted: Stains | Colours, config: Methods) -> Tensor:
    """uint8 [..., 3] of a slide -> uint8 with the target's colours."""
    if isinstance(config, ReinhardConfig):
        assert isinstance(fitted, Colours)
        return reinhard.apply(pixels, fitted, config)
    assert isinstance(fitted, Stains)
    if isinstance(config, MacenkoConfig):
        return macenko.apply(pixels, fitted, config)
    return vahadane.apply(pixels, fitted, config)


class SlideNormaliser:
    """Normalises patches by slide; for many threads; pickled without what it has fitted.

    A slide that cannot be fitted (one stain only, hardly any tissue) passes as it is: any transform would invent colour, and a
    slide that is missing would be the larger bias. `reason` says so, and whoever stores results stores it.
    """

    def __init__(self, catalog: Catalog, store: Store, config: Methods) -> None:
        self.catalog, self.store, self.config = catalog, store, config
        self._fits: OrderedDict[int, tuple[threading.Lock, list[Stains | Colours | NotFitted]]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["SlideNormaliser"], tuple[Catalog, Store, Methods]]:
        return SlideNormaliser, (self.catalog, self.store, self.config)

    def apply(self, patches: np.ndarray, slide: int, reader: Reader | None = None) -> np.ndarray:
        """uint8 [..., 3] of a slide -> uint8 of the same shape. reader: the slide, where it is already open.

        Raises what reading the sample raises.
        """
        fitted = self._fit(slide, reader)
        if isinstance(fitted, NotFitted):
            return patches
        return apply(torch.from_numpy(np.require(patches, requirements=["C", "W"])), fitted, self.config).numpy()

    def reason(self, slide: int, reader: Reader | None = None) -> str | None:
        """Why a slide is left as it is; None: it is normalised. Raises what reading the sample raises."""
        fitted = self._fit(slide, reader)
        return str(fitted) if isinstance(fitted, NotFitted) else None

    def _fit(self, slide: int, reader: Reader | None) -> Stains | Colours | NotFitted:
        with self._lock:
            lock, found = self._fits.setdefault(slide, (threading.Lock(), []))
            self._fits.move_to_end(slide)
            while len(self._fits) > _KEPT:
                self._fits.popitem(last=False)
        with lock:  # one thread reads the sample, the others of this slide wait for it
            if not found:
                try:
                    opened = reader or self.catalog.reader(slide, self.store)
                    found.append(fit_slide(self.catalog, slide, opened, self.config))
                except NotFitted as refused:
                    found.append(refused)
        return found[0]


def slide_normaliser(catalog: Catalog, store: Store, config: NormaliseConfig) -> SlideNormaliser | None:
    """None for `normalise=none`."""
    return None if isinstance(config, NoneConfig) else SlideNormaliser(catalog, store, config)
