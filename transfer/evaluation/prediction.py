"""Logits, probabilities, and the metrics accuracy, top-5 accuracy and loss.

For 50,000 images and 1,000 classes the probabilities have 400 MB: ``row_blocks`` and ``by_class``
are for computing with them in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from transfer.activations.extraction import stream
from transfer.evaluation import by_group

_BLOCK = 2**21  # probabilities in memory at a time: 16 MB


def predict_logits(
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


def row_blocks(logits: np.ndarray) -> Iterator[slice]:
    """Slices that cover all rows of ``[num_examples, num_classes]``, each of a few megabytes."""
    num_examples, num_classes = logits.shape
    size = max(1, _BLOCK // num_classes)
    for start in range(0, num_examples, size):
        yield slice(start, min(start + size, num_examples))


def by_class(logits: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the probabilities of each class in turn, float64 ``[num_examples]``: the columns of
    ``probabilities(logits)``, of which only a few are in memory at any time."""
    num_examples, num_classes = logits.shape
    highest = logits.max(-1, keepdims=True).astype(np.float64)
    total = np.empty((num_examples, 1))
    for rows in row_blocks(logits):
        total[rows] = np.exp(logits[rows] - highest[rows]).sum(-1, keepdims=True)
    size = max(1, _BLOCK // num_examples)
    for first in range(0, num_classes, size):
        p = np.exp(logits[:, first : first + size] - highest)
        p /= total
        yield from np.ascontiguousarray(p.T)


def summarize(
    logits: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, Any]:
    """The ``eval`` part of ``metrics.json``.

    Args:
        logits: float ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``, 0 to num_classes - 1.
        groups: group number of each image, int ``[num_examples]``; see ``Source.groups``.

    Returns:
        ``accuracy`` and ``top5`` (0..1), ``loss`` (mean cross-entropy, nats), ``num_examples`` and
        ``accuracy_ci95``: the Wilson score interval (doi 10.1080/01621459.1927.10502953). With
        groups it is that of ``effective_examples``, the number of independent images that determine
        the accuracy as precisely (``by_group.effective_size``), and ``num_groups`` is their number.
    """
    from scipy.special import log_softmax
    from scipy.stats import binomtest
    from sklearn.metrics import accuracy_score

    num_examples = len(logits)
    correct = int(accuracy_score(labels, logits.argmax(-1), normalize=False))
    log_likelihoods, in_top5 = np.empty(num_examples), 0
    for rows in row_blocks(logits):
        with np.errstate(invalid="ignore"):  # with non-finite logits, the loss shows it
            log_probabilities = log_softmax(logits[rows].astype(np.float64), axis=-1)
        of_labels = np.take_along_axis(log_probabilities, labels[rows, None], axis=-1)
        log_likelihoods[rows] = of_labels[:, 0]
        in_top5 += _num_in_top5(logits[rows], labels[rows])
    of_groups: dict[str, Any] = {}
    if groups is None:
        low, high = binomtest(correct, num_examples).proportion_ci(0.95, method="wilson")
    else:
        size = by_group.effective_size(logits.argmax(-1) == labels, groups)
        low, high = by_group.wilson_interval(correct / num_examples, size)
        num_groups, effective = len(np.unique(groups)), max(1, round(size))
        of_groups = {"num_groups": num_groups, "effective_examples": effective}
    return {
        "accuracy": correct / num_examples,
        "top5": in_top5 / num_examples,
        "loss": float(-np.mean(log_likelihoods)),
        "num_examples": num_examples,
        "accuracy_ci95": [float(low), float(high)],
    } | of_groups


def _num_in_top5(logits: np.ndarray, labels: np.ndarray) -> int:
    """How many labels have fewer than five logits above their own, as in ``metrics.label_ranks``.
    Unlike scikit-learn's function it takes NaN, of which no label is among the first."""
    own = np.take_along_axis(logits, labels[:, None], axis=-1)
    return int(np.count_nonzero((~(logits <= own)).sum(-1) < 5))


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64 ``[num_classes, num_classes]``: rows are the labels, columns the predictions."""
    import sklearn.metrics

    classes = np.arange(logits.shape[1])
    return sklearn.metrics.confusion_matrix(labels, logits.argmax(-1), labels=classes)
