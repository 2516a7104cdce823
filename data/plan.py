"""The pure plan: which patch of which visit to which slide stands in slot g of step b. No rank, worker or file in it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from histoscale.data.keys import key, permutation, permute, unit
from histoscale.data.pixelfilter import PixelFilterConfig

PLAN_VERSION = 2  # part of every result identity: raise it when the same keys would name other patches
ATTEMPTS = 8  # a visit that fails is replaced by attempts 1 … 8
_ONE = 1 << 32  # a whole visit in the fixed-point arithmetic of a pass
_WEIGHTINGS = ("patients", "slides", "area", "organ", "site", "cohort")
_MAGNIFICATIONS = ("discrete", "log_uniform")
_UNSERVABLE = ("error", "drop")


@dataclass(frozen=True)
class SamplerConfig:
    """Where patches come from; every key changes results.

    magnification: discrete: mpps [um/px] are the targets, weights how often each stands in a repeating cycle; log_uniform: mpps
    are rising edges of ranges, weights the counts of the ranges, and every visit has its own mpp, log-uniform in its range.
    patch_px: side of a patch in output pixels. grid: a visit is grid x grid patches. lanes_per_slot: visits open at a time.
    tissue_fraction: least share of tissue in a patch. mpp_tolerance: a stored level this near to the target is taken unscaled.
    max_upsample: how far a slide may be enlarged to serve a finer mpp.
    slide_weighting: patients (uniform over patients, then over their slides), slides (uniform), area (tissue area ** exponent),
    or organ, site, cohort (group ** exponent in patients, then as patients; exponent 0 balances the groups).
    unservable: what becomes of a target that no slide can serve: error, or drop (its visits go to the others).
    slide_budget: keep so many slides, nested over budgets. patch_budget: distinct patches in all, repeated in epochs.
    """

    magnification: str
    mpps: list[float]
    weights: list[int]
    patch_px: int
    grid: int
    lanes_per_slot: int
    tissue_fraction: float
    mpp_tolerance: float
    max_upsample: float
    slide_weighting: str
    weighting_exponent: float
    unservable: str
    slide_budget: int | None
    patch_budget: int | None
    pixel_filter: PixelFilterConfig


@dataclass(frozen=True)
class SlideTable:
    """What the plan must know of the slides: one entry a slide, in the order of the catalog.

    patients: the slide's own id where no patient is known. area: tissue, mm2 [slides]. eligible: bool [slides, targets].
    """

    slide_ids: Sequence[str]
    patients: Sequence[str]
    organs: Sequence[str]
    sites: Sequence[str]
    cohorts: Sequence[str]
    area: np.ndarray
    eligible: np.ndarray


@dataclass(frozen=True)
class Place:
    """Where the patch of a (step, slot) comes from: patch `number` of the visit at `turn` of a lane."""

    slot: int
    lane: int
    turn: int
    number: int
    last: bool


@dataclass(frozen=True)
class Visit:
    """One visit: everything that its patches depend on besides the slide's bytes.

    slide: row. target: index into `targets(sampler)`. mpp: um/px that are wanted, within the target.
    """

    slot: int
    lane: int
    number: int
    attempt: int
    slide: int
    target: int
    key: int
    mpp: float


Target = tuple[float, float]  # lowest and highest um/px; the same where magnification is discrete


def targets(sampler: SamplerConfig) -> list[Target]:
    """What the weights of the mix count, in their order."""
    if sampler.magnification == "discrete":
        return [(mpp, mpp) for mpp in sampler.mpps]
    return list(zip(sampler.mpps, sampler.mpps[1:], strict=False))


def target_name(target: Target) -> str:
    """What tables call a target: `0.5`, or `0.5-1` for a range."""
    low, high = target
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def rank_slots(global_batch: int, rank: int, world: int) -> range:
    """The contiguous slots of a rank. Raises ValueError unless world divides the batch, naming the nearest that would do."""
    if global_batch % world:
        low = global_batch // world * world
        nearest = " and ".join(str(g) for g in (low, low + world) if g)
        raise ValueError(f"optim.global_batch {global_batch} does not divide over {world} processes: the nearest are {nearest}")
    share = global_batch // world
    return range(rank * share, (rank + 1) * share)


def slide_weights(table: SlideTable, rows: np.ndarray, weighting: str, exponent: float) -> np.ndarray:
    """Relative weights float64 [len(rows)] of the slides in `rows`, which are those that can serve one target."""
    if weighting == "slides":
        return np.ones(len(rows))
    if weighting == "area":
        return table.area[rows].astype(np.float64) ** exponent
    patient = _numbered(table.patients, rows)
    within = 1.0 / np.bincount(patient)[patient]
    if weighting == "patients":
        return within
    group = _numbered({"organ": table.organs, "site": table.sites, "cohort": table.cohorts}[weighting], rows)
    patients_of = np.bincount(group, weights=within)  # a patient in two groups counts for a part in each
    return (patients_of ** (exponent - 1))[group] * within


def _numbered(names: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """The names of the rows as numbers from 0 on, int64 [len(rows)]."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(names[row], len(numbers)) for row in rows.tolist()], np.int64)


