"""From a manifest to a catalog: look at every slide once, accept it or say why not."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image

from histoscale.data.catalog import Catalog, Entry, Rejected, complete, write_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import Slide, mpp_problem
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.pyramid import Damage, DecodeError, Layout, LayoutError, Reader, level_mpps
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import Missing, Store
from histoscale.data.tissue import NoTissue, TissueConfig, tissue_mask

_STRIP_PX = 1 << 22  # pixels decoded at once while a level is shrunk
_WORST_DAMAGE = 0.5  # a slide with more of its thumbnail undecodable is refused; single bad tiles are the visits' business


def build_catalog(
    slides: Sequence[Slide],
    store: Store,
    tissue: TissueConfig,
    out: Path,
    workers: int,
    previous: Catalog | None,
    journal: Journal,
) -> Catalog:
    """Examine the slides in `workers` processes (0: in this one) and write the catalog into `out`.

    Unchanged slides of `previous` (same id, URI, fingerprint, manifest mpp, tissue settings) are taken over unread. Raises
    StorageError when the store fails: an outage must not look like bad slides.
    """
    accepted: list[Entry] = []
    rejected: list[Rejected] = []
    with journal.progress(len(slides), "index", "slides") as progress:
        for found in _examined(slides, store, tissue, workers, previous):
            if isinstance(found, Entry):
                accepted.append(found)
            else:
                rejected.append(found)
            progress.advance(1, rejected=str(len(rejected)))
    return write_catalog(out, accepted, rejected, tissue, store)


def _examined(
    slides: Sequence[Slide], store: Store, tissue: TissueConfig, workers: int, previous: Catalog | None
) -> Iterator[Entry | Rejected]:
    if workers == 0:
        for slide in slides:
            yield examine(slide, store, tissue, previous)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(examine, slide, store, tissue, previous): slide for slide in slides}
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            left = ", ".join(slide.slide_id for future, slide in futures.items() if not future.done())[:300]
            raise OSError(f"a worker died (out of memory, or a slide crashed its decoder); not examined: {left}") from error
        finally:
            pool.shutdown(cancel_futures=True)


def examine(slide: Slide, store: Store, tissue: TissueConfig, previous: Catalog | None = None) -> Entry | Rejected:
    """Header, tile tables and tissue of one slide; Rejected if it cannot be used. A store that fails raises StorageError."""
    try:
        fingerprint = store.fingerprint(slide.uri)
        old = previous.unchanged(slide, fingerprint, tissue) if previous is not None else None
        if old is not None:
            return old
        problem = mpp_problem(slide.mpp) if slide.mpp is not None else None
        if problem:
            return Rejected(slide.slide_id, slide.uri, problem)
        layout = read_layout(slide.uri, store)
        full = complete(slide, layout)
        problem = mpp_problem(full.mpp)
        if problem or full.mpp is None:
            return Rejected(slide.slide_id, slide.uri, str(problem))
        level, factor = mask_level(layout, full.mpp, tissue.mpp)
        mask_mpp = full.mpp * layout.levels[level].downsample * factor
        mask = tissue_mask(thumbnail(open_reader(slide.uri, layout, store), level, factor), mask_mpp, tissue)
    except Missing as error:
        return Rejected(slide.slide_id, slide.uri, f"missing: {error}")
    except LayoutError as error:
        return Rejected(slide.slide_id, slide.uri, f"unreadable: {error}")
    except DecodeError as error:
        return Rejected(slide.slide_id, slide.uri, f"undecodable: {error}")
    except NoTissue as error:
        return Rejected(slide.slide_id, slide.uri, str(error))
    return Entry(full, slide.mpp, layout, mask, mask_mpp, fingerprint)


def mask_level(layout: Layout, mpp: float, mask_mpp: float) -> tuple[int, int]:
    """The coarsest level at most as coarse as the mask, and the whole number of its pixels that make one mask pixel."""
    mpps = level_mpps(layout.levels, mpp)
    fine = [i for i, value in enumerate(mpps) if value <= mask_mpp] or [0]
    level = max(fine, key=lambda i: mpps[i])
    return level, max(1, int(mask_mpp / mpps[level]))


def thumbnail(reader: Reader, level: int, factor: int) -> np.ndarray:
    """uint8 [ceil(height / factor), ceil(width / factor), 3]: a level shrunk by area, read in strips.

    Undecodable tiles are white. Raises DecodeError when they are more than half of the level.
    """
    table = reader.layout.levels[level]
    width = -(-table.width // factor) * factor
    high = max(1, _STRIP_PX // width // (table.tile_height * factor)) * table.tile_height * factor
    parts, lost = [], 0
    for top in range(0, table.height, high):
        damage: list[Damage] = []
        rows = -(-min(high, table.height - top) // factor) * factor
        strip = reader.region(level, 0, top, width, rows, damage)
        lost += sum((part.right - part.left) * (part.bottom - part.top) for part in damage)
        parts.append(np.asarray(Image.fromarray(strip).reduce(factor)))
    if lost > _WORST_DAMAGE * table.width * table.height:
        raise DecodeError(f"{lost / (table.width * table.height):.0%} of level {level} cannot be decoded")
    return np.concatenate(parts)
