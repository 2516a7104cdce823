"""What a run of the suite found: decisions row by row, and scores with their intervals, each saying exactly what it is of."""

from dataclasses import dataclass

import numpy as np

from histoscale.eval.scores.interval import Interval


@dataclass(frozen=True)
class Outcome:
    """What R equal probes said of n rows that they were not fitted on.

    encoder: its name, or `random`, `colour`. embedding: the pooling (`cls`, `mean`, `cls+mean`), or a classifier for a floor.
    protocol: `honest` or `eva`. probe: `linear`, `knn`, `prototype`, `few_shot/8`. role: of the rows (`outer`: each row by the
    fold that held it out). logs: float64 [R, n, K], log-probabilities. rows: int64 [n], of the data set. note: what a reader must
    know, "" for nothing; `selected on report` stands here.
    """

    encoder: str
    embedding: str
    protocol: str
    probe: str
    role: str
    logs: np.ndarray
    rows: np.ndarray
    note: str

    @property
    def predicted(self) -> np.ndarray:
        """int64 [R, n]: the class with the highest probability, the lowest index among equals."""
        return self.logs.argmax(axis=2)


@dataclass(frozen=True)
class Score:
    """One cell of a table. dataset: its name (`crc`). metric: `balanced_accuracy`, `auroc`, `macro_f1`, `dice`, `pearson`, …

    interval: over patients, or over what `groups` names. runs: how many equal probes or draws were meaned, spread: their standard
    deviation (ddof 1), None for one. effective_mpp: what the encoder really sees (µm/px), None where unknown; field_um: the side
    of what it sees. floor: whether this is one. minus: of a paired difference, the encoder that was subtracted; "" for a score.
    """

    dataset: str
    encoder: str
    embedding: str
    resolution: str
    protocol: str
    probe: str
    role: str
    metric: str
    interval: Interval
    groups: str
    runs: int
    spread: float | None
    effective_mpp: float | None
    field_um: float | None
    floor: bool
    minus: str
    note: str