def budgeted(seed: int, table: SlideTable, budget: int | None) -> np.ndarray:
    """bool [slides]: the slides that a budget keeps, in the order of a keyed hash of the patients, then of their slides.

    A smaller budget is a subset of a larger one. Slides that can serve no target are not counted.
    Raises ValueError when the budget is not within 1 and the slides that there are.
    """
    kept = np.asarray(table.eligible.any(axis=1))
    if budget is None:
        return kept
    usable = np.flatnonzero(kept)
    if not 1 <= budget <= len(usable):
        raise ValueError(f"sampler.slide_budget is {budget}: {len(usable)} slides can serve a magnification of the mix")

    patient = _numbered(table.patients, usable)
    first = np.unique(patient, return_index=True)[1]  # a row of each patient, for the name
    order = sorted(range(len(first)), key=lambda i: key(seed, "patient " + table.patients[int(usable[first[i]])]))
    held = np.cumsum(np.bincount(patient)[order])
    whole = int(np.searchsorted(held, budget, side="right"))  # so many patients with all their slides, of one more a part
    chosen = np.isin(patient, order[:whole])
    if whole < len(order):
        part = np.flatnonzero(patient == order[whole]).tolist()
        part.sort(key=lambda i: key(seed, "slide " + table.slide_ids[int(usable[i])]))
        chosen[part[: budget - (int(held[whole - 1]) if whole else 0)]] = True
    kept = np.zeros_like(kept)
    kept[usable[chosen]] = True
    return kept


