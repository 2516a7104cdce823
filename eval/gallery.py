"""Which pictures a page shows: reported images with their nearest training images, and the most confident mistakes."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from histoscale.data.keys import key, permutation
from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.page import Gallery, Strip, Tile
from histoscale.eval.results import Outcome

_ROWS = 4096  # training rows a product: the similarities of a few queries never hold more


@dataclass(frozen=True)
class GalleryConfig:
    """per_class: reported images a class, drawn by seed. neighbours: training images beside each. confusions: pairs of classes
    that are confused most, and mistakes: the most confident ones of each pair. thumb_px: the longer side of a thumbnail, quality:
    of its JPEG. budget_mb: all pictures of a page together; those beyond it are left out and counted. seed: of the draw."""

    per_class: int
    neighbours: int
    confusions: int
    mistakes: int
    thumb_px: int
    quality: int
    budget_mb: float
    seed: int


class Pictures:
    """Thumbnails as data URIs, within one budget of bytes for the whole page."""

    def __init__(self, config: GalleryConfig) -> None:
        self.config, self.left, self.skipped = config, int(config.budget_mb * 1e6), 0

    def of(self, pixels: np.ndarray) -> str:
        """uint8 [3, h, w] -> a JPEG as a data URI, or "" once the budget is spent."""
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        image.thumbnail((self.config.thumb_px, self.config.thumb_px), Image.Resampling.LANCZOS)
        return self._kept(image, "jpeg", quality=self.config.quality)

    def of_map(self, pixels: np.ndarray, side_px: int) -> str:
        """uint8 [h, w, 3] with sharp borders -> a PNG as a data URI, no side longer than `side_px`."""
        image = Image.fromarray(pixels)
        image.thumbnail((side_px, side_px), Image.Resampling.NEAREST)
        return self._kept(image, "png", optimize=True)

    def _kept(self, image: Image.Image, kind: str, **options: int | bool) -> str:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        text = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if len(text) > self.left:
            self.skipped += 1
            return ""
        self.left -= len(text)
        return text


def chosen_rows(labels: np.ndarray, rows: np.ndarray, classes: int, per_class: int, seed: int) -> np.ndarray:
    """int64: up to `per_class` of `rows` for every class, in the order of a keyed permutation: never by score."""
    chosen = []
    for label in range(classes):
        members = rows[labels[rows] == label]
        order = permutation(key(seed, "gallery", label), len(members)) if len(members) else np.zeros(0, np.int64)
        chosen.append(members[order[:per_class]])
    return np.concatenate(chosen)


def nearest_rows(features: np.ndarray, queries: np.ndarray, train: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64 [q, k], cosines [q, k]), nearest first, the lower row among equals. features: [n, D]; queries, train: rows.

    A zero vector is as far from everything as a right angle. Fewer than k training rows: all of them.
    """
    asked = _unit(features[queries])
    k = min(k, len(train))
    best, at = np.full((len(queries), 0), 0.0), np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(train), _ROWS):
        part = train[start : start + _ROWS]
        near = np.concatenate([best, asked @ _unit(features[part]).T], axis=1)
        where = np.concatenate([at, np.broadcast_to(part, (len(queries), len(part)))], axis=1)
        order = np.argsort(-near, axis=1, kind="stable")[:, :k]
        best, at = np.take_along_axis(near, order, 1), np.take_along_axis(where, order, 1)
    return at, best


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def neighbour_gallery(patches: LabelledPatches, outcome: Outcome, features: np.ndarray, pictures: Pictures) -> Gallery:
    """Reported images of every class beside their nearest training images in the features [n, D], the true class marked; with
    outer folds beside images of other blocks than their own, as any of these may have been learnt from."""
    config, outer = pictures.config, outcome.role == "outer"
    queries = chosen_rows(patches.labels, outcome.rows, len(patches.classes), config.per_class, config.seed)
    near: list[np.ndarray] = []
    cosine: list[np.ndarray] = []
    for query in queries:
        train = _others(patches, query) if outer else np.setdiff1d(patches.rows("train"), queries)
        rows, cosines = nearest_rows(features, np.array([query]), train, config.neighbours)
        near.append(rows[0])
        cosine.append(cosines[0])
    called = dict(zip(outcome.rows.tolist(), np.exp(outcome.logs).mean(axis=0).argmax(axis=1).tolist(), strict=True))
    strips = []
    for query, rows, cosines in zip(queries.tolist(), near, cosine, strict=True):
        if not len(rows):
            continue
        truth = patches.labels[query]
        same = patches.labels[rows] == truth
        beside = [
            Tile(image, f"{patches.classes[patches.labels[row]]} · {value:.2f}", bool(right))
            for image, row, value, right in zip(_thumbnails(patches, rows, pictures), rows, cosines.tolist(), same, strict=True)
        ]
        (own,) = _thumbnails(patches, np.array([query]), pictures)
        wrong = "" if called[query] == truth else f", called {patches.classes[called[query]]}"
        words = f"{patches.classes[truth]}{wrong} · {int(same.sum())} of {len(rows)}"
        strips.append(Strip(Tile(own, words, None), beside, ""))
    learnt = "images of other groups, as the set has no training part," if outer else "training images"
    note = (
        f"Left: {'images' if outer else 'reported images'}, drawn by seed {config.seed} and never by score, with their class, "
        "what the probe called them where it was wrong, and how many neighbours share their class. Right: their nearest "
        f"{learnt} by cosine of the embedding, with class and cosine; ✓ where it is the class of the left one."
    )
    return Gallery(strips, note)


