"""What was really streamed: patches by magnification, site, scanner and organ; what the pixel filter let pass; what was lost."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from histoscale.data.plan import Target, target_name
from histoscale.data.visit import Source

WARN_ACCEPTED = 0.5  # below this acceptance the pixel filter decides what the model sees


class Tally:
    """Counts by slide and target: int64 [5, slides, targets], patches served, tested, passed, repeated, and visits failed."""

    SERVED, TESTED, PASSED, REPEATED, FAILED = range(5)

    def __init__(self, source: Source, targets: Sequence[Target]) -> None:
        self.source, self.targets = source, list(targets)
        self.counts = np.zeros((5, len(source.slide_ids), len(self.targets)), np.int64)

    def serve(self, slides: np.ndarray, targets: np.ndarray) -> None:
        np.add.at(self.counts[self.SERVED], (slides, targets), 1)

    def summed(self, total: Callable[[Tensor], Tensor]) -> "Tally":
        """The same over all ranks; `total` sums a tensor over them (Ranks.sum)."""
        whole = Tally(self.source, self.targets)
        whole.counts = total(torch.from_numpy(self.counts)).numpy()
        return whole

    def totals(self) -> dict[str, int]:
        names = ("served", "tested", "passed", "repeated", "failed")
        return {name: int(n) for name, n in zip(names, self.counts.sum(axis=(1, 2)), strict=True)}

    def mix(self) -> list[dict[str, str | float | int]]:
        """The realised mpp x site x scanner x organ table: one row a combination with its patches and share. mpp: um/px, or the
        name of a range."""
        table: dict[tuple[int, str, str, str], int] = {}
        for slide, target in np.argwhere(self.counts[self.SERVED]):
            row = (int(target), *self.source.describe(int(slide)))
            table[row] = table.get(row, 0) + int(self.counts[self.SERVED, slide, target])
        every = max(1, sum(table.values()))
        names = [low if low == high else target_name((low, high)) for low, high in self.targets]
        return [
            {"mpp": names[target], "site": site, "scanner": scanner, "organ": organ, "patches": n, "share": n / every}
            for (target, site, scanner, organ), n in sorted(table.items())
        ]

    def acceptance(self) -> dict[str, dict[str, float]]:
        """Share of tested patches that the pixel filter let pass, by mpp, site and slide."""
        tested, passed = self.counts[self.TESTED], self.counts[self.PASSED]
        sites: dict[str, list[int]] = {}
        for slide in np.flatnonzero(tested.any(axis=1)):
            sites.setdefault(self.source.describe(int(slide))[0], []).append(int(slide))
        return {
            "mpp": {
                target_name(target): passed[:, i].sum() / tested[:, i].sum()
                for i, target in enumerate(self.targets)
                if tested[:, i].any()
            },
            "site": {site: passed[rows].sum() / tested[rows].sum() for site, rows in sites.items()},
            "slide": {
                self.source.slide_ids[int(row)]: passed[row].sum() / tested[row].sum()
                for row in np.flatnonzero(tested.any(axis=1))
            },
        }

    def warnings(self) -> list[str]:
        """In words: where the pixel filter refuses more than half."""
        return [
            f"the pixel filter accepts only {share:.0%} of the patches of {kind} {name or '(unknown)'}"
            for kind, shares in self.acceptance().items()
            for name, share in shares.items()
            if share < WARN_ACCEPTED
        ]

    def text(self) -> str:
        """The realised mix as lines of text."""
        lines = [f"{'um/px':>11}  {'site':<16} {'scanner':<20} {'organ':<16} {'patches':>10} {'share':>7}"]
        for row in self.mix():
            names = f"{str(row['site'])[:16]:<16} {str(row['scanner'])[:20]:<20} {str(row['organ'])[:16]:<16}"
            lines.append(f"{row['mpp']:>11}  {names} {row['patches']:>10} {row['share']:>7.1%}")
        return "\n".join(lines)
