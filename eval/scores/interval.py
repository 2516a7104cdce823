"""Intervals that respect patients: one bootstrap for every statistic, a t-interval for few patients, silence for fewer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit

from histoscale.data.keys import keys, uniform
from histoscale.data.names import codes

BOOTSTRAP_PATIENTS = 20  # fewer: the percentile bootstrap is too narrow, so a t-interval and a warning
REPORTABLE_PATIENTS = 10  # fewer: no interval at all
MAX_REDRAWN = 0.05  # a statistic undefined in more replicates than this has no honest interval

Statistic = Callable[[np.ndarray], float]  # rows int64 [m], repeated as they were drawn -> a number, NaN where undefined


@dataclass(frozen=True)
class IntervalConfig:
    """draws: bootstrap replicates. level: coverage, as .95. seed: of the draws, shared by every model and every metric."""

    draws: int
    level: float
    seed: int


@dataclass(frozen=True)
class Interval:
    """A number and its interval over patients; `low` and `high` are None where withheld, and `note` then says why."""

    value: float
    low: float | None
    high: float | None
    patients: int
    units: int
    note: str

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("value", "low", "high", "patients", "units", "note")}

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f} [withheld]"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def patient_bootstrap(
    statistic: Statistic, patients: Sequence[str], config: IntervalConfig, strata: Sequence[str] | None = None
) -> Interval:
    """Percentile interval of `statistic` by drawing whole patients with replacement.

    patients: one id a row. strata: one label a row, the same for all rows of a patient: then drawn inside their stratum.
    Draws depend on the seed and on the set of patients alone, so any two statistics on the same rows share them.
    Undefined replicates are drawn again and counted. Under 20 patients: the t-interval of `_patient_t`. Under 10: withheld.
    Raises ValueError for no rows, or a patient in two strata.
    """
    members = _members(patients)
    value = float(statistic(np.arange(len(patients))))
    n = len(members)

    def interval(low: float | None, high: float | None, note: str) -> Interval:
        return Interval(value, low, high, n, len(patients), note)

    if math.isnan(value):
        return interval(None, None, "interval withheld: the statistic is undefined on these rows")
    if n < REPORTABLE_PATIENTS:
        return interval(None, None, f"interval withheld: {n} patients, and fewer than {REPORTABLE_PATIENTS} cannot carry one")
    if n < BOOTSTRAP_PATIENTS:
        return _patient_t(statistic, members, value, len(patients), config.level)

    groups = _strata(members, strata)
    values = np.empty(config.draws)
    open_draws, redrawn, attempt = np.arange(config.draws), 0, 0
    while len(open_draws):
        if redrawn > MAX_REDRAWN * config.draws:
            return interval(None, None, f"interval withheld: undefined in more than {MAX_REDRAWN:.0%} of the replicates")
        chosen = _draw(groups, open_draws, attempt, config.seed)
        values[open_draws] = [statistic(np.concatenate([members[i] for i in row])) for row in chosen]
        open_draws = open_draws[np.isnan(values[open_draws])]
        redrawn, attempt = redrawn + len(open_draws), attempt + 1
    tail = (1 - config.level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return interval(float(low), float(high), f"{redrawn} undefined replicates drawn again" if redrawn else "")


def paired_difference(
    first: Statistic, second: Statistic, patients: Sequence[str], config: IntervalConfig, strata: Sequence[str] | None = None
) -> Interval:
    """first − second on the same patients, subtracted inside every replicate."""
    return patient_bootstrap(lambda rows: first(rows) - second(rows), patients, config, strata)


Totals = Callable[[np.ndarray], np.ndarray]  # sums over rows [..., C] -> a number each [...], NaN where undefined


@dataclass(frozen=True)
class Resampling:
    """The draws of `patient_bootstrap` for n rows, once for every statistic that is a function of sums over rows.

    codes: int64 [n], the patient of each row. counts: uint8 [draws, P], how often each draw took each patient; no draws under 20
    patients."""

    codes: np.ndarray
    counts: np.ndarray
    config: IntervalConfig

    @staticmethod
    def of(patients: Sequence[str] | np.ndarray, config: IntervalConfig) -> "Resampling":
        """Raises ValueError for no rows."""
        if len(patients) == 0:
            raise ValueError("an interval needs at least one row, got none")
        own = codes(patients)
        number = int(own.max()) + 1
        draws = config.draws if number >= BOOTSTRAP_PATIENTS else 0
        counts = np.empty((draws, number), np.uint8)  # a patient is drawn 256 times with probability 1e-507
        for part in _batches(draws, number):
            counts[part] = _counted(np.arange(draws)[part], number, 0, config.seed)
        return Resampling(own, counts, config)

    def sums(self, rows: np.ndarray) -> np.ndarray:
        """Sums over the rows of each patient: float [n, C] -> float64 [P, C]."""
        found = np.zeros((self.codes.max() + 1, rows.shape[1]))
        for column in range(rows.shape[1]):
            found[:, column] = np.bincount(self.codes, weights=rows[:, column], minlength=len(found))
        return found

    def interval(self, sums: np.ndarray, statistic: Totals) -> Interval:
        """`patient_bootstrap` of a statistic of totals, by one matrix product. sums: float64 [P, C]."""
        return self._interval(lambda counts: statistic(counts @ sums), len(sums), sums.shape[1])

    def weighted(self, statistic: Totals) -> Interval:
        """`patient_bootstrap` of a statistic that takes how often each row counts: weights float64 [b, n] -> [b]."""
        number = int(self.codes.max()) + 1
        return self._interval(lambda counts: statistic(counts[:, self.codes]), number, len(self.codes))

    def _interval(self, statistic: Totals, number: int, width: int) -> Interval:
        """statistic: of counts of patients [b, P]."""
        level, units = self.config.level, len(self.codes)
        value = float(statistic(np.ones((1, number)))[0])
        if math.isnan(value):
            return Interval(value, None, None, number, units, "interval withheld: the statistic is undefined on these rows")
        if number < REPORTABLE_PATIENTS:
            why = f"interval withheld: {number} patients, and fewer than {REPORTABLE_PATIENTS} cannot carry one"
            return Interval(value, None, None, number, units, why)
        if number < BOOTSTRAP_PATIENTS:
            return _pseudo_t(value, statistic(1.0 - np.eye(number)), units, level)
        draws = len(self.counts)
        values = np.concatenate([statistic(self.counts[part].astype(np.float64)) for part in _batches(draws, max(number, width))])
        redrawn, attempt = 0, 0
        while len(open_ := np.flatnonzero(np.isnan(values))):
            redrawn, attempt = redrawn + len(open_), attempt + 1
            if redrawn > MAX_REDRAWN * draws:
                why = f"interval withheld: undefined in more than {MAX_REDRAWN:.0%} of the replicates"
                return Interval(value, None, None, number, units, why)
            values[open_] = statistic(_counted(open_, number, attempt, self.config.seed))
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        note = f"{redrawn} undefined replicates drawn again" if redrawn else ""
        return Interval(value, float(low), float(high), number, units, note)


def independent_difference(first: Interval, second: Interval) -> Interval:
    """first − second of two sets that share no patient, its ends from the two intervals, which need not be symmetric (Zou and
    Donner 2008, doi 10.1002/sim.3095; for proportions with Wilson's it is Newcombe's of 1998). Withheld where either is."""
    value, patients, units = first.value - second.value, first.patients + second.patients, first.units + second.units
    if first.low is None or first.high is None or second.low is None or second.high is None:
        note = next(each.note for each in (first, second) if each.low is None or each.high is None)
        return Interval(value, None, None, patients, units, note)
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    warned = [each.note for each in (first, second) if each.note.startswith("warning")]
    return Interval(value, value - down, value + up, patients, units, "; ".join(warned))


def _counted(draws: np.ndarray, patients: int, attempt: int, seed: int) -> np.ndarray:
    """float64 [len(draws), patients]: how often each was drawn."""
    chosen = _draw([np.arange(patients)], draws, attempt, seed) + np.arange(len(draws))[:, None] * patients
    return np.bincount(chosen.ravel(), minlength=len(draws) * patients).reshape(len(draws), patients).astype(np.float64)


def _batches(draws: int, width: int) -> list[slice]:
    size = max((1 << 22) // width, 1)
    return [slice(start, min(start + size, draws)) for start in range(0, draws, size)]


def _patient_t(statistic: Statistic, members: list[np.ndarray], value: float, units: int, level: float) -> Interval:
    """Student's t on one number a patient: the jackknife pseudo-value nθ − (n−1)θ₋ᵢ (Arvesen 1969, doi 10.1214/aoms/1177697287).

    For a mean over patients of equal size a pseudo-value is the patient's own mean; for AUC it gives DeLong's variance.
    """
    n = len(members)
    without = np.array([statistic(np.concatenate(members[:i] + members[i + 1 :])) for i in range(n)])
    return _pseudo_t(value, without, units, level)


def _pseudo_t(value: float, without: np.ndarray, units: int, level: float) -> Interval:
    """without: [patients], the statistic without each."""
    n = len(without)
    if np.isnan(without).any():
        return Interval(value, None, None, n, units, "interval withheld: the statistic is undefined without one of the patients")
    pseudo = n * value - (n - 1) * without
    half = float(stdtrit(n - 1, (1 + level) / 2) * pseudo.std(ddof=1) / math.sqrt(n))
    note = f"warning: {n} patients, t-interval on patient-level values; read it with care under {BOOTSTRAP_PATIENTS}"
    return Interval(value, value - half, value + half, n, units, note)


def _members(patients: Sequence[str]) -> list[np.ndarray]:
    """The rows of each patient, patients in the order of their ids."""
    if len(patients) == 0:
        raise ValueError("an interval needs at least one row, got none")
    own = codes(patients)
    order = np.argsort(own, kind="stable")
    return np.split(order, np.cumsum(np.bincount(own))[:-1])


def _strata(members: list[np.ndarray], strata: Sequence[str] | None) -> list[np.ndarray]:
    if strata is None:
        return [np.arange(len(members))]
    labels = np.asarray(strata)
    for rows in members:
        if len(np.unique(labels[rows])) > 1:
            raise ValueError(f"a patient stands in the strata {sorted(set(labels[rows]))}: expected one stratum a patient")
    _, own = np.unique(labels[[rows[0] for rows in members]], return_inverse=True)
    return [np.flatnonzero(own == code) for code in range(own.max() + 1)]


def _draw(groups: list[np.ndarray], draws: np.ndarray, attempt: int, seed: int) -> np.ndarray:
    """Patients of every replicate: int64 [len(draws), patients]."""
    columns = []
    for number, group in enumerate(groups):
        parents = keys(seed, f"bootstrap/{number}", attempt, torch.from_numpy(draws))
        places = (uniform(parents, len(group)).double() * len(group)).long().numpy()
        columns.append(group[places])
    return np.concatenate(columns, axis=1)
