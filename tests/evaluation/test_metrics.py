import numpy as np
import pytest
import sklearn.metrics

from transfer.evaluation import by_group, metrics, prediction
from transfer.evaluation.prediction import probabilities

LOGITS = np.log([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3], [0.25, 0.5, 0.25]])
LABELS = np.array([0, 2, 0, 1])


def sample(num_examples=300, num_classes=6, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_examples)
    logits = generator.normal(size=(num_examples, num_classes)).astype(np.float32)
    logits[np.arange(num_examples), labels] += 1
    return logits, labels, [f"class {number}" for number in range(num_classes)]


def wilson(right, total):
    """The 95 % Wilson score interval, as a list."""
    return list(by_group.wilson_interval(right / total, total))


def test_metrics_by_hand():
    found = metrics.measure(LOGITS, LABELS, ["a", "b", "c"], resamples=20)
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    a, b, c = found["classes"]
    assert (a["precision"], a["recall"], a["support"]) == (1.0, 0.5, 2)
    assert a["f1"] == pytest.approx(2 / 3)
    assert (b["precision"], b["recall"], b["support"]) == (0.5, 1.0, 1)
    assert (c["precision"], c["recall"], c["f1"]) == (1.0, 1.0, 1.0)
    assert found["macro"]["precision"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["weighted"]["precision"] == pytest.approx((2 * 1 + 0.5 + 1) / 4)
    # p(a) of a: 0.7 and 0.2; of the others 0.1 and 0.25: three of four pairs are in order.
    assert a["roc_auc"] == pytest.approx(3 / 4)
    # Confidences 0.7, 0.6, 0.5 (wrong), 0.5, in bins 10, 9, 7, 7 of 15.
    assert found["calibration_error"] == pytest.approx((0.3 + 0.4 + abs(1 - 1.0)) / 4)


def test_metrics_equal_scikit_learn():
    logits, labels, names = sample()
    found = metrics.measure(logits, labels, names, resamples=20)
    p, predictions = probabilities(logits), logits.argmax(-1)
    report = sklearn.metrics.classification_report(
        labels, predictions, target_names=names, output_dict=True
    )
    for row in found["classes"]:
        expected = report[row["label"]]
        assert row["precision"] == pytest.approx(expected["precision"])
        assert row["recall"] == pytest.approx(expected["recall"])
        assert row["f1"] == pytest.approx(expected["f1-score"])
        assert row["support"] == expected["support"]
    for kind in ("macro", "weighted"):
        assert found[kind]["f1"] == pytest.approx(report[f"{kind} avg"]["f1-score"])
        assert found[kind]["recall"] == pytest.approx(report[f"{kind} avg"]["recall"])
    balanced = sklearn.metrics.balanced_accuracy_score(labels, predictions)
    assert found["balanced_accuracy"] == pytest.approx(balanced)
    auc = sklearn.metrics.roc_auc_score(labels, p, multi_class="ovr")
    assert found["roc_auc"] == pytest.approx(auc)
    one_hot = np.eye(6)[labels]
    precision = sklearn.metrics.average_precision_score(one_hot, p)
    assert found["average_precision"] == pytest.approx(precision)


@pytest.mark.parametrize("num_classes", [2, 7, 40])
def test_ranks_equal_scikit_learn(num_classes):
    logits, labels, _ = sample(500, num_classes, seed=num_classes)
    p = probabilities(np.round(logits))  # many are equal
    found = metrics._ranks(p.T, labels)
    for number in range(num_classes):
        scores, is_it = p[:, number], labels == number
        for name, score in (
            ("roc_auc", sklearn.metrics.roc_auc_score),
            ("average_precision", sklearn.metrics.average_precision_score),
        ):
            assert found[name][number] == pytest.approx(score(is_it, scores), rel=1e-12), name


def test_metrics_in_blocks_equal_those_at_once(monkeypatch):
    logits, labels, names = sample(101, 30)
    expected = metrics.measure(logits, labels, names, resamples=20)
    monkeypatch.setattr(prediction, "_BLOCK", 400)
    assert metrics.measure(logits, labels, names, resamples=20) == expected


def test_most_confused_equal_the_confusion_matrix():
    logits, labels, names = sample()
    found = metrics.measure(logits, labels, names, resamples=2)["most_confused"]
    counts = sklearn.metrics.confusion_matrix(labels, logits.argmax(-1))
    off = np.where(np.eye(6, dtype=bool), 0, counts)
    assert [row["count"] for row in found] == sorted(off.ravel(), reverse=True)[:20]
    for row in found:
        label, predicted = names.index(row["label"]), names.index(row["prediction"])
        assert row["count"] == off[label, predicted]
        assert row["share"] == row["count"] / counts[label].sum()
    right = np.eye(6)[labels]
    assert metrics.measure(right, labels, names, resamples=2)["most_confused"] == []


def test_logits_that_are_not_finite_are_refused():
    logits, labels, names = sample()
    logits[3, 2], logits[7, 1] = np.nan, np.inf
    with pytest.raises(ValueError, match="the logits of 2 of 300 images are infinite or not a"):
        metrics.measure(logits, labels, names)


@pytest.mark.slow
def test_intervals_have_nominal_coverage():
    """Over many samples, 95 % of the intervals contain the true accuracy."""
    samples = (sample(seed=seed) for seed in range(200))
    truth = np.mean([(logits.argmax(-1) == labels).mean() for logits, labels, _ in samples])
    covered = 0
    for seed in range(50):
        logits, labels, names = sample(100, seed=1000 + seed)
        low, high = metrics.measure(logits, labels, names, resamples=100)["ci95"]["accuracy"]
        covered += low <= truth <= high
    assert 42 <= covered <= 50


def test_resampled_ranks_equal_scikit_learn():
    logits, labels, _ = sample(80, 4)
    p = probabilities(np.round(logits))  # many are equal
    resampled = metrics._resampled_ranks(p, labels)
    for seed in range(5):
        chosen = np.random.default_rng(seed).integers(0, 80, 80)
        found = resampled(np.bincount(chosen, minlength=80))
        for name, expected in metrics._ranks(p[chosen].T, labels[chosen]).items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-12, err_msg=name)


