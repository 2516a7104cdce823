"""Features of whole slides, one HDF5 file a slide as slide models read them, and of the same tiles with jittered stains."""

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from histoscale.data.catalog import Catalog
from histoscale.data.fingerprint import THREADS, slide_bytes
from histoscale.data.journal import Journal, append_rows
from histoscale.data.keys import key, keys
from histoscale.data.normalise.slide import NormaliseConfig, slide_normaliser
from histoscale.data.readers.pyramid import DecodeError
from histoscale.data.readers.scale import choose_scale
from histoscale.data.secrets import scrub
from histoscale.data.splits import name_key
from histoscale.data.stain import hed_jitter
from histoscale.data.storage import Changed, Missing, StorageError, Store, is_remote
from histoscale.data.views import hed_draws
from histoscale.eval.encoder import Encoder
from histoscale.eval.grid import GridConfig, Ineligible, Part, PipeConfig, SlideParts
from histoscale.eval.pool import check_pool, pooled
from histoscale.eval.stores import StoreConfig, StoreError, copy_path, matches, read_attribute, store_path, write_store

STORE_FORMAT = 2  # 2: tiles row by row
SLIDE = "slide_content"  # attribute: what the slide's bytes were

Stores = dict[int, tuple[Path, dict[str, Any]]]  # of a slide, by copy (0 is the plain one): path, and the attributes that make it


@dataclass(frozen=True)
class JitterConfig:
    """Copies of the stores whose patches had their stains jittered, each patch by draws of its own: a slide model that trains on
    them sees other stains beside the same tissue.

    copies: stores beside the plain one. sigma_od: factor 1 +- sigma and shift +- sigma of each stain (H, E, DAB), uniform, in
    natural-log optical density, as views.hed_sigma_od.
    """

    copies: int
    sigma_od: float
    seed: int

    def __post_init__(self) -> None:
        if self.copies < 0 or not 0 <= self.sigma_od < 1:
            given = f"jitter.copies is {self.copies} and jitter.sigma_od {self.sigma_od}"
            raise ValueError(f"{given}: expected 0 or more copies and a sigma from 0 to below 1")


@dataclass(frozen=True)
class Recipe:
    """What decides the numbers of a store, beside the encoder and the slide."""

    pool: str
    grid: GridConfig
    normalise: NormaliseConfig
    jitter: JitterConfig
    store: StoreConfig


class EmbedError(ValueError):
    """Slides that cannot be embedded as asked; the message says why."""


class _NothingLeft(Exception):
    """Not one patch of a slide can be decoded."""


@dataclass
class Embedded:
    """slides: how many have all their stores, kept: of them from before. failed: slide_id -> why its bytes cannot be embedded.
    refused: slide_id -> why the storage would not give it. unnormalised: slide_id -> why it was left as it was scanned.
    model_s, waiting_s, writing_s: how long the encoder worked, how long it waited for pixels, how long stores were written
    (meanwhile)."""

    mpp: float
    patch_px: int
    slides: int = 0
    kept: int = 0
    patches: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unnormalised: dict[str, str] = field(default_factory=dict)
    model_s: float = 0.0
    waiting_s: float = 0.0
    writing_s: float = 0.0


