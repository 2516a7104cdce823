"""The page of a patch-level run: scores beside floors and published ones, classes, confusions, neighbours, how to read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histoscale.eval.datasets.patches import LabelledPatches
from histoscale.eval.drawings import Curve, Mark, genes_plot, interval_plot, reliability_plot, shots_plot
from histoscale.eval.gallery import GalleryConfig, Pictures, neighbour_gallery, tinted, worst_confusions
from histoscale.eval.page import (
    Cell,
    Chapter,
    Drawing,
    Folded,
    Gallery,
    Grid,
    Heading,
    Legend,
    Matrix,
    Notes,
    Part,
    Prose,
    Strip,
    Tile,
    write_page,
)
from histoscale.eval.published import PROTOCOLS
from histoscale.eval.results import Outcome, Score
from histoscale.eval.scores.calibration import brier, reliability
from histoscale.eval.scores.classification import confusion
from histoscale.eval.table import (
    FLOORS,
    Block,
    Footnotes,
    Line,
    TableConfig,
    blocks,
    general_notes,
    is_few_shot,
    metric_words,
    number,
    probe_words,
    published_columns,
    published_words,
)

TABLE_ONLY = ("knn", "prototype")  # beside a linear probe their numbers are enough
# Okabe and Ito's colours, which the common kinds of colour blindness tell apart; black and yellow are lost on tissue.
MASK_COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0))


@dataclass(frozen=True)
class ReportConfig:
    """bins: of the reliability diagram. masks: segmented images shown a set. table, gallery: see there."""

    bins: int
    masks: int
    table: TableConfig
    gallery: GalleryConfig


@dataclass(frozen=True)
class SetResults:
    """One labelled set: outcomes by resolution policy; features [n, D] by encoder, for neighbours; may be empty."""

    patches: LabelledPatches
    outcomes: Mapping[str, Sequence[Outcome]]
    features: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Segmented:
    """image: uint8 [h, w, 3]. truth, predicted: int [h, w] into the classes, 0 = background. words: its scores."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    words: str


@dataclass(frozen=True)
class Segmentation:
    """classes: background first. ignored: the label that no score counts, or None. images: in the order that is shown."""

    dataset: str
    encoder: str
    classes: tuple[str, ...]
    ignored: int | None
    images: Sequence[Segmented]


@dataclass(frozen=True)
class Genes:
    """pearson: [G], of the encoder. floor: [G] of the best floor, or None. floor_name: which it is, "" for none."""

    dataset: str
    encoder: str
    genes: tuple[str, ...]
    pearson: np.ndarray
    floor: np.ndarray | None
    floor_name: str


def write_patch_report(
    path: Path,
    title: str,
    scores: Sequence[Score],
    level: float,
    config: ReportConfig,
    sets: Sequence[SetResults],
    segmentations: Sequence[Segmentation],
    genes: Sequence[Genes],
    remarks: Sequence[str],
) -> None:
    """Write the page. remarks: what else the reader must know of the run (leakage, overlap with pretraining, chosen penalties).

    Pictures of all sets share `config.gallery.budget_mb`. Raises ValueError when two scores claim one place.
    """
    found, notes, pictures = blocks(scores, config.table.published), Footnotes(), Pictures(config.gallery)
    few = [block for block in found if is_few_shot(block.probe)]
    chapters = [score_chapter([block for block in found if block not in few], notes, sets)]
    chapters += few_shot_chapter(scores, few, notes, sets)
    for results in sets:
        chapters += _set_chapters(results, config, pictures)
    chapters += [_segmentation_chapter(one, config, pictures) for one in segmentations]
    chapters += [_genes_chapter(one) for one in genes]
    words = list(remarks) + general_notes(found, level) + _licence(sets, pictures)
    protocols = dict.fromkeys(row.protocol for block in found for row in block.published)
    words += [f"{protocol}: {PROTOCOLS[protocol]}." for protocol in protocols if protocol in PROTOCOLS]
    chapters.append(Chapter("How to read this page", [Prose("\n\n".join(words))]))
    write_page(path, title, _lead(found, sets), _facts(found), chapters)


def _subjects(block: Block) -> list[Line]:
    """The lines that the page is about: of encoders, or of a floor that was asked for alone."""
    own = [line for line in block.lines if not line.minus]
    return [line for line in own if not line.floor] or own


def _lead(found: Sequence[Block], sets: Sequence[SetResults]) -> str:
    encoders = dict.fromkeys(line.encoder for block in found for line in _subjects(block))
    datasets = dict.fromkeys(block.dataset for block in found)
    whole = [results.patches.name for results in sets if results.patches.usage.choose == "outer"]
    fitted = "Probes were fitted on the training part alone"
    if whole:
        which = "The set has" if len(datasets) == 1 else f"{', '.join(whole)} have"
        fitted = f"{which} no training part: every image was scored by a probe that was fitted on folds without it"
    return (
        f"Frozen features of {', '.join(encoders)} on {', '.join(datasets)}. {fitted}; every score stands beside its floors, "
        "with an interval that respects patients."
    )


