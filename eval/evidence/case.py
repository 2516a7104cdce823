"""What is known of one slide when its page is written, and what its page measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from histoscale.data.readers.pyramid import Reader
from histoscale.eval.annotations import Annotations
from histoscale.eval.artefacts import ArtefactConfig
from histoscale.eval.evidence.display import DISPLAYS
from histoscale.eval.mil.faithfulness import DeletionConfig


@dataclass(frozen=True)
class EvidenceConfig:
    """slides: how many get a page, chosen by `seed` and never by their score; null: all.

    picture_px: longer side of the page's picture; pyramid_px: at most that of the OME-TIFF's base; quality: of JPEGs; opacity:
    of the colours over the tissue at first. display: `relative`, `rank` or `global` (eval/evidence/display.py). top: share of
    the tiles that count as most attended. patches: how many of the most and of the least attended are shown, patch_px: their
    side. sample: tiles that artefacts are estimated from, of the most attended and of all. exclude: groups of annotations that
    are cut out.
    """

    slides: int | None
    seed: int
    picture_px: int
    pyramid_px: int
    quality: int
    opacity: float
    display: str
    top: float
    patches: int
    patch_px: int
    sample: int
    exclude: list[str]
    artefacts: ArtefactConfig
    deletion: DeletionConfig

    def __post_init__(self) -> None:
        if self.display not in DISPLAYS:
            raise ValueError(f"evidence.display is {self.display!r}: expected {', '.join(DISPLAYS)}")
        if not (0 < self.top < 1 and 0 < self.opacity <= 1):
            raise ValueError(f"evidence.top is {self.top} and evidence.opacity {self.opacity}: expected shares between 0 and 1")


@dataclass(frozen=True)
class Finding:
    """What the model says, in words for a second reader. value: the number that the slides are listed by. output: such as
    "probability of tumour 0.934". rule: what the threshold is and how it was set; "" where the task has none. flagged: for
    review; None where the task flags nothing. side: +1 where the logit that the maps explain speaks for the output, -1 against
    it. sweeping: `every` or `no` where the rule gives all slides one answer, so that the flag says nothing of this one."""

    value: float
    output: str
    rule: str
    flagged: bool | None
    side: float
    sweeping: str = ""


@dataclass(frozen=True)
class Case:
    """One slide.

    facts: what the page says openly (patient, site, part); hidden: what the manifest says of the label, folded away so that the
    second reader can be asked first. coords: int64 [n, 2] level-0 corners; size_px: level-0 side. attention, contribution:
    float64 [n]; occlusion: how far the logit drops when the tile is left out, or None where it was not computed. explained: the
    output that contribution and logit belong to. features: reads [n, D]; logit: features of some tiles -> that output's logit.
    reader, mpp: of level 0; None without slides: then only the raw files are written. annotations: None where nobody drew any.
    """

    slide_id: str
    patient: str
    facts: Mapping[str, str]
    hidden: Mapping[str, str]
    finding: Finding
    explained: str
    coords: np.ndarray
    size_px: int
    attention: np.ndarray
    contribution: np.ndarray
    occlusion: np.ndarray | None
    features: Callable[[], np.ndarray]
    logit: Callable[[np.ndarray], float]
    reader: Reader | None
    mpp: float
    annotations: Annotations | None

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Every number a tile has, by name; all but attention are above 0 where they support the output."""
        found = {"attention": self.attention, "contribution": self.contribution}
        return found if self.occlusion is None else {**found, "occlusion": self.occlusion}

    def top(self, share: float) -> np.ndarray:
        """Rows of the most attended tiles: that share of them, at least one, by falling attention."""
        return (-self.attention).argsort(kind="stable")[: max(1, round(share * len(self.attention)))]


@dataclass(frozen=True)
class Measured:
    """The measures of one slide's page, as `summary.json` and the index hold them.

    artefacts: kind -> (share of the most attended tiles, share of all); None without slides. overlap: map -> area AUROC against
    the annotations, and `pointing`: whether the most attended tile meets them; None without annotations that any tile meets.
    gains: order -> deletion gain in logits; above: order -> share of random orders that it beats. picture: the overlay's name
    below the folder; "" without slides. unread: why a slide that was there has no page, else "".
    """

    slide_id: str
    patient: str
    tiles: int
    finding: Finding
    artefacts: dict[str, tuple[float, float]] | None
    overlap: dict[str, float] | None
    gains: dict[str, float]
    above: dict[str, float]
    picture: str
    unread: str

    def as_dict(self) -> dict[str, Any]:
        finding = {"value": self.finding.value, "flagged": self.finding.flagged, "sweeping": self.finding.sweeping}
        artefacts = None if self.artefacts is None else {k: {"top": t, "all": a} for k, (t, a) in self.artefacts.items()}
        found = {"tiles": self.tiles, **finding, "artefacts": artefacts, "overlap": self.overlap, "deletion_gain": self.gains}
        return {**found, "beats_random": self.above, "picture": self.picture, "unread": self.unread}