def embed_slides(
    encoder: Encoder,
    catalog: Catalog,
    slides: Sequence[int],
    recipe: Recipe,
    pipe: PipeConfig,
    store: Store,
    out: Path,
    journal: Journal,
) -> Embedded:
    """`<slide_id>.h5` in `out` for each of the slides (rows of the catalog), and in `out`/jitter-1, … for the jittered copies;
    stores that are there and fit are kept.

    A slide that its own bytes make unusable, or that the store would not give, is a row in `failures.jsonl`; the others go on.
    One whose stains cannot be fitted is embedded as it was scanned, and `unnormalised` says why, as its store does. Raises
    EmbedError where no mpp or patch size is known, StoreError for an id that leaves the folder.
    """
    check_pool(recipe.pool)
    mpp, patch_px = magnification(encoder, recipe.grid)
    normaliser = slide_normaliser(catalog, store, recipe.normalise)
    found = Embedded(mpp, patch_px)
    missing = {}
    for slide, now in zip(slides, _now(catalog, slides, store), strict=True):
        wanted = _wanted(encoder, catalog, slide, mpp, patch_px, recipe, out)
        if now is not None:
            wanted = {copy: (path, {**attrs, SLIDE: now}) for copy, (path, attrs) in wanted.items()}
        absent = {copy: place for copy, place in wanted.items() if not matches(*place)}
        if now is not None and absent and _replaced(catalog, slide, store, absent):
            error = Changed(f"not the file that was indexed: `histoscale index manifest=… out={catalog.uri}` reads it again")
            _give_up(found.failed, catalog.slides[slide].slide_id, error, absent, out)
        elif absent:
            missing[slide] = absent
        else:
            found.slides, found.kept = found.slides + 1, found.kept + 1
            _note_unnormalised(found, catalog.slides[slide].slide_id, out)
    parts = SlideParts(catalog, missing, mpp, patch_px, recipe.grid, pipe, normaliser, store)
    written: deque[tuple[int, int, Future[float]]] = deque()
    with ThreadPoolExecutor(1, "stores") as writer, journal.progress(len(slides), "slides", "slides") as progress:

        def told() -> None:
            progress.advance(1, patches=found.patches, failed=len(found.failed) + len(found.refused))

        def finish() -> None:
            slide, patches, future = written.popleft()
            slide_id = catalog.slides[slide].slide_id
            try:
                found.writing_s += future.result()
                found.slides, found.patches = found.slides + 1, found.patches + patches
                _note_unnormalised(found, slide_id, out)
            except StoreError as error:
                _give_up(found.failed, slide_id, error, missing[slide], out)
            told()

        if found.kept:
            progress.advance(found.kept, patches=0, failed=0)
        for slide, tiles, read in parts:
            try:
                if isinstance(tiles, Exception):
                    raise tiles
                features, coords = _read(encoder, catalog, slide, _timed(read, found), missing[slide], recipe, pipe.batch, found)
                more = {
                    "encoder": encoder.name,
                    "mpp": tiles.scale.mpp,
                    "patch_size_level0": round(patch_px * tiles.scale.mpp / float(catalog.level_mpps(slide)[0])),
                    "lost_patches": len(tiles) - len(coords),
                    "unnormalised": normaliser.reason(slide) or "" if normaliser is not None else "",
                }
            except (_NothingLeft, Ineligible, DecodeError, Missing, Changed) as error:
                _give_up(found.failed, catalog.slides[slide].slide_id, error, missing[slide], out)
                told()
            except StorageError as error:
                _give_up(found.refused, catalog.slides[slide].slide_id, error, missing[slide], out)
                told()
            else:  # while the next slide is embedded
                written.append((slide, len(coords), writer.submit(_write, features, coords, missing[slide], more, recipe.store)))
                while len(written) > 1:
                    finish()
        while written:
            finish()
    return found


def _write(
    features: dict[int, np.ndarray], coords: np.ndarray, stores: Stores, more: dict[str, Any], config: StoreConfig
) -> float:
    """All stores of a slide; the seconds that it took. Raises StoreError."""
    start = time.perf_counter()
    for copy, (path, attrs) in stores.items():
        write_store(path, features[copy], coords, {**attrs, **more}, config)
    return time.perf_counter() - start


def settle(parts: Sequence[Embedded]) -> Embedded:
    """What all ranks did together. Raises StorageError where slides could not be read, so that the same command goes on with
    them, and EmbedError where every slide failed."""
    total = Embedded(parts[0].mpp, parts[0].patch_px)
    for part in parts:
        total.slides, total.kept, total.patches = total.slides + part.slides, total.kept + part.kept, total.patches + part.patches
        total.failed |= part.failed
        total.refused |= part.refused
        total.unnormalised |= part.unnormalised
        total.model_s, total.waiting_s = max(total.model_s, part.model_s), max(total.waiting_s, part.waiting_s)
        total.writing_s = max(total.writing_s, part.writing_s)
    count = total.slides + len(total.failed) + len(total.refused)
    if total.refused:
        slide_id, cause = next(iter(total.refused.items()))
        raise StorageError(f"{len(total.refused)} of {count} slides not read ({slide_id}: {cause}); the same command goes on")
    if total.failed and not total.slides:
        slide_id, cause = next(iter(total.failed.items()))
        raise EmbedError(f"none of {count} slides could be embedded ({slide_id}: {cause})")
    return total


def shares(catalog: Catalog, out: Path, world: int) -> list[list[int]]:
    """The slides of each rank, rows of the catalog: largest first to the rank that has least tissue to do; a slide whose store is
    there costs hardly anything. Raises StoreError for an id that leaves the folder."""
    area = catalog.numbers("tissue_px").astype(float) * catalog.numbers("mask_mpp") ** 2
    done = np.array([store_path(out, slide_id).exists() for slide_id in catalog.slide_ids], bool)
    costs = np.where(done, 1e-3, 1.0) * (area + 1e-3 * area.mean())
    given: list[list[int]] = [[] for _ in range(world)]
    loads = np.zeros(world)
    for slide in np.argsort(-costs, kind="stable").tolist():
        rank = int(loads.argmin())
        given[rank].append(slide)
        loads[rank] += costs[slide]
    return [sorted(each) for each in given]


