"""Features of whole slides, one HDF5 file a slide as slide models read them."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from histoscale.data.catalog import Catalog
from histoscale.data.cells import Cells, Tissue
from histoscale.data.journal import Journal, scrub
from histoscale.data.normalise.slide import NormaliseConfig, SlideNormaliser, slide_normaliser
from histoscale.data.readers.pyramid import Damage, DecodeError, Reader
from histoscale.data.readers.scale import Scale, choose_scale, read_scaled
from histoscale.data.storage import Changed, Missing, StorageError, Store
from histoscale.eval.encoder import Encoder
from histoscale.eval.pool import check_pool, pooled

STORE_FORMAT = 1


@dataclass(frozen=True)
class GridConfig:
    """Where the patches of a slide lie: a grid without overlap over the tissue.

    mpp: null takes the one that the encoder was trained at. patch_px: null takes the tile that it was trained on, else its input.
    tissue_fraction: least share of tissue in a patch. A level within `mpp_tolerance` of the target is taken unscaled; nothing is
    enlarged more than `max_upsample`.
    """

    mpp: float | None
    patch_px: int | None
    tissue_fraction: float
    mpp_tolerance: float
    max_upsample: float


@dataclass(frozen=True)
class PipeConfig:
    """How fast: batch = patches an encoder call; threads = regions read at once; read_px = side of a region, level pixels."""

    batch: int
    threads: int
    read_px: int


class EmbedError(ValueError):
    """Slides that cannot be embedded as asked; the message says why."""


class _Unusable(Exception):
    """This slide, by its own bytes, has nothing to embed."""


@dataclass(frozen=True)
class Tiles:
    """The patches of one slide, grouped into regions that are read at once.

    size: side of a patch in level px. coords: int64 [n, 2], level-0 px of the top-left corners, in reading order.
    """

    scale: Scale
    size: float
    regions: list[tuple[int, int, np.ndarray]]  # x, y (level px) and bool [rows, columns]: which cells are wanted
    coords: np.ndarray

    def __len__(self) -> int:
        return len(self.coords)


def tile_slide(catalog: Catalog, slide: int, mpp: float, patch_px: int, grid: GridConfig, read_px: int) -> Tiles | None:
    """The grid over the tissue of one slide; None when no level can serve the mpp or no cell holds enough tissue."""
    mpps = catalog.level_mpps(slide)
    scale = choose_scale(mpps, mpp, grid.mpp_tolerance, grid.max_upsample)
    if scale is None:
        return None
    level = catalog.layout(slide).levels[scale.level]
    size = patch_px * scale.factor
    tissue = Tissue(catalog.bitmap(slide), catalog.mask_mpp(slide))
    cells = Cells(tissue, level.width, level.height, mpps[scale.level], size, grid.tissue_fraction)
    side = max(1, int(read_px // size))  # cells along a region
    regions, coords = [], []
    for row in range(0, int(level.height // size), side):
        for column in range(0, int(level.width // size), side):
            x, y = round(column * size), round(row * size)
            wanted = cells.fits(np.array([x]), np.array([y]), side)[0]
            if not wanted.any():
                continue
            rows, columns = np.flatnonzero(wanted.any(axis=1)), np.flatnonzero(wanted.any(axis=0))
            x, y = round(x + columns[0] * size), round(y + rows[0] * size)
            wanted = wanted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            regions.append((x, y, wanted))
            coords.append((np.argwhere(wanted)[:, ::-1] * size + (x, y)) * level.downsample)
    if not regions:
        return None
    return Tiles(scale, size, regions, np.rint(np.concatenate(coords)).astype(np.int64))


def embed_slides(
    encoder: Encoder,
    catalog: Catalog,
    slides: Sequence[int],
    pool: str,
    grid: GridConfig,
    normalise: NormaliseConfig,
    pipe: PipeConfig,
    store: Store,
    out: Path,
    journal: Journal,
) -> dict[str, Any]:
    """One `<slide_id>.h5` in `out` for each of the slides (rows of the catalog); stores that are there and fit are kept.

    A slide that its own bytes make unusable is a row in `failures.jsonl`. One that the store would not give is too, and after the
    others are done the run ends in StorageError, so that the same command tries it again. One whose stains cannot be fitted is
    embedded as it was scanned; `unnormalised` names it and why, as its store does.
    Raises EmbedError: no mpp or patch size is known; every slide failed.
    """
    check_pool(pool)
    mpp, patch_px = grid.mpp or encoder.mpp, grid.patch_px or encoder.tile_px or encoder.size_px
    if mpp is None:
        trained = f"was trained at {', '.join(f'{v:g}' for v in encoder.mpps)} µm/px" if encoder.mpps else "does not say its mpp"
        raise EmbedError(f"the encoder {encoder.name} {trained}: choose one with grid.mpp=")
    if patch_px is None:
        raise EmbedError(f"the encoder {encoder.name} takes patches of any size: choose one with grid.patch_px=")
    normaliser = slide_normaliser(catalog, store, normalise)
    kept, patches, failed, refused, unnormalised = 0, 0, {}, {}, {}
    with journal.progress(len(slides), "slides", "slides") as progress:
        for slide in slides:
            slide_id = catalog.slides[slide].slide_id
            path, attrs = _inside(out, slide_id), _attributes(encoder, catalog, slide, mpp, patch_px, pool, grid)
            attrs |= {"normalise": json.dumps(asdict(normalise), sort_keys=True)}
            if _finished(path, attrs):
                kept += 1
            else:
                try:
                    features, coords, more = _embed_slide(
                        encoder, catalog, slide, mpp, patch_px, pool, grid, normaliser, pipe, store
                    )
                    _write_store(path, features, coords, {**attrs, **more})
                    patches += len(features)
                except (_Unusable, DecodeError, Missing, Changed) as error:
                    failed[slide_id] = scrub(str(error))
                    _note_failure(out, slide_id, failed[slide_id])
                except StorageError as error:
                    refused[slide_id] = scrub(str(error))
                    _note_failure(out, slide_id, refused[slide_id])
            reason = _unnormalised(path) if normaliser is not None and slide_id not in {**failed, **refused} else ""
            if reason:
                unnormalised[slide_id] = reason
            progress.advance(1, patches=patches, failed=len(failed) + len(refused))
    if refused:
        slide_id, cause = next(iter(refused.items()))
        raise StorageError(f"{len(refused)} of {len(slides)} slides not read ({slide_id}: {cause}); the same command goes on")
    if failed and len(failed) == len(slides):
        slide_id, cause = next(iter(failed.items()))
        raise EmbedError(f"none of {len(slides)} slides could be embedded ({slide_id}: {cause})")
    return {"slides": len(slides) - len(failed), "kept": kept, "patches": patches, "failed": failed,
            "unnormalised": unnormalised, "mpp": mpp, "patch_px": patch_px,
            "effective_mpp": encoder.effective_mpp(mpp, patch_px)}  # fmt: skip


def _embed_slide(
    encoder: Encoder,
    catalog: Catalog,
    slide: int,
    mpp: float,
    patch_px: int,
    pool: str,
    grid: GridConfig,
    normaliser: SlideNormaliser | None,
    pipe: PipeConfig,
    store: Store,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """features float32 [n, D], coords int64 [n, 2] and what only reading tells. Raises _Unusable."""
    tiles = tile_slide(catalog, slide, mpp, patch_px, grid, pipe.read_px)
    if tiles is None:
        served = ", ".join(f"{value:.3g}" for value in catalog.level_mpps(slide))
        raise _Unusable(f"ineligible: no patch of {patch_px} px at {mpp:g} µm/px with enough tissue (its levels: {served} µm/px)")
    features, good, waiting = [], [], []
    for pixels, readable in _read_tiles(tiles, catalog, slide, patch_px, normaliser, pipe.threads, store):
        good.append(readable)
        waiting.append(pixels)
        while sum(map(len, waiting)) >= pipe.batch:
            stacked = np.concatenate(waiting)
            features.append(_encode(encoder, stacked[: pipe.batch], pool))
            waiting = [stacked[pipe.batch :]]
    if sum(map(len, waiting)):
        features.append(_encode(encoder, np.concatenate(waiting), pool))
    readable = np.concatenate(good)
    if not readable.any():
        raise _Unusable("not one of its patches can be decoded")
    width = float(catalog.level_mpps(slide)[0])
    more = {"encoder": encoder.name, "mpp": tiles.scale.mpp, "patch_size_level0": round(patch_px * tiles.scale.mpp / width),
            "lost_patches": int((~readable).sum()),
            "unnormalised": normaliser.reason(slide) or "" if normaliser is not None else ""}  # fmt: skip
    return np.concatenate(features), tiles.coords[readable], more


def _encode(encoder: Encoder, pixels: np.ndarray, pool: str) -> np.ndarray:
    cls, mean = encoder.vectors(torch.from_numpy(np.ascontiguousarray(pixels)))
    return pooled(cls, mean, pool).numpy()


def _read_tiles(
    tiles: Tiles, catalog: Catalog, slide: int, patch_px: int, normaliser: SlideNormaliser | None, threads: int, store: Store
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per region, in order: pixels uint8 [m, 3, S, S] of its readable patches, and bool [cells wanted]: which are readable."""
    reader = catalog.reader(slide, store)

    def read(region: tuple[int, int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        pixels, readable = _read_region(reader, tiles, region, patch_px)
        if normaliser is not None and len(pixels):
            pixels = normaliser.apply(pixels, slide, reader)
        return pixels.transpose(0, 3, 1, 2), readable

    with ThreadPoolExecutor(threads) as pool:
        left = iter(tiles.regions)
        running = [pool.submit(read, region) for region in islice(left, 2 * threads)]
        while running:
            done = running.pop(0).result()
            running += [pool.submit(read, region) for region in islice(left, 1)]
            yield done


def _read_region(
    reader: Reader, tiles: Tiles, region: tuple[int, int, np.ndarray], patch_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Patches uint8 [m, S, S, 3] and bool [cells wanted], as `_read_tiles`."""
    x, y, wanted = region
    damage: list[Damage] = []
    whole = read_scaled(reader, tiles.scale, x, y, wanted.shape[1] * patch_px, wanted.shape[0] * patch_px, damage, wanted)
    patches = whole.reshape(wanted.shape[0], patch_px, wanted.shape[1], patch_px, 3).transpose(0, 2, 1, 3, 4)
    readable = wanted.copy()
    for part in damage:
        rows = slice(part.top // patch_px, (part.bottom - 1) // patch_px + 1)
        readable[rows, part.left // patch_px : (part.right - 1) // patch_px + 1] = False
    return patches[readable], readable[wanted]


# The store.


def _attributes(
    encoder: Encoder, catalog: Catalog, slide: int, mpp: float, patch_px: int, pool: str, grid: GridConfig
) -> dict[str, Any]:
    """What makes a store: equal attributes, equal features."""
    row, levels = catalog.slides[slide], catalog.layout(slide).levels
    return {
        "format": STORE_FORMAT,
        "slide_id": row.slide_id,
        "slide_bytes": catalog.fingerprint(slide).size,
        "encoder_hash": encoder.hash,
        "pool": pool,
        "target_mpp": mpp,
        "patch_size": patch_px,
        "overlap": 0,
        "tissue_fraction": grid.tissue_fraction,
        "mpp_tolerance": grid.mpp_tolerance,
        "max_upsample": grid.max_upsample,
        "level0_width": levels[0].width,
        "level0_height": levels[0].height,
        "level0_mpp": float(catalog.level_mpps(slide)[0]),
    }


def _finished(path: Path, attrs: dict[str, Any]) -> bool:
    if not path.exists():
        return False
    try:
        with h5py.File(path) as file:
            return all(name in file.attrs and file.attrs[name] == value for name, value in attrs.items())
    except OSError:  # not HDF5: something else wrote here, and it is made again
        return False


def _unnormalised(path: Path) -> str:
    """Why the slide of a store was left as it was scanned; empty where it was normalised."""
    with h5py.File(path) as file:
        return str(file.attrs["unnormalised"])


def _write_store(path: Path, features: np.ndarray, coords: np.ndarray, attrs: dict[str, Any]) -> None:
    """The attributes stand on the file and on `coords`, where TRIDENT's readers look for them."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with h5py.File(partial, "w") as file:
        file.create_dataset("features", data=features.astype(np.float32))
        file.create_dataset("coords", data=coords.astype(np.int64))
        for name, value in attrs.items():
            file.attrs[name] = value
            file["coords"].attrs[name] = value
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _inside(out: Path, slide_id: str) -> Path:
    path = (out / f"{slide_id}.h5").resolve()
    if path.parent != out.resolve():
        raise EmbedError(f"the slide id {slide_id!r} leaves the folder {out}")
    return path


def _note_failure(out: Path, slide_id: str, reason: str) -> None:
    with (out / "failures.jsonl").open("a") as file:
        file.write(json.dumps({"slide_id": slide_id, "reason": reason}) + "\n")
