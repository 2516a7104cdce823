"""From a manifest to a catalog: look at every slide once, accept it or say why not."""

import io
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from histoscale.data.catalog import Catalog, open_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import Slide, mpp_problem
from histoscale.data.masks import MaskError, drawn_mask
from histoscale.data.merge import NoneAccepted, write_catalog
from histoscale.data.parts import Entry, Known, Parts, Rejected, Row, next_run, row_of, slide_columns, write_part
from histoscale.data.processes import follow, settle, worker_context
from histoscale.data.ranks import Ranks
from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.pyramid import Damage, DecodeError, Layout, LayoutError, Level, Reader, Stands, level_mpps
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import Missing, Store
from histoscale.data.tissue import NoTissue, TissueConfig, tissue_mask

_STRIP_PX = 1 << 22  # pixels decoded at once while a level is shrunk
_WIDEST_PX = 1 << 26  # of a strip that is whole tiles high: above, tiles are decoded once for each of their parts
_MOST_MASK_PX = 1 << 27  # pixels of a mask: 90 mm square at 8 µm/px, half a gigabyte while it is found
_WORST_DAMAGE = 0.5  # a slide with more of its thumbnail undecodable is refused; single bad tiles are the visits' business
_PART_SLIDES = 16  # examined together and written as one part: what a kill costs each process
_AHEAD = 4  # parts a process has in its queue
_THUMBNAIL_PX = 256  # longest side


def build_catalog(
    slides: Sequence[Slide],
    store: Store,
    tissue: TissueConfig,
    out: Path,
    workers: int,
    previous: Catalog | None,
    journal: Journal,
    threads: int = 1,
    ranks: Ranks | None = None,
    refused: Sequence[Rejected] = (),
) -> Catalog:
    """Examine the slides in `workers` processes (0: in this one) of `threads` threads each and write the catalog into `out`.
    refused: rows of the manifest that stand in it as rejected.

    Slides that were examined before, for `previous` or by a run of this that was stopped, are not read again where neither their
    file nor the manifest's mpp nor the tissue settings have changed. Of several ranks each takes a share, the first one merges.
    Raises StorageError when the store fails: an outage must not look like bad slides. What was examined until then is kept.
    Raises NoneAccepted where not one slide can be used, and leaves the catalog that is in `out` as it is.
    """
    ordered = sorted(slides, key=lambda slide: slide.slide_id)
    before = previous if previous is not None and previous.same_tissue(tissue) else None
    folder = out / "parts"
    run = next_run(folder) if ranks is None else ranks.first(lambda: next_run(folder))
    known = {**(before.known() if before is not None else {}), **Parts(folder, tissue).known}
    if ranks is not None:
        ranks.barrier()  # all have seen the same parts
    share = _share(ordered, known, ranks)
    look = _Look(store, tissue, folder, run, threads)
    with journal.progress(sum(len(chunk.slides) for chunk in share), "index", "slides") as progress:
        unchanged = rejected = 0
        for done in _examined(look, share, workers):
            unchanged, rejected = unchanged + done.unchanged, rejected + done.rejected
            progress.advance(done.slides, unchanged=str(unchanged), rejected=str(rejected))
    if ranks is not None:
        ranks.barrier()

    def write() -> None:
        try:
            write_catalog(out, chain(_rows(ordered, Parts(folder, tissue), before), map(row_of, refused)), tissue)
        except NoneAccepted:  # nothing here to go on from
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)

    if ranks is None:
        write()
    else:
        ranks.first(write)
    return open_catalog(str(out), store)


@dataclass(frozen=True)
class _Chunk:
    """Slides that are examined together, and what is known of each from before."""

    number: int
    slides: list[Slide]
    known: list[Known | None]


@dataclass(frozen=True)
class _Done:
    slides: int
    unchanged: int
    rejected: int


def _share(slides: Sequence[Slide], known: Mapping[str, Known], ranks: Ranks | None) -> list[_Chunk]:
    """The chunks of this rank. Slides that nothing is known of stand apart, so that the work is spread evenly."""
    apart = sorted(slides, key=lambda slide: (slide.slide_id in known, slide.slide_id))
    chunks = []
    for number, start in enumerate(range(0, len(apart), _PART_SLIDES)):
        if ranks is None or number % ranks.world == ranks.rank:
            some = apart[start : start + _PART_SLIDES]
            chunks.append(_Chunk(number, some, [known.get(slide.slide_id) for slide in some]))
    return chunks


