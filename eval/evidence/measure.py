"""Can the map be trusted? Artefacts under the most attended tiles, overlap with outlines, and what deleting tiles does."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from histoscale.data.keys import key, permutation
from histoscale.eval.annotations import coverage
from histoscale.eval.artefacts import KINDS, judge, read_optics
from histoscale.eval.evidence.case import Case, EvidenceConfig, Measured
from histoscale.eval.mil.faithfulness import Deletion, deletion, faithfulness
from histoscale.eval.mil.pointing import area_auroc
from histoscale.eval.scores.interval import IntervalConfig, patient_bootstrap


def measure_deletion(case: Case, config: EvidenceConfig) -> Deletion:
    """Curves in the order of attention, and in the order of what speaks most for the side that the model took."""
    side = case.finding.side
    orders = {name: values if name == "attention" else side * values for name, values in case.values.items()}
    return deletion(case.logit, case.features(), orders, side, case.slide_id, config.deletion)


def measure_artefacts(
    case: Case, white: np.ndarray, config: EvidenceConfig, threads: int
) -> tuple[dict[str, tuple[float, float]], dict[int, list[str]]]:
    """kind -> (share of the most attended tiles, share of all), each from a keyed sample where they are many; and the kinds of
    each tile looked at, by row. threads: tiles read at once.

    Raises what reading the slide raises.
    """
    assert case.reader is not None
    n, top = len(case.coords), case.top(config.top)
    sample = permutation(key(config.seed, f"artefacts/{case.slide_id}"), n)[: config.sample]
    top = top[permutation(key(config.seed, f"artefacts/top/{case.slide_id}"), len(top))[: config.sample]]
    shown = np.concatenate(extremes(case, config))
    rows = np.unique(np.concatenate([top, sample, shown]))
    optics = read_optics(case.reader, case.coords[rows], case.size_px, case.mpp, white, config.artefacts, threads)
    place = {row: i for i, row in enumerate(rows.tolist())}
    fair = np.array([place[row] for row in sample.tolist()])
    judged = judge(optics, fair, config.artefacts)
    most = np.array([place[row] for row in top.tolist()])
    shares = {
        kind: (_mean(judged[kind][most], optics.read[most]), _mean(judged[kind][fair], optics.read[fair])) for kind in KINDS
    }
    return shares, {row: [kind for kind in KINDS if judged[kind][i]] for row, i in place.items()}


def measure_overlap(case: Case) -> tuple[dict[str, float] | None, np.ndarray]:
    """Area AUROC of each map against the outlines and `pointing`, None where no tile meets one; and the coverage [n]."""
    assert case.annotations is not None
    covered = coverage(case.coords, case.size_px, case.annotations)
    if not covered.any():
        return None, covered
    found = {name: area_auroc(values, covered) for name, values in case.values.items()}
    return {**found, "pointing": float(covered[case.attention.argmax()] > 0)}, covered


def extremes(case: Case, config: EvidenceConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the most attended tiles, the most first, and of the least attended, the least first; no tile stands in both."""
    order = (-case.attention).argsort(kind="stable")
    few = min(config.patches, -(-len(order) // 2))
    return order[:few], order[few:][::-1][: config.patches]


def pooled(measured: Sequence[Measured], config: IntervalConfig) -> dict[str, Any]:
    """Means over slides with intervals over patients: of what artefacts hold of the most attended tiles beyond their share of
    all, of the deletion gains, of the overlap. Slides that lack a measure are left out of its mean, and counted."""

    def mean(values: Sequence[float], patients: Sequence[str]) -> dict[str, Any]:
        numbers = np.asarray(values, np.float64)
        interval = patient_bootstrap(lambda drawn: float(numbers[drawn].mean()), patients, config)
        return {**interval.as_dict(), "slides": len(values)}

    found: dict[str, Any] = {"artefacts": {}, "deletion_gain": {}, "overlap": {}}
    audited = [each for each in measured if each.artefacts is not None]
    for kind in KINDS if audited else ():
        pairs = [each.artefacts[kind] for each in audited if each.artefacts is not None]
        found["artefacts"][kind] = mean([top - everywhere for top, everywhere in pairs], [each.patient for each in audited])
    for order in measured[0].gains if measured else ():
        interval = faithfulness([each.gains[order] for each in measured], [each.patient for each in measured], config)
        found["deletion_gain"][order] = {**interval.as_dict(), "slides": len(measured)}
    outlined = [each for each in measured if each.overlap is not None]
    for name in (outlined[0].overlap or {}) if outlined else ():
        rows = [(each.overlap[name], each.patient) for each in outlined if each.overlap and np.isfinite(each.overlap[name])]
        if rows:
            found["overlap"][name] = mean([value for value, _ in rows], [patient for _, patient in rows])
    return found


def _mean(flags: np.ndarray, read: np.ndarray) -> float:
    return float(flags[read].mean()) if read.any() else float("nan")
