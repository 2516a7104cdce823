"""What every number must beat: an untrained encoder of the same architecture, and the colours of the patch.

Where a floor is the better of several (pooling, classifier), the better is taken on the very rows that are reported: that
favours the floor, so a difference to it is never flattered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.eval.scores.interval import Statistic

FLOOR_POOLS = ("cls", "cls+mean")


@dataclass(frozen=True)
class FloorsConfig:
    """initialisations: how many untrained encoders the `random` floor averages. trees, leaf: of the colour forest. rows: at
    most so many are drawn for what is fitted on colour beside the probes."""

    initialisations: int
    trees: int
    leaf: int
    rows: int
    seed: int


@dataclass(frozen=True)
class Calls:
    """Decisions of R equal probes on the same rows. logs: [R, n, K] of log-probabilities. how: pooling or classifier."""

    logs: np.ndarray
    how: str

    @property
    def predicted(self) -> np.ndarray:
        """[R, n]: the class with the highest probability, the lowest index among equals."""
        return self.logs.argmax(axis=2)

    def each(self) -> list["Calls"]:
        return [Calls(logs[None], self.how) for logs in self.logs]

    def balanced_accuracy(self, labels: np.ndarray) -> float:
        """Mean over the R probes; labels: [n]."""
        return self.statistic(labels)(np.arange(len(labels)))

    def statistic(self, labels: np.ndarray) -> Statistic:
        """Balanced accuracy of drawn rows, meaned over the R probes: that of `scores`, with what repeats taken out."""
        classes = self.logs.shape[2]
        hits = (self.predicted == labels).astype(np.float64)

        def value(rows: np.ndarray) -> float:
            drawn = labels[rows]
            total = np.bincount(drawn, minlength=classes)
            present = total > 0
            right = [np.bincount(drawn, weights=hit[rows], minlength=classes) for hit in hits]
            return float(np.mean([(count[present] / total[present]).mean() for count in right]))

        return value


def better(candidates: Sequence[Calls], labels: np.ndarray) -> Calls:
    """The candidate with the highest balanced accuracy; the first among equals."""
    return max(candidates, key=lambda calls: calls.balanced_accuracy(labels))


def plain_log_probabilities(
    train: np.ndarray, labels: np.ndarray, classes: int, queries: Sequence[np.ndarray], config: FloorsConfig
) -> list[np.ndarray]:
    """scikit-learn's logistic regression as it comes, on standardised numbers; as `forest_log_probabilities`."""
    from sklearn.linear_model import LogisticRegression  # a second of imports, which no other use of this file needs
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, labels = _drawn(train, labels, config)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(train, labels)
    found = []
    for rows in queries:
        logs = np.full((len(rows), classes), np.log(np.finfo(float).tiny))
        logs[:, model.classes_] = model.predict_log_proba(rows)
        found.append(logs)
    return found


def forest_log_probabilities(
    train: np.ndarray, labels: np.ndarray, classes: int, queries: Sequence[np.ndarray], config: FloorsConfig
) -> list[np.ndarray]:
    """A random forest on a few numbers a patch: log of the mean leaf shares, [m, classes] for each of the queries."""
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(config.trees, min_samples_leaf=config.leaf, random_state=config.seed, n_jobs=1)
    forest.fit(*_drawn(train, labels, config))
    found = []
    for rows in queries:
        shares = np.zeros((len(rows), classes))
        shares[:, forest.classes_] = forest.predict_proba(rows)
        with np.errstate(divide="ignore"):
            found.append(np.log(shares))
    return found


def _drawn(train: np.ndarray, labels: np.ndarray, config: FloorsConfig) -> tuple[np.ndarray, np.ndarray]:
    """At most `config.rows` rows, drawn by seed: classifiers of 42 numbers learn little from more."""
    if len(train) <= config.rows:
        return train, labels
    rows = np.sort(np.random.default_rng(config.seed).permutation(len(train))[: config.rows])
    return train[rows], labels[rows]