@dataclass(frozen=True)
class _Look:
    """What a process needs to examine slides; called with a chunk, it leaves a part."""

    store: Store
    tissue: TissueConfig
    folder: Path
    run: int
    threads: int

    def __call__(self, chunk: _Chunk) -> _Done:
        def one(slide: Slide, known: Known | None) -> Row | None:
            found = examine(slide, self.store, self.tissue, known)
            return None if isinstance(found, Known) else row_of(found)

        with ThreadPoolExecutor(self.threads) as pool:
            rows = list(pool.map(one, chunk.slides, chunk.known))
        new = [row for row in rows if row is not None]
        if new:
            write_part(self.folder, self.run, chunk.number, new, self.tissue)
        rejected = sum(row.get("reason") is not None for row in new)
        return _Done(len(rows), len(rows) - len(new), rejected)


def _examined(look: _Look, chunks: Sequence[_Chunk], workers: int) -> Iterator[_Done]:
    if workers == 0:
        yield from map(look, chunks)
        return
    waiting = iter(chunks)
    with ProcessPoolExecutor(workers, mp_context=worker_context(), initializer=follow, initargs=(settle,)) as pool:
        under_way: dict[Future[_Done], _Chunk] = {}
        try:
            while True:
                while len(under_way) < workers * _AHEAD and (chunk := next(waiting, None)) is not None:
                    under_way[pool.submit(look, chunk)] = chunk
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    yield future.result()
                    del under_way[future]
        except BrokenProcessPool as error:
            left = ", ".join(slide.slide_id for chunk in under_way.values() for slide in chunk.slides)[:300]
            died = f"a worker died (out of memory, or a slide crashed its decoder) over one of {left}"
            raise OSError(f"{died}; the same command goes on, with fewer workers= where memory is short") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _rows(slides: Sequence[Slide], parts: Parts, before: Catalog | None) -> Iterator[Row]:
    """Every slide as it was examined last, with the manifest's words of today."""
    refused = {found.slide_id: found for found in before.rejected} if before is not None else {}
    for slide in slides:
        if slide.slide_id in parts.known:
            row = parts.row(slide.slide_id)
        elif slide.slide_id in refused:
            row = row_of(refused[slide.slide_id])
        else:
            assert before is not None, f"{slide.slide_id} was not examined"
            row = before.packed(before.row(slide.slide_id))
        if row.get("reason") is None:
            header = {name: row[f"header_{name}"] for name in ("mpp", "scanner", "objective")}
            row = {**row, **slide_columns(complete(slide, header))}
        yield row


def complete(slide: Slide, header: Mapping[str, Any]) -> Slide:
    """The manifest's values, completed from the header's: mpp, scanner, objective."""
    return replace(slide, **{name: value for name, value in header.items() if getattr(slide, name) is None})


def examine(slide: Slide, store: Store, tissue: TissueConfig, known: Known | None = None) -> Entry | Rejected | Known:
    """Header, tile tables and tissue of one slide; Rejected if it cannot be used; `known` itself if nothing has changed since.
    One whose decoder did not return in time is rejected without a fingerprint, so that it is looked at again.

    A store that fails raises StorageError.
    """
    source = Known(slide.uri, slide.mpp, None, slide.mask_uri)
    try:
        source = source._replace(fingerprint=store.fingerprint(slide.uri))
        if slide.mask_uri is not None:
            source = source._replace(mask=_marked(slide.mask_uri, store))
        if known == source:
            return source
        problem = mpp_problem(slide.mpp) if slide.mpp is not None else None
        if problem:
            return Rejected(slide.slide_id, problem, source)
        layout = read_layout(slide.uri, store)
        full = complete(slide, {"mpp": layout.mpp, "scanner": layout.scanner, "objective": layout.objective})
        problem = mpp_problem(full.mpp)
        if problem or full.mpp is None:
            return Rejected(slide.slide_id, str(problem), source)
        level, factor = mask_level(layout, full.mpp, tissue.mpp)
        mask_mpp = full.mpp * layout.levels[level].downsample * factor
        _check_size(layout.levels[level], factor, mask_mpp)
        picture = thumbnail(open_reader(slide.uri, layout, store), level, factor)
        if slide.mask_uri is None:
            mask = tissue_mask(picture, mask_mpp, tissue)
        else:
            whole = layout.levels[0].width, layout.levels[0].height
            mask = drawn_mask(slide.mask_uri, store, whole, picture.shape[:2], mask_mpp / full.mpp)
    except Missing as error:
        return Rejected(slide.slide_id, f"missing: {error}", source)
    except (LayoutError, DecodeError) as error:
        reason = f"{'unreadable' if isinstance(error, LayoutError) else 'undecodable'}: {error}"
        if _stood(error):
            return Rejected(slide.slide_id, f"{reason}; the next index looks again", source._replace(fingerprint=None))
        return Rejected(slide.slide_id, reason, source)
    except NoTissue as error:
        return Rejected(slide.slide_id, str(error), source)
    except MaskError as error:
        return Rejected(slide.slide_id, f"unusable mask: {slide.mask_uri}: {error}", source)
    return Entry(full, source, layout, mask, mask_mpp, _jpeg(picture))


