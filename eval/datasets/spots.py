"""Patches around spots of spatial transcriptomics, with the expression of genes as targets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.eval.datasets.patches import DatasetError, LabelledPatches, Reading, Usage

# Nothing is chosen: a fixed probe on the published splits.
USAGE = Usage(choose="folds", eva_select="report", eva_report=("report",), positive=None)


@dataclass(frozen=True)
class LabelledSpots:
    """n patches of size_px at mpp. targets: float64 [n, G], log1p of the raw counts of `genes`. slide_ids: [n], the sample.

    splits: (train samples, test samples) of each published split. patients, groups: what an interval resamples and what that is
    (`patient`, or `slide` where nobody said whose the samples are). hash: of everything that makes the pixels and targets.
    """

    name: str
    genes: tuple[str, ...]
    targets: np.ndarray
    patients: np.ndarray
    slide_ids: np.ndarray
    groups: str
    splits: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    mpp: float
    size_px: int
    hash: str
    read: Reading
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def rows(self, samples: Sequence[str]) -> np.ndarray:
        """int64 [m]: the rows of the samples, in the order of the set."""
        return np.flatnonzero(np.isin(self.slide_ids, list(samples)))

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, Sequence[np.ndarray] | np.ndarray]]:
        """(rows [b], pixels uint8 [b, 3, S, S]) in order, at most `size` at once."""
        yield from self.as_patches().batches(size)

    def as_patches(self) -> LabelledPatches:
        """The same patches without their targets, for whatever embeds patches: one class, no role."""
        nothing = np.full(len(self), "")
        return LabelledPatches(
            name=self.name,
            classes=("spot",),
            labels=np.zeros(len(self), np.int64),
            roles=nothing,
            patients=self.patients,
            sites=nothing,
            groups=self.groups,
            mpp=self.mpp,
            size_px=self.size_px,
            hash=self.hash,
            read=self.read,
            blocks=self.patients,
            slide_ids=self.slide_ids,
            usage=USAGE,
            notes=self.notes,
        )


def check_splits(spots: LabelledSpots) -> None:
    """Raises DatasetError where a split is empty on a side, or a sample or a patient stands on both sides of one."""
    of_sample = dict(zip(spots.slide_ids.tolist(), spots.patients.tolist(), strict=True))
    for number, (train, test) in enumerate(spots.splits):
        if not train or not test:
            raise DatasetError(
                f"split {number} of {spots.name} has {len(train)} train and {len(test)} test samples: expected some of both"
            )
        owners = [{of_sample[sample] for sample in side} for side in (train, test)]
        for kind, both in (("sample", sorted({*train} & {*test})), (spots.groups, sorted(owners[0] & owners[1]))):
            if both:
                raise DatasetError(
                    f"the {kind} {both[0]} stands on both sides of split {number} of {spots.name}: expected one side, fetch "
                    "the splits again"
                )