def _others(patches: LabelledPatches, query: int) -> np.ndarray:
    """Rows of another block than the query's: with outer folds any of them may have been trained on."""
    labelled = np.flatnonzero(patches.roles != "")
    return labelled[patches.blocks[labelled] != patches.blocks[query]]


def worst_confusions(patches: LabelledPatches, outcome: Outcome, pictures: Pictures) -> Gallery:
    """The pairs (true class, called class) with the largest share of the true class, and the most confident mistakes of each."""
    config, labels = pictures.config, patches.labels[outcome.rows]
    shares = np.exp(outcome.logs).mean(axis=0)
    called = shares.argmax(axis=1)
    strips = []
    for true, wrong, count in worst_pairs(labels, called, len(patches.classes))[: config.confusions]:
        places = np.flatnonzero((labels == true) & (called == wrong))
        places = places[np.argsort(-shares[places, wrong], kind="stable")[: config.mistakes]]
        images = _thumbnails(patches, outcome.rows[places], pictures)
        first, *others = [
            Tile(image, f"{shares[place, wrong]:.2f}", False) for image, place in zip(images, places.tolist(), strict=True)
        ]
        total = int((labels == true).sum())
        words = f"{patches.classes[true]} called {patches.classes[wrong]}: {count} of {total} ({100 * count / total:.0f} %)"
        strips.append(Strip(first, others, words))
    note = (
        "The pairs of classes that are confused most, by their share of the true class, and the mistakes of which the probe was "
        "surest, with the probability that it gave to the wrong class."
    )
    return Gallery(strips, note)


def worst_pairs(labels: np.ndarray, called: np.ndarray, classes: int) -> list[tuple[int, int, int]]:
    """(true class, called class, count) of all confusions, the largest share of the true class first."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, called), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    pairs = [(t, c, int(counts[t, c])) for t in range(classes) for c in range(classes) if t != c and counts[t, c]]
    return sorted(pairs, key=lambda pair: -shares[pair[0], pair[1]])


def _thumbnails(patches: LabelledPatches, rows: np.ndarray, pictures: Pictures) -> list[str]:
    return [pictures.of(np.asarray(pixels)) for pixels in patches.read(rows)] if len(rows) else []


def tinted(image: np.ndarray, mask: np.ndarray, colours: Sequence[tuple[int, int, int]], ignored: int | None) -> np.ndarray:
    """uint8 [h, w, 3] with the classes of mask [h, w] laid over it: class 0 is background and stays, ignored pixels turn grey."""
    over = image.astype(np.float64)
    for label in np.unique(mask).tolist():
        if label == ignored:
            over[mask == label] = 0.3 * over[mask == label] + 0.7 * 128
        elif label > 0:
            over[mask == label] = 0.45 * over[mask == label] + 0.55 * np.array(colours[(label - 1) % len(colours)])
    return over.astype(np.uint8)
