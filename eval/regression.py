"""HEST's probe: standardise, 256 principal components, ridge without intercept, Pearson gene by gene. Nothing is chosen.

mahmoodlab/HEST:src/hest/bench (benchmark.py, trainer.py); arXiv 2406.16192. The ridge is solved in closed form: principal
components are orthogonal, so each coefficient is its own division.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.decomposition import PCA

from histoscale.eval.datasets.spots import LabelledSpots
from histoscale.eval.probe import Standard
from histoscale.eval.results import Score
from histoscale.eval.scores.correlation import Sums, pearson
from histoscale.eval.scores.interval import Interval, IntervalConfig, Statistic, paired_difference, patient_bootstrap


@dataclass(frozen=True)
class RegressionConfig:
    """components: of PCA at most. strength: the ridge penalty times components times genes (100: alpha = 100 / (256 · 50)).

    basis: `exact` (eigenvectors of the covariance), or `published` (scikit-learn's own choice, randomised for most encoders, with
    `seed`).
    """

    components: int
    strength: float
    basis: str
    seed: int


class RegressionError(ValueError):
    """A regression that has no score; the message names the gene and the split."""


@dataclass(frozen=True)
class Embedded:
    """Features of one row of the table. features: R equal encoders (5 initialisations of a floor, else 1), each float [n, D].

    The other fields go into its scores as they are.
    """

    encoder: str
    embedding: str
    resolution: str
    features: Sequence[np.ndarray]
    effective_mpp: float | None
    field_um: float | None
    floor: bool


@dataclass(frozen=True)
class Fitted:
    """One task by one encoder. values: float64 [splits, G], Pearson of every gene on the test spots of every split.

    sums: the same by group, one a split; groups of a split are the places of their names in `owners`.
    """

    values: np.ndarray
    sums: tuple[Sums, ...]

    @property
    def by_split(self) -> np.ndarray:
        """float64 [splits]: mean over genes."""
        return self.values.mean(axis=1)

    @property
    def value(self) -> float:
        """Mean over splits of the mean over genes."""
        return float(self.by_split.mean())


def run_hest(
    embedded: Sequence[Embedded], spots: LabelledSpots, config: RegressionConfig, interval: IntervalConfig
) -> list[Score]:
    """Scores of one task, one for each of `embedded`, then differences: every encoder that is no floor less every other row.

    Intervals draw whole groups (patients where they are known), which re-weighs the test spots of fixed fits; a split of which
    nobody was drawn is left out of that replicate. Under 10 groups they are withheld in words, with the number.
    Raises RegressionError: a gene or its prediction does not vary on the test spots of a split.
    """
    owners = np.unique(spots.patients)
    fitted = [[fit_task(features, spots, owners, config) for features in one.features] for one in embedded]
    units = _Units.of(fitted[0][0], owners)
    statistics = [units.statistic(runs) for runs in fitted]
    spots_tested = int(sum(len(spots.rows(test)) for _, test in spots.splits))
    found = []
    for one, runs, statistic in zip(embedded, fitted, statistics, strict=True):
        splits = np.mean([run.by_split for run in runs], axis=0)
        note = f"{len(splits)} splits, SD {splits.std():.3f} (ddof 0)"
        value = replace(patient_bootstrap(statistic, units.owners.tolist(), interval), units=spots_tested)
        values = [run.value for run in runs]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        found.append(_score(one, spots, value, len(runs), spread, "", note))
    for i, one in enumerate(embedded):
        for j, other in enumerate(embedded):
            if i != j and not one.floor:
                value = paired_difference(statistics[i], statistics[j], units.owners.tolist(), interval)
                minus = f"{other.encoder} {other.embedding} {other.resolution}".strip()
                found.append(_score(one, spots, replace(value, units=spots_tested), len(fitted[i]), None, minus, ""))
    return found


def average(scores: Sequence[Score], tasks: Sequence[str]) -> list[Score]:
    """The published average: the mean of the tasks' scores (not of differences), for every row that has all of `tasks`.

    Its interval is withheld: patients are inside tasks, and most tasks have too few.
    """
    wanted = [f"hest/{task}" for task in tasks]
    rows: dict[tuple[str, str, str], dict[str, Score]] = {}
    for score in scores:
        if not score.minus:
            rows.setdefault((score.encoder, score.embedding, score.resolution), {})[score.dataset] = score
    found = []
    for held in rows.values():
        if all(name in held for name in wanted):
            parts = [held[name] for name in wanted]
            patients, units = sum(part.interval.patients for part in parts), sum(part.interval.units for part in parts)
            mean = float(np.mean([part.interval.value for part in parts]))
            why = f"interval withheld: a mean of {len(wanted)} tasks, whose own intervals stand beside them"
            value = Interval(mean, None, None, patients, units, why)
            found.append(replace(parts[0], dataset="hest", interval=value, spread=None, note=f"mean of {', '.join(tasks)}"))
    return found


def fit_task(features: np.ndarray, spots: LabelledSpots, owners: np.ndarray, config: RegressionConfig) -> Fitted:
    """The probe on every published split. features: [n, D]; owners: sorted distinct names of the groups."""
    values, sums = [], []
    for number, (train, test) in enumerate(spots.splits):
        fitting, held = spots.rows(train), spots.rows(test)
        predicted = fit_ridge(features[fitting], spots.targets[fitting], features[held], config)
        target = spots.targets[held]
        _check_varying(predicted, target, spots, number)
        values.append(pearson(predicted, target))
        sums.append(Sums.of(predicted, target, np.searchsorted(owners, spots.patients[held]), len(owners)))
    return Fitted(np.stack(values), tuple(sums))


def fit_ridge(train: np.ndarray, targets: np.ndarray, queries: np.ndarray, config: RegressionConfig) -> np.ndarray:
    """Predictions float64 [m, G] for queries [m, D], from train [n, D] and targets [n, G].

    Standardised by train, projected on its principal components (p = `components`, fewer where n or D is smaller), ridge with
    alpha = strength / (p · G) and no intercept. Raises ValueError for an unknown basis.
    """
    standard = Standard.of(train)
    x, asked = standard(train), standard(queries)
    width = min(config.components, *x.shape)
    scores, components = principal_components(x, width, config)
    alpha = config.strength / (width * targets.shape[1])
    if config.basis == "exact":
        coefficients = (scores.T @ targets) / ((scores**2).sum(axis=0) + alpha)[:, None]
    else:  # randomised components are orthogonal only nearly
        coefficients = np.linalg.solve(scores.T @ scores + alpha * np.eye(width), scores.T @ targets)
    return asked @ components @ coefficients


def principal_components(x: np.ndarray, width: int, config: RegressionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n, width] of centred x [n, D] and the first `width` principal directions [D, width], orthonormal columns.

    The published basis fits on what PCA.fit_transform gives, which with a randomised solver is not quite x times the directions.
    """
    if config.basis == "published":
        pca = PCA(width, random_state=config.seed)
        return pca.fit_transform(x), pca.components_.T
    if config.basis != "exact":
        raise ValueError(f"regression.basis is {config.basis!r}: expected exact or published")
    if x.shape[1] <= x.shape[0]:
        directions = np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :width]
        return x @ directions, directions
    values, vectors = np.linalg.eigh(x @ x.T)
    values, vectors = values[::-1][:width], vectors[:, ::-1][:, :width]
    real = values > 1e-10 * values[0]  # centred rows have rank n - 1: the rest is rounding
    directions = np.where(real, x.T @ vectors / np.sqrt(np.where(real, values, 1)), 0)
    return x @ directions, directions


