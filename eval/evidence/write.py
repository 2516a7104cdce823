"""Everything a second reader gets of a study's slides, in one call: `slides/<slide_id>/` and an index beside them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from histoscale.data.keys import key
from histoscale.data.readers.pyramid import DecodeError, level_mpps
from histoscale.data.readers.scale import choose_scale, read_scaled
from histoscale.data.secrets import scrub
from histoscale.data.storage import StorageError
from histoscale.eval.artefacts import white_point
from histoscale.eval.evidence.case import Case, EvidenceConfig, Measured
from histoscale.eval.evidence.display import attention_shown, common_limit, signed_shown
from histoscale.eval.evidence.figure import draw_figure
from histoscale.eval.evidence.geometry import Canvas, paint, read_picture, shrink, whole_slide
from histoscale.eval.evidence.measure import extremes, measure_artefacts, measure_deletion, measure_overlap
from histoscale.eval.evidence.page import About, Patch, jpeg, layer, write_index, write_slide_page
from histoscale.eval.evidence.pyramid import blend, write_overlay, write_values
from histoscale.eval.evidence.qupath import write_geojson
from histoscale.eval.evidence.tables import write_tiles

_THUMB_PX = 240  # on the list of slides
_FILES = (
    ("attention.ome.tif", "the map over the slide, a pyramid for QuPath"),
    ("values.ome.tif", "the raw numbers as a pyramid of floats"),
    ("heatmap.geojson", "tiles and attended regions for QuPath, level-0 coordinates"),
    ("tiles.parquet", "the raw numbers as a table"),
    ("overlay.png", "the map as a picture, with annotations where there are any"),
)


class EvidenceError(ValueError):
    """Slides whose pages cannot be written as asked; the message says why."""


def choose(cases: Sequence[str], labels: Sequence[int] | None, slides: int | None, seed: int) -> list[int]:
    """Places of the slides that get pages: in the order of a keyed hash of their names, and no score is asked.

    labels: 1 and 0 a slide: both in equal number where there are enough; None for tasks without. slides: None takes all.
    """
    order = sorted(range(len(cases)), key=lambda i: key(seed, f"heatmap/{cases[i]}"))
    if slides is None or labels is None:
        return order[:slides]
    positive, negative = ([i for i in order if labels[i] == label] for label in (1, 0))
    take = min(len(positive), max(-(-slides // 2), slides - len(negative)))
    return positive[:take] + negative[: slides - take]


def write_slide_pages(
    folder: Path, cases: Sequence[Case], about: About, config: EvidenceConfig, threads: int, progress: Callable[[], None]
) -> list[Measured]:
    """Write `<folder>/<slide_id>/` for every case and `<folder>/index.html`; `progress` is called after each.
    threads: tiles read at once.

    A case without a reader, or whose slide cannot be read, gets its raw files (tiles.parquet, heatmap.geojson) and no page;
    damaged parts are left white, and their tiles out of the audit. Raises EvidenceError for an id that leaves the folder.
    """
    limit = common_limit([case.attention for case in cases]) if cases else 0.0
    measured = []
    for case in cases:
        home = folder / case.slide_id
        if home.resolve().parent != folder.resolve():
            raise EvidenceError(f"the slide id {case.slide_id!r} leaves the folder {folder}: rename it in the manifest")
        home.mkdir(parents=True, exist_ok=True)
        try:
            measured.append(_write_case(home, case, about, config, limit, threads))
        except (DecodeError, StorageError) as error:
            raw = _write_case(home, replace(case, reader=None), about, config, limit, threads)
            measured.append(replace(raw, unread=scrub(f"its slide cannot be read: {error}")))
        progress()
    if any(each.picture for each in measured):
        write_index(folder / "index.html", about, [each for each in measured if each.picture])
    return measured


def _write_case(home: Path, case: Case, about: About, config: EvidenceConfig, limit: float, threads: int) -> Measured:
    shown = {"attention": attention_shown(case.attention, config.display, limit)}
    shown |= {name: signed_shown(case.values[name], _words(name, case)) for name in case.values if name != "attention"}
    covered = {}
    overlap = None
    if case.annotations is not None:
        overlap, shares = measure_overlap(case)
        covered = {"annotated": shares}
    write_tiles(home / "tiles.parquet", case.coords, case.size_px, {**case.values, **covered})
    top, numbers = case.top(config.top), {**case.values, **covered}
    write_geojson(home / "heatmap.geojson", case.coords, case.size_px, numbers, shown["attention"], top)
    curves = measure_deletion(case, config)
    gains = {name: curves.gain(name) for name in curves.curves}
    above = {name: curves.share_of_draws(name) for name in curves.curves}
    facts = (case.slide_id, case.patient, len(case.coords), case.finding)
    if case.reader is None:
        return Measured(*facts, None, overlap, gains, above, "", "")

    plan = whole_slide(case.reader, case.mpp, config.pyramid_px)
    picture = read_picture(case.reader, plan)
    artefacts, kinds = measure_artefacts(case, white_point(picture), config, threads)
    place, main, opacity = (case.coords, case.size_px), shown["attention"], config.opacity
    write_overlay(home / "attention.ome.tif", *place, main, picture, plan, opacity, config.quality)
    write_values(home / "values.ome.tif", *place, case.values, plan)
    small = _fitting(plan.canvas, config.picture_px)
    picture = shrink(picture, small)
    fields = {name: paint(*place, each.values, small) for name, each in shown.items()}
    mpp = case.mpp * small.across
    rings = None if case.annotations is None else [r for p in case.annotations.inside for r in p.rings]
    title = f"{case.slide_id} · {' · '.join(case.facts.values())} · {case.finding.output}"
    draw_figure(home / "overlay.png", picture, fields["attention"], main, small.across, mpp, rings, title, opacity)
    measured = Measured(*facts, artefacts, overlap, gains, above, f"{case.slide_id}/overlay.png", "")
    most, least = extremes(case, config)
    patches = (_patches(case, most, small, config, kinds), _patches(case, least, small, config, kinds))
    thumb = _fitting(small, _THUMB_PX)
    seen = blend(shrink(picture, thumb), paint(*place, main.values, thumb), main, opacity)
    Image.fromarray(seen).save(home / "thumb.jpg", quality=config.quality)
    layers = [layer(name, each, fields[name]) for name, each in shown.items()]
    write_slide_page(
        home / "page.html", case, about, measured, picture, small, layers, patches, curves, opacity, config.top, _FILES
    )
    return measured


def _words(name: str, case: Case) -> str:
    words = {
        "contribution": f"contribution to the logit of {case.explained}; all tiles sum to it",
        "occlusion": f"how far the logit of {case.explained} drops when the tile is left out",
    }
    return words[name]


def _fitting(canvas: Canvas, longest_px: int) -> Canvas:
    """The canvas, or the same extent in fewer pixels."""
    times = max(1.0, max(canvas.width, canvas.height) / longest_px)
    width, height = (max(1, round(side / times)) for side in (canvas.width, canvas.height))
    return Canvas(width, height, canvas.across * canvas.width / width, canvas.down * canvas.height / height)


def _patches(
    case: Case,
    rows: np.ndarray,
    canvas: Canvas,
    config: EvidenceConfig,
    kinds: dict[int, list[str]],
) -> list[Patch]:
    """The tiles of `rows`, read from the slide at about `patch_px`."""
    assert case.reader is not None
    wanted = case.mpp * max(1.0, case.size_px / config.patch_px)
    scale = choose_scale(level_mpps(case.reader.layout.levels, case.mpp), wanted, 0.1, 1.0)
    assert scale is not None  # never finer than level 0
    downsample, side = case.reader.layout.levels[scale.level].downsample, max(1, round(case.size_px * case.mpp / scale.mpp))
    found = []
    for number, row in enumerate(rows.tolist(), 1):
        x, y = case.coords[row].tolist()
        pixels = read_scaled(case.reader, scale, round(x / downsample), round(y / downsample), side, side, damage=[])
        words = f"attention {case.attention[row] * len(case.attention):.2f}×, contribution {case.contribution[row]:+.3g}"
        square = (x / canvas.across, y / canvas.down, case.size_px / canvas.across)
        found.append(Patch(number, jpeg(pixels, config.quality), words, kinds[row], square))
    return found
