"""Trials of a study, and what their sides must not share."""

from collections.abc import Sequence
from dataclasses import dataclass

from histoscale.data.names import patient_key, site_key, slide_key
from histoscale.data.splits import SplitError
from histoscale.eval.mil.bags import Bag

PARTS = ("train", "internal", "external")
_SHOWN = 5


@dataclass(frozen=True)
class Trial:
    """One training: rows that train, rows of sites that it knows, rows of sites that it does not."""

    name: str
    train: tuple[int, ...]
    internal: tuple[int, ...]
    external: tuple[int, ...]


@dataclass(frozen=True)
class Check:
    """A line of the leakage page. compared: what against what; found: in words; holds: nothing is shared."""

    name: str
    compared: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Plan:
    """kind: fixed, folds or sites. deployed: the trial whose model is kept. left_out: slide_id -> why it is in no trial."""

    kind: str
    trials: tuple[Trial, ...]
    deployed: int
    checks: tuple[Check, ...]
    left_out: dict[str, str]


def check_trials(rows: Sequence[Bag], trials: Sequence[Trial], unit: str) -> tuple[Check, ...]:
    """What was compared between the sides of the trials. Raises SplitError: a slide or a patient on two sides of a trial, a site
    inside and outside, an external slide without a site."""
    sides = f"train, internal and external of {len(trials)} trial{'s' * (len(trials) > 1)}"
    slides = [slide_key(row.slide_id) for row in rows]
    patients = [patient_key(row.group) if unit == "patient" else _barcode(row) for row in rows]
    for trial in trials:
        _refuse_shared(trial, slides, "slides", rows)
        _refuse_shared(trial, patients, "patients", rows)
        if trial.external:
            _refuse_site(trial, rows)
    used = sorted({i for trial in trials for i in (*trial.train, *trial.internal, *trial.external)})
    how = "slide ids, without suffixes and with TCGA barcodes without the file's UUID"
    checks = [Check("slides", f"{sides}: {how}", f"none of {len({slides[i] for i in used})} on two sides", True)]
    nameless = sum(not patients[i] for i in used)
    how = "patient ids, of TCGA barcodes the first three fields" if unit == "patient" else "the patients in TCGA barcodes"
    people = len({patients[i] for i in used} - {""})
    found = f"none of {people} on two sides{'; every slide has a patient of its own' * (people == len(used))}"
    if nameless:
        found = f"unknown of {nameless} of {len(used)} slides: those of one patient may stand on two sides"
    checks.append(Check("patients", f"{sides}: {how}", found, not nameless))
    held = sorted({rows[i].site for trial in trials for i in trial.external})
    if held:
        inside = {i for trial in trials if trial.external for i in (*trial.train, *trial.internal)}
        nameless = sum(not rows[i].site for i in inside)
        unknown = f"; the site of {nameless} of {len(inside)} slides inside is not known" if nameless else ""
        found = f"none shared ({some(held)}){unknown}"
        checks.append(Check("sites", "external sites against train and internal", found, not nameless))
    return (*checks, *_internal_sites(rows, trials))


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _internal_sites(rows: Sequence[Bag], trials: Sequence[Trial]) -> list[Check]:
    """Internal means: of sites that the model knows."""
    strange: dict[int, str] = {}
    for trial in trials:
        known = {rows[i].site for i in trial.train}
        strange |= {i: rows[i].site for i in trial.internal if rows[i].site and rows[i].site not in known}
    total = len({i for trial in trials for i in trial.internal})
    if not any(rows[i].site for trial in trials for i in trial.internal):
        return []
    found = "every internal slide is of a site that trains"
    if strange:
        found = (
            f"{len(strange)} of {total} internal slides are of sites that do not train ({some(sorted(set(strange.values())))})"
        )
    return [Check("internal sites", "sites of internal slides against those of train", found, not strange)]


def _refuse_shared(trial: Trial, names: Sequence[str], what: str, rows: Sequence[Bag]) -> None:
    owner: dict[str, tuple[str, int]] = {}
    shared = []
    for part in PARTS:
        for i in getattr(trial, part):
            first, before = owner.setdefault(names[i], (part, i))
            if names[i] and first != part:
                shared.append(f"{rows[before].slide_id} in {first} and {rows[i].slide_id} in {part}")
    if shared:
        one = {"slides": "one slide", "patients": "one patient"}[what]
        raise SplitError(
            f"the trial {trial.name} tears {len(shared)} {what} apart ({some(shared)} are {one}): {one} belongs to one part; "
            "correct the split's column, or the ids"
        )


def _refuse_site(trial: Trial, rows: Sequence[Bag]) -> None:
    outside = {rows[i].site for i in trial.external}
    if "" in outside:
        nameless = [rows[i].slide_id for i in trial.external if not rows[i].site]
        raise SplitError(
            f"{len(nameless)} external slides have no site ({some(nameless)}), so no external claim can be made: "
            "fill the manifest's site column"
        )
    inside = {rows[i].site for i in (*trial.train, *trial.internal)}
    shared = {site_key(site) for site in outside} & {site_key(site) for site in inside} - {""}
    both = sorted(site for site in outside | inside if site_key(site) in shared)
    if both:
        raise SplitError(
            f"the trial {trial.name} has the sites {some(both)} inside and outside: an external site is never trained on; name "
            "whole sites external"
        )


def _barcode(row: Bag) -> str:
    """The patient that a TCGA barcode names, or ""."""
    found = patient_key(row.slide_id)
    return found if found.startswith("TCGA-") else ""
