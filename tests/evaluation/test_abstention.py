"""Risk-coverage curve and conformal sets, by hand."""

import numpy as np
import pytest

from transfer.evaluation.abstention import MAX_POINTS, prediction_sets, risk_coverage


def test_risk_coverage_by_hand():
    confidence = np.array([0.9, 0.6, 0.8, 0.5])
    right = np.array([True, False, True, True])
    found = risk_coverage(confidence, right)
    assert [tuple(point.values()) for point in found["points"]] == [
        (0.9, 0.25, 1.0),
        (0.8, 0.5, 1.0),
        (0.6, 0.75, pytest.approx(2 / 3)),
        (0.5, 1.0, 0.75),
    ]
    assert found["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)


def test_images_of_equal_confidence_are_kept_together_in_any_order():
    confidence = np.array([0.9, 0.5, 0.5])
    for right in ([True, True, False], [True, False, True]):
        found = risk_coverage(confidence, np.array(right))
        assert [point["coverage"] for point in found["points"]] == [pytest.approx(1 / 3), 1.0]
        # One of two images is wrong: half an error after the first, one after the second.
        assert found["aurc"] == pytest.approx((0 + 0.5 / 2 + 1 / 3) / 3)


def test_curve_of_many_images_is_bounded_and_ends_at_the_accuracy():
    generator = np.random.default_rng(0)
    confidence, right = generator.random(5000), generator.random(5000) < 0.7
    points = risk_coverage(confidence, right)["points"]
    assert len(points) == MAX_POINTS
    assert points[-1]["coverage"] == 1.0
    assert points[-1]["accuracy"] == pytest.approx(right.mean())
    kept = confidence >= points[40]["threshold"]
    assert points[40]["coverage"] == pytest.approx(kept.mean())
    assert points[40]["accuracy"] == pytest.approx(right[kept].mean())


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
