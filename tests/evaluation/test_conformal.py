"""Conformal prediction sets: by hand, and their coverage by simulation."""

import numpy as np
import pytest

from transfer.evaluation.conformal import min_units, prediction_sets
from transfer.evaluation.prediction import probabilities


def sample(num_examples, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 5, num_examples)
    logits = generator.normal(size=(num_examples, 5)).astype(np.float32)
    logits[np.arange(num_examples), labels] += 1
    return logits, labels


def test_threshold_is_the_quantile_of_the_other_half():
    logits, labels = sample(38)
    found = prediction_sets(logits, labels, 0.9)
    assert found["calibrated_on"] == [19, 19]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    own = p[np.arange(38), labels]
    # 90 % of 19 + 1 are 18: of each half, 18 of 19 labels reach the threshold of the other half.
    first, second = found["thresholds"]
    halves = [own >= first - 1e-9, own >= second - 1e-9]
    assert any(np.isclose(own, first)) and any(np.isclose(own, second))
    assert all(half.sum() >= 18 for half in halves)


def test_measured_coverage_is_the_wanted_one_on_average():
    # Exactly, over random samples: between 0.9 and 0.9 + 1 / (n + 1).
    measured = [
        prediction_sets(*sample(200, seed), 0.9, seed=seed)["measured_coverage"]
        for seed in range(200)
    ]
    assert 0.9 - 3 * np.std(measured) / 200**0.5 < np.mean(measured)
    assert np.mean(measured) < 0.9 + 1 / 101 + 3 * np.std(measured) / 200**0.5


def test_few_images_give_sets_of_all_classes():
    found = prediction_sets(*sample(8), 0.9)
    assert found["thresholds"] == [0.0, 0.0]
    assert (found["mean_size"], found["measured_coverage"]) == (5.0, 1.0)
    assert found["threshold"] == 0.0 and not found["is_promised"]
    # Halves have too few, all images together enough.
    found = prediction_sets(*sample(9), 0.9)
    assert found["thresholds"] == [0.0, 0.0]
    assert found["threshold"] > 0 and found["is_promised"]


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_fewest_images_are_those_whose_threshold_is_positive(coverage):
    needed = min_units(coverage)
    for num_examples in (needed - 1, needed):
        if num_examples >= 2:
            found = prediction_sets(*sample(num_examples), coverage)
            assert (found["threshold"] > 0) == found["is_promised"] == (num_examples == needed)


def test_sets_of_new_images_have_the_threshold_of_all_images():
    logits, labels = sample(99)
    found = prediction_sets(logits, labels, 0.9)
    own = np.sort(probabilities(logits)[np.arange(99), labels])
    assert found["threshold"] == own[99 - 90]


def test_new_images_are_covered():
    """On average over calibration images, between 0.8 and 0.8 + 1 / (n + 1)."""
    covered = []
    for seed in range(400):
        threshold = prediction_sets(*sample(30, seed), 0.8)["threshold"]
        logits, labels = sample(100, 1000 + seed)
        covered.append((probabilities(logits)[np.arange(100), labels] >= threshold).mean())
    noise = 3 * np.std(covered) / 400**0.5
    assert 0.8 - noise < np.mean(covered) < 0.8 + 1 / 31 + noise


def clustered(num_groups, size, seed):
    """Images of groups that are easier or harder as a whole, easier ones the larger groups."""
    generator = np.random.default_rng(seed)
    ease = generator.normal(1, 2, num_groups)
    groups = np.repeat(np.arange(num_groups), np.where(ease > 1, 4 * size, size))
    labels = generator.integers(0, 5, len(groups))
    logits = generator.normal(size=(len(groups), 5)).astype(np.float32)
    logits[np.arange(len(groups)), labels] += ease[groups]
    return logits, labels, groups


def test_images_of_new_groups_are_covered():
    covered = []
    for seed in range(400):
        logits, labels, groups = clustered(12, 5, seed)
        threshold = prediction_sets(logits, labels, 0.85, groups)["threshold"]
        logits, labels, groups = clustered(40, 5, 1000 + seed)
        is_in = probabilities(logits)[np.arange(len(labels)), labels] >= threshold
        covered.append(np.mean([is_in[groups == group].mean() for group in range(40)]))
    assert np.mean(covered) > 0.85 - 3 * np.std(covered) / 400**0.5
    assert np.mean(covered) < 0.95


def test_groups_count_and_not_images():
    logits, labels = sample(80)
    groups = np.arange(80) // 10
    found = prediction_sets(logits, labels, 0.9, groups)
    assert found["threshold"] == 0.0 and not found["is_promised"]
    assert prediction_sets(logits, labels, 0.85, groups)["is_promised"]
    alone = prediction_sets(logits, labels, 0.9, np.arange(80))
    assert alone == prediction_sets(logits, labels, 0.9)


def test_halves_consist_of_whole_groups():
    logits, labels = sample(40)
    found = prediction_sets(logits, labels, 0.5, np.repeat([0, 1, 2], [30, 5, 5]))
    assert sorted(found["calibrated_on"]) in ([5, 35], [10, 30])


@pytest.mark.parametrize("coverage", [0.0, 1.0, float("nan")])
def test_impossible_coverage_is_refused(coverage):
    with pytest.raises(ValueError, match="coverage must be more than 0"):
        prediction_sets(*sample(8), coverage)


def test_single_group_cannot_be_halved():
    with pytest.raises(ValueError, match="at least two images, or groups"):
        prediction_sets(*sample(8), 0.9, np.zeros(8, int))
