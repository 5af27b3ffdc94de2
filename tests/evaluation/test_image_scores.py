import numpy as np
import pytest
import sklearn.metrics

from transfer.evaluation import prediction
from transfer.evaluation.image_scores import TOP_K, score_images


def sample(num_examples, num_classes):
    generator = np.random.default_rng(num_classes)
    logits = generator.normal(size=(num_examples, num_classes)).astype(np.float32)
    return logits, generator.integers(0, num_classes, num_examples)


@pytest.mark.parametrize("num_classes", [2, 5, 6, 300])
def test_top_classes_equal_those_of_a_stable_sort(monkeypatch, num_classes):
    monkeypatch.setattr(prediction, "_BLOCK", 5 * num_classes)  # 5 images at a time
    logits, labels = sample(43, num_classes)
    logits = np.round(logits, 1)  # many are equal
    scores = score_images(logits, labels)
    p = prediction.probabilities(logits)
    order = np.argsort(-p, axis=-1, kind="stable")[:, :TOP_K]
    np.testing.assert_array_equal(scores.top, order)
    np.testing.assert_array_equal(scores.top_probabilities, np.take_along_axis(p, order, -1))
    np.testing.assert_array_equal(scores.predictions, logits.argmax(-1))
    np.testing.assert_array_equal(scores.confidences, p.max(-1))
    np.testing.assert_allclose(scores.label_probabilities, p[np.arange(43), labels], rtol=1e-12)


def test_ranks_of_labels_equal_scikit_learn():
    logits, labels = sample(200, 30)
    ranks = score_images(logits, labels).label_ranks
    for k in (1, 2, 5, 29):
        expected = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(30))
        assert (ranks <= k).mean() == expected
