"""Features of labelled images once: read, looked at by every encoder that still needs them, and kept.

Ranks share the chunks of rows. A batch is made of the same rows whoever makes it, and after whatever interruption, so that the
features are the same bits (for equal numbers of threads a process, on the CPU in fp32).
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from histoscale.data.journal import Journal
from histoscale.data.ranks import Ranks
from histoscale.eval.chunks import Arrays, FeatureFile
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches
from histoscale.eval.encoder import Encoder
from histoscale.eval.pool import check_pool
from histoscale.eval.resolution import ResolutionConfig, View, view_of


@dataclass(frozen=True)
class Vectors:
    """What an encoder says of n images: cls [n, D] and mean of patch tokens [n, D], or [n, 0] where there are none; float32.

    hashes: uint64 [n], of the pixels, so that equal images are found. sizes: int32 [n, 2], heights and widths. Both are None for
    vectors that were not made from images.
    """

    cls: np.ndarray
    mean: np.ndarray
    hashes: np.ndarray | None = None
    sizes: np.ndarray | None = None

    def pooled(self, pool: str) -> np.ndarray:
        """[n, D] or [n, 2D]; only `cls+mean` makes a copy. Raises ValueError for a name that is not in POOLS."""
        check_pool(pool)
        if pool == "cls" or self.mean.shape[1] == 0:
            return self.cls
        return self.mean if pool == "mean" else np.concatenate([self.cls, self.mean], axis=1)


def embed_patches(
    encoders: Sequence[Encoder],
    patches: LabelledPatches,
    resolution: ResolutionConfig,
    batch: int,
    threads: int,
    folder: Path,
    journal: Journal,
    ranks: Ranks,
) -> list[Vectors]:
    """Features of all encoders in one pass over the images, kept in `folder` by the hashes of encoder and data and by resolution.

    All ranks call it and see one `folder`. threads: that read and decode ahead of the encoders; `patches.read` is called from
    all of them. Run again after it was stopped it goes on; chunks that do not hold what was written are made again, and that is
    said. The arrays returned are mapped from disk. At most `threads + 1` batches of pixels are in memory, and of images of any
    size as many images.
    Raises DatasetError for images that are not uint8 [3, h, w], ResolutionError, FeatureError, ValueError for batch or threads.
    """
    for name, value in (("batch", batch), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    views = [view_of(encoder.size_px, encoder.interpolation, resolution, patches.mpp) for encoder in encoders]
    paths = [folder / f"{e.hash}-{patches.hash}-{v.identity}.safetensors" for e, v in zip(encoders, views, strict=True)]
    looks = {
        path: _Look(encoder, view, FeatureFile(path, len(patches), batch, encoder.device.type))
        for path, encoder, view in zip(paths, encoders, views, strict=True)
    }
    found = ranks.first(lambda: {path: look.file.check() for path, look in looks.items()})
    for path, state in found.items():
        if state.damaged:
            name = f"{looks[path].encoder.name} in {path.name}"
            journal.say(f"{state.damaged} chunks of {name} do not hold what was written: they are made again")
    wanted = {path: set(range(look.file.chunks)) - found[path].good for path, look in looks.items()}
    todo = sorted(set().union(*wanted.values()))
    mine = [(chunk, [looks[path] for path in looks if chunk in wanted[path]]) for chunk in todo[ranks.rank :: ranks.world]]
    if todo:
        kept = looks[paths[0]].file.chunks - len(todo)
        text = f"features of {sum(map(bool, wanted.values()))} encoders" + (f", {kept} chunks kept" if kept else "")
        total = sum(stop - start for start, stop in (row[0].file.span(chunk) for chunk, row in mine))
        with journal.progress(total, text, "images") as progress:
            for chunk, row in _made(mine, patches, batch, threads):
                for look, arrays in row:
                    look.file.keep(chunk, arrays)
                progress.advance(len(row[0][1]["hashes"]))
        ranks.barrier()

    def join() -> None:
        for path, state in found.items():
            if not state.joined:
                looks[path].file.join()

    ranks.first(join)
    opened = {path: look.file.open() for path, look in looks.items()}
    return [Vectors(**opened[path]) for path in paths]


def pixel_hash(image: np.ndarray) -> int:
    """64 bits of BLAKE2b over shape and pixels, uint8 [3, h, w]."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class _Look:
    encoder: Encoder
    view: View
    file: FeatureFile


@dataclass(frozen=True)
class _Read:
    """Images of some rows of a chunk, as its views see them. last: the chunk ends here."""

    chunk: int
    looks: list[_Look]
    last: bool
    hashes: np.ndarray
    sizes: np.ndarray
    inputs: dict[View, tuple[Tensor, np.ndarray]]


