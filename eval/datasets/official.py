"""What a public set is held to: the parts and the pixel size that it was published with, and its counts."""

from collections.abc import Mapping, Sequence

from histoscale.eval.datasets.patches import DatasetConfig, DatasetError

COUNTS = ("official", "any")


def check_config(
    config: DatasetConfig, train: str, report: str, mpp: float | None = None, tasks: Sequence[str | None] = (None,)
) -> None:
    """A public set comes with its own parts: keys that say otherwise would be read and do nothing, so they are refused.

    train, report: its own names of the parts. mpp: as published, None where that is not established and the configuration says
    it. tasks: what dataset.task may be. Raises DatasetError.
    """
    if config.counts not in COUNTS:
        raise DatasetError(f"dataset.counts is {config.counts!r}: expected {' or '.join(COUNTS)}")
    if (config.train, config.report, config.external) != (train, report, None):
        raise DatasetError(
            f"dataset.train, .report and .external are {config.train}, {config.report} and {config.external or 'null'}: "
            f"{config.name} "
            f"has the published parts {train}, {report} and null, leave them as dataset={config.name} sets them"
        )
    if mpp is not None and config.mpp != mpp:
        raise DatasetError(f"dataset.mpp is {config.mpp}: {config.name} was published at {mpp} µm/px, leave it at that")
    if config.task not in tasks:
        listed = ", ".join(task or "null" for task in tasks)
        raise DatasetError(
            f"dataset.task is {config.task or 'null'}: {config.name} takes {listed}, set dataset.task= to one of them"
        )


def check_counts(config: DatasetConfig, found: Mapping[str, int], expected: Mapping[str, int]) -> tuple[str, ...]:
    """The notes that the counts deserve: none where every place holds what was published.

    found, expected: a place of the set (`train/0_N`) -> its number of images.
    Raises DatasetError where a place is empty, or with counts=official where a count differs; it names the first such place.
    """
    empty = [place for place in expected if not found.get(place)]
    if empty:
        raise DatasetError(
            f"{empty[0]} holds no images of {config.name}: expected {expected[empty[0]]}, fetch the set again and keep its layout"
        )
    differing = [place for place in expected if found[place] != expected[place]]
    if not differing:
        return ()
    if config.counts == "official":
        place = differing[0]
        more = f" ({len(differing) - 1} more counts differ)" if len(differing) > 1 else ""
        raise DatasetError(
            f"{place} holds {found[place]} images of {config.name}: expected {expected[place]}{more}, fetch the set again, or "
            "set "
            "dataset.counts=any to score a part and have every result say so"
        )
    listed = ", ".join(f"{place} {found[place]} of {expected[place]}" for place in differing[:3])
    return (f"a part of {config.name} (dataset.counts=any): {listed}{', …' if len(differing) > 3 else ''}",)


def named(name: str, notes: Sequence[str]) -> str:
    """The name that results carry: `bracs`, or `bracs (part)`, which no published number is compared with."""
    return f"{name} (part)" if any(note.startswith("a part of ") for note in notes) else name
