import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.utils.class_weight import compute_sample_weight

from transfer.training import ridge
from transfer.training.ridge import fit_ridge, fit_temperature

DIGITS = load_digits()
FEATURES = DIGITS.data.astype(np.float32)  # has constant columns
LABELS = DIGITS.target
SIZES = {"fewer images than features": 50, "more images than features": 200}


def scaled(features, weights=None):
    """Features as the solver scales them."""
    features = features.astype(np.float64)
    means = np.average(features, axis=0, weights=weights)
    deviations = np.sqrt(np.average((features - means) ** 2, axis=0, weights=weights))
    return (features - means) / np.hypot(deviations, np.median(deviations[deviations > 0]))


def probabilities(solution, features):
    return softmax(features.astype(np.float64) @ solution.kernel + solution.bias, axis=-1)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_head_equals_scikit_learn(size, class_weight):
    features, labels = FEATURES[:size], LABELS[:size]
    solution = fit_ridge(features, labels, 10, penalties=[0.3], class_weight=class_weight)
    weights = None if class_weight is None else compute_sample_weight("balanced", labels)
    theirs = Ridge(solution.penalty).fit(scaled(features, weights), np.eye(10)[labels], weights)
    expected = solution.temperature * theirs.predict(scaled(features, weights))
    found = features @ solution.kernel.astype(np.float64) + solution.bias
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (solution.kernel.dtype, solution.bias.dtype) == (np.float32, np.float32)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_left_out_predictions_equal_scikit_learn(size):
    features, labels = FEATURES[:size], LABELS[:size]
    solution = fit_ridge(features, labels, 10, penalties=[0.1, 1.0])
    targets = np.eye(10)[labels]
    theirs = RidgeCV(list(solution.scores), store_cv_results=True)
    theirs.fit(scaled(features), targets)
    number = list(solution.scores).index(solution.penalty)
    squares = (targets - solution.out_of_sample / solution.temperature) ** 2
    np.testing.assert_allclose(squares, theirs.cv_results_[..., number], atol=1e-5)
    losses = -log_softmax(solution.out_of_sample, axis=-1)
    smoothing = 1 / (size + 2)
    expected = (1 - smoothing) * losses[np.arange(size), labels] + smoothing * losses.mean(-1)
    assert solution.scores[solution.penalty] == pytest.approx(expected.mean(), rel=1e-4)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("members", [3, 20])
def test_groups_are_left_out_together(size, members):
    features, labels = FEATURES[:size], LABELS[:size]
    groups = np.random.default_rng(0).permutation(size) // members + 7
    solution = fit_ridge(features, labels, 10, groups=groups, penalties=[0.5])
    theirs = cross_val_predict(
        Ridge(solution.penalty),
        scaled(features),
        np.eye(10)[labels],
        groups=groups,
        cv=LeaveOneGroupOut(),
    )
    np.testing.assert_allclose(
        solution.out_of_sample, solution.temperature * theirs, atol=1e-4 * solution.temperature
    )


def test_weights_act_as_repeated_groups():
    repeats = np.where(LABELS[:100] < 3, 2, 1)
    features, labels = (np.repeat(values[:100], repeats, axis=0) for values in (FEATURES, LABELS))
    groups = np.repeat(np.arange(100), repeats)
    repeated = ridge._decompose(features, np.eye(10)[labels], np.ones(len(labels)))
    weighted = ridge._decompose(
        FEATURES[:100], np.eye(10)[LABELS[:100]], repeats.astype(np.float64)
    )
    first = np.unique(groups, return_index=True)[1]
    np.testing.assert_allclose(
        weighted.left_out(30.0, []),
        repeated.left_out(30.0, ridge._members(groups))[first],
        atol=1e-4,
    )


