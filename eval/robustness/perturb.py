"""Pictures as another laboratory or scanner would have made them, and normalised as a pipeline would: deterministic, by level."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import simplejpeg
import torch
from scipy.ndimage import gaussian_filter

from histoscale.data.keys import key, permutation
from histoscale.data.normalise import macenko, reinhard, vahadane
from histoscale.data.normalise.density import NotFitted, Stains
from histoscale.data.normalise.macenko import MacenkoConfig
from histoscale.data.normalise.reinhard import Colours, ReinhardConfig
from histoscale.data.normalise.slide import Methods, apply
from histoscale.data.normalise.vahadane import VahadaneConfig
from histoscale.data.stain import hed_jitter
from histoscale.eval.datasets.patches import LabelledPatches, hash_of
from histoscale.eval.resolution import resized
from histoscale.eval.robustness.findings import RobustnessError

Picture = np.ndarray  # uint8 [3, h, w]


@dataclass(frozen=True)
class PerturbationsConfig:
    """Levels of each kind; an empty list leaves a kind out.

    haematoxylin, eosin: added to the stain of every pixel, in natural-log optical density. blur_px: sigma of a Gaussian.
    jpeg: quality, chroma at half the resolution. downscale: so many times smaller and back, bicubic and antialiased.
    """

    haematoxylin: list[float]
    eosin: list[float]
    blur_px: list[float]
    jpeg: list[int]
    downscale: list[float]

    def each(self) -> Iterator["Perturbation"]:
        kinds: tuple[Sequence[float], ...] = (self.haematoxylin, self.eosin, self.blur_px, self.jpeg, self.downscale)
        for kind, levels in zip(KINDS, kinds, strict=True):
            for level in levels:
                yield Perturbation(kind, float(level))


KINDS = tuple(field.name for field in fields(PerturbationsConfig))
WORDS = {
    "haematoxylin": "haematoxylin shift (optical density)",
    "eosin": "eosin shift (optical density)",
    "blur_px": "blur (sigma, px)",
    "jpeg": "JPEG quality",
    "downscale": "downscale (times)",
}


@dataclass(frozen=True)
class Perturbation:
    """One kind at one level, as in PerturbationsConfig."""

    kind: str
    level: float

    def __str__(self) -> str:
        return f"{self.kind} {self.level:g}"

    def check(self) -> None:
        """Raises RobustnessError for a level that means nothing."""
        good = {
            "blur_px": self.level > 0,
            "jpeg": 1 <= self.level <= 100 and self.level == int(self.level),
            "downscale": self.level > 1,
        }
        expected = {"blur_px": "sigmas above 0", "jpeg": "whole qualities of 1 to 100", "downscale": "factors above 1"}
        if not good.get(self.kind, np.isfinite(self.level)):
            raise RobustnessError(f"perturbations.{self.kind} has {self.level:g}: expected {expected.get(self.kind, 'numbers')}")

    def __call__(self, picture: Picture) -> Picture:
        """uint8 [3, h, w] -> the like."""
        if self.kind == "blur_px":
            return (
                gaussian_filter(picture.astype(np.float32), (0, self.level, self.level), mode="mirror").round().astype(np.uint8)
            )
        if self.kind == "jpeg":
            data = simplejpeg.encode_jpeg(np.ascontiguousarray(picture.transpose(1, 2, 0)), int(self.level), "RGB", "420")
            return simplejpeg.decode_jpeg(data, "RGB").transpose(2, 0, 1)
        pixels = torch.from_numpy(np.ascontiguousarray(picture))[None]
        if self.kind == "downscale":
            height, width = picture.shape[1:]
            small = resized(pixels, (max(round(height / self.level), 1), max(round(width / self.level), 1)), "bicubic")
            return _as_uint8(resized((small * 255).round().to(torch.uint8), (height, width), "bicubic"))
        shift = torch.zeros(1, 3)
        shift[0, ("haematoxylin", "eosin").index(self.kind)] = self.level
        return _as_uint8(hed_jitter(pixels.float() / 255, torch.ones(1, 3), shift))


def _as_uint8(x: torch.Tensor) -> Picture:
    return (x[0] * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def perturbed(patches: LabelledPatches, perturbation: Perturbation) -> LabelledPatches:
    """The same patches under the perturbation."""
    return _changed(patches, lambda rows, pictures: [perturbation(picture) for picture in pictures], str(perturbation))


# Stain normalisation of a patch set, by slide.


@dataclass(frozen=True)
class MethodsConfig:
    """Of stain normalisation. `sample.patches` pictures of a slide, drawn by key, give `sample.pixels` pixels to fit on; the rest
    of `sample` is for whole slides, and patches are taken as they are."""

    macenko: MacenkoConfig
    vahadane: VahadaneConfig
    reinhard: ReinhardConfig


METHODS = ("none", *(field.name for field in fields(MethodsConfig)))


def normalised(
    patches: LabelledPatches, units: np.ndarray, method: str, methods: MethodsConfig
) -> tuple[LabelledPatches, "UnitNormaliser | None"]:
    """The patches with the colours of `method`'s target, fitted on every slide's own pictures (as they are read: after what was
    done to them before), and what fits them. units: [n], slides. A slide that cannot be fitted passes as it is."""
    if method == "none":
        return patches, None
    config: Methods = getattr(methods, method)
    digest = hash_of(json.dumps(asdict(config), sort_keys=True), [str(unit) for unit in units])
    normaliser = UnitNormaliser(patches, units, config)
    return _changed(patches, normaliser, f"{method} {digest}"), normaliser


def changed_rows(
    patches: LabelledPatches, rows: np.ndarray, units: np.ndarray, perturbation: Perturbation, method: str, methods: MethodsConfig
) -> tuple[LabelledPatches, "UnitNormaliser | None"]:
    """The `rows` of the patches, perturbed and then normalised as `normalised` does with all of them: a slide's fit sees the same
    patches as without the perturbation, so that nothing but the perturbation differs. Only what is read is changed."""
    pictures, normaliser = normalised(perturbed(patches, perturbation), units, method, methods)
    return pictures.only(rows), normaliser


def _changed(
    patches: LabelledPatches, change: Callable[[np.ndarray, Sequence[Picture] | np.ndarray], list[Picture]], name: str
) -> LabelledPatches:
    def read(rows: np.ndarray) -> Sequence[Picture] | np.ndarray:
        found = change(rows, patches.read(rows))
        return np.stack(found) if patches.size_px is not None else found

    return replace(patches, read=read, hash=hash_of("changed", patches.hash, name))


class UnitNormaliser:
    """Fits a slide when the first of its pictures is asked for; for many threads."""

    def __init__(self, patches: LabelledPatches, units: np.ndarray, config: Methods) -> None:
        self.patches, self.config = patches, config
        self.names, self.codes = np.unique(units, return_inverse=True)
        self._fits: dict[int, Stains | Colours | NotFitted] = {}
        self._locks = [threading.Lock() for _ in self.names]

    def __call__(self, rows: np.ndarray, pictures: Sequence[Picture] | np.ndarray) -> list[Picture]:
        """pictures: uint8 [3, h, w] of the rows -> the like."""
        return [self._one(picture, self.fitted(int(self.codes[row]))) for row, picture in zip(rows, pictures, strict=True)]

    def refused(self, rows: np.ndarray) -> dict[str, str]:
        """Slides of these rows that cannot be fitted, and why; fits them all."""
        found = {str(self.names[code]): self.fitted(code) for code in np.unique(self.codes[rows]).tolist()}
        return {name: str(fitted) for name, fitted in found.items() if isinstance(fitted, NotFitted)}

    def fitted(self, code: int) -> Stains | Colours | NotFitted:
        with self._locks[code]:
            if code not in self._fits:
                self._fits[code] = self._fit(code)
        return self._fits[code]

    def _fit(self, code: int) -> Stains | Colours | NotFitted:
        rows = np.flatnonzero(self.codes == code)
        sample = self.config.sample
        drawn = np.sort(rows[permutation(key(0, "robustness/normalise", code), len(rows))[: sample.patches]])
        pixels = np.concatenate([picture.reshape(3, -1).T for picture in self.patches.read(drawn)])
        pixels = pixels[:: -(-len(pixels) // sample.pixels)]
        try:
            if isinstance(self.config, MacenkoConfig):
                return macenko.fit(pixels, self.config)
            return (
                vahadane.fit(pixels, self.config)
                if isinstance(self.config, VahadaneConfig)
                else reinhard.fit(pixels, self.config)
            )
        except NotFitted as refused:
            return refused

    def _one(self, picture: Picture, fitted: Stains | Colours | NotFitted) -> Picture:
        if isinstance(fitted, NotFitted):
            return picture
        pixels = torch.from_numpy(np.array(picture.transpose(1, 2, 0), order="C"))
        return apply(pixels, fitted, self.config).numpy().transpose(2, 0, 1)
