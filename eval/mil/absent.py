"""Labelled slides that a study lacks: how many of which part and hospital, and why, to be said before anything trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from histoscale.data.manifest import Slide
from histoscale.eval.mil.bags import Bags, reasons
from histoscale.eval.mil.split import FixedSplit, FoldSplit, SiteSplit, side_of
from histoscale.eval.mil.task import Task, read_targets

_SHOWN = 6


@dataclass(frozen=True)
class Lack:
    """Of some labelled slides of the manifest: those without a usable store, and all of them."""

    absent: int
    of: int

    def __str__(self) -> str:
        return f"{self.absent} of {self.of}"


@dataclass(frozen=True)
class Absent:
    """why: slide -> why it is not in the study, though it is labelled. parts: in the order of the manifest; sites: by name.
    unfinished: whether the `embed` of these stores has not finished."""

    why: dict[str, str]
    labelled: int
    parts: dict[str, Lack]
    sites: dict[str, Lack]
    unfinished: bool

    @property
    def sentence(self) -> str:
        """How many, of which part and of which hospital, and whether more may come; "" where there is nothing to say."""
        halting = "The embed of these stores has not finished." if self.unfinished else ""
        if not self.why:
            return halting
        lead = f"{len(self.why)} of the {self.labelled} labelled slides have no usable store and are not in the study"
        return f"{lead}: by part {_counted(self.parts)}; by hospital {_counted(self.sites)}. {halting}".rstrip()

    @property
    def words(self) -> list[str]:
        """The sentence, then a line a reason with the first slides of it."""
        return [self.sentence, *(f"  {line}" for line in reasons(self.why))] if self.sentence else []

    def as_dict(self) -> dict[str, Any]:
        counts = {name: {key: {"absent": one.absent, "of": one.of} for key, one in found.items()}
                  for name, found in (("parts", self.parts), ("sites", self.sites))}  # fmt: skip
        return {"why": self.why, "labelled": self.labelled, "embed_unfinished": self.unfinished, **counts}


def absent_slides(
    bags: Bags, slides: Sequence[Slide], task: Task, split: FixedSplit | FoldSplit | SiteSplit, unfinished: bool
) -> Absent:
    """What `read_bags` and the reading of the features left out, of the slides that have a target and a part."""
    targets, _ = read_targets(slides, task)
    side = {slide.slide_id: side_of(slide.site or "", slide.labels, split) for slide in slides if slide.slide_id in targets}
    labelled = [slide for slide in slides if side.get(slide.slide_id)]
    why = {slide.slide_id: bags.left_out[slide.slide_id] for slide in labelled if slide.slide_id in bags.left_out}
    parts, sites = dict[str, list[bool]](), dict[str, list[bool]]()
    for slide in labelled:
        gone = slide.slide_id in why
        parts.setdefault(side[slide.slide_id], []).append(gone)
        sites.setdefault(slide.site or "unknown", []).append(gone)
    return Absent(why, len(labelled), _lacks(parts), _lacks(dict(sorted(sites.items()))), unfinished)


def _lacks(found: Mapping[str, Sequence[bool]]) -> dict[str, Lack]:
    return {name: Lack(sum(gone), len(gone)) for name, gone in found.items()}


def _counted(found: Mapping[str, Lack]) -> str:
    """Those with an absent slide, the most absent first."""
    order = sorted((pair for pair in found.items() if pair[1].absent), key=lambda pair: (-pair[1].absent, pair[0]))
    more = f" and {len(order) - _SHOWN} more" if len(order) > _SHOWN else ""
    return ", ".join(f"{name} {lack}" for name, lack in order[:_SHOWN]) + more