def prepare(out: Path, jitter: JitterConfig) -> None:
    """The folders of the stores, without what a killed run left half written; `failures.jsonl` begins anew."""
    (out / "failures.jsonl").unlink(missing_ok=True)
    for folder in (copy_path(out / "x", copy).parent for copy in range(jitter.copies + 1)):
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob("*.partial"):
            partial.unlink()


def magnification(encoder: Encoder, grid: GridConfig) -> tuple[float, int]:
    """µm per pixel and side of the patches: as asked, else as the encoder was trained. Raises EmbedError where nobody says."""
    mpp, patch_px = grid.mpp or encoder.mpp, grid.patch_px or encoder.tile_px or encoder.size_px
    missing = {"grid.mpp=0.5": mpp, f"grid.patch_px={encoder.size_px or 224}": patch_px}
    if mpp is None or patch_px is None:
        silent = "does not say at how many µm per pixel it was trained" if mpp is None else "takes patches of any size"
        asked = " ".join(key for key, value in missing.items() if value is None)
        raise EmbedError(f"the encoder {encoder.name} {silent}: choose, such as {asked}")
    return mpp, patch_px


def grid_words(encoder: Encoder, grid: GridConfig) -> str:
    """One line: what the patches are, and who chose it."""
    mpp, patch_px = magnification(encoder, grid)
    words = f"patches of {patch_px} px at {mpp:g} µm/px"
    if grid.mpp is not None:
        return words
    others = [f"{value:g}" for value in encoder.mpps if value != mpp]
    return f"{words}, the default of {encoder.name}" + (f" (trained at {', '.join(others)} too: grid.mpp=)" if others else "")


def check_served(catalog: Catalog, encoder: Encoder, grid: GridConfig) -> None:
    """Raises EmbedError where not one slide of the catalog has a level for the patches, with what it could serve."""
    mpp, _ = magnification(encoder, grid)
    levels = [catalog.level_mpps(slide) for slide in range(len(catalog.slides))]

    def serving(target: float) -> int:
        return sum(choose_scale(mpps, target, grid.mpp_tolerance, grid.max_upsample) is not None for mpps in levels)

    if any(choose_scale(mpps, mpp, grid.mpp_tolerance, grid.max_upsample) is not None for mpps in levels):
        return
    finest = sorted(min(mpps) for mpps in levels)
    trained = encoder.mpps
    better = max((*trained, finest[-1]), key=lambda target: (serving(target), target in trained, -abs(target - mpp)))
    spread = f"{finest[0]:.3g}" + (f" to {finest[-1]:.3g}" if finest[-1] > finest[0] else "")
    raise EmbedError(
        f"none of {len(levels)} slides can serve {mpp:g} µm/px (their finest levels: {spread} µm/px): add grid.mpp={better:.3g}"
    )


def _now(catalog: Catalog, slides: Sequence[int], store: Store) -> list[str | None]:
    """What the bytes of slides are now; None for one that cannot be read: a store of it stays, else its reader says why."""
    uris = catalog.texts("uri")

    def one(slide: int) -> str | None:
        try:
            return slide_bytes(str(uris[slide]), store)
        except StorageError:
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, slides))


def _replaced(catalog: Catalog, slide: int, store: Store, stores: Stores) -> bool:
    """Whether the catalog does not know the file that is there now. The time of change of a file on a disk is no sign alone, as
    copies have another; with a store of other bytes it is."""
    uri = catalog.text("uri", slide) or ""
    indexed, now = catalog.fingerprint(slide), store.fingerprint(uri)
    others = [path for path, attrs in stores.values() if SLIDE in attrs and matches(path, {**attrs, SLIDE: _said(path)})]
    return indexed.size != now.size or (indexed.tag != now.tag and (is_remote(uri) or bool(others)))


def _said(path: Path) -> str:
    try:
        return read_attribute(path, SLIDE)
    except StoreError:
        return ""


