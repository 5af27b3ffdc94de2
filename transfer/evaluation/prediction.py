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

TOP_K = 5
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
    exponentials = np.exp(_below_highest(logits))
    return exponentials / exponentials.sum(-1, keepdims=True)


def check_share(name: str, value: float | None) -> None:
    """Validate a share of images that is neither none nor all of them; ``None`` is accepted.

    Raises:
        ValueError: names the argument.
    """
    if value is not None and not 0 < value < 1:
        raise ValueError(f"{name} must be more than 0 and less than 1, got {value}")


def label_scores(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods and ranks of the labels, both from the logits.

    A probability below 1e-308 is 0 in float64, so that with logits further apart than 708 its
    logarithm is lost, and classes seem equally probable whose logits differ.

    Args:
        logits: float ``[num_examples, num_classes]``.
        labels: int ``[num_examples]``.

    Returns:
        The logarithms of the probabilities of the labels, float64 ``[num_examples]``, and int64
        ``[num_examples]``: 1 plus the number of classes with a higher logit. A label with the logit
        NaN has the last rank.
    """
    log_likelihoods, ranks = np.empty(len(labels)), np.empty(len(labels), np.int64)
    for rows in row_blocks(logits):
        with np.errstate(invalid="ignore"):  # with non-finite logits, the loss shows it
            below = _below_highest(logits[rows])
            of_labels = np.take_along_axis(below, labels[rows, None], axis=-1)
            # Not `>`, which is false for NaN.
            ranks[rows] = 1 + np.count_nonzero(~(below <= of_labels), axis=-1)
            log_likelihoods[rows] = of_labels[:, 0] - np.log(np.exp(below).sum(-1))
    return log_likelihoods, np.minimum(ranks, logits.shape[1])


def _below_highest(logits: np.ndarray) -> np.ndarray:
    """The logits minus the highest of each row, float64."""
    wide = logits.astype(np.float64)
    return wide - wide.max(-1, keepdims=True)


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
    return summarize_labels(logits.argmax(-1) == labels, *label_scores(logits, labels), groups)


def summarize_labels(
    right: np.ndarray,
    log_likelihoods: np.ndarray,
    ranks: np.ndarray,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """``summarize``, from what is known of the label of each image.

    Args:
        right: whether it is predicted, bool ``[num_examples]``.
        log_likelihoods: of ``label_scores``.
        ranks: of ``label_scores``.
        groups: group number of each image, int ``[num_examples]``.
    """
    of_groups: dict[str, Any] = {}
    if groups is not None:
        effective = max(1, round(by_group.effective_size(right, groups)))
        of_groups = {"num_groups": len(np.unique(groups)), "effective_examples": effective}
    return {
        "accuracy": float(right.mean()),
        "top5": float((ranks <= TOP_K).mean()),
        "loss": float(-log_likelihoods.mean()),
        "num_examples": len(right),
        "accuracy_ci95": by_group.proportion_interval(right, groups),
    } | of_groups


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64 ``[num_classes, num_classes]``: rows are the labels, columns the predictions."""
    import sklearn.metrics

    classes = np.arange(logits.shape[1])
    return sklearn.metrics.confusion_matrix(labels, logits.argmax(-1), labels=classes)
