"""What a decoder sees: frozen patch tokens, normalised pixels and labels of views, on disk once or made anew."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from histoscale.data.journal import Journal
from histoscale.eval.array_store import ArrayStore
from histoscale.eval.datasets.masks import LabelledMasks
from histoscale.eval.datasets.patches import hash_of
from histoscale.eval.encoder import Encoder
from histoscale.eval.mask_views import Cutter, Views, random_crops, score_views

TOKEN_TYPES = {"fp16": np.float16, "fp32": np.float32}
TOKENS = (*TOKEN_TYPES, "recompute")


class SegmentError(ValueError):
    """A decoder probe that cannot run as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Batch:
    """tokens: float32 [B, N, D]; rgb: normalised float32 [B, 3, S, S]; labels: int64 [B, S, S]; on one device."""

    tokens: Tensor
    rgb: Tensor
    labels: Tensor


Feed = Callable[[np.ndarray, int], Batch]  # items int64 [b], epoch -> what they are in it


@dataclass(frozen=True)
class FeedConfig:
    """tokens: how they are kept: `fp16` or `fp32` on disk, or `recompute` with every batch.

    crops: how many random crops of an image are drawn once and kept (a set without tiles); null draws and encodes fresh ones in
    every epoch, as eva does. piece: views a file. images_in_memory: decoded ones held.
    """

    tokens: str
    crops: int | None
    piece: int
    images_in_memory: int