@dataclass(frozen=True)
class _Units:
    """What a bootstrap draws from: every group once for each split that tests it. owners: a name a unit."""

    owners: np.ndarray
    split: np.ndarray
    group: np.ndarray

    @staticmethod
    def of(fitted: Fitted, owners: np.ndarray) -> "_Units":
        pairs = np.array([(s, g) for s, sums in enumerate(fitted.sums) for g in np.flatnonzero(sums.n)])
        return _Units(owners[pairs[:, 1]], pairs[:, 0], pairs[:, 1])

    def statistic(self, runs: Sequence[Fitted]) -> Statistic:
        def value(rows: np.ndarray) -> float:
            split, group = self.split[rows], self.group[rows]
            means = [np.mean([run.sums[s].correlation(group[split == s]).mean() for s in np.unique(split)]) for run in runs]
            return float(np.mean(means))

        return value


def _check_varying(predicted: np.ndarray, target: np.ndarray, spots: LabelledSpots, split: int) -> None:
    for what, values in (("expression", target), ("prediction", predicted)):
        flat = np.flatnonzero((values == values[:1]).all(axis=0))
        if len(flat):
            raise RegressionError(
                f"the {what} of {spots.genes[flat[0]]} does not vary over the {len(target)} test spots of split {split} of "
                f"{spots.name} "
                f"({len(flat)} such genes): expected one that does, as a correlation needs, look at the expression file and "
                "the features"
            )


def _score(one: Embedded, spots: LabelledSpots, value: Interval, runs: int, spread: float | None, minus: str, note: str) -> Score:
    if not math.isfinite(value.value):
        raise RegressionError(
            f"the score of {one.encoder} on {spots.name} is {value.value}: expected a number, look at its features"
        )
    return Score(
        dataset=spots.name,
        encoder=one.encoder,
        embedding=one.embedding,
        resolution=one.resolution,
        protocol="honest",
        probe="ridge",
        role="report",
        metric="pearson",
        interval=value,
        groups=spots.groups,
        runs=runs,
        spread=spread,
        effective_mpp=one.effective_mpp,
        field_um=one.field_um,
        floor=one.floor,
        minus=minus,
        note="; ".join(text for text in (note, *spots.notes) if text),
    )
