"""The page of a robustness run: who is nearest, what a confounded set costs, how far changed pictures move, registered tiles."""

from collections.abc import Sequence
from pathlib import Path

from histoscale.eval.drawings import Levels, Mark, interval_plot, levels_plot
from histoscale.eval.page import Cell, Chapter, Drawing, Grid, Heading, Notes, Part, Prose, write_page
from histoscale.eval.robustness.curves import CLEAN, CURVES
from histoscale.eval.robustness.findings import Finding, measure_words, number
from histoscale.eval.robustness.perturb import KINDS, WORDS
from histoscale.eval.table import ROLE_WORDS

STRUCTURE = {
    "robustness_index": "Of the nearest patches of other slides that share either the class or the site, the share with the "
    "same class: 1 only biology, 0 only the site, and chance where neighbours are drawn blindly.",
    "margin_median": "How much nearer the same class elsewhere is than another class at the same site, −1 to 1.",
    "margin_tail": "The same, meaned over the worst patches: a good median can hide a brittle tail.",
    "clustering_score": "Adjusted Rand index of clusters with the class, less that with the site, −1 to 1.",
    "drop_inside": "What a classifier loses, as a share of its balanced accuracy, on sites it learnt from, when training sets "
    "tie classes to sites.",
    "drop_external": "The same on sites that no training set has.",
}
HOW = (
    "Brackets are intervals over patients, or over what stands in their place; neighbours, clusters, training sets and probes "
    "stay as they are while patients are drawn.",
    "Floors: random is the same architecture untrained, colour is 42 numbers a picture. A floor with a good index has little to "
    "say of biology either: read it beside its balanced accuracy.",
    "Normalisation fits every slide on its own patches. Perturbed patches are normalised after that, as in a pipeline.",
    "None of this says how a model does on patients of a hospital that is not here.",
)


def write_robustness_report(
    path: Path, title: str, encoder: str, found: Sequence[Finding], remarks: Sequence[str], level: float
) -> None:
    """encoder: its name among the findings. level: of the intervals."""
    notes: dict[str, int] = {}
    chapters = [
        chapter
        for chapter in (_structure(found, notes), *_curves(encoder, found, notes), _registered(found, notes))
        if chapter is not None
    ]
    chapters.append(Chapter("How to read this page", [Notes(notes), Prose("\n\n".join([*remarks, *HOW]))]))
    own = {one.measure: one for one in found if one.encoder == encoder and one.normalise == "none" and not one.condition}
    facts = {measure_words(name): number(one) for name, one in own.items()}
    lead = f"How much of what {encoder} says is biology, how much the hospital, the stain, the scanner. {level:.0%} intervals."
    write_page(path, title, lead, facts, chapters)


def _cell(one: Finding | None, notes: dict[str, int], look: str = "") -> Cell:
    return Cell(number(one), [notes.setdefault(note, len(notes) + 1) for note in one.notes] if one is not None else [], look)


def _look(one: Finding) -> str:
    return "quiet" if one.floor else "strong"


def _structure(found: Sequence[Finding], notes: dict[str, int]) -> Chapter | None:
    parts: list[Part] = []
    for measure, words in STRUCTURE.items():
        here = [one for one in found if one.measure == measure]
        if not here:
            continue
        rows: list[list[Cell | str]] = [
            [Cell(one.label, look=_look(one)), one.normalise, _cell(one, notes, _look(one)), _facts(one)] for one in here
        ]
        parts += [
            Heading(measure_words(measure), words),
            Grid(["encoder", "normalised", measure_words(measure), ""], rows, 2, ""),
        ]
        marks = [_mark(one) for one in here if one.interval.value == one.interval.value]
        if marks:
            chance = here[0].about.get("chance")
            parts.append(Drawing(interval_plot(marks, measure_words(measure), chance), "Discs: the encoder. Squares: floors."))
        parts += _splits(here) if measure.startswith("drop") else []
    return Chapter("Biology against the site", parts) if parts else None


def _mark(one: Finding) -> Mark:
    label = one.encoder + ("" if one.normalise == "none" else f", {one.normalise}")
    return Mark(label, one.interval.value, one.interval.low, one.interval.high, "floor" if one.floor else "ours", number(one))


def _facts(one: Finding) -> Cell:
    about = one.about
    words = ""
    if one.measure == "robustness_index":
        words = f"k {', '.join(map(str, dict.fromkeys(about['k'])))}; {about['support']:.0%} of the patches have such neighbours"
    elif one.measure == "clustering_score":
        words = (
            f"class {about['ari_biology']:.2f}, site {about['ari_site']:.2f}; {about['combinations']} pairs of classes and sites"
        )
    elif one.measure.startswith("drop"):
        words = f"{about['slides_a_cell']} slides of a class at a site, {about['patches_a_slide']} patches each"
    return Cell(words, look="quiet small")


