"""Out-of-distribution scores, and how their separation is measured."""

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score

from transfer.evaluation import out_of_distribution as ood


def test_logit_scores_equal_scipy():
    logits = np.random.default_rng(0).normal(0, 3, (50, 7)).astype(np.float32)
    found = ood.logit_scores(logits)
    wide = logits.astype(float)
    np.testing.assert_allclose(found["energy"], -logsumexp(wide, -1), rtol=1e-12)
    np.testing.assert_allclose(found["max_probability"], 1 - softmax(wide, -1).max(-1), rtol=1e-9)


def test_confident_images_are_still_ordered():
    """Their probability rounds to 1 in float64."""
    found = ood.logit_scores(np.array([[60.0, 0.0], [50.0, 0.0]]))["max_probability"]
    assert found == pytest.approx(np.exp([-60.0, -50.0]), rel=1e-12)


@pytest.mark.parametrize("decimals", [1, 6])
def test_auroc_equals_scikit_learn(decimals):
    generator = np.random.default_rng(decimals)
    known = np.round(generator.normal(0, 1, 83), decimals)  # with one decimal, many are equal
    unknown = np.round(generator.normal(1, 2, 41), decimals)
    found = ood.separation(known, unknown)
    is_unknown = np.repeat([0, 1], [83, 41])
    expected = roc_auc_score(is_unknown, np.concatenate([known, unknown]))
    assert found["auroc"] == pytest.approx(expected, rel=1e-12)
    assert (known <= found["threshold"]).mean() >= 0.95
    assert (known < found["threshold"]).mean() < 0.95
    assert found["fpr95"] == (unknown <= found["threshold"]).mean()


def test_variance_is_that_of_delong():
    """By its definition: covariances of the comparisons of all pairs."""
    generator = np.random.default_rng(0)
    known, unknown = generator.normal(0, 1, 30), generator.normal(1, 1, 20)
    pairs = (unknown[None] > known[:, None]).astype(float)
    auroc = pairs.mean()
    variance = pairs.mean(1).var(ddof=1) / 30 + pairs.mean(0).var(ddof=1) / 20
    half = 1.959964 * variance**0.5 / (auroc * (1 - auroc))
    odds = np.log(auroc / (1 - auroc)) + np.array([-half, half])
    assert ood.separation(known, unknown)["auroc_ci95"] == pytest.approx(1 / (1 + np.exp(-odds)))


def test_intervals_cover_the_auroc():
    generator = np.random.default_rng(0)
    truth = 0.9213504  # P(N(2, 1) > N(0, 1)) = Phi(sqrt(2))
    covered = 0
    for _ in range(500):
        known, unknown = generator.normal(0, 1, 60), generator.normal(2, 1, 40)
        low, high = ood.separation(known, unknown)["auroc_ci95"]
        covered += low <= truth <= high
    assert 460 <= covered <= 495


def test_intervals_of_groups_cover_the_auroc():
    """Images of a group have similar scores; intervals of independent images are too narrow."""
    generator = np.random.default_rng(0)
    truth, groups = 0.9213504, np.repeat(np.arange(30), 5)
    covered = {True: 0, False: 0}
    for _ in range(300):
        known = np.repeat(generator.normal(0, 0.9**0.5, 30), 5)
        known = known + generator.normal(0, 0.1**0.5, 150)
        unknown = generator.normal(2, 1, 200)
        for is_grouped in covered:
            found = ood.separation(known, unknown, groups if is_grouped else None)
            low, high = found["auroc_ci95"]
            covered[is_grouped] += low <= truth <= high
    assert covered[True] >= 270 > covered[False]


def test_perfect_separation_has_no_interval():
    found = ood.separation(np.arange(10.0), np.arange(20.0, 25.0))
    assert (found["auroc"], found["auroc_ci95"], found["fpr95"]) == (1.0, None, 0.0)
    assert ood.separation(np.arange(10.0), np.array([5.5]))["auroc_ci95"] is None


def test_distance_is_that_of_the_nearest_mean():
    features = np.array([[2.0, 0], [3, 0], [0, 1], [0, 5]])
    means = ood.class_means(features, np.array([0, 0, 1, 1]), 3)
    np.testing.assert_allclose(means[:2], np.eye(2))
    assert np.isnan(means[2]).all()
    found = ood.feature_distance(np.array([[7.0, 0], [1, 1], [-1, 0], [0, 0]]), means)
    np.testing.assert_allclose(found, [0, 1 - 0.5**0.5, 1, 1], atol=1e-6)


@pytest.mark.parametrize("is_grouped", [False, True])
def test_held_out_images_are_compared_with_means_of_the_others(is_grouped):
    generator = np.random.default_rng(0)
    features = generator.random((24, 5)).astype(np.float32)
    labels = np.arange(24) % 3
    groups = np.arange(24) // 4 if is_grouped else None
    found = ood.held_out_distance(features, labels, 3, groups)
    for index in range(24):
        rest = groups != groups[index] if is_grouped else np.arange(24) != index
        means = ood.class_means(features[rest], labels[rest], 3)
        expected = ood.feature_distance(features[index : index + 1], means)
        assert found[index] == pytest.approx(expected[0], abs=1e-6)


def test_only_image_of_its_class_is_compared_with_other_classes():
    features, labels = np.array([[1.0, 0], [0, 1], [0, 2]]), np.array([0, 1, 1])
    np.testing.assert_allclose(ood.held_out_distance(features, labels, 2), [1, 0, 0], atol=1e-6)
    assert ood.held_out_distance(features[:1], labels[:1], 2).tolist() == [2.0]


def test_unknown_images_are_not_nearer_than_held_out_ones_by_chance():
    """Noise without classes: compared with means that they are part of, images would be nearer."""
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(300, 40)), generator.integers(0, 10, 300)
    unknown = ood.feature_distance(
        generator.normal(size=(300, 40)), ood.class_means(features, labels, 10)
    )
    held_out = ood.held_out_distance(features, labels, 10)
    low, high = ood.separation(held_out, unknown)["auroc_ci95"]
    assert low < 0.5 < high
    naive = ood.feature_distance(features, ood.class_means(features, labels, 10))
    assert ood.separation(naive, unknown)["auroc"] > 0.6