def _made(
    chunks: Sequence[tuple[int, list[_Look]]], patches: LabelledPatches, batch: int, threads: int
) -> Iterator[tuple[int, list[tuple[_Look, Arrays]]]]:
    """Per chunk: the arrays of each look that needs it."""
    queues: dict[View, _Queue] = {}
    seen: list[_Read] = []
    for part in _read_ahead(chunks, patches, batch, threads):
        if not seen:
            queues = {view: _Queue([look.encoder for look in part.looks if look.view == view], batch) for view in part.inputs}
        for view, (inputs, counts) in part.inputs.items():
            queues[view].put(inputs, counts, whole=view.size_px is None)
        seen.append(part)
        part.inputs.clear()
        if part.last:
            about = {"hashes": np.concatenate([p.hashes for p in seen]), "sizes": np.concatenate([p.sizes for p in seen])}
            done = {view: queue.finish() for view, queue in queues.items()}
            row = []
            for look in part.looks:
                cls, mean = done[look.view].pop(0)  # in the order in which the queue was given them
                row.append((look, {**about, "cls": cls, "mean": mean}))
            seen = []
            yield part.chunk, row


def _read_ahead(chunks: Sequence[tuple[int, list[_Look]]], patches: LabelledPatches, batch: int, threads: int) -> Iterator[_Read]:
    """In order; a batch at once where all images have one size, else one image, as it may be large."""
    uniform = patches.size_px is not None
    step = batch if uniform else 1
    units = (
        (chunk, looks, np.arange(first, min(first + step, stop)), first + step >= stop)
        for chunk, looks in chunks
        for start, stop in (looks[0].file.span(chunk),)
        for first in range(start, stop, step)
    )

    def read(unit: tuple[int, list[_Look], np.ndarray, bool]) -> _Read:
        chunk, looks, rows, last = unit
        images = patches.read(rows)
        _check_images(images, rows, patches, uniform)
        sizes = np.array([image.shape[1:] for image in images], dtype=np.int32)
        hashes = np.array([pixel_hash(image) for image in images], dtype=np.uint64)
        inputs = {view: view.inputs(images, uniform) for view in dict.fromkeys(look.view for look in looks)}
        return _Read(chunk, looks, last, hashes, sizes, inputs)

    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[_Read]] = deque(pool.submit(read, unit) for unit in islice(units, threads))
        try:
            while running:
                done = running.popleft().result()
                running.extend(pool.submit(read, unit) for unit in islice(units, 1))
                yield done
                del done
        finally:
            for future in running:
                future.cancel()


def _check_images(images: Sequence[np.ndarray] | np.ndarray, rows: np.ndarray, patches: LabelledPatches, uniform: bool) -> None:
    if len(images) != len(rows):
        raise DatasetError(f"{patches.name}: {len(images)} images were read for {len(rows)} rows")
    side = patches.size_px
    for row, image in zip(rows, images, strict=True):
        good = image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] == 3 and min(image.shape) > 0
        if not good or (uniform and image.shape[1:] != (side, side)):
            expected = f"uint8 [3, {side}, {side}]" if uniform else "uint8 [3, h, w]"
            raise DatasetError(f"{patches.name}: image {row} is {image.dtype} {list(image.shape)}: expected {expected}")


@dataclass
class _Queue:
    """Inputs of one view that wait for a full batch, and what its encoders said of those before, in one chunk."""

    encoders: list[Encoder]
    batch: int
    waiting: list[Tensor] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)
    said: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)  # by batch, then encoder

    def put(self, inputs: Tensor, counts: np.ndarray, whole: bool) -> None:
        """inputs: [k, 3, S, S]; counts: int [b], how many are of each image. whole: images as they are, so of any size."""
        self.counts.append(counts)
        self.waiting.append(inputs)
        while self.waiting and (whole or sum(map(len, self.waiting)) >= self.batch):
            self._encode()

    def finish(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per encoder cls [n, D] and mean [n, D], each the mean over the inputs of an image."""
        if self.waiting:
            self._encode()
        counts = np.concatenate(self.counts)
        found = []
        for i in range(len(self.encoders)):
            cls, mean = (torch.cat([row[i][part] for row in self.said]) for part in (0, 1))
            found.append((_per_image(cls, counts), _per_image(mean, counts)))
        return found

    def _encode(self) -> None:
        """The first `batch` inputs, or all that wait."""
        taken, room = [], self.batch
        while self.waiting and room:
            first = self.waiting.pop(0)
            taken.append(first[:room])
            if len(first) > room:
                self.waiting.insert(0, first[room:])
            room -= len(taken[-1])
        if len({x.dtype for x in taken}) > 1:  # some images were resampled, so are float already
            taken = [x.float() / 255 if x.dtype == torch.uint8 else x for x in taken]
        inputs = taken[0] if len(taken) == 1 else torch.cat(taken)
        self.said.append([encoder.vectors(inputs) for encoder in self.encoders])


def _per_image(features: Tensor, counts: np.ndarray) -> np.ndarray:
    """Features [k, D] of the inputs -> float32 [n, D] of the images."""
    if (counts == 1).all():
        return features.numpy()
    return np.stack([part.mean(dim=0).numpy() for part in features.split(counts.tolist())])
