"""The operating point: a threshold fixed on training patients for a required sensitivity, and what it does elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.eval.scores.binomial import clopper_pearson, needed_without_miss, wilson

RULES = ("conformal", "empirical")
KEPT = {"sensitivity": ("positive", "flagged"), "specificity": ("negative", "passed")}  # whose share, and of which decision


@dataclass(frozen=True)
class Threshold:
    """A unit is flagged when its score >= value. keeps: whether `required` is a sensitivity or a specificity. An infinite value
    flags everything (nothing) because no threshold keeps the promise. positives: training units that have the finding."""

    value: float
    required: float
    rule: str
    positives: int
    note: str
    keeps: str = "sensitivity"

    @property
    def name(self) -> str:
        return rule_name(self.keeps, self.required)


@dataclass(frozen=True)
class Rate:
    """hits of n units with the Wilson and the Clopper-Pearson interval, both NaN when n is 0."""

    hits: int
    n: int
    value: float
    wilson: tuple[float, float]
    exact: tuple[float, float]


@dataclass(frozen=True)
class Operation:
    """What a threshold did on one set of units. drift: achieved minus required share. needed: the threshold that this set
    would have needed for a sensitivity, a diagnosis that nothing uses. ppv, npv: as observed; at_prevalence: both at the stated
    one."""

    sensitivity: Rate
    specificity: Rate
    fnr: Rate
    flagged: Rate
    ppv: Rate
    npv: Rate
    prevalence: float
    at_prevalence: tuple[float, float]
    drift: float
    needed: float


def rule_name(keeps: str, required: float) -> str:
    """The key of a rule in tables and files: `0.95` for a sensitivity, `specificity_0.5` for a specificity."""
    return f"{required:g}" if keeps == "sensitivity" else f"{keeps}_{required:g}"


def score_words(value: float) -> str:
    """A probability or a threshold with three digits that count, also next to 0 and to 1: `0.0000312` is no `0.000`."""
    if not 0 < value < 1:
        return f"{value:g}"
    near = min(value, 1 - value)
    if near < 1e-9:
        return f"{value:.3g}" if value < 0.5 else f"1 - {near:.2g}"
    return f"{value:.{max(3, 2 - math.floor(math.log10(near)))}f}"


def sweeping(flagged: Rate) -> str:
    """`every` or `no` where a rule gives one answer to all units that it read, else ""."""
    if flagged.n == 0 or 0 < flagged.hits < flagged.n:
        return ""
    return "every" if flagged.hits else "no"


def answer_of(at: Threshold, flagged: Rate) -> str:
    """`sweeping` of a threshold that may have read nothing yet: an infinite one sweeps whatever comes."""
    return sweeping(flagged) or ({-math.inf: "every", math.inf: "no"}.get(at.value, "") if flagged.n == 0 else "")


def threshold(
    labels: np.ndarray,
    scores: np.ndarray,
    required: float,
    rule: str,
    groups: Sequence[str] | None = None,
    keeps: str = "sensitivity",
) -> Threshold:
    """The largest threshold that keeps the required sensitivity, from scores that their model did not train on; of a required
    specificity the smallest, by the same rule from the other side: units pass below it.

    labels: [n], 0 or 1; scores: [n]. rule `conformal`: the k-th largest positive score with k = ceil(s0 (P + 1)), so that the
    expected sensitivity on new exchangeable positives is at least s0; for k > P there is none and everything is flagged.
    rule `empirical`: k = ceil(s0 P), whose expected sensitivity is only k / (P + 1). groups: the patient of each unit: then P
    counts patients with a positive unit, a patient's positive units share a weight of one, and the share that is kept is that of
    a new patient's positive units. Raises ValueError on an unknown rule, on a requirement outside (0, 1) and without positives
    (negatives).
    """
    if rule not in RULES:
        raise ValueError(f"the threshold rule is {rule!r}: expected conformal or empirical")
    if not 0 < required < 1:
        raise ValueError(f"the required {keeps} is {required}: expected a number between 0 and 1")
    side, answer = KEPT[keeps]
    positives = int((np.asarray(labels) == 1).sum())
    chosen = np.flatnonzero(np.asarray(labels) == (keeps == "sensitivity"))
    count, sign = len(chosen), 1 if keeps == "sensitivity" else -1
    if count == 0:
        raise ValueError(f"a threshold needs scores of {side} units: the training part has none")
    names = np.arange(len(labels)) if groups is None else np.asarray(groups)
    _, patient, units = np.unique(names[chosen], return_inverse=True, return_counts=True)
    patients = len(units)
    ranked = sign * np.asarray(scores, np.float64)[chosen]
    order = np.argsort(-ranked, kind="stable")
    kept = np.cumsum(1 / units[patient[order]])
    wanted = required * (patients + (rule == "conformal"))
    if groups is None or patients == count:  # whole units
        wanted = math.ceil(wanted - 1e-12)
    who = f"{count} {side}s" + (f" of {patients} patients" if patients < count else "")
    if wanted > patients + 1e-9:
        enough = math.ceil(required / (1 - required) - 1e-9)
        note = f"{who} fix no threshold for {keeps} {required:g} ({enough} are needed): everything is {answer}"
        return Threshold(-sign * math.inf, required, rule, positives, note, keeps)
    place = int(np.searchsorted(kept, wanted - 1e-9))
    note = f"threshold from {who}, expected {keeps} {kept[place] / (patients + 1):.3f}"
    proof = needed_without_miss(required)
    if keeps == "sensitivity" and patients < proof:
        note += f"; {proof} without a miss would be needed to prove {required:g}"
    last = sign * float(ranked[order[place]])
    value = last if keeps == "sensitivity" else float(np.nextafter(last, math.inf))  # a unit at `last` passes
    return Threshold(value, required, rule, positives, note, keeps)


def operate(labels: np.ndarray, scores: np.ndarray, at: Threshold, prevalence: float) -> Operation:
    """Sensitivity, specificity, FNR and predictive values of a threshold that these units had no part in.

    labels, scores: [n]. prevalence: the stated one, for PPV and NPV by Bayes' rule. Raises ValueError on an
    impossible one.
    """
    labels, scores = np.asarray(labels) == 1, np.asarray(scores, np.float64)
    needed = _needed(scores[labels], at.required) if at.keeps == "sensitivity" else math.nan
    return operation(labels, scores >= at.value, at.required, prevalence, needed, at.keeps)


def operation(
    positive: np.ndarray, flagged: np.ndarray, required: float, prevalence: float, needed: float, keeps: str = "sensitivity"
) -> Operation:
    """`operate` of decisions that are made already, as when units of several models each had their own threshold.

    positive, flagged: bool [n]. needed: as in `Operation`, NaN where scores share no scale. Raises ValueError on an impossible
    prevalence.
    """
    if not 0 < prevalence < 1:
        raise ValueError(f"the stated prevalence is {prevalence}: expected a number between 0 and 1")
    hit, missed = int((flagged & positive).sum()), int((~flagged & positive).sum())
    false, passed = int((flagged & ~positive).sum()), int((~flagged & ~positive).sum())
    sensitivity, specificity = rate(hit, hit + missed), rate(passed, passed + false)
    return Operation(
        sensitivity=sensitivity,
        specificity=specificity,
        fnr=rate(missed, hit + missed),
        flagged=rate(hit + false, len(positive)),
        ppv=rate(hit, hit + false),
        npv=rate(passed, passed + missed),
        prevalence=prevalence,
        at_prevalence=_predictive(sensitivity.value, specificity.value, prevalence),
        drift=(sensitivity if keeps == "sensitivity" else specificity).value - required,
        needed=needed,
    )


def rate(hits: int, n: int) -> Rate:
    """A proportion with both intervals; without units everything is NaN."""
    if n == 0:
        return Rate(0, 0, math.nan, (math.nan, math.nan), (math.nan, math.nan))
    return Rate(hits, n, hits / n, wilson(hits, n), clopper_pearson(hits, n))


def _predictive(sensitivity: float, specificity: float, prevalence: float) -> tuple[float, float]:
    true, false = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    passed, missed = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    ppv = true / (true + false) if true + false > 0 else math.nan
    return ppv, passed / (passed + missed) if passed + missed > 0 else math.nan


def _needed(positive: np.ndarray, required: float) -> float:
    if len(positive) == 0:
        return math.nan
    return float(np.sort(positive)[::-1][math.ceil(required * len(positive) - 1e-12) - 1])
