"""Out-of-distribution scores: how little an image is like the classes of a classifier.

Which unknown images a score tells apart depends on these images, so that a score promises nothing:
it is shown with what was measured on some unknown images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import tensorflow as tf

from transfer.core.tensors import Tensor
from transfer.evaluation.prediction import row_blocks
from transfer.layers.classifier import Classifier
from transfer.layers.head import average_over_space

Score = Literal["feature_distance", "energy", "max_probability"]
"""``feature_distance``: cosine distance of the features to the nearest class mean, 0 to 2.
``energy``: minus the log-sum-exp of the logits (arXiv 2010.03759); uninformative for a head solved
in closed form, whose logits have a constant sum and are extrapolated linearly.
``max_probability``: 1 minus the highest probability (arXiv 1610.02136)."""
SCORES: tuple[Score, ...] = get_args(Score)
_KEPT = 0.95


def features_and_logits(
    extractor: Callable[[Any], Any], head: Callable[..., Any]
) -> Callable[[Any], Tensor]:
    """A function that computes both, float32 ``[batch, num_features + num_classes]``.

    Args:
        extractor: maps inputs to features ``[batch, num_features]``, or ``[batch, height, width,
            num_features]``, which are averaged.
        head: maps them to logits.
    """

    def compute(inputs: Any) -> Tensor:
        features = extractor(inputs)
        logits = head(features, training=False)
        return tf.concat([tf.cast(average_over_space(features), tf.float32), logits], -1)

    return compute


def of_resized(classifier: Classifier) -> Callable[[Any], Tensor]:
    """``features_and_logits`` of the output of ``classifier.preprocess.resize``."""
    compute = features_and_logits(classifier.feature_extractor, classifier.head)
    return lambda pixels: compute(classifier.preprocess.normalize(pixels))


def logit_scores(logits: np.ndarray) -> dict[Score, np.ndarray]:
    """The scores that depend on the logits only; higher is less like the classes.

    Args:
        logits: float ``[num_examples, num_classes]``.

    Returns:
        ``energy`` and ``max_probability``, float64 ``[num_examples]``.
    """
    highest = logits.max(-1).astype(np.float64)
    log_sums = np.empty(len(logits))  # of exponentials relative to the highest
    for rows in row_blocks(logits):
        log_sums[rows] = np.log(np.exp(logits[rows] - highest[rows, None]).sum(-1))
    # Not 1 minus a probability, which is 0 for all images of a very confident classifier.
    return {"energy": -highest - log_sums, "max_probability": -np.expm1(-log_sums)}


def class_means(features: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Directions of the mean features of the classes.

    Args:
        features: float ``[num_examples, num_features]``; each image counts as a unit vector.
        labels: int ``[num_examples]``.
        num_classes: number of classes.

    Returns:
        Unit vectors, float32 ``[num_classes, num_features]``; NaN for a class without images.
    """
    means = _unit(_sums(_unit(features), labels, num_classes))
    means[np.bincount(labels, minlength=num_classes) == 0] = np.nan
    return means


def feature_distance(features: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Cosine distance to the nearest class mean, 0 to 2: float32 ``[num_examples]``.

    Args:
        features: float ``[num_examples, num_features]``.
        means: of ``class_means``.
    """
    return _distance(_unit(features) @ means.T)


def held_out_distance(
    features: np.ndarray, labels: np.ndarray, num_classes: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """``feature_distance`` of the images that the means are made of.

    An image is not compared with a mean that it, or another image of its group, is part of: of
    these means they are left out. Otherwise it would be nearer than a new image of its class.

    Args:
        features: float ``[num_examples, num_features]``.
        labels: int ``[num_examples]``.
        num_classes: number of classes.
        groups: group number of each image, int ``[num_examples]``.
    """
    unit, counts = _unit(features), np.bincount(labels, minlength=num_classes)
    sums = _sums(unit, labels, num_classes)
    similarity = unit @ class_means(features, labels, num_classes).T
    _, groups = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(groups))[:-1]):
        for label in np.unique(labels[rows]):
            own = rows[labels[rows] == label]
            rest = sums[label] - unit[own].sum(0)
            is_empty = counts[label] == len(own)
            similarity[rows, label] = np.nan if is_empty else unit[rows] @ _unit(rest)
    return _distance(similarity)


def separation(
    known: np.ndarray, unknown: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, Any]:
    """How well a score tells unknown images from images of the classes.

    Args:
        known: scores of images of the classes, float ``[num_known]``.
        unknown: scores of unknown images, float ``[num_unknown]``.
        groups: group number of each image of the classes, int ``[num_known]``.

    Returns:
        ``auroc``: the probability that an unknown image has a higher score than one of the classes,
        equal scores count half; ``auroc_ci95``: its DeLong interval (doi 10.2307/2531595) on the
        scale of the log odds, with groups that of Obuchowski (doi 10.2307/2533958); ``None`` if
        there is none, as for an AUROC of 1. ``threshold``: the score up to which 95 % of the images
        of the classes are kept; ``fpr95``: the share of the unknown images that are kept as well.

    Example:
        >>> import numpy as np
        >>> from transfer.evaluation.out_of_distribution import separation
        >>> found = separation(np.arange(20.0), np.arange(10.0, 30.0))
        >>> print(found["auroc"], found["threshold"], found["fpr95"])
        0.875 18.0 0.45
    """
    of_known, of_unknown = _placements(known, unknown), 1 - _placements(unknown, known)
    auroc = float(of_known.mean())
    variance = _variance_of_mean(of_known, groups) + _variance_of_mean(of_unknown, None)
    ordered = np.sort(known)
    threshold = float(ordered[int(np.ceil(_KEPT * len(known) - 1e-9)) - 1])
    return {
        "auroc": auroc,
        "auroc_ci95": _interval(auroc, variance),
        "threshold": threshold,
        "fpr95": float(np.mean(unknown <= threshold)),
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; those of zeros stay zeros."""
    rows = rows.astype(np.float32)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30))


def _sums(unit: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    sums = np.zeros((num_classes, unit.shape[1]))
    np.add.at(sums, labels, unit)
    return sums


def _distance(similarity: np.ndarray) -> np.ndarray:
    """1 minus the highest similarity, of the classes that have one."""
    return 1 - np.where(np.isnan(similarity), np.float32(-1), similarity).max(-1)


def _placements(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of the other scores that are higher than each score; equal ones count half."""
    ordered = np.sort(others)
    lower, upto = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
    return np.asarray(1 - (lower + upto) / (2 * len(others)))


def _variance_of_mean(values: np.ndarray, groups: np.ndarray | None) -> float:
    _, units = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    sums = np.bincount(units, values - values.mean())
    num_units = len(sums)
    if num_units < 2:
        return float("nan")
    return float(num_units / (num_units - 1) * (sums**2).sum() / len(values) ** 2)


def _interval(auroc: float, variance: float) -> list[float] | None:
    from scipy.special import expit, logit, ndtri

    if not variance > 0 or not 0 < auroc < 1:
        return None
    half = ndtri(0.975) * variance**0.5 / (auroc * (1 - auroc))
    return [float(expit(logit(auroc) - half)), float(expit(logit(auroc) + half))]
