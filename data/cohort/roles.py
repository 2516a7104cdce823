"""Who is in the cohort: patients with fixed roles, slides with their labels, all from the seed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from histoscale.data.cohort.fields import generator
from histoscale.data.keys import key, unit

ROLES = ("train", "monitor", "test", "external")
STRATA = {"micro": (0.001, 0.01), "small": (0.01, 0.05), "macro": (0.05, 0.20)}  # share of the tissue that is tumour
_STRATUM_SHARE = (0.30, 0.35, 0.35)


@dataclass(frozen=True)
class SiteConfig:
    """A site: level-0 resolution, objective, and how many patients of each role it has. Only a site whose patients are all
    `external` is an external one: its stain and scanner are a stranger's."""

    name: str
    mpp: float
    objective: int
    train: int
    monitor: int
    test: int
    external: int

    @property
    def patients(self) -> int:
        return self.train + self.monitor + self.test + self.external

    @property
    def stranger(self) -> bool:
        return self.external == self.patients


@dataclass(frozen=True)
class SlideSpec:
    """One slide before it is drawn. kind: `panel` (all four matched tissues, for tile tasks; no slide label) or `case` (tissue
    as it comes,
    with the slide label). tumour_share: wanted share of the tissue, 0 without tumour. fine: tumour nuclei show nucleoli (None:
    no label)."""

    index: int
    slide_id: str
    patient: int
    patient_id: str
    site: int
    role: str
    kind: str
    tumour: bool | None
    stratum: str
    tumour_share: float
    foci: int
    mimic: bool
    fine: bool | None
    coin: bool
    key: int


def draw_slides(seed: int, sites: list[SiteConfig], panels: int, cases: int, prevalence: float, rho: float) -> list[SlideSpec]:
    """All slides of the cohort, patient by patient.

    Roles: the patients of a site in the order of their keys, so counts are exact. Positives, mimics and strata are dealt out in
    the
    same way inside each site and role, so the label says nothing about them; rho in [0, 1] shifts prevalence from site to site.
    Raises ValueError for counts, prevalence or rho outside their range.
    """
    if not 0 <= prevalence <= 1 or not 0 <= rho <= 1:
        raise ValueError(f"cohort.prevalence is {prevalence} and cohort.rho is {rho}: expected both in [0, 1]")
    if min(panels, cases) < 0 or panels + cases == 0:
        raise ValueError(f"cohort.panels is {panels} and cohort.cases is {cases}: expected at least one slide a patient")
    slides: list[SlideSpec] = []
    first = 0
    for s, site in enumerate(sites):
        patients = sorted(range(first, first + site.patients), key=lambda p: key(seed, "cohort/role", p))
        first += site.patients
        share = min(max(prevalence + rho * (0.45 if s % 2 else -0.45), 0.0), 1.0)
        counts = (site.train, site.monitor, site.test, site.external)
        for role, start, count in zip(ROLES, np.cumsum([0, *counts]), counts, strict=False):
            members = patients[start : start + count]
            positives = _dealt(count * cases, share, key(seed, "cohort/positive", s, ROLES.index(role)))
            mimics = {label: _alternate(key(seed, "cohort/mimic", s, ROLES.index(role), int(label))) for label in (True, False)}
            for rank, patient in enumerate(members):
                for number in range(panels + cases):
                    case = number - panels
                    tumour = bool(positives[rank * cases + case]) if case >= 0 else None
                    k = key(seed, "cohort/slide", patient, number)
                    draws = [unit(key(k, "cohort/label", i)) for i in range(5)]
                    stratum = list(STRATA)[int(np.searchsorted(np.cumsum(_STRATUM_SHARE)[:2], draws[0]))] if tumour else ""
                    low, high = STRATA.get(stratum, (1.0, 1.0))
                    slides.append(SlideSpec(
                        index=0,
                        slide_id=f"p{patient:03d}-{'panel' if case < 0 else 'case'}{number if case < 0 else case}",
                        patient=patient,
                        patient_id=f"p{patient:03d}",
                        site=s,
                        role=role,
                        kind="panel" if case < 0 else "case",
                        tumour=tumour,
                        stratum=stratum,
                        tumour_share=float(low * (high / low) ** draws[1]) if tumour else 0.0,
                        foci=1 + int(draws[2] * 3) if tumour else 0,
                        mimic=next(mimics[tumour]) if tumour is not None else False,
                        fine=draws[3] < 0.5 if tumour else None,
                        coin=draws[4] < 0.5,
                        key=k,
                    ))
    slides.sort(key=lambda slide: slide.slide_id)
    return [SlideSpec(**{**vars(slide), "index": i}) for i, slide in enumerate(slides)]


def _dealt(n: int, share: float, k: int) -> np.ndarray:
    """bool [n] in keyed order with floor or ceil(n share) true, rounded by key."""
    chosen = np.zeros(n, bool)
    chosen[: int(np.floor(n * share + unit(key(k, "round"))))] = True
    return generator(k).permutation(chosen)


def _alternate(k: int) -> Iterator[bool]:
    """True and False in turn, the first by key."""
    value = bool(k & 1)
    while True:
        yield value
        value = not value