class Material:
    """The views of a set at `side` px, cut once into `folder`, and the feeds of any encoder over them.

    score: the views that are scored, of train and report. items: of training, a tile or an image each; item_images: int64
    [items], their rows in the set. batch: views encoded at a time. Raises SegmentError for a configuration that cannot be.
    """

    def __init__(
        self, masks: LabelledMasks, side: int, seed: int, config: FeedConfig, batch: int, folder: Path, journal: Journal
    ) -> None:
        if config.tokens not in TOKENS:
            raise SegmentError(f"segment.feed.tokens is {config.tokens!r}: expected one of {', '.join(TOKENS)}")
        if config.crops is not None and config.crops < 1:
            raise SegmentError(
                f"segment.feed.crops is {config.crops}: expected at least 1, or null for fresh crops in every epoch"
            )
        self.masks, self.side, self.seed, self.batch = masks, side, seed, batch
        self.config, self.folder, self.journal = config, folder, journal
        self.cutter = Cutter(masks, config.images_in_memory)
        self.score = score_views(masks)
        self._score = self._cut_once(self.score, "views to score")
        train = masks.rows("train")
        self.fresh, self._crops = False, 1
        if masks.tile_px is not None:
            self._rows = np.flatnonzero(np.isin(self.score.images, train))
            self.item_images = self.score.images[self._rows]
            self._train = self._score
        else:
            self.item_images, self.fresh = train, config.crops is None
            self._rows = np.arange(len(train))
            if config.crops is not None:
                self._crops = config.crops
                drawn = [random_crops(masks.shapes, train, epoch, seed).boxes for epoch in range(config.crops)]
                views = Views(np.repeat(train, config.crops), np.stack(drawn, axis=1).reshape(-1, 4), stretch=True)
                self._train = self._cut_once(views, "training crops")
                self._rows = self._rows * config.crops

    @property
    def note(self) -> str:
        """What a reader must know of the training views; "" for nothing."""
        if self.masks.tile_px is not None or self.fresh:
            return ""
        return f"{self._crops} crops an image, drawn once, where eva draws new ones in every epoch"

    def score_rows(self, role: str) -> np.ndarray:
        """Views of a role: int64, rows of `score`."""
        return np.flatnonzero(self.masks.roles[self.score.images] == role)

    def pixels(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [b, 3, S, S] and labels uint8 [b, S, S] of rows of `score`."""
        return self._score[rows]

    def feeds(self, encoder: Encoder, device: torch.device, zeroed: bool) -> tuple[Feed, Feed]:
        """Training items -> batches, rows of `score` -> batches. zeroed: every token is 0, so that only colours are left.

        Raises SegmentError for an encoder without a square grid of patch tokens, and for tokens that the type cannot hold.
        """
        grid = token_grid(encoder, self.side)
        mean = torch.tensor(encoder.mean, device=device).view(1, 3, 1, 1)
        std = torch.tensor(encoder.std, device=device).view(1, 3, 1, 1)

        def batch(tokens: Tensor, pixels: np.ndarray, labels: np.ndarray) -> Batch:
            rgb = (torch.from_numpy(pixels).to(device).float() / 255 - mean) / std
            return Batch(tokens.to(device).float(), rgb, torch.from_numpy(labels).to(device).long())

        def encoded(pixels: np.ndarray) -> Tensor:
            if zeroed:
                return torch.zeros(1, *grid).expand(len(pixels), -1, -1)
            return encode(encoder, pixels, self.batch)

        def stored(cut: _Cut) -> Callable[[np.ndarray], Batch]:
            kept = None if zeroed or self.config.tokens == "recompute" else self._encode_once(encoder, cut)

            def read(rows: np.ndarray) -> Batch:
                pixels, labels = cut[rows]
                return batch(encoded(pixels) if kept is None else torch.from_numpy(kept[rows]), pixels, labels)

            return read

        score = stored(self._score)

        def fresh(items: np.ndarray, epoch: int) -> Batch:
            views = random_crops(self.masks.shapes, self.item_images[items], epoch, self.seed)
            pixels, labels = self.cutter.cut(views, np.arange(len(views)), self.side)
            return batch(encoded(pixels), pixels, labels)

        if self.fresh:
            return fresh, lambda rows, _: score(rows)
        train = score if self._train is self._score else stored(self._train)
        return lambda items, epoch: train(self._rows[items] + epoch % self._crops), lambda rows, _: score(rows)

    def _cut_once(self, views: Views, text: str) -> "_Cut":
        digest = hash_of("views", self.masks.hash, self.side, views.images, views.boxes, views.stretch)
        store = ArrayStore(self.folder / f"views-{digest}", len(views), self.config.piece)

        def make(rows: np.ndarray) -> np.ndarray:
            pixels, labels = self.cutter.cut(views, rows, self.side)
            return np.concatenate([pixels, labels[:, None]], axis=1)

        store.fill(make, text, self.journal)
        return _Cut(store, digest, len(views))

    def _encode_once(self, encoder: Encoder, cut: "_Cut") -> ArrayStore:
        kind = TOKEN_TYPES[self.config.tokens]
        store = ArrayStore(self.folder / f"tokens-{encoder.hash}-{self.config.tokens}-{cut.digest}", cut.count, self.config.piece)

        def make(rows: np.ndarray) -> np.ndarray:
            tokens = encode(encoder, cut[rows][0], self.batch).numpy()
            with np.errstate(over="ignore"):
                kept = tokens.astype(kind)
            if not np.isfinite(kept).all():
                raise SegmentError(
                    f"patch tokens of {encoder.name} reach {np.abs(tokens).max():.3g}, which {self.config.tokens} cannot hold: "
                    "set segment.feed.tokens=fp32"
                )
            return kept

        store.fill(make, f"patch tokens of {encoder.name}", self.journal)
        return store


@dataclass(frozen=True)
class _Cut:
    """store: uint8 [v, 4, S, S], red, green, blue and label, read together because they are used together."""

    store: ArrayStore
    digest: str
    count: int

    def __getitem__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [b, 3, S, S] and labels uint8 [b, S, S]."""
        held = self.store[rows]
        return held[:, :3], held[:, 3]


def encode(encoder: Encoder, pixels: np.ndarray, batch: int) -> Tensor:
    """uint8 [b, 3, S, S] -> patch tokens float32 [b, N, D] on the CPU, `batch` views a call."""
    parts = [encoder(torch.from_numpy(pixels[start : start + batch]))[1].clone() for start in range(0, len(pixels), batch)]
    return torch.cat(parts)


def token_grid(encoder: Encoder, side: int) -> tuple[int, int]:
    """N and D of an encoder's patch tokens on views of `side` px. Raises SegmentError unless N is a square above 0."""
    if encoder.model is None:
        raise SegmentError(
            f"the encoder {encoder.name} has no patch tokens: segmentation reports colour as a floor beside any other"
        )
    _, tokens = encoder(torch.zeros(1, 3, side, side, dtype=torch.uint8))
    count = tokens.shape[1]
    if count == 0 or round(count**0.5) ** 2 != count:
        raise SegmentError(f"the encoder {encoder.name} gives {count} patch tokens of {side} x {side} px: expected a square grid")
    return count, tokens.shape[2]