def _facts(found: Sequence[Block]) -> dict[str, str]:
    """The first encoder's first metric, and by how much it is above the floors."""
    block = next((block for block in found if _subjects(block)), None)
    if block is None:
        return {}
    line = _subjects(block)[0]
    metric = next(iter(line.cells))
    facts = {f"{metric_words(metric)} on {block.dataset}, protocol {block.protocol}": number(line.cells[metric])}
    above = {"random": "above the same architecture untrained", "colour": "above colour alone"}
    for floor, words in above.items():
        gap = next((d for d in block.lines if d.minus == floor and d.encoder == line.encoder and metric in d.cells), None)
        if gap is not None:
            facts[f"{words} (paired)"] = number(gap.cells[metric])
    mpp, _, field = line.seen.partition(", field ")
    facts["what the encoder sees" + (f", a field of {field}" if field else "")] = mpp
    facts["scored on"] = block.size.split(";")[0]
    return facts


def score_chapter(found: Sequence[Block], notes: Footnotes, sets: Sequence[SetResults]) -> Chapter:
    """Per block the table of every score and, for its first metric, the intervals beside floors and published scores."""
    classes = {results.patches.name: len(results.patches.classes) for results in sets}
    parts: list[Part] = []
    for block in found:
        parts += [Heading(f"{block.dataset}: {block.title}", _rests_on(block)), score_grid(block, notes)]
        if block.probe not in TABLE_ONLY:
            parts.append(score_drawing(block, classes.get(block.dataset)))
        parts += _published_grid(block)
    return Chapter("Scores", [*parts, Notes(notes.numbers)])


def _rests_on(block: Block) -> str:
    return " · ".join(filter(None, (block.size, block.seen)))


def score_grid(block: Block, notes: Footnotes) -> Grid:
    rows = []
    for line in block.lines:
        label = f"− {line.minus}" if line.minus else line.encoder
        look = "indent quiet" if line.minus else "quiet" if line.floor else "strong"
        form = "" if line.minus else ", ".join(filter(None, (line.embedding, *_form(line, block))))
        cells = [_cell(line, metric, notes, look) for metric in block.metrics]
        name = Cell(label + (" (floor)" if line.floor else ""), notes.of_line(line), look)
        rows.append([name, Cell(form, look="quiet"), *cells])
    head = ["encoder", "embedding" if block.seen else "embedding, and what it sees", *map(metric_words, block.metrics)]
    return Grid(head, rows, 2, "")


def _form(line: Line, block: Block) -> list[str]:
    runs = max(score.runs for score in line.cells.values())
    words = [] if block.seen else [" ".join(filter(None, (line.resolution, line.seen)))]
    return words + ([f"{runs} runs"] if runs > 1 else [])


def _cell(line: Line, metric: str, notes: Footnotes, look: str) -> Cell:
    if metric not in line.cells:
        return Cell("")
    return Cell(number(line.cells[metric]), notes.of_cell(line, metric), look.replace("indent ", ""))


def score_drawing(block: Block, classes: int | None) -> Drawing:
    """The first metric of a block; chance is drawn where the metric and the number of classes know one."""
    metric = block.metrics[0]
    marks = []
    for line in block.lines:
        score = line.cells.get(metric)
        if score is None or line.minus or np.isnan(score.interval.value):
            continue
        label = f"{line.encoder} {line.embedding}" + ("" if block.seen or not line.resolution else f" {line.resolution}")
        look = "floor" if line.floor else "ours"
        value = number(score).split(" ±")[0]
        marks.append(Mark(label, score.interval.value, score.interval.low, score.interval.high, look, value))
    said = ""
    for name, rows in published_columns(block):
        if name == metric:
            marks += [Mark(row.model, row.value or 0.0, None, None, "published", f"{row.value:.3f} published") for row in rows]
            about = "; ".join([published_words(rows[0]), *rows[0].marks])
            said = f" Hollow diamonds: published, {about}; sources give no intervals."
    chance = _chance(metric, classes)
    caption = f"Discs: these encoders, with their intervals. Squares: floors.{said}"
    return Drawing(interval_plot(marks, metric_words(metric), chance), caption)


def _chance(metric: str, classes: int | None) -> float | None:
    if metric == "auroc":
        return 0.5
    return 1 / classes if metric == "balanced_accuracy" and classes else None