class Passes:
    """Endless passes over slides: in N visits slide s stands floor(N w_s) or ceil(N w_s) times, on average N w_s.

    A pass is a systematic sample (a comb with a random offset over the cumulated weights) read in a keyed order, so that one
    visit costs a search and no table of a pass is kept.
    """

    def __init__(self, rows: np.ndarray, weights: np.ndarray) -> None:
        self.rows = rows.astype(np.int32)
        shares = np.cumsum(np.maximum(np.rint(weights / weights.sum() * (1 << 52)), 1).astype(np.int64))
        total = int(shares[-1])
        # Python's integers: shares * N * 2**32 does not fit in 64 bits, and equal weights must give whole visits exactly.
        self.bounds = np.array([share * len(rows) * _ONE // total for share in shares.tolist()], np.int64)

    def at(self, seed: int, target: int, place: int) -> int:
        """The slide at a place of the endless list of visits of one target."""
        number, within = divmod(place, len(self.rows))
        k = key(seed, "pass", target, number)
        tooth = permute(k, len(self.rows), within) * _ONE + key(seed, "comb", target, number) % _ONE
        return int(self.rows[np.searchsorted(self.bounds, tooth, side="right")])

    def draw(self, k: int) -> int:
        """One slide by weight."""
        return int(self.rows[np.searchsorted(self.bounds, k % int(self.bounds[-1]), side="right")])


class Plan:
    """The plan of one run: a function of the seed, the global batch G, the sampler and the slides. Pickled, it holds two arrays a
    target and no name of a slide.

    dropped: targets that no slide can serve, under sampler.unservable=drop. place: the sampler's key, for errors (of a later
    phase another). Raises ValueError on an inconsistent sampler, a magnification that no slide can serve, or a budget that does
    not come out.
    """

    def __init__(self, seed: int, global_batch: int, sampler: SamplerConfig, table: SlideTable, place: str = "sampler") -> None:
        _check(sampler, table)
        self.seed, self.global_batch, self.sampler = seed, global_batch, sampler
        self.lanes, self.per_visit = sampler.lanes_per_slot, sampler.grid**2
        self.epoch_visits = _epoch_visits(sampler.patch_budget, global_batch, self.lanes * self.per_visit)
        self.targets = targets(sampler)
        kept = budgeted(seed, table, sampler.slide_budget)
        served = (kept[:, None] & table.eligible).any(axis=0)
        self.dropped = [target for target, able in zip(self.targets, served.tolist(), strict=True) if not able]
        if self.dropped and (sampler.unservable == "error" or not served.any()):
            raise ValueError(_unservable(sampler, self.dropped, int(kept.sum()), len(kept), place))
        # Only those that are served have a number in the keys, so that dropping one is the mix without it.
        self.served = np.flatnonzero(served).tolist()
        self.weights = [sampler.weights[target] for target in self.served]
        self.cycle = np.repeat(np.arange(len(self.served)), self.weights)
        self.first = np.cumsum([0, *self.weights])
        self.passes = []
        for target in self.served:
            rows = np.flatnonzero(kept & table.eligible[:, target])
            weights = slide_weights(table, rows, sampler.slide_weighting, sampler.weighting_exponent)
            self.passes.append(Passes(rows, weights))
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._inner: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def place(self, step: int, slot: int) -> Place:
        """Which lane, turn and patch number slot `slot` takes at step `step`."""
        t, u = divmod(step, self.lanes)
        lane = int(self._order(slot, t)[u])
        age = t + key(self.seed, "phase", slot, lane) % self.per_visit
        turn, i = divmod(age, self.per_visit)
        return Place(slot, lane, turn, int(self._numbers(slot, lane, turn)[i]), i == self.per_visit - 1)

    def numbers_left(self, place: Place) -> list[int]:
        """The patches of the visit that a place is in, from that of the place on, in the order in which they are taken."""
        numbers = self._numbers(place.slot, place.lane, place.turn).tolist()
        return numbers[numbers.index(place.number) :]

    def visit(self, slot: int, lane: int, turn: int, attempt: int = 0) -> Visit:
        """The visit at a turn of a lane; an attempt > 0 replaces its slide by one drawn by weight."""
        number = turn
        if self.epoch_visits is not None:
            epoch, within = divmod(turn, self.epoch_visits)
            number = permute(key(self.seed, "epoch", epoch, slot, lane), self.epoch_visits, within)
        ordinal = (number * self.global_batch + slot) * self.lanes + lane
        round_, within = divmod(ordinal, len(self.cycle))
        index = permute(key(self.seed, "cycle", round_), len(self.cycle), within)
        served = int(self.cycle[index])
        k = key(self.seed, "visit", slot, lane, number, attempt)
        if attempt:
            slide = self.passes[served].draw(key(self.seed, "replacement", slot, lane, number, attempt))
        else:
            place = round_ * self.weights[served] + index - int(self.first[served])
            slide = self.passes[served].at(self.seed, served, place)
        target = self.served[served]
        low, high = self.targets[target]
        mpp = low * (high / low) ** unit(key(self.seed, "mpp", slot, lane, number))
        return Visit(slot, lane, number, attempt, slide, target, k, mpp)

    def _order(self, slot: int, t: int) -> np.ndarray:
        """The order in which the lanes of a slot are taken in round t; the last one of a slot is remembered."""
        known = self._orders.get(slot)
        if known is None or known[0] != t:
            known = self._orders[slot] = (t, permutation(key(self.seed, "order", slot, t), self.lanes))
        return known[1]

    def _numbers(self, slot: int, lane: int, turn: int) -> np.ndarray:
        """The order in which the patches of a visit are taken; the last one of a lane is remembered."""
        known = self._inner.get((slot, lane))
        if known is None or known[0] != turn:
            known = (turn, permutation(key(self.seed, "inner", slot, lane, turn), self.per_visit))
            self._inner[slot, lane] = known
        return known[1]


def _check(sampler: SamplerConfig, table: SlideTable) -> None:
    given = f"sampler.mpps {sampler.mpps} and sampler.weights {sampler.weights}"
    if sampler.magnification not in _MAGNIFICATIONS:
        raise ValueError(f"sampler.magnification is {sampler.magnification!r}: expected one of {', '.join(_MAGNIFICATIONS)}")
    if not sampler.mpps or min(sampler.mpps) <= 0 or not sampler.weights or min(sampler.weights) < 1:
        raise ValueError(f"{given}: expected positive magnifications and whole counts of at least 1")
    if sampler.magnification == "discrete" and len(sampler.mpps) != len(sampler.weights):
        raise ValueError(f"{given}: expected as many whole counts as magnifications")
    if sampler.magnification == "log_uniform":
        rising = all(low < high for low, high in zip(sampler.mpps, sampler.mpps[1:], strict=False))
        if not rising or len(sampler.mpps) != len(sampler.weights) + 1:
            raise ValueError(f"{given}: log_uniform expects rising edges of ranges, and one count less than edges")
    if sampler.unservable not in _UNSERVABLE:
        raise ValueError(f"sampler.unservable is {sampler.unservable!r}: expected one of {', '.join(_UNSERVABLE)}")
    for name in ("patch_px", "grid", "lanes_per_slot"):
        if getattr(sampler, name) < 1:
            raise ValueError(f"sampler.{name} is {getattr(sampler, name)}: expected at least 1")
    if sampler.slide_weighting not in _WEIGHTINGS:
        raise ValueError(f"sampler.slide_weighting is {sampler.slide_weighting!r}: expected one of {', '.join(_WEIGHTINGS)}")
    expected = (len(table.slide_ids), len(sampler.weights))
    if table.eligible.shape != expected:
        raise ValueError(f"eligible is {table.eligible.shape}: expected {expected[0]} slides x {expected[1]} targets")


def without(sampler: SamplerConfig, dropped: Sequence[Target]) -> SamplerConfig | None:
    """The sampler whose mix is the same but for some targets; None where none is left, or ranges that are no longer joined."""
    kept = [(target, weight) for target, weight in zip(targets(sampler), sampler.weights, strict=True) if target not in dropped]
    joined = all(one[0][1] == other[0][0] for one, other in zip(kept, kept[1:], strict=False))
    if not kept or (sampler.magnification == "log_uniform" and not joined):
        return None
    edges = [kept[-1][0][1]] if sampler.magnification == "log_uniform" else []
    return replace(sampler, mpps=[low for (low, _), _ in kept] + edges, weights=[weight for _, weight in kept])


def _unservable(sampler: SamplerConfig, dropped: Sequence[Target], usable: int, slides: int, place: str) -> str:
    """In words, with the overrides to paste."""
    named = " or ".join(target_name(target) for target in dropped)
    if not usable or len(dropped) == len(sampler.weights):
        return f"none of {slides} slides can serve {named} um/px, and {place}.mpps has no other: the log says what they can"
    rest = without(sampler, dropped)
    drop = f"{place}.unservable=drop goes on without it, whatever the slides are"
    if rest is None:
        return f"none of {usable} slides can serve {named} um/px: {drop}"
    mpps, weights = (",".join(f"{value:g}" for value in values) for values in (rest.mpps, rest.weights))
    taken = f"take it out with {place}.mpps=[{mpps}] {place}.weights=[{weights}]"
    return f"none of {usable} slides can serve {named} um/px: {taken}, or {drop}"


def _epoch_visits(budget: int | None, global_batch: int, per_slot: int) -> int | None:
    """Visits a lane in one epoch of a patch budget. Raises ValueError, naming its neighbours, for one that does not come out."""
    if budget is None:
        return None
    unit = global_batch * per_slot
    if budget < unit or budget % unit:
        low = budget // unit * unit
        nearest = " and ".join(str(p) for p in (low, low + unit) if p)
        raise ValueError(
            f"sampler.patch_budget is {budget}: expected a multiple of batch x lanes x grid^2 = {unit}; the nearest are {nearest}"
        )
    return budget // unit