def _stood(error: BaseException | None) -> bool:
    """Whether a decoder that did not return in time is what an error came from: a disk or a machine that stands does that too."""
    while error is not None and not isinstance(error, Stands):
        error = error.__cause__
    return error is not None


def _marked(uri: str, store: Store) -> str:
    """A drawn mask as it is now: another file or other bytes are another mask."""
    mark = store.fingerprint(uri)
    return f"{uri} {mark.size} {mark.tag}"


def _jpeg(picture: np.ndarray) -> bytes:
    image, file = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.BOX)
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def mask_level(layout: Layout, mpp: float, mask_mpp: float) -> tuple[int, int]:
    """The coarsest level at most as coarse as the mask, and the whole number of its pixels that make one mask pixel."""
    mpps = level_mpps(layout.levels, mpp)
    fine = [i for i, value in enumerate(mpps) if value <= mask_mpp] or [0]
    level = max(fine, key=lambda i: mpps[i])
    return level, max(1, int(mask_mpp / mpps[level]))


def _check_size(level: Level, factor: int, mask_mpp: float) -> None:
    """Raises LayoutError for a slide so large that its mask is held by no machine."""
    sides = -(-level.width // factor), -(-level.height // factor)
    if sides[0] * sides[1] > _MOST_MASK_PX:
        told = " x ".join(f"{side * mask_mpp / 1e3:.0f}" for side in sides)
        raise LayoutError(
            f"its tissue mask is {sides[0]} x {sides[1]} px for {told} mm: expected at most {_MOST_MASK_PX}; where it is that "
            "large raise tissue.mpp, else set mpp in the manifest"
        )


def thumbnail(reader: Reader, level: int, factor: int) -> np.ndarray:
    """uint8 [ceil(height / factor), ceil(width / factor), 3]: a level shrunk by area, read in strips, of wide levels in blocks.

    Undecodable tiles are white. Raises DecodeError when they are more than half of the level.
    """
    table = reader.layout.levels[level]
    wide = -(-table.width // factor) * factor
    high = max(1, _STRIP_PX // wide // (table.tile_height * factor)) * table.tile_height * factor
    if wide * min(high, table.height) > _WIDEST_PX:
        wide = high = max(1, math.isqrt(_STRIP_PX) // factor) * factor
    shrunk = np.empty((-(-table.height // factor), -(-table.width // factor), 3), np.uint8)
    lost = 0
    for top, left in product(range(0, table.height, high), range(0, table.width, wide)):
        rows, columns = (-(-side // factor) * factor for side in (min(high, table.height - top), min(wide, table.width - left)))
        damage: list[Damage] = []
        strip = reader.region(level, left, top, columns, rows, damage)
        lost += sum((part.right - part.left) * (part.bottom - part.top) for part in damage)
        y, x = top // factor, left // factor
        shrunk[y : y + rows // factor, x : x + columns // factor] = np.asarray(Image.fromarray(strip).reduce(factor))
    if lost > _WORST_DAMAGE * table.width * table.height:
        raise DecodeError(f"{lost / (table.width * table.height):.0%} of level {level} cannot be decoded")
    return shrunk
