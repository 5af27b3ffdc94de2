import numpy as np
import pytest
from sklearn.linear_model import Ridge

from transfer.core.npy_files import FileRows
from transfer.data import label_errors
from transfer.data.label_errors import find_label_errors


def clusters(num_per_class=100, num_classes=3, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), num_per_class)
    features = generator.normal(size=(len(labels), 10)).astype(np.float32)
    features[np.arange(len(labels)), labels] += 6
    return features, labels


def test_planted_errors_are_listed_first_with_their_true_class():
    features, labels = clusters()
    given, wrong = labels.copy(), [3, 150, 290]
    given[wrong] = (labels[wrong] + 1) % 3
    errors = find_label_errors(features, given)
    assert {*errors.positions[:3].tolist()} == {*wrong}
    np.testing.assert_array_equal(errors.suggestions[:3], labels[errors.positions[:3]])
    assert (errors.probabilities[:3] < 0.5).all()
    assert (errors.suggestion_probabilities[:3] > 0.5).all()
    assert 1.5 < errors.num_expected < 5


def test_list_is_bounded():
    features, labels = clusters(200)
    noisy = np.random.default_rng(1).permutation(labels)
    errors = find_label_errors(features, noisy)
    assert len(errors.positions) <= 0.02 * len(labels)
    assert (errors.probabilities <= 0.9).all()
    assert (np.diff(errors.probabilities) >= 0).all()


def test_correct_labels_are_not_listed():
    errors = find_label_errors(*clusters())
    assert len(errors.positions) == 0
    assert errors.num_expected < 1


def test_out_of_fold_scores_equal_those_of_scikit_learn():
    features, labels = clusters(20)
    features = features - features.mean(0)
    folds = label_errors._folds(labels, None)
    heads = label_errors._Sums.of(features, labels, 3, folds).heads(0.3)
    for rows, scores in label_errors._out_of_fold(features, labels, folds, heads):
        rest = np.setdiff1d(np.arange(60), rows)
        targets = np.eye(3)[labels[rest]] - np.bincount(labels[rest]) / len(rest)
        ridge = Ridge(0.3 * len(rest), fit_intercept=False).fit(features[rest], targets)
        expected = ridge.predict(features[rows]) + np.bincount(labels[rest]) / len(rest)
        np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_images_of_a_group_are_in_one_fold():
    _, labels = clusters(20)
    groups = np.arange(60) // 4
    folds = label_errors._folds(labels, groups)
    for number in range(folds.max() + 1):
        assert not {*groups[folds == number]} & {*groups[folds != number]}


def test_features_may_be_read_in_parts(monkeypatch):
    features, labels = clusters()
    labels[[3, 150]] = 2, 0
    whole = find_label_errors(features, labels)
    monkeypatch.setattr(label_errors, "_ROWS", 70)
    with FileRows(features.shape[1]) as rows:
        rows.append(features)
        parts = find_label_errors(rows, labels)
    np.testing.assert_array_equal(parts.positions, whole.positions)
    np.testing.assert_allclose(parts.probabilities, whole.probabilities, rtol=1e-4)


def test_two_images_per_class_are_needed():
    with pytest.raises(ValueError, match="at least 2 images"):
        find_label_errors(np.zeros((3, 2), np.float32), np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="1 class"):
        find_label_errors(np.zeros((3, 2), np.float32), np.array([0, 0, 0]))
