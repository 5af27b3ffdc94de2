import numpy as np
import pytest
import sklearn.metrics

from transfer.evaluation import prediction

LOGITS = np.log([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3], [0.25, 0.5, 0.25]])
LABELS = np.array([0, 2, 0, 1])


def test_summarize_by_hand():
    figures = prediction.summarize(LOGITS, LABELS)
    assert figures["accuracy"] == 0.75
    assert figures["top5"] == 1.0
    assert figures["num_examples"] == 4
    assert figures["loss"] == pytest.approx(-np.mean(np.log([0.7, 0.6, 0.2, 0.5])))
    # Wilson, 3 of 4, z = 1.96: centre (0.75 + z2/8)/(1 + z2/4), z2 = 3.8415
    assert figures["accuracy_ci95"] == pytest.approx([0.3006, 0.9544], abs=1e-4)


def test_summarize_equals_scikit_learn():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(200, 12)).astype(np.float32)
    labels = generator.integers(0, 12, 200)
    figures = prediction.summarize(logits, labels)
    p = prediction.probabilities(logits)
    assert figures["accuracy"] == sklearn.metrics.accuracy_score(labels, logits.argmax(-1))
    assert figures["top5"] == sklearn.metrics.top_k_accuracy_score(labels, logits, k=5)
    assert figures["loss"] == pytest.approx(sklearn.metrics.log_loss(labels, p), rel=1e-6)


def test_diverged_network_has_no_accuracy_and_no_finite_loss():
    figures = prediction.summarize(np.full((4, 12), np.nan, np.float32), np.array([3, 4, 5, 6]))
    assert figures["accuracy"] == figures["top5"] == 0 and np.isnan(figures["loss"])


def test_loss_and_rank_are_those_of_logits_whose_probabilities_vanish():
    """Below 1e-308, probabilities are 0, their logarithms and their order are lost."""
    logits = np.array([[2000.0, 0, -10, -20, -30, -40, -50], [0, 0, 0, 0, 0, 0, 1.0]])
    log_likelihoods, ranks = prediction.label_scores(logits, np.array([6, 6]))
    assert log_likelihoods == pytest.approx([-2050, -np.log(1 + 6 / np.e)])
    assert ranks.tolist() == [7, 1]
    assert prediction.label_scores(logits[:1], np.array([4]))[1].tolist() == [5]


def test_results_in_blocks_equal_those_at_once(monkeypatch):
    generator = np.random.default_rng(0)
    logits = (5 * generator.normal(size=(101, 12))).astype(np.float32)
    labels = generator.integers(0, 12, 101)
    expected = prediction.summarize(logits, labels)
    monkeypatch.setattr(prediction, "_BLOCK", 50)
    assert prediction.summarize(logits, labels) == expected
    rows = np.concatenate([np.arange(101)[rows] for rows in prediction.row_blocks(logits)])
    np.testing.assert_array_equal(rows, np.arange(101))
    columns = np.stack(list(prediction.by_class(logits)), axis=-1)
    np.testing.assert_array_equal(columns, prediction.probabilities(logits))


def test_summarize_ignores_absent_classes():
    figures = prediction.summarize(np.eye(7, dtype=np.float32)[:2], np.array([0, 1]))
    assert figures["accuracy"] == figures["top5"] == 1.0


def test_predict_counts_the_last_partial_batch():
    batches = [(LOGITS[:3], LABELS[:3]), (LOGITS[3:], LABELS[3:])]
    logits, labels = prediction.predict_logits(lambda x: x, batches)
    np.testing.assert_array_equal(logits, LOGITS)
    np.testing.assert_array_equal(labels, LABELS)


def test_confusion_matrix_rows_are_labels():
    expected = [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert prediction.confusion_matrix(LOGITS, LABELS).tolist() == expected
