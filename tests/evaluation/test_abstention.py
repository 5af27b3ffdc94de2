"""Risk-coverage curve and thresholds of a risk: by hand, and their guarantee by simulation."""

import numpy as np
import pytest
from scipy.stats import binomtest

from transfer.evaluation.abstention import (
    MAX_POINTS,
    risk_coverage,
    risk_threshold,
)


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


def draw(generator, num_examples, steepness=3.0):
    """Confidences, and whether predictions are right: the error rate falls with the confidence."""
    confidence = generator.random(num_examples)
    return confidence, generator.random(num_examples) >= 0.4 * (1 - confidence) ** steepness


def true_risk(threshold, steepness=3.0):
    """The error rate of ``draw`` from a threshold on: the mean of 0.4 (1 - c)^s over c >= t."""
    return 0.4 * (1 - threshold) ** steepness / (steepness + 1)


@pytest.mark.parametrize(
    ("risk", "num_examples", "steepness"), [(0.05, 500, 3.0), (0.02, 2000, 3.0), (0.1, 150, 1.0)]
)
def test_risk_is_exceeded_in_at_most_one_of_twenty_draws(risk, num_examples, steepness):
    generator, draws = np.random.default_rng(0), 2000
    exceeded = chosen = 0
    for _ in range(draws):
        found = risk_threshold(*draw(generator, num_examples, steepness), risk)
        if found["threshold"] is not None:
            chosen += 1
            exceeded += true_risk(found["threshold"], steepness) > risk
    assert binomtest(exceeded, draws, 0.05, alternative="greater").pvalue > 0.001
    assert chosen > draws / 10  # the guarantee is not an empty one


def test_risk_of_groups_is_exceeded_in_at_most_one_of_twenty_draws():
    """Images of a group are all right or all wrong: testing each image would be far too sure."""
    generator, draws, size = np.random.default_rng(0), 1000, 8
    exceeded = {True: 0, False: 0}
    for _ in range(draws):
        confidence, right = (np.repeat(values, size) for values in draw(generator, 150))
        groups = np.repeat(np.arange(150), size)
        for is_grouped in exceeded:
            found = risk_threshold(confidence, right, 0.05, groups if is_grouped else None)
            if found["threshold"] is not None:
                exceeded[is_grouped] += true_risk(found["threshold"]) > 0.05
    assert binomtest(exceeded[True], draws, 0.05, alternative="greater").pvalue > 0.001
    assert exceeded[False] > 0.1 * draws
    assert found["calibrated_on"] == 150 * size


def test_threshold_is_the_last_whose_bound_keeps_the_risk():
    confidence = np.linspace(1, 0.01, 400)
    wrong = np.isin(np.arange(400), [150, 152, 154, 156, 158, 160, 162, 164])
    found = risk_threshold(confidence, ~wrong, 0.05)
    # By scipy: the bound of k errors among n is above 0.05 for the first time at this n, from the
    # second of two starts on, which share the probability of an error.
    num_wrong = np.cumsum(wrong)
    numbers = range(100, 401)
    bounds = [
        binomtest(int(num_wrong[n - 1]), n, alternative="less").proportion_ci(0.975).high
        for n in numbers
    ]
    first = next(n for n, bound in zip(numbers, bounds, strict=True) if bound > 0.05)
    assert found["coverage"] == pytest.approx((first - 1) / 400)
    assert found["bound"] == pytest.approx(bounds[first - 1 - numbers[0]])
    assert confidence[first - 1] < found["threshold"] < confidence[first - 2]
    assert found["accuracy"] == pytest.approx(1 - num_wrong[first - 2] / (first - 1))


def test_early_error_does_not_end_the_tests():
    """One start with few images would keep 80 of these 400, with one error among them."""
    wrong = np.isin(np.arange(400), [80, 300, 399])
    found = risk_threshold(np.linspace(1, 0.01, 400), ~wrong, 0.05)
    assert (found["coverage"], found["threshold"]) == (1.0, 0.0)


def test_images_of_equal_confidence_are_kept_or_left_together():
    confidence = np.repeat([0.9, 0.6], [100, 100])
    right = np.arange(200) < 150
    found = risk_threshold(confidence, right, 0.05)
    assert (found["threshold"], found["coverage"]) == (0.8, 0.5)  # of few digits, between both
    everything = risk_threshold(np.ones(100), np.ones(100, bool), 0.05)
    assert (everything["threshold"], everything["coverage"]) == (0.0, 1.0)


def test_risk_that_cannot_be_kept_has_no_threshold():
    found = risk_threshold(np.linspace(1, 0, 58), np.ones(58, bool), 0.05)
    assert found["threshold"] is None and found["needed"] == 59
    assert risk_threshold(np.linspace(1, 0, 59), np.ones(59, bool), 0.05)["threshold"] == 0.0
    found = risk_threshold(np.linspace(1, 0, 300), np.arange(300) % 5 != 0, 0.05)
    assert (found["threshold"], found["accuracy"], found["coverage"]) == (None, None, 0.0)
    expected = binomtest(30, 150, alternative="less").proportion_ci(0.975).high
    assert found["bound"] == pytest.approx(expected)
    nothing_right = risk_threshold(np.linspace(1, 0, 80), np.zeros(80, bool), 0.05)
    assert nothing_right["bound"] == 1.0


def test_one_image_of_each_group_is_tested():
    confidence, groups = np.linspace(1, 0, 200), np.repeat(np.arange(50), 4)
    found = risk_threshold(confidence, np.ones(200, bool), 0.05, groups)
    assert (found["calibrated_on"], found["threshold"]) == (50, None)
    found = risk_threshold(confidence, np.ones(200, bool), 0.06, groups)
    assert (found["calibrated_on"], found["threshold"], found["coverage"]) == (50, 0.0, 1.0)


@pytest.mark.parametrize("risk", [0.0, 1.0, 1.5, float("nan")])
def test_impossible_risk_is_refused(risk):
    with pytest.raises(ValueError, match="risk must be more than 0 and less than 1"):
        risk_threshold(np.ones(80), np.ones(80, bool), risk)
