import warnings

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from transfer.training import logistic_regression
from transfer.training.logistic_regression import fit_logistic_regression

DIGITS = load_digits()
FEATURES = DIGITS.data.astype(np.float32)  # has constant columns
LABELS = DIGITS.target


def probabilities(solution, features):
    return softmax(features.astype(np.float64) @ solution.kernel + solution.bias, axis=-1)


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_head_equals_scikit_learn(num_classes, class_weight):
    chosen = (num_classes > LABELS) & ((LABELS > 0) | (np.arange(len(LABELS)) % 4 == 0))
    features, labels = FEATURES[chosen], LABELS[chosen]
    solution = fit_logistic_regression(
        features, labels, num_classes, C=0.1, class_weight=class_weight
    )
    theirs = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.1, class_weight=class_weight, max_iter=1000)
    ).fit(features, labels)
    np.testing.assert_allclose(
        probabilities(solution, features), theirs.predict_proba(features), atol=2e-4
    )
    assert solution.converged
    assert (solution.kernel.dtype, solution.bias.dtype) == (np.float32, np.float32)
    assert solution.scores == {}


@pytest.mark.slow
def test_cross_validation_selects_lowest_loss():
    solution = fit_logistic_regression(FEATURES, LABELS, 10)
    assert len(solution.scores) == len(logistic_regression.GRID)
    assert min(solution.scores, key=solution.scores.get) == solution.penalty
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    for penalty, loss in list(solution.scores.items())[1:6:2]:
        # A fold has two thirds of the examples.
        theirs = make_pipeline(
            StandardScaler(), LogisticRegression(C=2 / 3 / penalty, max_iter=1000)
        )
        scores = cross_val_score(theirs, FEATURES, LABELS, cv=folds, scoring="neg_log_loss")
        assert loss == pytest.approx(-scores.mean(), rel=0.03)


def test_single_example_per_class_uses_default_penalty():
    chosen = [np.flatnonzero(label == LABELS)[0] for label in range(10)]
    solution = fit_logistic_regression(FEATURES[chosen], LABELS[chosen], 10)
    assert solution.scores == {}
    np.testing.assert_array_equal(
        probabilities(solution, FEATURES[chosen]).argmax(-1), np.arange(10)
    )


@pytest.mark.parametrize("absent", [[3], [0, 9], list(range(2, 10))])
def test_a_class_without_examples_is_never_predicted(absent):
    chosen = ~np.isin(LABELS, absent)
    solution = fit_logistic_regression(FEATURES[chosen], LABELS[chosen], 10, C=1.0)
    found = probabilities(solution, FEATURES)
    assert found[:, absent].max() < 1e-9
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000))
    theirs.fit(FEATURES[chosen], LABELS[chosen])
    present = np.setdiff1d(np.arange(10), absent)
    np.testing.assert_allclose(found[:, present], theirs.predict_proba(FEATURES), atol=2e-3)


def test_missing_convergence_is_reported_without_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = fit_logistic_regression(FEATURES, LABELS, 10, C=1.0, max_iter=3)
    assert not solution.converged
    assert solution.num_iterations == 3


def test_single_class_is_refused():
    with pytest.raises(ValueError, match="1 class; a classifier needs at least 2"):
        fit_logistic_regression(FEATURES[:5], np.zeros(5, np.int64), 10)


def test_solution_becomes_a_head_with_the_same_logits():
    generator = np.random.default_rng(0)
    features = generator.standard_normal((30, 5)).astype(np.float32)
    labels = np.repeat([0, 1, 2], 10)
    solution = fit_logistic_regression(features, labels, 3, C=1.0)
    head = solution.to_head(name="solved")
    expected = features @ solution.kernel + solution.bias
    np.testing.assert_allclose(head(features), expected, rtol=1e-4, atol=1e-5)
    assert head.name == "solved"