def _splits(found: Sequence[Finding]) -> list[Part]:
    """Balanced accuracy over training sets from balanced to confounded."""
    lines = [
        Levels(_mark(one).label, one.about["balanced_accuracy_by_split"], [None] * len(one.about["balanced_accuracy_by_split"]),
               "floor" if one.floor else "ours")
        for one in found
    ]  # fmt: skip
    names = [str(split) for split in range(max(len(line.points) for line in lines))]
    if any(len(line.points) != len(names) for line in lines):
        return []
    drawing = levels_plot(names, lines, "balanced accuracy", "training sets, from balanced (0) to confounded", None)
    return [Drawing(drawing, "Means over resamplings of patients.")]


def _curves(encoder: str, found: Sequence[Finding], notes: dict[str, int]) -> list[Chapter]:
    """A chapter a role: the table of the encoder by normalisation, and drawings by kind of change."""
    cells = {(one.measure, one.encoder, one.normalise, one.condition, one.minus): one for one in found if one.measure in CURVES}
    roles = dict.fromkeys(condition.split(", ")[0] for _, _, _, condition, _ in cells)
    methods = list(dict.fromkeys(method for _, _, method, _, _ in cells))
    encoders = list(dict.fromkeys(name for _, name, _, _, _ in cells))
    chapters = []
    for role in roles:
        conditions = list(dict.fromkeys(key[3].removeprefix(f"{role}, ") for key in cells if key[3].startswith(f"{role}, ")))
        parts: list[Part] = []
        for measure, minus, title in (
            ("balanced_accuracy", "", "balanced accuracy of the linear probe"),
            ("balanced_accuracy", CLEAN, "its difference to clean patches, paired"),
            ("cosine_to_clean", "", "cosine to the clean embedding"),
        ):
            rows: list[list[Cell | str]] = []
            for condition in conditions:
                got = [cells.get((measure, encoder, method, f"{role}, {condition}", minus)) for method in methods]
                if any(got):
                    rows.append([condition, *(_cell(one, notes) for one in got)])
            parts += [Heading(f"{encoder}: {title}", "by stain normalisation"), Grid(["patches", *methods], rows, 1, "")]
        for kind in KINDS:
            levels = [c for c in conditions if c.startswith(f"{kind} ")]
            if levels:
                parts.append(_curve(kind, levels, role, encoders, encoder, methods, cells))
        chapters.append(Chapter(f"Changed pictures: {ROLE_WORDS.get(role, role)}", parts))
    return chapters


def _curve(
    kind: str,
    levels: Sequence[str],
    role: str,
    encoders: Sequence[str],
    own: str,
    methods: Sequence[str],
    cells: dict[tuple[str, str, str, str, str], Finding],
) -> Drawing:
    """The encoder under every normalisation, floors without one."""
    numbers = [float(level.removeprefix(f"{kind} ")) for level in levels]
    rising = sorted(zip(numbers, levels, strict=True), reverse=kind == "jpeg")
    split = sum(value < 0 for value, _ in rising)  # clean stands where the change is none
    order = [*(level for _, level in rising[:split]), CLEAN, *(level for _, level in rising[split:])]
    lines = []
    for name in encoders:
        for method in methods if name == own else methods[:1]:
            got = [cells.get(("balanced_accuracy", name, method, f"{role}, {level}", "")) for level in order]
            points = [None if one is None else one.interval.value for one in got]
            ends = [None if one is None or one.interval.low is None or one.interval.high is None
                    else (one.interval.low, one.interval.high) for one in got]  # fmt: skip
            if any(point is not None for point in points):
                look = "ours" if name == own else "floor"
                lines.append(
                    Levels(
                        name if method == "none" else f"{name}, {method}",
                        points,
                        ends if look == "ours" else [None] * len(ends),
                        look,
                    )
                )
    names = [level.removeprefix(f"{kind} ") for level in order]
    return Drawing(levels_plot(names, lines, "balanced accuracy", WORDS[kind], None), "Bars: intervals of the encoder.")


def _registered(found: Sequence[Finding], notes: dict[str, int]) -> Chapter | None:
    here = [one for one in found if one.measure in ("cosine", "leaderboard") or one.measure.startswith("top-")]
    if not here:
        return None
    columns = list(dict.fromkeys((one.measure, one.condition) for one in here))
    rows: list[list[Cell | str]] = []
    for name, method in dict.fromkeys((one.encoder, one.normalise) for one in here):
        mine = {(one.measure, one.condition): one for one in here if (one.encoder, one.normalise) == (name, method)}
        first = next(iter(mine.values()))
        rows.append(
            [Cell(first.label, look=_look(first)), method, *(_cell(mine.get(column), notes, _look(first)) for column in columns)]
        )
    head = ["encoder", "normalised", *(", ".join(filter(None, (measure_words(m), c))) for m, c in columns)]
    pairs = {one.condition: one.about["slide_pairs"] for one in here if one.measure == "cosine"}
    note = (
        "Medians over pairs of slides: "
        + ", ".join(f"{name} {pairs}" for name, pairs in pairs.items())
        + ". Top-k: the share of tiles "
    )
    note += "whose counterpart is among the k nearest of both slides. scanner, stain, both: what differs."
    return Chapter("The same tissue again", [Grid(head, rows, 2, note)])