def test_intervals_are_repeatable_and_contain_the_metric():
    logits, labels, names = sample()
    first, second = (metrics.measure(logits, labels, names, resamples=200) for _ in range(2))
    assert first == second
    for name in ("balanced_accuracy", "roc_auc", "average_precision"):
        low, high = first["ci95"][name]
        assert low < first[name] < high
    low, high = first["ci95"]["macro_f1"]
    assert low < first["macro"]["f1"] < high


def test_intervals_contain_the_metric_with_few_images_per_class():
    """Plain percentiles are above the average precision: fewer distinct images make it larger."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 100, 1000)
    logits = generator.normal(size=(1000, 100)) + 1.5 * np.eye(100)[labels]
    found = metrics.measure(logits, labels, [str(n) for n in range(100)], resamples=100)
    single = found | {"macro_f1": found["macro"]["f1"]}
    for name in ("average_precision", "roc_auc", "macro_f1", "calibration_error"):
        low, high = found["ci95"][name]
        assert low <= single[name] <= high
    low, high = found["ci95"]["average_precision"]
    assert low < single["average_precision"] - 0.005


def test_each_class_has_intervals():
    logits, labels, names = sample()
    found = metrics.measure(logits, labels, names, resamples=100)
    for row in found["classes"]:
        assert row["ci95"].keys() == {"precision", "recall", "f1", "roc_auc", "average_precision"}
        for name, (low, high) in row["ci95"].items():
            assert 0 <= low <= row[name] <= high <= 1


def test_accuracy_recall_and_precision_have_wilson_intervals():
    """Also where all images are right, so that no bootstrap resample has an error."""
    labels = np.repeat(np.arange(3), [20, 4, 1])
    logits = 3 * np.eye(3)[labels]
    found = metrics.measure(logits, labels, list("abc"), resamples=50)
    summary = prediction.summarize(logits, labels)
    assert found["ci95"]["accuracy"] == summary["accuracy_ci95"] == wilson(25, 25)
    assert found["ci95"]["weighted_recall"] == summary["accuracy_ci95"]
    for row, size in zip(found["classes"], (20, 4, 1), strict=True):
        assert row["ci95"]["recall"] == row["ci95"]["precision"] == wilson(size, size)
        # The bootstrap tells nothing here, and an interval from 1 to 1 would be wrong.
        assert row["ci95"]["f1"] is row["ci95"]["roc_auc"] is None
    assert found["ci95"]["macro_f1"] is found["ci95"]["balanced_accuracy"] is None
    assert wilson(20, 20)[0] == pytest.approx(0.8389, abs=1e-4)


def test_interval_of_a_class_needs_five_images_or_groups():
    logits, labels, names = sample(300, 3)
    few = np.flatnonzero(labels == 0)[4:]
    logits, labels = np.delete(logits, few, 0), np.delete(labels, few)
    found = metrics.measure(logits, labels, names, resamples=100)["classes"]
    for name in ("f1", "roc_auc", "average_precision"):
        assert [row["ci95"][name] is None for row in found] == [True, False, False]
    groups = np.where(labels == 1, np.arange(len(labels)) % 4, 10 + np.arange(len(labels)))
    found = metrics.measure(logits, labels, names, groups=groups, resamples=100)["classes"]
    assert [row["ci95"]["f1"] is None for row in found] == [True, True, False]


def test_class_that_is_never_predicted_has_no_interval_of_its_precision():
    labels = np.array([0] * 6 + [1] * 6)
    found = metrics.measure(np.tile([1.0, 0.0], (12, 1)), labels, ["a", "b"], resamples=20)
    assert found["classes"][1]["ci95"]["precision"] is None
    assert found["classes"][1]["ci95"]["recall"] == wilson(0, 6)


def test_equal_numbers_have_equal_intervals():
    logits, labels, names = sample(60)
    found = metrics.measure(logits, labels, names, resamples=100)
    assert found["weighted"]["recall"] == pytest.approx(found["accuracy"])
    assert found["ci95"]["weighted_recall"] == found["ci95"]["accuracy"]
    assert found["macro"]["recall"] == found["balanced_accuracy"]
    assert found["ci95"]["macro_recall"] == found["ci95"]["balanced_accuracy"]


def test_metrics_of_very_different_logits_equal_the_summary():
    """With margins above 745, probabilities of labels are 0, and their logarithms were cut off."""
    labels = np.repeat(np.arange(6), 5)
    logits = 2000.0 * np.eye(6)[np.where(np.arange(30) % 2, labels, 5 - labels)]
    logits -= 10.0 * np.arange(6)
    found = metrics.measure(logits, labels, list("abcdef"), resamples=100)
    summary = prediction.summarize(logits, labels)
    for name in ("accuracy", "top5", "loss"):
        assert found[name] == summary[name]
        low, high = found["ci95"][name]
        assert low < found[name] < high
    assert found["loss"] == pytest.approx(1000, rel=0.1)


def test_class_without_images_has_no_rank_metrics():
    logits, labels, names = sample()
    found = metrics.measure(logits, np.where(labels == 3, 2, labels), names, resamples=20)
    assert found["classes"][3]["support"] == 0
    assert found["classes"][3]["roc_auc"] is None
    assert 0 < found["roc_auc"] < 1


def test_single_class_has_no_rank_metrics():
    logits = np.zeros((4, 2), np.float32)
    found = metrics.measure(logits, np.zeros(4, int), ["a", "b"], resamples=5)
    assert found["roc_auc"] is None
    assert found["ci95"]["roc_auc"] is None
    assert found["balanced_accuracy"] == 1.0


def test_calibration_counts_every_image():
    logits, labels, _ = sample()
    p = probabilities(logits)
    bins = metrics.calibration(p.max(-1), p.argmax(-1) == labels)
    assert sum(row["count"] for row in bins) == len(labels)
    for row in bins:
        assert row["low"] <= row["confidence"] <= row["high"]
    weighted = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in bins)
    found = metrics.measure(logits, labels, list("abcdef"), resamples=5)
    assert found["calibration_error"] == pytest.approx(weighted / len(labels))
    error = metrics.expected_calibration_error(p.max(-1), p.argmax(-1) == labels)
    assert error == pytest.approx(found["calibration_error"])


def test_mcnemar_equals_binomial_test():
    labels = np.zeros(20, int)
    first = np.array([0] * 15 + [1] * 5)
    second = np.array([0] * 5 + [1] * 10 + [0] * 2 + [1] * 3)
    found = metrics.compare(first, second, labels)
    assert (found["only_first"], found["only_second"]) == (10, 2)
    # Two-sided binomial: 2 * (C(12,0) + C(12,1) + C(12,2)) / 2^12
    assert found["p_value"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert metrics.compare(first, first, labels)["p_value"] == 1.0