def _published_grid(block: Block) -> list[Part]:
    rows = [
        (row.model + (" (floor)" if row.floor else ""), metric_words(metric), published_words(row),
         f"{row.value:.3f}" + (f" ±{row.sd:.3f}" if row.sd is not None else ""), ", ".join(row.marks), row.source)
        for metric, column in published_columns(block) for row in column
    ]  # fmt: skip
    if not rows:
        return []
    grid = Grid(
        ["published model", "metric", "protocol, embedding, split", "value", "read with", "source"],
        [[row[0], row[1], row[2], Cell(row[3], look="strong"), Cell(row[4], look="quiet"), Cell(row[5], look="quiet small")]
         for row in rows], 3, "Quotations, not re-run here. A protocol that differs from ours moves a score by up to a point.",
    )  # fmt: skip
    return [Folded(f"Published by others, with sources ({len(rows)})", [grid])]


def few_shot_chapter(
    scores: Sequence[Score], found: Sequence[Block], notes: Footnotes, sets: Sequence[SetResults]
) -> list[Chapter]:
    """Curves of the first metric of every kind of few-shot probe, set, protocol and role; below, folded, every number."""
    few = [score for score in scores if is_few_shot(score.probe) and not score.minus]
    parts: list[Part] = []
    for place in dict.fromkeys((score.dataset, score.protocol, score.role, _kind(score)) for score in few):
        inside = [score for score in few if (score.dataset, score.protocol, score.role, _kind(score)) == place]
        metric = inside[0].metric
        classes = next((len(results.patches.classes) for results in sets if results.patches.name == place[0]), None)
        curves = []
        for form in dict.fromkeys((s.encoder, s.embedding if not s.floor else "", s.resolution) for s in inside):
            own = [s for s in inside if s.metric == metric and (s.encoder, "" if s.floor else s.embedding, s.resolution) == form]
            own = sorted((s for s in own if not np.isnan(s.interval.value)), key=_shots)
            if own:
                curves.append(_curve(" ".join(filter(None, form[:2])), own))
        if curves:
            kind = "prototypes" if place[3] == "few_shot_prototype" else "linear probes"
            words = f"{place[0]}, protocol {place[1]}, {kind}: mean over draws of the training images; bars are the intervals."
            parts.append(Drawing(shots_plot(curves, metric_words(metric), _chance(metric, classes)), words))
    tables: list[Part] = []
    for block in found:
        head = Heading(f"{block.dataset}: {block.title}", _rests_on(block))
        tables += [head, score_grid(block, notes), *_published_grid(block)]
    return [Chapter("Few images a class", [*parts, Folded("Every number of these curves", tables)])] if tables else []


def _shots(score: Score) -> int:
    return int(score.probe.rpartition("/")[2])


def _kind(score: Score) -> str:
    return score.probe.rpartition("/")[0]


def _curve(label: str, own: Sequence[Score]) -> Curve:
    ends = [
        None if s.interval.low is None or s.interval.high is None else (s.interval.low, s.interval.high) for s in own
    ]  # fmt: skip
    look = "floor" if own[0].floor else "ours"
    return Curve(label, [_shots(s) for s in own], [s.interval.value for s in own], ends, look)


def _set_chapters(results: SetResults, config: ReportConfig, pictures: Pictures) -> list[Chapter]:
    """Classes, confusions and calibration of every encoder's first probe, then the pictures of the first of them."""
    linear = [
        (resolution, outcome)
        for resolution, outcomes in results.outcomes.items() for outcome in outcomes
        if outcome.probe == "linear" and len(outcome.rows)
    ]  # fmt: skip
    shown = [pair for pair in linear if pair[1].encoder not in FLOORS] or linear  # a floor that was asked for alone
    if not shown:
        return []
    name = results.patches.name
    parts: list[Part] = []
    for place, (resolution, outcome) in enumerate(shown):
        form = ", ".join(filter(None, (outcome.encoder, outcome.embedding, resolution)))
        note = f" ({outcome.note})" if outcome.note else ""
        head = f"{form}: protocol {outcome.protocol}, {probe_words(outcome.probe)}, {outcome.role}{note}"
        inner = _outcome_parts(results.patches, outcome, config)
        parts += [Heading(head, ""), *inner] if place == 0 else [Folded(head, inner)]
    chapters = [Chapter(f"{name}: class by class", parts)]
    outcome = shown[0][1]
    form = f"{outcome.encoder}, {outcome.embedding}, protocol {outcome.protocol}"
    galleries: list[Part] = []
    if outcome.encoder in results.features and config.gallery.per_class:
        neighbours = neighbour_gallery(results.patches, outcome, results.features[outcome.encoder], pictures)
        galleries += [Heading("Nearest neighbours", form), neighbours]
    mistakes = worst_confusions(results.patches, outcome, pictures)
    if mistakes.strips:
        galleries += [Heading("Worst confusions", form), mistakes]
    return [*chapters, *([Chapter(f"{name}: what it looks like", galleries)] if galleries else [])]


