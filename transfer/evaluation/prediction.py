"""Logits, probabilities, and the metrics accuracy, top-5 accuracy and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from transfer.activations.extraction import stream


def predict(
    model: Callable[[Any], Any], batches: Iterable[tuple[Any, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of all batches, in their order.

    Args:
        model: maps inputs to logits ``[batch, num_classes]``, e.g. an ``extraction.Compiled``.
        batches: ``(inputs, labels)``.

    Returns:
        float32 ``[num_examples, num_classes]`` and int64 ``[num_examples]``.
    """
    outputs = [(logits, np.asarray(labels)) for logits, labels in stream(model, batches)]
    return np.concatenate([o[0] for o in outputs]), np.concatenate([o[1] for o in outputs])


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64."""
    from scipy.special import softmax

    return softmax(logits.astype(np.float64), axis=-1)


def summarize(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The ``eval`` part of ``metrics.json``.

    Args:
        logits: float ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``, 0 to num_classes - 1.

    Returns:
        ``accuracy`` and ``top5`` (0..1), ``loss`` (mean cross-entropy, nats), ``num_examples`` and
        ``accuracy_ci95``: the Wilson score interval (doi 10.1080/01621459.1927.10502953).
    """
    from scipy.special import log_softmax
    from scipy.stats import binomtest
    from sklearn.metrics import accuracy_score, top_k_accuracy_score

    num_examples, num_classes = logits.shape
    correct = int(accuracy_score(labels, logits.argmax(-1), normalize=False))
    with np.errstate(invalid="ignore"):  # with non-finite logits, the loss shows it
        log_probabilities = log_softmax(logits.astype(np.float64), axis=-1)
    interval = binomtest(correct, num_examples).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": correct / num_examples,
        "top5": float(top_k_accuracy_score(labels, logits, k=5, labels=range(num_classes)))
        if num_classes > 5
        else 1.0,
        "loss": float(-np.mean(log_probabilities[np.arange(num_examples), labels])),
        "num_examples": num_examples,
        "accuracy_ci95": [float(interval.low), float(interval.high)],
    }


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64 ``[num_classes, num_classes]``: rows are the labels, columns the predictions."""
    import sklearn.metrics

    classes = np.arange(logits.shape[1])
    return sklearn.metrics.confusion_matrix(labels, logits.argmax(-1), labels=classes)
