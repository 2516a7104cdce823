"""What the demo tells, on the terminal and on its page: reads what each stage left in its folder and says it in order."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from histoscale.data.jsonfiles import JsonError, read_rows
from histoscale.eval.drawings import Line, Mark, interval_plot, steps_plot
from histoscale.eval.page import Cell, Chapter, Drawing, Folded, Grid, Part, Picture, Prose, inline, write_page
from histoscale.eval.proof import Measured
from histoscale.launch.footprint import Stage

OURS = "this encoder"
OTHERS = {"random": "untrained encoder", "colour": "colour alone"}
PLACES = {"report": "patients never seen", "external": "a hospital never seen"}


@dataclass(frozen=True)
class Told:
    """One score of the linear probe. who, where: in words. minus: the encoder less this floor, None for its own."""

    who: str
    where: str
    score: Mapping[str, Any]
    minus: Mapping[str, Any] | None


def worth(probe: Mapping[str, Any], kind: str, role: str) -> dict[str, Any]:
    """Encoder -> metric -> score, of one probe (`linear`, `knn`) on one part (`report`, `external`) of the only set."""
    (scores,) = probe["scores"].values()
    return scores["honest"][kind][role]


def told(probe: Mapping[str, Any]) -> list[Told]:
    """The encoder and its floors on either part."""
    found = []
    for role, where in PLACES.items():
        scores = worth(probe, "linear", role)
        above = scores[probe["label"]]["minus"]
        found.append(Told(OURS, where, scores[probe["label"]]["balanced_accuracy"], None))
        found += [
            Told(words, where, scores[name]["balanced_accuracy"], above[name]["balanced_accuracy"])
            for name, words in OTHERS.items()
        ]
    return found


def number(score: Mapping[str, Any] | None, sign: str = "") -> str:
    """`0.812 [0.774, 0.850]`, `0.812 [withheld]` or `–`."""
    if score is None or score.get("value") is None:
        return "–"
    value = f"{score['value']:{sign}.3f}"
    if score.get("low") is None or score.get("high") is None:
        return f"{value} [withheld]"
    return f"{value} [{score['low']:{sign}.3f}, {score['high']:{sign}.3f}]"


def difference_words(minus: Mapping[str, Any]) -> str:
    """The encoder less a floor, and whether that may be chance."""
    low, high = minus.get("low"), minus.get("high")
    unclear = low is not None and high is not None and low <= 0 <= high
    return f"{number(minus, '+')}{', which may be chance' if unclear else ''}"


def chance_words(area: Mapping[str, Any]) -> str:
    """Whether an area under ROC leaves guessing behind, in a sentence."""
    low, high = area.get("low"), area.get("high")
    if low is None or high is None:
        return "Without an interval nothing shows that it is better than guessing."
    if low > 0.5:
        return "It is better than guessing."
    if high < 0.5:
        return "It is worse than guessing."
    return "Its interval holds 0.5: so few small slides do not show that it is better than guessing."


def closing_words(results: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """What was measured, for the terminal."""
    probe, mil, trained = results["probe"]["probe"], results["mil"]["mil"], results["pretrain"]["pretrain"]
    scores, classes = told(probe), probe["classes"]
    wide = max(len(one.who) for one in scores)
    lines = [
        f"The encoder saw {trained['patches']:,} patches of {trained['data']['slides']} slides, without labels. Afterwards:",
        "",
        f"Can it tell {len(classes)} tissue classes apart ({', '.join(classes)})?",
        f"Balanced accuracy with its 95 % interval; guessing gives {1 / len(classes):.2f}.",
    ]
    for where in PLACES.values():
        lines.append(f"  {where}")
        lines += [
            f"    {one.who:<{wide}}  {number(one.score)}"
            + (f"   encoder less floor {difference_words(one.minus)}" if one.minus else "")
            for one in scores
            if one.where == where
        ]
    oracle = next((one for one in measured if one.name == "oracle on nuclei, internal"), None)
    if oracle is not None:
        lines.append(f"  There is more to learn: the true shapes of the nuclei give {oracle.value:.3f} on patients never seen.")
    area = mil["external"]["auc"]
    lines += [
        "",
        "Can a slide model on top of it find slides with tumour at a hospital that nobody trained on?",
        f"  area under ROC  {number(area)}; guessing gives 0.5. {chance_words(area)}",
        "",
        "The tissue is synthetic: these figures show that the road works, not that an encoder is good on patients.",
    ]
    return "\n".join(lines)


def write_demo_report(
    out: Path,
    results: Mapping[str, Any],
    measured: Sequence[Measured],
    sheet: tuple[np.ndarray, str],
    stages: Sequence[Stage],
    following: str,
) -> None:
    """Write `out`/report.html.

    results: each stage's summary. sheet: the contact sheet, uint8 [H, W, 3], and its words. following: what to type next.
    """
    probe, mil, trained = results["probe"]["probe"], results["mil"]["mil"], results["pretrain"]["pretrain"]
    cohort = results["cohort"]["cohort"]
    rows = _metrics(out / "pretrain" / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    own = {one.who: one.score for one in told(probe) if one.where == PLACES["report"]}
    guess = 1 / len(probe["classes"])
    facts = {
        f"this encoder: balanced accuracy over tissue classes, patients never seen (guessing: {guess:.2f})": number(own[OURS]),
        "an untrained encoder of the same shape": number(own[OTHERS["random"]]),
        "colour alone": number(own[OTHERS["colour"]]),
        "slide model: area under ROC at a hospital never seen (guessing: 0.50)": number(mil["external"]["auc"]),
    }
    minutes = sum(stage.seconds for stage in stages) / 60
    lead = (
        f"{cohort['slides']} synthetic slides of {cohort['patients']} patients were drawn. An encoder learned from "
        f"{trained['patches']:,} patches of {trained['data']['slides']} of them, without labels. It was then asked to tell "
        "tissue classes apart on patients that it never saw, beside an untrained encoder and plain colour; a slide model on top "
        f"of it looked for tumour at a hospital that nobody trained on. All of it took {minutes:.1f} minutes on this machine."
    )
    chapters = [
        Chapter("What the encoder is worth", list(_worth(probe))),
        Chapter("The slide model", list(_slides(mil))),
        Chapter("Where it looked", list(_heatmaps(out, mil))),
        Chapter("What it learned from", list(_streamed(out, trained))),
        Chapter("How it learned", list(_learned(steps))),
        Chapter("The tissue, and its shortcuts", list(_cohort(measured, sheet))),
        Chapter("What it cost", list(_cost(steps, stages))),
        Chapter("What this cannot say", [Prose("\n\n".join(_limits(mil, probe)))]),
        Chapter("Go on", list(_further(out, following))),
    ]
    write_page(out / "report.html", "Histoscale: from slides to scores", lead, facts, chapters)


def _metrics(path: Path) -> list[dict[str, Any]]:
    try:
        return read_rows(path)
    except JsonError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the line, or run the demo again with another out=") from None


def _worth(probe: Mapping[str, Any]) -> Iterator[Part]:
    marks = []
    for one in told(probe):
        value, low, high = (one.score.get(name) for name in ("value", "low", "high"))
        look = "floor" if one.minus else "ours" if one.where == PLACES["report"] else "outside"
        place = "" if one.where == PLACES["report"] else ", external"
        marks.append(Mark(f"{one.who}{place}", float(value or 0.0), low, high, look, number(one.score)))
    chance = 1 / len(probe["classes"])
    caption = "Linear probe, 95 % intervals over patients. Squares: floors. External: a hospital never seen."
    yield Drawing(interval_plot(marks, "balanced accuracy", chance), caption)
    yield Prose(
        "A linear classifier on frozen embeddings, fitted on the training patients, read once on the others. The classes have "
        "the same colours by construction, so colour alone should know little. An encoder is worth what it adds to an untrained "
        "one of the same architecture (the mean of five) and to colour."
    )
    rows: list[Sequence[Cell | str]] = []
    for kind, words in (("linear", "linear"), ("knn", "nearest neighbours")):
        for role, where in PLACES.items():
            found = worth(probe, kind, role)
            above = found[probe["label"]]["minus"]
            for name, who in {probe["label"]: OURS, **OTHERS}.items():
                minus = above[name]["balanced_accuracy"] if name in above else None
                score = found[name]["balanced_accuracy"]
                first = Cell(who, look="strong" if minus is None else "indent")
                rows.append([first, words, where, number(score), difference_words(minus) if minus else ""])
    head = ("encoder", "probe", "reported on", "balanced accuracy [95 %]", "encoder less floor")
    note = (
        f"Classes: {', '.join(probe['classes'])}. Everything that was chosen was chosen inside the training patients; a floor "
        "may choose its better form on the reported patients, which favours the floor."
    )
    yield Folded("All figures", [Grid(head, rows, 3, note)])


def _slides(mil: Mapping[str, Any]) -> Iterator[Part]:
    yield Prose(
        "Does the slide hold a tumour focus? Gated attention over the tiles of a slide, trained on the training hospitals. "
        f"{chance_words(mil['external']['auc'])}"
    )
    parts = [("patients never seen", mil["internal"]), ("a hospital never seen", mil["external"])]
    parts += [(f"hospital {name}", part) for name, part in mil["sites"].items()]
    rows = [
        (name, str(part["slides"]), str(part["patients"]), str(part["positives"]), number(part["auc"]))
        for name, part in parts
        if part is not None
    ]
    yield Grid(("reported on", "slides", "patients", "with tumour", "area under ROC [95 %]"), rows, 1, "")
    floors = [
        (floor.replace("_", " "), *[number((part["floors"] if part else {}).get(floor)) for _, part in parts[:2]])
        for floor in (mil["external"] or mil["internal"])["floors"]
    ]
    yield Grid(("floor", *(name for name, _ in parts[:2])), floors, 1, "What it must beat to have seen tissue: areas under ROC.")
    yield Grid(("thresholds, errors, calibration",), [(Cell("the slide model's own report", link="mil/report.html"),)], 1, "")


def _heatmaps(out: Path, mil: Mapping[str, Any]) -> Iterator[Part]:
    yield Prose(
        "Attention over the slide beside the truth. The slides were drawn by key among test and external slides, half of them "
        "with tumour, never by score. Attention says where the model looked, not why it decided."
    )
    rows = [
        (part, str(found["slides"]), f"{found['hits']:.0%}", f"{found['chance']:.1%}", number(found["gain"], "+"))
        for part, found in mil["pointing"].items()
    ]
    yield Grid(("part", "slides with tumour", "top tile meets a focus", "a random tile does", "gain [95 %]"), rows, 1, "")
    for name in mil["heatmaps"]:
        yield Picture(inline((out / "mil" / name).read_bytes(), "png"), f"Attention of {name}", "")


def _streamed(out: Path, trained: Mapping[str, Any]) -> Iterator[Part]:
    yield Prose(
        f"{trained['patches']:,} patches in {trained['steps']} steps, from {trained['data']['slides']} slides of "
        f"{trained['data']['patients']} patients. There are no tile files: patches are read from the slides while the model "
        "trains. Which region, slide and magnification is a pure function of the seed, so the same run reads the same pixels on "
        "any number of processes."
    )
    caption = "The first batch as it reached the model, before crops, flips and stain jitter."
    yield Picture(inline((out / "pretrain" / "patches.png").read_bytes(), "png"), caption, caption)
    rows = [
        (f"{row['mpp']:g}", row["site"], row["scanner"], row["organ"], f"{row['patches']:,}", f"{row['share']:.1%}")
        for row in trained["streamed"]
    ]
    head = ("target µm/px", "hospital", "scanner", "organ", "patches", "share")
    yield Folded("What really reached the model", [Grid(head, rows, 4, "Counted as it was served.")])


def _learned(steps: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    yield Prose(
        "A student learns to give the teacher's answer from smaller and masked views; the teacher is its moving average. At the "
        "dotted line, cross-entropy = ln K, every patch gets the same answer and nothing is learned."
    )

    def line(key: str, label: str, look: str) -> Iterator[Line]:
        points = np.array([(row["step"], row[key]) for row in steps if row.get(key) is not None], float).reshape(-1, 2)
        if len(points):
            yield Line(label, points, points[:0], look)

    tokens = (("dino", "class token", "ours"), ("ibot", "masked patches", "outside"))
    loss = [one for name, label, look in tokens for one in line(f"{name}/ce_of_lnk", label, look)]
    if loss:
        yield Drawing(steps_plot(loss, "cross-entropy / ln K", 1.0), "The loss over the steps; it says little by itself.")
    more: list[Part] = []
    read_outs = (("target_entropy_of_lnk", "target entropy / ln K", 1.0), ("prototypes_used", "prototypes used", None))
    for key, title, level in read_outs:
        found = [one for name, label, look in tokens for one in line(f"{name}/{key}", label, look)]
        if found:
            more.append(Drawing(steps_plot(found, title, level), ""))
    rank = list(line("rankme_cov", "teacher's class token", "ours"))
    if rank:
        more.append(Drawing(steps_plot(rank, "centred RankMe", None), ""))
    words = "Targets that are uniform (entropy near 1) or one-hot (near 0), few prototypes in use, a falling rank."
    yield Folded("Signs of collapse, which are watched", [Prose(words), *more])


ASKED = {
    "colour floor": "tissue class from colour",
    "oracle on nuclei": "tissue class from the nuclei as they were drawn",
    "supervised ceiling": "tissue class by a network that was given the labels",
    "site from colour": "hospital from colour",
    "site from oracle": "hospital from the nuclei as they were drawn",
    "leak of a tile split, colour kNN": "what a split by tiles, not patients, would flatter",
    "tissue mask against truth, median IoU": "overlap of the tissue mask with the true one",
}
WHERE = {"internal": "patients never seen", "external": "a hospital never seen"}


def _cohort(measured: Sequence[Measured], sheet: tuple[np.ndarray, str]) -> Iterator[Part]:
    pixels, caption = sheet
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=90)
    yield Picture(inline(buffer.getvalue(), "jpeg"), caption, caption)
    yield Prose(
        "Everything that a histogram sees was drawn independently of the class; everything that a pathologist sees was not. Each "
        "hospital has its own stain and scanner, as real ones do: colour tells the hospital and hardly the class."
    )
    rows = []
    for one in measured:
        name, _, part = one.name.partition(", ")
        asked = ASKED.get(one.name) or ASKED.get(name) or name
        where = WHERE.get(part, "")
        rows.append((asked, where, str(one), f"{one.guess:.2f}"))
    note = "Balanced accuracies, and areas under ROC of slide labels."
    yield Grid(("what is known", "reported on", "found [95 %]", "guessing"), rows, 2, note)


def _cost(steps: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> Iterator[Part]:
    rows = [(stage.name, f"{stage.seconds:.0f} s", f"{stage.peak_bytes / 2**30:.2f} GiB") for stage in stages]
    rate = np.median([row["images_per_s"] for row in steps])
    wait = np.median([row["data/wait_fraction"] for row in steps])
    note = f"Training saw a median of {rate:.0f} patches a second and waited for data {wait:.1%} of the time."
    yield Grid(("stage", "wall time", "memory (peak PSS)"), rows, 1, note)


def _limits(mil: Mapping[str, Any], probe: Mapping[str, Any]) -> list[str]:
    said = ["The tissue is synthetic: a score here says that the road works, not that an encoder is good on patients."]
    return [*said, *mil["cannot_say"], *(f"Probe: {note}." for note in probe["remarks"])]


def _further(out: Path, following: str) -> Iterator[Part]:
    kept = {
        "catalog/catalog.html": "every slide with the outline of its tissue",
        "pretrain/views.png": "what training does to a patch",
        "probe/report.html": "confusions and nearest neighbours of the encoder",
        "release/README.md": "the model card; the folder beside it opens in timm",
        "mil/report.html": "the slide model: thresholds, errors, leakage, calibration",
        "mil/slides/index.html": "a page a slide for a second reader",
        "log.txt": "everything that the stages said: tables, warnings, limits",
    }
    rows = [(Cell(name, link=name), words) for name, words in kept.items() if (out / name).exists()]
    yield Grid(("file", "what it shows"), rows, 2, "Every stage is a command; the terminal printed each as it is typed.")
    yield Prose(f"Your own slides: write a CSV with the columns slide_id and uri, and type\n\n{following}")