def _outcome_parts(patches: LabelledPatches, outcome: Outcome, config: ReportConfig) -> list[Part]:
    labels, classes = patches.labels[outcome.rows], len(patches.classes)
    counts = np.mean([confusion(labels, predicted, classes) for predicted in outcome.predicted], axis=0)
    runs = f", meaned over {len(outcome.logs)} runs" if len(outcome.logs) > 1 else ""
    caption = f"Row: the true class; column: what it was called; shares of the row, counts below{runs}."
    parts: list[Part] = [class_grid(patches, outcome, counts), Matrix(patches.classes, counts, caption)]
    if classes == 2:
        parts += _calibration(patches, outcome, labels, config.bins)
    return parts


def class_grid(patches: LabelledPatches, outcome: Outcome, counts: np.ndarray) -> Grid:
    """Recall, precision, F1 of every class, with the images and patients that they rest on. counts: [K, K], true × called."""
    right, total, called = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    labels, patients = patches.labels[outcome.rows], patches.patients[outcome.rows]
    unit = [] if patches.groups == "none" else [f"{patches.groups}s"]
    rows: list[Sequence[Cell | str]] = []
    for place, name in enumerate(patches.classes):
        f1 = _share(2 * right[place], total[place] + called[place]) if total[place] else None
        cells = [_rate(value) for value in (_share(right[place], total[place]), _share(right[place], called[place]), f1)]
        owners = [] if patches.groups == "none" else [f"{len(set(patients[labels == place].tolist())):,}"]
        rows.append([Cell(name, look="strong"), *cells, f"{total[place]:,.0f}", *owners])
    few = "One class rests on fewer units than the whole, so no interval is given: read it with its counts."
    return Grid(["class", "recall", "precision", "F1", "images", *unit], rows, 1, few)


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _rate(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:.3f}", share=value)


def _calibration(patches: LabelledPatches, outcome: Outcome, labels: np.ndarray, bins: int) -> list[Part]:
    name = patches.usage.positive or patches.classes[1]
    column = patches.classes.index(name)
    probabilities, positive = np.exp(outcome.logs).mean(axis=0)[:, column].clip(0, 1), labels == column
    found = reliability(probabilities, positive, bins)
    words = (
        f"Positive: {name}. ECE {found.expected_calibration_error:.3f} over {bins} bins of equal width, Brier score "
        f"{brier(probabilities, positive):.3f}. A disc's area is its share of the images; bars are Wilson intervals, which "
        "take the images as independent. Never fitted on these rows."
    )
    return [Drawing(reliability_plot(found, name), words)]


def _segmentation_chapter(found: Segmentation, config: ReportConfig, pictures: Pictures) -> Chapter:
    colours = [f"rgb{MASK_COLOURS[i % len(MASK_COLOURS)]}" for i in range(len(found.classes) - 1)]
    named = [
        (colour, name) for place, (colour, name) in enumerate(zip(colours, found.classes[1:], strict=True), 1)
        if place != found.ignored
    ]  # fmt: skip
    ignored = [("rgb(128, 128, 128)", f"{found.classes[found.ignored]} (not scored)")] if found.ignored is not None else []
    strips = []
    for one in found.images[: config.masks]:
        side = 2 * config.gallery.thumb_px
        truth, predicted = (tinted(one.image, mask, MASK_COLOURS, found.ignored) for mask in (one.truth, one.predicted))
        tiles = [
            Tile(pictures.of_map(truth, side), "truth", None),
            Tile(pictures.of_map(predicted, side), f"predicted · {one.words}", None),
        ]
        strips.append(Strip(Tile(pictures.of_map(one.image, side), "image", None), tiles, one.name))
    left = len(found.images) - len(strips)
    note = f"{len(strips)} images" + (f"; {left} more are not shown" if left > 0 else "")
    return Chapter(f"{found.dataset}: masks of {found.encoder}", [Legend([*named, *ignored]), Gallery(strips, note)])


def _genes_chapter(found: Genes) -> Chapter:
    undefined = int(np.isnan(found.pearson).sum())
    words = f"{len(found.genes)} genes, best first. Discs: {found.encoder}."
    words += f" Squares: the floor {found.floor_name}." if found.floor is not None else ""
    words += f" {undefined} undefined." if undefined else ""
    return Chapter(f"{found.dataset}: gene by gene", [Drawing(genes_plot(found.genes, found.pearson, found.floor), words)])


def _licence(sets: Sequence[SetResults], pictures: Pictures) -> list[str]:
    words = ["Pictures are parts of the data set: its licence decides who may see this page."] if sets else []
    if pictures.skipped:
        words.append(f"{pictures.skipped} pictures are left out: all together may weigh {pictures.config.budget_mb:g} MB.")
    return words
