"""The demo's page: reads what each stage left in its folder and tells it in order."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from histoscale.eval.proof import Proof
from histoscale.eval.report import Section, Table, curves_figure, interval_figure, number, picture, picture_file, write_report
from histoscale.launch.footprint import Stage


def write_demo_report(
    out: Path, results: Mapping[str, Any], proof: Proof, sheet: tuple[np.ndarray, str], stages: Sequence[Stage]
) -> None:
    """Write `out`/report.html. results: each stage's summary. sheet: the contact sheet, uint8 [H, W, 3], and its words."""
    probe, mil = results["probe"]["probe"], results["mil"]["mil"]
    rows = [json.loads(line) for line in (out / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    own = worth(probe, "linear", "report")[probe["label"]]
    facts = {
        "balanced accuracy of the encoder, internal test": number(own["balanced_accuracy"]),
        "above the untrained encoder (paired)": number(own["minus"]["random"]["balanced_accuracy"]),
        "above colour alone (paired)": number(own["minus"]["colour"]["balanced_accuracy"]),
        "AUC of the slide model at a hospital it never saw": number(mil["external"]["auc"]),
        "wall time": f"{sum(stage.seconds for stage in stages) / 60:.1f} min",
        "memory (peak PSS)": f"{max(stage.peak_bytes for stage in stages) / 2**30:.1f} GiB",
    }
    lead = (
        "Slides of a synthetic cohort were drawn, streamed as patches, and learned from without labels. The encoder was "
        "released, probed beside its floors on patients it never saw, and carried a slide-level model to a hospital it never saw."
    )
    sections = [
        _streamed(out, results),
        _learned(steps),
        _worth(probe),
        _slides(mil),
        _heatmaps(out, mil),
        _cohort(proof, sheet),
        _cost(steps, stages),
        _limits(mil, probe),
    ]
    write_report(out / "report.html", "Histoscale: from slides to scores", lead, facts, sections)


def worth(probe: Mapping[str, Any], kind: str, role: str) -> dict[str, Any]:
    """Encoder -> metric -> score, of one probe (`linear`, `knn`) on one part (`report`, `external`) of the only set."""
    (scores,) = probe["scores"].values()
    return scores["honest"][kind][role]


def _streamed(out: Path, results: Mapping[str, Any]) -> Section:
    trained = results["pretrain"]["pretrain"]
    mix = trained["streamed"]
    table = Table(
        ("target µm/px", "site", "scanner", "organ", "patches", "share"),
        [
            (f"{row['mpp']:g}", row["site"], row["scanner"], row["organ"], f"{row['patches']:,}", f"{row['share']:.1%}")
            for row in mix
        ],
        "What really reached the model, counted as it was served.",
    )
    text = (
        f"{trained['patches']:,} patches in {trained['steps']} steps, from {trained['data']['slides']} slides of "
        f"{trained['data']['patients']} patients. Each patch of a step comes from another visit: a visit reads one region of one "
        "slide at one magnification and cuts it into disjoint patches. Which region, slide and magnification is a pure function "
        "of the seed, so the same run reads the same pixels on any number of processes."
    )
    caption = "The first batch as it reached the model, before crops, flips and stain jitter."
    return Section("What was streamed", text, [table], [(picture_file(out / "pretrain" / "patches.png", caption), caption)])


def _learned(steps: Sequence[Mapping[str, Any]]) -> Section:
    panels = {
        "cross-entropy / ln K": {"dino/ce_of_lnk": "class token", "ibot/ce_of_lnk": "masked patches"},
        "target entropy / ln K": {
            "dino/target_entropy_of_lnk": "class token",
            "ibot/target_entropy_of_lnk": "masked patches",
        },
        "prototypes used": {"dino/prototypes_used": "class token", "ibot/prototypes_used": "masked patches"},
        "centred RankMe": {"rankme_cov": "teacher's class token"},
    }
    last = steps[-1]
    names = {
        "cross-entropy / ln K, class token": last.get("dino/ce_of_lnk"),
        "target entropy / ln K, class token": last.get("dino/target_entropy_of_lnk"),
        "prototypes used, class token": last.get("dino/prototypes_used"),
        "centred RankMe": last.get("rankme_cov"),
    }
    table = Table(
        ("at the last step", "value"),
        [(name, f"{value:.4g}") for name, value in names.items() if value is not None],
        "",
    )
    text = (
        "A student learns to give the teacher's answer from smaller and masked views; the teacher is its moving average. The "
        "loss says little by itself: at the dotted line, cross-entropy = ln K, every patch gets the same answer and nothing is "
        "learned. Targets that are uniform (entropy near 1) or one-hot (near 0), few prototypes in use, or a falling rank of the "
        "features are the signs of collapse."
    )
    lines = {"cross-entropy / ln K": 1.0, "target entropy / ln K": 1.0}
    curves = curves_figure(steps, panels, lines)
    return Section("What was learned", text, [table], [(curves, "Read-outs over the steps; the dotted line is ln K.")])


NAMES = {"random": "untrained encoder (floor)", "colour": "colour alone (floor)"}


def _worth(probe: Mapping[str, Any]) -> Section:
    rows, intervals = [], {}
    for where, kind, role in [
        ("internal test", "linear", "report"), ("internal test", "knn", "report"),
        ("external site", "linear", "external"), ("external site", "knn", "external"),
    ]:  # fmt: skip
        found = worth(probe, kind, role)
        above = found[probe["label"]]["minus"]
        for name, words in {probe["label"]: "this encoder", **NAMES}.items():
            score, minus = found[name]["balanced_accuracy"], above.get(name, {}).get("balanced_accuracy")
            rows.append((words, kind, where, number(score), number(minus) if minus else "", score["embedding"]))
            if kind == "linear":
                intervals[f"{words}, {where}"] = score
    table = Table(
        ("encoder", "probe", "reported on", "balanced accuracy [95 %]", "this encoder is above by", "as"),
        rows,
        f"Classes: {', '.join(probe['classes'])}. Intervals resample patients. Everything that was chosen was chosen inside the "
        "training patients; a floor may choose its better form on the reported patients, which favours the floor.",
    )
    text = (
        "A linear and a nearest-neighbour probe on frozen embeddings, fitted on the training patients, read once on the others. "
        "The classes have the same colours by construction, so colour alone should know little; an encoder is worth what it adds "
        "to an untrained one of the same architecture."
    )
    chance = 1 / len(probe["classes"])
    figure = interval_figure(intervals, "balanced accuracy, linear probe", chance)
    return Section("What the encoder is worth", text, [table], [(figure, "Linear probe with 95 % intervals over patients.")])


def _slides(mil: Mapping[str, Any]) -> Section:
    parts = [("internal test", mil["internal"]), ("external", mil["external"])]
    parts += [(f"site {name}", part) for name, part in mil["sites"].items()]
    rows = []
    for name, part in parts:
        if part is None:
            continue
        rows.append((name, str(part["slides"]), str(part["patients"]), str(part["positives"]), number(part["auc"])))
    areas = Table(("part", "slides", "patients", "positive", "AUC [95 %]"), rows, "")
    floors = [
        (floor.replace("_", " "), *[number((part["floors"] if part else {}).get(floor)) for _, part in parts[:2]])
        for floor in (mil["external"] or mil["internal"])["floors"]
    ]
    floor_table = Table(("floor", "AUC, internal test", "AUC, external"), floors, "What a model must beat to have seen tissue.")
    tables = [areas, *[_operating(required, parts) for required in mil["thresholds"]], floor_table]
    text = (
        "Does the slide hold a tumour focus? Gated attention over the tiles of a slide, trained on the training sites. Each "
        "threshold was fixed on training patients (out of fold) for a required sensitivity and carried over unchanged. "
        f"{' '.join(f'At {required}: ' + at['note'] + '.' for required, at in mil['thresholds'].items())}"
    )
    return Section("The slide-level model", text, tables, [])


def _operating(required: str, parts: Sequence[tuple[str, Mapping[str, Any] | None]]) -> Table:
    rows = []
    for name, part in parts:
        if part is None:
            continue
        found = part["operating"][required]
        rows.append((name, *[_rate(found[rate]) for rate in ("sensitivity", "specificity", "fnr", "flagged")]))
    columns = (f"at required sensitivity {required}", "sensitivity [Wilson 95 %]", "specificity", "missed positives", "flagged")
    return Table(columns, rows, "")


def _rate(found: Mapping[str, Any] | None) -> str:
    if found is None or found.get("value") is None:
        return "–"
    low, high = found["wilson"]["low"], found["wilson"]["high"]
    return f"{found['hits']}/{found['n']} [{low:.2f}, {high:.2f}]"


def _heatmaps(out: Path, mil: Mapping[str, Any]) -> Section:
    pointing = [
        (part, str(found["slides"]), f"{found['hits']:.0%}", f"{found['chance']:.1%}", number(found["gain"]))
        for part, found in mil["pointing"].items()
    ]
    table = Table(
        ("part", "positive slides", "top tile meets a focus", "a random tile does", "gain [95 %]"),
        pointing,
        "Attention says where the model looked, not why it decided.",
    )
    pictures = [(picture_file(out / "mil" / name, f"Attention of {name}"), "") for name in mil["heatmaps"]]
    text = (
        "Attention over the slide beside the truth. The slides were drawn by key among test and external slides, half of them "
        "positive, never by score."
    )
    return Section("Heatmaps beside the truth", text, [table], pictures)


def _cohort(proof: Proof, sheet: tuple[np.ndarray, str]) -> Section:
    table = Table(
        ("check", "found", "expected", "holds"),
        [(check.name, check.found, check.expected, "yes" if check.holds else "no") for check in proof.checks],
        "",
    )
    text = (
        "Everything that a histogram sees is drawn independently of the class; everything that a pathologist sees is not. These "
        "checks say whether the tissue is neither trivial nor impossible; its difficulty was fixed before any encoder was "
        "trained on it."
    )
    pixels, caption = sheet
    return Section("Is the tissue a fair test?", text, [table], [(picture(pixels, caption, 90), caption)])


def _cost(steps: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> Section:
    rows = [(stage.name, f"{stage.seconds:.0f} s", f"{stage.peak_bytes / 2**30:.2f} GiB") for stage in stages]
    rate = np.median([row["images_per_s"] for row in steps])
    wait = np.median([row["data/wait_fraction"] for row in steps])
    note = f"Training saw a median of {rate:.0f} patches a second and waited for data {wait:.1%} of the time."
    table = Table(("stage", "time", "memory"), rows, note)
    return Section("What it cost", "Wall time and peak memory (PSS) of each stage.", [table], [])


def _limits(mil: Mapping[str, Any], probe: Mapping[str, Any]) -> Section:
    said = list(mil["cannot_say"])
    said += [f"Probe: {note}." for note in probe["remarks"]]
    said.append("The tissue is synthetic: a score here says that the road works, not that an encoder is good on patients.")
    return Section("What this cannot say", "\n\n".join(said), [], [])