def test_penalty_has_the_lowest_log_loss():
    solution = fit_ridge(FEATURES[:300], LABELS[:300], 10)
    assert len(solution.scores) == len(ridge.GRID)
    assert min(solution.scores, key=solution.scores.get) == solution.penalty
    assert list(solution.scores).index(solution.penalty) not in (0, len(ridge.GRID) - 1)


def test_predictions_of_left_out_images_agree_with_those_of_new_images():
    order = np.random.default_rng(0).permutation(len(LABELS))  # writers come one after another
    train, new = order[:400], order[400:]
    solution = fit_ridge(FEATURES[train], LABELS[train], 10)
    found = -np.log(probabilities(solution, FEATURES[new]))
    loss = found[np.arange(len(new)), LABELS[new]].mean()
    assert loss == pytest.approx(solution.scores[solution.penalty], rel=0.3)
    accuracy = (solution.out_of_sample.argmax(-1) == LABELS[train]).mean()
    assert accuracy == pytest.approx((found.argmin(-1) == LABELS[new]).mean(), abs=0.03)


def test_temperature_equals_logistic_regression_of_one_feature():
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=2000)
    margins = labels - 0.5 + generator.standard_normal(2000)
    scores = np.stack([-margins / 2, margins / 2], axis=-1)
    factor, _ = fit_temperature(scores, labels)
    theirs = LogisticRegression(C=np.inf, fit_intercept=False).fit(margins[:, None], labels)
    assert factor == pytest.approx(theirs.coef_.item(), rel=0.01)


def test_temperature_of_separable_scores_is_finite():
    factor, loss = fit_temperature(np.eye(4)[[0, 1, 2, 3]], np.arange(4))
    assert 1 < factor < 10
    assert np.isfinite(loss)
    assert fit_temperature(np.eye(4)[[1, 2, 3, 0]], np.arange(4))[0] == 0.01


def test_single_example_per_class_uses_default_penalty():
    chosen = [np.flatnonzero(label == LABELS)[0] for label in range(10)]
    solution = fit_ridge(FEATURES[chosen], LABELS[chosen], 10)
    assert solution.scores == {}
    assert solution.out_of_sample is None
    found = probabilities(solution, FEATURES[chosen])
    np.testing.assert_array_equal(found.argmax(-1), np.arange(10))


def test_example_without_others_of_its_class_is_not_scored():
    labels = np.where(np.arange(200) == 17, 10, LABELS[:200])
    solution = fit_ridge(FEATURES[:200], labels, 11)
    np.testing.assert_array_equal(np.flatnonzero(~solution.scored), [17])


@pytest.mark.parametrize("absent", [[3], [0, 9], list(range(2, 10))])
def test_a_class_without_examples_is_never_predicted(absent):
    chosen = ~np.isin(LABELS, absent)
    solution = fit_ridge(FEATURES[chosen], LABELS[chosen], 10, penalties=[0.1])
    assert probabilities(solution, FEATURES)[:, absent].max() < 1e-9
    assert softmax(solution.out_of_sample, axis=-1)[:, absent].max() < 1e-9
    present = np.setdiff1d(np.arange(10), absent)
    relabelled = np.searchsorted(present, LABELS[chosen])
    alone = fit_ridge(FEATURES[chosen], relabelled, len(present), penalties=[0.1])
    np.testing.assert_allclose(
        probabilities(solution, FEATURES)[:, present], probabilities(alone, FEATURES), atol=1e-6
    )


def test_unusable_examples_are_refused():
    with pytest.raises(ValueError, match="1 class; a classifier needs at least 2"):
        fit_ridge(FEATURES[:5], np.zeros(5, np.int64), 10)
    with pytest.raises(ValueError, match="not finite"):
        fit_ridge(np.where(FEATURES == 5, np.nan, FEATURES), LABELS, 10)


def test_solution_is_deterministic():
    first, second = (fit_ridge(FEATURES[:90], LABELS[:90], 10) for _ in range(2))
    np.testing.assert_array_equal(first.kernel, second.kernel)
