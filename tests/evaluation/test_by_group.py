from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from transfer.evaluation import by_group, metrics, prediction


def clustered(generator: np.random.Generator, num_groups: int, size: int) -> tuple:
    """Images whose accuracy varies between groups, with a mean of 0.8."""
    rates = generator.beta(2.0, 0.5, num_groups)
    right = generator.random((num_groups, size)) < rates[:, None]
    return right.ravel(), np.repeat(np.arange(num_groups), size)


def test_interval_covers_the_accuracy_of_new_groups() -> None:
    generator = np.random.default_rng(0)
    covered, naive = [], []
    for _ in range(400):
        right, groups = clustered(generator, 20, 15)
        low, high = by_group.wilson_interval(right.mean(), by_group.effective_size(right, groups))
        covered.append(low <= 0.8 <= high)
        low, high = by_group.wilson_interval(right.mean(), len(right))
        naive.append(low <= 0.8 <= high)
    assert np.mean(covered) >= 0.92
    assert np.mean(naive) < 0.75, "these images are not independent"


def test_effective_size_is_between_groups_and_images() -> None:
    groups = np.repeat(np.arange(40), 5)
    alike = np.repeat(np.arange(40) % 4 > 0, 5)
    assert by_group.effective_size(alike, groups) == pytest.approx(39, rel=0.1)
    independent = np.random.default_rng(0).random(2000) < 0.7
    assert by_group.effective_size(independent, np.arange(2000)) == pytest.approx(2000, rel=0.01)
    assert by_group.effective_size(np.ones(200, bool), groups) == 40
    assert by_group.effective_size(alike, np.zeros(200, int)) == 1


def test_wilson_interval_is_that_of_scipy() -> None:
    expected = binomtest(37, 50).proportion_ci(0.95, method="wilson")
    assert by_group.wilson_interval(0.74, 50) == pytest.approx((expected.low, expected.high))


def test_resamples_draw_whole_groups() -> None:
    groups = np.array([3, 1, 3, 7, 1, 3])
    resample = by_group.resampler(6, groups)
    sizes = set()
    for seed in range(20):
        drawn = resample(np.random.default_rng(seed))
        counts = np.bincount(drawn, minlength=6)
        assert all(len({*counts[groups == group].tolist()}) == 1 for group in (1, 3, 7))
        sizes.add(len(drawn))
    assert len(sizes) > 1
    plain = by_group.resampler(6, None)(np.random.default_rng(5))
    assert np.array_equal(plain, np.random.default_rng(5).integers(0, 6, 6))


@pytest.mark.parametrize(("first", "second"), [(9, 2), (5, 5), (30, 12), (1, 0)])
def test_test_of_single_images_is_mcnemars(first: int, second: int) -> None:
    difference = np.repeat([1, -1, 0], [first, second, 20])
    p_value = by_group.exchange_test(difference, np.arange(len(difference)))
    assert p_value == pytest.approx(binomtest(first, first + second).pvalue)


def test_test_of_groups_is_the_enumeration_of_all_signs() -> None:
    difference = np.array([1, 1, 0, 1, -1, 1, 1, 1, -1, 0])
    groups = np.array([0, 0, 0, 1, 2, 3, 3, 3, 4, 5])
    sums = np.array([2, 1, -1, 3, -1])
    signs = np.stack(np.meshgrid(*[[1, -1]] * 5)).reshape(5, -1)
    expected = (np.abs(sums @ signs) >= abs(sums.sum())).mean()
    assert by_group.exchange_test(difference, groups) == pytest.approx(expected)
    assert by_group.exchange_test(np.zeros(4, int), np.arange(4)) == 1.0
    labels, first = np.zeros(10, int), np.where(difference < 0, 1, 0)
    compared = metrics.compare(first, np.where(difference > 0, 1, 0), labels, groups)
    assert compared == {
        "only_first": 6,
        "only_second": 2,
        "p_value": pytest.approx(expected),
        "num_groups": 6,
    }


def test_groups_widen_all_intervals() -> None:
    generator = np.random.default_rng(1)
    right, groups = clustered(generator, 12, 20)
    labels = np.arange(240) % 2
    logits = np.where(np.eye(2)[np.where(right, labels, 1 - labels)] > 0, 2.0, 0.0)
    logits = logits.astype(np.float32)
    alone = metrics.measure(logits, labels, ["a", "b"], resamples=200)
    grouped = metrics.measure(logits, labels, ["a", "b"], groups=groups, resamples=200)
    for name in ("loss", "balanced_accuracy", "roc_auc"):
        assert np.diff(grouped["ci95"][name]) > np.diff(alone["ci95"][name])
    summary = prediction.summarize(logits, labels, groups)
    assert summary["num_groups"] == 12 and summary["effective_examples"] < 240
    assert np.diff(summary["accuracy_ci95"]) > np.diff(
        prediction.summarize(logits, labels)["accuracy_ci95"]
    )
    halves = prediction.summarize(np.eye(2)[np.zeros(240, int)], labels, labels)
    assert halves["effective_examples"] == 1  # not 0, of which there is no interval


def test_single_group_has_no_bootstrap_intervals() -> None:
    logits, labels = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]], np.array([0, 1, 0, 1])
    measured = metrics.measure(logits, labels, ["a", "b"], groups=np.zeros(4, int))
    low, high = prediction.summarize(logits, labels, np.zeros(4, int))["accuracy_ci95"]
    assert low < 0.1 and high > 0.9
    shares = {"accuracy": [low, high], "weighted_recall": [low, high], "top5": [1.0, 1.0]}
    for name, interval in measured["ci95"].items():
        assert interval == shares.get(name), name
    for row in measured["classes"]:
        assert row["ci95"]["recall"] == pytest.approx(by_group.wilson_interval(row["recall"], 1))


@pytest.mark.parametrize(("right", "total"), [(0, 7), (7, 7), (3, 4), (950, 1000)])
def test_interval_of_a_share_is_that_of_scipy(right: int, total: int) -> None:
    is_so = np.arange(total) < right
    expected = binomtest(right, total).proportion_ci(method="wilson")
    assert by_group.proportion_interval(is_so) == pytest.approx([expected.low, expected.high])
    if right == total:
        assert by_group.proportion_interval(is_so)[1] == 1.0


def test_interval_of_a_share_counts_groups() -> None:
    right, groups = np.ones(20, bool), np.repeat(np.arange(4), 5)
    assert by_group.proportion_interval(right, groups) == list(by_group.wilson_interval(1.0, 4))
