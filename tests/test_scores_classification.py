"""Scores among classes: golden values, scikit-learn, and what absent classes do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from histoscale.eval.scores.classification import auroc_one_vs_rest, balanced_accuracy, confusion, log_loss, macro_f1, recalls

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


def test_a_class_that_is_only_predicted_does_not_enter() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 2, 1, 0, 3])
    assert balanced_accuracy(labels, predicted, 4) == pytest.approx(0.722222, abs=1e-6)  # torchmetrics says 0.541667
    assert np.isnan(recalls(labels, predicted, 4)[2])


@settings(deadline=None)
@given(PAIRS)
def test_decisions_agree_with_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    labels, predicted = np.array(pairs).T
    present = sorted(set(labels))
    expected = metrics.recall_score(labels, predicted, labels=present, average="macro", zero_division=0)
    assert balanced_accuracy(labels, predicted, 4) == pytest.approx(expected)
    expected = metrics.f1_score(labels, predicted, labels=present, average="macro", zero_division=0)
    assert macro_f1(labels, predicted, 4) == pytest.approx(expected)
    assert (confusion(labels, predicted, 4) == metrics.confusion_matrix(labels, predicted, labels=range(4))).all()


def test_ranks_and_likelihoods_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 4, 200), rng.dirichlet(np.ones(4), 200).round(2) + 1e-3
    scores /= scores.sum(1, keepdims=True)
    expected = metrics.roc_auc_score(labels, scores, multi_class="ovr", average="macro")
    assert auroc_one_vs_rest(scores, labels) == pytest.approx(expected)
    assert log_loss(np.log(scores), labels) == pytest.approx(metrics.log_loss(labels, scores))
    assert np.isnan(auroc_one_vs_rest(scores, np.zeros(200, int)))
    some = labels < 3  # class 3 absent: the mean is over the others, not NaN
    expected = np.mean([metrics.roc_auc_score(labels[some] == c, scores[some, c]) for c in range(3)])
    assert auroc_one_vs_rest(scores[some], labels[some]) == pytest.approx(expected)