def _wanted(encoder: Encoder, catalog: Catalog, slide: int, mpp: float, patch_px: int, recipe: Recipe, out: Path) -> Stores:
    """The stores that a slide should have; equal attributes, equal features."""
    row, level, grid = catalog.slides[slide], catalog.layout(slide).levels[0], recipe.grid
    attrs = {
        "format": STORE_FORMAT,
        "slide_id": row.slide_id,
        "slide_bytes": catalog.fingerprint(slide).size,
        "encoder_hash": encoder.hash,
        "pool": recipe.pool,
        "target_mpp": mpp,
        "patch_size": patch_px,
        "overlap": 0,
        "tissue_fraction": grid.tissue_fraction,
        "mpp_tolerance": grid.mpp_tolerance,
        "max_upsample": grid.max_upsample,
        "level0_width": level.width,
        "level0_height": level.height,
        "level0_mpp": float(catalog.level_mpps(slide)[0]),
        "normalise": json.dumps(asdict(recipe.normalise), sort_keys=True),
        "dtype": recipe.store.dtype,
    }
    plain, jitter = store_path(out, row.slide_id), {"sigma_od": recipe.jitter.sigma_od, "seed": recipe.jitter.seed}
    wanted = {0: (plain, {**attrs, "jitter": ""})}
    for copy in range(1, recipe.jitter.copies + 1):
        made = json.dumps({"copy": copy, **jitter}, sort_keys=True)
        wanted[copy] = copy_path(plain, copy), {**attrs, "jitter": made}
    return wanted


def _read(
    encoder: Encoder,
    catalog: Catalog,
    slide: int,
    parts: Iterator[Part],
    copies: Iterable[int],
    recipe: Recipe,
    batch: int,
    found: Embedded,
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Features float32 [n, D] of each copy and coords int64 [n, 2] of what could be decoded, row by row of the grid.

    Batches are of one slide, so that its bytes depend on nothing else. Raises _NothingLeft.
    """
    slide_id, width = catalog.slides[slide].slide_id, catalog.layout(slide).levels[0].width
    features: dict[int, list[np.ndarray]] = {copy: [] for copy in copies}
    corners = []
    for pixels, at in _batches(parts, batch):
        corners.append(at)
        start = time.perf_counter()
        for copy, vectors in features.items():
            seen = pixels.to(encoder.device)
            if copy:
                where = key(recipe.jitter.seed, "embed/jitter", copy, name_key(slide_id))
                drawn = keys(where, "patch", 0, torch.from_numpy(at[:, 1] * width + at[:, 0])).to(seen.device)
                seen = jittered(seen, drawn, recipe.jitter.sigma_od)
            vectors.append(pooled(*encoder.vectors(seen), recipe.pool).numpy())
        found.model_s += time.perf_counter() - start
    if not corners:
        raise _NothingLeft("not one of its patches can be decoded")
    coords = np.concatenate(corners)
    order = np.lexsort((coords[:, 0], coords[:, 1]))  # however large the regions were that were read at once
    return {copy: np.concatenate(vectors)[order] for copy, vectors in features.items()}, coords[order]


def _batches(parts: Iterator[Part], batch: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Pixels uint8 [batch, 3, S, S] (fewer at the end) and corners [batch, 2], in order."""
    pixels: list[np.ndarray] = []
    corners: list[np.ndarray] = []
    for part in parts:
        pixels.append(part.pixels)
        corners.append(part.corners)
        if sum(map(len, pixels)) >= batch:
            joined, at = np.concatenate(pixels), np.concatenate(corners)
            whole = len(joined) // batch * batch
            for start in range(0, whole, batch):
                yield torch.from_numpy(joined[start : start + batch]), at[start : start + batch]
            pixels, corners = [joined[whole:]], [at[whole:]]
    if sum(map(len, pixels)):
        yield torch.from_numpy(np.concatenate(pixels)), np.concatenate(corners)


def jittered(pixels: Tensor, drawn: Tensor, sigma_od: float) -> Tensor:
    """uint8 [n, 3, h, w] with the stains of each patch moved by its key, int64 [n]."""
    moved = hed_draws(drawn, sigma_od)
    return hed_jitter(pixels.float() / 255, moved[:, 0], moved[:, 1]).mul_(255).round_().to(torch.uint8)


def _timed(parts: Iterator[Part], found: Embedded) -> Iterator[Part]:
    while True:
        start = time.perf_counter()
        part = next(parts, None)
        found.waiting_s += time.perf_counter() - start
        if part is None:
            return
        yield part


def _note_unnormalised(found: Embedded, slide_id: str, out: Path) -> None:
    reason = read_attribute(store_path(out, slide_id), "unnormalised")
    if reason:
        found.unnormalised[slide_id] = reason


def _give_up(reasons: dict[str, str], slide_id: str, error: Exception, stores: Stores, out: Path) -> None:
    """Note why, and leave no older store behind that would pass for this one."""
    reasons[slide_id] = scrub(str(error))
    for path, _ in stores.values():
        path.unlink(missing_ok=True)
    append_rows(out / "failures.jsonl", [{"slide_id": slide_id, "reason": reasons[slide_id]}])
